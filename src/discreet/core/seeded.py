"""The global generators of torch, numpy and Python, seeded for a while: what a data set's transforms draw from.

Dropout draws from torch; augmentation draws from any of the three. Noise and batches have a source of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

_NUMPY_SEEDS = 1 << 32


@contextmanager
def seeded(seed: int, *, devices: Sequence[int] = ()) -> Iterator[None]:
    """Seed all three; put the caller's states back afterwards.

    Args:
        seed: at least 0; numpy takes its lowest 32 bits.
        devices: indices of the CUDA devices whose generators are seeded and put back as well.
    """
    plain, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        np.random.seed(seed % _NUMPY_SEEDS)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(legacy)
            random.setstate(plain)
