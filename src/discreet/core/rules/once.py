"""Backward passes that are not differentiated in turn: a gradient of a gradient is refused, and never left out.

PyTorch's `once_differentiable` asks whether the gradient that comes in needs one. Where a layer's outputs are summed
up it needs none, yet the gradient of the layer's input is made of its weights: a penalty on it trained nothing, unseen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from discreet.errors import UnsupportedUse

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Refused(torch.autograd.Function):
    """A value through which no gradient may come back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise UnsupportedUse(
            "a gradient was taken of a gradient (create_graph=True, a penalty on gradients): no rule is differentiated "
            "twice; detach the inner gradient, or take it of a layer without trainable parameters."
        )


def differentiable_once(backward: Backward) -> Backward:
    """Wrap a Function's backward, so that whoever differentiates what it returns is refused."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(None if value is None else _Refused.apply(value.detach().requires_grad_()) for value in found)

    return once
