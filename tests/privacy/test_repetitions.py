"""Random stopping: the distributions, the published bound, and the exact cost of a search that can be integrated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import integrate, special, stats

from discreet.errors import ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Repeated,
    Repetitions,
    SampledGaussian,
    Selection,
    Stopping,
    delta,
    epsilon,
    query_from_json,
    query_to_json,
    selected_epsilon,
    solve_noise,
)
from discreet.privacy.repetitions import MOST_RUNS, selected_renyi

RATE = 4096 / 50_000

LOG, GEOM, POISSON = Stopping.LOGARITHMIC, Stopping.GEOMETRIC, Stopping.POISSON
COLUMNS = [(LOG, 5), (LOG, 10), (GEOM, 10), (POISSON, 10), (LOG, 30), (LOG, 100)]
PUBLISHED = {  # sigma -> epsilon of releasing one of E[K] runs; q = 4096/50000, S = 2500, delta = 1e-5
    20.0: (1.35, 1.46, 1.76, 1.91, 1.60, 1.74),
    10.0: (2.76, 2.98, 3.56, 3.99, 3.27, 3.55),
    5.0: (5.71, 6.14, 7.13, 8.43, 6.73, 7.28),
    3.0: (9.91, 10.6, 12.1, 15.9, 11.6, 12.5),
}


@pytest.mark.parametrize("sigma", PUBLISHED)
def test_theorems_2_and_6_of_2110_03620_give_the_published_table(sigma):
    run = [SampledGaussian(RATE, sigma, 2_500)]
    for (stopping, mean), expected in zip(COLUMNS, PUBLISHED[sigma], strict=True):
        found = selected_epsilon(run, repetitions=Repetitions(stopping, mean), delta=1e-5)
        assert found == pytest.approx(expected, abs=0.005 if expected < 9.95 else 0.05), (stopping, mean)


@pytest.mark.parametrize(("stopping", "mean"), [*COLUMNS, (LOG, 1), (GEOM, 1), (POISSON, 1), (POISSON, 300)])
def test_the_formulas_agree_with_the_referee(stopping, mean):
    repetitions = Repetitions(stopping, mean)
    referee, base = RdpAccountant(), RdpAccountant()
    run = dp_event.PoissonSampledDpEvent(0.05, dp_event.GaussianDpEvent(2.0))
    base.compose(run)
    referee.compose(dp_event.RepeatAndSelectDpEvent(run, repetitions.mean, repetitions.shape))
    found = selected_renyi(np.asarray(base.orders), base.rdp, repetitions)
    monotone = np.minimum.accumulate(referee.rdp[::-1])[::-1]  # which the referee leaves out for Poisson
    np.testing.assert_allclose(found, monotone, rtol=1e-6, atol=1e-8)


def _best_of_gaussians(epsilon, *, sigma, distribution):
    """Exact delta of releasing the largest of K draws of N(x, sigma^2), x = 0 or 1: densities f(y) G'(F(y))."""
    runs = np.arange(1, 3_000)
    weights = distribution(runs) * runs

    def log_density(y, x):
        powers = (runs - 1) * stats.norm.logcdf(y, loc=x, scale=sigma)
        return stats.norm.logpdf(y, loc=x, scale=sigma) + special.logsumexp(powers, b=weights)

    def one_way(upper, lower):
        def excess(y):
            above, below = log_density(y, upper), epsilon + log_density(y, lower)
            return math.exp(above) - math.exp(below) if above > below else 0.0

        return integrate.quad(excess, -8 * sigma, 1 + 8 * sigma, limit=200, epsabs=1e-12)[0]

    return max(one_way(1, 0), one_way(0, 1))


@pytest.mark.parametrize("stopping", list(Stopping))
@pytest.mark.parametrize("mean", [3, 20])
def test_the_bound_holds_for_a_search_that_can_be_integrated(stopping, mean):
    repetitions, run = Repetitions(stopping, mean), (Gaussian(3.0),)
    for at in (0.5, 1.5):
        exact = _best_of_gaussians(at, sigma=3.0, distribution=repetitions.pmf)
        bound = delta([Repeated(run, repetitions)], epsilon=at, accountant=Accountant.RDP)
        single = delta(run, epsilon=at)
        assert single < exact <= bound


def _renyi(first, second, orders):
    """Divergences of two distributions on two points, given P[first point] each; the larger of both directions."""
    pair = np.log([[first, 1 - first], [second, 1 - second]])
    ways = [
        special.logsumexp(orders[:, None] * pair[i] + (1 - orders[:, None]) * pair[1 - i], axis=1) / (orders - 1)
        for i in (0, 1)
    ]
    return np.maximum(*ways)


def _worst_of_all(probability, distribution):
    """P[every run gave the worse answer] = E[probability^K], given K >= 1."""
    runs = np.arange(1, 3_000)
    weights = distribution(runs)
    return float((weights / weights.sum() * probability**runs).sum())


