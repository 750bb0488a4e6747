"""Per-example gradients of a convolution: sums of outer products over the windows of its input.

Nothing is unfolded where that can be avoided: a processor's kernel reads windows where they lie in the image. Without
one the gradient of all examples at once is that of one convolution whose groups are the examples (arXiv:1912.06015,
section 3). The weighted sum is the library's own weight gradient of a scaled operand; of few rows it is one product.

Shape legend: B = examples, F = folds (images of one example), C = channels, K = groups, P = pixels of the padded input,
S = output positions, T = taps of the kernel, I = C / K times T, O = outputs per group.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, Form, examples_at_a_time, wide, wide_dtype, zero_rows
from discreet.core.kernels import dispatch, processor
from discreet.core.kernels.processor import Spread
from discreet.core.kernels.results import HARMLESS
from discreet.core.outer import (
    Outer,
    Sums,
    going_over,
    gram_rows,
    rounded_up,
    scaled_by,
    spacings_of,
    sum_of_products,
)
from discreet.core.route import Choice, Route, WindowCost

Sizes = tuple[int, ...]
_FEW_ROWS = 2
"""A library's weight gradient takes up to six times as long as one product where there are few rows for each output, as
in the last layers of a network (measured: 2 x 2 to 7 x 7 positions); with more, unfolding costs more than that."""


@dataclass(frozen=True)
class Geometry:
    """Where the windows of a convolution lie: one number per spatial axis, and the groups of channels."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int


