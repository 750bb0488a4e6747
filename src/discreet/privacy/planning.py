"""plan(): batch, steps and noise from examples, epsilon and compute, in three plans side by side. Numbers only.

The closed forms of `discreet.privacy.planner` choose batch and steps; the accountant then solves the noise of every
plan, and says by how much it exceeds that of full batches. *Cheap* (r = 1.5), *knee* (1.05) and *maximal* (1.02) differ
in what they pay for small batches. Where a bound on compute rules the knee out, a fourth plan uses up the bound as well
as it can, and is recommended.

Symbols: N examples; B expected batch; S steps; E = S B / N epochs; nu = sigma / B; mu GDP parameter left for training;
kappa(r), r(sigma) as in `discreet.privacy.planner`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.errors import ConfigError
from discreet.privacy.accounting import Accountant, Query, Relation, solve_noise_multiplier
from discreet.privacy.compute import Bound, Machine, parse_time
from discreet.privacy.explaining import Choice, reasons, warnings_about, what_if
from discreet.privacy.options import Kind, Mode, Option, Proposal
from discreet.privacy.plan import DEFAULT_CLIPPING, Plan, default_delta
from discreet.privacy.planner import (
    FEWEST_BOUND_STEPS,
    KNEE_OVERHEAD,
    balance,
    choose_sizes,
    default_bound,
    default_steps,
    knee_batch,
    knee_noise_multiplier,
    mu_for_training,
    wanted_batch,
)

CHEAP_OVERHEAD = 1.5
MAXIMAL_OVERHEAD = 1.02
WALL_OVERHEAD = 2.0
"""The wall: below the batch at which noise is twice its floor, epsilon surges when the batch shrinks further."""

_OVERHEADS = {
    Kind.CHEAP: CHEAP_OVERHEAD,
    Kind.SMALL: CHEAP_OVERHEAD,
    Kind.KNEE: KNEE_OVERHEAD,
    Kind.MAXIMAL: MAXIMAL_OVERHEAD,
    Kind.LARGE: MAXIMAL_OVERHEAD,
}
_MORE_STEPS = 4
"""With fixed epochs, S may be up to so many times the usual: more of them cost nothing but each step's overhead."""

Sizes = dict[Kind, tuple[int, int]]


