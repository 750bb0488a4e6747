"""What the hunts for a wrong norm share: a small model, and the two ways in which each may end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blocks import B, Fn, loss
from discreet.core.axes import Layout
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse
from oracles import abadi, alone, norms, relative_gap, weighted

R = 0.2
CLIP = Clipping.abadi(R)


def built(f: Callable[..., Tensor], **parts) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts).double()


def drawn(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


def expect_exact(model: nn.Module, batch, *, layout: Layout | None = None) -> None:
    gradients = alone(model, loss, batch, size=B)
    norm_B = norms(gradients)
    bound = 0.7 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norm_B, bound))) < 4e-5
    assert is_unguarded(model)


def expect_refused(model: nn.Module, batch, *words: str, layout: Layout | None = None) -> None:
    with pytest.raises(UnsupportedUse) as caught:
        clipped_gradient(model, loss, batch, clipping=CLIP, layout=layout)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert is_unguarded(model)


def is_unguarded(model: nn.Module) -> bool:
    return all(type(p) is nn.Parameter and not p._backward_hooks and p.grad is None for p in model.parameters())
