"""The kernels of a processor, in compiled C: operands are read where they lie, and no Gram matrix is held whole.

`_panels.c` packs sixteen positions (or features) side by side and multiplies tiles of sixteen by sixteen in registers,
on processors with AVX2 or AVX-512. Sums are float32 in runs of 32, whose blocks meet in float64. Threads are those of
PyTorch's own operations, and take example after example: no number depends on how many there are.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from discreet.core import team
from discreet.core.kernels.results import HARMLESS

try:
    from discreet.core.kernels import _panels as _compiled
except ImportError:
    _compiled = None

MOST_POSITIONS = 2048
"""The tiles of both Gram matrices of one example, 8 bytes a number, are held at once: 32 MiB for each thread."""
_MOST_OPERANDS, _MOST_AXES, _MOST_KEPT = 16, 3, 6
_LANES, _RUN, _BLOCK = 16, 32, 256
_ALONE = 1 << 18
"""Multiply-adds that take no longer than it takes to wake a second thread."""

Sizes = tuple[int, ...]


class _Places(NamedTuple):
    """What the shape of an operand tells.

    Attributes:
        width: numbers of one position, or of one pixel of windows that are told by pixels.
        taps: pixels of one window, where it is told by them.
        spacings: bound on the error of an entry of the Gram matrix, in spacings of the product of two lengths.
        told: to the compiled code, after the address and the stride of examples.
        kept: arrays whose addresses are told.
    """

    groups: int
    positions: int
    width: int
    taps: int
    spacings: float
    told: tuple[int, ...]
    kept: tuple[np.ndarray, ...]


class Spread:
    """An operand whose features may lie along several axes.

    Attributes:
        value: float32, (B, K, S, axes of features), with any strides.
        places: where its numbers lie, found once for each shape.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.places = _places(value.shape[1:], value.stride()[1:])

    def described(self) -> tuple[int, ...]:
        """What the compiled code reads; valid while this lives.

        Raises:
            AssertionError: this is no plain float32: the caller has not asked `suit`.
        """
        value = self.value
        address = value.data_ptr() if type(value) is Tensor and value.device.type == "cpu" else 0
        if address == 0 or value.dtype is not torch.float32 or value.layout is not torch.strided or value.is_neg():
            raise AssertionError("operands that are no plain float32 tensors of this processor: ask `suit` before")
        return (address, value.stride(0), *self.places.told)


class Windows(Spread):
    """Windows of an image with zeros around it: read where they lie, or told by its pixels.

    Zeros are put around the image of one example at a time, when it is read. By pixels, two windows' product is the sum
    over taps of products of two pixels: those are made once instead of once for each tap, and with zeros not at all.

    Attributes:
        value: float32, (B, folds, channels, axes of the image), with any strides.
    """

    def __init__(
        self, value: Tensor, output: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int,
        *, by_pixel: bool = False,
    ) -> None:  # fmt: skip
        self.value = value
        sight = output, kernel, stride, padding, dilation, groups, by_pixel
        self.places = _places_of_windows(value.shape[1:], value.stride()[1:], *sight)


@functools.lru_cache(maxsize=256)
def _places(shape: Sizes, strides: Sizes) -> _Places:
    _, rows, *columns = zip(shape, strides, strict=True)
    return _told(shape[0], strides[0], shape[1], (0, 0, 0, 0), _along([rows]), _along(columns))


@functools.lru_cache(maxsize=256)
def _places_of_windows(
    shape: Sizes, strides: Sizes, output: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes,
    groups: int, by_pixel: bool,
) -> _Places:  # fmt: skip
    """The same of windows. Pixels are numbered with the zeros around them, fold after fold."""
    (folds, channels, *image), (fold_at, channel_at, *image_at) = shape, strides
    padded = [size + 2 * pad for size, pad in zip(image, padding, strict=True)]
    spans = zip(padded, output, stride, kernel, dilation, strict=True)
    beyond = any((size - 1) * step + (taps - 1) * gap >= whole for whole, size, step, taps, gap in spans)
    least = min(*shape, *output, *stride, *kernel, *dilation, *(pad + 1 for pad in padding))
    if beyond or least < 1 or channels % groups or len(image) > _MOST_AXES:
        raise AssertionError("a window beyond its image: the compiled code would read past its end")
    each, group_at = channels // groups, channel_at * (channels // groups)
    *steps, plane = itertools.accumulate(reversed(padded), operator.mul, initial=1)
    pixels, steps = folds * plane, steps[::-1]
    first = sum(map(operator.mul, padding, steps))
    spots = first + _along([(folds, plane), *zip(image, steps, strict=True)])
    if by_pixel:  # up to three pixels, the last of all, are added up in an order of their own: zeros, or as they are
        is_copied = any(padding) and pixels - 1 - spots[-1] < pixels % 4
    else:
        is_copied = any(padding) or (math.prod(kernel) > 1 and image_at[-1] != 1)
    axes = [(each, channel_at, pixels), (folds, fold_at, plane), *zip(image, image_at, steps, strict=True)]
    axes += [(1, 0, 0)] * (_MOST_AXES - len(image))
    axes.sort(key=lambda axis: (axis[0] > 1, -axis[1]))  # read in the order in which the numbers lie
    if is_copied:
        channel_at, fold_at, image_at, image, spots = pixels, plane, steps, padded, np.arange(pixels)
    room = each * pixels if is_copied else 0
    numbers = np.array([first, *itertools.chain(*axes)], dtype=np.int64)
    if by_pixel:
        where = _along([(folds, plane), *_stepped(output, steps, stride)])
        taps = _along(_stepped(kernel, steps, dilation))
        rows = _along([(folds, fold_at), *zip(image, image_at, strict=True)])
        kept = rows, _along([(each, channel_at)]), numbers, where, taps, spots
        return _told(groups, group_at, len(where), (len(rows), pixels, len(taps), room), *kept)
    rows = _along([(folds, fold_at), *_stepped(output, image_at, stride)])
    columns = _along([(each, channel_at), *_stepped(kernel, image_at, dilation)])
    return _told(groups, group_at, len(rows), (0, 0, 0, room), rows, columns, numbers)


