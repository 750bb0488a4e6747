"""Privacy accounting: queries in, an upper bound on epsilon (or delta) out. The only importer of dp_accounting.

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

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant

from discreet.errors import BudgetExceeded, ConfigError, DiscreetError
from discreet.privacy.gdp import gdp_log_delta
from discreet.privacy.proposal import (
    EXTENDED,
    SMALL_MARGIN,
    UNLIKELY_CUT,
    FastModel,
    fourier_margin,
    loss_grid,
    selections_per_neighbour,
    sensitivity,
    step_count,
)
from discreet.privacy.queries import (
    SMALLEST_NOISE,
    Accountant,
    Gaussian,
    HeldOut,
    Query,
    Relation,
    Repeated,
    SampledGaussian,
    Selection,
    Summary,
    TruncatedGaussian,
    query_from_json,
    query_to_json,
    summarise,
)
from discreet.privacy.renyi import mixed_renyi, replace_one_renyi
from discreet.privacy.repetitions import Repetitions, Stopping, selected_renyi
from discreet.privacy.search import solve_decreasing

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
    return _epsilon(summarise(queries), delta, relation, accountant)


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
    _check_supported(total, accountant)
    selection = total.selection_delta * selections_per_neighbour(relation)
    worst, deltas = 1.0, []
    for value in sorted(epsilons):
        worst = min(worst, max(0.0, _delta(total, value, relation, accountant)) + selection)
        deltas.append(worst)
    by_epsilon = dict(zip(sorted(epsilons), deltas, strict=True))
    return tuple(by_epsilon[value] for value in epsilons)


def _delta(total: Summary, epsilon: float, relation: Relation, accountant: Accountant) -> float:
    if total.noiseless:
        return 1.0
    if total.held_out:
        return max(_delta(side, epsilon, how, accountant) for side, how in _sides(total, relation))
    if math.isinf(epsilon) or total.empty:
        return 0.0
    if accountant is Accountant.RDP:
        return _rdp_delta(total, epsilon, relation)
    if not total.steps:
        return math.exp(gdp_log_delta(total.gaussian_mu * sensitivity(relation), epsilon=epsilon)) * (1 + 1e-9)
    value = float(_compose(total, relation, extended=False).get_delta_for_epsilon(epsilon))
    if fourier_margin(total) <= SMALL_MARGIN * value or not EXTENDED:
        return value + fourier_margin(total)
    exact = float(_compose(total, relation, extended=True).get_delta_for_epsilon(epsilon))
    return exact + fourier_margin(total, extended=True)


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
    already = _epsilon(earlier, delta, relation, accountant)
    if already >= epsilon:
        raise BudgetExceeded(
            f"epsilon={epsilon}: the queries before training already spend {already:.6g} at delta={delta}; "
            "raise epsilon, or give public bounds and categories instead of private ones."
        )

    def spent(noise_multiplier: float) -> float:
        noisy = dataclasses.replace(step, noise_multiplier=noise_multiplier)
        run = noisy if repetitions is None else Repeated((noisy,), repetitions)
        return _epsilon(summarise([*before, run]), delta, relation, accountant)

    left = delta - earlier.selection_delta * selections_per_neighbour(relation)
    model = FastModel(step, earlier, left, relation, fast=accountant is Accountant.PLD)
    root = solve_decreasing(
        spent, target=epsilon, guess=model.noise_multiplier, guess_value=model.epsilon, smallest=SMALLEST_NOISE
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


@functools.lru_cache(maxsize=2048)
def _epsilon(total: Summary, delta: float, relation: Relation, accountant: Accountant) -> float:
    _check_supported(total, accountant)
    left = delta - total.selection_delta * selections_per_neighbour(relation)
    if total.noiseless or (left <= 0 and total.selection_delta > 0):
        return math.inf
    if total.empty:
        return 0.0
    if total.held_out:
        return max(_epsilon(side, delta, how, accountant) for side, how in _sides(total, relation))
    if accountant is Accountant.RDP:
        value = _rdp_epsilon(total, left, relation)
    elif not total.steps:
        value = float(
            dp_accounting.get_epsilon_gaussian(1.0 / (total.gaussian_mu * sensitivity(relation)), left, tol=1e-12)
        )
        value += 1e-11 * (value > 0)
    else:
        value = _pld_epsilon(total, left, relation)
    if math.isnan(value):
        raise DiscreetError(
            f"the {accountant.value} accountant gave NaN for {total}: no claim can be made; use the other accountant."
        )
    return max(0.0, value)


def _sides(total: Summary, relation: Relation) -> list[tuple[Summary, Relation]]:
    """What one example's difference can touch: the rest, or one part; or, when it is replaced, two of them.

    An example that is replaced by one of another part is removed here and added there. The parts make Gaussian queries,
    whose losses are the same both ways, so add/remove composition covers that. Its names are selected on one side only.
    """
    sides = [(side, relation) for side in (total.rest, *total.parts)]
    if relation is Relation.REPLACE_ONE:
        crossed = [total.joined(part) for part in total.parts]
        crossed += [first.joined(second) for first, second in itertools.combinations(total.parts, 2)]
        sides += [(side, Relation.ADD_REMOVE) for side in crossed]
    return sides


def _pld_epsilon(total: Summary, left: float, relation: Relation) -> float:
    extended = EXTENDED and fourier_margin(total) > SMALL_MARGIN * left
    margin = fourier_margin(total, extended=extended)
    if margin > left / 2:
        raise ConfigError(
            f"delta={left:.3g} over {step_count(total)} steps: below {2 * margin:.1e}, what floating-point numbers "
            "resolve; use a larger delta, fewer steps, or the rdp accountant."
        )
    losses = _compose(total, relation, extended=extended)
    if float(losses.get_delta_for_epsilon(0.0)) <= left - margin:
        return 0.0
    return float(losses.get_epsilon_for_delta(left - margin))


@functools.lru_cache(maxsize=4)
def _compose(total: Summary, relation: Relation, *, extended: bool) -> dp_pld.PrivacyLossDistribution:
    grid = loss_grid(total, relation)
    parts = [_powered(_step_losses(query, grid, relation), query.count, extended=extended) for query in total.steps]
    if total.gaussian_mu > 0:
        parts.append(_step_losses(SampledGaussian(1.0, 1.0 / total.gaussian_mu, 1), grid, relation))
    return functools.reduce(lambda left, right: left.compose(right), parts)


def _powered(losses: dp_pld.PrivacyLossDistribution, count: int, *, extended: bool) -> dp_pld.PrivacyLossDistribution:
    """The n-fold composition, by dp_accounting's own code; ``extended`` hands it 80-bit probabilities.

    It reads private attributes of dp_accounting: a version that renames them fails with AttributeError, and nothing is
    accounted.
    """
    if not extended:
        return losses.self_compose(count)
    remove, add = losses._pmf_remove.to_dense_pmf(), losses._pmf_add.to_dense_pmf()
    powered = [_powered_pmf(pmf, count) for pmf in ((remove,) if losses._symmetric else (remove, add))]
    return dp_pld.PrivacyLossDistribution(*powered)


def _powered_pmf(pmf: pld_pmf.DensePLDPmf, count: int) -> pld_pmf.DensePLDPmf:
    def rebuilt(source: pld_pmf.DensePLDPmf, kind: type[np.floating]) -> pld_pmf.DensePLDPmf:
        return pld_pmf.DensePLDPmf(
            source._discretization,
            source._lower_loss,
            np.asarray(source._probs, dtype=kind),
            float(source._infinity_mass),
            source._pessimistic_estimate,
        )

    return rebuilt(rebuilt(pmf, np.longdouble).self_compose(count), np.float64)


def _step_losses(
    query: SampledGaussian | TruncatedGaussian, grid: float, relation: Relation
) -> dp_pld.PrivacyLossDistribution:
    if isinstance(query, TruncatedGaussian) and query.cut_probability >= UNLIKELY_CUT:
        return dp_pld.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=query.examples,
            sampling_probability=query.sample_rate,
            truncated_batch_size=query.largest_batch,
            noise_multiplier=query.noise_multiplier,
            value_discretization_interval=grid,
            neighboring_relation=_NEIGHBOURS[relation],
        )
    return _sampled_losses(query.sample_rate, query.noise_multiplier, grid, relation)


@functools.lru_cache(maxsize=8)
def _sampled_losses(rate: float, sigma: float, grid: float, relation: Relation) -> dp_pld.PrivacyLossDistribution:
    return dp_pld.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=rate,
        value_discretization_interval=grid,
        pessimistic_estimate=True,
        neighboring_relation=_NEIGHBOURS[relation],
    )


def _rdp_epsilon(total: Summary, left: float, relation: Relation) -> float:
    with _quiet_absl():
        if _referee_has(total, relation):
            return float(_rdp_accountant(total).get_epsilon(left))
        orders, divergences = _renyi(total, relation)
        return float(rdp_privacy_accountant.compute_epsilon(orders, divergences, left)[0])


def _rdp_delta(total: Summary, epsilon: float, relation: Relation) -> float:
    with _quiet_absl():
        if _referee_has(total, relation):
            return float(_rdp_accountant(total).get_delta(epsilon))
        orders, divergences = _renyi(total, relation)
        return float(rdp_privacy_accountant.compute_delta(orders, divergences, epsilon)[0])


def _referee_has(total: Summary, relation: Relation) -> bool:
    truncated = total.truncated or any(run.truncated for run, _ in total.repeated)
    return relation is Relation.ADD_REMOVE and not truncated


_ORDERS = tuple(float(order) for order in rdp_privacy_accountant.DEFAULT_RDP_ORDERS)


def _renyi(total: Summary, relation: Relation) -> tuple[np.ndarray, np.ndarray]:
    """Orders and divergences of everything, where dp_accounting's accountant does not take some part of it."""
    orders = np.array(_ORDERS)
    divergences = orders * (sensitivity(relation) * total.gaussian_mu) ** 2 / 2
    for query in total.steps:
        divergences = divergences + query.count * _step_renyi(query, relation)
    for run, repetitions in total.repeated:
        divergences = divergences + selected_renyi(orders, _renyi(run, relation)[1], repetitions)
    return orders, divergences


