"""Weighted sums of per-example products, ``sum_b factor_b grad_b^T input_b``, of bfloat16 operands on tensor cores.

Factors stay in float32 and no operand is copied: examples go in the order of their factors, and one accumulator holds
the sum so far over the factor of the example at hand. Before each example it is multiplied by the ratio of two factors
that follow each other, at most 1; at the end, by the largest. Horner's scheme, where a scaled copy of an operand would
lose its bits, or be made twice.

A program makes one tile of the sum over a share of the examples; shares are summed in one fixed order.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import described, interpreted, on_device_of, processors

_SIDE, _DEPTH, _AT_ONCE, _BAND = 128, 64, 2, 8
"""Side of a tile; products between two roundings; programs that a processor holds; rows of tiles that go together."""
_SHARES = 12
_WRITING = 0.016
"""What a share costs, of the time in which all processors make one round of tiles over as many products."""


@dataclass(frozen=True)
class _Ranked:
    """Examples in the order of their factors.

    Attributes:
        factor_B: ascending, float32.
        order_B: which example each is.
        dead: how many have no factor: they come first.
    """

    factor_B: Tensor
    order_B: Tensor
    dead: Tensor

    @classmethod
    def of(cls, factor_B: Tensor) -> _Ranked:
        factor, order_B = factor_B.to(torch.float32).sort()
        return cls(factor, order_B, (factor == 0).sum(dtype=torch.int32))


_last: tuple[weakref.ref[Tensor], _Ranked] | None = None


def _ranked(factor_B: Tensor) -> _Ranked:
    """The order of these factors; found once for all sums that they are used for in a row."""
    global _last
    if _last is None or _last[0]() is not factor_B:
        _last = (weakref.ref(factor_B), _Ranked.of(factor_B))
    return _last[1]


def weighted_sum(input_BKSI: Tensor, grad_BKSO: Tensor, factor_B: Tensor) -> Tensor:
    """``sum_b factor_b grad_b^T input_b``, shape (K, O, I), float32. An entry that overflowed counts as 0.

    Args:
        input_BKSI, grad_BKSO: bfloat16, with any strides.
        factor_B: one factor for each example, not negative; one of 0 leaves the example out, whatever it holds.
    """
    examples, groups, positions, inputs = input_BKSI.shape
    outputs, ranked = grad_BKSO.shape[3], _ranked(factor_B)
    tiles = (triton.cdiv(outputs, _SIDE), triton.cdiv(inputs, _SIDE))
    shares = _shares(groups * tiles[0] * tiles[1], examples, processors(grad_BKSO.device) * _AT_ONCE)
    total = torch.empty(shares, groups, outputs, inputs, dtype=torch.float32, device=grad_BKSO.device)
    input_at, input_is = described(input_BKSI, _DEPTH, _SIDE)
    grad_at, grad_is = described(grad_BKSO, _DEPTH, _SIDE)
    with on_device_of(grad_BKSO):
        _sum_kernel[(groups * tiles[0] * tiles[1], shares)](
            *(input_at, *input_BKSI.stride(), grad_at, *grad_BKSO.stride()),
            *(ranked.factor_B, ranked.order_B, ranked.dead, total),
            *(examples, groups, positions, inputs, outputs, *tiles),
            SIDE=_SIDE,
            DEPTH=_DEPTH,
            BAND=_BAND,
            INPUT_DESCRIBED=input_is,
            GRAD_DESCRIBED=grad_is,
            WIDE=interpreted(),
            num_warps=4,
            num_stages=4 if input_is and grad_is else 3,
        )
    return total.sum(0) if shares > 1 else total[0]


def _shares(tiles: int, examples: int, at_once: int) -> int:
    """Into how many shares the examples go, so that all processors have work in each round.

    From the shape and the card alone. Each share is a sum to be written and read.
    """

    def cost(shares: int) -> float:
        rounds = triton.cdiv(tiles * shares, at_once) / shares
        return rounds + _WRITING * tiles / at_once * (shares - 1)

    return min(range(1, max(1, min(_SHARES, examples)) + 1), key=cost)


@triton.jit
def _sum_kernel(
    input, input_b, input_k, input_s, input_i,
    grad, grad_b, grad_k, grad_s, grad_o,
    factors, order, dead, out, examples, groups, positions, inputs, outputs, output_tiles, input_tiles,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, INPUT_DESCRIBED: tl.constexpr,
    GRAD_DESCRIBED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Tiles of a band of rows follow each other: what one program loads is in the cache for its neighbours.
    place = tl.program_id(0)
    group = place // (output_tiles * input_tiles)
    place = place % (output_tiles * input_tiles)
    band = place // (BAND * input_tiles) * BAND
    height = min(output_tiles - band, BAND)
    top = (band + place % (BAND * input_tiles) % height) * SIDE
    side = place % (BAND * input_tiles) // height * SIDE
    rows = top + tl.arange(0, SIDE)
    columns = side + tl.arange(0, SIDE)
    share, shares = tl.program_id(1), tl.num_programs(1)
    first = tl.load(dead)
    start = first + (examples - first) * share // shares
    stop = first + (examples - first) * (share + 1) // shares
    runs = tl.cdiv(positions, DEPTH)
    total = tl.full((SIDE, SIDE), 0.0, tl.float32)
    # One loop, not two: operands of the next example are on their way while this one is multiplied.
    for run in range(start * runs, stop * runs):
        rank = run // runs
        position = run % runs * DEPTH
        example = tl.load(order + rank)
        before = tl.load(factors + max(rank - 1, 0))
        one = _loaded(
            grad, grad_b, grad_k, grad_s, grad_o, example, group, position, top, positions, outputs, DEPTH, SIDE,
            GRAD_DESCRIBED,
        )  # fmt: skip
        two = _loaded(
            input, input_b, input_k, input_s, input_i, example, group, position, side, positions, inputs, DEPTH, SIDE,
            INPUT_DESCRIBED,
        )  # fmt: skip
        if WIDE:
            one = one.to(tl.float32)
            two = two.to(tl.float32)
        total *= tl.where((position == 0) & (rank > start), before / tl.load(factors + rank), 1.0)
        total = tl.dot(one.T, two, total, input_precision="ieee")
    if stop > start:
        total *= tl.load(factors + stop - 1)
    total = tl.where(tl.abs(total) < float("inf"), total, 0.0)
    at = (share.to(tl.int64) * groups + group) * outputs
    tl.store(
        out + (at + rows)[:, None] * inputs + columns[None, :], total,
        mask=(rows < outputs)[:, None] & (columns < inputs)[None, :],
    )  # fmt: skip


@triton.jit
def _loaded(
    operand, stride_b, stride_k, stride_s, stride_w, example, group, position, column, positions, width,
    DEPTH: tl.constexpr, SIDE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """(DEPTH, SIDE) entries of one example: zeros beyond its positions, and beyond its width."""
    if DESCRIBED:
        return operand.load([example.to(tl.int32), group, position, column]).reshape(DEPTH, SIDE)
    else:
        rows = position + tl.arange(0, DEPTH)
        columns = column + tl.arange(0, SIDE)
        at = operand + example.to(tl.int64) * stride_b + group.to(tl.int64) * stride_k
        at += rows.to(tl.int64)[:, None] * stride_s + columns.to(tl.int64)[None, :] * stride_w
        return tl.load(at, mask=(rows < positions)[:, None] & (columns < width)[None, :], other=0.0)
