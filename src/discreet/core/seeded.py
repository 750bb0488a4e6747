"""The global generators of torch, numpy and Python, seeded for a while: what a data set's transforms draw from.

Dropout draws from torch; augmentation draws from any of the three. Noise and batches have a source of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMPY_SEEDS = 1 << 32


@dataclass(frozen=True)
class Moment:
    """Where the generators stand.

    Attributes:
        processor, devices: torch's, and those of its CUDA devices by their indices.
        legacy, plain: those of numpy and of Python.
    """

    processor: Tensor
    devices: Mapping[int, Tensor]
    legacy: Any
    plain: Any

    @classmethod
    def now(cls, *, devices: Sequence[int] = ()) -> Moment:
        """This moment.

        Args:
            devices: indices of the CUDA devices whose generators belong to it.
        """
        states = {device: torch.cuda.get_rng_state(device) for device in devices}
        return cls(torch.get_rng_state(), states, np.random.get_state(), random.getstate())

    def come_back(self) -> None:
        """Put the generators where they stood."""
        torch.set_rng_state(self.processor)
        for device, state in self.devices.items():
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.legacy)
        random.setstate(self.plain)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw once more what was drawn from this moment on; the caller's states are put back afterwards."""
        here = Moment.now(devices=tuple(self.devices))
        self.come_back()
        try:
            yield
        finally:
            here.come_back()


def cuda_indices(devices: Iterable[torch.device]) -> list[int]:
    """Indices of the CUDA devices among these, each once."""
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


@contextmanager
def seeded(seed: int, *, devices: Sequence[int] = ()) -> Iterator[None]:
    """Seed all three; put the caller's states back afterwards.

    Args:
        seed: at least 0; numpy takes its lowest 32 bits.
        devices: indices of the CUDA devices whose generators are seeded and put back as well.
    """
    here = Moment.now(devices=devices)
    torch.manual_seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    random.seed(seed)
    try:
        yield
    finally:
        here.come_back()