def _stepped(sizes: Sizes, steps: Sequence[int], times: Sizes) -> Iterable[tuple[int, int]]:
    return zip(sizes, map(operator.mul, steps, times), strict=True)


def _along(axes: Iterable[tuple[int, int]]) -> np.ndarray:
    """Where the elements of axes of such sizes and strides lie, in numbers from the first; int64."""
    each = (np.arange(size, dtype=np.int64) * stride for size, stride in axes)
    return functools.reduce(np.add.outer, each, np.zeros(1, dtype=np.int64)).ravel()


def _told(groups: int, group_at: int, positions: int, counts: Sizes, *kept: np.ndarray) -> _Places:
    """Half a spacing for each addition that follows another: of a run, of the runs of a block; of blocks of pixels."""
    width = len(kept[1])
    spacings = min(width, _RUN) / 2 + -(-min(width, _BLOCK) // _RUN) / 2
    if counts[0]:
        spacings += (-(-width // _BLOCK) - 1) / 2
    addresses = [array.ctypes.data for array in kept] + [0] * (_MOST_KEPT - len(kept))
    return _Places(groups, positions, width, max(1, counts[2]), spacings, (group_at, width, *counts, *addresses), kept)


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
    inputs: Sequence[Spread],
    grads: Sequence[Spread],
    *,
    harmless: float = HARMLESS,
    rounded: bool = True,
    narrow: bool = False,
) -> Tensor:
    """``<input input^T, grad grad^T>`` per example, (B,), float64, never below what the weighted sum adds.

    As in `discreet.core.outer.rounded_up`, with a closer bound on the products' own rounding: an entry of one Gram
    matrix errs with ``|x_s| |x_t|``, and is multiplied by ``<g_s, g_t>``, which is less than ``|g_s| |g_t|``.

    Args:
        inputs, grads: operands of one (B, K, S); several stand for all their pairs.
        harmless: what squares that vanished may come to, before the result is NaN.
        rounded: whether bounds on rounding are added.
        narrow: use AVX2 where AVX-512 may be had.
    """
    norm2_B = torch.empty(inputs[0].value.shape[0], dtype=torch.float64, device="cpu")
    first = inputs[0].places
    work = first.groups * first.positions**2 * sum(operand.places.width for operand in (*inputs, *grads)) // 2
    # Of several operands, whose lengths add up as squares do, the spacings of the worst.
    errs = [max(operand.places.spacings for operand in operands) for operands in (inputs, grads)]
    bounds = (*errs, 4.0, harmless) if rounded else (0.0, 0.0, 0.0, harmless)
    _shared_out(_compiled.gram_norm2, inputs, grads, None, norm2_B, work=work, bounds=bounds, narrow=narrow)
    return norm2_B


def products(input: Spread, grad: Spread, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """``grad^T input`` per example, (B, K, O, I), float32, and their squared norms, (B,), float64.

    Args:
        input, grad: operands of one (B, K, S).
        narrow: use AVX2 where AVX-512 may be had.
    """
    examples, (groups, positions, width, taps, *_), outputs = input.value.shape[0], input.places, grad.places.width
    out = torch.empty((examples, groups, outputs, width * taps), dtype=torch.float32, device="cpu")
    norm2_B = torch.empty(examples, dtype=torch.float64, device="cpu")
    work = groups * positions * outputs * width * taps
    _shared_out(_compiled.products, [input], [grad], out, norm2_B, work=work, narrow=narrow)
    return out, norm2_B


def pays_by_pixel(channels: int, taps: int) -> bool:
    """Whether `products` of windows are made sooner by pixels, which are packed once, each in lanes of its own."""
    return taps * math.ceil(channels / _LANES) <= 1.25 * math.ceil(channels * taps / _LANES)


def _shared_out(
    kernel: Callable[..., None],
    inputs: Sequence[Spread],
    grads: Sequence[Spread],
    out: Tensor | None,
    norm2_B: Tensor,
    *,
    work: int,
    narrow: bool,
    bounds: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
) -> None:
    """Run a kernel; work is multiply-adds of one example.

    Raises:
        AssertionError: operands have other examples, groups or positions than others, or are not `suit`ed.
    """
    examples, (groups, positions, *_) = inputs[0].value.shape[0], inputs[0].places
    for operand in (*inputs, *grads):
        sizes = operand.value.shape[0], operand.places.groups, operand.places.positions
        if sizes != (examples, groups, positions):
            raise AssertionError(f"operands of other sizes, {sizes}: the compiled code would read past their ends")
    threads = max(1, min(torch.get_num_threads(), examples, examples * work // _ALONE))
    described = [tuple([operand.described() for operand in operands]) for operands in (inputs, grads)]
    to = (0 if out is None else out.data_ptr()), norm2_B.data_ptr()
    run = functools.partial(kernel, *described, groups, positions, bounds, *to, narrow)
    team.for_rows(run, examples, threads)
