"""Contestants take their steps in turn, each in a process of its own; medians of what each took.

Taking turns step by step (or by a tenth of a second, where a step is shorter), all contestants meet the same frequency,
temperature and neighbours of the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from bench.engine.contestants import BASELINE, BASELINE_OF, CONTESTANTS, Step
from bench.engine.stopwatch import MIB, MemoryMeter, Stopwatch
from bench.engine.workloads import Sizes

_WARM_UP = 2
_TURN_SECONDS = 0.1
_PAUSE_SECONDS = 0.05
"""Until the threads of the last contestant, which wait busily after their last operation, have gone to sleep."""


@dataclass(frozen=True)
class Setting:
    """What holds for every contestant of a run."""

    sizes: Sizes
    device: str
    dtype: torch.dtype
    threads: int
    rounds: int


@dataclass(frozen=True)
class Refusal:
    """Why a contestant has no figures."""

    reason: str


@dataclass(frozen=True)
class Figures:
    """What a contestant's step took: medians over the rounds, and the peak over all of them.

    Attributes:
        memory_mib: of the process, or of PyTorch's allocator on an accelerator.
        tensors_mib: of the tensors alone, without what the process's allocator and its caches hold besides.
        turns: milliseconds of a step in each turn. A machine that grows slower does so for all contestants of a turn:
            ratios are taken turn by turn.
    """

    milliseconds: float
    memory_mib: float
    tensors_mib: float
    phases: dict[str, float]
    turns: tuple[float, ...]


Outcome = Figures | Refusal


def measure(model: str, *, contestants: list[str], setting: Setting) -> dict[str, Outcome]:
    """The outcome of each contestant, in their order. All of them are in memory at once, and gone afterwards."""
    os.environ.update(OMP_NUM_THREADS=str(setting.threads), TORCHINDUCTOR_COMPILE_THREADS="1")
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for kind in contestants:
        pipes[kind], theirs = context.Pipe()
        process = context.Process(target=_contestant, args=(theirs, setting), kwargs={"model": model, "kind": kind})
        process.start()
        theirs.close()
        processes.append(process)
    seconds: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    outcomes: dict[str, Outcome] = {}
    for turn in range(_WARM_UP + setting.rounds):
        left = [kind for kind in contestants if kind not in outcomes]
        for kind in left if turn % 2 == 0 else reversed(left):  # nobody is always the first
            time.sleep(_PAUSE_SECONDS)
            answer = _ask(pipes[kind], True)
            if isinstance(answer, Refusal):
                outcomes[kind] = answer
                print(f"{model}: {kind} refused: {answer.reason}", file=sys.stderr)
            elif turn >= _WARM_UP:
                seconds[kind].append(answer)
            elif turn == 0:
                print(f"{model}: {kind} is ready", file=sys.stderr, flush=True)
    for kind in [kind for kind in contestants if kind not in outcomes]:
        peaks = _ask(pipes[kind], False)
        outcomes[kind] = peaks if isinstance(peaks, Refusal) else _figures(seconds[kind], peaks=peaks)
    for process in processes:
        process.join()
    return {kind: outcomes[kind] for kind in contestants}


def _ask(pipe: Connection, go_on: bool) -> Any:
    """The steps of a turn, or the peaks of memory at the end; a `Refusal` instead of either."""
    try:
        pipe.send(go_on)
        return pipe.recv()
    except (EOFError, ConnectionError):
        return Refusal("the process ended by itself; most often there was not enough memory.")


def _figures(turns: list[list[dict[str, float]]], *, peaks: dict[str, float]) -> Figures:
    steps = [step for turn in turns for step in turn]
    phases = {phase: 1e3 * statistics.median(step[phase] for step in steps) for phase in steps[0]}
    each = tuple(1e3 * statistics.median(sum(step.values()) for step in turn) for turn in turns)
    total = 1e3 * statistics.median(sum(step.values()) for step in steps)
    return Figures(milliseconds=total, phases=phases, turns=each, **peaks)


def _contestant(pipe: Connection, setting: Setting, *, model: str, kind: str) -> None:
    """The life of one process: prepare at the first call, take a step at each, answer with the peaks at the end."""
    try:
        _take_turns(pipe, setting, model=model, kind=kind)
    except EOFError:
        return  # the parent is gone, and nobody waits for an answer
    # Contestants include other people's libraries: whatever stops one is its result, and the others go on.
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines()
        pipe.send(Refusal(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"))


def _take_turns(pipe: Connection, setting: Setting, *, model: str, kind: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    device = torch.device(setting.device)
    _load_libraries(device)
    pipe.recv()
    with device:  # a billion random weights take a processor half a minute
        work = setting.sizes.workloads[model]()
    work = work.to(device=device, dtype=setting.dtype)
    meter, watch = MemoryMeter(device, tensors_mib=work.nbytes / MIB), Stopwatch(device)
    step = CONTESTANTS[kind](work)
    meter.restart()
    go_on = True
    while go_on:
        pipe.send(_turn(step, watch))
        go_on = pipe.recv()
    memory_mib = meter.peak_mib()
    pipe.send({"memory_mib": memory_mib, "tensors_mib": meter.tensors_mib(partial(_timed, step, watch))})


def _turn(step: Step, watch: Stopwatch) -> list[dict[str, float]]:
    """The phases of each step of a turn. Short steps are taken in a row, as in training, and the first is not counted.

    It finds the caches of the contestant before, and costs all of them milliseconds that no training loop pays.
    """
    until = time.perf_counter() + _TURN_SECONDS
    while True:
        _timed(step, watch)
        if time.perf_counter() >= until:
            steps = watch.turn()
            return steps[1:] or steps


def _timed(step: Step, watch: Stopwatch) -> None:
    watch.start()
    step(watch)


def _load_libraries(device: torch.device) -> None:
    """What PyTorch loads at its first step, and keeps, is none of the contestant's memory."""
    model = nn.Linear(2, 2, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 2, device=device)).sum().backward()
    optimizer.step()


def baseline_first(contestants: list[str], *, together: int) -> list[list[str]]:
    """Contestants in groups of at most ``together``, each with its baselines in front."""
    others = [kind for kind in contestants if kind != BASELINE]
    size = max(1, together - 1)
    groups = [others[start : start + size] for start in range(0, max(1, len(others)), size)]
    return [
        list(dict.fromkeys([BASELINE, *(BASELINE_OF[kind] for kind in group if kind in BASELINE_OF), *group]))
        for group in groups
    ]
