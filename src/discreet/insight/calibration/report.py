"""The calibration report: every figure beside what chance alone would show, and the interval that the sample leaves.

Shape legend: N = examples, K = classes, M = bins.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from discreet.errors import ConfigError
from discreet.insight.calibration import temperature
from discreet.insight.calibration.bins import BINS, Bins, classwise, equal_mass, equal_width
from discreet.insight.calibration.bootstrap import Interval, brier, intervals
from discreet.insight.calibration.floor import Floor, floor_of, floor_of_mean, rms_floor
from discreet.insight.calibration.predictions import Predictions
from discreet.insight.calibration.temperature import Temperature, fit_public_temperature
from discreet.insight.origin import NON_PRIVATE_STAMP, Origin

MOST_GROUPS = 100
CURVE_POINTS = 33
_log = logging.getLogger("discreet")


@dataclass(frozen=True)
class Group:
    """One group of the examples.

    Attributes:
        name: of the group. examples: how many.
        accuracy: share of right answers. ece, floor: with its own bins. gap: mean confidence minus accuracy.
        nll: mean negative log-likelihood.
    """

    name: str
    examples: int
    accuracy: float
    ece: float
    floor: Floor
    gap: float
    nll: float


@dataclass(frozen=True)
class CalibrationReport:
    """How far a classifier's probabilities can be believed, on given examples. Exact figures, no noise.

    Attributes:
        examples, classes: N and K.
        accuracy: share of right answers.
        nll: mean negative log-likelihood, nats; infinite where a true class got probability 0.
        brier: mean squared distance of the probabilities from the truth, in [0, 2].
        ece, ece_floor: expected calibration error on M bins of equal width, and what chance alone would show.
        adaptive_ece, adaptive_floor: the same on bins of equal mass.
        classwise_ece, classwise_floor: mean over classes of the ECE of each class's own probability.
        rms, rms_debiased, rms_floor: root mean squared gap over the bins of equal width.
        mce, mce_examples: largest gap of a bin with at least 1 % of the examples, and how many it has.
        gap: mean confidence minus accuracy: above 0 the model is too sure.
        temperature: T*, and the NLL that it wins.
        intervals: 95 % intervals by name of the figure.
        bins: the table behind the reliability diagram.
        class_ece: ECE of each class.
        groups: in the order of their names; empty when none were given.
        curve: (T, mean NLL at T) around 1 and T*, temperatures ascending.
    """

    examples: int
    classes: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    ece_floor: Floor
    adaptive_ece: float
    adaptive_floor: Floor
    classwise_ece: float
    classwise_floor: Floor
    rms: float
    rms_debiased: float
    rms_floor: float
    mce: float
    mce_examples: int
    gap: float
    temperature: Temperature
    intervals: Mapping[str, Interval]
    bins: Bins
    class_ece: tuple[float, ...]
    groups: tuple[Group, ...]
    curve: tuple[tuple[float, float], ...]

    @property
    def stamp(self) -> str:
        """What must stand before every figure; nothing for public examples."""
        return ""

    @property
    def notable(self) -> bool:
        """Whether the ECE is above what a perfectly calibrated model shows in 95 of 100 samples."""
        return self.ece > self.ece_floor.high

    def to_json(self) -> dict[str, object]:
        """JSON values; what is not finite is None."""
        table = self.bins
        return {
            "stamp": self.stamp,
            "examples": self.examples,
            "classes": self.classes,
            "accuracy": self.accuracy,
            "nll": _finite(self.nll),
            "brier": self.brier,
            "ece": self.ece,
            "ece_floor": self.ece_floor.mean,
            "ece_floor_high": self.ece_floor.high,
            "adaptive_ece": self.adaptive_ece,
            "adaptive_floor": self.adaptive_floor.mean,
            "classwise_ece": self.classwise_ece,
            "classwise_floor": self.classwise_floor.mean,
            "rms": self.rms,
            "rms_debiased": self.rms_debiased,
            "rms_floor": self.rms_floor,
            "mce": self.mce,
            "mce_examples": self.mce_examples,
            "gap": self.gap,
            "optimal_temperature": self.temperature.value,
            "temperature_std": _finite(self.temperature.std),
            "temperature_at_bound": self.temperature.at_bound,
            "calibration_loss": _finite(self.temperature.calibration_loss),
            "intervals": {name: [_finite(found.low), _finite(found.high)] for name, found in self.intervals.items()},
            "reliability": {
                "edges": list(table.edges),
                "count": [int(count) for count in table.count_M],
                "confidence": table.confidence_M.tolist(),
                "correct": table.correct_M.tolist(),
            },
            "temperature_curve": [[place, value] for place, value in self.curve if math.isfinite(value)],
            "class_ece": list(self.class_ece),
            "groups": [
                {
                    "name": group.name,
                    "examples": group.examples,
                    "accuracy": group.accuracy,
                    "ece": group.ece,
                    "ece_floor": group.floor.mean,
                    "ece_floor_high": group.floor.high,
                    "gap": group.gap,
                    "nll": _finite(group.nll),
                }
                for group in self.groups
            ],
        }


class NonPrivateCalibrationReport(CalibrationReport):
    """The same about private examples: exact figures that no guarantee covers. For a look inside, not for release."""

    @property
    def stamp(self) -> str:
        """Says so, in front of every figure."""
        return NON_PRIVATE_STAMP


def calibration_report(
    predictions: Predictions, *, origin: Origin = Origin.PUBLIC, bins: int = BINS
) -> CalibrationReport:
    """Measure how far probabilities can be believed.

    **Guarantees.** None: figures are exact. About private examples the result is a `NonPrivateCalibrationReport`, its
    stamp is in the log and in every file and picture made of it; for figures with noise see
    `discreet.insight.calibration.budgeted.budgeted_report`.

    Args:
        predictions: at least one example; its groups become a table.
        origin: PUBLIC, or PRIVATE.
        bins: M, at least 1.

    Raises:
        ConfigError: bins below 1, or more than 100 groups.
    """
    kind = CalibrationReport if origin is Origin.PUBLIC else NonPrivateCalibrationReport
    if origin is Origin.PRIVATE:
        _log.warning(
            "discreet: %s: calibration figures of private examples, which no epsilon covers", NON_PRIVATE_STAMP
        )
    width, mass, classes = (
        equal_width(predictions, bins=bins),
        equal_mass(predictions, bins=bins),
        classwise(predictions, bins=bins),
    )
    fitted = fit_public_temperature(predictions)
    nll = _mean_nll(predictions)
    found = intervals(predictions, beta=1 / fitted.value, bins=bins)
    if math.isinf(nll):
        found |= {"nll": Interval(math.inf, math.inf)}
    accuracy = float(predictions.correct_N.mean())
    largest = width.largest
    return kind(
        examples=len(predictions),
        classes=predictions.classes,
        accuracy=accuracy,
        nll=nll,
        brier=float(brier(predictions).mean()),
        ece=width.ece,
        ece_floor=floor_of(width),
        adaptive_ece=mass.ece,
        adaptive_floor=floor_of(mass),
        classwise_ece=sum(table.ece for table in classes) / len(classes),
        classwise_floor=floor_of_mean(classes),
        rms=width.rms,
        rms_debiased=width.rms_debiased,
        rms_floor=rms_floor(width),
        mce=width.mce,
        mce_examples=0 if largest is None else int(width.count_M[largest]),
        gap=float(predictions.confidence_N.mean()) - accuracy,
        temperature=fitted,
        intervals=found,
        bins=width,
        class_ece=tuple(table.ece for table in classes),
        groups=_groups(predictions, bins),
        curve=_curve(predictions, fitted.value),
    )


def _curve(predictions: Predictions, best: float) -> tuple[tuple[float, float], ...]:
    """The loss at temperatures from half of the smaller of 1 and T* to twice the larger."""
    low, high = min(1.0, best) / 2, max(1.0, best) * 2
    places = sorted({1.0, best, *(low * (high / low) ** (step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS))})
    return tuple((place, float(temperature.nll(predictions, 1 / place).mean())) for place in places)


def _groups(predictions: Predictions, bins: int) -> tuple[Group, ...]:
    if predictions.groups is None:
        return ()
    names = sorted(set(predictions.groups))
    if len(names) > MOST_GROUPS:
        raise ConfigError(f"{len(names)} groups: at most {MOST_GROUPS} make a table; group by a column of few values.")
    number = {name: index for index, name in enumerate(names)}
    index_N = torch.tensor([number[name] for name in predictions.groups], device="cpu")
    return tuple(_group(name, predictions.rows(index_N == index), bins) for name, index in number.items())


def _group(name: str, members: Predictions, bins: int) -> Group:
    table = equal_width(members, bins=bins)
    accuracy = float(members.correct_N.mean())
    return Group(
        name=name,
        examples=len(members),
        accuracy=accuracy,
        ece=table.ece,
        floor=floor_of(table),
        gap=float(members.confidence_N.mean()) - accuracy,
        nll=_mean_nll(members),
    )


def _mean_nll(predictions: Predictions) -> float:
    return float(-predictions.log_probability_NK.gather(1, predictions.target_N[:, None]).mean())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
