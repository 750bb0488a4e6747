"""Rules for embedding and for picking rows by integer index.

Shape legend: B = examples, S = positions, V = rows of the table, D = width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.book import Book
from discreet.core.derived import derive
from discreet.core.forms import Lookup
from discreet.core.parameter import Guarded, Use, plain, rule
from discreet.core.rules.once import differentiable_once
from discreet.core.uses import Derivation


class _Embed(torch.autograd.Function):
    """``table[ids]``; the backward books (ids, gradient) and returns nothing."""

    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, ids: Tensor, table: Tensor, padding_idx: int | None, book: Book, derivation: Derivation
    ) -> Tensor:
        ctx.book, ctx.derivation = book, derivation
        ctx.padding_idx, ctx.num_rows = padding_idx, table.shape[0]
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        examples = ctx.book.examples
        ids_BS = ids.reshape(examples, -1)
        grad_BSD = grad.reshape(examples, -1, grad.shape[-1])
        if ctx.padding_idx is not None:
            grad_BSD = grad_BSD.masked_fill((ids_BS == ctx.padding_idx).unsqueeze(-1), 0)
        ctx.book.record(ctx.derivation, Lookup(ids_BS, grad_BSD, ctx.num_rows))
        return (None,) * 6


@rule(F.embedding, torch.embedding)
def embedding(
    use: Use,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` of batched ids. Ids without a batch axis make the result a function of the table alone."""
    if max_norm is not None:
        raise use.refuse(f"max_norm={max_norm} changes the weight in the forward", "pass max_norm=None.")
    if scale_grad_by_freq:
        raise use.refuse("scale_grad_by_freq couples the examples of a batch", "pass scale_grad_by_freq=False.")
    if sparse:
        raise use.refuse("sparse=True: the clipped sum is dense", "pass sparse=False.")
    if isinstance(input, Guarded) or not use.is_batched(input) or weight.dim() != 2:
        raise use.refuse(f"a table of shape {tuple(weight.shape)}", "the rule needs batched ids and a 2-D table.")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embed.apply(use.book.sink, input, plain(weight), padding_idx, use.book, use.derivation(weight))


@rule(Tensor.__getitem__)
def getitem(use: Use, value: Tensor, index: Any) -> Tensor:
    """``table[ids]``, and ``table[from, to]`` with ids of one shape: an embedding of the flattened other axes."""
    parts = index if isinstance(index, tuple) else (index,)
    ids = [part for part in parts if isinstance(part, Tensor) and part.dtype is torch.int64 and use.is_batched(part)]
    apart = any(part.shape != ids[0].shape for part in ids)
    if not isinstance(value, Guarded) or len(ids) < len(parts) or apart:
        raise use.refuse(
            "an index that mixes examples with other selections", "index with int64 tensors of ids, all of one shape."
        )
    picked_axes, table, row = value.shape[: len(ids)], value, torch.zeros_like(ids[0])
    for part, size in zip(ids, picked_axes, strict=True):
        wrapped = torch.where(part < 0, part + size, part)
        # What is out of range stays so, beyond all rows: torch then says what it says of any index.
        row = torch.where((wrapped < 0) | (wrapped >= size), value.numel() + 1, row * size + wrapped)
    if value.dim() != 2 or len(ids) != 1:
        shape = (math.prod(picked_axes), math.prod(value.shape[len(ids) :]))
        table = derive(replace(use, function=Tensor.reshape), (value, shape), {}, isometric=True)
    picked = _Embed.apply(use.book.sink, row, plain(table), None, use.book, use.derivation(table))
    return picked.reshape(*row.shape, *value.shape[len(ids) :])
