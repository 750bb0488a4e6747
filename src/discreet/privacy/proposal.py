"""What is known before the referee is asked: the grid, the rounding to expect, and a close guess of what it will say.

`discreet.privacy.referee` composes with dp_accounting on the grid chosen here, and gives up a margin of delta for
rounding that is computed here. `FastModel` is the same composition by `discreet.privacy.losses`; searches walk along it
and ask the referee once, at the end.

Symbols: q = sample rate; sigma = noise multiplier; n = number of steps; h = grid; mu = GDP parameter.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from discreet.errors import ConfigError
from discreet.privacy.gdp import gdp_epsilon, gdp_mu, seed_noise_multiplier
from discreet.privacy.losses import Direction, Part, Steps, composed_epsilon, loss_range
from discreet.privacy.queries import LARGEST_NOISE, SMALLEST_NOISE, Relation, SampledGaussian, TruncatedGaussian
from discreet.privacy.search import solve_decreasing
from discreet.privacy.summary import Summary, summarise

EXTENDED = float(np.finfo(np.longdouble).eps) == 2.0**-63
"""Whether this machine has 80-bit numbers: x86 has; ARM has none, or wider ones in software, which are too slow."""

SMALL_MARGIN = 0.002
"""Where the margin is a larger share of delta than this, the composition is done in 80 bits."""


def fourier_margin(total: Summary, *, extended: bool = False) -> float:
    """Bound on the error in delta of the n-fold Fourier power: ``1.25 n u``, plus 1e-14 for the other roundings.

    dp_accounting raises a spectrum to the n-th power, which multiplies its relative rounding error by n. Against 80-bit
    arithmetic the error of float64 (u = 2^-52) was at most 0.63 n u over 260 points (n from 100 to 10^6, sigma from 0.4
    to 50). In 80 bits u = 2^-63.
    """
    return 1.25 * step_count(total) * (2.0**-63 if extended else 2.0**-52) + 1e-14


def rounding_margin(total: Summary, left: float) -> tuple[float, bool]:
    """What rounding may take of ``left``, the delta that remains for the noise; and whether to compose in 80 bits.

    Raises:
        ConfigError: it is more than half of delta.
    """
    extended = EXTENDED and fourier_margin(total) > SMALL_MARGIN * left
    margin = fourier_margin(total, extended=extended)
    if total.steps and margin > left / 2:
        raise ConfigError(
            f"delta={left:.3g} over {step_count(total)} steps: below {2 * margin:.1e}, what floating-point numbers "
            "resolve; use a larger delta, fewer steps, or the rdp accountant."
        )
    return margin, extended


def step_count(total: Summary) -> int:
    """n, over all queries on random batches."""
    return sum(query.count for query in total.steps)


_GRID_OVER_SPREAD = 0.03
_LARGEST_GRID = 2.0**-8
_SMALLEST_GRID = 1e-12
_STEP_POINTS = 2**15
_TOTAL_POINTS = 2**20
_TAIL = 10.0


def loss_grid(total: Summary, relation: Relation) -> float:
    """Spacing h of the loss grid. Any h gives an upper bound; this one costs little and is close to tight.

    Rounding adds at most ``n h^2 / 6`` to the variance ``mu^2`` of the composed loss, so ``h = 0.03 mu / sqrt(n)``
    widens epsilon by about 1e-4 relatively. It is coarsened where one step would need more than 2^15 points, or the
    total 2^20.
    """
    count = step_count(total) + (total.gaussian_mu > 0)
    distance = sensitivity(relation)
    direction = Direction.REPLACE if relation is Relation.REPLACE_ONE else Direction.REMOVE
    fine = min(_GRID_OVER_SPREAD * distance * total.limit_mu / math.sqrt(count), _LARGEST_GRID)
    widest, variance = 2 * _TAIL * distance * total.gaussian_mu, (distance * total.gaussian_mu) ** 2
    for query in total.steps:
        for part in step_parts(query, direction):
            low, high = loss_range(part)
            widest = max(widest, high - low)
        inverse = 1 / query.noise_multiplier  # whose powers vanish where those of a huge sigma would overflow
        variance += query.count * query.sample_rate * distance**2 * (inverse**4 / 4 + inverse**2)
    spread = 17 * math.sqrt(variance)
    return max(fine, widest / _STEP_POINTS, spread / _TOTAL_POINTS, _SMALLEST_GRID)


UNLIKELY_CUT = 1e-250
"""A cut that is less likely than this, and than float64 can handle, is left out: the margin of 1e-14 is far larger."""


def step_parts(query: SampledGaussian | TruncatedGaussian, direction: Direction) -> tuple[Part, ...]:
    """The pairs of distributions that one step is a mixture of; a cut batch is a replacement at twice the distance."""
    whole = Part(1.0, query.sample_rate, query.noise_multiplier, direction)
    if isinstance(query, SampledGaussian) or query.cut_probability < UNLIKELY_CUT:
        return (whole,)
    cut = Part(query.cut_probability, query.cut_rate, query.noise_multiplier / 2, Direction.REPLACE)
    return (dataclasses.replace(whole, weight=1 - query.cut_probability), cut)


def proposed_epsilon(total: Summary, left: float, relation: Relation) -> float:
    """The pld epsilon to about 1e-6, by `discreet.privacy.losses`. Takes "remove" for add/remove: it costs more."""
    extended = EXTENDED and fourier_margin(total) > SMALL_MARGIN * left
    direction = Direction.REPLACE if relation is Relation.REPLACE_ONE else Direction.REMOVE
    steps = [Steps(step_parts(query, direction), query.count) for query in total.steps]
    if total.gaussian_mu > 0:
        steps.append(Steps((Part(1.0, 1.0, 1.0 / total.gaussian_mu, direction),), 1))
    budget = max(left / 2, left - fourier_margin(total, extended=extended))
    return composed_epsilon(steps, delta=budget, grid=loss_grid(total, relation))


@dataclass(frozen=True)
class FastModel:
    """Epsilon of some steps after earlier queries as a function of sigma, and back, at a small part of the cost.

    Attributes:
        step: the steps, of any noise multiplier.
        earlier: what was released before. left: delta that remains for the noise. relation: what neighbours are.
        fast: by the fast composition (for the pld accountant); else, and without sampling, in the GDP limit.
    """

    step: SampledGaussian | TruncatedGaussian
    earlier: Summary
    left: float
    relation: Relation
    fast: bool

    def epsilon(self, noise_multiplier: float) -> float:
        """What the steps and the earlier queries would spend."""
        return self._close(noise_multiplier) if self.fast else self._limit(noise_multiplier)

    def noise_multiplier(self, epsilon: float) -> float:
        """The sigma that `epsilon` gives this value."""
        if not self.fast:
            return self._inverse_limit(epsilon)
        root = solve_decreasing(
            self._close,
            target=epsilon,
            guess=self._inverse_limit,
            guess_value=self._limit,
            window=_MODEL_WINDOW,
            smallest=SMALLEST_NOISE,
            largest=LARGEST_NOISE,
        )
        return self._inverse_limit(epsilon) if root is None else root.x

    def _close(self, noise_multiplier: float) -> float:
        total = merged(self.earlier, dataclasses.replace(self.step, noise_multiplier=noise_multiplier))
        if total.noiseless:
            return math.inf
        if not total.steps or noise_multiplier > _LARGEST_FAST:
            return self._limit(noise_multiplier)
        return proposed_epsilon(total, self.left, self.relation)

    def _limit(self, noise_multiplier: float) -> float:
        total = merged(self.earlier, dataclasses.replace(self.step, noise_multiplier=noise_multiplier))
        if total.noiseless:
            return math.inf
        return gdp_epsilon(total.limit_mu * sensitivity(self.relation), delta=self.left)

    def _inverse_limit(self, epsilon: float) -> float:
        mu = gdp_mu(epsilon, delta=self.left) / sensitivity(self.relation)
        rest = math.sqrt(max(mu * mu - self.earlier.limit_mu**2, 1e-3 * mu * mu))
        return seed_noise_multiplier(self.step.sample_rate, steps=self.step.count, mu=rest)


_LARGEST_FAST = 1e9
"""Above it one step's losses are less than any grid tells apart, and the limit is exact to more digits than that."""
_MODEL_WINDOW = 0.99999
"""The model's own search ends this close to its target."""


def merged(total: Summary, step: SampledGaussian | TruncatedGaussian) -> Summary:
    """A summary with some more steps in it."""
    more = summarise([step])
    return dataclasses.replace(
        total,
        sampled=(*total.sampled, *more.sampled),
        truncated=(*total.truncated, *more.truncated),
        gaussian_mu=math.hypot(total.gaussian_mu, more.gaussian_mu),
        noiseless=total.noiseless or more.noiseless,
    )


def sensitivity(relation: Relation) -> float:
    """How far apart the sums of two neighbours can be, in clip bounds."""
    return 2.0 if relation is Relation.REPLACE_ONE else 1.0


def selections_per_neighbour(relation: Relation) -> int:
    """A replacement is one removal and one addition, so a threshold on names can fail twice."""
    return 2 if relation is Relation.REPLACE_ONE else 1


def most_countable_steps(delta: float) -> int:
    """The number of steps whose margin for rounding takes a quarter of delta. 0 where there is none."""
    return max(0, math.floor((delta / 4 - 1e-14) / (1.25 * (2.0**-63 if EXTENDED else 2.0**-52))))
