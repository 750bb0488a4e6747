"""The referee: dp_accounting, asked about summaries of queries. Its only importer.

PLD composes discretised privacy loss distributions (connect-the-dots, arXiv:2207.04380) by dp_accounting's own code, on
the grid of `discreet.privacy.proposal`, in 80 bits where rounding would be felt. RDP composes Renyi divergences; what
dp_accounting has no divergences for comes from `discreet.privacy.renyi`. What the figures mean is told in
`discreet.privacy.accounting`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Iterator

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant

from discreet.errors import ConfigError, DiscreetError
from discreet.privacy.gdp import gdp_log_delta
from discreet.privacy.proposal import (
    EXTENDED,
    SMALL_MARGIN,
    UNLIKELY_CUT,
    fourier_margin,
    loss_grid,
    rounding_margin,
    selections_per_neighbour,
    sensitivity,
)
from discreet.privacy.queries import Accountant, Relation, SampledGaussian, TruncatedGaussian
from discreet.privacy.renyi import mixed_renyi, replace_one_renyi
from discreet.privacy.repetitions import selected_renyi
from discreet.privacy.summary import Summary


@functools.lru_cache(maxsize=2048)
def epsilon_of(total: Summary, delta: float, relation: Relation, accountant: Accountant) -> float:
    """Upper bound on epsilon of a summary. See `discreet.privacy.accounting.epsilon`, which checks ``delta``."""
    _check_supported(total, accountant)
    left = delta - total.selection_delta * selections_per_neighbour(relation)
    if total.noiseless or (left <= 0 and total.selection_delta > 0):
        return math.inf
    if total.empty:
        return 0.0
    if total.held_out:
        return max(epsilon_of(side, delta, how, accountant) for side, how in _sides(total, relation))
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


def delta_of(total: Summary, epsilon: float, relation: Relation, accountant: Accountant) -> float:
    """Upper bound on delta of a summary's noise at ``epsilon`` >= 0; the `Selection` deltas come on top."""
    _check_supported(total, accountant)
    if total.noiseless:
        return 1.0
    if total.held_out:
        return max(delta_of(side, epsilon, how, accountant) for side, how in _sides(total, relation))
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
    margin, extended = rounding_margin(total, left)
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


@functools.lru_cache(maxsize=8)
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


@functools.lru_cache(maxsize=8)
def _rdp_accountant(total: Summary) -> RdpAccountant:
    """Composed once, and only read: a privacy profile asks it at many epsilons."""
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
