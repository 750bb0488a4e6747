"""A value made of parameters alone that lies along the batch: one row of it for each row of the activations.

``bias.repeat(B, 1, 1)``, ``experts[ids]`` and ``table + mask`` are made without any activation, and then meet row n of
the activations with row n. So an example's gradient of the value is zero outside its own rows, which is what a lookup
is: ids are the rows' numbers. Autograd and the derivation do the rest.

Shape legend: B = examples, N = rows of the activations (B, or B folded), S = N / B, D = numbers in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discreet.core.book import Book
from discreet.core.forms import Lookup
from discreet.core.parameter import DerivedParameter, Guarded, Use, plain, rule
from discreet.core.uses import Derivation


class _Rows(torch.autograd.Function):
    """value -> value; its backward books each row's gradient for the example that owns the row."""

    @staticmethod
    def forward(ctx: Any, sink: Tensor, value: Tensor, book: Book, derivation: Derivation) -> Tensor:
        ctx.book, ctx.derivation = book, derivation
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ids_BS = torch.arange(grad.shape[0], device=grad.device).reshape(ctx.book.examples, -1)
        ctx.book.record(ctx.derivation, Lookup(ids_BS, grad.reshape(*ids_BS.shape, -1), grad.shape[0]))
        return None, None, None, None


def lies_along(value: Tensor, rows: int) -> bool:
    """Whether a guarded value was laid out in so many rows. A parameter only reshaped was not: its rows are its own."""
    return isinstance(value, DerivedParameter) and not value.derivation.isometric and value.shape[0] == rows


def by_row(use: Use, value: Tensor) -> Tensor:
    """The value as an activation whose row n belongs to the example that owns row n of the other operands."""
    return _Rows.apply(use.book.sink, plain(value), use.book, use.derivation(value))


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(use: Use, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Activations beside a value that has a row for each of theirs, as a token that was expanded to all frames has."""
    rows = next(one.shape[0] for one in tensors if use.is_batched(one))
    whole = all(lies_along(one, rows) for one in tensors if isinstance(one, Guarded))
    if not whole or dim % tensors[0].dim() == 0:
        raise use.refuse(
            f"operands of shapes {[tuple(one.shape) for one in tensors]} along axis {dim}",
            "expand the parameter to the rows of the activations, and join along another axis than the batch.",
        )
    return torch.cat([by_row(use, one) if isinstance(one, Guarded) else one for one in tensors], dim)
