"""What the tests of torch.compile share: the count of what was compiled, and the comparison with brute force."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import discreet
from blocks import B, loss
from discreet.core import compiled
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from oracles import abadi, alone, norms, relative_gap, weighted

MARKS = [  # PyTorch's own: what Inductor imports, how inputs are looked at, what is slow
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


RULE = Clipping.abadi(1.5)
CALL_BY_CALL = "runs call by call"


class Deliveries:
    """Counts what compiled backwards booked, and what was compiled."""

    def __init__(self) -> None:
        self.delivered = self.compiled = 0


def agrees(model: nn.Module, batch: Any, *, compiled_loss: Any = loss, size: int = B, tolerance: float = 1e-9) -> None:
    """The compiled model's self-check passes, and its clipped sum is that of one example at a time."""
    report = discreet.check(model, compiled_loss, batch, clipping=RULE, examples=size)
    report.raise_if_failed()
    sum_agrees(model, batch, report.layout, compiled_loss=compiled_loss, size=size, tolerance=tolerance)


def sum_agrees(
    model: nn.Module, batch: Any, layout: Any, *, compiled_loss: Any = loss, size: int = B, tolerance: float = 1e-9
) -> None:
    found = clipped_gradient(model, compiled_loss, batch, clipping=RULE, layout=layout, examples=size)
    with compiled.uncompiled():
        each = alone(model, compiled_loss, batch, size=size)
    assert relative_gap(found.tensors, weighted(each, abadi(norms(each), 1.5 * ROUNDING_MARGIN))) < tolerance


class Wrapped(nn.Module):
    """A model that is called by keyword, as the loss of the cases does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
