"""Per-example products ``grad^T input`` in tiles that never leave the registers: for their squares, or to be kept.

A program makes one tile of one example's weight gradient. `product_squares` squares and sums it; `products` writes it,
for routes that keep it. No atomic addition: results do not change from run to run.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import PLAIN, TENSOR_CORES, chain, described, loaded, narrow, on_device_of, widened
from discreet.core.kernels.results import Squares


def product_squares(input_BKSI: Tensor, grad_BKSO: Tensor) -> Squares:
    """``|grad^T input|^2`` per example: entries in float32, never in TF32, their squares along a row too.

    Args:
        input_BKSI, grad_BKSO: float32, bfloat16 or float16, with any strides.
    """
    examples, groups, positions, _ = input_BKSI.shape
    side, depth, tiles = _cut(input_BKSI, grad_BKSO)
    sums = torch.empty(examples, groups * tiles[0] * tiles[1], dtype=torch.float64, device=grad_BKSO.device)
    _launch(input_BKSI, grad_BKSO, sums, kept=False)
    # A square errs with twice its entry, and a sum of squares along a row with half a spacing for each.
    return Squares(sums.sum(1) * (1 + (side[1] + 2) * 2.0**-24), chain([positions], depth))


def products(input_BKSI: Tensor, grad_BKSO: Tensor) -> Tensor:
    """``grad_b^T input_b``, shape (B, K, O, I), float32."""
    examples, groups, _, inputs = input_BKSI.shape
    each = torch.empty(examples, groups, grad_BKSO.shape[3], inputs, dtype=torch.float32, device=grad_BKSO.device)
    _launch(input_BKSI, grad_BKSO, each, kept=True)
    return each


def _cut(input_BKSI: Tensor, grad_BKSO: Tensor) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """The sides of a tile, how many products are summed in one accumulator, and how many tiles there are."""
    outputs, inputs = grad_BKSO.shape[3], input_BKSI.shape[3]
    tiling = TENSOR_CORES if narrow([input_BKSI, grad_BKSO]) else PLAIN
    side = tiling.tile(outputs, inputs)
    return side, tiling.depth, (triton.cdiv(outputs, side[0]), triton.cdiv(inputs, side[1]))


def _launch(input_BKSI: Tensor, grad_BKSO: Tensor, out: Tensor, *, kept: bool) -> None:
    pair = [input_BKSI, grad_BKSO]
    tiling = TENSOR_CORES if narrow(pair) else PLAIN
    examples, groups, positions, inputs = input_BKSI.shape
    outputs, (side, depth, tiles) = grad_BKSO.shape[3], _cut(input_BKSI, grad_BKSO)
    input_at, input_is = described(input_BKSI, depth, side[1]) if tiling is TENSOR_CORES else (input_BKSI, False)
    grad_at, grad_is = described(grad_BKSO, depth, side[0]) if tiling is TENSOR_CORES else (grad_BKSO, False)
    with on_device_of(grad_BKSO):
        _product_kernel[(examples * groups * tiles[1], tiles[0])](
            *(input_at, *input_BKSI.stride(), grad_at, *grad_BKSO.stride()),
            *(out, groups, positions, inputs, outputs, tiles[1]),
            OUTPUTS=side[0],
            INPUTS=side[1],
            DEPTH=depth,
            WIDE=widened(pair),
            KEPT=kept,
            INPUT_DESCRIBED=input_is,
            GRAD_DESCRIBED=grad_is,
            **tiling.launch(side, ahead=6 if input_is and grad_is else 0),
        )


@triton.jit
def _product_kernel(
    input, input_b, input_k, input_s, input_i,
    grad, grad_b, grad_k, grad_s, grad_o,
    out, groups, positions, inputs, outputs, input_tiles,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr, KEPT: tl.constexpr,
    INPUT_DESCRIBED: tl.constexpr, GRAD_DESCRIBED: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    tile = tl.program_id(1)
    owner = (place // input_tiles).to(tl.int64)
    example = owner // groups
    group = owner % groups
    side = place % input_tiles * INPUTS
    top = tile * OUTPUTS
    product = tl.full((OUTPUTS, INPUTS), 0.0, tl.float32)
    for start in range(0, positions, DEPTH):
        one = loaded(
            grad, grad_b, grad_k, grad_s, grad_o, example, group, start, top, positions, outputs, DEPTH, OUTPUTS,
            GRAD_DESCRIBED,
        )  # fmt: skip
        two = loaded(
            input, input_b, input_k, input_s, input_i, example, group, start, side, positions, inputs, DEPTH, INPUTS,
            INPUT_DESCRIBED,
        )  # fmt: skip
        if WIDE:
            one = one.to(tl.float32)
            two = two.to(tl.float32)
        # What these positions make of the product, in an accumulator of its own: chains of roundings stay short.
        product += tl.dot(one.T, two, input_precision="ieee", max_num_imprecise_acc=DEPTH)
    if KEPT:
        rows = top + tl.arange(0, OUTPUTS)
        columns = side + tl.arange(0, INPUTS)
        at = (owner * outputs + rows)[:, None] * inputs + columns[None, :]
        tl.store(out + at, product, mask=(rows < outputs)[:, None] & (columns < inputs)[None, :])
    else:
        total = tl.sum(tl.sum(product * product, axis=1).to(tl.float64), axis=0)
        tl.store(out + (owner * tl.num_programs(1) + tile) * input_tiles + place % input_tiles, total)
