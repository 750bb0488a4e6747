"""The planner: batch and steps from (examples, epsilon, delta) alone, by closed forms. Numbers only; no example is
read.

Derivation (TAN, arXiv:2210.03403, with its Eq. 4 replaced by the GDP limit, which is 10-30 % tighter). At fixed
(epsilon, delta), let mu be the GDP parameter that they allow. The noise that reaches the parameters per step is
``nu = sigma / B`` (clip bounds per example). Over S steps it is at least the full-batch value

    nu_min = sqrt(S) / (N mu),        nu = r nu_min,        r(sigma) = sigma sqrt(e^(1/sigma^2) - 1),

so r >= 1 is the price of sampling small batches ("privacy wall"). Fixing r fixes sigma, and with
``mu = q sqrt(S (e^(1/sigma^2) - 1))`` the batch:

    B*(r) = kappa(r) N mu / sqrt(S),  kappa = 1 / sqrt(e^(1/sigma^2) - 1) = sigma / r.

At r = 1.05 (sigma 2.28, kappa 2.17) this is 31.5k for ImageNet at (8, 8e-7) and 18k steps, 15.8k at 72k steps, and
3.6k for CIFAR-10 at (8, 1e-5) and 2,500 steps: the mega-batches that the literature found by search. A larger batch
buys at most 5 % less noise. The cumulative noise at learning rate ~ 1/S is independent of S, so S is the smallest
number of steps on the plateau of the loss, and the cost, ``S B* = kappa N mu sqrt(S)`` examples, grows like sqrt(S).

Where a bound on compute, ``S (B + h) <= M`` with h the fixed cost of a step, keeps a run from the knee, batch and steps
must share it. Fewer steps then allow larger batches, which lowers r, until the optimizer has too few of them: see
`balance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy import optimize

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Accountant, Gaussian, Query, Relation, SampledGaussian, Selection
from discreet.privacy.compute import Bound
from discreet.privacy.gdp import gdp_mu, seed_noise_multiplier, step_mu
from discreet.privacy.plan import DEFAULT_CLIPPING, Plan, default_delta

KNEE_OVERHEAD = 1.05
"""r at which a default plan sits: 5 % more noise than full batches would need."""

FEWEST_STEPS = 400
MOST_STEPS = 1_000
STEPS_PER_ROOT_EXAMPLE = 6.0
"""Default S = 6 sqrt(N), between 400 (where the loss of scikit-learn's digits stops falling) and 1,000."""

SMALLEST_BATCH = 256
"""Below this a larger batch costs next to nothing and lowers the noise; never above N."""

MOST_EPOCHS = 60
"""Default plans process at most 60 N examples ..."""

MOST_SAMPLES = 20_000_000
"""... and at most twenty million, so that a small model finishes on a CPU ..."""

FREE_SAMPLES = 200_000
"""... but these always, since they take seconds. A `Bound` replaces all three."""

HALF_STEPS = 300.0
"""With so many steps, their small number costs as much as all the noise: see `score`. Fitted (docs/lab-notes.md) on
grids over S at fixed S B, of six data sets: with 100, which was chosen on four, the other two lost up to 4 points."""

FEWEST_BOUND_STEPS = 10
FEWEST_BOUND_BATCH = 8
"""A bound that does not allow so many steps of such a batch allows no training worth its name."""

_GRID = 60

REFERENCE_EPSILON = 8.0
"""A run without noise (epsilon = inf) gets the batch and the steps that this epsilon would get."""


def wall_overhead(noise_multiplier: float) -> float:
    """``r(sigma) = sigma sqrt(e^(1/sigma^2) - 1)``: noise relative to full batches at the same budget."""
    return noise_multiplier * math.sqrt(math.expm1(noise_multiplier**-2))


def knee_noise_multiplier(overhead: float) -> float:
    """The sigma with ``r(sigma) = overhead``; 1.05 gives 2.28, 1.5 gives 0.83.

    Raises:
        ConfigError: overhead is not in (1, 100].
    """
    if not 1 < overhead <= 100:
        raise ConfigError(f"overhead={overhead}: must be above 1 and at most 100; the default is {KNEE_OVERHEAD}.")
    return float(optimize.brentq(lambda sigma: math.log(wall_overhead(sigma) / overhead), 0.2, 1e4))


def knee_batch(*, examples: int, mu: float, steps: int, overhead: float = KNEE_OVERHEAD) -> float:
    """``B*(r) = kappa(r) N mu / sqrt(S)``, unrounded and uncapped.

    Args:
        examples: N. mu: GDP parameter left for training, see `discreet.privacy.gdp.gdp_mu`. steps: S.
        overhead: r.
    """
    return knee_noise_multiplier(overhead) / overhead * examples * mu / math.sqrt(steps)


def default_steps(examples: int) -> int:
    """``6 sqrt(N)`` between 400 and 1,000."""
    return round(min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_ROOT_EXAMPLE * math.sqrt(examples))))


