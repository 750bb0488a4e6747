"""Rules for conv1d, conv2d and conv3d, with stride, padding, dilation and groups.

Shape legend: N = rows of the input (B examples, or B folded), C = channels, K = groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, Form, wide_dtype
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import Operation, contract
from discreet.core.windows import Geometry, Sizes, Windows

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution over as many spatial axes as its geometry has, with symmetric zero padding."""

    geometry: Geometry

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        at = self.geometry
        return _CONVOLUTIONS[len(at.stride) - 1](input, weight, bias, at.stride, at.padding, at.dilation, at.groups)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        at = self.geometry
        if max(at.stride) > 1 == math.prod(weight.shape[2:]) == at.groups and not any(at.padding) and grad.is_cpu:
            return _grad_of_pixels(grad, input, weight, at.stride)
        return grad_of_input(grad, input, weight, at)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        input = input.reshape(examples, -1, *input.shape[1:])
        grad = grad.reshape(examples, -1, *grad.shape[1:])
        return Windows(input, grad, weight.shape, self.geometry)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        each_NC = grad.flatten(2).sum(2, dtype=wide_dtype(grad))
        folded = each_NC.shape[0] != examples
        return Dense(each_NC.reshape(examples, -1, each_NC.shape[1]).sum(1) if folded else each_NC)


def grad_of_input(
    grad: Tensor, input: Tensor, weight: Tensor, at: Geometry, output_padding: Sizes | None = None
) -> Tensor:
    """The library's gradient of the input; of a transposed convolution where an output padding is given."""
    beyond = [0] * len(at.stride) if output_padding is None else output_padding
    input_grad, _, _ = torch.ops.aten.convolution_backward(
        *(grad, input.to(grad.dtype), weight, None, at.stride, at.padding, at.dilation),
        *(output_padding is not None, beyond, at.groups, [True, False, False]),
    )
    return input_grad


def _grad_of_pixels(grad: Tensor, input: Tensor, weight: Tensor, stride: Sizes) -> Tensor:
    """Where single pixels are seen, and others not: one product. The library takes twice as long, and three images."""
    seen = (weight.flatten(1).T @ grad.flatten(2)).unflatten(2, grad.shape[2:])
    every = grad.new_zeros(input.shape)
    every[(..., *[slice(None, None, step) for step in stride])] = seen
    return every


def _register(function: Callable[..., Tensor], axes: int) -> None:
    @rule(function)
    def meeting(
        use: Use, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sizes = 1,
        padding: str | int | Sizes = 0, dilation: int | Sizes = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return _convolve(use, axes, input, weight, bias, stride, padding, dilation, groups)


for _axes, _function in enumerate(_CONVOLUTIONS, start=1):
    _register(_function, _axes)


def _convolve(
    use: Use, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sizes,
    padding: str | int | Sizes, dilation: int | Sizes, groups: int,
) -> Tensor:  # fmt: skip
    if isinstance(input, Guarded) or input.dim() != axes + 2:
        raise use.refuse(
            f"an input of shape {tuple(input.shape)}", f"the rule covers activations [batch, channels] + {axes} axes."
        )
    spread = along(dilation, axes)
    if isinstance(padding, str):
        total = [
            gap * (kernel - 1) if padding == "same" else 0 for gap, kernel in zip(spread, weight.shape[2:], strict=True)
        ]
        if any(size % 2 for size in total):
            ends = [end for size in reversed(total) for end in (size // 2, size - size // 2)]
            padded = F.pad(input, ends)
            use = use.renamed(input, padded)
            input, total = padded, [0] * axes
        padding = tuple(size // 2 for size in total)
    operation = Convolution(Geometry(along(stride, axes), along(padding, axes), spread, groups))
    return contract(use, operation, input, weight, bias)


def along(value: int | Sizes, axes: int) -> Sizes:
    """One number for each spatial axis."""
    if isinstance(value, int):
        return (value,) * axes
    if type(value) is tuple and len(value) == axes and {*map(type, value)} == {int}:
        return value  # numpy's integers overflow, and are the same keys as Python's
    sizes = tuple([int(size) for size in value])
    return sizes * axes if len(sizes) == 1 else sizes
