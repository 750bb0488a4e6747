"""Privacy accounting: queries in, an upper bound on epsilon (or delta) out; and back, to the noise that is needed.

Two accountants. PLD (the default) composes discretised privacy loss distributions (connect-the-dots: each grid is an
upper bound; Doroshenko et al., arXiv:2207.04380). RDP composes Renyi divergences (Mironov et al., arXiv:1908.10530;
conversion of Balle et al., arXiv:1905.09982); it is looser, by 6-10 % at sigma >= 2 and by up to 2x at sigma = 0.6.

What is exact, and what is a bound:

- add/remove, Poisson batches: each step is the worst case of one example, ``(1 - q) N(0, s^2) + q N(1, s^2)`` against
  ``N(0, s^2)``, both ways round. Attained by an example whose clipped gradient is always the same and that all others
  leave alone; so the figure is exact for the mechanism, but for the grid (0.1 %) and the margins for rounding.
- replace-one, Poisson batches: the step is ``(1 - q) N(0, s^2) + q N(1, s^2)`` against the same with -1: old and new
  gradient of full length and opposed. That is dp_accounting's pair, and attained; no pair of gradients that was tried
  costs more (`tests/privacy/test_replace_one.py`). Add/remove at half the sigma is a much looser bound where batches
  are small (13.4 for 2.84 at q = 0.01, sigma = 1, 1,000 steps), and the same thing where they are not sampled.
  sigma counts in clip bounds R in both relations.
- truncated Poisson batches: whether a batch was cut is taken as known, and a cut batch as a replacement (a cut lets
  another example in): an upper bound, as in dp_accounting, and nearly tight where cuts are rare.
- RDP with replace-one or with truncated batches: not in dp_accounting; see `discreet.privacy.renyi`.
- searches (`Repeated`): an upper bound, by RDP alone.
- parts of their own (`HeldOut`): the largest of the parts and the rest counts. For replace-one, an example may also
  leave one part for another: one removal and one addition, so every two of them are composed as well, by add/remove.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.proposal import FastModel, merged, rounding_margin, selections_per_neighbour
from discreet.privacy.queries import (
    LARGEST_NOISE,
    SMALLEST_NOISE,
    Accountant,
    Gaussian,
    HeldOut,
    Query,
    Relation,
    Repeated,
    SampledGaussian,
    Selection,
    TruncatedGaussian,
    query_from_json,
    query_to_json,
)
from discreet.privacy.referee import delta_of, epsilon_of
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.search import solve_decreasing
from discreet.privacy.summary import summarise

__all__ = [
    "Accountant",
    "Gaussian",
    "HeldOut",
    "NoiseSolution",
    "Query",
    "Relation",
    "Repeated",
    "Repetitions",
    "SampledGaussian",
    "Selection",
    "Stopping",
    "TruncatedGaussian",
    "delta",
    "epsilon",
    "profile",
    "query_from_json",
    "query_to_json",
    "selected_epsilon",
    "solve_noise",
    "solve_noise_multiplier",
    "solve_step_noise",
]


def epsilon(
    queries: Sequence[Query],
    *,
    delta: float,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> float:
    """Epsilon such that all ``queries`` together are (epsilon, delta)-DP.

    **Guarantees.** An upper bound: pessimistic discretisation, and ``delta`` is reduced by a bound on the rounding
    error of the Fourier transforms (`fourier_margin`). Never negative, never NaN. The same set of queries in another
    order or split (two times 10 steps, or once 20) gives the same bits.

    Edge cases: no query or count 0: 0. sigma 0, or below 0.01: inf. The `Selection` deltas use up ``delta``: inf.

    Args:
        queries: what was, or will be, released.
        delta: in (0, 1).
        relation: what neighbouring data sets are.
        accountant: how to compose.

    Raises:
        ConfigError: delta is outside (0, 1), or below what floating-point numbers resolve over so many steps (about
            n 3e-19, or n 6e-16 without 80-bit numbers); or the accountant has no bound for a query.
    """
    _check_delta(delta)
    return epsilon_of(summarise(queries), delta, relation, accountant)


def delta(
    queries: Sequence[Query],
    *,
    epsilon: float,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> float:
    """Delta such that all ``queries`` together are (epsilon, delta)-DP; an upper bound in [0, 1]. See `epsilon`."""
    return profile(queries, epsilons=[epsilon], relation=relation, accountant=accountant)[0]


def profile(
    queries: Sequence[Query],
    *,
    epsilons: Sequence[float],
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> tuple[float, ...]:
    """`delta` at many epsilons, of one composition: the privacy profile. Not increasing in epsilon."""
    for value in epsilons:
        if not value >= 0:
            raise ConfigError(f"epsilon={value}: must be at least 0; ask for e.g. epsilon=3.")
    total = summarise(queries)
    selection = total.selection_delta * selections_per_neighbour(relation)
    worst, deltas = 1.0, []
    for value in sorted(epsilons):
        worst = min(worst, max(0.0, delta_of(total, value, relation, accountant)) + selection)
        deltas.append(worst)
    by_epsilon = dict(zip(sorted(epsilons), deltas, strict=True))
    return tuple(by_epsilon[value] for value in epsilons)


def selected_epsilon(
    run: Sequence[Query],
    *,
    repetitions: Repetitions,
    delta: float,
    before: Sequence[Query] = (),
) -> float:
    """Epsilon of a whole search: ``run`` is made a random number of times, and the best run alone is released.

    The best is chosen by a score from public data, or one that ``run`` paid for. By Renyi divergences (Theorems 2
    and 6, arXiv:2110.03620), add/remove. The same as `epsilon` of ``[*before, Repeated(run, repetitions)]`` by the rdp
    accountant.

    **Guarantees.** An upper bound for what is released: one run, and not how many others there were. At ``mean`` 1 it
    is a little above the rdp epsilon of one run.

    Args:
        run: queries of one run, e.g. ``[SampledGaussian(q, sigma, S)]``.
        repetitions: the distribution that the number of runs is drawn from.
        delta: in (0, 1).
        before: queries made once, before the runs.
    """
    return epsilon([*before, Repeated(tuple(run), repetitions)], delta=delta, accountant=Accountant.RDP)


@dataclass(frozen=True)
class NoiseSolution:
    """What `solve_noise` found: sigma, the epsilon that it gives, and how many compositions it took."""

    noise_multiplier: float
    epsilon: float
    evaluations: int


def solve_noise(
    *,
    sample_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    before: Sequence[Query] = (),
    repetitions: Repetitions | None = None,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> NoiseSolution:
    """The noise multiplier with which ``steps`` Poisson steps, after ``before``, spend ``epsilon``.

    As `solve_step_noise`, for a sample rate q in (0, 1] and S >= 1 steps.
    """
    _check_target(epsilon, steps=steps)
    return solve_step_noise(
        SampledGaussian(sample_rate=sample_rate, noise_multiplier=1.0, count=steps),
        epsilon=epsilon,
        delta=delta,
        before=before,
        repetitions=repetitions,
        relation=relation,
        accountant=accountant,
    )


def solve_step_noise(
    step: SampledGaussian | TruncatedGaussian,
    *,
    epsilon: float,
    delta: float,
    before: Sequence[Query] = (),
    repetitions: Repetitions | None = None,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> NoiseSolution:
    """The noise multiplier with which these steps, after ``before``, spend ``epsilon``.

    A fast composition (`discreet.privacy.losses`) proposes, and one or two evaluations of `epsilon` decide.

    **Guarantees.** The epsilon of ``[*before, the steps]``, by the same function that reports it, is at most
    ``epsilon``, and at least 0.999 of it (unless ``before`` alone is closer than that, or `SMALLEST_NOISE` is enough,
    which is then the answer). The search ends after 60 evaluations at the latest, with the best that it has seen.

    Args:
        step: the steps; their own noise multiplier is not looked at.
        epsilon: target, from 1e-6 to 1e6.
        delta: in (0, 1).
        before: queries already decided on the same data.
        repetitions: the steps are one run of a search that repeats it so; ``epsilon`` is the search's. By rdp only.
        relation: what neighbouring data sets are.
        accountant: how to compose.

    Raises:
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
        ConfigError: an argument is outside its range, or no noise reaches the target.
    """
    _check_target(epsilon, steps=step.count)
    _check_delta(delta)
    earlier = summarise(before)
    already = epsilon_of(earlier, delta, relation, accountant)
    if already >= epsilon:
        raise BudgetExceeded(
            f"epsilon={epsilon}: the queries before training already spend {already:.6g} at delta={delta}; "
            "raise epsilon, or give public bounds and categories instead of private ones."
        )

    def spent(noise_multiplier: float) -> float:
        noisy = dataclasses.replace(step, noise_multiplier=noise_multiplier)
        run = noisy if repetitions is None else Repeated((noisy,), repetitions)
        return epsilon_of(summarise([*before, run]), delta, relation, accountant)

    left = delta - earlier.selection_delta * selections_per_neighbour(relation)
    model = FastModel(step, earlier, left, relation, fast=accountant is Accountant.PLD)
    if model.fast:
        rounding_margin(merged(earlier, dataclasses.replace(step, noise_multiplier=1.0)), left)
    root = solve_decreasing(
        spent,
        target=epsilon,
        guess=model.noise_multiplier,
        guess_value=model.epsilon,
        smallest=SMALLEST_NOISE,
        largest=LARGEST_NOISE,
    )
    if root is None:
        raise ConfigError(
            f"epsilon={epsilon}: no noise multiplier reaches it in {step.count} steps; "
            "use fewer steps or raise epsilon."
        )
    return NoiseSolution(noise_multiplier=root.x, epsilon=root.value, evaluations=root.evaluations)


def solve_noise_multiplier(
    *,
    sample_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    before: Sequence[Query] = (),
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
) -> float:
    """The noise multiplier alone; see `solve_noise`."""
    return solve_noise(
        sample_rate=sample_rate,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        before=before,
        relation=relation,
        accountant=accountant,
    ).noise_multiplier


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")


SMALLEST_EPSILON, LARGEST_EPSILON = 1e-6, 1e6
"""Targets for which noise is solved."""


def _check_target(epsilon: float, *, steps: int) -> None:
    if not (0 < epsilon < math.inf):
        raise ConfigError(
            f"epsilon={epsilon}: must be finite and above 0 to solve the noise; a Plan takes epsilon=inf for none."
        )
    if not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:
        raise ConfigError(
            f"epsilon={epsilon}: must be from {SMALLEST_EPSILON:g} to {LARGEST_EPSILON:g} to solve for; "
            "the usual range is 1 to 8."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"steps={steps!r}: must be an integer of at least 1; pass the number of updates.")
