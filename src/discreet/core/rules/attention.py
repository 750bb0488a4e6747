"""Multi-head attention, written in functions that have rules: projections, softmax, projection.

PyTorch's function takes activations of shape (T, B, E) whatever ``batch_first`` says, because the module turns them;
here they become (B, T, E) before anything meets a parameter. Only the packed projection of a query, key and value that
differ needs a rule of its own: one weight in three blocks, each with its own input.

Shape legend: B = examples, K = blocks of the packed projection (query, key, value), T = target positions, S = source
positions, L = the longer of both, A = heads, E = width, D = E / A, I = inputs, O = outputs of one block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from discreet.core.forms import Dense, Form, wide_dtype
from discreet.core.outer import Outer
from discreet.core.parameter import Guarded, Use, decomposition, rule, turnable
from discreet.core.rules.contraction import Operation, contract
from discreet.errors import UnsupportedUse

turnable(F.linear, F.layer_norm, F.rms_norm, F.embedding)  # what stands between attention layers, (T, B, E) there


@decomposition(F.multi_head_attention_forward)
def attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``F.multi_head_attention_forward``: (T, B, E) and (S, B, E) -> (T, B, E) and the weights, (B, T, S) or None.

    Dropout draws the same mask as PyTorch's own function does.

    Raises:
        UnsupportedUse: activations that are parameters or have no batch axis, and static keys or values.
    """
    _refuse(query, key, value, static_k, static_v)
    if use_separate_proj_weight:
        projections = (q_proj_weight, k_proj_weight, v_proj_weight)
        projected = _projected_apart(query, key, value, projections, in_proj_bias)
    else:
        projected = _projected(query, key, value, in_proj_weight, in_proj_bias)
    query_BATD, key_BASD, value_BASD = _heads(projected, bias_k, bias_v, num_heads, zero=add_zero_attn)
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True without attn_mask: it is a hint about a mask; pass attn_mask as well.")
    hinted = is_causal and key_padding_mask is None and not need_weights
    extra = key_BASD.shape[2] - key.shape[0]
    mask = None if hinted else _mask(attn_mask, key_padding_mask, query_BATD, extra)
    dropout = dropout_p if training else 0.0
    weight_BATS = None
    if need_weights:
        scaled_BATD = query_BATD * math.sqrt(1.0 / query_BATD.shape[-1])
        score_BATS = scaled_BATD @ key_BASD.mT
        weight_BATS = F.dropout((score_BATS if mask is None else score_BATS + mask).softmax(-1), dropout)
        mixed_BATD = weight_BATS @ value_BASD
        weight_BATS = weight_BATS.mean(1) if average_attn_weights else weight_BATS
    else:
        mixed_BATD = F.scaled_dot_product_attention(query_BATD, key_BASD, value_BASD, mask, dropout, hinted)
    output_BTE = F.linear(mixed_BATD.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return output_BTE.transpose(0, 1).contiguous(), weight_BATS


def _refuse(query: Tensor, key: Tensor, value: Tensor, static_k: Tensor | None, static_v: Tensor | None) -> None:
    why = ""
    if any(isinstance(operand, Guarded) for operand in (query, key, value)):
        why = "its query, key or value is a parameter; give it the batch first: p.expand(B, -1, -1)."
    elif any(operand.dim() != 3 for operand in (query, key, value)):
        why = f"a query of shape {tuple(query.shape)} has no batch axis; add it: x.unsqueeze(0) with batch_first=True."
    elif static_k is not None or static_v is not None:
        why = "static_k or static_v is given; pass key and value instead."
    if why:
        raise UnsupportedUse(f"multi_head_attention_forward: {why}")


def _projected(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value from (T, B, E) to (B, T, E), by one weight (3 E, E)."""
    assert weight is not None
    if query is key and key is value:
        query_BTE, key_BSE, value_BSE = F.linear(query.transpose(0, 1), weight, bias).chunk(3, -1)
        return query_BTE, key_BSE, value_BSE
    longest = max(query.shape[0], key.shape[0])
    padded = [F.pad(operand, (0, 0, 0, 0, 0, longest - operand.shape[0])) for operand in (query, key, value)]
    output_BKLE = packed_linear(torch.stack(padded).permute(2, 0, 1, 3), weight, bias)
    query_BLE, key_BLE, value_BLE = output_BKLE.unbind(1)
    return query_BLE[:, : query.shape[0]], key_BLE[:, : key.shape[0]], value_BLE[:, : value.shape[0]]


def _projected_apart(
    query: Tensor, key: Tensor, value: Tensor, weights: tuple[Tensor | None, ...], bias: Tensor | None
) -> tuple[Tensor, ...]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        F.linear(operand.transpose(0, 1), weight, part)
        for operand, weight, part in zip((query, key, value), weights, biases, strict=True)
    )


def _heads(
    projected: tuple[Tensor, ...], bias_k: Tensor | None, bias_v: Tensor | None, heads: int, *, zero: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (B, A, T, D), keys and values with their learned and their zero position added."""
    query_BTE, key_BSE, value_BSE = projected
    if bias_k is not None and bias_v is not None:
        key_BSE = torch.cat([key_BSE, bias_k.expand(len(key_BSE), 1, -1)], 1)
        value_BSE = torch.cat([value_BSE, bias_v.expand(len(value_BSE), 1, -1)], 1)
    if zero:
        key_BSE, value_BSE = F.pad(key_BSE, (0, 0, 0, 1)), F.pad(value_BSE, (0, 0, 0, 1))
    query_BATD, key_BASD, value_BASD = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query_BTE, key_BSE, value_BSE)
    )
    return query_BATD, key_BASD, value_BASD


