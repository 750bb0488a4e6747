"""Private ranges of numeric columns, from noisy counts: of the right size, also on small tables."""

from __future__ import annotations

import numpy as np
import pytest

from discreet.app.data.columns import BUCKETS, bucket_of, is_numeric, notable_numbers, released_range

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
