"""From a few cheap batch sizes to the real one: a fitted law, with its prediction interval. Numbers only.

Two things happen along B at constant (sigma / B, S), and each has its law:

- **small batches help** (implicit bias of gradient noise): accuracy is linear in log2 B and falls (Figs. 1 and 4,
  arXiv:2210.03403: -2.1 points a doubling on ImageNet, -0.3 to 0 on CIFAR-10);
- **small batches hurt** where their own sampling noise is not small beside the noise that was added. Its variance is
  v / B, with v <= 1 in clip bounds, beside (sigma / B)^2 d of the added noise, which stays. So accuracy is linear in
  1 / B, and rises to a limit: a line in log2 B would rise without end (docs/lab-notes.md: measured on Fashion-MNIST).

So the sign decides. Where the slope in log2 B is above or below 0 beyond doubt, one law applies, and where it is in
doubt the interval covers both.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special

from discreet.errors import ConfigError

FEWEST_SIZES = 3
FEWEST_SEEDS = 3
CONFIDENCE = 0.95


class Law(enum.Enum):
    """``accuracy = intercept + slope x``, with x = log2 B or x = 1 / B."""

    LOG = "log2 B"
    INVERSE = "1 / B"

    def x(self, batch: float) -> float:
        """The batch as this law sees it."""
        return math.log2(batch) if self is Law.LOG else 1.0 / batch


@dataclass(frozen=True)
class Extrapolation:
    """What runs at small batches say about one run at the real batch size.

    Attributes:
        law: the one that ``slope``, ``intercept`` and ``expected`` are of: INVERSE where accuracy rises with the batch.
        slope, intercept: ``accuracy = intercept + slope x(batch)``.
        per_doubling: slope in log2 B, whatever the law; ``per_doubling_low`` and ``_high`` its confidence interval.
        at_batch: the real batch size. expected: the law there.
        low, high: prediction interval for the accuracy of one run there, within [0, 1].
        both: the interval covers both laws, because the sign of the slope is in doubt.
        confidence: of both intervals.
        residual_sd: standard deviation of single runs around the law.
        moved: what the law says of the way from the largest simulated batch to the real one.
        doublings: log2 of the real over the largest simulated batch. evidence: log2 of the largest over the smallest.
        runs: points behind the fit.
    """

    law: Law
    slope: float
    intercept: float
    per_doubling: float
    per_doubling_low: float
    per_doubling_high: float
    at_batch: int
    expected: float
    low: float
    high: float
    both: bool
    confidence: float
    residual_sd: float
    moved: float
    doublings: float
    evidence: float
    runs: int

    @property
    def too_far(self) -> bool:
        """Whether the law moves more between the largest simulated batch and the real one than the interval is wide.

        For the line in log2 B this is ``|b| log2(B / B_sim)`` above half the width of the interval. The figure at the
        real batch is then mostly the law and not the evidence.
        """
        return abs(self.moved) > (self.high - self.low) / 2

    def warnings(self) -> tuple[str, ...]:
        """What whoever reads the figure must know first; empty when there is nothing."""
        if not self.too_far:
            return ()
        return (
            f"The extrapolation is longer than the evidence: over {self.doublings:.1f} doublings of the batch the law "
            f"moves {100 * abs(self.moved):.1f} points, and the interval is only +-{50 * (self.high - self.low):.1f}; "
            "simulate a larger batch before trusting it.",
        )

    def to_json(self) -> dict[str, float | int | bool | str]:
        """The record for plan pages and files."""
        return {**vars(self), "law": self.law.value, "too_far": self.too_far}


def extrapolate(
    scores: Mapping[int, Sequence[float]], *, at_batch: int, confidence: float = CONFIDENCE
) -> Extrapolation:
    """Fit accuracy against the batch by least squares, and predict one run at ``at_batch``.

    With n runs at x_i = x(B_i), residual variance s^2 on n - 2 degrees of freedom and x0 = x(at_batch), the interval is
    ``a + b x0 -+ t s sqrt(1 + 1/n + (x0 - mean x)^2 / Sxx)``: that of a *new* run, not of the line.

    Args:
        scores: batch size -> accuracy of each run, in [0, 1]; at least 3 sizes with at least 3 runs each, which share
            neither weights nor noise.
        at_batch: the real batch size.
        confidence: of the interval.

    Raises:
        ConfigError: too little evidence for an interval, or a number outside its range.
    """
    _check(scores, at_batch=at_batch, confidence=confidence)
    lines = {law: _Line.fit(scores, law=law, confidence=confidence) for law in Law}
    trend = lines[Law.LOG]
    law = Law.INVERSE if trend.slope > 0 else Law.LOG
    both = abs(trend.slope) <= trend.slope_half
    chosen = lines[law]
    ends = [line.prediction(at_batch) for line in (lines.values() if both else (chosen,))]
    largest, smallest = max(scores), min(scores)
    return Extrapolation(
        law=law,
        slope=chosen.slope,
        intercept=chosen.intercept,
        per_doubling=trend.slope,
        per_doubling_low=trend.slope - trend.slope_half,
        per_doubling_high=trend.slope + trend.slope_half,
        at_batch=at_batch,
        expected=chosen.at(at_batch),
        low=min(1.0, max(0.0, min(low for low, _ in ends))),
        high=max(0.0, min(1.0, max(high for _, high in ends))),
        both=both,
        confidence=confidence,
        residual_sd=chosen.residual_sd,
        moved=chosen.at(at_batch) - chosen.at(largest),
        doublings=max(0.0, math.log2(at_batch / largest)),
        evidence=math.log2(largest / smallest),
        runs=chosen.runs,
    )


@dataclass(frozen=True)
class _Line:
    """A least-squares line under one law, and what its intervals are made of."""

    law: Law
    slope: float
    intercept: float
    slope_half: float
    residual_sd: float
    quantile: float
    mean_x: float
    spread_x: float
    runs: int

    @classmethod
    def fit(cls, scores: Mapping[int, Sequence[float]], *, law: Law, confidence: float) -> _Line:
        points = [(law.x(batch), float(score)) for batch, values in sorted(scores.items()) for score in values]
        n = len(points)
        mean_x = math.fsum(x for x, _ in points) / n
        mean_y = math.fsum(y for _, y in points) / n
        spread_x = math.fsum((x - mean_x) ** 2 for x, _ in points)
        slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread_x
        intercept = mean_y - slope * mean_x
        squares = math.fsum((y - intercept - slope * x) ** 2 for x, y in points)
        residual_sd = math.sqrt(squares / (n - 2))
        quantile = float(special.stdtrit(n - 2, (1 + confidence) / 2))
        return cls(
            law=law,
            slope=slope,
            intercept=intercept,
            slope_half=quantile * residual_sd / math.sqrt(spread_x),
            residual_sd=residual_sd,
            quantile=quantile,
            mean_x=mean_x,
            spread_x=spread_x,
            runs=n,
        )

    def at(self, batch: float) -> float:
        return self.intercept + self.slope * self.law.x(batch)

    def prediction(self, batch: float) -> tuple[float, float]:
        """Interval of one new run."""
        distance = (self.law.x(batch) - self.mean_x) ** 2 / self.spread_x
        half = self.quantile * self.residual_sd * math.sqrt(1 + 1 / self.runs + distance)
        return self.at(batch) - half, self.at(batch) + half


def _check(scores: Mapping[int, Sequence[float]], *, at_batch: int, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence}: must be above 0 and below 1; the usual value is {CONFIDENCE}.")
    if at_batch < 1 or any(batch < 1 for batch in scores):
        raise ConfigError(f"batch sizes {sorted([*scores, at_batch])}: must be at least 1; pass numbers of examples.")
    fewest = min((len(values) for values in scores.values()), default=0)
    if len(scores) < FEWEST_SIZES or fewest < FEWEST_SEEDS:
        raise ConfigError(
            f"{len(scores)} batch sizes with {fewest} runs or more: an interval needs at least {FEWEST_SIZES} sizes "
            f"with {FEWEST_SEEDS} runs each; simulate more."
        )
    if not all(0 <= score <= 1 for values in scores.values() for score in values):
        raise ConfigError("an accuracy outside [0, 1], or NaN: pass shares of right answers of runs that did not fail.")