@dataclass(frozen=True)
class Windows(Form):
    """Weight gradients of a convolution.

    Attributes:
        input: (B, F, C, *image).
        grad: (B, F, K * O, *output).
        value_shape: (K * O, C / K, *kernel).
        geometry: stride, zero padding, dilation, groups.
    """

    input: Tensor
    grad: Tensor
    value_shape: torch.Size
    geometry: Geometry

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.input, self.grad)

    @property
    def shape(self) -> torch.Size:
        return self.value_shape

    @property
    def examples(self) -> int:
        return self.input.shape[0]

    @functools.cached_property
    def choice(self) -> Choice:
        """The route to the norm of this use."""
        outputs, channels, *kernel = self.value_shape
        positions, pixels, taps, suited = self._positions, self._pixels, math.prod(kernel), self._suits_kernels
        return WindowCost(
            positions=positions,
            inputs=channels * taps,
            outputs=outputs // self.geometry.groups,
            examples=self.examples,
            pixels=pixels,
            taps=taps,
            prices=dispatch.window_prices(self.input, suited=suited, positions=positions, pixels=pixels),
        ).choose()

    @functools.cached_property
    def _suits_kernels(self) -> bool:
        return dispatch.suit_windows(self.input, self.grad)

    @property
    def _positions(self) -> int:
        """S, of all folds."""
        return self.grad.shape[1] * math.prod(self.grad.shape[3:])

    @property
    def _pixels(self) -> int:
        """P, of all folds."""
        padded = [size + 2 * pad for size, pad in zip(self.input.shape[3:], self.geometry.padding, strict=True)]
        return self.input.shape[1] * math.prod(padded)

    def rows(self, start: int, stop: int) -> Windows:
        return replace(self, input=self.input[start:stop], grad=self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Windows:
        return replace(self, input=zero_rows(self.input, bad_B), grad=zero_rows(self.grad, bad_B))

    def joined(self, other: Windows) -> Windows | None:
        same = self.geometry == other.geometry and self.input.shape[2:] == other.input.shape[2:]
        if not same:
            return None
        return replace(self, input=torch.cat([self.input, other.input], 1), grad=torch.cat([self.grad, other.grad], 1))

    def norm2(self) -> Tensor:
        if self.choice.route is Route.KEEP:
            return Dense(self.per_example()).norm2()
        return self.unfolded().norm2()

    def quick_norm2(self) -> Tensor:
        return self._quick_norm2(HARMLESS)

    def doubted_norm2(self) -> Tensor:
        if self.choice.route is Route.KEEP:
            return self.norm2()
        if self.choice.route is Route.PRODUCT:
            return self.unfolded().doubted_norm2()
        hidden_B = torch.cat([part.unfolded().hidden2() for part in self._parts()])
        return going_over(self._quick_norm2(math.inf), self.norm2(), hidden_B)

    def _quick_norm2(self, harmless: float) -> Tensor:
        route = self.choice.route
        if route is Route.KEEP:
            return self.norm2()
        if route is Route.PRODUCT:
            return self.unfolded().quick_norm2()
        rows = max(self._positions, self._pixels if route is Route.PIXELS else 0)
        if self._suits_kernels and dispatch.suit_positions(rows):
            windows, grads = self._spread(by_pixel=route is Route.PIXELS)
            return processor.gram_norm2([windows], [grads], harmless=harmless)
        return torch.cat([part._gram_norm2(route, harmless) for part in self._parts()])

    def _gram_norm2(self, route: Route, harmless: float = HARMLESS) -> Tensor:
        if route is Route.WINDOWS:
            return self.unfolded()._quick_norm2(harmless)
        return self._norm2_by_pixels(harmless)

    def _parts(self, *, grams: int = 2) -> list[Windows]:
        """A few examples at a time, so that unfolded windows and so many Gram matrices stay small."""
        rows = self._pixels if self.choice.route is Route.PIXELS else self._positions
        unfolded = self._positions * math.prod(self.value_shape[1:])
        chunk = examples_at_a_time(self.geometry.groups * (grams * rows**2 + unfolded) + self.value_shape[0])
        return [self.rows(start, start + chunk) for start in range(0, self.examples, chunk)]

    def _norm2_by_pixels(self, harmless: float) -> Tensor:
        """``<windows windows^T, grad grad^T>`` without unfolding.

        Two windows' inner product is the sum over taps of the inner products of the pixels under that tap. So pixels
        are multiplied once, and shifted copies of that matrix are added up, axis by axis of the kernel.
        """
        # A processor's libraries add up as they like, and take twice the time in float64.
        convert = torch.Tensor.double if self.input.is_cpu else wide
        pixels, groups = self._padded(convert(self.input)), self.geometry.groups
        examples, folds, channels, *image = pixels.shape
        output = self.grad.shape[3:]
        by_group = pixels.reshape(examples, folds, groups, channels // groups, -1).transpose(1, 2)
        pixels_BKPC = by_group.transpose(3, 4).flatten(2, 3)
        products = gram_rows([pixels_BKPC], 0, pixels_BKPC.shape[2]).reshape(
            examples, groups, folds, *image, folds, *image
        )
        windows, axes = products, len(image)
        for axis, (taps, size) in enumerate(zip(self.value_shape[2:], output, strict=True)):
            gap, stride = self.geometry.dilation[axis], self.geometry.stride[axis]
            steps = [slice(tap * gap, tap * gap + (size - 1) * stride + 1, stride) for tap in range(taps)]
            windows = _summed_along(windows, 3 + axis, 4 + axes + axis, steps)
        positions = folds * math.prod(output)
        windows_BKSS = windows.reshape(examples, groups, positions, positions)
        grad = convert(self.grad).reshape(examples, folds, groups, self.value_shape[0] // groups, -1)
        grad_BKSO = grad.permute(0, 2, 1, 4, 3).flatten(2, 3)
        grads_BKSS = gram_rows([grad_BKSO], 0, positions)
        inputs, outputs = math.prod(self.value_shape[1:]), grad_BKSO.shape[3]
        spacings = spacings_of([pixels_BKPC]) + spacings_of([grad_BKSO])
        return rounded_up(
            sum_of_products(windows_BKSS, grads_BKSS),
            windows_BKSS.diagonal(dim1=2, dim2=3),
            grads_BKSS.diagonal(dim1=2, dim2=3),
            Sums(inputs, outputs, spacings, pixels.dtype, wide_dtype(self.grad), harmless),
        )

    def _padded(self, input: Tensor) -> Tensor:
        if not any(self.geometry.padding):
            return input  # to pad by nothing would copy
        ends = [size for pad in reversed(self.geometry.padding) for size in (pad, pad)]
        return F.pad(input, ends)

    def unfolded(self) -> Outer:
        """The same with windows as positions: a strided view of the padded input, copied when it is used."""
        examples, groups = self.examples, self.geometry.groups
        # Kernels take operands as they are stored.
        windows = self._view(self.input if dispatch.suit(self.input, self.grad) else wide(self.input))
        grads = self.grad.unflatten(2, (groups, -1)).movedim(1, 2).movedim(3, -1)
        operands = (value.reshape(examples, groups, self._positions, -1) for value in (windows, grads))
        return Outer(*operands, self.value_shape)

    def _view(self, input: Tensor) -> Tensor:
        """Windows of the padded input where they lie, (B, K, F, *output, C / K, *kernel)."""
        padded, groups = self._padded(input).contiguous(), self.geometry.groups
        examples, folds, channels, *_ = padded.shape
        row, fold, channel, *axes = padded.stride()
        per_group = channels // groups
        steps = [axis * stride for axis, stride in zip(axes, self.geometry.stride, strict=True)]
        taps = [axis * gap for axis, gap in zip(axes, self.geometry.dilation, strict=True)]
        return padded.as_strided(
            (examples, groups, folds, *self.grad.shape[3:], per_group, *self.value_shape[2:]),
            (row, per_group * channel, fold, *steps, channel, *taps),
        )

    def _spread(self, *, by_pixel: bool) -> tuple[Spread, Spread]:
        """Windows of the input, which the kernel pads, and the output gradients that they meet: nothing is copied."""
        output, kernel, place = self.grad.shape[3:], self.value_shape[2:], self.geometry
        sight = output, kernel, place.stride, place.padding, place.dilation, place.groups
        return processor.Windows(wide(self.input), *sight, by_pixel=by_pixel), self._spread_grads()

    def _spread_grads(self) -> Spread:
        """Output gradients are windows of one pixel each."""
        output = self.grad.shape[3:]
        one, none = (1,) * len(output), (0,) * len(output)
        return processor.Windows(self.grad, output, one, one, none, one, self.geometry.groups)

    def per_example(self) -> Tensor:
        if self._suits_kernels:
            return self._products().grad
        if self.input.device.type != "cpu":
            return torch.cat([part.unfolded().per_example() for part in self._parts(grams=0)])
        examples, folds = self.input.shape[:2]
        each = _weight_grad(
            wide(self.input).reshape(1, -1, *self.input.shape[3:]),
            wide(self.grad).reshape(1, -1, *self.grad.shape[3:]),
            torch.Size((examples * folds * self.value_shape[0], *self.value_shape[1:])),
            replace(self.geometry, groups=examples * folds * self.geometry.groups),
        ).reshape(examples, folds, *self.value_shape)
        return each[:, 0] if folds == 1 else each.sum(1)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        if self.input.device.type != "cpu":
            return self._summed_by_parts(factor_B)
        input, grad = wide(self.input), wide(self.grad)
        if self.examples * self._positions <= _FEW_ROWS * self.value_shape[0] // self.geometry.groups:
            return self._summed_by_rows(factor_B)
        if grad.numel() <= input.numel():
            grad = scaled_by(grad, factor_B)
        else:
            input = scaled_by(input, factor_B)
        return _weight_grad(input.flatten(0, 1), grad.flatten(0, 1), self.value_shape, self.geometry)

    def _summed_by_parts(self, factor_B: Tensor) -> Tensor:
        """The weighted sum by products: an accelerator's convolutions take ways that round more."""
        parts = self._parts(grams=0)
        factors = factor_B.split([part.examples for part in parts])
        sums = (part.unfolded().weighted_sum(factor) for part, factor in zip(parts, factors, strict=True))
        return functools.reduce(torch.add, sums)

    def _summed_by_rows(self, factor_B: Tensor) -> Tensor:
        """The weighted sum by one product: of scaled gradients (K, O, N) and unfolded windows (K, I, N), N = B F S.

        Rows are last, so that copies run along the image.
        """
        groups, axes = self.geometry.groups, 3 + len(self.geometry.stride)
        view = self._view(wide(self.input))
        windows = view.permute(1, *range(axes, view.dim()), 0, *range(2, axes)).flatten(-axes + 1).flatten(1, -2)
        grad = scaled_by(wide(self.grad), factor_B).unflatten(2, (groups, -1))
        grad = grad.permute(2, 3, 0, 1, *range(4, grad.dim())).flatten(2)
        return (grad @ windows.mT).reshape(self.value_shape)

    def reduced(self) -> Form:
        if self.choice.route is not Route.KEEP:
            return self
        return self._products() if self._suits_kernels else Dense(self.per_example(), scratch=True)

    def _products(self) -> Dense:
        """Gradients made by the kernel, which tells their norms too."""
        _, channels, *kernel = self.value_shape
        by_pixel = processor.pays_by_pixel(channels, math.prod(kernel))
        grad, norm2_B = processor.products(*self._spread(by_pixel=by_pixel))
        return Dense(grad.reshape(self.examples, *self.value_shape), scratch=True, known_norm2=norm2_B)


def _summed_along(products: Tensor, one: int, other: int, steps: list[slice]) -> Tensor:
    """The sum of the parts that each step cuts out of two axes at once."""
    parts = []
    for step in steps:
        index = [slice(None)] * products.dim()
        index[one] = index[other] = step
        parts.append(products[tuple(index)])
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _weight_grad(input: Tensor, grad: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The weight gradient of a convolution, by the library; of the weight only its shape is read."""
    weight = input.new_zeros(()).expand(shape)
    return torch.ops.aten.convolution_backward(
        *(grad, input, weight, None, geometry.stride, geometry.padding, geometry.dilation),
        *(False, [0] * len(geometry.stride), geometry.groups, [False, True, False]),
    )[1]
