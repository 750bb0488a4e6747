"""Rules for layer, group and RMS normalisation.

In one precision the library's own kernels run forward and backward; what a rule adds is the gradient of scale and shift
for each example. In mixed precision (autocast), and for groups and RMS in half precision, the normalisation is run
without parameters, and scale and shift are applied as one copy per example.

Shape legend: N = rows of the input (B examples, or B folded), S = positions, D = normalised numbers, C = channels,
G = groups of channels, P = pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.forms import Dense, wide_dtype
from discreet.core.kernels import dispatch
from discreet.core.parameter import Guarded, Use, rule
from discreet.core.precision import NARROW
from discreet.core.rules.contraction import Booking
from discreet.core.rules.once import differentiable_once


@rule(F.layer_norm)
def layer_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` over trailing axes."""
    _need_batch(use, input)
    if len(normalized_shape) >= input.dim():
        raise use.refuse(f"it normalises over all of {tuple(input.shape)}", "normalise over the axes of one example.")
    if _in_one_precision(input, weight, bias, narrow=True):
        booking, weight, bias = Booking.of(use, weight, bias)
        return _LayerNorm.apply(use.book.sink, input, weight, bias, tuple(normalized_shape), eps, booking)
    return affine(use, F.layer_norm(input, normalized_shape, eps=eps), weight, bias, trailing=True)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    use: Use, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` over trailing axes."""
    _need_batch(use, input)
    return affine(use, F.rms_norm(input, normalized_shape, eps=eps), weight, None, trailing=True)


@rule(F.group_norm)
def group_norm(
    use: Use,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm``: statistics within an example, scale and shift per channel."""
    _need_batch(use, input)
    if _in_one_precision(input, weight, bias):
        booking, weight, bias = Booking.of(use, weight, bias)
        return _GroupNorm.apply(use.book.sink, input, weight, bias, num_groups, eps, booking)
    return affine(use, F.group_norm(input, num_groups, eps=eps), weight, bias, trailing=False)


def _record(booking: Booking, weight_grad: Tensor | None, bias_grad: Tensor | None) -> None:
    """Book gradients (N, *shape), rows of one example added up."""
    examples = booking.book.examples
    for derivation, grad in ((booking.weight, weight_grad), (booking.bias, bias_grad)):
        if derivation is not None and grad is not None:
            each = grad if grad.shape[0] == examples else grad.reshape(examples, -1, *grad.shape[1:]).sum(1)
            booking.book.record(derivation, Dense(each))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...],
        eps: float, booking: Booking,
    ) -> Tensor:  # fmt: skip
        output, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.shape, ctx.eps, ctx.booking = shape, eps, booking
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous()  # as all that read it below want it
        weight_grad = bias_grad = None
        wants_scale, positions = ctx.booking.weight is not None, math.prod(mean.shape[1:])
        if wants_scale and mean.dtype is torch.float32 and dispatch.suit_scales(input, grad, positions=positions):
            weight_grad, bias_grad = _by_kernel(input, grad, mean, rstd, ctx.shape)
        elif wants_scale:
            if mean.dtype in NARROW:  # a CPU keeps them so, which would spoil the products
                normal = F.layer_norm(input.float(), ctx.shape, eps=ctx.eps)
            else:
                normal = torch.sub(input, mean).mul_(rstd)
            weight_grad = _over_positions(normal.mul_(grad), ctx.shape)
        if ctx.booking.bias is not None and bias_grad is None:
            bias_grad = _over_positions(grad, ctx.shape)
        _record(ctx.booking, weight_grad, bias_grad)
        input_grad = None
        if ctx.needs_input_grad[1]:
            input_grad = torch.ops.aten.native_layer_norm_backward(
                grad, input, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return None, input_grad, None, None, None, None, None


def _by_kernel(
    input: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and shift, each (N, *shape), both in one pass."""
    rows, width = input.shape[0], math.prod(shape)
    operands = [value.reshape(rows, -1, width).contiguous() for value in (input, grad)]
    statistics = [value.reshape(rows, -1).contiguous() for value in (mean, rstd)]
    scale, shift = dispatch.scale_grads(*operands, *statistics)
    return scale.reshape(rows, *shape), shift.reshape(rows, *shape)


def _over_positions(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(N, ..., *shape) -> (N, *shape), added up in float32 at least."""
    value_NSD = value.reshape(value.shape[0], -1, math.prod(shape))
    total = value_NSD[:, 0] if value_NSD.shape[1] == 1 else value_NSD.sum(1, dtype=wide_dtype(value))
    return total.reshape(value.shape[0], *shape)


class _GroupNorm(torch.autograd.Function):
    """The backward takes all rows for channels of one row: then the kernel's own sums are those of each row."""

    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
        booking: Booking,
    ) -> Tensor:  # fmt: skip
        rows, channels, *image = input.shape
        output, mean, rstd = torch.native_group_norm(
            input.contiguous(), weight, bias, rows, channels, math.prod(image), groups, eps
        )
        ctx.groups, ctx.booking = groups, booking
        ctx.save_for_backward(input, weight, mean, rstd)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, rstd = ctx.saved_tensors
        rows, channels, *image = input.shape
        one_row = (1, rows * channels, *image)
        scale = None if weight is None else weight.expand(rows, channels).reshape(-1)
        input_grad, weight_grad, bias_grad = torch.ops.aten.native_group_norm_backward(
            *(grad.contiguous().view(one_row), input.contiguous().view(one_row), mean.view(1, -1), rstd.view(1, -1)),
            *(scale, 1, rows * channels, math.prod(image), rows * ctx.groups),
            [ctx.needs_input_grad[1], ctx.booking.weight is not None, ctx.booking.bias is not None],
        )
        grads = (None if value is None else value.reshape(rows, channels) for value in (weight_grad, bias_grad))
        _record(ctx.booking, *grads)
        if input_grad is not None:  # a view of another gradient may not be added to in place, where paths meet
            input_grad = torch.ops.aten._unsafe_view(input_grad, input.shape)
        return None, input_grad, None, None, None, None, None


def _need_batch(use: Use, input: Tensor) -> None:
    if isinstance(input, Guarded) or not use.is_batched(input):
        raise use.refuse("its input does not carry the batch", "pass activations [batch, ...].")


def _in_one_precision(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, narrow: bool = False) -> bool:
    """Whether all operands are of one dtype, a wide one if need be, and scale and shift depend on no example."""
    if (input.dtype in NARROW and not narrow) or torch.is_autocast_enabled(input.device.type):
        return False
    for given in (weight, bias):
        if given is not None and (
            given.dtype != input.dtype or (given.requires_grad and not isinstance(given, Guarded))
        ):
            return False
    return True


def affine(use: Use, normal: Tensor, weight: Tensor | None, bias: Tensor | None, *, trailing: bool) -> Tensor:
    """Scale and shift, over trailing axes or over channels (axis 1); guarded ones as one copy per example."""
    if weight is not None:
        normal = normal * _aligned(use, weight, normal, trailing=trailing)
    if bias is not None:
        normal = normal + _aligned(use, bias, normal, trailing=trailing)
    return normal


def _aligned(use: Use, value: Tensor, target: Tensor, *, trailing: bool) -> Tensor:
    """A scale or shift shaped to broadcast against the target: over trailing axes, or over channels (axis 1)."""
    if not isinstance(value, Guarded):
        return value if trailing else value.reshape(1, -1, *[1] * (target.dim() - 2))
    each = use.expand(value, target.shape[0])
    if not trailing:
        return each.reshape(target.shape[0], -1, *[1] * (target.dim() - 2))
    return each.reshape(target.shape[0], *[1] * (target.dim() - 1 - value.dim()), *value.shape)
