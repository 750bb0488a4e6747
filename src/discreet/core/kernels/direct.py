"""Per-example products ``grad^T input`` in tiles that never leave the registers: for their squares, and for their sum.

A program makes one tile of a weight gradient, example by example. `product_squares` squares and sums it; `weighted_sum`
multiplies it by the example's factor and adds it to the others, so that operands of half precision need no scaled copy
in float32; `products` writes it, for routes that keep it. No atomic addition: results do not change from run to run.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import PLAIN, TENSOR_CORES, chain, narrow, on_device_of, widened
from discreet.core.kernels.results import Squares


def product_squares(input_BKSI: Tensor, grad_BKSO: Tensor) -> Squares:
    """``|grad^T input|^2`` per example: entries in float32, never in TF32, their squares along a row too.

    Args:
        input_BKSI, grad_BKSO: float32, bfloat16 or float16, with any strides.
    """
    examples, groups, positions, inputs = input_BKSI.shape
    outputs, pair = grad_BKSO.shape[3], [input_BKSI, grad_BKSO]
    tiling = TENSOR_CORES if narrow(pair) else PLAIN
    side = tiling.tile(outputs, inputs)
    tiles = (triton.cdiv(outputs, side[0]), triton.cdiv(inputs, side[1]))
    sums = torch.empty(examples, groups * tiles[0] * tiles[1], dtype=torch.float64, device=grad_BKSO.device)
    with on_device_of(grad_BKSO):
        _squares_kernel[(examples * groups * tiles[1], tiles[0])](
            *(input_BKSI, *input_BKSI.stride(), grad_BKSO, *grad_BKSO.stride()),
            *(sums, groups, positions, inputs, outputs, tiles[1]),
            OUTPUTS=side[0],
            INPUTS=side[1],
            DEPTH=tiling.depth,
            WIDE=widened(pair),
            **tiling.launch(side),
        )
    # A square errs with twice its entry, and a sum of squares along a row with half a spacing for each.
    return Squares(sums.sum(1) * (1 + (side[1] + 2) * 2.0**-24), chain([positions], tiling.depth))


def weighted_sum(input_BKSI: Tensor, grad_BKSO: Tensor, factor_B: Tensor) -> Tensor:
    """``sum_b factor_b grad_b^T input_b``, shape (K, O, I), float32. An entry that overflowed counts as 0.

    Args:
        input_BKSI, grad_BKSO: float32, bfloat16 or float16, with any strides.
        factor_B: one factor for each example; one of 0 leaves the example out, whatever it holds.
    """
    return _weighted(input_BKSI, grad_BKSO, factor_B.contiguous(), drop=True)


def products(input_BKSI: Tensor, grad_BKSO: Tensor) -> Tensor:
    """``grad_b^T input_b``, shape (B, K, O, I), float32."""
    examples, groups = input_BKSI.shape[:2]
    one = torch.ones(1, dtype=torch.float32, device=grad_BKSO.device)
    # The sum over one example in which every example is a group.
    operands = [value.flatten(0, 1).unsqueeze(0) for value in (input_BKSI, grad_BKSO)]
    return _weighted(*operands, one, drop=False).unflatten(0, (examples, groups))


_SHARES = 8


def _shares(tiles: int, examples: int, device: torch.device) -> int:
    """Into how many shares the examples go, so that all processors have work in each round; one holds one program.

    From the shape and the card alone. Each share is a sum to be written and read: two hundredths of a round.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return min(
        range(1, min(_SHARES, examples) + 1),
        key=lambda shares: triton.cdiv(tiles * shares, processors) / shares * (1 + 0.02 * shares),
    )


def _weighted(input_BKSI: Tensor, grad_BKSO: Tensor, factor_B: Tensor, *, drop: bool) -> Tensor:
    examples, groups, positions, inputs = input_BKSI.shape
    outputs, pair = grad_BKSO.shape[3], [input_BKSI, grad_BKSO]
    tiling = TENSOR_CORES if narrow(pair) else PLAIN
    side = tiling.tile(outputs, inputs)
    tiles = (triton.cdiv(outputs, side[0]), triton.cdiv(inputs, side[1]))
    shares = _shares(groups * tiles[0] * tiles[1], examples, grad_BKSO.device)
    total = torch.empty(shares, groups, outputs, inputs, dtype=torch.float32, device=grad_BKSO.device)
    with on_device_of(grad_BKSO):
        _weighted_kernel[(groups * tiles[1], tiles[0], shares)](
            *(input_BKSI, *input_BKSI.stride(), grad_BKSO, *grad_BKSO.stride()),
            *(factor_B, total, examples, groups, positions, inputs, outputs, tiles[1]),
            OUTPUTS=side[0],
            INPUTS=side[1],
            DEPTH=tiling.depth,
            WIDE=widened(pair),
            DROP=drop,
            **tiling.launch(side),
        )
    return total.sum(0) if shares > 1 else total[0]


