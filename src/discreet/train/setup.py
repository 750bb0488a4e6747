"""What training settles before anything is written: which run, which parameters, which plan, which clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from discreet.core.clipping import Clipping, ClippingKind
from discreet.core.gradient import LossFunction, trainable
from discreet.core.replay import Replay
from discreet.core.style import Style
from discreet.errors import ConfigError
from discreet.privacy.compute import Machine, parse_time
from discreet.privacy.plan import Plan
from discreet.privacy.planner import plan as make_plan
from discreet.privacy.planning import bound_of
from discreet.train.auto_lr import needs_arguments
from discreet.train.check import CheckReport
from discreet.train.run import Run
from discreet.train.step import refuse_unmoved, refuse_unreleased
from discreet.train.tempered import Tempered, tempered_clipping


def refuse_half_an_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse several optimizers, and wrappers around one whose steps torch lets nobody watch.

    Raises:
        ConfigError: it has no hooks, as where a wrapper never calls ``super().__init__()``.
    """
    try:
        optimizer.register_step_pre_hook(_nothing).remove()
    except AttributeError:
        raise ConfigError(
            f"{type(optimizer).__name__}: must be one torch.optim.Optimizer that is made by its __init__; put several "
            "into one, as its groups, and of a wrapper (Lookahead) pass the optimizer inside, and step the wrapper."
        ) from None


def _nothing(*_: object) -> None:
    """Waits for a step, for a moment."""


def covered_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The trainable parameters, which must be exactly those that the optimizer moves."""
    parameters = trainable(model)
    places = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(places) > 1 or places[0].startswith("mps"):
        raise ConfigError(
            f"trainable parameters on {', '.join(places)}: must be on one device, where norms are added up, and not on "
            "mps, which has no float64; move the model to one GPU or to the CPU."
        )
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if needs_arguments(type(optimizer).step):
        raise ConfigError(
            f"{type(optimizer).__name__}: its step needs a closure, which would evaluate private examples again; use "
            "an optimizer that moves by the gradient alone."
        )
    if isinstance(optimizer, torch.optim.SparseAdam) or any(g.get("differentiable") for g in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__}: must take the dense gradients that are released, and not be differentiated "
            "through (differentiable=True); use Adam as it comes."
        )
    refuse_unmoved(optimizer, parameters)
    if moved - {id(parameter) for parameter in model.parameters()}:
        raise ConfigError("the optimizer holds a parameter that is not in the model; make it from model.parameters().")
    refuse_unreleased(optimizer, parameters)
    return parameters


def solve_plan(
    count: int,
    *,
    epsilon: float | None,
    delta: float | None,
    noise_multiplier: float | None,
    batch_size: int | None,
    steps: int | None,
    compute: str | None,
    machine: Callable[[Clipping], Machine],
    clipping: Clipping | None,
) -> Plan:
    """A plan from what the caller gave; the planner fills in the rest.

    Args:
        count: N. compute: the time that training may take, as in "5m". machine: measures the model; called only when
            there is a time. The others: as in `make_private`.

    Raises:
        ConfigError: not exactly one of epsilon and noise_multiplier, sigma without the sizes that it is for, or a bound
            on compute when nothing is left to choose.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError(
            f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: pass exactly one of them, or a plan."
        )
    rule = clipping if clipping is not None else default_clipping(epsilon)
    if compute is not None and batch_size is not None and steps is not None:
        raise ConfigError(
            f"compute={compute} with batch_size and steps: leaves nothing to choose; leave one of them out."
        )
    if noise_multiplier is not None:
        if batch_size is None or steps is None:
            raise ConfigError("noise_multiplier without batch_size and steps: pass all three, or epsilon alone.")
        return Plan.solve(
            examples=count,
            batch_size=batch_size,
            steps=steps,
            noise_multiplier=noise_multiplier,
            delta=delta,
            clipping=rule.describe(),
        )
    assert epsilon is not None
    bound = None
    if compute is not None:
        parse_time(compute)
        bound = bound_of(count, compute=compute, machine=machine(rule))[1]
    return make_plan(
        examples=count,
        epsilon=epsilon,
        delta=delta,
        batch_size=batch_size,
        steps=steps,
        bound=bound,
        clipping=rule.describe(),
        notes=() if bound is None else (f"compute: {bound.said}",),
    )


def rule_for(model: nn.Module, clipping: Clipping | None, *, epsilon: float | None, examples: int) -> Clipping | None:
    """What the caller asked for; for a `Tempered` model that is to be private, what its temperature needs."""
    if clipping is None and isinstance(model, Tempered) and epsilon != float("inf"):
        return tempered_clipping(examples)
    return clipping


