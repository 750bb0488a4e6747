"""The pictures of a calibration report as inline SVG in the page's colours; empty without the extra ``report``.

They are drawn from the report's JSON record, so that a run's page and `discreet calibrate` show the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from discreet.app.report.axes import DASHES, both_grids, say, short
from discreet.app.report.plots import ACCENT, ACCENT2, ACCENT3, ALARM, INK, SOFT, can_draw, canvas, for_page, stacked
from discreet.app.report.record import mapping, number, records, word
from discreet.app.report.text import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NOTABLE = 3.0
"""A noisy count below so many standard deviations of its noise says nothing about its bin."""
MOST_GROUPS = 24


def reliability_figure(record: Mapping[str, Any]) -> str:
    """Share of right answers against confidence, the gap to the diagonal coloured, whiskers, and counts below."""
    bars = _bars(mapping(record, "reliability"))
    if not bars or not can_draw():
        return ""
    edges = _floats(mapping(record, "reliability"), "edges")
    with stacked("reliability", inches=(6.4, 5.0), heights=(4.2, 1.0)) as (drawn, (axes, below)):
        both_grids(axes)
        left = max(0.0, min(bar.left for bar in bars) - 0.02)
        axes.plot([left, 1], [left, 1], color=SOFT, linewidth=1.0, linestyle=DASHES)
        for bar in bars:
            _draw_bar(axes, bar)
            below.bar(bar.middle, bar.count, width=0.86 * (bar.right - bar.left), color=ACCENT3, linewidth=0)
        _annotate(axes, record, left=left)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share that is right")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        below.set_xlim(left, 1.005)
        below.set_ylabel("rows")
        below.yaxis.set_major_formatter(lambda value, _: short(value))
        below.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        below.locator_params(axis="y", nbins=3)
        below.set_xlabel(f"what the model says: confidence in its answer, in {len(edges) - 1} bins")
        _stamp(axes, record)
    return for_page(drawn.getvalue(), prefix="reliability")


def temperature_figure(record: Mapping[str, Any]) -> str:
    """Negative log-likelihood against the temperature, with the best one and 1 marked."""
    points = record.get("temperature_curve")
    best, loss = number(record, "optimal_temperature"), number(record, "calibration_loss")
    curve = [point for point in points if _is_point(point)] if isinstance(points, list) else []
    if len(curve) < 3 or best is None or not can_draw():
        return ""
    with canvas("temperature", inches=(6.4, 2.9)) as (drawn, axes):
        both_grids(axes)
        axes.set_xscale("log")
        x, y = [point[0] for point in curve], [point[1] for point in curve]
        axes.plot(x, y, color=ACCENT, linewidth=2.0)
        low, span = min(y), max(y) - min(y) or 1.0
        interval = mapping(record, "intervals").get("optimal_temperature")
        if isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, float | int) for end in interval):
            axes.axvspan(max(x[0], interval[0]), min(x[-1], interval[1]), color=ACCENT3, alpha=0.3, linewidth=0)
        now = min(curve, key=lambda point: abs(math.log(point[0])))
        axes.plot(best, low, marker="o", markersize=7, color=ACCENT, markeredgecolor=INK)
        say(axes, f"T* = {best:.3g}", at=(best, low), shift=(-12, -17), colour=INK, weight="bold")
        if abs(math.log(now[0])) < 0.05 and abs(math.log(best)) > 0.02:
            axes.plot(1.0, now[1], marker="o", markersize=6, color=ALARM, markeredgecolor=INK)
            won = "" if loss is None else f", {loss:.3g} nats above the best"
            say(axes, f"as it is (T = 1){won}", at=(1.0, now[1]), shift=(6, 48), colour=ALARM)
        ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20) if x[0] <= tick <= x[-1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(low - 0.3 * span, low + 1.1 * span)
        axes.set_xlabel("temperature: what the logits are divided by")
        axes.set_ylabel("nats per row")
        _stamp(axes, record)
    return for_page(drawn.getvalue(), prefix="temperature")


def groups_figure(record: Mapping[str, Any]) -> str:
    """Calibration error of each group beside what chance alone would show; too sure and not sure enough by colour."""
    groups = [group for group in records(record, "groups") if number(group, "ece") is not None][:MOST_GROUPS]
    if len(groups) < 2 or not can_draw():
        return ""
    with canvas("groups", inches=(6.4, 0.9 + 0.3 * len(groups))) as (drawn, axes):
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        names, most = [], 0.0
        for place, group in enumerate(reversed(groups)):
            error, high = number(group, "ece") or 0.0, number(group, "ece_floor_high") or 0.0
            sure = (number(group, "gap") or 0.0) > 0
            seen = error > high
            colour = (ALARM if sure else ACCENT2) if seen else ACCENT3
            axes.barh(place, error, height=0.6, color=colour, alpha=0.6, linewidth=0)
            axes.plot([high, high], [place - 0.38, place + 0.38], color=INK, linewidth=1.4)
            what = ("too sure" if sure else "not sure enough") if seen else "chance"
            say(
                axes,
                f"{error:.3f}  {what}",
                at=(max(error, high), place),
                shift=(5, -3),
                colour=colour if seen else SOFT,
            )
            names.append(f"{_clean(word(group, 'name'))} ({short(number(group, 'examples') or 0)})")
            most = max(most, error, high)
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.set_xlim(0, 1.35 * most if most > 0 else 1)
        axes.set_xlabel("calibration error (ECE); the stroke: what a perfect model stays below, 95 times in 100")
        _stamp(axes, record)
    return for_page(drawn.getvalue(), prefix="groups")


class _Bar:
    """One bin: where it is, how often one was right there, and how sure of that one can be."""

    def __init__(
        self, left: float, right: float, count: float, confidence: float, accuracy: float, half: float
    ) -> None:
        self.left, self.right, self.middle = left, right, (left + right) / 2
        self.count, self.confidence, self.accuracy, self._half = count, confidence, min(max(accuracy, 0.0), 1.0), half

    @property
    def whiskers(self) -> tuple[float, float]:
        """The 95 % interval of the share: Wilson's, wider where there is noise."""
        low, high = wilson(self.accuracy, count=max(1, round(self.count)))
        return max(0.0, low - self._half), min(1.0, high + self._half)