def _step_renyi(query: SampledGaussian | TruncatedGaussian, relation: Relation) -> np.ndarray:
    if relation is Relation.REPLACE_ONE:
        whole = replace_one_renyi(query.sample_rate, query.noise_multiplier, _ORDERS)
    else:
        accountant = RdpAccountant(list(_ORDERS))
        accountant.compose(_poisson_event(query))
        whole = accountant.rdp
    if isinstance(query, SampledGaussian) or query.cut_probability == 0:
        return whole
    cut = replace_one_renyi(query.cut_rate, query.noise_multiplier / 2, _ORDERS)
    return mixed_renyi(np.array(_ORDERS), (whole, cut), (1 - query.cut_probability, query.cut_probability))


def _rdp_accountant(total: Summary) -> RdpAccountant:
    accountant = RdpAccountant()
    accountant.compose(_event(total))
    for run, repetitions in total.repeated:
        accountant.compose(dp_event.RepeatAndSelectDpEvent(_event(run), repetitions.mean, repetitions.shape))
    return accountant


def _event(total: Summary) -> dp_event.DpEvent:
    """The noisy queries of a summary, without its searches."""
    events: list[dp_event.DpEvent] = [
        dp_event.SelfComposedDpEvent(_poisson_event(query), query.count) for query in total.sampled
    ]
    if total.gaussian_mu > 0:
        events.append(dp_event.GaussianDpEvent(1.0 / total.gaussian_mu))
    return dp_event.ComposedDpEvent(events)


def _poisson_event(query: SampledGaussian | TruncatedGaussian) -> dp_event.DpEvent:
    return dp_event.PoissonSampledDpEvent(query.sample_rate, dp_event.GaussianDpEvent(query.noise_multiplier))


_NEIGHBOURS = {
    Relation.ADD_REMOVE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Drop absl's log lines during one call: "optimal order is the largest" only says that RDP is looser than usual."""
    logger = logging.getLogger("absl")
    logger.addFilter(_refuse_record)
    try:
        yield
    finally:
        logger.removeFilter(_refuse_record)


def _refuse_record(_record: logging.LogRecord) -> bool:
    return False


def _check_supported(total: Summary, accountant: Accountant) -> None:
    if total.repeated and accountant is Accountant.PLD:
        raise ConfigError(
            "accountant pld with a repeated run: what selection costs is known for Renyi divergences only; "
            "use the rdp accountant."
        )


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
