"""Batches that nobody gave, made from one that was: what a model does with them, it does to any examples.

The examples of a self-check may agree where others differ: one label, one length, in order already. A model that sorts
by it leaves them where they are, and seems to leave all where they are. So it is also asked about examples that differ.

Shape legend: B = examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from discreet.core.layout import carries, take

_SEED = 20_779

Draw = Callable[[Tensor, torch.Generator], Tensor]


def elsewhere(batch: Any, *, size: int, takes: Callable[[Any], bool]) -> list[Any]:
    """Two batches of the shapes of this one, in which examples differ; none where the model takes no such batch.

    Every entry is drawn by itself, from zero and the range that its place has in the batch; one example has its least
    there, and another its most. Whole numbers come from the range of the tensor, down to 1 and up to 1, so that ids
    stay ids, and lengths lengths. For a model that has none in between, they are those of the tensor; for one that
    needs each tensor of an example whole, they are another example's, and other numbers lie between those of two. The
    second batch is the first in reverse: a key of two values may have been in order already.

    An index out of range would end the process on an accelerator, so nothing is tried there that was not given.

    Args:
        size: B.
        takes: whether the model takes a batch.
    """
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    on_processor = all(leaf.device.type == "cpu" for leaf in leaves)
    made = (_each(batch, size, draw) for draw in ((_redrawn,) if on_processor else ()) + (_reused, _mixed))
    found = next((each for each in made if takes(each)), None)
    return [] if found is None else [found, take(found, list(reversed(range(size))), size)]


def _each(batch: Any, size: int, draw: Draw) -> Any:
    generator = torch.Generator().manual_seed(_SEED)

    def fill(leaf: Any) -> Any:
        if not carries(leaf, size) or leaf.layout is not torch.strided or leaf.numel() == 0:
            return leaf
        given = leaf.detach().cpu()
        if given.is_floating_point():
            given = given.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return draw(given, generator).to(leaf)

    return tree_map(fill, batch)


def _mixed(given: Tensor, generator: torch.Generator) -> Tensor:
    one, other = (given[torch.randperm(len(given), generator=generator, device="cpu")] for _ in range(2))
    if not given.is_floating_point():
        return one
    share_B = torch.rand(len(given), generator=generator, device="cpu").reshape(-1, *[1] * (given.dim() - 1))
    return torch.lerp(one.double(), other.double(), share_B.double())


def _redrawn(given: Tensor, generator: torch.Generator) -> Tensor:
    if given.is_floating_point():
        return _between(given.double(), generator)
    least, most = (0, 1) if given.dtype is torch.bool else (int(given.real.min()), int(given.real.max()))
    if given.is_complex() or least < 0:
        return _reused(given, generator)
    most = max(most, 1)
    least = 0 if most == 1 else min(least, 1)
    return (least + _shares(given, generator) * (most + 1 - least)).long().clamp(max=most)


def _reused(given: Tensor, generator: torch.Generator) -> Tensor:
    if given.is_floating_point():
        return _between(given.double(), generator)
    return given.flatten()[torch.randint(given.numel(), given.shape, generator=generator, device="cpu")]


def _between(given: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the range of each place, whose ends are drawn as such too; of the whole tensor where all is zero."""
    least, most = given.amin(0).clamp(max=0.0), given.amax(0).clamp(min=0.0)
    silent = least == most
    least = torch.where(silent, given.min().clamp(max=0.0), least)
    most = torch.where(silent, given.max().clamp(min=0.0), most)
    most = torch.where(least == most, 1.0, most)
    return torch.lerp(least.expand_as(given), most.expand_as(given), _shares(given, generator))


def _shares(given: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1], float64; at each place the least of the examples is 0, and the largest 1."""
    share = torch.rand(given.shape, generator=generator, dtype=torch.float64, device="cpu")
    return share.masked_fill(share == share.amin(0), 0.0).masked_fill(share == share.amax(0), 1.0)
