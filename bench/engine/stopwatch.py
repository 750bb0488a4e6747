"""Time and memory of the process that this runs in."""

from __future__ import annotations

import ctypes
import gc
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
    """Seconds of each phase of one step, the accelerator's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        """Forget the last step."""
        self.seconds = {}
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """The named phase is over."""
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


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
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors()}
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


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn of their age when they are asked for their class
        return [value for value in gc.get_objects() if isinstance(value, torch.Tensor) and value.device.type == "cpu"]


def _resident(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"{_STATUS} has no {field}: peak memory of the CPU is measured on Linux only.")
