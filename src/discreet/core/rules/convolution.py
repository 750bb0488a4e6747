"""Rules for conv1d, conv2d and conv3d, with stride, padding, dilation and groups.

A convolution is a linear map on unfolded windows, so its per-example gradient is a sum of outer products over output
positions. Windows are strided views of the padded input; they are copied only when the norm is taken.

Shape legend: N = rows of the input (B examples, or B folded), C = channels, K = groups, S = output positions,
I = C / K times the kernel's numbers, O = outputs per group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, Form, Outer
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import Operation, contract

Sizes = tuple[int, ...]
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution over ``len(stride)`` spatial axes with symmetric zero padding."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _CONVOLUTIONS[len(self.stride) - 1]
        return convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        input_grad, _, _ = torch.ops.aten.convolution_backward(
            *(grad, input.to(grad.dtype), weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * len(self.stride), self.groups, [True, False, False]),
        )
        return input_grad

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        windows = self._windows(input, weight.shape[2:], grad.shape[2:])
        rows, channels, *_ = input.shape
        positions, kernel = math.prod(grad.shape[2:]), math.prod(weight.shape[2:])
        per_group = channels // self.groups
        windows_NKSI = windows.reshape(rows, self.groups, positions, per_group * kernel)
        grad_NKSO = grad.reshape(rows, self.groups, -1, positions).mT
        return Outer(
            _fold_rows(windows_NKSI, examples, per_group * kernel),
            _fold_rows(grad_NKSO, examples, weight.shape[0] // self.groups),
            weight.shape,
        )

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return Dense(grad.flatten(2).sum(2, dtype=wide).reshape(examples, -1, grad.shape[1]).sum(1))

    def _windows(self, input: Tensor, kernel: torch.Size, output: torch.Size) -> Tensor:
        """(N, K, *output, C / K, *kernel) as a strided view of the padded input."""
        ends = [size for pad in reversed(self.padding) for size in (pad, pad)]
        padded = F.pad(input, ends).contiguous()
        rows, channels, *_ = padded.shape
        row_stride, channel_stride, *axis_strides = padded.stride()
        per_group = channels // self.groups
        steps = [axis * stride for axis, stride in zip(axis_strides, self.stride, strict=True)]
        taps = [axis * dilation for axis, dilation in zip(axis_strides, self.dilation, strict=True)]
        return padded.as_strided(
            (rows, self.groups, *output, per_group, *kernel),
            (row_stride, per_group * channel_stride, *steps, channel_stride, *taps),
        )


def _fold_rows(value_NKSX: Tensor, examples: int, width: int) -> Tensor:
    """(N, K, S, X) -> (B, K, N / B * S, X): rows of one example are further positions of it."""
    rows, groups, positions, _ = value_NKSX.shape
    if rows == examples:
        return value_NKSX
    folds = rows // examples
    by_example = value_NKSX.reshape(examples, folds, groups, positions, width)
    return by_example.transpose(1, 2).reshape(examples, groups, folds * positions, width)


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
    spread = _sizes(dilation, axes)
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
    operation = Convolution(_sizes(stride, axes), _sizes(padding, axes), spread, groups)
    return contract(use, operation, input, weight, bias)


def _sizes(value: int | Sizes, axes: int) -> Sizes:
    if isinstance(value, int):
        return (value,) * axes
    sizes = tuple(int(size) for size in value)
    return sizes * axes if len(sizes) == 1 else sizes
