"""The planner's closed forms against the numbers in its derivation, and defaults from tiny to huge data sets."""

from __future__ import annotations

import itertools
import math

import pytest

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Gaussian, Relation, Selection
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.planner import (
    FEWEST_STEPS,
    FREE_SAMPLES,
    MOST_EPOCHS,
    MOST_SAMPLES,
    MOST_STEPS,
    default_steps,
    knee_batch,
    knee_noise_multiplier,
    plan,
    wall_overhead,
)


@pytest.mark.parametrize(
    ("overhead", "kappa", "sigma"),
    [
        (1.02, 3.50, 3.57),
        (1.05, 2.17, 2.28),
        (1.1, 1.50, 1.64),
        (1.2, 1.00, 1.20),
        (1.5, 0.55, 0.83),
        (2.0, 0.33, 0.65),
        (3.0, 0.18, 0.54),
    ],
)
def test_knee_constants(overhead, kappa, sigma):
    assert knee_noise_multiplier(overhead) == pytest.approx(sigma, abs=0.006)
    assert knee_noise_multiplier(overhead) / overhead == pytest.approx(kappa, abs=0.006)
    assert wall_overhead(knee_noise_multiplier(overhead)) == pytest.approx(overhead)


@pytest.mark.parametrize(
    ("examples", "epsilon", "delta", "steps", "batch"),
    [
        (1_281_167, 8, 8e-7, 18_000, 31_800),
        (1_281_167, 8, 8e-7, 72_000, 15_900),
        (50_000, 8, 1e-5, 2_500, 3_650),
    ],
)
def test_knee_batches_of_published_runs(examples, epsilon, delta, steps, batch):
    found = knee_batch(examples=examples, mu=gdp_mu(epsilon, delta=delta), steps=steps)
    assert found == pytest.approx(batch, rel=0.015)


def test_wall_overhead_falls_to_one():
    values = [wall_overhead(sigma) for sigma in (0.4, 0.7, 1.0, 2.0, 5.0, 50.0)]
    assert all(low > high for low, high in itertools.pairwise(values))
    assert values[-1] == pytest.approx(1.0, abs=1e-3)


def test_the_accountant_agrees_that_the_knee_costs_five_percent():
    knee = plan(examples=60_000, epsilon=3.0, delta=1e-5)
    full = plan(examples=60_000, epsilon=3.0, delta=1e-5, batch_size=60_000, steps=knee.steps)
    ratio = (knee.noise_multiplier / knee.batch_size) / (full.noise_multiplier / full.batch_size)
    assert 1.03 < ratio < 1.08


@pytest.mark.parametrize("examples", [1_000, 1_437, 4_459, 32_561, 60_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 100.0, math.inf])
def test_defaults_are_sensible(examples, epsilon):
    chosen = plan(examples=examples, epsilon=epsilon)
    samples = chosen.batch_size * chosen.steps
    assert 1 <= chosen.batch_size <= examples
    assert FEWEST_STEPS <= chosen.steps <= MOST_STEPS
    assert samples <= max(FREE_SAMPLES, min(MOST_EPOCHS * examples, MOST_SAMPLES))
    assert chosen.epsilon == epsilon
    if math.isinf(epsilon):
        assert chosen.noise_multiplier == 0.0
    else:
        assert 0.999 * epsilon <= chosen.spent() <= epsilon
    if epsilon <= 3 and examples <= 60_000:
        assert wall_overhead(chosen.noise_multiplier) < 1.06


def test_no_noise_gets_the_sizes_of_a_private_run():
    free, private = plan(examples=32_561, epsilon=math.inf), plan(examples=32_561, epsilon=8.0)
    assert (free.batch_size, free.steps) == (private.batch_size, private.steps)


def test_what_is_given_is_kept():
    chosen = plan(examples=60_000, epsilon=3.0, batch_size=123, steps=456, delta=1e-6)
    assert (chosen.batch_size, chosen.steps, chosen.delta) == (123, 456, 1e-6)


def test_given_steps_move_the_batch_like_one_over_root():
    few = plan(examples=60_000, epsilon=1.0, steps=250)
    many = plan(examples=60_000, epsilon=1.0, steps=1_000)
    assert few.batch_size / many.batch_size == pytest.approx(2.0, rel=0.01)


def test_given_small_batch_gets_more_steps_and_a_large_one_no_fewer():
    assert plan(examples=60_000, epsilon=3.0, batch_size=256).steps == 4 * default_steps(60_000)
    assert plan(examples=60_000, epsilon=3.0, batch_size=3_500).steps == default_steps(60_000)


@pytest.mark.parametrize("max_samples", [1, 1_000, 50_000, 1_000_000])
def test_compute_cap_is_kept(max_samples):
    chosen = plan(examples=60_000, epsilon=3.0, max_samples=max_samples)
    assert chosen.batch_size * chosen.steps <= max_samples
    given = plan(examples=60_000, epsilon=3.0, max_samples=max_samples, batch_size=1)
    assert given.steps <= max_samples


def test_earlier_queries_lower_the_batch():
    alone = plan(examples=60_000, epsilon=1.0)
    after = plan(examples=60_000, epsilon=1.0, before=(Gaussian(8.0), Selection(1e-6)))
    assert after.batch_size < alone.batch_size
    assert after.spent() <= 1.0


def test_replace_one_is_accounted():
    chosen = plan(examples=60_000, epsilon=1.0, relation=Relation.REPLACE_ONE)
    assert chosen.spent() <= 1.0
    assert chosen.batch_size < plan(examples=60_000, epsilon=1.0).batch_size


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, ConfigError, "epsilon=0.0"),
        ({"epsilon": math.nan}, ConfigError, "epsilon=nan"),
        ({"delta": 1.0}, ConfigError, "delta=1.0"),
        ({"delta": 0.0}, ConfigError, "delta=0.0"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"batch_size": 70_000}, ConfigError, "batch_size=70000"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"max_samples": 0}, ConfigError, "max_samples=0"),
        ({"before": (Selection(0.5),)}, BudgetExceeded, "released names"),
        ({"before": (Gaussian(0.5),)}, BudgetExceeded, "already spend"),
        ({"before": (Gaussian(0.0),)}, BudgetExceeded, "already spend inf"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        plan(**({"examples": 60_000, "epsilon": 3.0} | arguments))


def test_knee_refuses_the_impossible():
    with pytest.raises(ConfigError, match="overhead=1"):
        knee_noise_multiplier(1.0)
