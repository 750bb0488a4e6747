"""Is an example the same, whichever others are fetched with it?

A data set is asked for many examples at once, and a collate function sees them all: it may standardise them together,
mix them (mixup, CutMix), or hand the model a number of the whole batch, such as how many tokens it has. Then one
example changes the gradients of all others before the model has seen any of them.

Shape legend: B = examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from discreet.core.gradient import LossFunction
from discreet.core.isolation import first_losses_agree
from discreet.core.layout import carries
from discreet.core.seeded import seeded
from discreet.train.examples import Examples
from discreet.train.step import gradients_kept

_SEED, _SEEDS = 20_780, 6


def fetched_alone(
    model: nn.Module, loss: LossFunction, examples: Examples, *, count: int, device: torch.device
) -> bool:
    """Whether the first examples are the same when the last one is replaced, and when it is left out.

    Their tensors are compared under some seeds, because an augmentation may come with a chance; where another example
    brings another shape, and for what has no row for each example, their losses are. The last one is left out only
    where nothing is drawn: a draw for another number of examples is another draw.

    Args:
        count: B, at least 2; the first ones of the data set.
    """

    def fetch(indices: Sequence[int], seed: int = 0) -> tuple[Any, int]:
        devices = [device.index or 0] if device.type == "cuda" else []
        with seeded(_SEED + seed, devices=devices):
            return examples.fetch(np.asarray(indices, dtype=np.int64), device=device), len(indices)

    given, replaced = list(range(count)), [*range(count - 1), count - 2]
    for seed in range(_SEEDS):
        if not _first_rows_equal(fetch(given, seed), fetch(replaced, seed), first=count - 1):
            return False
    whole, fewer = fetch(given), fetch(given[:-1])
    drawn = not _first_rows_equal(fewer, fetch(given[:-1], seed=1), first=count - 1)
    with gradients_kept(model):
        if not first_losses_agree(model, loss, whole, fetch(replaced), first=count - 1):
            return False
        return drawn or first_losses_agree(model, loss, whole, fewer, first=count - 1)


def _first_rows_equal(one: tuple[Any, int], other: tuple[Any, int], *, first: int) -> bool:
    """Whether the first rows are the same bits, as far as the shapes are."""
    (batch, size), (again, _) = one, other
    pairs = zip(tree_leaves(batch), tree_leaves(again), strict=False)
    return all(
        torch.equal(_bits(left[:first]), _bits(right[:first]))
        for left, right in pairs
        if carries(left, size)
        and left.layout is torch.strided
        and isinstance(right, Tensor)
        and left.shape == right.shape
    )


def _bits(value: Tensor) -> Tensor:
    """As bytes: NaN equals itself."""
    return value.contiguous().flatten().view(torch.uint8)
