"""measure(): what a private update of a model costs on this machine, in a few seconds and on no example.

The real private step runs on random numbers of the right shapes, at a small and at a large microbatch. The slope
between them is the cost of an example, the intercept that of a microbatch, and noise and optimizer are timed apart.
Weights, buffers, gradients and the caller's random state stay as they are.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from discreet.core.axes import Layout
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import LossFunction, batch_size_of, clipped_gradient, trainable
from discreet.core.noise import release
from discreet.core.replay import is_out_of_memory
from discreet.core.rng import NoiseSource
from discreet.core.seeded import cuda_indices
from discreet.privacy.compute import Machine
from discreet.train.check import check
from discreet.train.examples import made_up
from discreet.train.step import write_gradient

CPU_MICROBATCH = 512
"""On a CPU larger microbatches only leave the cache."""
GPU_MICROBATCH = 4096
"""The largest microbatch that is tried on an accelerator."""

CHECK_EXAMPLES = 4
_SMALL = 16
_REPEATS = 5
_SECONDS = 1.5
"""One large microbatch may take this long; else it is made smaller."""
_SEED = 20_778
UNMEASURED = 1.15
"""Drawing and fetching batches, journal, ledger and checkpoints come on top of what is timed: 5 % for images, 20 % for
a small model of tables (docs/lab-notes.md)."""
_STATUS, _CLEAR, _FREE = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


def measure(model: nn.Module, *, loss: LossFunction, batch: Any, clipping: Clipping | None = None) -> Machine:
    """Time and memory of private updates of this model, where it lies.

    **Guarantees.** No value of ``batch`` reaches the model: its floating point tensors are replaced by random numbers
    and all others by zeros, so what is measured depends on shapes alone. Time depends on them too: lookups of one
    repeated index can be faster than lookups of many.

    Args:
        model: as it will be trained, on the device on which it will be.
        loss: ``loss(model, batch) -> Tensor`` of shape (B,).
        batch: a few examples, at least one, of the shapes that training will see.
        clipping: automatic by default.

    Raises:
        CheckFailed: the model cannot be trained privately as it is. UnsupportedUse: likewise.
    """
    with _own_randomness(model):
        return measure_stand_ins(model, loss=loss, batch=made_up(batch), clipping=clipping)


def measure_stand_ins(model: nn.Module, *, loss: LossFunction, batch: Any, clipping: Clipping | None = None) -> Machine:
    """`measure`, on a batch that holds no example: it is used as it stands."""
    rule = clipping if clipping is not None else Clipping.automatic()
    size = batch_size_of(batch)
    with _own_randomness(model):
        report = check(model, loss, _rows(batch, CHECK_EXAMPLES, size), examples=CHECK_EXAMPLES)
        report.raise_if_failed()
        step = _Step(model=model, loss=loss, clipping=rule, layout=report.layout, batch=batch, size=size)
        large, bytes_per_example = _largest(step)
        small = min(_SMALL, max(1, large // 2))
        quick, slow = _two_sizes(step, small, large)
        update, held = _update(step, small)
    per_example = max((slow - quick) / (large - small), 1e-3 * slow / large) if large > small else slow / large
    return Machine(
        seconds_per_example=UNMEASURED * per_example,
        seconds_per_microbatch=UNMEASURED * max(0.0, quick - small * per_example),
        seconds_per_step=UNMEASURED * update,
        largest_microbatch=large,
        bytes_per_example=bytes_per_example,
        fixed_bytes=held,
        free_bytes=_free_bytes(step.device),
        parameters=sum(parameter.numel() for parameter in trainable(model).values()),
        place=_place(step.device),
    )


@dataclass(frozen=True)
class _Step:
    """The clipped sum of any number of stand-ins."""

    model: nn.Module
    loss: LossFunction
    clipping: Clipping
    layout: Layout | None
    batch: Any
    size: int

    @property
    def device(self) -> torch.device:
        return next(iter(trainable(self.model).values())).device

    def run(self, count: int) -> ClippedSum:
        batch = _rows(self.batch, count, self.size)
        return clipped_gradient(
            self.model, self.loss, batch, clipping=self.clipping, layout=self.layout, examples=count
        )


def _two_sizes(step: _Step, small: int, large: int) -> tuple[float, float]:
    """Median seconds of a small and of a large microbatch, taken in turns: other work then slows both down alike."""
    step.run(small)
    pairs = [
        (_seconds(lambda: step.run(small), step.device), _seconds(lambda: step.run(large), step.device))
        for _ in range(_REPEATS)
    ]
    quick, slow = zip(*pairs, strict=True)
    return statistics.median(quick), statistics.median(slow)


def _largest(step: _Step) -> tuple[int, float | None]:
    """(microbatch, bytes per example): the largest that is fast enough to be measured and fits."""
    size = GPU_MICROBATCH if step.device.type == "cuda" else CPU_MICROBATCH
    step.run(_SMALL)
    once = _seconds(lambda: step.run(_SMALL), step.device)
    while size > _SMALL and once / _SMALL * size > _SECONDS:
        size //= 2
    while True:
        try:
            before = _restart_peak(step.device)
            step.run(size)
            held = _peak(step.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            gc.collect()
            size //= 2
            continue
        grown = None if held is None or before is None else max(0.0, held - before)
        return size, None if grown is None else grown / size


def _update(step: _Step, count: int) -> tuple[float, float]:
    """Seconds of noise and optimizer, on copies of the parameters; and the bytes that a step holds whatever its batch.

    Adam stands for all optimizers: it is among the slowest that are usual.
    """
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in trainable(step.model).items()}
    optimizer = torch.optim.Adam(copies.values(), lr=1e-3)
    source = NoiseSource.insecure_seed(_SEED)
    total = step.run(count)

    def update() -> None:
        released = release(total, noise_multiplier=1.0, source=source, divisor=float(count))
        write_gradient(released, copies)
        optimizer.step()

    seconds = _median_seconds(update, step.device)
    everything = sum(p.numel() * p.element_size() for p in step.model.parameters())
    moved = sum(p.numel() * p.element_size() for p in copies.values())
    # Weights, the clipped sum (its memory becomes the gradient), and the two moments of Adam.
    return seconds, float(everything + 3 * moved)


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """Draw from a seed of its own; the caller's generators are put back afterwards."""
    with torch.random.fork_rng(devices=cuda_indices(p.device for p in model.parameters())):
        torch.manual_seed(_SEED)
        yield


