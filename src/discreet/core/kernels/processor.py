"""The kernels of a processor, in compiled C: operands are read where they lie, and no Gram matrix is held whole.

`_panels.c` packs sixteen positions (or features) side by side and multiplies tiles of sixteen by sixteen in registers,
on processors with AVX2 or AVX-512. Sums are float32 in runs of 32, whose blocks meet in float64. Threads are those of
PyTorch's own operations, and each has examples of its own: no number depends on how many there are.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from discreet.core import team

try:
    from discreet.core.kernels import _panels as _compiled
except ImportError:
    _compiled = None

MOST_POSITIONS = 2048
"""The tiles of both Gram matrices of one example, 8 bytes a number, are held at once: 32 MiB for each thread."""
_MOST_OPERANDS = 16
_RUN, _BLOCK = 32, 256
_ALONE = 1 << 18
"""Multiply-adds that take no longer than it takes to wake a second thread."""


@dataclass(frozen=True)
class Spread:
    """An operand whose positions or features lie along several axes, such as the windows of an image.

    Attributes:
        value: float32, (B, K, axes of positions, axes of features), with any strides.
        position_axes: how many axes are those of positions.
    """

    value: Tensor
    position_axes: int = 1

    @property
    def positions(self) -> int:
        """S."""
        return self._rows.numel()

    @property
    def width(self) -> int:
        """I or O."""
        return self._columns.numel()

    @property
    def spacings(self) -> float:
        """Bound on the error of an entry of the Gram matrix, in spacings of the product of two lengths.

        Half a spacing for each of the additions that follow one another, of a run and of the runs of a block.
        """
        return min(self.width, _RUN) / 2 + -(-min(self.width, _BLOCK) // _RUN) / 2

    @functools.cached_property  # kept here: the compiled code is told their addresses
    def _rows(self) -> Tensor:
        return _places(*self._axes(2, 2 + self.position_axes))

    @functools.cached_property
    def _columns(self) -> Tensor:
        return _places(*self._axes(2 + self.position_axes, self.value.dim()))

    def _axes(self, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.value.shape[start:stop]), self.value.stride()[start:stop]

    def described(self) -> tuple[int, ...]:
        """What the compiled code reads; valid while this lives."""
        example, group, *_ = self.value.stride()
        places = (self._rows.data_ptr(), self._columns.data_ptr())
        return (self.value.data_ptr(), example, group, self.width, *places, 0, 0, 0, 0)


@dataclass(frozen=True)
class Windows(Spread):
    """Windows of an image, told by its pixels: two windows' product is the sum over taps of products of two pixels.

    So pixels are multiplied once instead of once for each tap.

    Attributes:
        value: float32, (B, K, axes of pixels, axis of channels).
        position_axes: how many axes are those of pixels.
        where: int64, (S,), the pixel under the first tap of each window, in rising order.
        taps: int64, (T,), how many pixels later each tap lies.
    """

    where: Tensor = field(kw_only=True)
    taps: Tensor = field(kw_only=True)

    @property
    def pixels(self) -> int:
        """P."""
        return self._rows.numel()

    @property
    def positions(self) -> int:
        return self.where.numel()

    @property
    def spacings(self) -> float:
        """As of rows, and half a spacing for each block after the first: pixels' products are added up in float32."""
        return super().spacings + (-(-self.width // _BLOCK) - 1) / 2

    def described(self) -> tuple[int, ...]:
        if not all(_rises(places) for places in (self.where, self.taps)):
            raise AssertionError("windows or taps out of order: the compiled code would read past their ends")
        if int(self.where[-1] + self.taps[-1]) >= self.pixels:
            raise AssertionError("a window beyond its image: the compiled code would read past its end")
        *first, _, _, _, _ = super().described()
        return (*first, self.pixels, self.taps.numel(), self.where.data_ptr(), self.taps.data_ptr())


def _rises(places: Tensor) -> bool:
    """Whether these are whole numbers from zero on, one after another in memory, each larger than the last."""
    suits = places.dtype is torch.int64 and places.is_contiguous() and places.device.type == "cpu" and places.numel()
    return bool(suits) and int(places[0]) >= 0 and bool((places[1:] > places[:-1]).all())


@functools.lru_cache(maxsize=256)
def _places(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Where the elements of some axes lie, in numbers from the first; int64."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(sizes, strides, strict=True):
        places = (places.unsqueeze(1) + torch.arange(size, device="cpu") * stride).flatten()
    return places


def suit(*operands: Tensor) -> bool:
    """Whether these operands are plain float32 tensors of a processor that the compiled code was built for."""
    return len(operands) <= _MOST_OPERANDS and all(map(is_plain, operands)) and _is_there()


def is_plain(value: Tensor) -> bool:
    """Whether this is float32 in a processor's memory. What stands in for a tensor, as in a trace, has no memory."""
    return (
        type(value) is Tensor
        and value.device.type == "cpu"
        and value.dtype is torch.float32
        and value.layout is torch.strided
        and value.numel() > 0
        and not value.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and value.data_ptr() != 0  # zeros of autograd that were never written have no memory either
    )


@functools.cache
def _is_there() -> bool:
    return _compiled is not None and _compiled.is_there()


def gram_norm2(
    inputs: Sequence[Spread], grads: Sequence[Spread], *, rounded: bool = True, narrow: bool = False
) -> Tensor:
    """``<input input^T, grad grad^T>`` per example, (B,), float64, never below what the weighted sum adds.

    As in `discreet.core.outer.rounded_up`, with a closer bound on the products' own rounding: an entry of one Gram
    matrix errs with ``|x_s| |x_t|``, and is multiplied by ``<g_s, g_t>``, which is less than ``|g_s| |g_t|``.

    Args:
        inputs, grads: operands of one (B, K, S); several stand for all their pairs.
        rounded: whether bounds on rounding are added.
        narrow: use AVX2 where AVX-512 may be had.
    """
    examples = inputs[0].value.shape[0]
    norm2_B = torch.empty(examples, dtype=torch.float64, device="cpu")
    widths = [sum(operand.width for operand in operands) for operands in (inputs, grads)]
    work = inputs[0].value.shape[1] * inputs[0].positions ** 2 * sum(widths) // 2
    # Of several operands, whose lengths add up as squares do, the spacings of the worst.
    errs = [max(operand.spacings for operand in operands) for operands in (inputs, grads)]
    spacings = (*errs, 4.0) if rounded else (0.0, 0.0, 0.0)
    _shared_out(_compiled.gram_norm2, inputs, grads, out=norm2_B, work=work, spacings=spacings, narrow=narrow)
    return norm2_B


def products(input: Spread, grad: Spread, *, narrow: bool = False) -> Tensor:
    """``grad^T input`` per example, (B, K, O, I), float32.

    Args:
        input, grad: operands of one (B, K, S).
        narrow: use AVX2 where AVX-512 may be had.
    """
    examples, groups = input.value.shape[:2]
    out = torch.empty(examples, groups, grad.width, input.width, dtype=torch.float32, device="cpu")
    work = groups * input.positions * out.shape[2] * out.shape[3]
    _shared_out(_compiled.products, [input], [grad], out=out, work=work, spacings=(0.0, 0.0, 0.0), narrow=narrow)
    return out


def _shared_out(
    kernel: Callable[..., None],
    inputs: Sequence[Spread],
    grads: Sequence[Spread],
    *,
    out: Tensor,
    work: int,
    spacings: tuple[float, float, float],
    narrow: bool,
) -> None:
    """Run a kernel, with as many examples for each thread.

    Args:
        work: multiply-adds of one example.

    Raises:
        AssertionError: operands have other examples, groups or positions than others, or are not `suit`ed.
    """
    examples, groups = inputs[0].value.shape[:2]
    sizes = {(*operand.value.shape[:2], operand.positions) for operand in (*inputs, *grads)}
    if sizes != {(examples, groups, inputs[0].positions)}:
        raise AssertionError(f"operands of sizes {sorted(sizes)}: the compiled code would read past their ends")
    if not suit(*(operand.value for operand in (*inputs, *grads))):
        raise AssertionError(
            "operands that are no plain float32 tensors of this processor: the caller asks `suit` before"
        )
    threads = max(1, min(torch.get_num_threads(), examples, examples * work // _ALONE))
    edges = [examples * thread // threads for thread in range(threads + 1)]
    described = [tuple(operand.described() for operand in operands) for operands in (inputs, grads)]

    def some(share: tuple[int, int]) -> None:
        kernel(*described, groups, inputs[0].positions, *share, spacings, out.data_ptr(), narrow)

    team.for_each(some, list(itertools.pairwise(edges)))
