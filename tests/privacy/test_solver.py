"""Noise that is solved for a target: never above it, close to it, or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    SampledGaussian,
    Selection,
    epsilon,
    solve_noise,
    solve_noise_multiplier,
)
from discreet.privacy.queries import SMALLEST_NOISE

SOLVER_GRID = [
    (rate, steps, target, at)
    for rate, steps in ((2e-4, 3_000), (0.004, 1_000), (0.05, 1_000), (0.18, 400), (0.7, 50), (1.0, 100))
    for target in (0.1, 0.7, 3.0, 8.0, 40.0)
    for at in (1e-7, 1e-4)
]


@pytest.mark.parametrize(("rate", "steps", "target", "at"), SOLVER_GRID)
def test_solved_noise_is_never_above_and_close(rate, steps, target, at):
    """F14, and that half a percent less noise would be too little."""
    solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=at)
    spent = epsilon([SampledGaussian(rate, solution.noise_multiplier, steps)], delta=at)
    assert spent == solution.epsilon
    assert 0.999 * target <= spent <= target
    assert epsilon([SampledGaussian(rate, 0.995 * solution.noise_multiplier, steps)], delta=at) > target


def test_solved_noise_takes_one_composition():
    counts = [solve_noise(sample_rate=q, steps=s, epsilon=e, delta=d).evaluations for q, s, e, d in SOLVER_GRID]
    assert np.mean(counts) <= 1.1
    assert max(counts) <= 3


def test_solver_on_random_targets():
    generator = np.random.default_rng(5)
    for _ in range(25):
        rate, steps = float(10 ** generator.uniform(-3.5, 0)), int(10 ** generator.uniform(0, 3.5))
        target, at = float(10 ** generator.uniform(-1, 2)), float(10 ** generator.uniform(-9, -2.5))
        solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=at)
        assert 0.999 * target <= solution.epsilon <= target, (rate, steps, target, at)
        assert solution.evaluations <= 3, (rate, steps, target, at)


@pytest.mark.parametrize("relation", list(Relation))
def test_solver_leaves_room_for_earlier_queries(relation):
    before = [Gaussian(6.0, 2), Selection(1e-6)]
    alone = solve_noise_multiplier(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, relation=relation)
    sigma = solve_noise_multiplier(
        sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, before=before, relation=relation
    )
    assert sigma > alone
    assert 2.997 <= epsilon([*before, SampledGaussian(0.03, sigma, 800)], delta=1e-5, relation=relation) <= 3.0


def test_solver_by_rdp():
    solution = solve_noise(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, accountant=Accountant.RDP)
    assert 2.997 <= solution.epsilon <= 3.0
    assert solution.noise_multiplier > solve_noise_multiplier(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5)


def test_the_least_noise_that_counts_is_enough():
    """Where the target is not reached with any noise, the answer is the smallest noise multiplier, not a search."""
    solution = solve_noise(sample_rate=1e-6, steps=10, epsilon=1.0, delta=1e-4)
    assert solution.noise_multiplier == SMALLEST_NOISE
    assert solution.evaluations == 1
    assert solution.epsilon == 0.0
    assert solve_noise(sample_rate=0.5, steps=1, epsilon=1e5, delta=1e-4).noise_multiplier == SMALLEST_NOISE
    assert epsilon([SampledGaussian(0.5, 0.999 * SMALLEST_NOISE, 1)], delta=1e-4) == math.inf


def test_nothing_left_for_training():
    with pytest.raises(BudgetExceeded, match=r"epsilon=1.0.*already spend.*raise epsilon"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=1.0, delta=1e-5, before=[Gaussian(2.0)])
    with pytest.raises(BudgetExceeded, match="already spend inf"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=1.0, delta=1e-5, before=[Selection(2e-5)])


def test_almost_nothing_left_for_training():
    used = epsilon([Gaussian(8.0)], delta=1e-5)
    solution = solve_noise(sample_rate=0.03, steps=800, epsilon=used * 1.0005, delta=1e-5, before=[Gaussian(8.0)])
    assert used < solution.epsilon <= used * 1.0005


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 + 1e-7, 1 + 1e-10])
@pytest.mark.parametrize("before", [[Gaussian(8.0)], [Gaussian(30.0, 3), SampledGaussian(0.01, 2.0, 100)]])
def test_next_to_nothing_left_is_solved_or_refused(before, factor):
    used = epsilon(before, delta=1e-5)
    try:
        solution = solve_noise(sample_rate=0.03, steps=800, epsilon=used * factor, delta=1e-5, before=before)
    except ConfigError as error:
        assert "no noise multiplier reaches it in 800 steps" in str(error)  # noqa: PT017
    else:
        assert solution.epsilon <= used * factor
        assert solution.evaluations <= 60


@pytest.mark.parametrize("at", [1e-300, 1e-20])
def test_a_delta_that_is_not_resolved_is_refused_before_any_search(at):
    with pytest.raises(ConfigError, match=r"over 800 steps: below .*resolve"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=3.0, delta=at)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"epsilon": 1e-9}, "epsilon=1e-09: must be from 1e-06"),
        ({"epsilon": 1e9}, "epsilon=1000000000.0: must be from 1e-06"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"delta": 0.0}, "delta=0.0"),
    ],
)
def test_solver_refuses(changes, message):
    arguments = {"sample_rate": 0.03, "steps": 100, "epsilon": 3.0, "delta": 1e-5} | changes
    with pytest.raises(ConfigError, match=message):
        solve_noise(**arguments)
