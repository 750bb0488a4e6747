"""Who competes: a rate that sets itself, one fixed rate, a grid that nobody may use in practice, and two others.

All but the first go through the same private step (clip, sum, noise, divide) without a ledger. Batches and noise of an
update are functions of the seed, and the same for all of them: what differs is the rate.
"""

from __future__ import annotations

import importlib
import math
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.auto_lr.tasks import Task
from discreet.core.clipping import Clipping
from discreet.core.gradient import trainable
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, seed_key, subkey
from discreet.privacy.plan import Plan
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.tuning import plan_search
from discreet.train.auto_lr import AutoLR, LearningRate, decay
from discreet.train.examples import Examples as Fetched
from discreet.train.make_private import make_private
from discreet.train.self_check import self_check
from discreet.train.step import ClippedStep, Microbatch, whole_batch, write_gradient
from discreet.train.stillness import Watch
from discreet.train.updates import Step

FIXED_RATE = 0.02
RATES = {"adam": (0.001, 0.003, 0.01, 0.02, 0.03, 0.06, 0.1), "sgdm": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}
PRIORS = (1e-4, 1e-2, 1.0)
SEARCH_RUNS = 10.0
TWINS = {f"grid:adam:{FIXED_RATE:g}:linear": "fixed"}
"""Settings of the grid that are another contestant."""

Parameters = Iterable[nn.Parameter]
Shape = Callable[[float], float]
SHAPES: dict[str, Shape] = {
    "linear": lambda passed: 1.0 - passed,
    "root": lambda passed: math.sqrt(1.0 - passed),
    "constant": lambda _: 1.0,
    "cosine": lambda passed: 0.5 * (1.0 + math.cos(math.pi * passed)),
}


@dataclass(frozen=True)
class Result:
    """One run: accuracy on held-out rows, the peak rate as known in the end, updates and those spent on probes."""

    accuracy: float
    rate: float
    updates: int
    probes: int = 0


def names() -> tuple[str, ...]:
    """All contestants; the settings of the grid are one each."""
    return (
        "auto",
        "auto-sgdm",
        *(f"auto-from-{prior:g}" for prior in PRIORS),
        "fixed",
        "fixed-root",
        "prodigy",
        "dadapt",
        *grid(),
        "search",
    )


def grid() -> tuple[str, ...]:
    """7 rates x 2 forms x 2 optimizers."""
    shapes = ("linear", "constant")
    return tuple(f"grid:{kind}:{rate:g}:{shape}" for kind in RATES for rate in RATES[kind] for shape in shapes)


def run(contestant: str, task: Task, epsilon: float, *, seed: int) -> Result:
    """One run at this epsilon.

    Raises:
        KeyError: no such contestant.
    """
    plan = task.plan(epsilon)
    if contestant == "auto":
        return _automatic(task, plan, AutoLR(), "adam", seed=seed)
    if contestant == "auto-sgdm":
        return _automatic(task, plan, AutoLR(), "sgdm", seed=seed)
    if contestant.startswith("auto-from-"):
        return _automatic(task, plan, AutoLR(prior=float(contestant.removeprefix("auto-from-"))), "adam", seed=seed)
    if contestant == "search":
        return _searched(task, plan, seed=seed)
    maker, shape = {
        "fixed": lambda: (_maker("adam", FIXED_RATE), "linear"),
        "fixed-root": lambda: (_maker("adam", FIXED_RATE), "root"),
        "prodigy": lambda: (_foreign("prodigyopt", "Prodigy"), "cosine"),
        "dadapt": lambda: (_foreign("dadaptation", "DAdaptAdam"), "cosine"),
    }.get(contestant, lambda: _of_grid(contestant))()
    return _plain(task, plan, maker, SHAPES[shape], seed=seed)


def _of_grid(contestant: str) -> tuple[Callable[[Parameters], torch.optim.Optimizer], str]:
    _, kind, rate, shape = contestant.split(":")
    return _maker(kind, float(rate)), shape


