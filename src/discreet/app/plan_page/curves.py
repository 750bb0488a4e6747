"""The numbers behind the pictures: curves by the accountant at a few places, areas by the closed forms of the planner.

Symbols: as in `discreet.privacy.planner`; nu = sigma / B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from discreet.privacy.accounting import Relation, SampledGaussian, epsilon, solve_noise_multiplier
from discreet.privacy.gdp import gdp_epsilon, step_mu
from discreet.privacy.options import Proposal
from discreet.privacy.plan import Plan

CERTIFIED_POINTS = 9

Points = list[tuple[float, float]]


def epsilon_at(plan: Plan, *, batch_size: float, steps: float, noise_multiplier: float, mu: float) -> float:
    """Epsilon of other sizes and noise, by the limit ``mu' = q sqrt(S (e^(1/sigma^2) - 1))``, anchored at the plan.

    The limit is scaled so that the plan itself has the mu that was left for training, and its own epsilon.
    """
    scale = mu / plan_mu(plan)
    other = scale * math.sqrt(steps) * step_mu(batch_size / plan.examples, noise_multiplier=noise_multiplier)
    distance = 2.0 if plan.relation is Relation.REPLACE_ONE else 1.0
    return gdp_epsilon(other * distance, delta=plan.delta)


def plan_mu(plan: Plan) -> float:
    """mu of the plan's own steps, by the limit."""
    return math.sqrt(plan.steps) * step_mu(plan.sample_rate, noise_multiplier=plan.noise_multiplier)


def constant_tan(plan: Plan, *, sigmas: Sequence[float]) -> Points:
    """(sigma, epsilon) at the plan's S and nu: batch and noise shrink together, so every update is as noisy.

    Only what can be: ``B = sigma / nu`` is between 1 and N. Composed by the plan's accountant at `CERTIFIED_POINTS`
    places, and interpolated between them, monotone, in logarithms.
    """
    nu = plan.noise_multiplier / plan.batch_size
    possible = [sigma for sigma in sigmas if 1 <= sigma / nu <= plan.examples]
    places = decades(possible[0], possible[-1], count=CERTIFIED_POINTS)
    values = [
        certified_epsilon(plan, sample_rate=sigma / nu / plan.examples, noise_multiplier=sigma) for sigma in places
    ]
    return _between(places, values, at=possible)


def full_batch_epsilon(plan: Plan) -> float:
    """Epsilon at the plan's S and nu with all examples in every batch: the least that constant TAN can give."""
    nu = plan.noise_multiplier / plan.batch_size
    return certified_epsilon(plan, sample_rate=1.0, noise_multiplier=nu * plan.examples)


def certified_epsilon(plan: Plan, *, sample_rate: float, noise_multiplier: float) -> float:
    """What the plan's accountant says of its steps at another rate and noise, preprocessing included."""
    step = SampledGaussian(min(1.0, sample_rate), noise_multiplier, plan.steps)
    return epsilon((*plan.before, step), delta=plan.delta, relation=plan.relation, accountant=plan.accountant)


def overhead_by_batch(plan: Plan, *, floor: float, batches: Sequence[float]) -> Points:
    """(B, r) at the plan's epsilon and S: noise per update over ``floor``, that of full batches.

    The accountant solves the noise at `CERTIFIED_POINTS` places.
    """
    places = sorted({max(1, round(batch)) for batch in decades(batches[0], batches[-1], count=CERTIFIED_POINTS)})
    values = [
        solve_noise_multiplier(
            sample_rate=batch / plan.examples,
            steps=plan.steps,
            epsilon=plan.epsilon,
            delta=plan.delta,
            before=plan.before,
            relation=plan.relation,
            accountant=plan.accountant,
        )
        / batch
        / floor
        for batch in places
    ]
    return _between([float(place) for place in places], values, at=[b for b in batches if places[0] <= b <= places[-1]])


def _between(places: Sequence[float], values: Sequence[float], *, at: Sequence[float]) -> Points:
    curve = PchipInterpolator(np.log(places), np.log(values), extrapolate=False)
    heights = np.exp(curve(np.clip(np.log(at), math.log(places[0]), math.log(places[-1]))))
    return [(float(x), float(y)) for x, y in zip(at, heights, strict=True)]


def epsilon_plane(plan: Plan, *, mu: float, steps: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Epsilon over (B, S) at the plan's nu, shape (len(batches), len(steps))."""
    nu = plan.noise_multiplier / plan.batch_size
    value: Callable[[float, float], float] = lambda batch, count: epsilon_at(  # noqa: E731
        plan, batch_size=batch, steps=count, noise_multiplier=nu * batch, mu=mu
    )
    return np.array([[value(float(batch), float(count)) for count in steps] for batch in batches])


def decades(low: float, high: float, *, count: int = 120) -> list[float]:
    """``count`` numbers from low to high, evenly spaced in their logarithm."""
    return [float(value) for value in np.geomspace(low, high, count)]


def cost_of(proposal: Proposal, *, batch_size: float, steps: float) -> float:
    """What a plan costs: seconds on the machine if there is one, else examples."""
    bound, machine = proposal.bound, proposal.machine
    if machine is None:
        return steps * (batch_size + bound.overhead)
    return steps * (batch_size + machine.overhead) / machine.throughput
