"""From a proposal to one self-contained page with pictures; see `write_page`."""

from __future__ import annotations

from discreet.app.plan_page.build import render_page, write_page

__all__ = ["render_page", "write_page"]