@pytest.mark.parametrize("stopping", [LOG, GEOM])
def test_a_random_number_of_runs_keeps_the_bound_and_a_fixed_one_breaks_it(stopping):
    """Randomised response, best of K: the worse answer is released only if every run gave it."""
    orders, worse = np.linspace(1.5, 60, 118), 1 / (1 + math.exp(-0.5))
    repetitions = Repetitions(stopping, 20)
    bound = selected_renyi(orders, _renyi(worse, 1 - worse, orders), repetitions)

    def exact(distribution):
        return _renyi(_worst_of_all(worse, distribution), _worst_of_all(1 - worse, distribution), orders)

    assert np.all(exact(repetitions.pmf) <= bound)
    assert np.all(exact(repetitions.pmf)[20:] > 0.4 * bound[20:])
    assert np.any(exact(lambda runs: (runs == 20).astype(float)) > 2 * bound)


@pytest.mark.parametrize("stopping", list(Stopping))
@pytest.mark.parametrize("mean", [1, 1.5, 10, 100])
def test_mean_and_mass(stopping, mean):
    runs = np.arange(0, 40_000)
    mass = Repetitions(stopping, mean).pmf(runs)
    assert mass.min() >= 0
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    assert (runs * mass).sum() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("stopping", list(Stopping))
def test_inversion_gives_each_number_its_probability(stopping):
    repetitions = Repetitions(stopping, 4)
    grid = (np.arange(20_000) + 0.5) / 20_000
    counts = np.bincount([repetitions.runs(float(uniform)) for uniform in grid], minlength=60)
    np.testing.assert_allclose(counts[:60] / 20_000, repetitions.pmf(np.arange(60)), atol=1.01 / 20_000)


@pytest.mark.parametrize("stopping", list(Stopping))
@pytest.mark.parametrize("mean", [1, 10, MOST_RUNS])
def test_the_last_quantile_is_reached(stopping, mean):
    repetitions = Repetitions(stopping, mean)
    assert repetitions.runs(0.0) <= repetitions.runs(0.5) <= repetitions.runs(1 - 2.0**-53) < 10_000_000
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match="uniform"):
            repetitions.runs(wrong)


def test_costs_grow_with_runs_and_noise_is_solved_for_the_whole_search():
    means = [1, 2, 5, 10, 50, 1_000]
    for stopping in Stopping:
        costs = [
            selected_epsilon([SampledGaussian(RATE, 6.0, 900)], repetitions=Repetitions(stopping, m), delta=1e-5)
            for m in means
        ]
        assert costs == sorted(costs)
        assert costs[0] >= epsilon([SampledGaussian(RATE, 6.0, 900)], delta=1e-5, accountant=Accountant.RDP)
    repetitions = Repetitions(LOG, 10)
    solution = solve_noise(
        sample_rate=RATE, steps=2_500, epsilon=8.0, delta=1e-5, repetitions=repetitions, accountant=Accountant.RDP
    )
    run = [SampledGaussian(RATE, solution.noise_multiplier, 2_500)]
    assert 7.99 <= selected_epsilon(run, repetitions=repetitions, delta=1e-5) <= 8.0
    assert 4.4 < epsilon(run, delta=1e-5) < 5.1


def test_before_and_selections_are_charged_too():
    run, repetitions = [SampledGaussian(RATE, 6.0, 900)], Repetitions(GEOM, 10)
    alone = selected_epsilon(run, repetitions=repetitions, delta=1e-5)
    assert selected_epsilon(run, repetitions=repetitions, delta=1e-5, before=[Gaussian(8.0)]) > alone
    assert selected_epsilon(run, repetitions=repetitions, delta=1e-5, before=[Selection(5e-6)]) > alone
    assert selected_epsilon(run, repetitions=repetitions, delta=1e-5, before=[Selection(2e-5)]) == math.inf
    assert selected_epsilon([Gaussian(0.0)], repetitions=repetitions, delta=1e-5) == math.inf
    assert selected_epsilon([], repetitions=repetitions, delta=1e-5) == 0.0


def test_record_and_refusals():
    query = Repeated((SampledGaussian(0.1, 2.0, 30), Gaussian(9.0, 2)), Repetitions(POISSON, 12.5))
    assert query_from_json(query_to_json(query)) == query
    twice = Repeated((Gaussian(9.0), SampledGaussian(0.1, 2.0, 30), Gaussian(9.0)), Repetitions(POISSON, 12.5))
    costs = [epsilon([each], delta=1e-5, accountant=Accountant.RDP) for each in (query, twice)]
    assert costs[0] == costs[1]
    with pytest.raises(ConfigError, match=r"pld with a repeated run.*rdp"):
        epsilon([query], delta=1e-5)
    with pytest.raises(ConfigError, match=r"pld with a repeated run.*rdp"):
        delta([query], epsilon=1.0)
    for mean in (0, 0.99, MOST_RUNS + 1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"runs=.*from 1 to 10000.*try 10"):
            Repetitions(LOG, mean)
    with pytest.raises(ConfigError, match="once, before the runs"):
        Repeated((Selection(1e-6),), Repetitions(LOG, 10))
    with pytest.raises(ConfigError, match="gamma"):
        _ = Repetitions(POISSON, 10).gamma
    for changes in ({"stopping": "often"}, {"stopping": 3}, {"run": 4}, {"mean_runs": "ten"}, {"mean_runs": True}):
        with pytest.raises(ConfigError):
            query_from_json(query_to_json(query) | changes)
