"""Is an example the same, whichever others are fetched with it?

A data set is asked for many examples at once, and a collate function sees them all: it may standardise them together,
mix them (mixup, CutMix), or hand the model a number of the whole batch, such as how many tokens it has. Then one
example changes the gradients of all others before the model has seen any of them.

Shape legend: B = examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from discreet.core.gradient import LossFunction
from discreet.core.isolation import first_losses_agree
from discreet.core.layout import carries
from discreet.core.seeded import cuda_indices, seeded
from discreet.train.examples import Examples
from discreet.train.recheck import in_two_companies
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

    devices = cuda_indices([device])

    def bare(indices: np.ndarray) -> Any:
        return examples.fetch(indices, device=device)

    def fetch(indices: np.ndarray, seed: int = 0) -> tuple[Any, int]:
        with seeded(_SEED + seed, devices=devices):
            return bare(indices), len(indices)

    given = np.arange(count)
    replaced = np.minimum(given, count - 2)
    for seed in range(_SEEDS):
        if not _first_rows_equal(fetch(given, seed), fetch(replaced, seed), first=count - 1):
            return False
    whole, fewer = fetch(given), fetch(given[:-1])
    drawn = not _first_rows_equal(fewer, fetch(given[:-1], seed=1), first=count - 1)
    with gradients_kept(model):
        if not any(
            first_losses_agree(model, loss, (one, count), (other, count), first=count - 1)
            for one, other in in_two_companies(bare, given, replaced, seed=_SEED, devices=devices)
        ):
            return False
        return drawn or first_losses_agree(model, loss, whole, fewer, first=count - 1)


def fetched_again(examples: Examples, *, count: int, device: torch.device) -> bool:
    """Whether the first examples are the same when they are fetched again under the same seed.

    Args:
        count: of them.
    """
    batches = []
    for _ in range(2):
        with seeded(_SEED, devices=cuda_indices([device])):
            batches.append((examples.fetch(np.arange(count), device=device), count))
    return _first_rows_equal(*batches, first=count)


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