def _rows(batch: Any, count: int, size: int) -> Any:
    """``count`` examples, by repeating the ``size`` that there are."""

    def repeat(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[torch.arange(count, device=leaf.device) % size]

    return tree_map(repeat, batch)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    return statistics.median(_seconds(work, device) for _ in range(_REPEATS))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _restart_peak(device: torch.device) -> float | None:
    """Forget the peak of memory so far; returns what is held now, None where nobody can tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _peak(device: torch.device) -> float | None:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> float | None:
    return _kibibytes(_STATUS, field)


def _kibibytes(path: Path, field: str) -> float | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{field}:")]
    return float(found[0].split()[1]) * 2**10 if found else None


def _free_bytes(device: torch.device) -> float | None:
    """Memory that could still be had: the device's, or the machine's within the limit of its control group."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = _kibibytes(_FREE, "MemAvailable")
    for limit, used in zip(_LIMITS, _USED, strict=True):
        try:
            allowed, taken = limit.read_text().strip(), used.read_text().strip()
        except OSError:
            continue
        if allowed.isdigit() and taken.isdigit():
            left = max(0.0, float(allowed) - float(taken))
            free = left if free is None else min(free, left)
    return free if free is None or math.isfinite(free) else None


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} {'thread' if threads == 1 else 'threads'}"
