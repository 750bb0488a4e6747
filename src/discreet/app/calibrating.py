"""`discreet calibrate`: the calibration report of any model's predictions, or of a run, as text, JSON and a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discreet.app.charged_report import charged_report
from discreet.app.evaluation import Evaluation
from discreet.app.predictions import Faults, Loaded, Scale, load_predictions
from discreet.app.report import parts, read_run
from discreet.app.report.believed import HEADING, calibration_section, measured_on, verdict
from discreet.app.report.record import mapping, number, texts, word
from discreet.app.report.text import named, plain, scientific, upward, wilson
from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.insight.calibration import CalibrationReport, Predictions, calibration_report
from discreet.insight.calibration.advice import Seen, advice
from discreet.insight.origin import Origin
from discreet.privacy.files import write_atomically
from discreet.privacy.plan import default_delta


@dataclass(frozen=True)
class CalibrateOptions:
    """What a user may say about predictions.

    Attributes:
        data: a file of predictions, or a run directory.
        label, group: columns. columns: those of the classes. scale: what the numbers are.
        origin: PUBLIC only when the user says so. epsilon, delta: report within a budget instead.
        out: a new run directory for the ledger of a report within a budget. html: a page to write.
    """

    data: Path
    label: str | None = None
    group: str | None = None
    columns: tuple[str, ...] | None = None
    scale: Scale = Scale.AUTO
    origin: Origin = Origin.PRIVATE
    epsilon: float | None = None
    delta: float | None = None
    out: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class Calibrated:
    """A finished command: the record that it prints with ``--json``, its text, and where files were written."""

    record: dict[str, Any]
    lines: tuple[str, ...]

    def text(self) -> str:
        """What the command prints."""
        return "\n".join(self.lines)


def calibrate(options: CalibrateOptions) -> Calibrated:
    """Report on predictions, or on what a finished run wrote down.

    Raises:
        ConfigError: options that contradict each other, or a run without a calibration report.
        DataError: the file is wrong.
    """
    if options.data.is_dir():
        return _of_run(options)
    _check(options)
    loaded = load_predictions(
        options.data,
        label=options.label,
        group=options.group,
        scale=options.scale,
        columns=options.columns,
        faults=Faults.REFUSED if options.epsilon is None else Faults.HARMLESS,
    )
    if options.epsilon is not None:
        return _within_budget(loaded, options)
    found = calibration_report(predictions_of(loaded), origin=options.origin)
    record = with_advice(found)
    return _told(record, options, notes=(f"taken for {loaded.scale.value}",))


def predictions_of(loaded: Loaded) -> Predictions:
    """Checked predictions of a file."""
    if loaded.scale is Scale.PROBABILITIES:
        return Predictions.from_probabilities(loaded.scores_NK.exp(), loaded.target_N, groups=loaded.groups)
    return Predictions.from_logits(loaded.scores_NK, loaded.target_N, groups=loaded.groups)


def with_advice(
    found: CalibrationReport,
    *,
    test: Evaluation | None = None,
    clipping: Clipping | None = None,
    fitted: bool = False,
) -> dict[str, Any]:
    """A report's JSON record, with what to do about it.

    Args:
        test: figures on all test rows, where the report is about those of a listed class: ``examples`` and ``accuracy``
            are then over all of them, as in ``result.json``, and ``listed`` and ``listed_accuracy`` are the report's.
        clipping: the rule that the model was trained under, if it is known.
        fitted: whether a temperature from rows of its own is applied already.
    """
    seen = Seen(
        temperature=found.temperature.value,
        std=found.temperature.std,
        loss=found.temperature.calibration_loss,
        fitted=fitted,
        private=bool(found.stamp),
        clipping=clipping,
    )
    record = {**found.to_json(), "advice": list(advice(seen))}
    return record if test is None else _over_all_rows(record, test)


def _over_all_rows(record: dict[str, Any], test: Evaluation) -> dict[str, Any]:
    intervals = mapping(record, "intervals")
    return record | {
        "examples": test.examples,
        "listed": test.listed,
        "unlisted": test.unlisted,
        "accuracy": test.accuracy,
        "listed_accuracy": record["accuracy"],
        "intervals": {
            **intervals,
            "accuracy": list(wilson(test.accuracy, count=test.examples)),
            "listed_accuracy": intervals["accuracy"],
        },
    }


def short_facts(found: CalibrationReport) -> dict[str, object]:
    """The figures that `discreet train` prints beside the calibration error."""
    stamp = f", {found.stamp}" if found.stamp else ""
    return {
        f"chance alone would show{stamp}": round(found.ece_floor.mean, 4),
        "confidence minus accuracy": round(found.gap, 4),
        "best temperature": round(found.temperature.value, 3),
    }


def _check(options: CalibrateOptions) -> None:
    if options.epsilon is None:
        for name, value in (("--delta", options.delta), ("--out", options.out)):
            if value is not None:
                raise ConfigError(f"{name} without --epsilon: there is no budget to keep; leave it out.")
        return
    if options.origin is Origin.PUBLIC:
        raise ConfigError("--epsilon with --public: public rows need no noise; leave one of them out.")
    if options.group is not None:
        raise ConfigError("--group with --epsilon: groups are not reported within a budget; leave it out.")
    if not 0 < options.epsilon < math.inf:
        raise ConfigError(f"--epsilon {options.epsilon}: must be finite and above 0; the usual range is 0.5 to 3.")


def _of_run(options: CalibrateOptions) -> Calibrated:
    if options != CalibrateOptions(data=options.data, html=options.html):
        raise ConfigError(f"{options.data}: a run, whose report is written already; leave out all options but --html.")
    run = read_run(options.data)
    if not run.calibration:
        raise ConfigError(f"{options.data}: holds no calibration report; it was trained without test rows.")
    record = dict(run.calibration)
    return _told(record, options, notes=())


def _within_budget(loaded: Loaded, options: CalibrateOptions) -> Calibrated:
    assert options.epsilon is not None
    examples = len(loaded.target_N)
    delta = default_delta(examples) if options.delta is None else options.delta
    found, run_dir = charged_report(loaded, epsilon=options.epsilon, delta=delta, out=options.out)
    record = found.to_json() | {"run_dir": str(run_dir), "epsilon": options.epsilon, "delta": delta}
    notes = (f"taken for {loaded.scale.value}", f"ledger and certificate: {run_dir}; check with `discreet verify`")
    return _told(record, options, notes=notes)


_SHOWN = (
    ("accuracy", "accuracy", ""),
    ("listed_accuracy", "the same, rows of a listed class", ""),
    ("nll", "negative log-likelihood", ""),
    ("brier", "Brier score", ""),
    ("ece", "calibration error (ECE)", "ece_floor"),
    ("adaptive_ece", "the same, bins of equal mass", "adaptive_floor"),
    ("classwise_ece", "the same, class by class", "classwise_floor"),
    ("rms", "root mean squared gap", "rms_floor"),
    ("mce", "largest gap of a bin", ""),
    ("gap", "confidence minus accuracy", ""),
    ("optimal_temperature", "best temperature", ""),
    ("calibration_loss", "calibration loss", ""),
)


def _told(record: dict[str, Any], options: CalibrateOptions, *, notes: tuple[str, ...]) -> Calibrated:
    """The command's lines, and its page if one was asked for."""
    lines = _stamp_lines(record)
    lines += [f"{plain(number(record, 'examples'))} rows, {'; '.join(notes)}"] if notes else []
    rows = measured_on(record)
    lines += [rows.replace("\u202f", " "), ""] if rows else []
    lines += _table(record)
    lines += ["", verdict(record).replace("\u202f", " ")]
    noise = number(record, "ece_noise")
    if noise is not None:
        lower = number(record, "ece_without_noise") or 0.0
        lines.append(f"Noise alone makes an ECE of {noise:.4f} on average; what is left without it is {lower:.4f}.")
    lines += [f"- {line}" for line in texts(record, "advice")]
    if options.html is not None:
        _write_page(record, options)
        lines += ["", f"page  {options.html}"]
        record = record | {"html": str(options.html)}
    return Calibrated(record=record, lines=tuple(lines))


