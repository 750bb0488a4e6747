"""How the kernels are given their operands: tile sizes, strides, and the length of the chains that errors come from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        rows, columns: the largest sides of a tile: positions and positions, or outputs and inputs.
        depth: products that are summed in one accumulator before the sum is added to the others.
        warps: for a tile of the largest sides; four for others.
        stages: how many steps ahead operands are loaded.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """The sides of a tile of so many rows and columns in all."""
        return _side(rows, self.rows), _side(columns, self.columns)

    def launch(self, tile: tuple[int, int], *, ahead: int = 0) -> dict[str, int]:
        """How a program of this tile is compiled.

        Args:
            ahead: stages, where not its own.
        """
        warps = self.warps if tile == (self.rows, self.columns) else 4
        return {"num_warps": warps, "num_stages": ahead or self.stages}


def _side(size: int, largest: int) -> int:
    return next(side for side in (16, 32, 64, 128) if side >= min(size, largest))


PLAIN = Tiling(rows=64, columns=64, depth=32, warps=8, stages=3)
"""Operands that are multiplied in float32: no register is spilled."""
TENSOR_CORES = Tiling(rows=128, columns=128, depth=64, warps=8, stages=3)
"""Operands of bfloat16. Their steps fill 96 KiB of shared memory, which the smallest of these cards has."""

SMALL = Tiling(rows=64, columns=64, depth=128, warps=4, stages=3)
"""The same for long rows."""


def narrow(operands: Sequence[Tensor]) -> bool:
    """Whether tensor cores multiply these operands."""
    return all(value.dtype is torch.bfloat16 for value in operands)


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


_ROOM = 200 << 10
"""Bytes of shared memory that the deepest of the kernels takes."""

RUNS = 16
"""Runs of an operand with a long row that are summed before their sum is added to the others."""


def is_long(lengths: Sequence[int]) -> bool:
    """Whether a row is so long, as a vocabulary is, that one chain over its runs would err by hundreds of spacings."""
    return max(lengths) > 4096


def chain(lengths: Sequence[int], depth: int) -> float:
    """Bound on the error of sums of so many products, made one after the other, in float32 spacings of their sizes.

    Float32 products are added with half a spacing each, in chains of ``depth`` and then chunk by chunk; in long rows
    chunks of chunks. A tensor core may cut each product where the largest ends: a whole spacing each (Fasi et al. 2021,
    PeerJ Computer Science 7:e330).
    """
    if is_long(lengths):
        return depth + RUNS / 2 + sum(triton.cdiv(length, depth * RUNS) for length in lengths) / 2
    return depth + sum(triton.cdiv(length, depth) for length in lengths) / 2


def on_device_of(value: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever its operands are on."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()


def described(value: Tensor, rows: int, columns: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """An operand (B, K, S, width) as the copy engine of a card reads it, in blocks; and whether it can.

    Steps of memory have to be multiples of 16 bytes, those of the last axis one number. Where they are not (a
    vocabulary of 50,257), and on cards without that engine, it is the tensor itself.

    Args:
        rows, columns: of a block, along positions and along the width.
    """
    if not _copies(value.device):
        return value, False
    aligned = 16 // value.element_size()
    steps = [stride if size > 1 else aligned for size, stride in zip(value.shape, value.stride(), strict=True)]
    fits = value.stride(3) == 1 and all(step > 0 and step % aligned == 0 for step in steps[:3])
    if not fits or value.data_ptr() % 16 or value.shape[3] < aligned:
        return value, False
    return TensorDescriptor(value, list(value.shape), [*steps[:3], 1], [1, 1, rows, columns]), True


@functools.cache
def _copies(device: torch.device) -> bool:
    """Whether a card has a copy engine for tensors, and shared memory for many stages; the interpreter has both."""
    if device.type != "cuda":
        return True
    card = torch.cuda.get_device_properties(device)
    return card.major >= 9 and card.shared_memory_per_block_optin >= _ROOM


@functools.cache
def processors(device: torch.device) -> int:
    """How many processors a card has; four for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def loaded(
    operand: tl.tensor, stride_b: tl.tensor, stride_k: tl.tensor, stride_s: tl.tensor, stride_w: tl.tensor,
    example: tl.tensor, group: tl.tensor, position: tl.tensor, column: tl.tensor, positions: tl.tensor,
    width: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(ROWS, COLUMNS) entries of one example: zeros beyond its positions, and beyond its width."""
    if DESCRIBED:
        value = operand.load([example.to(tl.int32), group.to(tl.int32), position, column]).reshape(ROWS, COLUMNS)
    else:
        rows = position + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        at = operand + example.to(tl.int64) * stride_b + group.to(tl.int64) * stride_k
        at += rows.to(tl.int64)[:, None] * stride_s + columns.to(tl.int64)[None, :] * stride_w
        value = tl.load(at, mask=(rows < positions)[:, None] & (columns < width)[None, :], other=0.0)
    return value
