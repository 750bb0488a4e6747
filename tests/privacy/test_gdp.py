"""The closed forms of Gaussian differential privacy, against quadrature and published values."""

from __future__ import annotations

import math

import pytest
from scipy import integrate, stats

from discreet.privacy.gdp import gdp_epsilon, gdp_log_delta, gdp_mu, seed_noise_multiplier, step_mu


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 6.0])
def test_corollary_1_of_1905_02383_is_the_hockey_stick_divergence(mu, epsilon):
    def excess(x):
        return max(0.0, stats.norm.pdf(x, loc=mu) - math.exp(epsilon) * stats.norm.pdf(x))

    threshold = epsilon / mu + mu / 2
    delta, _ = integrate.quad(excess, threshold, threshold + 40, epsabs=1e-300, epsrel=1e-10)
    if delta > 1e-200:
        assert math.exp(gdp_log_delta(mu, epsilon=epsilon)) == pytest.approx(delta, rel=1e-7)


@pytest.mark.parametrize(("epsilon", "delta", "mu"), [(8, 1e-5, 1.666), (1, 1e-5, 0.268), (8, 8e-7, 1.520)])
def test_mu_of_published_budgets(epsilon, delta, mu):
    assert gdp_mu(epsilon, delta=delta) == pytest.approx(mu, abs=5e-4)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
def test_mu_and_epsilon_are_inverse(epsilon, delta):
    assert gdp_epsilon(gdp_mu(epsilon, delta=delta), delta=delta) == pytest.approx(epsilon, rel=1e-6)


def test_limits_of_mu():
    assert gdp_mu(math.inf, delta=1e-5) == math.inf
    assert gdp_epsilon(0.0, delta=1e-5) == 0.0
    assert gdp_log_delta(0.0, epsilon=1.0) == -math.inf
    assert step_mu(0.1, noise_multiplier=0.0) == math.inf


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.9, 1.0])
def test_sampling_never_raises_mu_above_the_unsampled_one(rate, sigma):
    assert 0 < step_mu(rate, noise_multiplier=sigma) <= 1 / sigma


@pytest.mark.parametrize("mu", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("rate", [1e-4, 0.03, 0.5])
def test_seed_inverts_the_limit(rate, mu):
    sigma = seed_noise_multiplier(rate, steps=700, mu=mu)
    assert math.sqrt(700) * step_mu(rate, noise_multiplier=sigma) == pytest.approx(mu, rel=1e-9)
