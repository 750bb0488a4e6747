"""How the kernels are given their operands: tile sizes, strides, and the length of the chains that errors come from.

Sizes are not measured: they were chosen by counting registers and shared memory of an A100 and an H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

_DEPTH = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 64}
"""Products that are summed before the sum is added to the others."""


def tile_of(size: int) -> int:
    """Length of a tile's side for so many positions, inputs or outputs."""
    return next(side for side in (16, 32, 64) if side >= min(size, 64))


def warps_of(tile: int) -> int:
    """Enough threads that no register of the largest tile is spilled."""
    return 8 if tile == 64 else 4


def depth_of(operands: Sequence[Tensor]) -> int:
    """How many products are summed in one accumulator."""
    return min(_DEPTH[value.dtype] for value in operands)


def flat_strides(operands: Sequence[Tensor]) -> tuple[int, ...]:
    """Strides of (B, K, S, width), one operand after the other."""
    return tuple(stride for value in operands for stride in value.stride())


def widened(operands: Sequence[Tensor]) -> bool:
    """Whether entries become float32 before they are multiplied.

    What tensor cores do with subnormal entries is not specified (PTX ISA, ``mma``). bfloat16 has them where float32 has
    (2^-126), and `outer` adds what they could have been; those of float16 begin at 6e-5. Triton's interpreter cannot
    multiply bfloat16 at all: numpy has no such type.
    """
    mixed = len({value.dtype for value in operands}) > 1
    return mixed or operands[0].dtype is torch.float16 or (operands[0].dtype is torch.bfloat16 and interpreted())


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def chain(lengths: Sequence[int], depth: int) -> float:
    """Bound on the error of sums of so many products, made one after the other, in float32 spacings of their sizes.

    Float32 products are added with half a spacing each, in chains of ``depth`` and then chunk by chunk. A tensor core
    may cut each product where the largest ends: a whole spacing each (Fasi et al. 2021, PeerJ Computer Science 7:e330).
    """
    return depth + sum(triton.cdiv(length, depth) for length in lengths) / 2


def on_device_of(value: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its operands are on."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()
