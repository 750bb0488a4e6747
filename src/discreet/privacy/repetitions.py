"""How often a search repeats its training run: a random number of times, so that releasing the best run alone is
cheap.

A search that makes a *fixed* number k of runs, and releases the best, can cost k times the privacy of one run. If the
number of runs K is itself drawn, from one of the distributions here and independently of the data, the whole search
costs little more than one run (Papernot & Steinke, arXiv:2110.03620): logarithmic stopping about 1.7 times its epsilon
for 10 expected runs, and 2 times for 100. `discreet.privacy.accounting` composes it, see `Repeated` there.

Symbols: K = number of runs; m = its mean; eta = shape; gamma = stopping parameter.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from discreet.errors import ConfigError

MOST_RUNS = 10_000
"""Largest mean. The quantiles of a logarithmic K of this mean reach into the hundred thousands."""

_LAST_QUANTILE = 1 - 2.0**-53


class Stopping(enum.Enum):
    """Distribution of K, from the cheapest in privacy, and the most spread, to the dearest and most even."""

    LOGARITHMIC = "logarithmic"
    GEOMETRIC = "geometric"
    POISSON = "poisson"


SHAPES = {Stopping.LOGARITHMIC: 0.0, Stopping.GEOMETRIC: 1.0, Stopping.POISSON: math.inf}
"""eta: truncated negative binomial distributions of shape 0 and 1, and the limit without truncation."""


@dataclass(frozen=True)
class Repetitions:
    """The distribution of the number of runs K.

    - logarithmic: ``P[K = k] = (1 - gamma)^k / (k ln(1 / gamma))``, k = 1, 2, ...
    - geometric: ``P[K = k] = gamma (1 - gamma)^(k - 1)``, k = 1, 2, ...
    - poisson: ``P[K = k] = e^-m m^k / k!``, k = 0, 1, ...: with probability e^-m nothing is trained or released.

    (Definition 1 and section 3.3, arXiv:2110.03620.)

    Attributes:
        stopping: which of them.
        mean: m, the expected number of runs, from 1 to `MOST_RUNS`.
    """

    stopping: Stopping
    mean: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", float(self.mean))
        if not 1 <= self.mean <= MOST_RUNS:
            raise ConfigError(f"runs={self.mean:g}: the expected number of runs must be from 1 to {MOST_RUNS}; try 10.")

    @property
    def shape(self) -> float:
        """eta: 0, 1 or infinity."""
        return SHAPES[self.stopping]

    @property
    def gamma(self) -> float:
        """The stopping parameter with which E[K] is the mean; 1 when K is always 1.

        Raises:
            ConfigError: a Poisson distribution has none.
        """
        if self.stopping is Stopping.POISSON:
            raise ConfigError("stopping poisson: has no gamma; use its mean, or another stopping.")
        if self.mean == 1:
            return 1.0
        if self.stopping is Stopping.GEOMETRIC:
            return 1 / self.mean

        def excess(log_gamma: float) -> float:
            return math.log(math.expm1(-log_gamma) / -log_gamma) - math.log(self.mean)

        return math.exp(optimize.brentq(excess, -40.0, -1e-300, xtol=1e-15, rtol=1e-15))

    def pmf(self, runs: np.ndarray) -> np.ndarray:
        """``P[K = k]`` for integers k >= 0, elementwise. Shape (n,) -> (n,)."""
        runs = np.asarray(runs)
        if self.stopping is Stopping.POISSON:
            return np.exp(runs * math.log(self.mean) - self.mean - special.gammaln(runs + 1))
        positive, gamma = np.maximum(runs, 1), self.gamma
        if gamma == 1:
            return (runs == 1).astype(np.float64)
        if self.stopping is Stopping.GEOMETRIC:
            probabilities = gamma * np.exp((positive - 1) * math.log1p(-gamma))
        else:
            probabilities = np.exp(positive * math.log1p(-gamma)) / (positive * -math.log(gamma))
        return np.where(runs >= 1, probabilities, 0.0)

    def runs(self, uniform: float) -> int:
        """The number of runs by inversion: the smallest k with ``P[K <= k] > uniform``.

        Draw ``uniform`` from a source that no data has touched, and never show a number of runs that failed to be best:
        the guarantee covers one released run. ``runs(0.99)`` is how long a search may take.

        Args:
            uniform: in [0, 1).
        """
        if not 0 <= uniform < 1:
            raise ConfigError(f"uniform={uniform}: must be at least 0 and below 1; draw it uniformly.")
        wanted, reached, first, block = min(uniform, _LAST_QUANTILE), 0.0, 0, 64 + 4 * math.ceil(self.mean)
        while True:
            cumulative = reached + np.cumsum(self.pmf(np.arange(first, first + block)))
            if cumulative[-1] > wanted:
                return first + int(np.searchsorted(cumulative, wanted, side="right"))
            if cumulative[-1] <= reached:  # what is left of the mass is below rounding
                return first
            reached, first = float(cumulative[-1]), first + block


def selected_renyi(orders: np.ndarray, run: np.ndarray, repetitions: Repetitions) -> np.ndarray:
    """Renyi divergences of "run K times, release the best" from those of one run.

    With e(l) the divergence of order l of one run, and m = E[K]:

    - truncated negative binomial (Theorem 2, arXiv:2110.03620):
      ``e'(l) = e(l) + ln(m) / (l - 1) + (1 + eta) min_h [(1 - 1/h) e(h) + ln(1/gamma) / h]``;
    - Poisson (Theorem 6): ``e'(l) = e(l) + ln(m) / (l - 1) + m d``, where one run is ``(ln(1 + 1/(l - 1)), d)``-DP.

    An upper bound. Divergences grow with the order, so a bound at a larger order holds at every smaller one.

    Args:
        orders: l > 1, increasing, shape (n,). run: e(l), shape (n,).

    Returns:
        e'(l), shape (n,).
    """
    growth = math.log(repetitions.mean) / (orders - 1)
    if repetitions.stopping is Stopping.POISSON:
        profile = np.array([_delta(orders, run, epsilon=math.log1p(1 / (order - 1))) for order in orders])
        total = run + growth + repetitions.mean * profile
    else:
        constant = np.min((1 - 1 / orders) * run - math.log(repetitions.gamma) / orders)
        total = run + growth + (1 + repetitions.shape) * constant
    return np.minimum.accumulate(total[::-1])[::-1]


def _delta(orders: np.ndarray, run: np.ndarray, *, epsilon: float) -> float:
    """Delta at ``epsilon`` by the conversion of Proposition 12, arXiv:2004.00010."""
    logs = (orders - 1) * (run - epsilon + np.log1p(-1 / orders)) - np.log(orders)
    return min(1.0, math.exp(min(0.0, float(np.min(logs)))))
