"""The line in log2 batch and its prediction interval: least squares, and coverage with a negative control."""

from __future__ import annotations

import math

import numpy as np
import pytest

from discreet.errors import ConfigError
from discreet.insight.extrapolation import Law, extrapolate

BATCHES = (32, 64, 128)


def test_the_interval_is_that_of_least_squares():
    scores = {32: [0.91, 0.91, 0.92], 64: [0.90, 0.89, 0.90], 128: [0.87, 0.88, 0.88]}
    x = np.repeat(np.log2(list(scores)), 3)
    y = np.concatenate(list(scores.values()))
    design = np.stack([np.ones_like(x), x], axis=1)
    coefficients, squares, _, _ = np.linalg.lstsq(design, y, rcond=None)
    at = np.array([1.0, 12.0])
    variance = squares[0] / 7 * (1 + at @ np.linalg.inv(design.T @ design) @ at)
    half = 2.364624251592785 * math.sqrt(variance)  # t, 7 degrees of freedom, 97.5 %
    fit = extrapolate(scores, at_batch=4096)
    assert (fit.law, fit.both) == (Law.LOG, False)
    assert (fit.intercept, fit.slope) == pytest.approx(tuple(coefficients), rel=1e-9)
    assert fit.expected == pytest.approx(coefficients @ at, rel=1e-9)
    assert (fit.low, fit.high) == pytest.approx((coefficients @ at - half, coefficients @ at + half), rel=1e-9)
    assert (fit.doublings, fit.evidence, fit.runs) == (5, 2, 9)


def test_what_saturates_is_foretold_by_the_inverse_law():
    """Accuracies of Fashion-MNIST (docs/lab-notes.md): the line in log2 B foretold .857, one run reached .827."""
    scores = {32: [0.8100, 0.8125, 0.8157], 64: [0.8195, 0.8205, 0.8215], 128: [0.8241, 0.8251, 0.8261]}
    fit = extrapolate(scores, at_batch=4096)
    assert (fit.law, fit.both) == (Law.INVERSE, False)
    assert fit.low < 0.827 < fit.high < 0.845
    assert fit.expected == pytest.approx(fit.intercept + fit.slope / 4096)
    assert fit.per_doubling > 0 > fit.slope


def test_where_the_sign_is_in_doubt_the_interval_covers_both_laws():
    scores = {32: [0.90, 0.91, 0.92], 64: [0.90, 0.92, 0.91], 128: [0.91, 0.90, 0.92]}
    fit = extrapolate(scores, at_batch=4096)
    assert fit.both
    assert fit.per_doubling_low < 0 < fit.per_doubling_high
    x = np.repeat([0.03125, 0.015625, 0.0078125], 3)
    y = np.concatenate(list(scores.values()))
    slope, intercept = np.polyfit(x, y, 1)
    assert fit.low < intercept + slope / 4096 < fit.high
    # The line in log2 B reaches five doublings beyond two: its interval is the wider one.
    assert fit.high - fit.low > 0.05


def _coverage(*, bend: float = 0.0, law: Law = Law.LOG, fall: float = -0.01, sd: float = 0.003) -> float:
    """Share of 2,000 intervals that hold a new run at 4,096; ``bend`` breaks the law beyond the evidence."""
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        scores = {
            batch: [0.8 + fall * law.x(batch) + sd * generator.standard_normal() for _ in range(3)] for batch in BATCHES
        }
        fit = extrapolate(scores, at_batch=4096)
        truth = 0.8 + fall * law.x(4096) + bend + sd * generator.standard_normal()
        held += fit.low <= truth <= fit.high
    return held / 2000


def test_a_new_run_lies_inside_as_often_as_promised():
    # Binomial(2000, .95): 0.95 +- 0.0175 is 3.6 standard deviations, false alarm 3e-4; the seed is fixed anyway.
    assert abs(_coverage() - 0.95) < 0.0175


def test_a_new_run_lies_inside_as_often_under_the_inverse_law():
    assert abs(_coverage(law=Law.INVERSE, fall=-0.7, sd=0.0015) - 0.95) < 0.0175


@pytest.mark.parametrize("fall", [0.0, -0.001, 0.001])
def test_where_nothing_is_sure_the_interval_holds_more_often_than_promised(fall):
    assert _coverage(fall=fall) > 0.93


def test_a_law_that_breaks_is_not_covered():
    assert _coverage(bend=-0.03) < 0.8


def test_the_warning_follows_the_rule_of_the_spec():
    steep = extrapolate(
        {b: [0.8 - 0.02 * math.log2(b / 32) + e for e in (0, 1e-3, -1e-3)] for b in BATCHES}, at_batch=4096
    )
    assert steep.too_far
    assert abs(steep.slope) * 5 > (steep.high - steep.low) / 2
    assert "longer than the evidence" in steep.warnings()[0]
    flat = extrapolate({b: [0.8 + e for e in (0, 1e-2, -1e-2)] for b in BATCHES}, at_batch=4096)
    assert not flat.too_far
    assert flat.warnings() == ()


def test_a_shorter_reach_needs_no_warning():
    scores = {b: [0.8 - 0.02 * math.log2(b / 32) + e for e in (0, 1e-2, -1e-2)] for b in BATCHES}
    assert not extrapolate(scores, at_batch=128).too_far


def test_the_interval_stays_a_share():
    fit = extrapolate({b: [0.99, 1.0, 0.96] for b in BATCHES}, at_batch=2**20)
    assert 0 <= fit.low < fit.high <= 1


@pytest.mark.parametrize(
    "scores",
    [
        {32: [0.9] * 3, 64: [0.9] * 3},
        {32: [0.9] * 3, 64: [0.9] * 3, 128: [0.9] * 2},
        {},
        {32: [0.9] * 3, 64: [0.9] * 3, 128: [0.9, 0.9, math.nan]},
        {32: [0.9] * 3, 64: [0.9] * 3, 128: [0.9, 0.9, 1.1]},
        {0: [0.9] * 3, 64: [0.9] * 3, 128: [0.9] * 3},
    ],
)
def test_too_little_evidence_is_refused(scores):
    with pytest.raises(ConfigError):
        extrapolate(scores, at_batch=4096)


@pytest.mark.parametrize(("at_batch", "confidence"), [(0, 0.95), (4096, 1.0), (4096, math.nan)])
def test_bad_targets_are_refused(at_batch, confidence):
    with pytest.raises(ConfigError):
        extrapolate({b: [0.9, 0.8, 0.7] for b in BATCHES}, at_batch=at_batch, confidence=confidence)
