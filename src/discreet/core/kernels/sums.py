"""Weighted sums of per-example products, ``sum_b factor_b grad_b^T input_b``, of bfloat16 operands on tensor cores.

Factors stay in float32 and no operand is copied: one accumulator holds the sum so far over the factor of the example at
hand. Before each example it is multiplied by the ratio of two factors that follow each other; at the end, by the last.
Horner's scheme, where a scaled copy of an operand would lose its bits, or be made twice. Factors are no smaller than
1e-30 of the clip bound (`discreet.core.forms.drop_vanishing`), so what the accumulator holds stays in float32's range.

A program makes one tile of the sum over a share of the examples; shares are summed in one fixed order.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import described, interpreted, loaded, on_device_of, processors

_SIDE, _DEPTH, _SHALLOW, _AT_ONCE, _BAND = 128, 64, 32, 2, 8
"""Side of a tile; positions of a step, and where they would leave a tenth of it empty; programs that a processor holds;
rows of tiles that go together."""
_TOGETHER = 1 << 13
"""Examples of one chain: a program holds it whole, and takes minutes to compile for 65,536."""
_SHARES = 12
_WRITING = 0.065
"""What a share costs, of the time in which all processors make one round of tiles over as many products."""


@dataclass(frozen=True)
class _Chain:
    """How examples follow each other; those without a factor are passed over.

    Attributes:
        ratio_B: the factor of the one before over an example's own.
        factor_B: its factor, or that of the one before.
        begin_B, end_B: the first one from here on that has a factor, and that has none; B where there is no more.
    """

    ratio_B: Tensor
    factor_B: Tensor
    begin_B: Tensor
    end_B: Tensor

    @classmethod
    def of(cls, factor_B: Tensor) -> _Chain:
        ratio, factor = torch.empty(2, len(factor_B), dtype=torch.float32, device=factor_B.device)
        begin, end = torch.empty(2, len(factor_B), dtype=torch.int32, device=factor_B.device)
        with on_device_of(factor_B):
            _chain_kernel[(1,)](
                *(factor_B.contiguous(), ratio, factor, begin, end, len(factor_B)),
                BLOCK=triton.next_power_of_2(len(factor_B)),
            )
        return cls(ratio, factor, begin, end)


_last: tuple[weakref.ref[Tensor], int, _Chain] | None = None


def _chained(factor_B: Tensor) -> _Chain:
    """The chain of these factors; made once for all sums that they are used for in a row."""
    global _last
    known = _last  # asked for once: another thread, of another device, may put its own there meanwhile
    if known is None or known[0]() is not factor_B or known[1] != factor_B._version:
        known = _last = (weakref.ref(factor_B), factor_B._version, _Chain.of(factor_B))
    return known[2]


def weighted_sum(input_BKSI: Tensor, grad_BKSO: Tensor, factor_B: Tensor) -> Tensor:
    """``sum_b factor_b grad_b^T input_b``, shape (K, O, I), float32. An entry that overflowed counts as 0.

    Args:
        input_BKSI, grad_BKSO: bfloat16, with any strides.
        factor_B: one factor for each example, not negative; one of 0 leaves the example out, whatever it holds.
    """
    examples, groups, positions, inputs = input_BKSI.shape
    if examples > _TOGETHER:
        parts = zip(*(value.split(_TOGETHER) for value in (input_BKSI, grad_BKSO, factor_B)), strict=True)
        return functools.reduce(torch.add, (weighted_sum(*part) for part in parts))
    outputs, chain = grad_BKSO.shape[3], _chained(factor_B)
    tiles = (triton.cdiv(outputs, _SIDE), triton.cdiv(inputs, _SIDE))
    shares = _shares(groups * tiles[0] * tiles[1], examples, processors(grad_BKSO.device) * _AT_ONCE)
    total = torch.empty(shares, groups, outputs, inputs, dtype=torch.float32, device=grad_BKSO.device)
    depth = _depth(positions)
    input_at, input_is = described(input_BKSI, depth, _SIDE)
    grad_at, grad_is = described(grad_BKSO, depth, _SIDE)
    with on_device_of(grad_BKSO):
        _sum_kernel[(groups * tiles[0] * tiles[1], shares)](
            *(input_at, *input_BKSI.stride(), grad_at, *grad_BKSO.stride()),
            *(chain.ratio_B, chain.factor_B, chain.begin_B, chain.end_B, total),
            *(examples, groups, positions, inputs, outputs, *tiles),
            SIDE=_SIDE,
            DEPTH=depth,
            BAND=_BAND,
            INPUT_DESCRIBED=input_is,
            GRAD_DESCRIBED=grad_is,
            WIDE=interpreted(),
            num_warps=4,
            num_stages=3 * _DEPTH // depth,
        )
    return total.sum(0) if shares > 1 else total[0]


def _depth(positions: int) -> int:
    filled, shallow = (triton.cdiv(positions, depth) * depth for depth in (_DEPTH, _SHALLOW))
    return _SHALLOW if filled > 1.1 * shallow else _DEPTH


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
    ratios, factors, begins, ends, out, examples, groups, positions, inputs, outputs, output_tiles, input_tiles,
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
    start, stop = examples * share // shares, examples * (share + 1) // shares
    runs = tl.cdiv(positions, DEPTH)
    total = tl.full((SIDE, SIDE), 0.0, tl.float32)
    first = tl.load(begins + start)
    while first < stop:
        end = min(tl.load(ends + first), stop)
        # One loop, not two: operands of the next example are on their way while this one is multiplied.
        for run in range(first * runs, end * runs):
            example = run // runs
            position = run % runs * DEPTH
            one = loaded(
                grad, grad_b, grad_k, grad_s, grad_o, example, group, position, top, positions, outputs, DEPTH, SIDE,
                GRAD_DESCRIBED,
            )  # fmt: skip
            two = loaded(
                input, input_b, input_k, input_s, input_i, example, group, position, side, positions, inputs, DEPTH,
                SIDE, INPUT_DESCRIBED,
            )  # fmt: skip
            if WIDE:
                one = one.to(tl.float32)
                two = two.to(tl.float32)
            total *= tl.where(position == 0, tl.load(ratios + example), 1.0)
            total = tl.dot(one.T, two, total, input_precision="ieee")
        first = examples
        if end < stop:
            first = tl.load(begins + end)
    total *= tl.load(factors + stop - 1)
    total = tl.where(tl.abs(total) < float("inf"), total, 0.0)
    at = (share.to(tl.int64) * groups + group) * outputs
    tl.store(
        out + (at + rows)[:, None] * inputs + columns[None, :], total,
        mask=(rows < outputs)[:, None] & (columns < inputs)[None, :],
    )  # fmt: skip


@triton.jit
def _chain_kernel(factors, ratios, carried, begins, ends, examples, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < examples
    factor = tl.load(factors + place, mask=inside, other=0.0).to(tl.float32)
    earlier = tl.load(factors + place - 1, mask=inside & (place > 0), other=0.0).to(tl.float32)
    last = tl.associative_scan(tl.where(factor > 0, place, -1), 0, _later)
    before = tl.associative_scan(tl.where(earlier > 0, place - 1, -1), 0, _later)
    previous = tl.load(factors + before, mask=before >= 0, other=1.0).to(tl.float32)
    ratio = tl.where((factor > 0) & (before >= 0), previous / tl.where(factor > 0, factor, 1.0), 1.0)
    tl.store(ratios + place, ratio, mask=inside)
    tl.store(carried + place, tl.load(factors + last, mask=last >= 0, other=1.0).to(tl.float32), mask=inside)
    begin = tl.associative_scan(tl.where(factor > 0, place, examples), 0, _sooner, reverse=True)
    end = tl.associative_scan(tl.where(factor > 0, examples, place), 0, _sooner, reverse=True)
    tl.store(begins + place, begin, mask=inside)
    tl.store(ends + place, tl.minimum(end, examples), mask=inside)


@triton.jit
def _later(one, other):
    return tl.maximum(one, other)


@triton.jit
def _sooner(one, other):
    return tl.minimum(one, other)
