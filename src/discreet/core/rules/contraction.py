"""The meeting of a batched input with a weight and a bias: one autograd function for linear, matmul and convolution.

The forward is the plain operation on detached values. The backward returns the input's gradient, books the operand pair
of each guarded value, and computes no weight gradient: that waits for the clipping factors.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discreet.core.book import Book
from discreet.core.forms import Form
from discreet.core.parameter import Guarded, Use
from discreet.core.rules.once import differentiable_once
from discreet.core.uses import Derivation


class Operation(abc.ABC):
    """``y = op(input, weight) + bias`` with everything that the backward needs to know."""

    @abc.abstractmethod
    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain operation."""

    @abc.abstractmethod
    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input; only the shape and dtype of ``input`` may be used."""

    @abc.abstractmethod
    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        """Per-example gradients of the weight, as booked."""

    @abc.abstractmethod
    def bias_form(self, grad: Tensor, examples: int) -> Form:
        """Per-example gradients of the bias."""


@dataclass(frozen=True)
class Booking:
    """Where the backward books: the book, and the origins of weight and bias, or of scale and shift, if guarded."""

    book: Book
    weight: Derivation | None
    bias: Derivation | None

    @classmethod
    def of(cls, use: Use, weight: Tensor | None, bias: Tensor | None) -> tuple[Booking, Tensor | None, Tensor | None]:
        """The booking, and both values as ordinary ones."""
        (weight_at, weight), (bias_at, bias) = use.taken(weight), use.taken(bias)
        return cls(use.book, weight_at, bias_at), weight, bias


def contract(use: Use, operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run an operation whose weight, bias or both are guarded."""
    if isinstance(input, Guarded) or not use.is_batched(input):
        raise use.refuse("its input does not carry the batch", "pass the activations as the first argument.")
    booking, plain_weight, plain_bias = Booking.of(use, weight, bias)
    for name, value in (("weight", plain_weight), ("bias", plain_bias)):
        if value is not None and value.requires_grad:
            raise use.refuse(f"its {name} depends on the examples", "use elementwise functions or matmul.")
    return _Contract.apply(use.book.sink, operation, booking, input, plain_weight, plain_bias)


def _record(booking: Booking, operation: Operation, grad: Tensor, input: Tensor, weight: Tensor) -> None:
    book = booking.book
    if booking.weight is not None:
        book.record(booking.weight, operation.weight_form(grad, input, weight, book.examples))
    if booking.bias is not None:
        book.record(booking.bias, operation.bias_form(grad, book.examples))


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, operation: Operation, booking: Booking, input: Tensor, weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.operation, ctx.booking = operation, booking
        ctx.rows_of = 1  # of the tensors sink, input, weight, bias: the output has the rows of the input
        ctx.save_for_backward(input, weight)
        output = operation.forward(input, weight, bias)
        # F.linear returns a view of a flat product, and autograd forbids in-place changes (relu_) of a view made here.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        input = input.detach()
        operation, booking = ctx.operation, ctx.booking
        early, input_grad = booking.book.settles_early, None
        if early:
            _record(booking, operation, grad, input, weight)
        if ctx.needs_input_grad[3]:
            input_grad = operation.input_grad(grad, input, weight.to(grad.dtype)).to(input.dtype)
        if not early:  # what is kept of a convolution's weight is better not there while its input's gradient is made
            _record(booking, operation, grad, input, weight)
        return None, None, None, input_grad, None, None