def _mask(attn_mask: Tensor | None, padding: Tensor | None, query_BATD: Tensor, extra: int) -> Tensor | None:
    """Both masks as one that is added to the scores, open at the ``extra`` positions; None when there is neither."""
    examples, heads = query_BATD.shape[:2]
    both = []
    if attn_mask is not None:
        added = F.pad(_added(attn_mask, query_BATD), (0, extra))
        both.append(added if added.dim() == 2 else added.unflatten(0, (examples, heads)))
    if padding is not None:
        both.append(F.pad(_added(padding, query_BATD), (0, extra))[:, None, None, :])
    if not both:
        return None
    merged = both[0] if len(both) == 1 else both[0] + both[1]
    if isinstance(merged, Guarded):
        merged = merged.expand(examples, 1, -1, -1)
    return merged


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean mask (True = closed) as what is added to the scores; another mask is that already."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)


def packed_linear(input_BKLI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``output_k = input_k @ weight_k.mT + bias_k``, the K blocks of weight (K O, I) and bias (K O,) stacked."""
    values = (weight,) if bias is None else (weight, bias)
    if has_torch_function(values):
        return handle_torch_function(packed_linear, values, input_BKLI, weight, bias)
    return PackedLinear().forward(input_BKLI, weight, bias)


@rule(packed_linear)
def meet_packed_linear(use: Use, input_BKLI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The rule of `packed_linear`."""
    return contract(use, PackedLinear(), input_BKLI, weight, bias)


class PackedLinear(Operation):
    """Linear maps side by side, with their weights stacked in one parameter; see `packed_linear`."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        blocks = input.shape[1]
        weight_KOI = weight.unflatten(0, (blocks, -1))
        output_KMO = _by_block(input) @ weight_KOI.mT
        if bias is not None:
            output_KMO = output_KMO + bias.reshape(blocks, 1, -1)
        return output_KMO.unflatten(1, (input.shape[0], -1)).transpose(0, 1)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        weight_KOI = weight.unflatten(0, (grad.shape[1], -1))
        return (_by_block(grad) @ weight_KOI).unflatten(1, (grad.shape[0], -1)).transpose(0, 1)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        return Outer(_of_examples(input, examples), _of_examples(grad, examples), weight.shape)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        return Dense(_of_examples(grad, examples).sum(2, dtype=wide_dtype(grad)).flatten(1))


def _by_block(value_BKLX: Tensor) -> Tensor:
    """(B, K, L, X) -> (K, B L, X)."""
    return value_BKLX.transpose(0, 1).flatten(1, 2)


def _of_examples(value_NKLX: Tensor, examples: int) -> Tensor:
    """(N, K, L, X) -> (B, K, N / B L, X): rows of one example are further positions of it.

    Contiguous: norm and sum each read it, and a product over strided groups takes twice as long.
    """
    return value_NKLX.unflatten(0, (examples, -1)).transpose(1, 2).flatten(2, 3).contiguous()
