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


class Meeting(torch.autograd.Function):
    """The autograd function of a rule. No guarded value gets into torch.func, for which PyTorch binds arguments anew.

    What came out of it may still be wrapped (a hidden state that a closure under ``jvp`` kept), with its own graph.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run it, and put it into the graph."""
        bare = [torch._C._functorch.unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return super(torch.autograd.Function, cls).apply(*bare)


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