def default_bound(examples: int) -> Bound:
    """What a plan may use when nobody bounds it: see `MOST_EPOCHS`, `MOST_SAMPLES`, `FREE_SAMPLES`."""
    samples = max(FREE_SAMPLES, min(MOST_EPOCHS * examples, MOST_SAMPLES))
    return Bound(samples=samples, said=f"{samples:,} examples, the default limit")


def plan(
    *,
    examples: int,
    epsilon: float,
    delta: float | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    bound: Bound | None = None,
    usual_steps: int | None = None,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
    clipping: Mapping[str, str | float] = DEFAULT_CLIPPING,
    before: tuple[Query, ...] = (),
    notes: tuple[str, ...] = (),
) -> Plan:
    """Choose what was left open, then solve the noise.

    Args:
        examples: N, public, at least 2.
        epsilon: target; ``math.inf`` plans a run without noise.
        delta: None is ``1 / N^1.1``.
        batch_size: None is the knee batch B*(1.05) for the steps, within the bound.
        steps: None is ``usual_steps``; where the bound does not allow their knee, what `balance` gives, up to
            `FEWEST_STEPS` at least; with a given batch, up to four times the usual, as far as the knee goes.
        bound: how much may be computed; None is `default_bound`. Not asked when batch and steps are both given.
        usual_steps: S when nothing speaks against it; None is `default_steps`.
        relation, accountant, clipping, before, notes: as in `Plan`.

    Raises:
        ConfigError: an argument is outside its range, or the bound is too tight for any plan.
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
    """
    delta = default_delta(examples) if delta is None else delta
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")
    if not epsilon > 0:
        raise ConfigError(f"epsilon={epsilon}: must be above 0; ask for e.g. epsilon=3.")
    if batch_size is None or steps is None:
        mu = mu_for_training(
            REFERENCE_EPSILON if math.isinf(epsilon) else epsilon, delta=delta, relation=relation, before=before
        )
        batch_size, steps = choose_sizes(
            examples,
            mu=mu,
            batch_size=batch_size,
            steps=steps,
            bound=default_bound(examples) if bound is None else bound,
            usual_steps=usual_steps,
        )
    return Plan.solve(
        examples=examples,
        batch_size=batch_size,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        relation=relation,
        accountant=accountant,
        clipping=clipping,
        before=before,
        notes=notes,
    )


def choose_sizes(
    examples: int,
    *,
    mu: float,
    bound: Bound,
    batch_size: int | None = None,
    steps: int | None = None,
    usual_steps: int | None = None,
) -> tuple[int, int]:
    """(B, S): the knee for the usual steps if the bound allows it, and otherwise `balance`.

    Args:
        examples: N. mu: GDP parameter left for training. bound: how much may be computed.
        batch_size, steps: what is given is kept.
        usual_steps: S when nothing speaks against it; None is `default_steps`.

    Raises:
        ConfigError: an argument is outside its range, or the bound allows no plan.
    """
    usual = default_steps(examples) if usual_steps is None else usual_steps
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1; pass the number of updates.")
    if batch_size is not None:
        if not 1 <= batch_size <= examples:
            raise ConfigError(f"batch_size={batch_size}: must be from 1 to the {examples} examples; leave it out.")
        return batch_size, steps if steps is not None else _steps_for_batch(examples, mu, batch_size, bound, usual)
    if steps is None:
        wanted = wanted_batch(examples, mu=mu, steps=usual)
        if bound.admits(batch_size=wanted, steps=usual):
            return wanted, usual
        return balance(examples, mu=mu, bound=bound, most_steps=max(usual, FEWEST_STEPS))
    room = math.floor(bound.batch(steps))
    if room < 1:
        raise ConfigError(f"steps={steps} within {bound.said}: leaves less than one example a step; lower one.")
    return min(wanted_batch(examples, mu=mu, steps=steps), room), steps


