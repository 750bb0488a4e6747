"""Rules for conv1d, conv2d and conv3d, with stride, padding, dilation and groups.

Shape legend: N = rows of the input (B examples, or B folded), C = channels, K = groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, Form
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import Operation, contract
from discreet.core.windows import Geometry, Sizes, Windows

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
        geometry = Geometry(self.stride, self.padding, self.dilation, self.groups)
        input, grad = (value.reshape(examples, -1, *value.shape[1:]) for value in (input, grad))
        return Windows(input, grad, weight.shape, geometry)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return Dense(grad.flatten(2).sum(2, dtype=wide).reshape(examples, -1, grad.shape[1]).sum(1))


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
