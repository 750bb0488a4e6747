"""Curves as inline SVG that takes its colours from the page; needs the extra ``report`` and is silent without it."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 600
_INCHES = (3.9, 2.4)
_COLOURS = {
    "#010101": "--accent",
    "#020202": "--ink",
    "#030303": "--soft",
    "#040404": "--line",
    "#050505": "--alarm",
    "#060606": "--accent2",
    "#070707": "--accent3",
}
"""Colours that stand for the page's own, so that one drawing serves light, dark and paper."""
ACCENT, INK, SOFT, LINE, ALARM, ACCENT2, ACCENT3 = _COLOURS


@dataclass(frozen=True)
class Curve:
    """One drawing: what it is called, its points, and an optional level that it must stay below.

    Attributes:
        name: letters only; makes the drawing's identifiers unique on the page.
        label: the title above the axes.
        points: (step, value), steps ascending.
        limit: a level drawn dashed, with its label.
        percent: whether values are shares, shown as percentages.
    """

    name: str
    label: str
    points: Sequence[tuple[int, float]]
    limit: tuple[str, float] | None = None
    percent: bool = False


def can_draw() -> bool:
    """Whether the extra ``report`` is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curve_svg(curve: Curve) -> str:
    """The drawing as SVG markup without scripts, links, metadata or own colours; empty when it cannot be drawn."""
    points = thinned([point for point in curve.points if math.isfinite(point[1])])
    if len(points) < 2 or not can_draw():
        return ""
    with canvas(curve.name) as (drawn, axes):
        axes.plot([step for step, _ in points], [value for _, value in points], color=ACCENT, linewidth=1.8)
        axes.plot(*points[-1], marker="o", markersize=4.5, color=ACCENT)
        if curve.limit is not None and math.isfinite(curve.limit[1]):
            _draw_limit(axes, curve.limit)
        if curve.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        axes.set_title(curve.label, loc="left", fontsize=10, color=INK, pad=9)
        axes.set_xlabel("step", loc="right")
        axes.margins(x=0.03, y=0.12)
    return for_page(drawn.getvalue(), prefix=curve.name)


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MOST_POINTS` points, the last one always among them."""
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


@contextmanager
def canvas(name: str, *, inches: tuple[float, float] = _INCHES) -> Iterator[tuple[io.StringIO, Axes]]:
    """Axes in the page's style; when the block ends, the text stream holds the drawing, for `for_page`."""
    with stacked(name, inches=inches, heights=(1.0,)) as (drawn, (axes,)):
        yield drawn, axes


@contextmanager
def stacked(
    name: str, *, inches: tuple[float, float], heights: tuple[float, ...]
) -> Iterator[tuple[io.StringIO, list[Axes]]]:
    """The same with axes one above the other, in the given relative heights, over one horizontal axis."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.unicode_minus": True,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 5),
    }
    drawn = io.StringIO()
    with matplotlib.rc_context(style):
        sheet = Figure(figsize=inches, layout="constrained")
        sheet.patch.set_visible(False)
        grid = sheet.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
        for axes in grid[:, 0]:
            axes.patch.set_visible(False)
            axes.locator_params(axis="both", nbins=5)
        yield drawn, list(grid[:, 0])
        sheet.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def _draw_limit(axes: Axes, limit: tuple[str, float]) -> None:
    label, level = limit
    axes.axhline(level, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        xy=(0.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        color=SOFT,
    )


def for_page(svg: str, *, prefix: str) -> str:
    """matplotlib's file as a fragment: no prologue, names of its own, the page's colours and the page's font."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'(<svg[^>]*?)\s(?:width|height)="[^"]*"', r"\1", body)
    body = re.sub(r'(<svg[^>]*?)\s(?:width|height)="[^"]*"', r"\1", body)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r'href="#([^"]*)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"<text (?![^>]*fill)(style=\")", r"<text \1fill: var(--ink); ", body)
    for placeholder, variable in _COLOURS.items():
        body = body.replace(placeholder, f"var({variable})")
    return re.sub(r"\n\s*", "\n", body)
