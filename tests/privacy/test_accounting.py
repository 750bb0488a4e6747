"""Accounting against published values, exact one-step formulas, optimistic bounds, and its own limits."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import optimize, stats

from discreet.errors import ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    SampledGaussian,
    Selection,
    delta,
    epsilon,
)


def _one_step_delta(rate, sigma, at, *, relation):
    """Exact hockey-stick divergence of one step, from the two densities and the point where their ratio is e^eps."""

    def mixture_tail(x, centre):
        return (1 - rate) * stats.norm.sf(x, scale=sigma) + rate * stats.norm.sf(x, loc=centre, scale=sigma)

    def log_density(x, centre):
        parts = stats.norm.logpdf(x, scale=sigma), stats.norm.logpdf(x, loc=centre, scale=sigma)
        return np.logaddexp(math.log1p(-rate) + parts[0], math.log(rate) + parts[1])

    other = -1.0 if relation is Relation.REPLACE_ONE else 0.0

    def divergence(upper, lower, side):
        def excess(x):
            return log_density(side * x, upper) - log_density(side * x, lower) - at

        ends = -60 * sigma - 60, 60 * sigma + 60
        if excess(ends[1]) <= 0:
            return 0.0
        crossing = optimize.brentq(excess, *ends, xtol=1e-14)
        tails = [mixture_tail(crossing, side * centre) for centre in (upper, lower)]
        return tails[0] - math.exp(at) * tails[1]

    if relation is Relation.REPLACE_ONE:
        return divergence(1.0, other, 1)
    return max(divergence(1.0, 0.0, 1), divergence(0.0, 1.0, -1))


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("at", [0.05, 0.5, 2.0])
def test_one_step_is_exact(relation, rate, sigma, at):
    exact = _one_step_delta(rate, sigma, at, relation=relation)
    bound = delta([SampledGaussian(rate, sigma, 1)], epsilon=at, relation=relation)
    assert bound >= exact - 1e-14
    assert bound <= exact + 1e-5
    if exact > 1e-8:
        assert epsilon([SampledGaussian(rate, sigma, 1)], delta=exact, relation=relation) >= at - 1e-9


GRID = list(itertools.product([1e-4, 0.004, 0.05, 0.5], [0.5, 0.8, 1.5, 20.0], [1, 30, 3_000], [1e-8, 1e-5]))


@pytest.mark.parametrize("rate", [1e-4, 0.004, 0.05, 0.5])
def test_never_below_an_optimistic_bound_and_close_to_it(rate):
    """F13: privacy buckets rounded down are a lower bound by another algorithm."""
    for _, sigma, steps, at in (point for point in GRID if point[0] == rate):
        upper = epsilon([SampledGaussian(rate, sigma, steps)], delta=at)
        assert math.isfinite(upper)
        assert upper >= 0
        grid = max(5e-4, upper / 10_000)
        losses = dp_pld.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            value_discretization_interval=grid,
            sampling_prob=rate,
            use_connect_dots=False,
        )
        if steps <= 30:  # each step rounds down by up to one cell, so for more steps the bound says nothing
            lower = losses.self_compose(steps, tail_mass_truncation=0).get_epsilon_for_delta(at)
            assert lower - 1e-9 <= upper <= lower + max(0.01, 0.01 * upper) + steps * grid, (rate, sigma, steps, at)
        assert upper <= epsilon([SampledGaussian(rate, sigma, steps)], delta=at, accountant=Accountant.RDP) + 0.01


def test_monotone_in_every_argument():
    base = {"rate": 0.02, "sigma": 1.2, "steps": 500, "at": 1e-6}

    def at(**changes):
        values = base | changes
        return epsilon([SampledGaussian(values["rate"], values["sigma"], values["steps"])], delta=values["at"])

    for name, values in (
        ("rate", [0.001, 0.01, 0.02, 0.1, 0.6, 1.0]),
        ("steps", [1, 2, 10, 499, 500, 501, 5_000]),
        ("sigma", [20.0, 5.0, 1.2, 1.19, 0.7, 0.4]),
        ("at", [1e-2, 1e-4, 1e-6, 1e-9]),
    ):
        found = [at(**{name: value}) for value in values]
        assert all(low < high for low, high in itertools.pairwise(found)), (name, found)


def test_every_single_step_costs_something():
    values = [epsilon([SampledGaussian(0.05, 2.0, steps)], delta=1e-5) for steps in range(1, 60)]
    assert all(low < high for low, high in itertools.pairwise(values))


def test_limits():
    assert epsilon([], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(0.1, 1.0, 0), Gaussian(1.0, 0)], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(0.1, 0.0, 1)], delta=1e-5) == math.inf
    assert epsilon([Gaussian(0.0)], delta=1e-5) == math.inf
    assert epsilon([SampledGaussian(0.1, 0.0, 0)], delta=1e-5) == 0.0
    assert epsilon([Gaussian(1e9)], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(1e-6, 0.02, 1)], delta=1e-5) == 0.0
    assert delta([Gaussian(0.0)], epsilon=3.0) == 1.0
    assert delta([], epsilon=3.0) == 0.0
    assert delta([Gaussian(1.0)], epsilon=math.inf) == 0.0
    assert 0 < delta([SampledGaussian(0.1, 0.3, 100)], epsilon=0.0) <= 1.0


@pytest.mark.parametrize("accountant", list(Accountant))
def test_full_batches_are_unsampled_gaussians(accountant):
    sampled = epsilon([SampledGaussian(1.0, 5.0, 40)], delta=1e-5, accountant=accountant)
    assert sampled == epsilon([Gaussian(5.0, 40)], delta=1e-5, accountant=accountant)
    assert sampled == pytest.approx(
        epsilon([Gaussian(5.0 / math.sqrt(40))], delta=1e-5, accountant=accountant), rel=1e-9
    )


def test_gaussian_is_the_classical_closed_form():
    assert epsilon([Gaussian(1.0)], delta=1e-5) == pytest.approx(4.3771, abs=1e-3)
    assert delta([Gaussian(1.0)], epsilon=epsilon([Gaussian(1.0)], delta=1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_order_and_splitting_give_the_same_bits():
    whole = [Gaussian(7.0), SampledGaussian(0.03, 1.3, 200), SampledGaussian(0.1, 4.0, 10), Gaussian(9.0, 2)]
    split = [
        SampledGaussian(0.1, 4.0, 4),
        Gaussian(9.0),
        SampledGaussian(0.03, 1.3, 150),
        Gaussian(9.0),
        SampledGaussian(0.1, 4.0, 6),
        Gaussian(7.0),
        SampledGaussian(0.03, 1.3, 50),
    ]
    assert epsilon(whole, delta=1e-5) == epsilon(split, delta=1e-5)


def test_adding_queries_costs():
    steps = SampledGaussian(0.03, 1.3, 500)
    alone = epsilon([steps], delta=1e-5)
    both = epsilon([steps, Gaussian(6.0)], delta=1e-5)
    assert alone < both < alone + epsilon([Gaussian(6.0)], delta=1e-5)


def test_selection_takes_from_delta():
    steps = SampledGaussian(0.03, 1.3, 500)
    assert epsilon([steps, Selection(4e-6)], delta=1e-5) == epsilon([steps], delta=1e-5 - 4e-6)
    assert epsilon([Selection(4e-6)], delta=1e-5) == 0.0
    assert epsilon([Selection(4e-6), Selection(7e-6)], delta=1e-5) == math.inf
    assert delta([Selection(4e-6)], epsilon=1.0) == 4e-6
    replaced = epsilon([steps, Selection(4e-6)], delta=1e-5, relation=Relation.REPLACE_ONE)
    assert replaced == epsilon([steps], delta=1e-5 - 8e-6, relation=Relation.REPLACE_ONE)


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_replace_one_doubles_the_sensitivity(sigma):
    replaced = epsilon([Gaussian(sigma)], delta=1e-5, relation=Relation.REPLACE_ONE)
    assert replaced == pytest.approx(epsilon([Gaussian(sigma / 2)], delta=1e-5), rel=1e-9)
    sampled = [SampledGaussian(0.05, sigma, 300)]
    assert epsilon(sampled, delta=1e-5, relation=Relation.REPLACE_ONE) > epsilon(sampled, delta=1e-5)


def test_refusals_name_value_rule_and_remedy():
    steps = [SampledGaussian(0.1, 1.0, 10)]
    for wrong in (0.0, 1.0, -1e-9, 5.0, math.nan):
        with pytest.raises(ConfigError, match=r"delta=.*above 0 and below 1.*default"):
            epsilon(steps, delta=wrong)
    with pytest.raises(ConfigError, match=r"10000000 steps.*resolve.*larger delta"):
        epsilon([SampledGaussian(1e-4, 1.0, 10_000_000)], delta=1e-13)
    with pytest.raises(ConfigError, match="epsilon=-1"):
        delta(steps, epsilon=-1.0)
    with pytest.raises(ConfigError, match="query of type str"):
        epsilon(["gaussian"], delta=1e-5)


def test_absl_is_quiet_during_a_call_and_audible_after_it(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        epsilon([SampledGaussian(1e-4, 50.0, 1)], delta=1e-5, accountant=Accountant.RDP)
        assert not caplog.records
        logging.getLogger("absl").warning("audible")
    assert [record.message for record in caplog.records] == ["audible"]
    assert logging.getLogger("absl").level == logging.NOTSET or logging.getLogger("absl").isEnabledFor(logging.WARNING)
