"""The engine against one-example-at-a-time autograd, for every model of the table."""

from __future__ import annotations

import pytest
import torch

from cases import CASES, B, loss
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.train.check import check
from oracles import abadi, alone, automatic, norms, relative_gap, rows, weighted

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",  # vmap of _weight_norm falls back to a loop, and says so
    "ignore:Using padding='same' with even kernel:UserWarning",  # said by the plain convolution of the oracle
)
EVERY = pytest.mark.parametrize("name", list(CASES))


def _layout(name, model, batch):
    if not CASES[name].folded:
        return None
    report = check(model, loss, batch)
    assert report.passed, report.table()
    return report.layout


@EVERY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_clipped_sum_equals_brute_force(name, dtype, tolerance):
    model, batch = CASES[name].build(dtype)
    exact_model, exact_batch = CASES[name].build(torch.float64)
    gradients = alone(exact_model, loss, exact_batch, size=B)
    norm_B = norms(gradients)
    layout = _layout(name, model, batch)
    bound = 0.8 * float(norm_B.median())
    for clipping, factor in ((Clipping.abadi(bound), abadi(norm_B, bound)), (Clipping.automatic(), automatic(norm_B))):
        found = clipped_gradient(model, loss, batch, clipping=clipping, layout=layout)
        shrunk = torch.where(factor == 1, factor, factor * ROUNDING_MARGIN)
        assert relative_gap(found.tensors, weighted(gradients, shrunk)) < tolerance
        assert found.sensitivity == clipping.clip_bound


@EVERY
def test_without_clipping_it_is_the_gradient_of_the_sum(name):
    model, batch = CASES[name].build()
    layout = _layout(name, model, batch)
    found = clipped_gradient(model, loss, batch, clipping=Clipping.none(), layout=layout)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(
        loss(model, batch).sum(), [p for p in parameters.values() if p.requires_grad], allow_unused=True
    )
    names = [n for n, p in parameters.items() if p.requires_grad]
    expected = {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, wanted, strict=True)}
    assert relative_gap(found.tensors, expected) < 1e-9


@EVERY
def test_microbatches_change_nothing(name):
    model, batch = CASES[name].build()
    layout = _layout(name, model, batch)
    clipping = Clipping.abadi(0.3)
    whole = clipped_gradient(model, loss, batch, clipping=clipping, layout=layout)
    for split in ([[0], [1, 2, 3, 4]], [[i] for i in range(B)], [[3, 1, 0], [4, 2]]):
        parts = [
            clipped_gradient(model, loss, rows(batch, chosen, B), clipping=clipping, layout=layout) for chosen in split
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        assert relative_gap(total.tensors, whole.tensors) < 1e-12


@EVERY
def test_the_self_check_passes_and_the_model_is_left_alone(name):
    model, batch = CASES[name].build(torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = {n: type(p) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    report = check(model, loss, batch)
    assert report.passed, report.table()
    assert torch.equal(torch.get_rng_state(), state)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is None
        assert type(p) is kinds[n]
        assert not p._backward_hooks
