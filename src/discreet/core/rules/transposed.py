"""Rules for conv_transpose1d, conv_transpose2d and conv_transpose3d, with every option that torch has.

A transposed convolution is the adjoint of a convolution: ``y = A^T x`` where ``A`` convolves images of y's size. So its
weight gradient is that of the convolution ``A``, with the two operands in each other's place: the output gradient is
what is unfolded into windows, and the input is what weights them (arXiv:1603.07285, section 4).

Shape legend: N = rows of the input (B examples, or B folded), C = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Form
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.rules.contraction import contract
from discreet.core.rules.convolution import Convolution, along, grad_of_input
from discreet.core.windows import Geometry, Sizes

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A transposed convolution; the weight is (C_in, C_out / groups, *kernel)."""

    output_padding: Sizes

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        at, convolve = self.geometry, _TRANSPOSED[len(self.output_padding) - 1]
        return convolve(input, weight, bias, at.stride, at.padding, self.output_padding, at.groups, at.dilation)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return grad_of_input(grad, input, weight, self.geometry, self.output_padding)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        geometry = self.geometry
        if any(self.output_padding):  # windows end before it: without it, the image has exactly the input's positions
            sides = zip(reversed(geometry.padding), reversed(self.output_padding), strict=True)
            grad = F.pad(grad, [end for pad, extra in sides for end in (pad, pad - extra)])
            geometry = replace(geometry, padding=(0,) * len(geometry.padding))
        return Convolution(geometry).weight_form(input, grad, weight, examples)


def _register(function: Callable[..., Tensor], axes: int) -> None:
    @rule(function)
    def meeting(
        use: Use, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sizes = 1,
        padding: int | Sizes = 0, output_padding: int | Sizes = 0, groups: int = 1, dilation: int | Sizes = 1,
    ) -> Tensor:  # fmt: skip
        if isinstance(input, Guarded) or input.dim() != axes + 2:
            raise use.refuse(
                f"an input of shape {tuple(input.shape)}",
                f"the rule covers activations [batch, channels] + {axes} axes.",
            )
        strides, pads, ends, gaps = (along(value, axes) for value in (stride, padding, output_padding, dilation))
        return contract(use, TransposedConvolution(Geometry(strides, pads, gaps, groups), ends), input, weight, bias)


for _axes, _function in enumerate(_TRANSPOSED, start=1):
    _register(_function, _axes)
