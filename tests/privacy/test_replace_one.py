"""Replace-one, and truncated batches: no other gradients cost more; Renyi divergences against quadrature and PLD."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from scipy import integrate, stats

from discreet.errors import ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    Repeated,
    Repetitions,
    SampledGaussian,
    Stopping,
    TruncatedGaussian,
    delta,
    epsilon,
    query_from_json,
    query_to_json,
    solve_step_noise,
)
from discreet.privacy.losses import Direction, Part, step_delta
from discreet.privacy.renyi import mixed_renyi, replace_one_renyi

PLD, RDP = Accountant.PLD, Accountant.RDP
REPLACE = Relation.REPLACE_ONE


def _mixture(rate, sigma, gradient, grid):
    """Density on a plane of (1 - q) N(0, s^2) + q N(gradient, s^2)."""
    x, y = np.meshgrid(grid, grid, indexing="ij")

    def normal(a, b):
        return np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

    return (1 - rate) * normal(0, 0) + rate * normal(*gradient)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_no_pair_of_gradients_costs_more_than_opposite_ones(rate, sigma):
    """One step on a plane, all directions and some lengths: the old gradient along x, the new one anywhere."""
    grid = np.linspace(-1 - 5 * sigma, 1 + 5 * sigma, 161)
    area = (grid[1] - grid[0]) ** 2
    for at in (0.0, 0.1, 1.0):
        opposed = step_delta(Part(1.0, rate, sigma, Direction.REPLACE), np.array([at]))[0]

        def cost(old, new, at=at):
            first, second = (_mixture(rate, sigma, gradient, grid) for gradient in (old, new))
            return float(np.maximum(0.0, first - math.exp(at) * second).sum() * area)

        assert cost((1.0, 0.0), (-1.0, 0.0)) == pytest.approx(opposed, abs=2e-4)
        for length, angle in [(size, turn) for size in (0.0, 0.5, 1.0) for turn in np.linspace(0, math.pi, 5)]:
            new = (length * math.cos(angle), length * math.sin(angle))
            assert cost((1.0, 0.0), new) <= opposed + 2e-4
            assert cost(new, (1.0, 0.0)) <= opposed + 2e-4
        if opposed > 0.01:
            assert cost((1.1, 0.0), (-1.1, 0.0)) > opposed + 2e-4


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.01, 1.0, 1000), (0.08, 4.0, 2500), (0.5, 8.0, 100)])
def test_replacing_costs_more_than_adding_and_less_than_half_the_noise(rate, sigma, steps):
    for accountant in Accountant:
        one = epsilon([SampledGaussian(rate, sigma, steps)], delta=1e-5, accountant=accountant)
        replaced = epsilon([SampledGaussian(rate, sigma, steps)], delta=1e-5, relation=REPLACE, accountant=accountant)
        halved = epsilon([SampledGaussian(rate, sigma / 2, steps)], delta=1e-5, accountant=accountant)
        assert one < replaced < halved


@pytest.mark.parametrize("accountant", list(Accountant))
def test_unsampled_queries_beside_sampled_ones_are_doubled_too(accountant):
    steps, queries = SampledGaussian(0.02, 3.0, 400), [SampledGaussian(0.02, 3.0, 400), Gaussian(20.0)]
    both = epsilon(queries, delta=1e-5, relation=REPLACE, accountant=accountant)
    # The sampled steps alone, and a Gaussian that dominates: the sum cannot be below either, nor above their sum.
    alone = epsilon([steps], delta=1e-5, relation=REPLACE, accountant=accountant)
    extra = epsilon([Gaussian(10.0)], delta=1e-5, accountant=accountant)
    assert max(alone, extra) < both < alone + extra
    tiny = [SampledGaussian(1e-6, 500.0, 1), Gaussian(20.0)]
    assert epsilon(tiny, delta=1e-5, relation=REPLACE, accountant=accountant) == pytest.approx(extra, rel=2e-3)


def _by_quadrature(rate, sigma, order):
    def integrand(x):
        upper = np.logaddexp(math.log1p(-rate), math.log(rate) + (x - 0.5) / sigma**2)
        lower = np.logaddexp(math.log1p(-rate), math.log(rate) + (-x - 0.5) / sigma**2)
        return math.exp(order * upper + (1 - order) * lower + stats.norm.logpdf(x, scale=sigma))

    edges = [-1 - 12 * sigma, 0.0, order / 2, order, order + 12 * sigma]
    pieces = [
        integrate.quad(integrand, low, high, epsabs=0, epsrel=1e-12, limit=400)[0]
        for low, high in itertools.pairwise(edges)
    ]
    return math.log(sum(pieces)) / (order - 1)


@pytest.mark.parametrize(
    ("rate", "sigma", "order"),
    [(0.01, 1.0, 2.0), (0.01, 1.0, 8.5), (0.3, 2.0, 20.0), (0.5, 0.6, 5.0), (1e-3, 0.5, 3.1), (0.9, 4.0, 63.0)],
)
def test_the_trapezoidal_rule_is_the_integral(rate, sigma, order):
    found = replace_one_renyi(rate, sigma, (order,))[0]
    assert found == pytest.approx(_by_quadrature(rate, sigma, order), rel=1e-6)
    assert found >= _by_quadrature(rate, sigma, order) - 1e-12


def test_renyi_without_sampling_is_the_gaussian_of_twice_the_distance():
    orders = (1.5, 4.0, 32.0)
    expected = [order * (2 / 3) ** 2 / 2 for order in orders]
    np.testing.assert_allclose(replace_one_renyi(1.0, 3.0, orders), expected)
    np.testing.assert_allclose(replace_one_renyi(1 - 1e-12, 3.0, orders), expected, rtol=1e-5)


def test_renyi_of_replacing_is_above_that_of_removing():
    orders = tuple(float(order) for order in rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
    from_referee = RdpAccountant(list(orders))
    from_referee.compose(dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(1.5)))
    assert np.all(replace_one_renyi(0.05, 1.5, orders) > from_referee.rdp)


def test_a_known_mixture_of_divergences():
    orders = np.array([2.0, 5.0])
    same = np.array([0.3, 0.9])
    np.testing.assert_allclose(mixed_renyi(orders, (same, same), (0.4, 0.6)), same)
    np.testing.assert_allclose(mixed_renyi(orders, (same, 9 * same), (1.0, 0.0)), same)
    mixed = mixed_renyi(orders, (same, 2 * same), (0.5, 0.5))
    assert np.all(same < mixed)
    assert np.all(mixed < 2 * same)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("accountant", list(Accountant))
def test_cuts_cost_and_vanish(relation, accountant):
    def at(largest):
        queries = [TruncatedGaussian(10_000, 0.01, largest, 2.0, 200)]
        return epsilon(queries, delta=1e-5, relation=relation, accountant=accountant)

    poisson = epsilon([SampledGaussian(0.01, 2.0, 200)], delta=1e-5, relation=relation, accountant=accountant)
    assert at(100) > at(120) > at(140) >= poisson * (1 - 1e-3)
    assert at(10_000) == pytest.approx(poisson, rel=1e-9)
    # A cut of probability 1e-20 costs nothing; its Renyi divergences of high order do.
    assert poisson * (1 - 1e-3) <= at(200) <= poisson * (1.001 if accountant is PLD else 3)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize(
    "queries",
    [
        [TruncatedGaussian(10_000, 0.01, 130, 2.0, 200)],
        [SampledGaussian(0.01, 1.0, 500), Gaussian(9.0)],
        [TruncatedGaussian(500, 0.2, 110, 4.0, 50), SampledGaussian(0.05, 3.0, 50)],
    ],
)
def test_pld_is_below_renyi(relation, queries):
    by_pld, by_rdp = (epsilon(queries, delta=1e-6, relation=relation, accountant=kind) for kind in (PLD, RDP))
    assert 0 < by_pld < by_rdp < 4 * by_pld
    at = by_rdp
    assert delta(queries, epsilon=at, relation=relation, accountant=RDP) == pytest.approx(1e-6, rel=0.01)


@pytest.mark.parametrize("relation", list(Relation))
def test_noise_for_truncated_batches(relation):
    step = TruncatedGaussian(20_000, 0.02, 460, 1.0, 500)
    solution = solve_step_noise(step, epsilon=2.0, delta=1e-6, relation=relation)
    found = TruncatedGaussian(20_000, 0.02, 460, solution.noise_multiplier, 500)
    assert epsilon([found], delta=1e-6, relation=relation) == solution.epsilon
    assert 1.998 <= solution.epsilon <= 2.0
    assert solution.evaluations <= 3


def test_searches_under_replace_one():
    run = (SampledGaussian(0.02, 4.0, 300),)
    repetitions = Repetitions(Stopping.LOGARITHMIC, 10)
    costs = [epsilon([Repeated(run, repetitions)], delta=1e-5, relation=each, accountant=RDP) for each in Relation]
    assert costs[0] < costs[1]
    assert costs[1] > epsilon(run, delta=1e-5, relation=REPLACE, accountant=RDP)


def test_truncated_records_and_refusals():
    query = TruncatedGaussian(10_000, 0.01, 130, 2.0, 200)
    assert query_from_json(query_to_json(query)) == query
    record = query_to_json(query)
    for changes in ({"examples": 0}, {"largest_batch": 0}, {"largest_batch": 2.0}, {"sample_rate": 1.5}, {"count": -1}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            query_from_json(record | changes)
    assert query.cut_probability == pytest.approx(0.002168, rel=1e-3)
    assert 0 < query.cut_rate < 0.013
    assert TruncatedGaussian(10_000, 1e-6, 9_000, 2.0, 1).cut_rate <= 0.9
    assert epsilon([TruncatedGaussian(10_000, 1e-6, 9_000, 2.0, 1)], delta=1e-5) == 0.0
