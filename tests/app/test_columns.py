"""Columns as numbers: buckets, private ranges from noisy counts, of the right size also on small tables."""

from __future__ import annotations

import numpy as np
import pytest

from discreet.app.data.columns import (
    BUCKETS,
    EDGES,
    NumberEncoding,
    bucket_of,
    is_numeric,
    notable_numbers,
    released_range,
)

NOISE = 26.0
"""Rows; what a table of four columns and 2,400 rows gets at epsilon 3."""


def _counts(numbers: np.ndarray, *, seed: int, noise: float = NOISE) -> np.ndarray:
    exact = np.bincount(bucket_of(numbers, np.zeros(len(numbers), dtype=bool)), minlength=BUCKETS)
    return exact + noise * np.random.default_rng(seed).normal(size=BUCKETS)


@pytest.mark.parametrize("seed", range(12))
def test_a_normal_column_of_a_small_table(seed: int) -> None:
    numbers = np.random.default_rng(100 + seed).normal(size=2400)
    found = released_range(_counts(numbers, seed=seed), noise_std=NOISE, least=2.4)
    assert found is not None
    assert -4 <= found.low <= -0.5
    assert 0.5 <= found.high <= 4


@pytest.mark.parametrize("seed", range(6))
def test_thin_tails_are_joined_and_not_lost(seed: int) -> None:
    numbers = np.exp(np.random.default_rng(seed).normal(10, 1, 30000))
    found = released_range(_counts(numbers, seed=seed), noise_std=NOISE, least=30)
    assert found is not None
    assert found.low < np.quantile(numbers, 0.05)
    assert found.high > np.quantile(numbers, 0.95)
    assert found.high < 30 * numbers.max()


@pytest.mark.parametrize("seed", range(40))
def test_noise_alone_tells_nothing(seed: int) -> None:
    counts = _counts(np.empty(0), seed=seed)
    assert released_range(counts, noise_std=NOISE, least=2.4) is None
    assert notable_numbers(counts, noise_std=NOISE, least=2.4) == 0


def test_texts_outweigh_the_noise_of_numbers() -> None:
    counts = _counts(np.empty(0), seed=0)
    counts[0] += 500
    assert not is_numeric(counts, noise_std=NOISE, least=2.4)
    assert is_numeric(_counts(np.full(500, 3.0), seed=0), noise_std=NOISE, least=2.4)


def test_knots_rise_from_0_to_1_over_the_range() -> None:
    numbers = np.random.default_rng(0).normal(size=20000)
    found = released_range(_counts(numbers, seed=0), noise_std=NOISE, least=20)
    assert found is not None
    values, ranks = zip(*found.knots, strict=True)
    assert (values[0], values[-1]) == (found.low, found.high)
    assert (ranks[0], ranks[-1]) == (0.0, pytest.approx(1.0))
    assert list(values) == sorted(values)
    assert list(ranks) == sorted(ranks)
    middle = np.interp(0.0, values, ranks)
    assert middle == pytest.approx(0.5, abs=0.05)


def test_every_feature_is_bounded_whatever_the_value() -> None:
    encoding = NumberEncoding(low=-5.0, high=300.0, knots=((-5.0, 0.0), (2.0, 0.4), (300.0, 1.0)))
    values = np.array([-1e300, -5, 0, 2.0, 1e300, np.nan, 5e-324])
    features = encoding.encode(values, np.zeros(7, dtype=bool))
    assert np.isfinite(features).all()
    assert (np.abs(features) <= 1).all()
    assert features[5].tolist() == [0, 0, 0, 0, 1]


def test_every_number_has_its_bucket() -> None:
    values = np.array([0.0, 1e-9, 1.0, 1.24, 1.25, -1.0, 1e300, -1e300, 3.0, np.nan, 7.0])
    missing = np.zeros(11, dtype=bool)
    missing[10] = True
    found = bucket_of(values, missing)
    assert found[9] == 0
    assert found[10] == -1
    assert found[0] == found[1]
    assert found[2] == found[3] != found[4]
    assert found[:9].min() >= 1
    assert found.max() == BUCKETS - 1
    for value, bucket in zip(values[:6], found[:6], strict=True):
        assert EDGES[bucket - 1] <= value < EDGES[bucket] or value < 0


def test_range_and_ranks_follow_the_distribution() -> None:
    values = np.random.default_rng(0).uniform(20, 80, size=20000)
    counts = np.bincount(bucket_of(values, np.zeros(20000, dtype=bool)), minlength=BUCKETS).astype(float)
    noisy = counts + np.random.default_rng(1).normal(scale=20.0, size=BUCKETS)
    found = released_range(noisy, noise_std=20.0, least=1.0)
    assert found.low == 20.0
    assert found.high == 80.0
    levels, ranks = zip(*found.knots, strict=True)
    assert np.interp([35.0, 50.0, 65.0], levels, ranks) == pytest.approx([0.25, 0.5, 0.75], abs=0.03)
    assert is_numeric(noisy, noise_std=20.0, least=1.0)


def test_noise_alone_gives_no_range() -> None:
    """Statistical: 300 columns of noise, each with a false alarm of 1.4e-4; more than one has probability 1e-3."""
    draws = np.random.default_rng(0)
    found = [released_range(draws.normal(scale=30.0, size=BUCKETS), noise_std=30.0, least=1.0) for _ in range(300)]
    assert sum(encoding is not None for encoding in found) <= 1
    loose = [released_range(draws.normal(scale=30.0, size=BUCKETS), noise_std=21.0, least=1.0) for _ in range(300)]
    assert sum(encoding is not None for encoding in loose) > 5  # the control: 3.5 standard deviations


def test_few_rows_are_joined_into_wider_buckets() -> None:
    values = np.random.default_rng(0).uniform(20, 80, size=400)
    counts = np.bincount(bucket_of(values, np.zeros(400, dtype=bool)), minlength=BUCKETS).astype(float)
    found = released_range(
        counts + np.random.default_rng(1).normal(scale=12.0, size=BUCKETS), noise_std=12.0, least=1.0
    )
    assert found.low <= 32
    assert found.high >= 64


def test_a_column_of_zeros_has_no_range() -> None:
    counts = np.zeros(BUCKETS)
    counts[bucket_of(np.zeros(1), np.zeros(1, dtype=bool))[0]] = 500
    assert released_range(counts, noise_std=1.0, least=1.0) is None