def _maker(kind: str, rate: float) -> Callable[[Parameters], torch.optim.Optimizer]:
    if kind == "adam":
        return lambda parameters: torch.optim.Adam(parameters, lr=rate)
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def _foreign(package: str, name: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    """Prodigy and D-Adaptation at the rate 1 that their authors advise, with a cosine over the run."""
    kind = getattr(importlib.import_module(package), name)
    return lambda parameters: kind(parameters, lr=1.0)


def _automatic(task: Task, plan: Plan, auto: AutoLR, kind: str, *, seed: int) -> Result:
    model = task.model(seed)
    steps = looped(task, plan, model, _maker(kind, 1.0)(trainable(model).values()), auto, seed=seed)
    peak = steps[-1].learning_rate / decay(steps[-1].index, plan.steps)
    return Result(task.accuracy(model), peak, plan.steps, probes=plan.steps - len(steps))


def looped(
    task: Task, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, rate: LearningRate, *, seed: int
) -> list[Step]:
    """Train by the library's loop; returns the updates that moved the weights."""
    with tempfile.TemporaryDirectory() as where:
        private = make_private(
            model,
            optimizer,
            task.train,
            loss=task.loss,
            plan=plan,
            learning_rate=rate,
            run_dir=Path(where) / "run",
            checkpoint_steps=plan.steps,
            seed=seed,
        )
        return list(private)


def _plain(
    task: Task,
    plan: Plan,
    maker: Callable[[Parameters], torch.optim.Optimizer],
    shape: Shape,
    *,
    seed: int,
) -> Result:
    model = task.model(seed)
    optimizer = maker(trainable(model).values())
    peak = float(optimizer.param_groups[0]["lr"])
    trained(task, plan, model, optimizer, shape, seed=seed)
    return Result(task.accuracy(model), peak, plan.steps)


def trained(
    task: Task, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, shape: Shape, *, seed: int
) -> None:
    """Train by bare steps: the batches, noise and updates of the loop, without a ledger."""
    peak = float(optimizer.param_groups[0]["lr"])
    key = seed_key(seed)
    source = NoiseSource.keyed(subkey(key, "noise for gradient"), private=False)
    step = _step(task, model, batch_size=plan.batch_size)
    for index in range(plan.steps):
        torch.manual_seed(seed * plan.steps + index)
        total = step.clipped_sum(plan.sampling.draw(key=subkey(key, "sampling"), step=index))
        released = release(
            total, noise_multiplier=plan.noise_multiplier, source=source, divisor=plan.batch_size, into=total.tensors
        )
        write_gradient(released, step.parameters)
        optimizer.param_groups[0]["lr"] = peak * shape(index / plan.steps)
        optimizer.step()


def _step(task: Task, model: nn.Module, *, batch_size: int) -> ClippedStep:
    fetched = Fetched(task.train)
    device = torch.device("cpu")
    clipping = Clipping.automatic()
    report = self_check(model, task.loss, fetched, clipping, device)
    return ClippedStep(
        model=model,
        loss=task.loss,
        fetch=lambda indices: fetched.fetch(indices, device=device),
        parameters=trainable(model),
        clipping=clipping,
        layout=report.layout,
        microbatch=Microbatch(512, batch=whole_batch(batch_size)),
        watch=Watch(model, report.allowed),
    )


def _searched(task: Task, plan: Plan, *, seed: int) -> Result:
    """The grid as somebody may use it: a random number of its settings, 10 expected, the best on the test rows.

    All of it keeps the plan's epsilon (`plan_search`), with a public score, which is more than the search may have.
    """
    searched = plan_search(
        examples=plan.examples,
        epsilon=plan.epsilon,
        delta=plan.delta,
        runs=SEARCH_RUNS,
        private_score=False,
        batch_size=plan.batch_size,
        steps=plan.steps,
    )
    one = Plan.solve(
        examples=plan.examples,
        batch_size=plan.batch_size,
        steps=plan.steps,
        noise_multiplier=searched.noise_multiplier,
        delta=plan.delta,
    )
    rng = random.Random(seed)
    count = Repetitions(Stopping.LOGARITHMIC, SEARCH_RUNS).runs(rng.random())
    found = [_plain_of(rng.choice(grid()), task, one, seed=seed + 1000 * turn) for turn in range(count)]
    return max(found, key=lambda result: result.accuracy)


def _plain_of(setting: str, task: Task, plan: Plan, *, seed: int) -> Result:
    maker, shape = _of_grid(setting)
    return _plain(task, plan, maker, SHAPES[shape], seed=seed)
