"""write_report(): the page, section by section, from what a run has released."""

from __future__ import annotations

import shlex
from pathlib import Path

from discreet.app.report import parts
from discreet.app.report.believed import run_section
from discreet.app.report.evidence import check_section, data_section, plan_section, verify_section
from discreet.app.report.rate import rate_section
from discreet.app.report.record import RunRecord, read_run
from discreet.app.report.story import (
    budget_section,
    curves_section,
    guarantee_section,
    headline,
    limits_section,
    metrics_section,
)
from discreet.errors import NotWritten
from discreet.privacy.files import write_atomically

PAGE = Path("release", "report.html")
"""Where the page of a run lies in its folder."""


def render_report(run: RunRecord) -> str:
    """The whole page as text. A function of the record alone: the same run gives the same page."""
    return parts.page(
        title=f"{run.name} · {run.stamp.value} model",
        markup=[
            headline(run),
            guarantee_section(run),
            limits_section(run),
            metrics_section(run),
            run_section(run),
            budget_section(run),
            curves_section(run),
            rate_section(run),
            data_section(run),
            check_section(run),
            plan_section(run),
            verify_section(run),
        ],
    )


def write_report(run_dir: Path) -> Path:
    """Read ``run_dir/release`` and write ``run_dir/release/report.html``.

    **Guarantees.** Nothing outside `release/` is read. The page holds no script and loads nothing; every name in it is
    escaped. It appears whole or not at all, also where a file or a link of that name was before.

    Args:
        run_dir: the folder of a run, with a `release/plan.json` in it.

    Returns:
        The path of the page.

    Raises:
        DataError: a file of the run is missing or damaged.
        NotWritten: the page cannot be written.
    """
    path = run_dir / PAGE
    text = render_report(read_run(run_dir))
    try:
        write_atomically(path, text)
    except OSError as error:
        raise NotWritten(
            f"{path}: cannot be written ({error.strerror}); the rest of the run is as it was; free some space or make "
            f"the folder writable, then repeat `discreet report {shlex.quote(str(run_dir))}`."
        ) from error
    return path
