"""From a run's release folder to one self-contained page, `release/report.html`; see `write_report`."""

from __future__ import annotations

from discreet.app.report.build import PAGE, render_report, write_report
from discreet.app.report.record import RunRecord, Stamp, read_run

__all__ = ["PAGE", "RunRecord", "Stamp", "read_run", "render_report", "write_report"]
