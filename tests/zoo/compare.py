"""The engine on a zoo model against autograd, one example at a time: the figures that the tests and the table share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import backward, clipped_gradient, trainable
from discreet.core.meeting import guard
from discreet.core.parameter import Guarded
from discreet.train.check import check
from oracles import Gradients, abadi, alone, norms, relative_gap, weighted
from zoo.model import B, Loss, ZooModel


@dataclass(frozen=True)
class Gap:
    """Largest relative errors in one dtype: of an example's norm, of a parameter's norm, of the clipped sum."""

    norm: float
    parameter_norm: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """One line of the table: the model's class and trained numbers, and the errors in two precisions."""

    class_name: str
    parameters: int
    float64: Gap
    float32: Gap


def compare(zoo: ZooModel) -> Comparison:
    """Self-check, norms and clipped sum of one model against the oracle in float64.

    The layout comes from the self-check, as it does in training, and so the isolation of the examples is tested too.
    """
    model, batch = zoo.make()
    with float32_means_float64():
        expected = alone(model, zoo.loss, batch, size=B)
        double = gap(model, zoo.loss, batch, expected)
    single_model, single_batch = zoo.make(torch.float32)
    return Comparison(
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in trainable(model).values()),
        float64=double,
        float32=gap(single_model, zoo.loss, single_batch, expected),
    )


@contextmanager
def float32_means_float64() -> Iterator[None]:
    """Let ``x.float()`` and ``x.to(torch.float32)`` give float64.

    Some models normalise or attend in float32 whatever their own precision; nothing could be compared beyond that.
    """
    plain_to = torch.Tensor.to

    def to(self: Tensor, *args: Any, **named: Any) -> Tensor:
        wide_args, wide_named = tuple(map(_widened, args)), {name: _widened(value) for name, value in named.items()}
        if isinstance(self, Guarded):  # torch would look the function up by its name, and name this one
            return type(self).__torch_function__(plain_to, (type(self),), (self, *wide_args), wide_named)
        return plain_to(self, *wide_args, **wide_named)

    torch.Tensor.float, torch.Tensor.to = torch.Tensor.double, to
    try:
        yield
    finally:
        del torch.Tensor.float, torch.Tensor.to


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def gap(model: nn.Module, loss: Loss, batch: Any, expected: Gradients) -> Gap:
    """Errors against per-example gradients, with a clip bound that some examples pass and some do not."""
    report = check(model, loss, batch)
    report.raise_if_failed()
    assert report.layout is not None
    norm_B = norms(expected)
    found = parameter_norms(model, loss, batch, layout=report.layout)
    wanted = {name: rows.double().reshape(B, -1).norm(dim=1) for name, rows in expected.items()}
    parameter_gap = max(_parameter_gap(found[name], wanted[name], norm_B) for name in expected)
    total_B = torch.stack([rows.double() for rows in found.values()]).norm(dim=0)
    bound = float(norm_B.min() + norm_B.max()) / 2
    total = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=report.layout)
    factor_B = abadi(norm_B, bound)
    shrunk_B = torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)
    return Gap(
        norm=float(((total_B - norm_B).abs() / norm_B).max()),
        parameter_norm=parameter_gap,
        total=relative_gap(total.tensors, weighted(expected, shrunk_B)),
    )


def parameter_norms(model: nn.Module, loss: Loss, batch: Any, *, layout: Layout) -> dict[str, Tensor]:
    """The engine's norms, parameter by parameter, name -> (B,); zeros for what these examples do not use."""
    book = Book(trainable(model), examples=B, layout=layout)
    with guard(book):
        backward(book, loss(model, batch))
    with torch.no_grad():
        found = book.parameter_norms()
    return {name: found.get(name, torch.zeros(B)) for name in trainable(model)}


def _parameter_gap(found_B: Tensor, wanted_B: Tensor, norm_B: Tensor) -> float:
    """Relative to the parameter's own norm; one far below the whole gradient's (a key's bias) counts against that."""
    scale_B = torch.maximum(wanted_B, 0.01 * norm_B)
    return float(((found_B.double() - wanted_B).abs() / scale_B).max())
