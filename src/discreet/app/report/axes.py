"""What drawings share beyond the canvas: grids, labels beside points, and ticks as people write numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from discreet.app.report.plots import LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = (0, (4, 3))


def both_grids(axes: Axes) -> None:
    """Lines across and upright, at the large ticks only."""
    axes.grid(visible=True, which="major", axis="both", color=LINE, linewidth=0.8)
    axes.minorticks_off()


def say(
    axes: Axes,
    words: str,
    *,
    at: tuple[float, float],
    shift: tuple[float, float],
    colour: str,
    weight: str = "normal",
    right: bool = False,
) -> None:
    """A label beside a point."""
    axes.annotate(
        words,
        xy=at,
        xytext=shift,
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        fontweight=weight,
        ha="right" if right else "left",
    )


def plain_ticks(axes: Axes, *, x: tuple[float, ...], y: tuple[float, ...]) -> None:
    """Ticks at round numbers, written as people write them."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_xticks([tick for tick in x if left <= tick <= right])
    axes.set_yticks([tick for tick in y if bottom <= tick <= top])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))
    axes.minorticks_off()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def nice(low: float, high: float) -> tuple[float, ...]:
    """1, 2, 5, 10, ... between two numbers; powers of ten alone over more than three decades."""
    wide = math.log10(high / low) > 3
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return tuple(digit * 10.0**power for power in powers for digit in ((1,) if wide else (1, 2, 5)))


def short(value: float) -> str:
    """30 k, 1.5 M: short enough for a tick."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            scale = 1e3 if unit == " k" else size
            return f"{value / scale:.4g}{unit}".replace(" ", "\u202f")
    return f"{value:.4g}"
