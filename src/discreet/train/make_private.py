"""make_private(): a model, an optimizer and data -> a `Private`; train(): the same with nothing to get wrong."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction, trainable
from discreet.core.world import world_size
from discreet.errors import ConfigError
from discreet.privacy.compute import Machine
from discreet.privacy.plan import Plan
from discreet.train.auto_lr import GradientNoise, LearningRate, RateControl
from discreet.train.examples import Data, Examples
from discreet.train.loop import Private
from discreet.train.run import Run
from discreet.train.run_directory import new_run_dir
from discreet.train.self_check import rehearse, self_check
from discreet.train.setup import (
    check_plan,
    check_same,
    clipping_of,
    covered_parameters,
    existing_run,
    refuse_half_an_optimizer,
    replay_of,
    rule_for,
    solve_plan,
)
from discreet.train.step import ClippedStep, Microbatch, whole_batch
from discreet.train.stillness import Watch
from discreet.train.tempered import check_tempered
from discreet.train.throughput import CHECK_EXAMPLES, CPU_MICROBATCH, measure
from discreet.train.updates import Conclusion, begin


@dataclass(frozen=True)
class Result:
    """What `train` returns. Released or public, all of it."""

    model: nn.Module
    plan: Plan
    epsilon: float
    run_dir: Path


def train(
    model: nn.Module,
    dataset: Data,
    *,
    loss: LossFunction,
    epsilon: float,
    delta: float | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    compute: str | None = None,
    learning_rate: LearningRate = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Train privately with nothing to get wrong: Adam, automatic clipping, planned batch, steps and noise.

    The arguments and guarantees are those of `make_private`.
    """
    private = make_private(
        model,
        torch.optim.Adam(trainable(model).values()),
        dataset,
        loss=loss,
        epsilon=epsilon,
        delta=delta,
        batch_size=batch_size,
        steps=steps,
        compute=compute,
        learning_rate=learning_rate,
        run_dir=run_dir,
        resume=resume,
    )
    for _ in private:
        pass
    return Result(model=model, plan=private.plan, epsilon=private.plan.spent(), run_dir=private.run_dir)


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Data,
    *,
    loss: LossFunction,
    epsilon: float | None = None,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    plan: Plan | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    compute: str | None = None,
    clipping: Clipping | None = None,
    learning_rate: LearningRate = "auto",
    microbatch: int | None = None,
    replay: bool = False,
    run_dir: str | Path | Run | None = None,
    resume: bool = False,
    checkpoint_steps: int = 50,
    conclude: Conclusion | None = None,
    seed: int | None = None,
) -> Private:
    """Set up private training.

    **Guarantees.** Everything under ``run_dir/release``, and every attribute of the steps, is together (epsilon,
    delta)-DP with respect to adding or removing one example of ``dataset``, as `verify` re-derives from the ledger.
    Training stops before the step that would pass the budget. N, the expected batch size and the model's structure are
    public.

    Args:
        model: trained in place; every parameter with ``requires_grad`` is covered and gets noise at every update.
        optimizer: any torch optimizer over exactly these parameters.
        dataset: map-style, or a DataLoader around one (its data set and collate function are used).
        loss: ``loss(model, batch) -> Tensor`` of shape (B,), one loss per example.
        epsilon: the target. ``math.inf``: no noise and no clipping, NOT PRIVATE.
        delta: None is 1 / N^1.1.
        noise_multiplier: sigma, instead of epsilon.
        plan: instead of epsilon, delta, noise_multiplier, batch_size and steps.
        batch_size: expected batch; None: the planner chooses.
        steps: updates; None: the planner chooses.
        compute: the time that the updates may take, "90s", "5m", "2h"; the planner then measures the model for a few
            seconds, on random numbers of the data's shapes, and chooses within it. Reading the data comes on top.
        clipping: None: automatic, or for a `Tempered` model the rule that keeps its probabilities right.
        learning_rate: "auto" or an `AutoLR`: found by a few private probes, which are updates of the plan; a peak rate
            with linear decay; a torch scheduler; or None for the optimizer's own.
        microbatch: examples at a time; None: a default, halved when memory runs out. Changes the
            result by rounding alone, and by what is taken off each share for that: ``(256 + size) 2^-23`` of it.
        replay: record a microbatch's launches once and replay them (CUDA graphs), where steps wait for Python. What a
            forward decides in Python is then decided once: not for random numbers of Python, counters, schedules.
        run_dir: where ledger, checkpoints and release go; None: a new directory below ``runs/``.
        resume: continue the run in ``run_dir``. It keeps its plan; what is asked for and differs from it is refused.
        checkpoint_steps: updates between checkpoints.
        conclude: called with run and model after the last update, while the run is still open. Whatever it releases of
            private examples must be reserved in the run's ledger before; see `discreet.insight.calibration`.
        seed: test mode: reproducible noise; every artefact is stamped NOT PRIVATE.

    Raises:
        ConfigError: contradictory or impossible arguments.
        CheckFailed: the self-check found that the guarantee would not hold for this model and loss.
        BudgetExceeded: a resumed run whose budget is spent.
    """
    if world_size() > 1:
        raise ConfigError(f"{world_size()} ranks: training across ranks is not supported yet; run one process.")
    if checkpoint_steps < 1:
        raise ConfigError(f"checkpoint_steps={checkpoint_steps}: must be at least 1; the default is 50.")
    refuse_half_an_optimizer(optimizer)
    # Of an earlier run, as when the cell of a notebook is run again.
    ungate = getattr(optimizer.step, "ungate", None)
    if ungate is not None:
        ungate()
    examples = Examples(dataset)
    parameters = covered_parameters(model, optimizer)
    device = next(iter(parameters.values())).device

    def new_plan() -> Plan:
        if plan is not None:
            given = {"epsilon": epsilon, "delta": delta, "noise_multiplier": noise_multiplier}
            given |= {"batch_size": batch_size, "steps": steps, "compute": compute}
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(f"{name}={value} with a plan: the plan says it already; pass one of the two.")
            return plan
        return solve_plan(
            examples.count,
            epsilon=epsilon,
            delta=delta,
            noise_multiplier=noise_multiplier,
            batch_size=batch_size,
            steps=steps,
            compute=compute,
            machine=lambda rule: _measure(model, loss, examples, rule, device),
            clipping=rule_for(model, clipping, epsilon=epsilon, examples=examples.count),
        )

    run = existing_run(run_dir, resume=resume, seed=seed)
    with ExitStack() as on_failure:
        if run is not None and run is not run_dir:
            on_failure.callback(run.close)
        if run is not None:
            asked = {"epsilon": epsilon, "delta": delta, "noise_multiplier": noise_multiplier}
            asked |= {"batch_size": batch_size, "steps": steps}
            check_same({name: (value, getattr(run.plan, name)) for name, value in asked.items()})
            check_same({"plan": (None if plan is None else plan.fingerprint(), run.plan.fingerprint())})
        the_plan = run.plan if run is not None else new_plan()
        check_plan(the_plan, clipping=clipping, examples=examples.count)
        rule = clipping_of(the_plan)
        check_tempered(model, rule)
        division = rule.divide(parameters)
        even = parameters.keys().isdisjoint(division.noise_weights)
        if the_plan.noise_multiplier > 0 and division.sensitivity == math.inf:
            raise ConfigError(
                f"clipping {rule.kind.value!r} with noise multiplier {the_plan.noise_multiplier:.4g}: a sum without a "
                "bound is protected by no noise; use Clipping.automatic()."
            )
        noise = GradientNoise(the_plan.noise_multiplier, the_plan.batch_size, division.sensitivity, even)
        rates = RateControl(optimizer, learning_rate, steps=the_plan.steps, noise=noise)
        most = whole_batch(the_plan.batch_size)
        size = Microbatch(_microbatch_size(microbatch, device, most), batch=most)
        report = self_check(model, loss, examples, rule, device)
        recorded = replay_of(model, loss, rule, report) if replay else None
        step = ClippedStep(
            model=model,
            loss=loss,
            fetch=lambda indices: examples.fetch(indices, device=device),
            parameters=parameters,
            clipping=rule,
            layout=report.layout,
            microbatch=size,
            watch=Watch(model, report.allowed),
            made_up=examples.made_up(device=device) if report.allowed.moving else None,
            replay=recorded,
        )
        rehearse(step, examples.count, batch=the_plan.batch_size)
        if run is None:
            run = Run.create(
                Path(run_dir) if isinstance(run_dir, (str, Path)) else new_run_dir(), plan=the_plan, seed=seed
            )
            on_failure.callback(run.close)
        updates = begin(run, step, optimizer, rates, examples, checkpoint_steps=checkpoint_steps, conclude=conclude)
        run.write("check.json", report.released())
        on_failure.pop_all()
    return Private(updates, model=model, optimizer=optimizer, check_report=report)


def _measure(model: nn.Module, loss: LossFunction, examples: Examples, rule: Clipping, device: torch.device) -> Machine:
    """What an update costs here; of the first few examples, only shapes and types are used."""
    count = min(CHECK_EXAMPLES, examples.count)
    batch = examples.fetch(np.arange(count), device=device)
    return measure(model, loss=loss, batch=batch, clipping=rule)


def _microbatch_size(asked: int | None, device: torch.device, most: int) -> int:
    # On an accelerator a whole realised batch is tried first.
    default = CPU_MICROBATCH if device.type == "cpu" else most
    return default if asked is None else asked
