"""make_private(): a model, an optimizer and data -> an iterator of private updates, or an unchanged training loop."""

from __future__ import annotations

import functools
import secrets
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from discreet.core.clipping import Clipping, ClippingKind
from discreet.core.gradient import LossFunction, trainable
from discreet.core.layout import carries
from discreet.core.world import world_size
from discreet.errors import CheckFailed, ConfigError
from discreet.privacy.compute import Machine
from discreet.privacy.plan import Plan
from discreet.privacy.verification import verify
from discreet.train.auto_lr import GradientNoise, LearningRate, RateControl
from discreet.train.check import CheckReport, check
from discreet.train.examples import BatchedDataset, Examples
from discreet.train.fetching import fetched_again, fetched_alone
from discreet.train.microbatches import MicrobatchLoader
from discreet.train.probing import find_rate
from discreet.train.run import Run
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
from discreet.train.tolerance import Verdict
from discreet.train.updates import Conclusion, Step, Updates, begin

CHECK_RANGE = 1e4
"""Numbers beyond it are brought to it before the self-check, and NaN and infinity to zero."""

Data = Dataset[Any] | BatchedDataset | DataLoader[Any]


class Private:
    """A model in private training. Iterate it, or use `loader` and `backward` in an unchanged loop; not both.

    Attributes:
        model: trained in place.
        plan: every number that determines the guarantee.
        check_report: the self-check that preceded the first update.
        loader: microbatches for an unchanged loop.
    """

    def __init__(
        self, updates: Updates, *, model: nn.Module, optimizer: torch.optim.Optimizer, check_report: CheckReport
    ) -> None:
        self.model = model
        self.plan = updates.plan
        self.check_report = check_report
        self.loader = MicrobatchLoader(updates)
        self._updates = updates
        self._run = updates.run
        self._gate(optimizer)

    @property
    def run(self) -> Run:
        """The run directory and its ledger."""
        return self._run

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        return self._run.path

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self._updates.done

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self._updates.last

    @property
    def earlier_seconds(self) -> float:
        """What earlier processes took for the updates from which a resumed run goes on; 0 in the first process."""
        return self._updates.earlier_seconds

    @property
    def verdict(self) -> Verdict | None:
        """Where an automatic learning rate comes from, in released numbers; None when the rate was given."""
        return self._updates.verdict

    def epsilon(self) -> float:
        """What the ledger says is spent: reservations included, so never less than the truth."""
        return self._run.ledger.epsilon()

    def report(self) -> str:
        """The guarantee in plain words, verified against the ledger. For a finished run."""
        return verify(self._run.path).statement

    def __iter__(self) -> Iterator[Step]:
        """One private update per iteration, until the plan's last; then the run is finished."""
        updates = self._updates
        while not updates.finished:
            find_rate(updates)
            if updates.finished:
                break
            index = updates.done
            step = updates.update(updates.clipped_sum(), index=index)
            if step is not None:
                yield step
                updates.checkpoint_if_due()
        updates.finish()

    def backward(self, losses: Tensor) -> None:
        """Clip and add the microbatch that `loader` gave out: the place of ``loss.backward()`` in an unchanged loop.

        Args:
            losses: one per example of that microbatch, shape (B,): those of the ``loss`` that was checked.

        Raises:
            CheckFailed: they are others (asked at updates 0, 1, 3, 7, ... of a process).
        """
        self.loader.settle(losses)

    def save(self) -> Path:
        """Write a checkpoint now, atomically; a later `make_private(..., resume=True)` goes on from it."""
        return self._updates.save()

    def finish(self) -> None:
        """End the run before the plan's last update: the model is saved, the key destroyed, what was spent certified.

        A run that is iterated to its end has finished by itself.

        **Guarantees.** Updates are charged in blocks, so the certificate may count a few more than were made, and none
        less. When to stop must follow from public or released figures: the guarantee does not cover a look at private
        ones.
        """
        self._updates.finish()

    def close(self) -> None:
        """Let go of the run without finishing it; it can be resumed."""
        self._run.close()

    def _gate(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace ``optimizer.step`` of this one object: only released gradients may move the weights.

        No hook: a pre-hook could not hold back the step of an unfinished batch. `update_wrapper` keeps the mark by
        which torch schedulers know that a step was taken; one that is made later looks for a method.
        """

        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> None:
            if closure is not None:
                raise ConfigError(
                    "optimizer.step(closure): it would evaluate private examples again; call step() alone."
                )
            if getattr(optimizer, "grad_scale", None) is not None:
                raise ConfigError(
                    "a GradScaler: released gradients carry no loss scale; train in bfloat16 or float32 without one."
                )
            total = self.loader.take()
            if total is not None:
                self._updates.update(total, index=self.loader.index)

        let_go = self._updates.hold_optimizer()

        def ungate() -> None:
            if not self._run.closed:
                raise ConfigError(
                    f"{type(optimizer).__name__}: is in private training in {self.run_dir} already; finish() or "
                    "close() that run first, or make another optimizer."
                )
            let_go()

        functools.update_wrapper(step, optimizer.step)
        step.ungate = ungate  # type: ignore[attr-defined]
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer._opt_called = True  # type: ignore[attr-defined]
        # Otherwise a GradScaler fails before it comes here, with an assertion that names no remedy.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


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
        microbatch: examples at a time; None: a default, halved when memory runs out. Never changes the result.
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
        _rehearse(step, examples.count, batch=the_plan.batch_size)
        if run is None:
            run = Run.create(
                Path(run_dir) if isinstance(run_dir, (str, Path)) else new_run_dir(), plan=the_plan, seed=seed
            )
            on_failure.callback(run.close)
        updates = begin(run, step, optimizer, rates, examples, checkpoint_steps=checkpoint_steps, conclude=conclude)
        run.write("check.json", report.released())
        on_failure.pop_all()
    return Private(updates, model=model, optimizer=optimizer, check_report=report)


def new_run_dir() -> Path:
    """A new directory below ``runs/``, named by the time in UTC and a random suffix."""
    return Path("runs") / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _measure(model: nn.Module, loss: LossFunction, examples: Examples, rule: Clipping, device: torch.device) -> Machine:
    """What an update costs here; of the first few examples, only shapes and types are used."""
    count = min(CHECK_EXAMPLES, examples.count)
    batch = examples.fetch(np.arange(count), device=device)
    return measure(model, loss=loss, batch=batch, clipping=rule)


def self_check(
    model: nn.Module, loss: LossFunction, examples: Examples, rule: Clipping, device: torch.device
) -> CheckReport:
    """Check a model, before it is trained under a clipping rule, on the first few examples; raises `CheckFailed`.

    Numbers that no computation survives are taken out first: a single row must not decide whether training starts.
    """
    count = min(CHECK_EXAMPLES, examples.count)
    batch = tree_map(_tame, examples.fetch(np.arange(count), device=device))
    if not any(carries(leaf, count) for leaf in tree_leaves(batch)):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in tree_leaves(batch)}))
        raise ConfigError(
            f"a batch of {count} examples without a tensor of {count} rows ({type(batch).__name__} of {kinds}): which "
            "part is whose cannot be told; give a collate function that stacks or pads them, (B, ...)."
        )
    compare = Clipping.automatic() if rule.kind is ClippingKind.NONE else rule
    report = check(model, loss, batch, clipping=compare, examples=count)
    report.raise_if_failed()
    again = fetched_again(examples, count=count, device=device)
    alone = not again or fetched_alone(model, loss, examples, count=count, device=device)
    report = report.with_data_set(again=again, alone=alone)
    report.raise_if_failed()
    return report


def _rehearse(step: ClippedStep, count: int, *, batch: int) -> None:
    """Ask of a microbatch as large as those of training what its updates ask, before anything is charged.

    Args:
        step: as it will be made. count: examples of the data set, from all over which they are. batch: expected size.

    Raises:
        CheckFailed: it would be refused in training.
    """
    size = min(batch, step.microbatch.size, count)
    try:
        step.ask_again(np.arange(size) * count // size, update=0)
    except CheckFailed as refusal:
        raise CheckFailed(
            f"the self-check on {size} examples failed, so no private training starts: {refusal}"
        ) from None


def _tame(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-CHECK_RANGE, CHECK_RANGE)


def _microbatch_size(asked: int | None, device: torch.device, most: int) -> int:
    # On an accelerator a whole realised batch is tried first.
    default = CPU_MICROBATCH if device.type == "cpu" else most
    return default if asked is None else asked
