"""The planner's closed forms against the numbers in its derivation, and defaults from tiny to huge data sets."""

from __future__ import annotations

import itertools
import math

import pytest

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Gaussian, Relation, Selection
from discreet.privacy.compute import Bound
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.planner import (
    FEWEST_STEPS,
    FREE_SAMPLES,
    HALF_STEPS,
    MOST_EPOCHS,
    MOST_SAMPLES,
    MOST_STEPS,
    balance,
    default_bound,
    default_steps,
    knee_batch,
    knee_noise_multiplier,
    plan,
    score,
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
    limit = default_bound(examples).samples
    assert 1 <= chosen.batch_size <= examples
    assert limit == max(FREE_SAMPLES, min(MOST_EPOCHS * examples, MOST_SAMPLES))
    assert samples <= limit
    assert FEWEST_STEPS <= chosen.steps <= MOST_STEPS or samples >= 0.99 * limit
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


@pytest.mark.parametrize("samples", [100, 1_000, 50_000, 1_000_000])
@pytest.mark.parametrize("overhead", [0.0, 3.0, 200.0])
def test_a_bound_is_kept_and_used(samples, overhead):
    bound = Bound(samples=samples + 20 * overhead, overhead=overhead)
    chosen = plan(examples=60_000, epsilon=3.0, bound=bound)
    cost = bound.cost(batch_size=chosen.batch_size, steps=chosen.steps)
    # The batch is rounded down, which wastes up to one example a step.
    assert bound.samples - chosen.steps <= cost <= bound.samples
    given = plan(examples=60_000, epsilon=3.0, bound=bound, batch_size=1)
    assert bound.cost(batch_size=1, steps=given.steps) <= bound.samples


def test_a_bound_that_the_knee_keeps_changes_nothing():
    free = plan(examples=60_000, epsilon=3.0)
    room = Bound(samples=free.batch_size * free.steps)
    assert plan(examples=60_000, epsilon=3.0, bound=room).batch_size == free.batch_size
    tight = plan(examples=60_000, epsilon=3.0, bound=Bound(samples=room.samples / 2))
    assert tight.batch_size < free.batch_size


def test_the_balance_is_the_best_split_of_the_bound():
    """Against every number of steps, by the same score: no other split does more than its rounding better."""
    mu, bound = gdp_mu(3.0, delta=1e-5), Bound(samples=100_000, overhead=10.0)
    batch, steps = balance(60_000, mu=mu, bound=bound, most_steps=1_000)
    best = min(
        score(60_000, mu=mu, batch_size=bound.batch(other), steps=other)
        for other in range(10, 1_001)
        if bound.batch(other) >= 1
    )
    assert score(60_000, mu=mu, batch_size=batch, steps=steps) <= best * 1.01


def test_the_score_is_the_closed_form():
    """r (1 + H / S) where the seed is exact: at the knee r = 1.05, so 1.05 (1 + H / 600)."""
    mu = gdp_mu(3.0, delta=1e-5)
    batch = knee_batch(examples=60_000, mu=mu, steps=600)
    assert score(60_000, mu=mu, batch_size=batch, steps=600) == pytest.approx(1.05 * (1 + HALF_STEPS / 600), rel=1e-6)


def test_fixed_passes_are_used_up():
    bound = Bound(samples=600_000)
    batch, steps = balance(60_000, mu=0.7, bound=bound, most_steps=4_000, use_all=True)
    assert 600_000 - steps <= batch * steps <= 600_000


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
        ({"bound": Bound(samples=79)}, ConfigError, "10 steps of 8 need 80"),
        ({"bound": Bound(samples=99), "steps": 100}, ConfigError, "less than one example a step"),
        ({"bound": Bound(samples=99), "batch_size": 100}, ConfigError, "not even one step"),
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
