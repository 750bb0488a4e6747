"""Poisson batches: exact rate, independence, the law of the size, and a function of (key, step) alone.

The statistical tests use fixed keys, so they cannot flake. Had the keys been drawn at random, each would fail with
probability below 1e-6.
"""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from discreet.errors import ConfigError
from discreet.privacy.sampling import PoissonSampling

KEY = hashlib.sha256(b"sampling test").digest()
FALSE_ALARM = 1e-6


def _batches(sampling, count, *, key=KEY):
    return [sampling.draw(key=key, step=step) for step in range(count)]


def _inclusion_p_value(batches, *, examples, rate):
    """Chi-square of how often each example was drawn."""
    counts = np.bincount(np.concatenate(batches), minlength=examples)
    expected, variance = len(batches) * rate, len(batches) * rate * (1 - rate)
    return float(stats.chi2.sf(np.sum((counts - expected) ** 2) / variance, df=examples))


def _size_p_value(batches, *, examples, rate):
    """Kolmogorov distance of the batch sizes from Binomial(N, q), two-sided on mean and variance."""
    sizes = np.array([len(batch) for batch in batches], dtype=float)
    spread = math.sqrt(examples * rate * (1 - rate))
    mean_z = (sizes.mean() - examples * rate) / spread * math.sqrt(len(sizes))
    ratio = np.sum((sizes - examples * rate) ** 2) / spread**2
    variance_p = 2 * min(stats.chi2.sf(ratio, df=len(sizes)), stats.chi2.cdf(ratio, df=len(sizes)))
    return float(min(2 * stats.norm.sf(abs(mean_z)), variance_p))


@pytest.mark.parametrize(("examples", "batch_size"), [(100, 3), (50, 25), (400, 399), (1_000, 1)])
def test_every_example_is_drawn_at_the_rate(examples, batch_size):
    sampling = PoissonSampling(examples=examples, batch_size=batch_size)
    batches = _batches(sampling, 4_000)
    assert _inclusion_p_value(batches, examples=examples, rate=sampling.rate) > FALSE_ALARM
    assert _size_p_value(batches, examples=examples, rate=sampling.rate) > FALSE_ALARM


def test_negative_control_a_rate_two_percent_off_is_rejected():
    batches = _batches(PoissonSampling(examples=1_000, batch_size=102), 4_000)
    assert _size_p_value(batches, examples=1_000, rate=0.100) < FALSE_ALARM


def test_negative_control_a_favoured_example_is_rejected():
    batches = [np.union1d(batch, [7]) for batch in _batches(PoissonSampling(examples=1_000, batch_size=100), 100)]
    assert _inclusion_p_value(batches, examples=1_000, rate=0.100) < FALSE_ALARM


def test_negative_control_shuffled_batches_of_fixed_size_are_rejected():
    generator = np.random.default_rng(0)
    batches = [generator.choice(100, size=10, replace=False) for _ in range(4_000)]
    assert _size_p_value(batches, examples=100, rate=0.1) < FALSE_ALARM


def test_pairs_are_independent_within_and_between_steps():
    examples, steps = 30, 20_000
    drawn = np.zeros((steps, examples))
    for step, batch in enumerate(_batches(PoissonSampling(examples=examples, batch_size=9), steps)):
        drawn[step, batch] = 1.0
    centred = (drawn - 0.3) / math.sqrt(0.3 * 0.7)
    limit = stats.norm.isf(FALSE_ALARM / (2 * 2 * examples * examples)) / math.sqrt(steps)
    within = centred.T @ centred / steps
    assert np.abs(within - np.diag(np.diag(within))).max() < limit
    assert np.abs(centred[1:].T @ centred[:-1] / (steps - 1)).max() < limit


def test_first_and_last_example_are_like_any_other():
    batches = _batches(PoissonSampling(examples=64, batch_size=8), 20_000)
    for index in (0, 1, 62, 63):
        hits = sum(int(index in batch) for batch in batches)
        assert stats.binomtest(hits, n=len(batches), p=1 / 8).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("examples", "batch_size"), [(10**7, 1), (10**10, 100), (2**40, 3)])
