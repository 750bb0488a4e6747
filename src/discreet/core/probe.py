"""What a displacement of the weights does to the loss, as bounded sums over a batch, to be released with noise.

Two questions, each with a sensitivity that holds whatever the losses are: in which octave each example's loss lies
(`counted_levels`), and by how much losses rise at displaced weights (`summed_rises`).

Shape legend: B = examples of a microbatch, K = octaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.clipping import ClippedSum
from discreet.core.gradient import LossFunction, check_losses, trainable
from discreet.core.layout import copies, put_back
from discreet.errors import ConfigError

LEVELS, RISES = "loss levels", "loss rises"
"""Names of the one tensor in each sum, float64."""

OCTAVES = tuple(range(-20, 20))
"""Octave k holds losses of absolute value in [2^k, 2^(k+1)); smaller and larger ones count in the first and last."""

Batches = Callable[[], Iterable[tuple[Any, int]]]
"""Called before each pass: pairs of a microbatch and its number of examples. Every pass must meet the same examples,
under the same random state where the model draws."""


def counted_levels(model: nn.Module, loss: LossFunction, batches: Batches) -> ClippedSum:
    """Count the examples of a batch by the octave of their loss.

    **Guarantees.** Each example counts once, or not at all where its loss is not finite: sensitivity 1, provided that
    no example's loss depends on another (the self-check tests this).

    Returns:
        The counts, shape (K,).
    """
    count_K = torch.zeros(len(OCTAVES), dtype=torch.float64, device="cpu")
    for losses_B in _passes(model, loss, batches):
        finite_B = losses_B[losses_B.isfinite()].abs()
        place_B = torch.frexp(finite_B).exponent.long() - 1 - OCTAVES[0]
        place_B = torch.where(finite_B > 0, place_B, 0).clamp(0, len(OCTAVES) - 1)
        count_K += torch.bincount(place_B, minlength=len(OCTAVES))
    return ClippedSum(tensors={LEVELS: count_K}, sensitivity=1.0)


def summed_rises(
    model: nn.Module, loss: LossFunction, batches: Batches, *, shift: Mapping[str, Tensor], bound: float
) -> ClippedSum:
    """Sum, over a batch, how much each example's loss rises when the weights are displaced, to and fro.

    ``sum_i (r_i(shift) + r_i(-shift)) / 2`` with ``r_i(s) = clip(L_i(w + s) - L_i(w), -bound, bound)``: one query for
    the difference, which is less noisy than two for the losses. Of the two signs, what a slope adds is what it takes
    away: the loss of a convex model rises, whatever the direction. Weights and buffers are put back bit by bit.

    **Guarantees.** Adding or removing one example changes the sum by at most ``bound``, provided that no example's loss
    depends on another. A loss that is not finite at the displaced weights rises by ``bound``; one that was not finite
    before, by nothing. The sum is taken in float64, whatever the model computes in.

    Args:
        shift: name of a trainable parameter -> displacement, same shape; taken with both signs.
        bound: finite and above 0, public or released.

    Raises:
        ConfigError: the bound is not finite and above 0, or the losses are not one per example.
    """
    if not 0 < bound < float("inf"):
        raise ConfigError(f"bound={bound} of a rise: must be finite and above 0; take a released level of the loss.")
    before = list(_passes(model, loss, batches))
    total = torch.zeros(1, dtype=torch.float64, device="cpu")
    for sign in (1, -1):
        with _displaced(model, shift, sign=sign):
            after = list(_passes(model, loss, batches))
        for old_B, new_B in zip(before, after, strict=True):
            rise_B = (new_B - old_B).nan_to_num(nan=bound).clamp(-bound, bound)
            rise_B = torch.where(new_B.isfinite(), rise_B, bound)
            total += 0.5 * torch.where(old_B.isfinite(), rise_B, 0.0).sum()
    return ClippedSum(tensors={RISES: total}, sensitivity=float(bound))


def _passes(model: nn.Module, loss: LossFunction, batches: Batches) -> Iterator[Tensor]:
    """Losses of each microbatch, float64 on the CPU, shape (B,); buffers that a forward moves are put back."""
    kept = copies(model)
    try:
        with torch.no_grad():
            for batch, examples in batches():
                losses = loss(model, batch)
                check_losses(losses, examples=examples)
                yield losses.detach().cpu().to(torch.float64)
    finally:
        put_back(model, kept)


@contextmanager
def _displaced(model: nn.Module, shift: Mapping[str, Tensor], *, sign: int) -> Iterator[None]:
    parameters = trainable(model)
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(shift[name].to(parameter.device, parameter.dtype), alpha=sign)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
