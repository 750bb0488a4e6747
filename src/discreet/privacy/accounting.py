"""Privacy accounting: queries in, an upper bound on epsilon (or delta) out. The only importer of dp_accounting.

Two accountants. PLD (the default) composes discretised privacy loss distributions (connect-the-dots: each grid is an
upper bound; Doroshenko et al., arXiv:2207.04380). RDP composes Renyi divergences (Mironov et al., arXiv:1908.10530;
conversion of Balle et al., arXiv:1905.09982); it is looser, by 6-10 % at sigma >= 2 and by up to 2x at sigma = 0.6.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dp_accounting
from dp_accounting import dp_event
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from dp_accounting.rdp import RdpAccountant

from discreet.errors import BudgetExceeded, ConfigError, DiscreetError
from discreet.privacy.gdp import gdp_epsilon, gdp_log_delta, gdp_mu, seed_noise_multiplier, step_mu
from discreet.privacy.queries import (
    Accountant,
    Gaussian,
    Query,
    Relation,
    Repeated,
    SampledGaussian,
    Selection,
    Summary,
    query_from_json,
    query_to_json,
    summarise,
)
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.search import solve_decreasing

__all__ = [
    "Accountant",
    "Gaussian",
    "NoiseSolution",
    "Query",
    "Relation",
    "Repeated",
    "Repetitions",
    "SampledGaussian",
    "Selection",
    "Stopping",
    "delta",
    "epsilon",
    "query_from_json",
    "query_to_json",
    "selected_epsilon",
    "solve_noise",
    "solve_noise_multiplier",
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
    error of the Fourier transforms (`_fourier_margin`). Never negative, never NaN. The same set of queries in another
    order or split (two times 10 steps, or once 20) gives the same bits.

    Edge cases: no query or count 0: 0. sigma 0: inf. The `Selection` deltas use up ``delta``: inf.

    Args:
        queries: what was, or will be, released.
        delta: in (0, 1).
        relation: what neighbouring data sets are.
        accountant: how to compose.

    Raises:
        ConfigError: delta is outside (0, 1), too small for float64 over so many steps, or the accountant cannot do the
            relation.
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
    if not epsilon >= 0:
        raise ConfigError(f"epsilon={epsilon}: must be at least 0; ask for e.g. epsilon=3.")
    _check_relation(relation, accountant)
    total = summarise(queries)
    _check_supported(total, accountant)
    selection = total.selection_delta * _selections_per_neighbour(relation)
    if total.noiseless:
        return 1.0
    if math.isinf(epsilon) or total.empty:
        return min(1.0, selection)
    if accountant is Accountant.RDP:
        with _quiet_absl():
            value = float(_rdp_accountant(total).get_delta(epsilon))
    elif not total.sampled:
        value = math.exp(gdp_log_delta(total.gaussian_mu * _distance(relation), epsilon=epsilon)) * (1 + 1e-9)
    else:
        value = float(_compose(total, relation).get_delta_for_epsilon(epsilon)) + _fourier_margin(total)
    return min(1.0, max(0.0, value) + selection)


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

    The seed is the GDP closed form; two to four compositions are typical (`discreet.privacy.search`).

    **Guarantees.** The epsilon of ``[*before, the steps]``, by the same function that reports it, is at most
    ``epsilon``, and at least 0.999 of it (unless ``before`` alone is closer than that).

    Args:
        sample_rate: q in (0, 1].
        steps: S >= 1.
        epsilon: target, finite and above 0.
        delta: in (0, 1).
        before: queries already decided on the same data.
        repetitions: the steps are one run of a search that repeats it so; ``epsilon`` is the search's. By rdp only.
        relation: what neighbouring data sets are.
        accountant: how to compose.

    Raises:
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
        ConfigError: an argument is outside its range, or no noise reaches the target.
    """
    _check_target(epsilon, steps=steps)
    _check_delta(delta)
    SampledGaussian(sample_rate=sample_rate, noise_multiplier=1.0, count=steps)
    earlier = summarise(before)
    already = _epsilon(earlier, delta, relation, accountant)
    if already >= epsilon:
        raise BudgetExceeded(
            f"epsilon={epsilon}: the queries before training already spend {already:.6g} at delta={delta}; "
            "raise epsilon, or give public bounds and categories instead of private ones."
        )

    def spent(noise_multiplier: float) -> float:
        step = SampledGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier, count=steps)
        run = step if repetitions is None else Repeated((step,), repetitions)
        return _epsilon(summarise([*before, run]), delta, relation, accountant)

    left = delta - earlier.selection_delta * _selections_per_neighbour(relation)
    distance = _distance(relation)

    def model(noise_multiplier: float) -> float:
        steps_mu = math.sqrt(steps) * step_mu(sample_rate, noise_multiplier=noise_multiplier)
        return gdp_epsilon(math.hypot(earlier.limit_mu, steps_mu) * distance, delta=left)

    def inverse_model(value: float) -> float:
        mu = gdp_mu(value, delta=left) / distance
        rest = math.sqrt(max(mu * mu - earlier.limit_mu**2, 1e-3 * mu * mu))
        return seed_noise_multiplier(sample_rate, steps=steps, mu=rest)

    root = solve_decreasing(spent, target=epsilon, guess=inverse_model, guess_value=model)
    if root is None:
        raise ConfigError(
            f"epsilon={epsilon}: no noise multiplier reaches it in {steps} steps; use fewer steps or raise epsilon."
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
    _check_relation(relation, accountant)
    _check_supported(total, accountant)
    left = delta - total.selection_delta * _selections_per_neighbour(relation)
    if total.noiseless or (left <= 0 and total.selection_delta > 0):
        return math.inf
    if total.empty:
        return 0.0
    if accountant is Accountant.RDP:
        with _quiet_absl():
            value = float(_rdp_accountant(total).get_epsilon(left))
    elif not total.sampled:
        value = float(
            dp_accounting.get_epsilon_gaussian(1.0 / (total.gaussian_mu * _distance(relation)), left, tol=1e-12)
        )
        value += 1e-11 * (value > 0)
    else:
        value = _pld_epsilon(total, left, relation)
    if math.isnan(value):
        raise DiscreetError(
            f"the {accountant.value} accountant gave NaN for {total}: no claim can be made; use the other accountant."
        )
    return max(0.0, value)


def _pld_epsilon(total: Summary, left: float, relation: Relation) -> float:
    margin = _fourier_margin(total)
    if margin > left / 2:
        raise ConfigError(
            f"delta={left:.3g} over {sum(q.count for q in total.sampled)} steps: below {2 * margin:.1e}, what float64 "
            "resolves; use a larger delta, fewer steps, or the rdp accountant."
        )
    losses = _compose(total, relation)
    if float(losses.get_delta_for_epsilon(0.0)) <= left - margin:
        return 0.0
    return float(losses.get_epsilon_for_delta(left - margin))


def _fourier_margin(total: Summary) -> float:
    """Bound on the error in delta of the n-fold Fourier power: ``1.25 n 2^-52``, plus 1e-14 for the other roundings.

    dp_accounting raises a float64 spectrum to the n-th power, which multiplies its relative rounding error by n.
    Against 80-bit arithmetic the error was at most 0.63 n 2^-52 over 260 points (n from 100 to 10^6, sigma from 0.4 to
    50).
    """
    return 1.25 * sum(query.count for query in total.sampled) * 2.0**-52 + 1e-14


_GRID_OVER_SPREAD = 0.03
_LARGEST_GRID = 2.0**-8
_STEP_POINTS = 2**15
_TOTAL_POINTS = 2**20
_TAIL = 10.0


def _grid(total: Summary, relation: Relation) -> float:
    """Spacing h of the loss grid. Any h gives an upper bound; this one costs little and is close to tight.

    Rounding adds at most ``n h^2 / 6`` to the variance ``mu^2`` of the composed loss, so ``h = 0.03 mu / sqrt(n)``
    widens epsilon by about 1e-4 relatively. It is coarsened where one step would need more than 2^15 points, or the
    total 2^20.
    """
    count = sum(query.count for query in total.sampled) + (total.gaussian_mu > 0)
    distance = _distance(relation)
    fine = min(_GRID_OVER_SPREAD * distance * total.limit_mu / math.sqrt(count), _LARGEST_GRID)
    gaussian_range = 2 * _TAIL * distance * total.gaussian_mu
    widest, variance = gaussian_range, (distance * total.gaussian_mu) ** 2
    for query in total.sampled:
        rate, sigma = query.sample_rate, query.noise_multiplier
        widest = max(widest, distance * _loss_range(rate, sigma))
        variance += query.count * rate * distance**2 * (1 / (4 * sigma**4) + 1 / sigma**2)
    spread = 17 * math.sqrt(variance)
    return max(fine, widest / _STEP_POINTS, spread / _TOTAL_POINTS)


def _loss_range(rate: float, sigma: float) -> float:
    """Distance between the privacy losses of one step at -10 and +10 standard deviations."""

    def loss(x: float) -> float:
        exponent = (2 * x - 1) / (2 * sigma**2) + math.log(rate)
        rest = math.log1p(-rate)
        return max(exponent, rest) + math.log1p(math.exp(-abs(exponent - rest)))

    return loss(1 + _TAIL * sigma) - loss(-_TAIL * sigma)


def _compose(total: Summary, relation: Relation) -> dp_pld.PrivacyLossDistribution:
    grid = _grid(total, relation)
    parts = [
        _step_losses(q.sample_rate, q.noise_multiplier, grid, relation).self_compose(q.count) for q in total.sampled
    ]
    if total.gaussian_mu > 0:
        parts.append(_step_losses(1.0, 1.0 / total.gaussian_mu, grid, relation))
    return functools.reduce(lambda left, right: left.compose(right), parts)


@functools.lru_cache(maxsize=8)
def _step_losses(rate: float, sigma: float, grid: float, relation: Relation) -> dp_pld.PrivacyLossDistribution:
    return dp_pld.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=rate,
        value_discretization_interval=grid,
        pessimistic_estimate=True,
        neighboring_relation=_NEIGHBOURS[relation],
    )