@triton.jit
def _squares_kernel(
    input, input_b, input_k, input_s, input_i,
    grad, grad_b, grad_k, grad_s, grad_o,
    sums, groups, positions, inputs, outputs, input_tiles,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    tile = tl.program_id(1)
    owner = (place // input_tiles).to(tl.int64)
    example = owner // groups
    group = owner % groups
    columns = place % input_tiles * INPUTS + tl.arange(0, INPUTS)
    rows = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    left = grad + example * grad_b + group * grad_k + rows.to(tl.int64)[:, None] * grad_o
    right = input + example * input_b + group * input_k + columns.to(tl.int64)[None, :] * input_i
    product = _product(
        left, grad_s, (rows < outputs)[:, None], right, input_s, (columns < inputs)[None, :], positions,
        OUTPUTS, INPUTS, DEPTH, WIDE,
    )  # fmt: skip
    total = tl.sum(tl.sum(product * product, axis=1).to(tl.float64), axis=0)
    tl.store(sums + (owner * tl.num_programs(1) + tile) * input_tiles + place % input_tiles, total)


@triton.jit
def _weighted_kernel(
    input, input_b, input_k, input_s, input_i,
    grad, grad_b, grad_k, grad_s, grad_o,
    factors, out, examples, groups, positions, inputs, outputs, input_tiles,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    group = (place // input_tiles).to(tl.int64)
    columns = place % input_tiles * INPUTS + tl.arange(0, INPUTS)
    rows = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    left = grad + group * grad_k + rows.to(tl.int64)[:, None] * grad_o
    right = input + group * input_k + columns.to(tl.int64)[None, :] * input_i
    left_inside = (rows < outputs)[:, None]
    right_inside = (columns < inputs)[None, :]
    total = tl.full((OUTPUTS, INPUTS), 0.0, tl.float32)
    runs = tl.cdiv(positions, DEPTH)
    share = tl.program_id(2)
    shares = tl.num_programs(2)
    # One loop, not two: operands of the next example are on their way while this one is multiplied.
    for run in range(examples * share // shares * runs, examples * (share + 1) // shares * runs):
        example = (run // runs).to(tl.int64)
        depth = run % runs * DEPTH + tl.arange(0, DEPTH)
        product = _run(
            left + example * grad_b, grad_s, left_inside, right + example * input_b, input_s, right_inside, depth,
            positions, DEPTH, WIDE,
        )  # fmt: skip
        factor = tl.load(factors + example).to(tl.float32)
        total += factor * tl.where(factor != 0.0, product, 0.0)
    if DROP:
        total = tl.where(tl.abs(total) < float("inf"), total, 0.0)
    at = ((share * groups + group) * outputs + rows)[:, None] * inputs + columns[None, :]
    tl.store(out + at, total, mask=left_inside & right_inside)


@triton.jit
def _product(
    left, left_step, left_inside, right, right_step, right_inside, positions,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(OUTPUTS, INPUTS) entries of one example's ``grad^T input``, float32."""
    total = tl.full((OUTPUTS, INPUTS), 0.0, tl.float32)
    for start in range(0, positions, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        total += _run(left, left_step, left_inside, right, right_step, right_inside, depth, positions, DEPTH, WIDE)
    return total


@triton.jit
def _run(
    left, left_step, left_inside, right, right_step, right_inside, depth, positions, DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What these positions make of the product, in an accumulator of its own: chains of roundings stay short."""
    inside = depth < positions
    step = depth.to(tl.int64)
    one = tl.load(left + step[None, :] * left_step, mask=left_inside & inside[None, :], other=0.0)
    two = tl.load(right + step[:, None] * right_step, mask=right_inside & inside[:, None], other=0.0)
    if WIDE:
        one = one.to(tl.float32)
        two = two.to(tl.float32)
    return tl.dot(one, two, input_precision="ieee", max_num_imprecise_acc=DEPTH)
