"""Renyi divergences that dp_accounting does not have: replace-one under Poisson sampling, and truncated batches.

For ``P = (1 - q) N(0, s^2) + q N(1, s^2)`` and ``Q = (1 - q) N(0, s^2) + q N(-1, s^2)``, the pair of opposite gradients
of full length (see `discreet.privacy.losses`), the divergence of order a is

    D_a = ln(integral of P^a Q^(1 - a)) / (a - 1),

taken by the trapezoidal rule, whose error falls exponentially for an integrand that is analytic in a strip.

Symbols: q = rate; s = sigma; a = order; h = spacing of the rule.
"""

from __future__ import annotations

import functools
import math

import numpy as np

_REACH = 13.0
_ROUNDING = 1e-13


@functools.lru_cache(maxsize=64)
def replace_one_renyi(rate: float, sigma: float, orders: tuple[float, ...]) -> np.ndarray:
    """Divergences of one step under replace-one. At q = 1: ``a (2 / s)^2 / 2``. An upper bound: rounding is added.

    Args:
        rate: q in (0, 1]. sigma: s > 0. orders: a > 1, shape (n,).

    Returns:
        D_a, shape (n,).
    """
    if rate == 1:
        return np.array([2 * order / sigma**2 for order in orders])
    return np.array([_divergence(rate, sigma, order) for order in orders])


def mixed_renyi(orders: np.ndarray, divergences: tuple[np.ndarray, ...], weights: tuple[float, ...]) -> np.ndarray:
    """Divergences of a mechanism that is one of several at random, when it is known which one it was.

    ``D = ln(sum_i w_i e^((a - 1) D_i)) / (a - 1)``, which is exact then, and an upper bound when it is not known.
    """
    exponents = [np.log(w) + (orders - 1) * d for w, d in zip(weights, divergences, strict=True) if w > 0]
    return np.logaddexp.reduce(exponents) / (orders - 1)


def _divergence(rate: float, sigma: float, order: float) -> float:
    spacing = _spacing(sigma, order)
    # The integrand has its mass at 0, at a, where P is its component at 1 and Q that at 0, or at 2 a - 1, where q is
    # close to 1 and Q is its component at -1.
    low, high = -1 - _REACH * sigma, 2 * order + _REACH * sigma
    x = np.arange(math.floor(low / spacing), math.ceil(high / spacing) + 1) * spacing
    noise = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    near, far = math.log1p(-rate), math.log(rate)
    upper = np.logaddexp(near, far + (x - 0.5) / sigma**2)
    lower = np.logaddexp(near, far + (-x - 0.5) / sigma**2)
    exponents = noise + order * upper + (1 - order) * lower
    top = float(exponents.max())
    total = top + math.log(float(np.exp(exponents - top).sum()) * spacing)
    return (max(0.0, total) * (1 + _ROUNDING) + _ROUNDING) / (order - 1)


def _spacing(sigma: float, order: float) -> float:
    """h with an error of the rule below e^-40 relatively.

    At height ``t s^2`` above the axis the integrand is at most ``e^(A t^2)`` times as large, with
    ``A = (a - 1) / 8 + s^2 / 2``: a Gaussian grows by ``e^(t^2 s^2 / 2)``, and Q falls by ``cos(t / 2)`` at most. The
    rule's error is ``e^(-2 pi t s^2 / h)`` times that; t is chosen best, and at most 2.
    """
    growth = (order - 1) / 8 + sigma**2 / 2
    if growth >= 10:
        return 2 * math.pi * sigma**2 / math.sqrt(4 * 45 * growth)
    return 4 * math.pi * sigma**2 / (45 + 5 * growth)
