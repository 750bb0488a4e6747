"""Models with attention, their batches, and the distance of their clipped sums from brute force."""

from __future__ import annotations

import torch
from torch import nn

from blocks import Fn, loss
from discreet.core.axes import Layout
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, weighted

B, T, S, E, A = 5, 7, 4, 8, 2
"""Examples, positions of a query, positions of a memory, features, heads."""


def shaken_model(forward, dtype=torch.float64, **parts) -> nn.Module:
    torch.manual_seed(3)
    model = Fn(forward, **parts)
    with torch.no_grad():
        for p in model.parameters():  # biases start at zero
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def random_batch(*shape: int, dtype=torch.float64):
    torch.manual_seed(4)
    return {
        "x": torch.randn(B, *shape, dtype=torch.float64).to(dtype),
        "target": torch.randn(B, dtype=torch.float64).to(dtype),
    }


def gap(model, batch, *, size: int = B, layout=None) -> float:
    """Distance of the clipped sum from brute force in float64, with a bound that clips some examples."""
    found_from = next(model.parameters()).dtype
    exact = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    gradients = alone(model.double(), loss, exact, size=size)
    model.to(found_from)
    bound = 0.8 * float(norms(gradients).median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    factor = abadi(norms(gradients), bound)
    return relative_gap(found.tensors, weighted(gradients, torch.where(factor == 1, factor, factor * ROUNDING_MARGIN)))


def verified(model, batch) -> Layout:
    report = check(model, loss, batch)
    assert report.passed, report.table()
    return report.layout
