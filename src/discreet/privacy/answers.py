"""Which number was left out? The largest number of steps, or the largest batch, that a budget allows.

Noise is solved by `discreet.privacy.accounting.solve_step_noise`, delta is `discreet.privacy.accounting.delta`; the two
here are whole numbers. All four end on a value that the referee has seen, and that is not above the target.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import (
    LARGEST_EPSILON,
    SMALLEST_EPSILON,
    Accountant,
    Query,
    Relation,
    SampledGaussian,
    TruncatedGaussian,
)
from discreet.privacy.accounting import (
    epsilon as compose_epsilon,
)
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.proposal import most_countable_steps, proposed_epsilon, selections_per_neighbour, sensitivity
from discreet.privacy.queries import SMALLEST_NOISE, Selection
from discreet.privacy.search import Largest, largest_within
from discreet.privacy.summary import summarise

MOST_STEPS = 10_000_000
"""No search looks at more steps."""

Step = SampledGaussian | TruncatedGaussian


@dataclass(frozen=True)
class Budget:
    """What may be spent, and how it is counted.

    Attributes:
        epsilon: target, from 1e-6 to 1e6. delta: in (0, 1).
        before: queries already decided on the same data.
        relation: what neighbouring data sets are. accountant: how to compose.
    """

    epsilon: float
    delta: float
    before: tuple[Query, ...] = ()
    relation: Relation = Relation.ADD_REMOVE
    accountant: Accountant = Accountant.PLD

    def __post_init__(self) -> None:
        if not SMALLEST_EPSILON <= self.epsilon <= LARGEST_EPSILON:
            raise ConfigError(
                f"epsilon={self.epsilon}: must be from {SMALLEST_EPSILON:g} to {LARGEST_EPSILON:g} to solve for; "
                "the usual range is 1 to 8."
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta={self.delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")

    def spent(self, *steps: Step) -> float:
        """Epsilon of ``before`` and these steps."""
        return compose_epsilon(
            [*self.before, *steps], delta=self.delta, relation=self.relation, accountant=self.accountant
        )

    def left(self) -> float:
        """Delta that remains for noise."""
        selections = math.fsum(query.delta for query in self.before if isinstance(query, Selection))
        return self.delta - selections * selections_per_neighbour(self.relation)


def most_steps(step: Step, budget: Budget) -> Largest:
    """The largest number of steps like this one that the budget allows, at most `MOST_STEPS`.

    By pld also at most what floating-point numbers resolve at this delta: the margin for rounding grows with the steps.

    **Guarantees.** The value is not above the target. It is at least 0.999 of it, or one step more was seen to be
    above, or ``at_limit`` is set.

    Args:
        step: its count is not looked at. Its noise multiplier is above 0.

    Raises:
        BudgetExceeded: one step, or what came before, is above the target.
    """
    limit = MOST_STEPS
    if budget.accountant is Accountant.PLD and budget.left() > 0:
        limit = max(1, min(limit, most_countable_steps(budget.left())))
    return _largest(lambda count: dataclasses.replace(step, count=count), budget, limit=limit, what="step")


def largest_batch(step: Step, budget: Budget, *, examples: int) -> Largest:
    """The largest expected batch size that the budget allows for these steps, from 1 to ``examples``.

    **Guarantees.** As for `most_steps`.

    Args:
        step: its sample rate is not looked at.
        examples: N.

    Raises:
        BudgetExceeded: a batch of one, or what came before, is above the target.
        ConfigError: ``examples`` is below 1.
    """
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise ConfigError(f"examples={examples!r}: must be an integer of at least 1; pass the number of examples.")
    return _largest(
        lambda batch: dataclasses.replace(step, sample_rate=batch / examples), budget, limit=examples, what="example"
    )


def _largest(make: Callable[[int], Step], budget: Budget, *, limit: int, what: str) -> Largest:
    already = budget.spent()
    if already >= budget.epsilon:
        raise BudgetExceeded(
            f"epsilon={budget.epsilon}: the queries before already spend {already:.6g} at delta={budget.delta}; "
            "raise epsilon."
        )
    if make(1).noise_multiplier < SMALLEST_NOISE:
        raise BudgetExceeded(
            f"noise_multiplier={make(1).noise_multiplier}: counts as no noise below {SMALLEST_NOISE}; "
            "pass a larger noise multiplier."
        )
    guess = _guess(make, budget, limit=limit)
    found = largest_within(lambda n: budget.spent(make(n)), target=budget.epsilon, guess=guess, limit=limit)
    if found is None:
        raise BudgetExceeded(
            f"epsilon={budget.epsilon}: one {what} already spends {budget.spent(make(1)):.6g}; "
            "raise epsilon or the noise multiplier."
        )
    return found


def _guess(make: Callable[[int], Step], budget: Budget, *, limit: int) -> int:
    """By the GDP limit, and from there, for pld, along the fast composition."""
    earlier = summarise(budget.before)
    mu = gdp_mu(budget.epsilon, delta=budget.left()) / sensitivity(budget.relation)
    wanted = max(mu * mu - earlier.limit_mu**2, 1e-3 * mu * mu)

    def spread(n: int) -> float:
        return summarise([make(n)]).limit_mu ** 2

    rough = largest_within(spread, target=wanted, guess=1 + round(wanted / max(spread(1), 1e-300)), limit=limit)
    start = 1 if rough is None else rough.n
    if budget.accountant is not Accountant.PLD:
        return start

    @functools.cache
    def proposed(n: int) -> float:
        total = summarise([*budget.before, make(n)])
        return proposed_epsilon(total, budget.left(), budget.relation) if total.steps else budget.spent(make(n))

    close = largest_within(proposed, target=budget.epsilon, guess=start, limit=limit, window=0.9999)
    return 1 if close is None else close.n
