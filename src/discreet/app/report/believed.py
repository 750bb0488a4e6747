"""The section on probabilities: verdict, reliability diagram, figures beside chance, temperature, groups, advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from discreet.app.report import parts
from discreet.app.report.plots import can_draw
from discreet.app.report.record import RunRecord, mapping, number, records, texts, word
from discreet.app.report.reliability import groups_figure, reliability_figure, temperature_figure
from discreet.app.report.text import named, percent, plain, safe

HEADING = "Can its probabilities be believed?"

_MEASURES = (
    (
        "ece",
        "Expected calibration error",
        "mean distance of confidence from the share that is right, 15 bins",
        "ece_floor",
    ),
    ("adaptive_ece", "The same, bins of equal mass", "ties share a bin", "adaptive_floor"),
    (
        "classwise_ece",
        "The same, class by class",
        "mean over the classes of each one's own probability",
        "classwise_floor",
    ),
    ("rms", "Root mean squared gap", "weighs large gaps more", "rms_floor"),
    ("mce", "Largest gap of a bin", "among bins with 1 % of the rows or more", ""),
    ("gap", "Confidence minus accuracy", "above 0: too sure of itself", ""),
    ("nll", "Negative log-likelihood", "nats per row; a sure wrong answer is expensive", ""),
    ("brier", "Brier score", "squared distance from the truth, 0 to 2", ""),
    ("optimal_temperature", "Best temperature T*", "above 1: too sure; logits divided by it fit best", ""),
    ("calibration_loss", "Calibration loss", "nats per row that T* would win", ""),
)


def run_section(run: RunRecord) -> str:
    """The section of a run's page; nothing without a calibration report."""
    return calibration_section(run.calibration, temperature=run.temperature)


def calibration_section(record: Mapping[str, Any], *, temperature: Mapping[str, Any]) -> str:
    """The section from a report's JSON record, exact or within a budget, and the record of an applied temperature."""
    if number(record, "ece") is None:
        return ""
    blocks = [
        _stamp(record),
        parts.paragraph(verdict(record), role="claim"),
        parts.paragraph(rows, role="note") if (rows := measured_on(record)) else "",
        _applied(temperature),
        parts.figure(reliability_figure(record), caption=_CAPTION),
        parts.table(("Measure", "Value", "Chance alone", "95 % interval"), rows=_rows(record), numeric=(1, 2, 3)),
        _budget_note(record),
        _picture(
            "One number that mends most of it",
            temperature_figure(record),
            "The loss of the same answers at other temperatures. The band is the 95 % interval of the best one.",
        ),
        _groups(record),
        _advice(record),
    ]
    if not can_draw():
        blocks.append(parts.paragraph("Install the extra discreet[report] to see the pictures here.", role="note"))
    return parts.section(HEADING, markup=blocks)


_CAPTION = (
    "Bars: how often it was right among answers of that confidence. Where a bar ends below the diagonal the model is "
    "too sure, and the gap is red; above it, not sure enough. Whiskers: 95 % intervals. Below: how many rows each bin "
    "holds; trust the tall ones."
)


def verdict(record: Mapping[str, Any]) -> str:
    """One sentence that anybody understands."""
    listed = "listed_accuracy" if "listed_accuracy" in record else "accuracy"
    accuracy, gap = number(record, listed), number(record, "gap") or 0.0
    ece, floor, high = number(record, "ece"), number(record, "ece_floor"), number(record, "ece_floor_high")
    if ece is None or floor is None or accuracy is None:
        return ""
    size = f"calibration error {ece:.3f}, where chance alone would show {floor:.3f}"
    if ece <= (high if high is not None else 1.5 * floor):
        return f"No fault can be seen in the probabilities: {size}."
    if abs(gap) < 0.5 * ece:
        return f"Some probabilities are too high and others too low: {size}."
    words = "too sure of itself" if gap > 0 else "not sure enough"
    whose = "On rows of a listed class it says on average" if number(record, "unlisted") else "On average it says"
    return f"{whose} {percent(accuracy + gap)} and is right {percent(accuracy)} of the time: {words}; {size}."


