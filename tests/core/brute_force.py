"""Random batches, and the distance of a clipped sum from brute force."""

from __future__ import annotations

import torch

from blocks import loss
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from oracles import abadi, alone, norms, relative_gap, weighted

B = 5
"""Examples, where nothing else is said."""


def random_batch(*shape: int, size: int = B, dtype=torch.float64):
    torch.manual_seed(4)
    return {
        "x": torch.randn(size, *shape, dtype=torch.float64).to(dtype),
        "target": torch.randn(size, dtype=torch.float64).to(dtype),
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