def _rdp_accountant(total: Summary) -> RdpAccountant:
    accountant = RdpAccountant()
    accountant.compose(_event(total))
    for run, repetitions in total.repeated:
        accountant.compose(dp_event.RepeatAndSelectDpEvent(_event(run), repetitions.mean, repetitions.shape))
    return accountant


def _event(total: Summary) -> dp_event.DpEvent:
    """The noisy queries of a summary, without its searches."""
    events: list[dp_event.DpEvent] = [
        dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(query.sample_rate, dp_event.GaussianDpEvent(query.noise_multiplier)),
            query.count,
        )
        for query in total.sampled
    ]
    if total.gaussian_mu > 0:
        events.append(dp_event.GaussianDpEvent(1.0 / total.gaussian_mu))
    return dp_event.ComposedDpEvent(events)


_NEIGHBOURS = {
    Relation.ADD_REMOVE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def _distance(relation: Relation) -> float:
    """How far apart the sums of two neighbours can be, in clip bounds."""
    return 2.0 if relation is Relation.REPLACE_ONE else 1.0


def _selections_per_neighbour(relation: Relation) -> int:
    """A replacement is one removal and one addition, so a threshold on names can fail twice."""
    return 2 if relation is Relation.REPLACE_ONE else 1


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


def _check_relation(relation: Relation, accountant: Accountant) -> None:
    if relation is Relation.REPLACE_ONE and accountant is Accountant.RDP:
        raise ConfigError(
            "accountant rdp with relation replace_one: has no bound for Poisson batches; use the pld accountant."
        )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")


def _check_target(epsilon: float, *, steps: int) -> None:
    if not (0 < epsilon < math.inf):
        raise ConfigError(
            f"epsilon={epsilon}: must be finite and above 0 to solve the noise; a Plan takes epsilon=inf for none."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"steps={steps!r}: must be an integer of at least 1; pass the number of updates.")
