"""The plan of a search: noise such that all its runs, their scores and the choice keep one epsilon together.

A search that repeats training a random number of times, and releases the best run alone, costs about 1.7 times the
epsilon of one run for 10 expected runs (Papernot & Steinke, arXiv:2110.03620; `discreet.privacy.repetitions`). So each
run is planned at a smaller epsilon, and solved such that the whole is what was asked for, by Renyi divergences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Accountant, Gaussian, Query, SampledGaussian
from discreet.privacy.accounting import epsilon as compose_epsilon
from discreet.privacy.gdp import gdp_epsilon, gdp_mu, seed_noise_multiplier, step_mu
from discreet.privacy.plan import DEFAULT_CLIPPING, Plan, Search, default_delta
from discreet.privacy.planner import plan as plan_one_run
from discreet.privacy.queries import LARGEST_NOISE, SMALLEST_NOISE
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.sampling import PoissonSampling
from discreet.privacy.search import solve_decreasing

USUAL_RUNS = 10.0
PRICE_OF_A_SEARCH = 1.8
"""About how much more a search costs than one of its runs: sizes are planned, and noise is seeded, by it."""

SCORE_SHARE = 0.02
"""Part of a run's squared GDP parameter that its score gets: the training noise grows by 1 %."""


def plan_search(
    *,
    examples: int,
    epsilon: float,
    delta: float | None = None,
    runs: float = USUAL_RUNS,
    stopping: Stopping = Stopping.LOGARITHMIC,
    private_score: bool = True,
    batch_size: int | None = None,
    steps: int | None = None,
    clipping: Mapping[str, str | float] = DEFAULT_CLIPPING,
    before: tuple[Query, ...] = (),
    notes: tuple[str, ...] = (),
) -> Plan:
    """Plan a search: choose what was left open, then solve the noise of its runs.

    Args:
        examples: N. epsilon: of the whole search, finite. delta: None is 1 / N^1.1.
        runs: expected number of runs, at least 1.
        stopping: LOGARITHMIC or GEOMETRIC; a Poisson number may be 0, and then there is no model.
        private_score: runs are scored on the private examples, with noise; else on data outside the guarantee.
        batch_size, steps: None: the planner's, for one run.
        clipping, before, notes: as in `Plan`.

    Raises:
        ConfigError: an argument is outside its range.
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
    """
    if stopping is Stopping.POISSON:
        raise ConfigError("stopping poisson: may make no run at all, and then no model; use logarithmic or geometric.")
    if not 0 < epsilon < math.inf:
        raise ConfigError(
            f"epsilon={epsilon}: must be finite and above 0 for a search; without a guarantee, train each setting."
        )
    delta = default_delta(examples) if delta is None else delta
    repetitions = Repetitions(stopping, runs)
    share = epsilon / (1.0 if runs == 1 else PRICE_OF_A_SEARCH)
    sizes = plan_one_run(
        examples=examples, epsilon=share, delta=delta, batch_size=batch_size, steps=steps, before=_smaller(before)
    )
    score_noise = 1 / (gdp_mu(share, delta=delta) * math.sqrt(SCORE_SHARE)) if private_score else None
    search = Search(repetitions=repetitions, score_noise=score_noise)
    noise = _solve(search, sizes.sampling, sizes.steps, epsilon=epsilon, share=share, delta=delta, before=before)
    return Plan(
        examples=examples,
        batch_size=sizes.batch_size,
        steps=sizes.steps,
        noise_multiplier=noise,
        epsilon=epsilon,
        delta=delta,
        accountant=Accountant.RDP,
        clipping=dict(clipping),
        before=before,
        search=search,
        notes=notes,
    )


def one_run(plan: Plan) -> float:
    """Epsilon of one run of a search alone, preprocessing and score included, at the plan's delta, by PLD.

    What the model that is released would have cost, had its setting been known.
    """
    assert plan.search is not None
    step = SampledGaussian(plan.sample_rate, plan.noise_multiplier, plan.steps)
    return compose_epsilon([*plan.before, *plan.search.query(step).run], delta=plan.delta, relation=plan.relation)


def _solve(
    search: Search,
    sampling: PoissonSampling,
    steps: int,
    *,
    epsilon: float,
    share: float,
    delta: float,
    before: tuple[Query, ...],
) -> float:
    """The smallest noise found for which everything together is at most ``epsilon``, and at least 0.999 of it."""
    price = epsilon / share

    def spent(noise: float) -> float:
        run = search.query(SampledGaussian(sampling.rate, noise, steps))
        return compose_epsilon([*before, run], delta=delta, accountant=Accountant.RDP)

    def model(noise: float) -> float:
        return price * gdp_epsilon(math.sqrt(steps) * step_mu(sampling.rate, noise_multiplier=noise), delta=delta)

    def inverse_model(value: float) -> float:
        return seed_noise_multiplier(sampling.rate, steps=steps, mu=gdp_mu(value / price, delta=delta))

    root = solve_decreasing(
        spent,
        target=epsilon,
        guess=inverse_model,
        guess_value=model,
        smallest=SMALLEST_NOISE,
        largest=LARGEST_NOISE,
    )
    if root is None:
        raise BudgetExceeded(
            f"epsilon={epsilon}: no noise keeps {search.repetitions.mean:g} expected runs of {steps} steps within it; "
            "expect fewer runs, use fewer steps, or raise epsilon."
        )
    return root.x


def _smaller(before: tuple[Query, ...]) -> tuple[Query, ...]:
    """Preprocessing as the sizing of one run should see it: cheaper by what the run's epsilon is smaller."""
    return tuple(
        Gaussian(query.noise_multiplier * PRICE_OF_A_SEARCH, query.count) if isinstance(query, Gaussian) else query
        for query in before
    )
