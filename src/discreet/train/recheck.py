"""The self-check goes on: updates 0, 1, 3, 7, ... of a process ask again, of what they draw.

Before the first update it sees four examples, asks the same of a microbatch from all over the data, and sees the model
as it begins. It cannot see what comes later (a term that a loss adds after a thousand updates, values that those do not
have), nor what a loop of one's own makes of the batches that it is given. So ever fewer updates ask again, before
anything of them is released: are the losses of some examples what they are in other company, are their norms those of
autograd, and are the losses and gradients of a loop those of the loss that was checked?

Shape legend: B = examples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from discreet.core.axes import Layout
from discreet.core.clipping import BELOW, ClippedSum
from discreet.core.draws import Draws
from discreet.core.gradient import LossFunction
from discreet.core.isolation import first_losses_agree
from discreet.core.layout import copies, put_back
from discreet.core.precision import NARROW_GAP, ROUNDING_GAP, computes_narrowly, each_close
from discreet.core.seeded import Moment, seeded
from discreet.core.selftest import norms_agree
from discreet.errors import CheckFailed

_SEED, _EVERY = 20_781, 8
_SAME = 1e-4
"""How far losses and clipped sums of a loop may be from those of its loss: as close as two ways to write it."""
_DRAWN_BETWEEN = (
    " Or something drew random numbers between a batch and its losses (another forward with dropout, a shuffled "
    "loader): do that after private.backward."
)


def is_due(moved: int) -> bool:
    """Whether an update asks, after so many in this process: 0, 1, 3, 7, so that a run of any length pays for a few."""
    return moved & (moved + 1) == 0


def ask_again(
    model: nn.Module,
    loss: LossFunction,
    fetch: Callable[[np.ndarray], Any],
    indices_B: np.ndarray,
    *,
    layout: Layout | None,
    update: int,
    devices: Sequence[int] = (),
) -> None:
    """Fetch most of a microbatch anew as copies of the others, whose losses must stay; take two norms by autograd.

    One in `_EVERY` stays: the fewer, the less likely that what couples them (a rare value, a long text) stays too. They
    are fetched first, so that an augmentation draws for them what it drew before.

    Args:
        fetch: indices -> batch.
        indices_B: of one microbatch, as training draws it.
        layout: how every use carries the batch.
        update: which of them stay follows from it.
        devices: indices of the CUDA devices whose generators a data set may draw from.

    Raises:
        CheckFailed: they do not, or a norm is another one.
    """
    examples = len(indices_B)
    if examples == 0:
        return
    stay = list(range(update.bit_length() % min(_EVERY, examples), examples, _EVERY))
    others = sorted(set(range(examples)) - set(stay))
    given, copied = indices_B[stay + others], indices_B[[stay[place % len(stay)] for place in range(examples)]]
    for batch, other in in_two_companies(fetch, given, copied, seed=_SEED + update, devices=devices):
        if first_losses_agree(model, loss, (batch, examples), (other, examples), first=len(stay)):
            break
    else:
        raise CheckFailed(
            "an example's loss depends on others of its microbatch, as no example of the self-check showed (a term "
            "that has begun since, values or lengths that those did not have, a number of examples, random numbers "
            "of numpy for all of a padded batch); take each example by itself, and draw for each by itself, or by "
            "torch."
        )
    rows = range(min(2, len(stay)))
    if not norms_agree(model, loss, batch, layout=layout, examples=examples, rows=rows):
        raise CheckFailed(
            "the norm of an example's gradient is not that of autograd, as no example of the self-check showed (a "
            "batch that is put in an order by what those have in common, a use that they do not make); keep each "
            "example at its place."
        )


def in_two_companies(
    fetch: Callable[[np.ndarray], Any], one: np.ndarray, other: np.ndarray, *, seed: int, devices: Sequence[int]
) -> Iterator[tuple[Any, Any]]:
    """Two batches that begin with the same examples, under one seed; and if they are asked for again, once more.

    Then the second is given what the first drew: a collate function that draws for all of a padded batch draws other
    numbers for the same examples, where another example brings another length.
    """
    draws = Draws(len(one), seed=seed)
    for writing, giving in ((nullcontext, nullcontext), (draws.written, lambda: draws.given(range(len(other))))):
        with seeded(seed, devices=devices), writing():
            batch = fetch(one)
        with seeded(seed, devices=devices), giving():
            again = fetch(other)
        yield batch, again


Again = Callable[[Any], tuple[Tensor, ClippedSum]]
"""batch -> the losses of the loss that was checked, and the clipped sum of their gradients, by the way of training."""


@dataclass(frozen=True)
class HandedOut:
    """A microbatch that was given to a loop of one's own, and what its losses and gradients have to be.

    Attributes:
        batch: a copy: the loop may take things out of its own dict, or write into its tensors.
        moment: where the generators stood, so that dropout draws the same masks again.
        buffers: of the model, then.
        indices: which examples it holds.
    """

    model: nn.Module
    batch: Any
    moment: Moment
    buffers: Mapping[str, Tensor]
    indices: np.ndarray

    @classmethod
    def now(cls, model: nn.Module, batch: Any, *, indices: np.ndarray, devices: Sequence[int]) -> HandedOut:
        """A microbatch that is handed out now."""
        kept = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf), batch)
        return cls(model, kept, Moment.now(devices=devices), copies(model), indices)

    def require_same(self, losses_B: Tensor, share: ClippedSum, again: Again) -> None:
        """Compare losses and clipped sum of the loop with those of the loss that was checked.

        They are made by the same functions on the same numbers, so that little more than their rounding may differ. A
        term that is small beside a loss would hide behind more: a thousandth of a load-balancing loss is usual.

        Args:
            losses_B: what the loop made of the batch.
            share: the clipped sum of their gradients.
            again: makes both anew.

        Raises:
            CheckFailed: they are others.
        """
        wanted_B, wanted = self._made(again, self.moment)
        gap = _SAME
        if not each_close(losses_B, wanted_B, gap):
            repeated_B, _ = self._made(again, self.moment)
            if not each_close(repeated_B, wanted_B, gap):  # an accelerator that adds in another order each time
                gap = NARROW_GAP if computes_narrowly(lambda: self._made(again, self.moment)) else ROUNDING_GAP
        if not each_close(losses_B, wanted_B, gap):
            other_B, _ = self._made(again, Moment.now(devices=tuple(self.moment.devices)))
            raise CheckFailed(
                "the losses of this loop are not those of loss=, which the self-check has seen: what else the loop "
                "does with a batch (mixup, an augmentation, autocast, a GradScaler, a weight, a mean or a term over "
                "it) may couple its examples; do it in loss= or in the data set, and hand in loss(model, batch)."
                + ("" if torch.equal(other_B, wanted_B) else _DRAWN_BETWEEN)
            )
        if _distance(share, wanted) > gap * share.sensitivity * len(losses_B):
            raise CheckFailed(
                "the losses of this loop are those of loss=, and their gradients are not (a hook, a straight-through "
                "estimator, a detach()), which may couple its examples; hand in loss(model, batch) as it is."
            )

    def _made(self, again: Again, moment: Moment) -> tuple[Tensor, ClippedSum]:
        kept = copies(self.model)
        put_back(self.model, self.buffers)
        try:
            with moment.again(), torch.enable_grad():  # as in training: a forward may ask for gradients
                return again(self.batch)
        finally:
            put_back(self.model, kept)


def _distance(one: ClippedSum, other: ClippedSum) -> float:
    gaps = [(value.double() - other.tensors[name]).norm() for name, value in one.tensors.items() if name != BELOW]
    return float(torch.stack(gaps).norm())
