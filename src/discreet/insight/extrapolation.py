"""From a few cheap batch sizes to the real one: a line in log2 B, with its prediction interval. Numbers only.

At constant (sigma / B, S) the accuracy is linear in log2 B (Figs. 1 and 4, arXiv:2210.03403: -2.1 points a doubling on
ImageNet, -0.3 to 0 on CIFAR-10). A small batch is optimistic, so its accuracy is never reported as that of the real
run: the line is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special

from discreet.errors import ConfigError

FEWEST_SIZES = 3
FEWEST_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Extrapolation:
    """``accuracy = intercept + slope * log2(batch)``, and what it says about one run at the real batch size.

    Attributes:
        slope: change per doubling of the batch. intercept: at a batch of one example.
        slope_low, slope_high: confidence interval of the slope.
        at_batch: the real batch size. expected: the line there.
        low, high: prediction interval for the accuracy of one run there, within [0, 1].
        confidence: of both intervals.
        residual_sd: standard deviation of single runs around the line.
        doublings: log2 of the real over the largest simulated batch. evidence: log2 of the largest over the smallest.
        runs: points behind the fit.
    """

    slope: float
    intercept: float
    slope_low: float
    slope_high: float
    at_batch: int
    expected: float
    low: float
    high: float
    confidence: float
    residual_sd: float
    doublings: float
    evidence: float
    runs: int

    @property
    def too_far(self) -> bool:
        """Whether the line moves more between the largest simulated batch and the real one than the interval is wide.

        The rule of the spec: ``|b| log2(B / B_sim)`` above half the width of the interval. The figure at the real batch
        is then mostly the law and not the evidence.
        """
        return abs(self.slope) * self.doublings > (self.high - self.low) / 2

    def warnings(self) -> tuple[str, ...]:
        """What whoever reads the figure must know first; empty when there is nothing."""
        if not self.too_far:
            return ()
        moved = abs(self.slope) * self.doublings
        return (
            f"The extrapolation is longer than the evidence: over {self.doublings:.1f} doublings of the batch the line "
            f"moves {100 * moved:.1f} points, and the interval is only +-{50 * (self.high - self.low):.1f}; simulate a "
            "larger batch before trusting it.",
        )

    def to_json(self) -> dict[str, float | int | bool]:
        """The record for plan pages and files."""
        return {
            "slope": self.slope,
            "intercept": self.intercept,
            "slope_low": self.slope_low,
            "slope_high": self.slope_high,
            "at_batch": self.at_batch,
            "expected": self.expected,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "residual_sd": self.residual_sd,
            "doublings": self.doublings,
            "evidence": self.evidence,
            "runs": self.runs,
            "too_far": self.too_far,
        }


def extrapolate(
    scores: Mapping[int, Sequence[float]], *, at_batch: int, confidence: float = CONFIDENCE
) -> Extrapolation:
    """Fit accuracy against log2 batch by least squares, and predict one run at ``at_batch``.

    With n runs at x_i = log2 B_i, residual variance s^2 on n - 2 degrees of freedom and x0 = log2 at_batch, the
    interval is ``a + b x0 -+ t s sqrt(1 + 1/n + (x0 - mean x)^2 / Sxx)``: that of a *new* run, not of the line.

    Args:
        scores: batch size -> accuracy of each run, in [0, 1]; at least 3 sizes with at least 3 runs each, which share
            neither weights nor noise.
        at_batch: the real batch size.
        confidence: of the interval.

    Raises:
        ConfigError: too little evidence for an interval, or a number outside its range.
    """
    _check(scores, at_batch=at_batch, confidence=confidence)
    points = [(math.log2(batch), float(score)) for batch, values in sorted(scores.items()) for score in values]
    n = len(points)
    mean_x = math.fsum(x for x, _ in points) / n
    mean_y = math.fsum(y for _, y in points) / n
    spread_x = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread_x
    intercept = mean_y - slope * mean_x
    squares = math.fsum((y - intercept - slope * x) ** 2 for x, y in points)
    residual_sd = math.sqrt(squares / (n - 2))
    quantile = float(special.stdtrit(n - 2, (1 + confidence) / 2))
    x0 = math.log2(at_batch)
    expected = intercept + slope * x0
    half = quantile * residual_sd * math.sqrt(1 + 1 / n + (x0 - mean_x) ** 2 / spread_x)
    slope_half = quantile * residual_sd / math.sqrt(spread_x)
    return Extrapolation(
        slope=slope,
        intercept=intercept,
        slope_low=slope - slope_half,
        slope_high=slope + slope_half,
        at_batch=at_batch,
        expected=expected,
        low=min(1.0, max(0.0, expected - half)),
        high=max(0.0, min(1.0, expected + half)),
        confidence=confidence,
        residual_sd=residual_sd,
        doublings=max(0.0, x0 - math.log2(max(scores))),
        evidence=math.log2(max(scores) / min(scores)),
        runs=n,
    )


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
