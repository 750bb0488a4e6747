"""Parameters that no example owns where they meet the batch: score biases, dropped tables, values laid out by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import B, D, Fn, T, loss, par
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, weighted

HEADS = 2
Forward = Callable[..., Tensor]


def _model(f: Forward, **parts: nn.Module | nn.Parameter) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts).double()


def _batch(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


def _exact(model: nn.Module, batch: dict[str, Tensor]) -> None:
    gradients = alone(model, loss, batch, size=B)
    norm_B = norms(gradients)
    bound = float(norm_B.min() + norm_B.max()) / 2
    report = check(model, loss, batch)
    assert report.passed, report.table()
    sums = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=report.layout).tensors
    factor_B = abadi(norm_B, bound)
    shrunk_B = torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)
    assert relative_gap(sums, weighted(gradients, shrunk_B)) < 1e-9


def _heads(x: Tensor) -> Tensor:
    """(N, T, D) -> (N, heads, T, D / heads)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _attend(self: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    h = _heads(self.l(x))
    return self.l(F.scaled_dot_product_attention(h, h, _heads(x), bias).transpose(1, 2).flatten(2))


def _windows(self: nn.Module, x: Tensor) -> Tensor:
    """Two windows an example, each with its own mask besides the learnt bias, as in shifted windows."""
    w = self.first(x).unflatten(1, (2, 4)).flatten(0, 1)
    mask = torch.tensor([[0.0], [1.0]], dtype=x.dtype).repeat(x.shape[0], 1).reshape(-1, 1, 1, 1)
    return _attend(self, w, self.bias.unsqueeze(0) + mask * torch.eye(4, dtype=x.dtype)).reshape(x.shape)


def _by_heads(self: nn.Module, x: Tensor) -> Tensor:
    """A table of keys, repeated for every example and multiplied head by head."""
    query = _heads(self.l(x)).flatten(0, 1)
    key = self.l(self.table).unflatten(-1, (HEADS, -1)).transpose(0, 1).repeat(x.shape[0], 1, 1)
    return torch.bmm(query, key.mT).unflatten(0, (x.shape[0], HEADS))


def _experts(self: nn.Module, x: Tensor) -> Tensor:
    ids = (x[..., 0] > 0).long().flatten()
    return torch.bmm(self.stack[ids], self.l(x).flatten(0, 1).unsqueeze(-1)).reshape(*x.shape[:2], -1)


EXACT = {
    "bias of scores (1, A, T, T)": (
        lambda: _model(lambda s, x: _attend(s, x, s.bias.exp().unsqueeze(0)), l=nn.Linear(D, D), bias=par(HEADS, T, T)),
        (T, D),
    ),
    "bias of scores, one matrix": (
        lambda: _model(lambda s, x: _attend(s, x, s.bias), l=nn.Linear(D, D), bias=par(T, T)),
        (T, D),
    ),
    "bias and window masks": (
        lambda: _model(_windows, first=nn.Linear(D, D), l=nn.Linear(D, D), bias=par(HEADS, 4, 4)),
        (8, D),
    ),
    "repeated keys, head by head": (lambda: _model(_by_heads, l=nn.Linear(D, D), table=par(4, D)), (T, D)),
    "picked experts": (lambda: _model(_experts, l=nn.Linear(D, D), stack=par(2, 3, D)), (T, D)),
    "dropout of a table in evaluation": (
        lambda: _model(lambda s, x: s.l(x) + F.dropout(s.table, 0.5, training=False), l=nn.Linear(D, D), table=par(D)),
        (T, D),
    ),
}


@pytest.mark.parametrize("name", list(EXACT))
def test_norms_and_sum_are_exact(name):
    build, shape = EXACT[name]
    _exact(build(), _batch(*shape))


@pytest.mark.parametrize("drop", [F.dropout, torch.dropout])
def test_a_dropped_table_keeps_the_mask_of_the_forward(drop):
    model = _model(lambda s, x: s.l(x) * drop(s.table * 2, 0.5, True), l=nn.Linear(D, D), table=par(D))
    batch = _batch(T, D)

    def seeded(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(4)
        return loss(m, b)

    found = clipped_gradient(model, seeded, batch, clipping=Clipping.none()).tensors
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(seeded(model, batch).sum(), list(parameters.values()))
    assert relative_gap(found, dict(zip(parameters, wanted, strict=True))) < 1e-12


def test_dropout_in_place_is_refused():
    model = _model(lambda s, x: s.l(x) + F.dropout(s.w, 0.5, True, True), l=nn.Linear(D, D), w=par(D))
    with pytest.raises(UnsupportedUse, match="inplace=True"):
        clipped_gradient(model, loss, _batch(T, D), clipping=Clipping.none())


def test_a_parameter_with_as_many_rows_as_the_batch_is_refused():
    """Its rows are its own; only what was laid out for the batch has the batch's rows."""
    for forward in (lambda s, x: x + s.w, lambda s, x: x + s.w.view(B, D), lambda s, x: x + s.w * 2):
        model = _model(forward, w=par(B, D))
        with pytest.raises((UnsupportedUse, RuntimeError)):
            clipped_gradient(model, loss, _batch(D), clipping=Clipping.none())


def test_a_stack_multiplied_in_the_place_of_the_batch_is_refused():
    model = _model(lambda s, x: torch.bmm(s.stack, s.l(x)), l=nn.Linear(D, D), stack=par(B, 3, T))
    with pytest.raises((UnsupportedUse, RuntimeError)):
        clipped_gradient(model, loss, _batch(T, D), clipping=Clipping.none())


def test_queries_that_are_parameters_are_refused():
    model = _model(lambda s, x: F.scaled_dot_product_attention(s.q, s.l(x), x), l=nn.Linear(D, D), q=par(1, T, D))
    with pytest.raises(UnsupportedUse, match="do not all carry the batch"):
        clipped_gradient(model, loss, _batch(T, D), clipping=Clipping.none())