def plan(
    *,
    examples: int,
    epsilon: float,
    delta: float | None = None,
    compute: str | None = None,
    samples: int | None = None,
    money: float | None = None,
    price_per_hour: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    machine: Machine | None = None,
    usual_steps: int | None = None,
    relation: Relation = Relation.ADD_REMOVE,
    accountant: Accountant = Accountant.PLD,
    clipping: Mapping[str, str | float] = DEFAULT_CLIPPING,
    before: tuple[Query, ...] = (),
    notes: tuple[str, ...] = (),
) -> Proposal:
    """Plans for (examples, epsilon, delta) within a bound on compute. Exported as `discreet.plan`.

    **Guarantees.** Every plan's epsilon, by the accountant, is at most ``epsilon``. Nothing here depends on an example.

    Args:
        examples: N, public, at least 2. epsilon: finite target. delta: None is ``1 / N^1.1``; below 1 / N.
        compute: time, "90s", "5m", "2h"; needs a ``machine``. samples: examples processed in all. money: what may be
            spent, with ``price_per_hour``; needs a ``machine``. epochs: passes over the data, as many in every plan. At
            most one of the four; none is the default limit of 60 passes.
        steps, batch_size: kept where they are given.
        machine: `discreet.measure(...)`, or `Machine.told(examples_per_second)`.
        usual_steps: S when nothing speaks against it; None is `default_steps`.
        relation, accountant, clipping, before, notes: as in `Plan`.

    Raises:
        ConfigError: an argument is outside its range, or the bound allows no plan.
        BudgetExceeded: ``before`` alone spends ``epsilon`` or more.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError(
            f"epsilon={epsilon}: must be finite and above 0 to be planned; the usual range is 1 to 8, and epsilon=inf "
            "has no noise to weigh."
        )
    terms = Terms(
        examples=examples,
        epsilon=epsilon,
        delta=checked_delta(delta, examples=examples),
        relation=relation,
        accountant=accountant,
        clipping=dict(clipping),
        before=before,
        notes=notes,
    )
    mode, bound = bound_of(
        examples,
        compute=compute,
        samples=samples,
        money=money,
        price_per_hour=price_per_hour,
        epochs=epochs,
        machine=machine,
    )
    mu = mu_for_training(epsilon, delta=terms.delta, relation=relation, before=before)
    usual = usual_steps if usual_steps is not None else default_steps(examples)
    if mode is Mode.EPOCHS and steps is None and batch_size is None:
        sizes = _sizes_of_epochs(examples, mu=mu, bound=bound, most_steps=_MORE_STEPS * usual)
    else:
        sizes = _sizes(examples, mu=mu, bound=bound, steps=steps, batch_size=batch_size, usual=usual)
    options = tuple(
        _option(terms, kind, batch, count, mu=mu, mode=mode, bound=bound, machine=machine, price=price_per_hour)
        for kind, (batch, count) in sizes.items()
    )
    recommended = _pick(options)
    return Proposal(
        options=options,
        recommended=recommended,
        mode=mode,
        bound=bound,
        mu=mu,
        machine=machine,
        what_if=what_if(recommended.plan, mu=mu),
        warnings=warnings_about(recommended, machine=machine),
    )


@dataclass(frozen=True)
class Terms:
    """What all plans of a proposal share: everything but batch, steps and noise. See `Plan`."""

    examples: int
    epsilon: float
    delta: float
    relation: Relation
    accountant: Accountant
    clipping: Mapping[str, str | float]
    before: tuple[Query, ...]
    notes: tuple[str, ...]

    def solve(self, *, batch_size: int, steps: int) -> Plan:
        """The plan of these sizes."""
        return Plan.solve(
            examples=self.examples,
            batch_size=batch_size,
            steps=steps,
            epsilon=self.epsilon,
            delta=self.delta,
            relation=self.relation,
            accountant=self.accountant,
            clipping=self.clipping,
            before=self.before,
            notes=self.notes,
        )

    def full_batch_noise(self, steps: int) -> float:
        """sigma of so many steps on all examples: the floor of the noise, nu_min = sigma / N."""
        return solve_noise_multiplier(
            sample_rate=1.0,
            steps=steps,
            epsilon=self.epsilon,
            delta=self.delta,
            before=self.before,
            relation=self.relation,
            accountant=self.accountant,
        )


def checked_delta(delta: float | None, *, examples: int) -> float:
    """Delta, or its default.

    Raises:
        ConfigError: it is not above 0, or not below 1 / N.
    """
    if delta is None:
        return default_delta(examples)
    if not 0 < delta < 1 / examples:
        raise ConfigError(
            f"delta={delta}: must be above 0 and below 1 / examples = {1 / examples:.3g}, where publishing a random "
            f"row would pass; leave it out for {default_delta(examples):.3g}."
        )
    return delta


def bound_of(
    examples: int,
    *,
    compute: str | None = None,
    samples: int | None = None,
    money: float | None = None,
    price_per_hour: float | None = None,
    epochs: float | None = None,
    machine: Machine | None = None,
) -> tuple[Mode, Bound]:
    """The bound that was given, in examples.

    Raises:
        ConfigError: more than one was given, one is not above 0, or a time on a machine of which nothing is known.
    """
    given = {"compute": compute, "samples": samples, "money": money, "epochs": epochs}
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"{', '.join(named)}: bound the compute in one way only; keep the tightest.")
    for name, value in {"samples": samples, "money": money, "price_per_hour": price_per_hour, "epochs": epochs}.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name}={value}: must be finite and above 0; leave it out for no such bound.")
    if samples is not None:
        return Mode.BOUNDED, Bound(samples=samples, said=f"{samples:,} examples")
    if epochs is not None:
        return Mode.EPOCHS, Bound(samples=epochs * examples, said=f"{epochs:g} passes over the data")
    if compute is None and money is None:
        return Mode.FREE, default_bound(examples)
    if money is not None and price_per_hour is None:
        raise ConfigError(f"money={money} without price_per_hour: give what an hour of the machine costs.")
    seconds = parse_time(compute) if compute is not None else (money or 0.0) / (price_per_hour or 1.0) * 3600.0
    said = compute if compute is not None else f"{money:g} at {price_per_hour:g} an hour"
    if machine is None:
        raise ConfigError(
            f"compute={said}: what fits into it depends on the model; plan from a data file, measure the model with "
            "discreet.measure(), or tell the throughput."
        )
    speed = f"{said}, {machine.throughput:,.0f} examples a second ({machine.place})"
    return Mode.BOUNDED, Bound(samples=machine.samples_in(seconds), overhead=machine.overhead, said=speed)


def _sizes(examples: int, *, mu: float, bound: Bound, steps: int | None, batch_size: int | None, usual: int) -> Sizes:
    """Cheap, knee and maximal for one number of steps; and what is recommended, if it is none of them."""
    batch, count = choose_sizes(examples, mu=mu, bound=bound, batch_size=batch_size, steps=steps, usual_steps=usual)
    if batch_size is not None and not bound.admits(batch_size=batch, steps=count) and steps is not None:
        raise ConfigError(
            f"batch_size={batch} and steps={count}: {batch * count:,} examples are more than {bound.said} allows; "
            "lower one of them, or raise the bound."
        )
    at = count if steps is not None or batch_size is not None else usual
    cheap = max(1, min(examples, round(knee_batch(examples=examples, mu=mu, steps=at, overhead=CHEAP_OVERHEAD))))
    found: Sizes = {
        Kind.CHEAP: (cheap, at),
        Kind.KNEE: (wanted_batch(examples, mu=mu, steps=at), at),
        Kind.MAXIMAL: (wanted_batch(examples, mu=mu, steps=at, overhead=MAXIMAL_OVERHEAD), at),
    }
    if batch_size is not None:
        return {Kind.GIVEN: (batch, count), **found}
    if (batch, count) != found[Kind.KNEE]:
        return {Kind.CHEAP: found.pop(Kind.CHEAP), Kind.BALANCED: (batch, count), **found}
    return found


def _sizes_of_epochs(examples: int, *, mu: float, bound: Bound, most_steps: int) -> Sizes:
    """The points of r = 1.5, 1.05 and 1.02 on the line S B = E N, ``S = (E / (kappa(r) mu))^2``, and the balance."""
    epochs = bound.samples / examples
    found: Sizes = {}
    for kind in (Kind.SMALL, Kind.KNEE, Kind.LARGE):
        kappa = knee_noise_multiplier(_OVERHEADS[kind]) / _OVERHEADS[kind]
        steps = max(math.ceil(epochs), FEWEST_BOUND_STEPS, round((epochs / (kappa * mu)) ** 2))
        steps = min(steps, max(1, math.floor(bound.samples)))
        found[kind] = (max(1, min(examples, round(bound.samples / steps))), steps)
    balanced = balance(examples, mu=mu, bound=bound, most_steps=max(most_steps, math.ceil(epochs)), use_all=True)
    return {Kind.SMALL: found.pop(Kind.SMALL), Kind.BALANCED: balanced, **found}


def _pick(options: tuple[Option, ...]) -> Option:
    """The one to recommend: what was asked for, else what uses up the bound, else the knee."""
    by_kind = {option.kind: option for option in options}
    for kind in (Kind.GIVEN, Kind.BALANCED, Kind.KNEE):
        if kind in by_kind:
            return by_kind[kind]
    raise AssertionError("a proposal always has a knee")


def _option(
    terms: Terms,
    kind: Kind,
    batch_size: int,
    steps: int,
    *,
    mu: float,
    mode: Mode,
    bound: Bound,
    machine: Machine | None,
    price: float | None,
) -> Option:
    solved = terms.solve(batch_size=batch_size, steps=steps)
    nu = solved.noise_multiplier / batch_size
    seconds = None
    microbatch = None
    if machine is not None:
        microbatch = machine.microbatch(batch_size, examples=terms.examples)
        seconds = machine.seconds(batch_size=batch_size, steps=steps, examples=terms.examples)
    wall = knee_batch(examples=terms.examples, mu=mu, steps=steps, overhead=WALL_OVERHEAD)
    knee = knee_batch(examples=terms.examples, mu=mu, steps=steps)
    overhead = nu / (terms.full_batch_noise(steps) / terms.examples)
    choice = Choice(kind=kind, plan=solved, overhead=overhead, knee=knee, mode=mode, bound=bound, microbatch=microbatch)
    return Option(
        kind=kind,
        plan=solved,
        overhead=overhead,
        knee_share=batch_size / knee,
        wall_share=batch_size / wall,
        epochs=steps * batch_size / terms.examples,
        signal=1.0 / (nu * math.sqrt(machine.parameters)) if machine is not None and machine.parameters else None,
        seconds=seconds,
        microbatch=microbatch,
        peak_bytes=machine.peak_bytes(batch_size, examples=terms.examples) if machine is not None else None,
        cost=seconds / 3600.0 * price if seconds is not None and price is not None else None,
        cumulative=nu / math.sqrt(steps),
        fits=mode is Mode.EPOCHS or bound.admits(batch_size=batch_size, steps=steps),
        reasons=reasons(choice),
    )