def test_tiny_rates_keep_the_mean_size(examples, batch_size):
    batches = _batches(PoissonSampling(examples=examples, batch_size=batch_size), 3_000)
    total = sum(len(batch) for batch in batches)
    assert stats.poisson.cdf(total, 3_000 * batch_size) > FALSE_ALARM
    assert stats.poisson.sf(total - 1, 3_000 * batch_size) > FALSE_ALARM
    positions = np.concatenate(batches) / examples
    assert stats.kstest(positions, "uniform").pvalue > FALSE_ALARM


def test_batches_are_sorted_distinct_int64_in_range():
    for examples, batch_size in ((1, 1), (2, 1), (7, 5), (5_000, 700), (10**9, 2_000)):
        sampling = PoissonSampling(examples=examples, batch_size=batch_size)
        for batch in _batches(sampling, 20):
            assert batch.dtype == np.int64
            assert np.all(np.diff(batch) > 0)
            assert len(batch) == 0 or (batch[0] >= 0 and batch[-1] < examples)


def test_empty_batches_occur():
    sizes = [len(batch) for batch in _batches(PoissonSampling(examples=100, batch_size=1), 2_000)]
    expected = (1 - 0.01) ** 100
    assert stats.binomtest(sizes.count(0), n=2_000, p=expected).pvalue > FALSE_ALARM


def test_whole_batch_is_everything():
    batch = PoissonSampling(examples=12, batch_size=12).draw(key=KEY, step=3)
    np.testing.assert_array_equal(batch, np.arange(12))


def test_rate_is_the_exact_quotient():
    assert PoissonSampling(examples=50_000, batch_size=4_096).rate == 0.08192
    for examples in (93, 99, 105, 117):
        assert PoissonSampling(examples=examples, batch_size=7).rate == 7 / examples


def test_function_of_key_and_step():
    sampling = PoissonSampling(examples=1_000, batch_size=100)
    first = sampling.draw(key=KEY, step=5)
    np.testing.assert_array_equal(first, sampling.draw(key=KEY, step=5))
    others = [sampling.draw(key=KEY, step=6), sampling.draw(key=hashlib.sha256(KEY).digest(), step=5)]
    for other in others:
        assert not np.array_equal(first, other)
        # Independent batches share about q of their members.
        assert len(np.intersect1d(first, other)) < 30


def test_stream_is_frozen():
    """These bits are part of the format: a run that is resumed by a newer version must meet the same batches."""
    batch = PoissonSampling(examples=60_000, batch_size=12).draw(key=bytes(range(32)), step=41)
    assert batch.tolist() == FROZEN


FROZEN = [9501, 12634, 20797, 22057, 35683, 38993, 43307, 46788, 52856]


def test_memory_is_of_the_order_of_the_batch():
    sampling = PoissonSampling(examples=10**9, batch_size=1_000)
    sampling.draw(key=KEY, step=0)
    tracemalloc.start()
    sampling.draw(key=KEY, step=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 1_000


def test_gaps_go_on_where_a_shorter_call_ended():
    sampling = PoissonSampling(examples=1_000, batch_size=10)
    np.testing.assert_array_equal(sampling._gaps(KEY, 200)[:50], sampling._gaps(KEY, 50))


@pytest.mark.parametrize(
    ("examples", "batch_size", "message"),
    [
        (0, 1, "examples=0"),
        (10, 0, "batch_size=0"),
        (10, 11, r"batch_size=11.*at most the 10 examples"),
        (10.0, 1, r"examples=10\.0"),
        (True, 1, "examples=True"),
        (2**40 + 1, 1, r"at most 2\^40"),
    ],
)
def test_refused_sizes(examples, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        PoissonSampling(examples=examples, batch_size=batch_size)


def test_refused_key_and_step():
    sampling = PoissonSampling(examples=10, batch_size=2)
    with pytest.raises(ConfigError, match="16 bytes"):
        sampling.draw(key=bytes(16), step=0)
    with pytest.raises(ConfigError, match="step=-1"):
        sampling.draw(key=KEY, step=-1)
