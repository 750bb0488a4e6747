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
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy import optimize

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Accountant, Gaussian, Query, Relation, SampledGaussian, Selection
from discreet.privacy.gdp import gdp_mu, step_mu
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
"""... but these always, since they take seconds. ``max_samples`` replaces all three."""

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


def plan(
    *,
    examples: int,
    epsilon: float,
    delta: float | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    max_samples: int | None = None,
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
        batch_size: None is the knee batch B*(1.05) for the steps, within the caps above.
        steps: None is `default_steps`; with a given batch, up to four times that, as far as the knee goes.
        max_samples: cap on ``batch_size * steps``, throughput times the seconds there are; None is the caps above.
        relation, accountant, clipping, before, notes: as in `Plan`.

    Raises:
        ConfigError: an argument is outside its range.
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
    """
    delta = default_delta(examples) if delta is None else delta
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")
    if not epsilon > 0:
        raise ConfigError(f"epsilon={epsilon}: must be above 0; ask for e.g. epsilon=3.")
    if max_samples is not None and max_samples < 1:
        raise ConfigError(f"max_samples={max_samples}: must be at least 1; pass throughput times seconds.")
    if batch_size is None or steps is None:
        mu = _mu_for_training(REFERENCE_EPSILON if math.isinf(epsilon) else epsilon, delta, relation, before)
        samples = max(FREE_SAMPLES, min(MOST_EPOCHS * examples, MOST_SAMPLES)) if max_samples is None else max_samples
        if steps is None:
            steps = _choose_steps(examples, mu=mu, batch_size=batch_size, samples=samples)
        if batch_size is None:
            batch_size = _choose_batch(examples, mu=mu, steps=steps, samples=samples)
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


def _choose_steps(examples: int, *, mu: float, batch_size: int | None, samples: int) -> int:
    usual = default_steps(examples)
    if batch_size is None:
        return min(usual, max(1, samples // min(examples, SMALLEST_BATCH)))
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1; pass an expected number of examples.")
    knee = knee_batch(examples=examples, mu=mu, steps=1) / batch_size
    return max(1, min(samples // batch_size, round(min(4 * usual, max(usual, knee * knee)))))


def _choose_batch(examples: int, *, mu: float, steps: int, samples: int) -> int:
    if steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1; pass the number of updates.")
    wanted = max(knee_batch(examples=examples, mu=mu, steps=steps), SMALLEST_BATCH)
    return max(1, min(examples, round(wanted), samples // steps))


def _mu_for_training(epsilon: float, delta: float, relation: Relation, before: tuple[Query, ...]) -> float:
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
