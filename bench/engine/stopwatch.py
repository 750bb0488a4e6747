"""Time and memory of the process that this runs in."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MIB = 2.0**20
_COUNTED = "the step that is counted"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Seconds of each phase of the steps of a turn.

    On an accelerator they are read off events in its own queue, when the turn is over: waiting for it after each phase
    would charge a step for host work that is done while the accelerator is busy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[list[tuple[str, float | torch.cuda.Event]]] = []

    def start(self) -> None:
        """A step begins."""
        self._steps.append([("", self._mark())])

    def lap(self, phase: str) -> None:
        """The named phase is over."""
        self._steps[-1].append((phase, self._mark()))

    def turn(self) -> list[dict[str, float]]:
        """Phase -> seconds, for each step since this was last asked for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps, self._steps = self._steps, []
        return [
            {phase: _seconds(before, after) for (_, before), (phase, after) in itertools.pairwise(marks)}
            for marks in steps
        ]

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        return after - before
    return before.elapsed_time(after) / 1e3


class MemoryMeter:
    """Peak memory of the steps, model and batch included.

    On an accelerator it is the peak of PyTorch's allocator. On the CPU it is the peak resident set, from Linux's
    ``/proc``, less what the process held for its libraries when this was made. What preparation leaves behind (for a
    private contestant some 25 MiB after the self-check) is counted: on models of a few MiB the ratio is an upper bound.

    Args:
        device: where the steps run.
        tensors_mib: size of the model and the batch, which are there already.
    """

    def __init__(self, device: torch.device, *, tensors_mib: float) -> None:
        self._device = device
        self._libraries = 0.0 if device.type == "cuda" else _resident("VmRSS") - tensors_mib

    def restart(self) -> None:
        """Forget the peak so far: what came before the first step is not measured."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")

    def peak_mib(self) -> float:
        """The peak since the last restart, in MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MIB
        return _resident("VmHWM") - self._libraries

    def tensors_mib(self, step: Callable[[], None]) -> float:
        """The most that tensors hold at any moment of a step, in MiB.

        On the CPU the resident set has its allocator's holes on top, and what libraries cache; this has neither.
        """
        if self._device.type == "cuda":
            return self.peak_mib()
        step()
        held = _storages()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()  # the profiler does not see that what was there before is freed: the next step counts
            with record_function(_COUNTED):
                step()
        events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        counting, total, most = False, 0, 0
        for event in events:
            counting |= event.name() == _COUNTED
            if counting and event.name() == "[memory]":
                total += event.nbytes()
                most = max(most, total)
        return (sum(held.values()) + most) / MIB


def _storages() -> dict[int, int]:
    """Address -> size of every storage on the CPU."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn of their age when they are asked for their class
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):  # what the compiler traces with has no memory
            if tensor.device.type == "cpu":
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def _resident(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"{_STATUS} has no {field}: peak memory of the CPU is measured on Linux only.")
