"""write_page(): the plans side by side, why they are what they are, and the pictures behind them, in one file."""

from __future__ import annotations

from pathlib import Path

from discreet.app.plan_page.sections import (
    changes_section,
    headline,
    pictures_section,
    plans_section,
    reasons_section,
    simulation_section,
    warnings_section,
)
from discreet.app.plan_page.simulated import Simulation
from discreet.app.report import parts
from discreet.errors import ConfigError
from discreet.privacy.files import write_atomically
from discreet.privacy.options import Proposal


def render_page(proposal: Proposal, *, simulation: Simulation | None = None) -> str:
    """The whole page as text. A function of its arguments alone: the same proposal gives the same page."""
    plan = proposal.plan
    return parts.page(
        title=f"Plan for {plan.examples} examples at epsilon {plan.epsilon:g}",
        markup=[
            headline(proposal),
            plans_section(proposal),
            reasons_section(proposal),
            pictures_section(proposal),
            simulation_section(proposal, simulation),
            changes_section(proposal),
            warnings_section(proposal),
        ],
    )


def write_page(proposal: Proposal, path: Path, *, simulation: Simulation | None = None) -> None:
    """Write the page, whole or not at all. It holds no script, loads nothing, and every text in it is escaped.

    Raises:
        ConfigError: it cannot be written there.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a file, e.g. plan.html.")
    text = render_page(proposal, simulation=simulation)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name a file that can.") from None