def wanted_batch(examples: int, *, mu: float, steps: int, overhead: float = KNEE_OVERHEAD) -> int:
    """The knee batch, at least `SMALLEST_BATCH` and at most N."""
    knee = knee_batch(examples=examples, mu=mu, steps=steps, overhead=overhead)
    return max(1, min(examples, round(max(knee, SMALLEST_BATCH))))


def balance(examples: int, *, mu: float, bound: Bound, most_steps: int, use_all: bool = False) -> tuple[int, int]:
    """(B, S) with the least `score` among those within the bound, S at most ``most_steps``.

    Args:
        examples: N. mu: GDP parameter left for training. bound: how much may be computed. most_steps: largest S.
        use_all: batches beyond the knee too, so that every candidate uses up the bound (fixed epochs).

    Raises:
        ConfigError: the bound allows less than `FEWEST_BOUND_STEPS` steps of `FEWEST_BOUND_BATCH` examples.
    """
    fewest = min(FEWEST_BOUND_STEPS, most_steps)
    least = min(examples, FEWEST_BOUND_BATCH)
    if not bound.admits(batch_size=least, steps=fewest):
        raise ConfigError(
            f"compute={bound.said}: allows {bound.samples:,.0f} examples, and {fewest} steps of {least} need "
            f"{bound.cost(batch_size=least, steps=fewest):,.0f}; give it {_times(bound, least, fewest):.2g} times that."
        )
    found = []
    for steps in sorted({round(most_steps * (fewest / most_steps) ** (i / _GRID)) for i in range(_GRID + 1)}):
        room = min(examples, math.floor(bound.batch(steps) * (1 + 1e-12)))
        batch = room if use_all else min(room, wanted_batch(examples, mu=mu, steps=steps))
        if batch >= 1 and (not use_all or steps * examples >= bound.samples):
            found.append((score(examples, mu=mu, batch_size=batch, steps=steps), -steps, batch))
    _, negative, batch = min(found)
    return batch, -negative


def score(examples: int, *, mu: float, batch_size: float, steps: int) -> float:
    """What a plan loses against the best at this epsilon, up to a factor; data-free, for comparing plans.

    ``r(sigma0) (1 + S_half / S)``: r is the price of small batches in noise, and the second factor that of few steps.
    """
    sigma = seed_noise_multiplier(batch_size / examples, steps=steps, mu=mu)
    floor = math.sqrt(steps) / (examples * mu)
    return sigma / batch_size / floor * (1 + HALF_STEPS / steps)


def mu_for_training(epsilon: float, *, delta: float, relation: Relation, before: tuple[Query, ...]) -> float:
    """What ``before`` leaves of mu: squares add up under composition. Replace-one halves it (twice the sensitivity)."""
    left = delta - sum(query.delta for query in before if isinstance(query, Selection))
    if left <= 0:
        raise BudgetExceeded(
            f"delta={delta}: the released names already use it up; raise delta or the release threshold."
        )
    total = gdp_mu(epsilon, delta=left) / (2.0 if relation is Relation.REPLACE_ONE else 1.0)
    used = 0.0
    for query in before:
        if isinstance(query, Gaussian) and query.noise_multiplier > 0:
            used += query.count / query.noise_multiplier**2
        elif isinstance(query, SampledGaussian):
            used += query.count * step_mu(query.sample_rate, noise_multiplier=query.noise_multiplier) ** 2
    return math.sqrt(max(total * total - used, 1e-4 * total * total))


def _steps_for_batch(examples: int, mu: float, batch_size: int, bound: Bound, usual: int) -> int:
    knee = knee_batch(examples=examples, mu=mu, steps=1) / batch_size
    affordable = math.floor(bound.samples / (batch_size + bound.overhead))
    if affordable < 1:
        raise ConfigError(f"batch_size={batch_size} within {bound.said}: allows not even one step; lower the batch.")
    return max(1, min(affordable, round(min(4 * usual, max(usual, knee * knee)))))


def _times(bound: Bound, batch_size: int, steps: int) -> float:
    return bound.cost(batch_size=batch_size, steps=steps) / bound.samples
