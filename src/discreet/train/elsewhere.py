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

from discreet.core.layout import carries

_SEED = 20_779
_AT_AN_END = 0.25

Draw = Callable[[Tensor, torch.Generator], Tensor]


def elsewhere(batch: Any, *, size: int, takes: Callable[[Any], bool]) -> list[Any]:
    """Up to two batches of the shapes of this one, in which examples differ.

    - Mixed: numbers between those of two examples; whole numbers of another. Each tensor has an order of its own.
    - Redrawn: every entry by itself, from zero and the range that its place has in the batch. Whole numbers come from
      the range of the tensor, down to 1 and up to 1, so that ids stay ids, and lengths lengths; or, for a model that
      has none in between, they are those of the tensor. An index out of range would end the process on an accelerator,
      so nothing is tried there that was not given.

    Args:
        size: B.
        takes: whether the model takes a batch.
    """
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    drawings = (_redrawn, _reused) if all(leaf.device.type == "cpu" for leaf in leaves) else (_reused,)
    alternatives = ((_mixed,), drawings)
    made = ((_each(batch, size, draw) for draw in kinds) for kinds in alternatives)
    taken = (next((each for each in some if takes(each)), None) for some in made)
    return [each for each in taken if each is not None]


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
    one, other = (given[torch.randperm(len(given), generator=generator)] for _ in range(2))
    if not given.is_floating_point():
        return one
    share_B = torch.rand(len(given), generator=generator).reshape(-1, *[1] * (given.dim() - 1))
    return torch.lerp(one.double(), other.double(), share_B.double())


def _redrawn(given: Tensor, generator: torch.Generator) -> Tensor:
    if given.is_floating_point():
        return _between(given.double(), generator)
    least, most = (0, 1) if given.dtype is torch.bool else (int(given.real.min()), int(given.real.max()))
    if given.is_complex() or least < 0:
        return _reused(given, generator)
    most = max(most, 1)
    return torch.randint(0 if most == 1 else min(least, 1), most + 1, given.shape, generator=generator)


def _reused(given: Tensor, generator: torch.Generator) -> Tensor:
    if given.is_floating_point():
        return _between(given.double(), generator)
    return given.flatten()[torch.randint(given.numel(), given.shape, generator=generator)]


def _between(given: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the range of each place, whose ends are drawn as such too; of the whole tensor where all is zero."""
    least, most = given.amin(0).clamp(max=0.0), given.amax(0).clamp(min=0.0)
    silent = least == most
    least = torch.where(silent, given.min().clamp(max=0.0), least)
    most = torch.where(silent, given.max().clamp(min=0.0), most)
    most = torch.where(least == most, 1.0, most)
    share = torch.rand(given.shape, generator=generator, dtype=given.dtype) * (1 + 2 * _AT_AN_END) - _AT_AN_END
    return torch.lerp(least.expand_as(given), most.expand_as(given), share.clamp(0.0, 1.0))