def default_clipping(epsilon: float | None) -> Clipping:
    """Automatic clipping; none when there is to be no guarantee."""
    return Clipping.none() if epsilon == float("inf") else Clipping.automatic()


def clipping_of(plan: Plan) -> Clipping:
    """The clipping rule that a plan's public record stands for.

    Raises:
        ConfigError: it stands for none, or says more than the rule that training would follow.
    """
    record = dict(plan.clipping)
    try:
        rule = _rule_of(record)
    except KeyError as error:
        raise ConfigError(f"clipping {record} in the plan: has no {error}; take it from Clipping.describe().") from None
    except ValueError as error:
        raise ConfigError(f"clipping {record} in the plan: {error}") from None
    if rule.describe() != record:
        raise ConfigError(f"clipping {record} in the plan: must be {rule.describe()}, as Clipping.describe() gives it.")
    return rule


def _rule_of(record: Mapping[str, str | float]) -> Clipping:
    kind, style = ClippingKind(record["kind"]), Style.parse(str(record["style"]))
    if kind is ClippingKind.AUTOMATIC:
        return Clipping.automatic(gamma=float(record["gamma"]), style=style)
    if kind is ClippingKind.NORMALIZED:
        return Clipping.normalized(style=style)
    if kind is ClippingKind.PSAC:
        return Clipping.psac(float(record["r"]), style=style)
    if kind is ClippingKind.ABADI:
        return Clipping.abadi(float(record["clip_bound"]), style=style)
    if kind is ClippingKind.GLOBAL:
        return Clipping.global_(float(record["clip_bound"]), style=style)
    if kind is ClippingKind.QUANTILE:
        return Clipping.quantile(
            float(record["quantile"]),
            clip_bound=float(record["clip_bound"]),
            rate=float(record["rate"]),
            count_share=float(record["count_share"]),
            style=style,
        )
    return Clipping.none()


def replay_of(model: nn.Module, loss: LossFunction, clipping: Clipping, report: CheckReport) -> Replay:
    """The clipped sums of a run, recorded once and replayed.

    Raises:
        ConfigError: they cannot be, or a forward moves a buffer, which a replay would move on its own.
    """
    if report.allowed.moving:
        raise ConfigError(
            f"replay=True with {', '.join(report.allowed.moving)}, which every forward moves: take it out of the "
            "model, or leave replay out."
        )
    assert report.layout is not None
    return Replay(model, loss, clipping=clipping, layout=report.layout)


def existing_run(run_dir: str | Path | Run | None, *, resume: bool, seed: int | None) -> Run | None:
    """The run that the caller holds or wants to resume; None when a new one is to be made."""
    if isinstance(run_dir, Run):
        if seed is not None or resume:
            raise ConfigError(
                f"{'seed' if seed is not None else 'resume'} beside a Run: it has its key and its past already; give "
                "them to Run.create or Run.resume."
            )
        return run_dir
    if not resume:
        return None
    if run_dir is None:
        raise ConfigError("resume=True without run_dir: name the run directory to continue.")
    return Run.resume(Path(run_dir), seed=seed)


def check_same(asked: Mapping[str, tuple[object, object]]) -> None:
    """A run keeps its plan: what is asked for now and differs from it is refused, and not ignored.

    Args:
        asked: name -> (what is asked for now, what the plan says); None leaves it to the plan.
    """
    for name, (now, planned) in asked.items():
        if now is not None and now != planned:
            raise ConfigError(f"{name}: {now} now, {planned} in the plan of this run; resume with the same options.")


def check_plan(plan: Plan, *, clipping: Clipping | None, examples: int) -> None:
    """Refuse data or clipping that a plan, perhaps from an earlier process, was not made for."""
    if plan.search is not None:
        raise ConfigError("the plan is that of a search: its steps are repeated; pass it to tune(), or plan one run.")
    check_examples(plan, clipping=clipping, examples=examples)


def check_examples(plan: Plan, *, clipping: Clipping | None, examples: int) -> None:
    """Refuse another number of examples, or another clipping rule, than a plan says."""
    if plan.examples != examples:
        raise ConfigError(
            f"{examples} examples in the data set, {plan.examples} in the plan: N is public and fixed; make a "
            "plan for this data."
        )
    if clipping is not None and clipping.describe() != dict(plan.clipping):
        raise ConfigError(f"clipping {clipping.describe()}: the plan says {dict(plan.clipping)}; pass the same rule.")