def measured_on(record: Mapping[str, Any]) -> str:
    """Which rows the figures are over, where some test rows have no listed class; else nothing."""
    unlisted = number(record, "unlisted")
    if not unlisted:
        return ""
    rows = plain(number(record, "examples"))
    return (
        f"Of {rows} test rows {plain(unlisted)} are of no listed class. They count as wrong "
        "in the test accuracy, and have no probability that could be compared: figures of probabilities are over the "
        f"{plain(number(record, 'listed'))} test rows of a listed class."
    )


def _stamp(record: Mapping[str, Any]) -> str:
    stamp = word(record, "stamp")
    if not stamp:
        return ""
    return parts.paragraph(
        f"<strong>{safe(stamp)}</strong>These figures are exact ones of rows that were not said to be public. No "
        "epsilon covers them: they are for a look inside, and publishing this page publishes them.",
        role="stamp",
    )


def _applied(temperature: Mapping[str, Any]) -> str:
    value = number(temperature, "temperature")
    if value is None:
        return ""
    noise, sampling = number(temperature, "noise_std"), number(temperature, "sampling_std")
    origin = word(temperature, "examples_are") or "of unknown origin"
    doubts = [f"{name} {amount:.2g}" for name, amount in (("noise", noise), ("sampling", sampling)) if amount]
    doubt = f" (standard deviation from {', from '.join(doubts)})" if doubts else ""
    return parts.paragraph(
        f"All of this is with the model's logits divided by the temperature {value:.4g}{safe(doubt)}, fitted on "
        f"{plain(number(temperature, 'examples'))} rows, {safe(origin)}.",
        role="note",
    )


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    intervals, stds = mapping(record, "intervals"), mapping(record, "stds")
    rows = []
    for key, name, note, floor in _MEASURES:
        value = number(record, key)
        if value is None:
            continue
        if key == "mce":
            note = f"{note}; this one has {plain(number(record, 'mce_examples'))} rows"
        chance = number(record, floor) if floor else None
        shown = f"{value:.3f}" if key == "optimal_temperature" else f"{value:.4f}"
        rows.append(
            (
                f"{name}<small>{note}</small>",
                shown,
                "" if chance is None else f"{chance:.4f}",
                _interval(intervals.get(key)) or _noise(number(stds, key)),
            )
        )
    return rows


def _interval(found: object) -> str:
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(end, int | float) for end in found):
        return ""
    return f"{found[0]:.4f} to {found[1]:.4f}"


def _noise(std: float | None) -> str:
    return "" if std is None else f"noise ± {1.96 * std:.4f}"


def _budget_note(record: Mapping[str, Any]) -> str:
    noise, lower = number(record, "ece_noise"), number(record, "ece_without_noise")
    if noise is None or lower is None:
        return ""
    return parts.paragraph(
        f"These figures carry noise. In a sum of absolute values noise does not cancel: alone it makes an error of "
        f"{noise:.4f} on average, and adds no more than that on average; what is left without it is {lower:.4f}. "
        f"Each row's loss counts as at most {plain(number(record, 'nll_bound'))} nats.",
        role="note",
    )


def _picture(title: str, drawn: str, caption: str) -> str:
    return f"<h3>{safe(title)}</h3>\n{parts.figure(drawn, caption=caption)}" if drawn else ""


def _groups(record: Mapping[str, Any]) -> str:
    groups = records(record, "groups")
    rows = [
        (
            named(word(group, "name")),
            plain(number(group, "examples")),
            percent(number(group, "accuracy")),
            _figure(number(group, "gap"), sign=True),
            _figure(number(group, "ece")),
            _figure(number(group, "ece_floor")),
        )
        for group in groups
    ]
    header = ("Group", "Rows", "Accuracy", "Confidence − accuracy", "ECE", "Chance alone")
    table = parts.table(header, rows=rows, numeric=(1, 2, 3, 4, 5))
    drawn = _picture(
        "Group by group",
        groups_figure(record),
        "A small group shows a large error by chance alone: compare with its stroke.",
    )
    return f"{drawn}\n{table}" if table else ""


def _figure(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def _advice(record: Mapping[str, Any]) -> str:
    found = texts(record, "advice")
    return f"<h3>What to do</h3>\n{parts.listing(found)}" if found else ""
