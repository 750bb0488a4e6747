"""The figures of a plan, formatted once for page and terminal: the rows of the table, the numbers with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from discreet.app.report.text import duration, plain, scientific, storage
from discreet.privacy.options import Option


@dataclass(frozen=True)
class Row:
    """One figure of a plan.

    Attributes:
        label: its name in a terminal, complete in itself.
        title, note: its name on a page, and what it is.
        figure: of an option, as the page shows it; empty where it is not known.
    """

    label: str
    title: str
    note: str
    figure: Callable[[Option], str]


_BATCH = Row("batch size", "Batch size", "expected examples per step", lambda o: plain(o.plan.batch_size))
_STEPS = Row("steps", "Steps", "updates of the model", lambda o: plain(o.plan.steps))
_NOISE = Row(
    "noise multiplier",
    "Noise multiplier",
    "in units of one example's largest share",
    lambda o: plain(o.plan.noise_multiplier),
)
_MICROBATCH = Row(
    "microbatch", "Microbatch", "examples at a time", lambda o: "" if o.microbatch is None else plain(o.microbatch)
)
_DELTA = Row("delta", "Delta", "chance that the bound fails", lambda o: scientific(o.plan.delta))

ROWS = (
    _BATCH,
    _STEPS,
    _NOISE,
    Row("passes over the data", "Passes", "over the data", lambda o: f"{o.epochs:.3g}"),
    Row("noise, of full batches 1", "Noise", "per step, over that of full batches", lambda o: f"{o.overhead:.3f}"),
    Row("batch / knee batch", "Distance to the knee", "batch over the knee batch", lambda o: f"{o.knee_share:.2f}"),
    Row(
        "batch / batch at the wall",
        "Distance to the wall",
        "batch over the one whose noise is twice the floor",
        lambda o: f"{o.wall_share:.2f}",
    ),
    Row(
        "signal / noise, at most",
        "Signal to noise, at most",
        "in one step; the true signal is a fact about the data",
        lambda o: "" if o.signal is None else f"{o.signal:.2g}",
    ),
    _MICROBATCH,
    Row("time", "Time", "of the private updates", lambda o: "" if o.seconds is None else duration(o.seconds)),
    Row("memory", "Memory", "at the peak", lambda o: "" if o.peak_bytes is None else storage(o.peak_bytes)),
    Row("cost", "Cost", "at the price told", lambda o: "" if o.cost is None else f"{o.cost:.3g}"),
    Row("keeps the bound", "Keeps the bound", "", lambda o: "yes" if o.fits else "no"),
)
"""The rows of the table of plans, in this order; one that no option has a figure for is left out."""

_REASONED = {
    "batch_size": _BATCH,
    "steps": _STEPS,
    "noise_multiplier": _NOISE,
    "microbatch": _MICROBATCH,
    "delta": _DELTA,
}


def known_rows(options: tuple[Option, ...]) -> list[tuple[Row, list[str]]]:
    """The rows of the table with their cells, one for each option."""
    rows = [(row, [row.figure(option) for option in options]) for row in ROWS]
    return [(row, cells) for row, cells in rows if any(cells)]


def reasons(option: Option) -> list[tuple[Row, str]]:
    """The numbers of a plan that have a reason, each with it."""
    return [(row, option.reasons[key]) for key, row in _REASONED.items() if key in option.reasons]


_POWER = re.compile(" × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
_LINE = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def in_terminal(figure: str) -> str:
    """A figure of a page in plain characters: ``2,881`` for thin spaces, ``5.6e-6`` for powers of ten."""
    shown = _POWER.sub(lambda power: f"e{power[1].translate(_LINE)}", figure)
    return shown.replace("\u202f", ",").replace("\u00a0", " ")
