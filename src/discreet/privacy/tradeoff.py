"""What an attacker can do: the trade-off curve of a set of queries, and single numbers read off it.

An attacker sees everything that was released, knows all other examples, and tests whether one given example was in the
data. With a rate a of false alarms, the share of members found is at most

    power(a) = min over eps >= 0 of min(e^eps a + delta(eps), 1 - e^-eps (1 - delta(eps) - a)),

where delta(eps) is the privacy profile (Theorem 2.1, arXiv:1311.0776, at every epsilon; primal and dual,
arXiv:1905.02383). Each epsilon alone gives a bound, so finitely many give an upper bound; the exact profile at all of
them gives what the best attacker attains. `mu_equivalent` compares with telling N(0, 1) from N(mu, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from discreet.errors import ConfigError
from discreet.privacy.accounting import Accountant, Query, Relation, epsilon, profile
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.proposal import EXTENDED, fourier_margin, selections_per_neighbour
from discreet.privacy.summary import summarise

POINTS = 192
SMALLEST_DELTA = 1e-9
CURVE = (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""False-alarm rates of a printed curve."""

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Tradeoff:
    """Bounds on every test for one example, from a privacy profile.

    **Guarantees.** `power` is an upper bound for every attacker, as far as the deltas are upper bounds; it is concave,
    not decreasing, at least the false-alarm rate and at most 1.

    Attributes:
        epsilons: increasing, the first is 0, shape (n,).
        deltas: the profile there, not increasing, shape (n,).
    """

    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]

    def power(self, false_alarms: float) -> float:
        """Largest share of members that can be found (true-positive rate) at this rate of false alarms in [0, 1].

        Raises:
            ConfigError: the rate is outside [0, 1].
        """
        if not 0 <= false_alarms <= 1:
            raise ConfigError(f"false_alarms={false_alarms}: must be from 0 to 1; 0.001 is one in a thousand.")
        eps, deltas = np.array(self.epsilons), np.array(self.deltas)
        by_growth = np.exp(np.minimum(eps, _LARGEST_EXPONENT)) * false_alarms + deltas
        by_rest = 1 - np.exp(-eps) * (1 - deltas - false_alarms)
        return float(min(1.0, max(false_alarms, min(by_growth.min(), by_rest.min()))))

    def curve(self, rates: Sequence[float] = CURVE) -> tuple[tuple[float, float], ...]:
        """(false-alarm rate, `power`) for each rate."""
        return tuple((rate, self.power(rate)) for rate in rates)

    def advantage(self) -> float:
        """Largest difference of the two rates, which is delta(0), the total variation distance."""
        return min(1.0, self.deltas[0])

    def mu_equivalent(self, *, delta: float) -> float:
        """The smallest mu such that, down to ``delta``, no attack is easier than telling N(0, 1) from N(mu, 1).

        The largest mu that is needed at an epsilon of the profile, up to the first whose delta is below ``delta``
        (Definition 2.2, arXiv:1905.02383, cut off). Further out the losses of small batches have longer tails than a
        Gaussian, and there no mu would do.
        """
        if self.deltas[0] >= 1:
            return math.inf
        reached = sum(value >= delta for value in self.deltas) + 1
        pairs = zip(self.epsilons[:reached], self.deltas[:reached], strict=True)
        return max((gdp_mu(at, delta=value) for at, value in pairs if value > 0), default=0.0)


def tradeoff(
    queries: Sequence[Query],
    *,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> Tradeoff:
    """The trade-off curve of everything that is released.

    The profile reaches from epsilon 0 to the epsilon at which delta is `SMALLEST_DELTA` (more, where over so many steps
    floating-point numbers do not resolve it). Rates of false alarms far below that get a looser bound.

    Args:
        queries: what was, or will be, released.
        relation, accountant: as in `discreet.privacy.accounting.epsilon`.
    """
    total = summarise(queries)
    smallest = SMALLEST_DELTA + total.selection_delta * 2.5 * selections_per_neighbour(relation)
    if accountant is Accountant.PLD:
        smallest = max(smallest, 8 * fourier_margin(total, extended=EXTENDED))
    furthest = epsilon(queries, delta=smallest, relation=relation, accountant=accountant) if smallest < 1 else math.inf
    if math.isinf(furthest):
        return Tradeoff(epsilons=(0.0,), deltas=(1.0,))
    # Evenly spaced, and denser towards 0, where a private run has all of its curve.
    epsilons = sorted({furthest * (index / POINTS) ** 1.5 for index in range(POINTS + 1)})
    deltas = profile(queries, epsilons=epsilons, relation=relation, accountant=accountant)
    return Tradeoff(epsilons=tuple(epsilons), deltas=tuple(deltas))


def gaussian_power(mu: float, *, false_alarms: float) -> float:
    """Share of members found by the best test of N(0, 1) against N(mu, 1): ``Phi(Phi^-1(a) + mu)``."""
    if math.isinf(mu):
        return 1.0
    return float(special.ndtr(special.ndtri(false_alarms) + mu))


def in_words(
    curve: Tradeoff, *, rates: Sequence[float] = (0.001, 0.01), relation: Relation = Relation.ADD_REMOVE
) -> tuple[str, ...]:
    """What the curve says: one sentence for each rate of false alarms, and one on a coin toss."""
    if relation is Relation.REPLACE_ONE:
        question, told = "which of two given examples was in the data", "may name the wrong one"
    else:
        question, told = "whether a given example was in the data", "may be wrong about"
    lines = []
    for rate in rates:
        often, share = f"1 in {round(1 / rate):,}", percent(curve.power(rate))
        if relation is Relation.REPLACE_ONE:
            lines.append(f"Whoever asks {question}, and {told} {often} times, finds the right one {share} of the time.")
        else:
            lines.append(
                f"Whoever asks {question}, and {told} {often} of those that were not, finds {share} of those that were."
            )
    guess = percent(0.5 + 0.5 * curve.advantage())
    return (*lines, f"At even odds, a guess {question} is right {guess} of the time. All at most, for any attack.")


def percent(share: float) -> str:
    """Three significant digits, rounded up: a bound is not rounded in its own favour."""
    if share >= 1:
        return "100 %"
    digits = 2 - math.floor(math.log10(100 * share)) if share > 0 else 2
    scale = 10.0 ** max(0, digits)
    return f"{min(100.0, math.ceil(100 * share * scale - 1e-9) / scale):g} %"
