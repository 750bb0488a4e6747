"""From a proposal to one self-contained page with pictures; see `write_page`."""

from __future__ import annotations

from discreet.app.plan_page.build import render_page, write_page
from discreet.app.plan_page.simulated import Simulation, read_simulation

__all__ = ["Simulation", "read_simulation", "render_page", "write_page"]