def _bars(table: Mapping[str, Any]) -> list[_Bar]:
    """Bins that hold something. Exact tables hold sums of confidence and right answers; noisy ones gaps."""
    edges, counts = _floats(table, "edges"), _floats(table, "count")
    gaps, confidences, right = _floats(table, "gap"), _floats(table, "confidence"), _floats(table, "correct")
    noise, gap_noise = number(table, "count_std") or 0.0, number(table, "gap_std") or 0.0
    noisy = bool(gaps)
    if len(edges) != len(counts) + 1 or len(gaps if noisy else right) != len(counts):
        return []
    found = []
    for index, count in enumerate(counts):
        if count <= 0 or count < _NOTABLE * noise:
            continue
        low, high = edges[index], edges[index + 1]
        confidence = (low + high) / 2 if noisy else confidences[index] / count
        accuracy = confidence + gaps[index] / count if noisy else right[index] / count
        found.append(_Bar(low, high, count, confidence, accuracy, 1.96 * gap_noise / count))
    return found


def _draw_bar(axes: Axes, bar: _Bar) -> None:
    inner = 0.86 * (bar.right - bar.left)
    axes.bar(bar.middle, bar.accuracy, width=inner, color=ACCENT, alpha=0.55, linewidth=0)
    low, high = sorted((bar.accuracy, bar.confidence))
    too_sure = bar.confidence > bar.accuracy
    axes.bar(
        bar.middle,
        high - low,
        bottom=low,
        width=inner,
        color=ALARM if too_sure else ACCENT2,
        alpha=0.45,
        linewidth=0,
    )
    axes.plot([bar.middle - inner / 2, bar.middle + inner / 2], [bar.confidence] * 2, color=SOFT, linewidth=1.0)
    bottom, top = bar.whiskers
    axes.errorbar(
        bar.middle,
        bar.accuracy,
        yerr=[[max(0.0, bar.accuracy - bottom)], [max(0.0, top - bar.accuracy)]],
        color=INK,
        linewidth=1.2,
        capsize=2.5,
        marker="o",
        markersize=3.5,
    )


def _annotate(axes: Axes, record: Mapping[str, Any], *, left: float) -> None:
    ece, floor, gap = number(record, "ece"), number(record, "ece_floor"), number(record, "gap")
    if ece is None or floor is None:
        return
    place = (left + 0.02 * (1 - left), 0.965)
    say(axes, f"ECE {ece:.3f}", at=place, shift=(0, -4), colour=INK, weight="bold")
    say(axes, f"chance alone: {floor:.3f}", at=place, shift=(0, -17), colour=SOFT)
    if gap is not None:
        words = "too sure" if gap > 0 else "not sure enough"
        say(axes, f"{words} by {abs(gap):.3f}", at=place, shift=(0, -30), colour=ALARM if gap > 0 else ACCENT2)


def _stamp(axes: Axes, record: Mapping[str, Any]) -> None:
    """A picture leaves its page easily: the stamp is in it."""
    stamp = word(record, "stamp")
    if stamp:
        axes.set_title(stamp, loc="right", fontsize=9, color=ALARM, fontweight="bold")


def _floats(record: Mapping[str, Any], key: str) -> Sequence[float]:
    values = record.get(key)
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        return []
    return [float(value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_point(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(_is_number(value) for value in point) and point[0] > 0


def _clean(name: str) -> str:
    """A group's name in a drawing: short, and without the dollar signs in which matplotlib sees formulas."""
    plain = "".join(letter if letter.isprintable() and letter != "$" else "\u00b7" for letter in name)
    return plain if len(plain) <= 24 else plain[:23] + "…"
