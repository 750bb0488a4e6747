"""Rules for masks that are, or that meet, parameters alone: a learnt bias of attention scores, dropout of a table.

A relative position bias belongs to no example: each gets its own copy. A dropped table is the table times a mask, which
is drawn once and kept, because the derivation is replayed when gradients are pulled back.

Shape legend: N = rows of the activations (B examples, or B folded), A = heads, T and S = positions, E = width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.derived import cast, derive
from discreet.core.parameter import Guarded, Use, plain, rule, sized
from discreet.core.rules.elementwise import spread


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    use: Use,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(query key^T + attn_mask) value`` with a guarded ``attn_mask``: (1, A, T, S), or fewer axes."""
    if any(isinstance(operand, Guarded) or not use.is_batched(operand) for operand in (query, key, value)):
        raise use.refuse("query, key and value do not all carry the batch", "give each a leading batch axis.")
    mask_NATS = spread(use, attn_mask, query.dim(), query.shape[0])
    return F.scaled_dot_product_attention(
        query, key, value, mask_NATS, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@rule(F.dropout, torch.dropout)
def dropout(use: Use, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout of parameters alone: one mask for the whole microbatch, as autograd would have it."""
    if not training or p == 0:
        return cast(use, input, plain(input))
    if inplace:
        raise use.refuse("inplace=True changes the parameter", "pass inplace=False.")
    mask = F.dropout(torch.ones_like(plain(input)), p)
    return derive(replace(use, function=torch.mul), (input, mask), {}, isometric=False)


sized(F.dropout, torch.dropout)
