"""The record of a simulation at constant TAN, as the page draws it: runs at small batches, and a line to the real one.

    {"points": [{"batch": 64, "seed": 0, "accuracy": 0.93}, ...],
     "fit": {"slope": -0.004, "intercept": 0.95, "at_batch": 4096, "low": 0.89, "high": 0.92}}

``accuracy = intercept + slope log2(batch)``, or ``intercept + slope / batch`` where the fit says ``"law": "1 / B"``;
low and high are the prediction interval of one run at ``at_batch``. Other fields are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from discreet.errors import ConfigError
from discreet.insight.extrapolation import Law
from discreet.privacy.records import parse_json

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Simulation:
    """Runs at small batches and the law through them; see the head of this file.

    Attributes:
        points: (batch, accuracy) of every run.
        slope: change of accuracy per doubling, or per 1 / batch. intercept: at log2(batch) or 1 / batch of 0.
        at_batch: the real batch. low, high: prediction interval there.
        law: what the slope is of.
        stamp: empty, or what the page must say first: the runs read private data without accounting.
    """

    points: tuple[tuple[int, float], ...]
    slope: float
    intercept: float
    at_batch: int
    low: float
    high: float
    law: Law = Law.LOG
    stamp: str = ""

    def line(self, batch: float) -> float:
        """The fitted accuracy at a batch size."""
        return self.intercept + self.slope * self.law.x(batch)

    def band(self, batches: Sequence[float]) -> list[tuple[float, float]]:
        """(low, high) for one new run at each batch size: ``-+ t s sqrt(1 + 1/n + (x - mean x)^2 / Sxx)``.

        Empty with fewer than three runs or one batch size, from which no spread can be told.
        """
        x = np.array([self.law.x(batch) for batch, _ in self.points])
        y = np.array([accuracy for _, accuracy in self.points])
        spread = float(((x - x.mean()) ** 2).sum())
        if len(x) < 3 or spread == 0:
            return []
        residual = y - self.intercept - self.slope * x
        deviation = math.sqrt(float((residual**2).sum()) / (len(x) - 2))
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2))
        found = []
        for batch in batches:
            half = quantile * deviation * math.sqrt(1 + 1 / len(x) + (self.law.x(batch) - x.mean()) ** 2 / spread)
            found.append((max(0.0, self.line(batch) - half), min(1.0, self.line(batch) + half)))
        return found


def read_simulation(path: Path) -> Simulation:
    """Read the record that `discreet plan --simulate` writes.

    Raises:
        ConfigError: the file cannot be read, or a field is missing or outside its range. The field is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a simulation ({error}); pass the file that it wrote.") from None
    record = parse_json(text, where=str(path))
    fit = _mapping(record, "fit", path)
    points = record.get("points") if isinstance(record, Mapping) else None
    if not isinstance(points, list) or not points:
        raise ConfigError(f"{path}: points must be a list of runs, at least one; simulate again.")
    runs = tuple((_batch(point, "batch", path), _share(point, "accuracy", path)) for point in points)
    return Simulation(
        points=runs,
        slope=_number(fit, "slope", path),
        intercept=_number(fit, "intercept", path),
        at_batch=_batch(fit, "at_batch", path),
        low=_share(fit, "low", path),
        high=_share(fit, "high", path),
        law=_law(fit, path),
        stamp=_stamp(record, path),
    )


def _mapping(record: object, name: str, path: Path) -> Mapping[str, Any]:
    found = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: {name} must be an object; pass the file that `discreet plan --simulate` wrote.")
    return found


def _law(fit: Mapping[str, Any], path: Path) -> Law:
    laws = {law.value: law for law in Law}
    found = fit.get("law", Law.LOG.value)
    if found not in laws:
        raise ConfigError(f"{path}: law must be one of {sorted(laws)}; simulate again.")
    return laws[found]


def _stamp(record: object, path: Path) -> str:
    value = record.get("stamp", "") if isinstance(record, Mapping) else ""
    if not isinstance(value, str):
        raise ConfigError(f"{path}: stamp must be text; simulate again.")
    return value


def _number(record: object, name: str, path: Path) -> float:
    value = record.get(name) if isinstance(record, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{path}: {name} must be a finite number; simulate again.")
    return float(value)


def _share(record: object, name: str, path: Path) -> float:
    value = _number(record, name, path)
    if not 0 <= value <= 1:
        raise ConfigError(f"{path}: {name} must be between 0 and 1; simulate again.")
    return value


def _batch(record: object, name: str, path: Path) -> int:
    value = _number(record, name, path)
    if value < 1 or value != int(value):
        raise ConfigError(f"{path}: {name} must be a whole number of at least 1; simulate again.")
    return int(value)
