"""Gaussian differential privacy in closed form: for planning and for seeds, never for a reported figure.

A mechanism is mu-GDP when telling two neighbouring data sets apart is no easier than telling N(0, 1) from N(mu, 1).
S Poisson-sampled Gaussian steps tend to mu-GDP with ``mu = q sqrt(S (e^(1/sigma^2) - 1))`` (Dong, Roth & Su,
arXiv:1905.02383; Bu et al., arXiv:1911.11607). The limit under-estimates epsilon, by about 1 % at sigma = 2.5 and by
much more below sigma = 1, so everything reported goes through `discreet.privacy.accounting`.

Symbols: mu = total GDP parameter; q = sampling rate; S = steps; sigma = noise multiplier.
"""

from __future__ import annotations

import math

from scipy import optimize, special

_LARGEST_EXPONENT = 700.0
_LARGEST_MU = 1e6


def gdp_log_delta(mu: float, *, epsilon: float) -> float:
    """``log delta`` of a mu-GDP mechanism: ``delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)``.

    Source: Corollary 1, arXiv:1905.02383. Evaluated in logarithms, so that it neither overflows nor cancels to zero.
    """
    if mu == 0:
        return -math.inf
    first = float(special.log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    if second >= first:
        return -math.inf
    return first + math.log1p(-math.exp(second - first))


def gdp_epsilon(mu: float, *, delta: float) -> float:
    """Epsilon >= 0 of a mu-GDP mechanism at ``delta`` in (0, 1); the inverse of `gdp_log_delta` in epsilon."""
    target = math.log(delta)
    if mu == 0 or gdp_log_delta(mu, epsilon=0.0) <= target:
        return 0.0
    upper = mu * mu / 2 + mu * math.sqrt(-2 * target) + 1.0
    return float(optimize.brentq(lambda value: _clipped(gdp_log_delta(mu, epsilon=value)) - target, 0.0, upper))


def gdp_mu(epsilon: float, *, delta: float) -> float:
    """Largest mu whose mechanism is (epsilon, delta)-DP; the inverse of `gdp_epsilon`.

    Examples: (8, 1e-5) gives 1.666; (1, 1e-5) gives 0.268; (8, 8e-7) gives 1.520.
    """
    if math.isinf(epsilon):
        return math.inf
    target = math.log(delta)
    return float(
        optimize.brentq(
            lambda mu: _clipped(gdp_log_delta(mu, epsilon=epsilon)) - target, 1e-12, _LARGEST_MU, xtol=1e-14
        )
    )


def step_mu(sample_rate: float, *, noise_multiplier: float) -> float:
    """GDP parameter of one step in the central limit: ``q sqrt(e^(1/sigma^2) - 1)``, and never above ``1 / sigma``.

    Differs from the papers by the second bound: sampling never hurts, and at q near 1 the limit alone says it does.
    """
    if noise_multiplier == 0:
        return math.inf
    exponent = noise_multiplier**-2
    sampled = sample_rate * math.sqrt(math.expm1(exponent)) if exponent < _LARGEST_EXPONENT else math.inf
    return min(sampled, 1.0 / noise_multiplier)


def seed_noise_multiplier(sample_rate: float, *, steps: int, mu: float) -> float:
    """Noise multiplier whose limit is ``mu``: ``sigma0 = 1 / sqrt(ln(1 + mu^2 / (q^2 S)))``; see `step_mu`."""
    sampled = 1.0 / math.sqrt(math.log1p(mu * mu / (sample_rate * sample_rate * steps)))
    return min(sampled, math.sqrt(steps) / mu)


def _clipped(log_value: float) -> float:
    return max(log_value, -1e300)
