"""The trade-off curve: exact for a Gaussian, an upper bound for an attack that is carried out, and words that agree."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from discreet.errors import ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    SampledGaussian,
    Selection,
    delta,
    epsilon,
    profile,
)
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.tradeoff import Tradeoff, gaussian_power, in_words, percent, tradeoff

RUN = [SampledGaussian(4096 / 50_000, 3.0, 2_500)]


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_a_gaussian_has_the_power_of_neyman_and_pearson(mu):
    curve = tradeoff([Gaussian(1 / mu)])
    for rate in (1e-5, 1e-3, 0.01, 0.2, 0.5, 0.9):
        exact = float(stats.norm.sf(stats.norm.isf(rate) - mu))
        assert gaussian_power(mu, false_alarms=rate) == pytest.approx(exact, rel=1e-12)
        assert exact <= curve.power(rate) <= exact * 1.003
    assert curve.advantage() == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, rel=1e-6)
    assert curve.mu_equivalent(delta=1e-6) == pytest.approx(mu, rel=1e-4)


@pytest.mark.parametrize(("rate", "sigma"), [(0.3, 0.8), (0.05, 0.5)])
def test_an_optimal_attack_on_one_step_is_on_the_curve(rate, sigma):
    """The likelihood-ratio test of one sampled step in closed form: never above the curve, and nearly on it."""
    curve = tradeoff([SampledGaussian(rate, sigma, 1)])
    for alarms in (1e-4, 1e-3, 0.01, 0.1, 0.4):
        cut = stats.norm.isf(alarms, scale=sigma)
        members = (1 - rate) * alarms + rate * stats.norm.sf(cut, loc=1, scale=sigma)
        assert members - 1e-9 <= curve.power(alarms) <= members * 1.02 + 1e-6


def test_an_attack_that_is_carried_out_stays_below():
    """100,000 runs of 40 steps, attacked by the sum of their losses; the smallest room is six standard errors."""
    rate, sigma, steps, runs = 0.1, 1.0, 40, 100_000
    generator = np.random.default_rng(11)

    def score(member):
        noise = generator.normal(0, sigma, (runs, steps))
        seen = noise + (generator.random((runs, steps)) < rate) if member else noise
        return np.log1p(rate * np.expm1((2 * seen - 1) / (2 * sigma**2))).sum(axis=1)

    others, members = np.sort(score(False)), score(True)
    curve = tradeoff([SampledGaussian(rate, sigma, steps)])
    for alarms in (0.001, 0.01, 0.1):
        cut = others[int((1 - alarms) * runs)]
        found = float((members > cut).mean())
        error = math.sqrt(found * (1 - found) / runs) + 3 * math.sqrt(alarms / runs)
        assert 0.85 * curve.power(alarms) - 6 * error < found < curve.power(alarms) + 6 * error
        assert found > tradeoff([SampledGaussian(rate, 1.5 * sigma, steps)]).power(alarms)  # less is claimed: refuted


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("accountant", list(Accountant))
def test_shape(relation, accountant):
    curve = tradeoff(RUN, relation=relation, accountant=accountant)
    rates = np.linspace(0, 1, 401)
    powers = np.array([curve.power(rate) for rate in rates])
    assert np.all(np.diff(powers) >= 0)
    assert np.all(powers >= rates)
    assert np.all(np.diff(powers, 2) <= 1e-12)  # concave
    assert powers[-1] == 1.0
    assert max(powers - rates) <= curve.advantage() + 1e-12
    assert len(curve.curve()) == 11


def test_bounds_are_ordered():
    """Renyi above PLD, replacing above adding, more steps above fewer; and the certificate's epsilon above them all."""
    by_pld = tradeoff(RUN)
    spent = epsilon(RUN, delta=1e-5)
    for rate in (1e-4, 0.01, 0.3):
        assert by_pld.power(rate) <= tradeoff(RUN, accountant=Accountant.RDP).power(rate)
        assert by_pld.power(rate) <= tradeoff(RUN, relation=Relation.REPLACE_ONE).power(rate)
        assert by_pld.power(rate) <= tradeoff([SampledGaussian(4096 / 50_000, 3.0, 2_600)]).power(rate)
        assert by_pld.power(rate) <= min(1, math.exp(spent) * rate + 1e-5) + 1e-9
    assert by_pld.mu_equivalent(delta=1e-5) >= gdp_mu(spent, delta=1e-5) * (1 - 1e-3)
    assert by_pld.mu_equivalent(delta=1e-5) == pytest.approx(gdp_mu(spent, delta=1e-5), rel=0.02)


def test_equal_epsilon_is_not_equal_attack():
    """Same (epsilon, delta) below and above the wall: the small batch leaks less to a test with many false alarms."""
    small = [SampledGaussian(5e-4, 0.45, 18_000)]
    target = epsilon(small, delta=1e-6)
    large = [Gaussian(1 / gdp_mu(target, delta=1e-6))]
    assert epsilon(large, delta=1e-6) == pytest.approx(target, rel=1e-4)
    assert tradeoff(small).power(0.01) < 0.8 * tradeoff(large).power(0.01)
    assert tradeoff(small).mu_equivalent(delta=1e-6) >= gdp_mu(target, delta=1e-6) * (1 - 1e-3)


def test_profile_is_delta_at_many_epsilons():
    epsilons = [3.0, 0.0, 8.0, 0.5]
    found = profile(RUN, epsilons=epsilons)
    assert found == tuple(delta(RUN, epsilon=value) for value in epsilons)
    assert all(low >= high for low, high in itertools.pairwise(profile(RUN, epsilons=sorted(epsilons))))


def test_limits():
    nothing = tradeoff([])
    assert nothing.power(0.3) == pytest.approx(0.3, abs=1e-8)
    assert nothing.mu_equivalent(delta=1e-5) == pytest.approx(0.0, abs=1e-6)
    everything = tradeoff([Gaussian(0.0)])
    assert everything.power(0.0) == everything.advantage() == 1.0
    assert everything.mu_equivalent(delta=1e-5) == math.inf
    assert gaussian_power(math.inf, false_alarms=0.0) == 1.0
    named = tradeoff([Selection(1e-3), Gaussian(5.0)])
    assert named.power(0.0) >= 1e-3
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="false_alarms"):
            nothing.power(wrong)


def test_words_hold_the_numbers_rounded_up():
    curve = Tradeoff(epsilons=(0.0, 1.0), deltas=(0.2, 0.01234))
    words = in_words(curve)
    assert len(words) == 3
    assert percent(curve.power(0.001)) in words[0]
    assert "1 in 1,000" in words[0]
    assert "60 %" in words[-1]
    assert "which of two" in in_words(curve, relation=Relation.REPLACE_ONE)[0]
    assert [percent(share) for share in (0.0, 0.0123456, 0.5, 0.99999, 1.0)] == [
        "0 %",
        "1.24 %",
        "50 %",
        "100 %",
        "100 %",
    ]
