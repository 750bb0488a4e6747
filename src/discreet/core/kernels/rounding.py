"""What `discreet.core.outer` adds to a squared norm for its rounding, in one launch instead of thirty.

A program reads the lengths of one example's positions, and writes one number. The formulas are those of ``rounded_up``
and of ``fused_direct_norm2`` there, where they are explained.

Shape legend: B = examples, K = groups, S = positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import on_device_of
from discreet.core.kernels.results import HARMLESS, NEARER, GramProducts, Squares

_EPS = tl.constexpr(2.0**-23)
_TINY = tl.constexpr(2.0**-126)
_FAR = tl.constexpr((2 - 2.0**-23) * 2.0**119)
_NEARER = tl.constexpr(NEARER)


def gram_norm2(found: GramProducts, *, inputs: int, outputs: int, harmless: float = HARMLESS) -> Tensor:
    """Squared norms of Gram products, (B,), float64; NaN or infinite where nothing bounds their rounding.

    Args:
        found: what the kernel of that name returned.
        inputs, outputs: I and O.
        harmless: what squares that vanished may come to, before the result is NaN.
    """
    sizes = inputs, outputs, harmless
    return _launch(found, found.input2_BKS, found.grad2_BKS, sizes, gram=True)


def direct_norm2(
    found: Squares, input_BKS: Tensor, grad_BKS: Tensor, *, inputs: int, outputs: int, harmless: float = HARMLESS
) -> Tensor:
    """The same for sums of squared products, from the lengths of the positions, float32."""
    return _launch(found, input_BKS, grad_BKS, (inputs, outputs, harmless), gram=False)


def _launch(
    found: GramProducts | Squares, input_BKS: Tensor, grad_BKS: Tensor, sizes: tuple[int, int, float], *, gram: bool
) -> Tensor:
    examples, groups, positions = input_BKS.shape
    norm2_B = torch.empty(examples, dtype=torch.float64, device=input_BKS.device)
    with on_device_of(input_BKS):
        _rounded_kernel[(examples,)](
            *(found.total_B, input_BKS.contiguous(), grad_BKS.contiguous(), norm2_B),
            *(groups, positions, *sizes, float(found.spacings)),
            GRAM=gram,
            BLOCK=min(1024, max(32, triton.next_power_of_2(positions))),
        )
    return norm2_B


@triton.jit
def _rounded_kernel(
    totals, input_lengths, grad_lengths, out, groups, positions, inputs, outputs, harmless, spacings,
    GRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, tl.float64)
    met2, input2, grad2, input_sum, grad_sum = zero, zero, zero, zero, zero
    for group in range(groups):
        row = (example * groups + group) * positions
        met = zero
        for start in range(0, positions, BLOCK):
            place = start + tl.arange(0, BLOCK)
            one = tl.load(input_lengths + row + place, mask=place < positions, other=0.0).to(tl.float64)
            two = tl.load(grad_lengths + row + place, mask=place < positions, other=0.0).to(tl.float64)
            if GRAM:
                # Not a maximum: what is not a number has to stay so.
                one = tl.sqrt(tl.where(one < 0.0, 0.0, one))
                two = tl.sqrt(tl.where(two < 0.0, 0.0, two))
            met += tl.sum(one * two, axis=0)
            input2 += tl.sum(one * one, axis=0)
            grad2 += tl.sum(two * two, axis=0)
            input_sum += tl.sum(one, axis=0)
            grad_sum += tl.sum(two, axis=0)
        met2 += met * met
    total = tl.load(totals + example)
    errs = (zero + spacings) * _EPS
    if GRAM:
        exact = tl.where(total < 0.0, 0.0, total) + (4 * _EPS + errs) * met2
    else:
        length = tl.sqrt(total) + errs * tl.sqrt(met2)
        exact = length * length + 4 * _EPS * met2
    hidden = _TINY * (input_sum * input_sum * outputs + grad_sum * grad_sum * inputs)
    exact = tl.where(hidden > 1e-7 * exact + harmless, float("nan"), exact)
    left = (_FAR - tl.maximum(tl.maximum(input2, grad2), met2)) / (_FAR * _NEARER)
    exact = tl.where(left < 1.0, exact / (left * left), exact)
    tl.store(out + example, tl.where(left <= 0.0, float("inf"), exact))
