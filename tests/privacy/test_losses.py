"""The fast composition: its single steps are the referee's, its compositions agree with the referee's figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_mechanism as referee

from discreet.privacy.accounting import Gaussian, Relation, SampledGaussian, TruncatedGaussian, epsilon
from discreet.privacy.losses import Direction, Part, Steps, composed_epsilon, loss_range, step_delta
from discreet.privacy.proposal import EXTENDED, fourier_margin, loss_grid, proposed_epsilon, step_parts
from discreet.privacy.summary import summarise

VAULT = 518e3 / (13e12 / 1024)
ADJACENCY = {
    Direction.REMOVE: referee.AdjacencyType.REMOVE,
    Direction.ADD: referee.AdjacencyType.ADD,
    Direction.REPLACE: referee.AdjacencyType.REPLACE,
}


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.3, 0.614, 2.0, 30.0])
def test_one_step_is_the_referees(direction, rate, sigma):
    part = Part(1.0, rate, sigma, direction)
    low, high = loss_range(part)
    at = np.round(np.linspace(low - 0.1, high + 0.1, 203), 9)  # the referee fails at 1e-17
    exact = referee.GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=ADJACENCY[direction])
    found = step_delta(part, at)
    np.testing.assert_allclose(found, exact.get_delta_for_epsilon(at), atol=1e-13)
    assert np.all(np.diff(found) <= 1e-15)


@pytest.mark.parametrize("direction", list(Direction))
def test_the_range_holds_nearly_all_losses(direction):
    part = Part(1.0, 0.03, 0.8, direction)
    low, high = loss_range(part)
    assert step_delta(part, np.array([high]))[0] < 1e-20
    assert 1 - step_delta(part, np.array([low]))[0] == pytest.approx(math.exp(low), rel=1e-9)


AGREE = [
    [SampledGaussian(1 / 78, 2.5, 72_000)],
    [SampledGaussian(4096 / 50_000, 3.0, 2_500)],
    [SampledGaussian(4e-4, 0.43, 18_000)],
    [SampledGaussian(0.8192, 3.0, 2_500)],
    [SampledGaussian(0.01, 0.5, 1)],
    [SampledGaussian(0.03, 1.3, 200), SampledGaussian(0.1, 4.0, 10), Gaussian(7.0)],
    [TruncatedGaussian(10_000, 0.01, 130, 1.0, 300)],
]


@pytest.mark.parametrize("queries", AGREE)
@pytest.mark.parametrize("relation", list(Relation))
def test_compositions_agree_with_the_referee(queries, relation):
    proposed = proposed_epsilon(summarise(queries), 1e-6, relation)
    assert proposed == pytest.approx(epsilon(queries, delta=1e-6, relation=relation), rel=1e-5)


@pytest.mark.skipif(not EXTENDED, reason="this machine has no 80-bit numbers")
@pytest.mark.parametrize(("sigma", "delta", "close"), [(0.614, 1.1e-10, 1e-5), (0.8, 1e-12, 1e-3)])
def test_a_tiny_delta_agrees_with_the_referee_in_80_bits(sigma, delta, close):
    """Two ways round the rounding of float64, which have nothing in common: wider numbers, and a tilt.

    At 1e-12 the referee's own rounding is 0.2 % of delta, a tenth of the margin.
    """
    queries = [SampledGaussian(VAULT, sigma, 100_000)]
    proposed = proposed_epsilon(summarise(queries), delta, Relation.ADD_REMOVE)
    assert proposed == pytest.approx(epsilon(queries, delta=delta), rel=close)


def test_a_wrong_number_of_steps_is_seen():
    right, wrong = (summarise([SampledGaussian(0.02, 1.0, count)]) for count in (500, 505))
    referee_value = epsilon([SampledGaussian(0.02, 1.0, 500)], delta=1e-6)
    assert proposed_epsilon(right, 1e-6, Relation.ADD_REMOVE) == pytest.approx(referee_value, rel=1e-5)
    assert proposed_epsilon(wrong, 1e-6, Relation.ADD_REMOVE) > referee_value * 1.001


def test_removing_costs_more_than_adding():
    """Why a proposal looks at one direction only; the referee takes the larger of both."""
    for rate, sigma, steps in itertools.product([1e-3, 0.1, 0.7], [0.6, 2.0, 10.0], [1, 50, 3_000]):
        total = summarise([SampledGaussian(rate, sigma, steps)])
        grid = loss_grid(total, Relation.ADD_REMOVE)
        remove, add = (
            composed_epsilon([Steps(step_parts(query, direction), query.count)], delta=1e-7, grid=grid)
            for query in total.steps
            for direction in (Direction.REMOVE, Direction.ADD)
        )
        assert remove >= add * (1 - 1e-6)


def test_a_tiny_delta_over_many_steps_is_smooth():
    """Where float64 without a tilt scatters by a percent: a search could not walk on it."""
    sigmas = np.linspace(0.60, 0.62, 9)
    totals = [summarise([SampledGaussian(VAULT, float(sigma), 100_000)]) for sigma in sigmas]
    values = np.log([proposed_epsilon(total, 1.1e-10, Relation.ADD_REMOVE) for total in totals])
    assert np.all(np.diff(values) < 0)
    curve = np.polynomial.Polynomial.fit(sigmas, values, 3)
    assert np.max(np.abs(curve(sigmas) - values)) < 1e-4
    assert 1.1e-10 / 4 < fourier_margin(totals[0]) < 1.1e-10 / 3


def test_nothing_to_lose_is_zero_and_everything_lost_is_infinite():
    calm = Steps((Part(1.0, 0.01, 500.0, Direction.REMOVE),), 3)
    assert composed_epsilon([calm], delta=0.01, grid=1e-4) == 0.0
    lost = Steps((Part(1.0, 0.5, 1.0, Direction.REMOVE),), 10**9)
    assert composed_epsilon([lost], delta=1e-18, grid=0.1) == math.inf
