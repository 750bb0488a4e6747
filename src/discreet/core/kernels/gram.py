"""The symmetric Gram product of arXiv:2110.05679, Eq. 3, in tiles: a program holds one pair of tiles of positions.

A tile of ``input input^T`` and the same tile of ``grad grad^T`` are made in registers, multiplied and summed, and one
number is written. Of the pairs (i, j) and (j, i) one is computed. No atomic addition: the numbers are summed in one
fixed order.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import (
    PLAIN,
    RUNS,
    SMALL,
    TENSOR_CORES,
    chain,
    described,
    flat_strides,
    is_long,
    loaded,
    narrow,
    on_device_of,
    widened,
)
from discreet.core.kernels.results import GramProducts

_RUNS = tl.constexpr(RUNS)


def gram_products(inputs_BKSI: Sequence[Tensor], grads_BKSO: Sequence[Tensor]) -> GramProducts:
    """``sum_kst <input_s, input_t> <grad_s, grad_t>`` per example, and the squared norms of the positions.

    Entries are summed in float32, never in TF32; those of half precision are products of exact factors. Rows of a tile
    are summed in float32, everything beyond them in float64.

    Args:
        inputs_BKSI, grads_BKSO: operands of one (B, K, S) in float32, bfloat16 or float16, with any strides. Several
            stand for all their pairs.
    """
    examples, groups, positions, _ = inputs_BKSI[0].shape
    input_tiling, grad_tiling = (TENSOR_CORES if narrow(operands) else PLAIN for operands in (inputs_BKSI, grads_BKSO))
    tiling = input_tiling if input_tiling is grad_tiling else PLAIN
    widths = [tuple(value.shape[3] for value in operands) for operands in (inputs_BKSI, grads_BKSO)]
    if tiling is TENSOR_CORES and is_long(widths[0] + widths[1]):
        tiling = SMALL  # with one accumulator more, larger tiles would not fit into the registers
    tile, _ = sides = tiling.tile(positions, positions)
    tiles = triton.cdiv(positions, tile)
    like = inputs_BKSI[0]
    sums = torch.empty(examples, groups * (tiles // 2 + 1) * tiles, dtype=torch.float64, device=like.device)
    input2, grad2 = torch.empty(2, examples, groups, positions, dtype=torch.float32, device=like.device)
    input_depth, grad_depth = (tiling.depth if tiling is SMALL else own.depth for own in (input_tiling, grad_tiling))
    input_at, input_is = _described(inputs_BKSI, tile, input_depth)
    grad_at, grad_is = _described(grads_BKSO, tile, grad_depth)
    # Cards with a copy engine have room for more stages, and take two of one tile for the time of one.
    ahead = (6 if tiles > 1 else 8) if input_is and grad_is and tiling is TENSOR_CORES else 0
    with on_device_of(like):
        _gram_kernel[(examples * groups * tiles, tiles // 2 + 1)](
            *(tuple(inputs_BKSI), input_at, flat_strides(inputs_BKSI), widths[0]),
            *(tuple(grads_BKSO), grad_at, flat_strides(grads_BKSO), widths[1]),
            *(sums, input2, grad2, groups, positions, tiles),
            TILE=tile,
            INPUT_DEPTH=input_depth,
            GRAD_DEPTH=grad_depth,
            INPUT_WIDE=widened(inputs_BKSI),
            GRAD_WIDE=widened(grads_BKSO),
            INPUT_LONG=is_long(widths[0]),
            GRAD_LONG=is_long(widths[1]),
            INPUT_DESCRIBED=input_is,
            GRAD_DESCRIBED=grad_is,
            ONE=tiles == 1,
            **tiling.launch(sides, ahead=ahead),
        )
    spacings = chain(widths[0], input_depth) + chain(widths[1], grad_depth) + (tile + 2) / 2
    return GramProducts(sums.sum(1), input2, grad2, spacings)


def _described(operands: Sequence[Tensor], rows: int, columns: int) -> tuple[object, bool]:
    """One operand as the copy engine reads it; several are read by their addresses."""
    return described(operands[0], rows, columns) if narrow(operands) and len(operands) == 1 else (None, False)


@triton.jit
def _gram_kernel(
    inputs, input_at, input_strides, input_widths, grads, grad_at, grad_strides, grad_widths,
    sums, input2, grad2, groups, positions, tiles,
    TILE: tl.constexpr, INPUT_DEPTH: tl.constexpr, GRAD_DEPTH: tl.constexpr,
    INPUT_WIDE: tl.constexpr, GRAD_WIDE: tl.constexpr, INPUT_LONG: tl.constexpr, GRAD_LONG: tl.constexpr,
    INPUT_DESCRIBED: tl.constexpr, GRAD_DESCRIBED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    # Tile i meets tile i + d of the ring, d = 0 ... tiles // 2: each unordered pair once, but for d = tiles / 2.
    place = tl.program_id(0)
    distance = tl.program_id(1)
    tile = place % tiles
    owner = (place // tiles).to(tl.int64)
    example = owner // groups
    group = owner % groups
    top = tile * TILE
    side = (tile + distance) % tiles * TILE
    rows = top + tl.arange(0, TILE)
    total = tl.full((), 0.0, tl.float64)
    if (2 * distance < tiles) | (tile < distance) | (distance == 0):
        left = _entries(
            inputs, input_at, input_strides, input_widths, example, group, top, side, positions,
            TILE, INPUT_DEPTH, INPUT_WIDE, INPUT_LONG, INPUT_DESCRIBED, ONE,
        )  # fmt: skip
        right = _entries(
            grads, grad_at, grad_strides, grad_widths, example, group, top, side, positions,
            TILE, GRAD_DEPTH, GRAD_WIDE, GRAD_LONG, GRAD_DESCRIBED, ONE,
        )  # fmt: skip
        total = tl.sum(tl.sum(left * right, axis=1).to(tl.float64), axis=0) * tl.where(distance == 0, 1.0, 2.0)
        if distance == 0:
            diagonal = rows[:, None] == rows[None, :]
            at = owner * positions + rows
            tl.store(input2 + at, tl.sum(tl.where(diagonal, left, 0.0), axis=1), mask=rows < positions)
            tl.store(grad2 + at, tl.sum(tl.where(diagonal, right, 0.0), axis=1), mask=rows < positions)
    tl.store(sums + (owner * (tiles // 2 + 1) + distance) * tiles + tile, total)


@triton.jit
def _entries(
    operands, described, strides, widths, example, group, top, side, positions,
    TILE: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr, DESCRIBED: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """(TILE, TILE) inner products between two runs of positions, added up over the operands, float32."""
    total = tl.full((TILE, TILE), 0.0, tl.float32)
    for n in tl.static_range(len(operands)):
        if DESCRIBED:
            base = described
        else:
            base = operands[n]
        steps = (strides[4 * n], strides[4 * n + 1], strides[4 * n + 2], strides[4 * n + 3])
        if LONG:
            for block in range(0, widths[n], DEPTH * _RUNS):
                part = tl.full((TILE, TILE), 0.0, tl.float32)
                for start in range(block, min(block + DEPTH * _RUNS, widths[n]), DEPTH):
                    part += _run(
                        base, steps, example, group, top, side, positions, start, widths[n],
                        TILE, DEPTH, WIDE, DESCRIBED, ONE,
                    )  # fmt: skip
                total += part
        else:
            for start in range(0, widths[n], DEPTH):
                total += _run(
                    base, steps, example, group, top, side, positions, start, widths[n],
                    TILE, DEPTH, WIDE, DESCRIBED, ONE,
                )  # fmt: skip
    return total


@triton.jit
def _run(
    base, steps, example, group, top, side, positions, start, width,
    TILE: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, DESCRIBED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """What these entries add, in an accumulator of its own: a chain as long as the operand would hide half a norm."""
    one = loaded(
        base, steps[0], steps[1], steps[2], steps[3], example, group, top, start, positions, width, TILE, DEPTH,
        DESCRIBED,
    )  # fmt: skip
    if ONE:
        two = one
    else:
        two = loaded(
            base, steps[0], steps[1], steps[2], steps[3], example, group, side, start, positions, width, TILE, DEPTH,
            DESCRIBED,
        )  # fmt: skip
    if WIDE:
        one = one.to(tl.float32)
        two = two.to(tl.float32)
    return tl.dot(one, tl.trans(two), input_precision="ieee", max_num_imprecise_acc=DEPTH)