def _budget(record: dict[str, Any]) -> str:
    """What a report within a budget spent, for its page."""
    epsilon, delta = number(record, "epsilon"), number(record, "delta")
    if epsilon is None or delta is None:
        return ""
    return f", asked within ε = {upward(epsilon)} and δ = {scientific(delta)}"


def _measured(record: dict[str, Any]) -> float | None:
    """The rows that the figures of probabilities are over."""
    listed = number(record, "listed")
    return number(record, "examples") if listed is None else listed


def _stamp_lines(record: dict[str, Any]) -> list[str]:
    stamp = word(record, "stamp")
    if not stamp:
        return []
    return [f"{stamp}: exact figures of rows that were not said to be public (--public), covered by no epsilon.", ""]


def _table(record: dict[str, Any]) -> list[str]:
    width = max(len(name) for _, name, _ in _SHOWN)
    lines = []
    for key, name, floor in _SHOWN:
        value = number(record, key)
        if value is None or (key == "listed_accuracy" and not number(record, "unlisted")):
            continue
        line = f"{name.ljust(width)}  {value:8.4f}"
        chance = number(record, floor) if floor else None
        if chance is not None:
            line += f"  chance alone {chance:.4f}"
        interval = mapping(record, "intervals").get(key)
        if isinstance(interval, list) and None not in interval:
            line += f"  95 %: {interval[0]:.4f} to {interval[1]:.4f}"
        std = number(mapping(record, "stds"), key)
        if std is not None:
            line += f"  noise +-{1.96 * std:.4f}"
        if key == "mce":
            line += f"  in a bin of {plain(number(record, 'mce_examples'))} rows"
        lines.append(line.replace("\u202f", " "))
    return lines


def _write_page(record: dict[str, Any], options: CalibrateOptions) -> None:
    assert options.html is not None
    if options.html.is_dir():
        raise ConfigError(f"{options.html}: is a directory; name a file, e.g. calibration.html.")
    head = [
        "<header>",
        parts.paragraph("Calibration report", role="eyebrow"),
        f"<h1>{named(options.data.name)}</h1>",
        parts.paragraph(f"{plain(_measured(record))} rows{_budget(record)}", role="lead"),
        "</header>",
    ]
    section = calibration_section(record, temperature={})
    text = parts.page(title=f"{HEADING} {options.data.name}", markup=["\n".join(head), section])
    try:
        write_atomically(options.html, text)
    except OSError as error:
        raise ConfigError(f"{options.html}: cannot be written ({error.strerror}); name a file that can.") from None
