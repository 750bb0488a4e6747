"""Why each number of a plan is what it is, what a change would do, and what to beware of: sentences over numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.privacy.compute import Bound, Machine
from discreet.privacy.gdp import gdp_epsilon, gdp_mu, seed_noise_multiplier, step_mu
from discreet.privacy.options import Kind, Mode, Option, WhatIf
from discreet.privacy.plan import Plan, default_delta
from discreet.privacy.planner import SMALLEST_BATCH

_FOR = {
    Kind.CHEAP: "a quarter of the knee's batch and of its compute",
    Kind.SMALL: "many small steps",
    Kind.KNEE: "the knee, where larger batches begin to buy next to nothing",
    Kind.MAXIMAL: "as good as full batches",
    Kind.LARGE: "few large steps",
    Kind.BALANCED: "uses up the bound, split so that noise and few steps together cost least",
    Kind.GIVEN: "as you asked",
}


@dataclass(frozen=True)
class Choice:
    """A plan in the making, with all that its reasons speak of. ``knee`` is the knee batch for its steps."""

    kind: Kind
    plan: Plan
    overhead: float
    knee: float
    mode: Mode
    bound: Bound
    microbatch: int | None


def reasons(choice: Choice) -> Mapping[str, str]:
    """Number -> one sentence on why it is what it is."""
    plan = choice.plan
    found = {
        "plan": f"{_FOR[choice.kind]}; full batches would have {_left(choice.overhead)} less noise per step.",
        "batch_size": _batch_reason(choice),
        "steps": _steps_reason(choice),
        "noise_multiplier": (
            f"the least noise, by the {plan.accountant.value} accountant, that keeps epsilon {plan.epsilon:g} over "
            f"{plan.steps} steps at rate {plan.sample_rate:.3g}; per step {choice.overhead:.3f} times the noise of "
            "full batches."
        ),
        "delta": (
            "1 / examples^1.1, below the 1 / examples at which publishing a random row would pass."
            if plan.delta == default_delta(plan.examples)
            else "as you asked; it is below 1 / examples."
        ),
    }
    if choice.microbatch is not None:
        found["microbatch"] = (
            "as many examples at a time as are fast and fit into memory; it changes the result by rounding alone."
            if choice.microbatch < plan.batch_size
            else "the whole batch at once."
        )
    return found


def _left(overhead: float) -> str:
    """What the step from here to full batches would still take off the noise."""
    return f"{100 * (1 - 1 / overhead):.0f} %"


def _batch_reason(choice: Choice) -> str:
    plan = choice.plan
    if plan.batch_size == plan.examples:
        return "all examples: the knee is beyond them."
    if choice.kind in (Kind.KNEE, Kind.MAXIMAL) and plan.batch_size == SMALLEST_BATCH and choice.knee < SMALLEST_BATCH:
        return "below it a larger batch costs next to nothing and lowers the noise."
    share = plan.batch_size / choice.knee
    of_knee = f"{share:.2g} times the knee of {choice.knee:,.0f} for {plan.steps} steps"
    if choice.kind is Kind.KNEE and choice.mode is not Mode.EPOCHS:
        return f"the knee, 2.17 N mu / sqrt(S) = {choice.knee:,.0f}."
    if choice.kind in (Kind.BALANCED, Kind.SMALL, Kind.LARGE):
        return f"what {choice.bound.said} leaves for {plan.steps} steps; {of_knee}."
    return f"{of_knee}."


def _steps_reason(choice: Choice) -> str:
    if choice.kind is Kind.GIVEN:
        return "as you asked, or the usual number where you left it open."
    if choice.kind is Kind.BALANCED:
        return "fewer steps would learn too little, more would leave batches so small that noise grows."
    if choice.mode is Mode.EPOCHS:
        return "S = (epochs / (kappa mu))^2, which puts r where this plan wants it."
    return "the usual number: noise summed over a run does not depend on it, and more steps would cost more."


def what_if(plan: Plan, *, mu: float) -> tuple[WhatIf, ...]:
    """What changes would do to the noise that reaches the model, ``nu / sqrt(S)``, by the closed form.

    Past the knee, compute buys next to nothing; data and epsilon buy in proportion (arXiv:2501.18914 sees the same).
    """
    base = _noise(plan, mu)
    total = gdp_mu(plan.epsilon, delta=plan.delta)

    def at(epsilon: float) -> float:
        return mu * gdp_mu(epsilon, delta=plan.delta) / total

    changes = {
        "epsilon halved": _noise(plan, at(plan.epsilon / 2)),
        "epsilon doubled": _noise(plan, at(2 * plan.epsilon)),
        "twice the examples": _noise(plan, mu, examples=2 * plan.examples),
        "half the examples": _noise(plan, mu, examples=max(plan.batch_size, plan.examples // 2)),
        "twice the compute, as batch": _noise(plan, mu, batch_size=min(plan.examples, 2 * plan.batch_size)),
        "twice the compute, as steps": _noise(plan, mu, steps=2 * plan.steps),
        "half the compute, as batch": _noise(plan, mu, batch_size=max(1, plan.batch_size // 2)),
    }
    found = [
        WhatIf(change=change, effect=f"{value / base:.2f} times the noise", factor=value / base)
        for change, value in changes.items()
    ]
    halved = step_mu(plan.sample_rate / 2, noise_multiplier=plan.noise_multiplier) * math.sqrt(plan.steps)
    scale = mu / (step_mu(plan.sample_rate, noise_multiplier=plan.noise_multiplier) * math.sqrt(plan.steps))
    epsilon = gdp_epsilon(halved * scale * total / mu, delta=plan.delta)
    found.append(
        WhatIf(
            change="twice the examples, the same noise",
            effect=f"epsilon {epsilon:.2f} instead of {plan.epsilon:g}",
            factor=epsilon / plan.epsilon,
        )
    )
    return tuple(found)


def _noise(
    plan: Plan, mu: float, *, examples: int | None = None, batch_size: int | None = None, steps: int | None = None
) -> float:
    """``nu / sqrt(S)`` of a plan like this one."""
    examples, batch_size, steps = examples or plan.examples, batch_size or plan.batch_size, steps or plan.steps
    sigma = seed_noise_multiplier(batch_size / examples, steps=steps, mu=mu)
    return sigma / batch_size / math.sqrt(steps)


def large_epsilon(epsilon: float) -> tuple[str, ...]:
    """A sentence about an epsilon above 10. An infinite one promises nothing, which is said in other places."""
    if not 10 < epsilon < math.inf:
        return ()
    return (f"epsilon {epsilon:g} promises little by itself; the usual range is 1 to 8.",)


def warnings_about(option: Option, *, machine: Machine | None) -> tuple[str, ...]:
    """What to know before relying on a plan."""
    plan, found = option.plan, []
    if option.overhead > 2:
        found.append(
            f"Beyond the wall: this batch needs {option.overhead:.1f} times the noise of full batches. More compute, "
            "fewer steps or more epsilon would each help at once."
        )
    elif plan.noise_multiplier < 1:
        found.append(
            f"Noise multiplier {plan.noise_multiplier:.2f} is below 1, where epsilon surges as batches shrink: trust "
            "the pld accountant only, and change the batch with care."
        )
    if option.signal is not None and option.signal < 1:
        found.append(
            f"In one step the noise is at least {1 / option.signal:.1f} times as long as the clipped mean gradient: "
            "learning rests on many steps, and a smaller model, or training a part of it, would be heard better."
        )
    found.extend(large_epsilon(plan.epsilon))
    if not option.fits:
        found.append("This plan does not keep the bound on compute.")
    if plan.examples < 1000:
        found.append(
            f"{plan.examples} examples are few: expect noise to dominate, and the result to differ between runs."
        )
    if machine is not None:
        found.append("Times are for the private updates alone: reading the data and evaluation come on top.")
    return tuple(found)
