"""Gradients of the scale and the shift of a normalisation, for each example: read once, where they took nine passes.

Shape legend: N = rows of the input (examples, or several of one), S = positions, D = normalised numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import on_device_of

_ROWS, _COLUMNS = 64, 64


def scale_grads(input_NSD: Tensor, grad_NSD: Tensor, mean_NS: Tensor, rstd_NS: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_s grad (input - mean) rstd`` and ``sum_s grad``, both (N, D), float32.

    Args:
        input_NSD, grad_NSD: contiguous, float32, bfloat16 or float16.
        mean_NS, rstd_NS: of each position, contiguous, float32.
    """
    rows, positions, width = input_NSD.shape
    scale, shift = torch.empty(2, rows, width, dtype=torch.float32, device=input_NSD.device)
    with on_device_of(input_NSD):
        _affine_kernel[(rows * triton.cdiv(width, _COLUMNS),)](
            *(input_NSD, grad_NSD, mean_NS, rstd_NS, scale, shift, positions, width),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return scale, shift


@triton.jit
def _affine_kernel(
    input, grad, mean, rstd, scale, shift, positions, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # One axis of programs: along others there are 65,535 at most.
    row = (tl.program_id(0) // tl.cdiv(width, COLUMNS)).to(tl.int64)
    column = tl.program_id(0) % tl.cdiv(width, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    scales = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    shifts = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, positions, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = (place < positions)[:, None] & (column < width)[None, :]
        at = (row * positions + place)[:, None] * width + column[None, :]
        one = tl.load(input + at, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + row * positions + place, mask=place < positions, other=0.0)
        width_of = tl.load(rstd + row * positions + place, mask=place < positions, other=0.0)
        scales += two * ((one - middle[:, None]) * width_of[:, None])
        shifts += two
    out = row * width + column
    tl.store(scale + out, tl.sum(scales, axis=0), mask=column < width)
    tl.store(shift + out, tl.sum(shifts, axis=0), mask=column < width)
