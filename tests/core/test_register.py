"""Rules for functions of the user's own: each kind is exact, for every sort of function that may have one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import discreet
from blocks import B, D, Fn, T, loss, par
from core.own_functions import fused_formula, plain_swish, swish_formula, wrapped_fused, wrapped_swish
from core.unseen import drawn
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.register import register_rule
from discreet.core.rulecheck import check_rule
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, weighted

pytestmark = pytest.mark.usefixtures("registry")


def _shrunk(norm_B: Tensor, bound: float) -> Tensor:
    factor_B = abadi(norm_B, bound)
    return torch.where(factor_B == 1, factor_B, factor_B * ROUNDING_MARGIN)


def _exact(model: nn.Module, batch) -> None:
    gradients = alone(model, loss, batch, size=B)
    norm_B = norms(gradients)
    bound = 0.7 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound))
    assert relative_gap(found.tensors, weighted(gradients, _shrunk(norm_B, bound))) < 1e-9
    report = check(model, loss, batch)
    assert report.passed, report.table()


KINDS = {
    "one example at a time": {},
    "decomposition": {"decomposition": plain_swish},
    "per example": {"per_example": swish_formula},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_rule_is_exact(kind):
    swish = wrapped_swish()
    register_rule(swish, **KINDS[kind])
    arguments = (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3)))
    check_rule(swish, arguments, named={"scale": 0.5})
    model = Fn(lambda s, x: swish(s.l(x), s.w, s.b, scale=2.0), w=par(3, D), b=par(3), l=nn.Linear(D, D)).double()
    _exact(model, drawn(T, D))
    model.w.requires_grad_(False)
    _exact(model, drawn(T, D))


@pytest.mark.parametrize("kind", list(KINDS))
def test_shared_between_two_uses_and_a_rule_of_ours(kind):
    swish = wrapped_swish()
    register_rule(swish, **KINDS[kind])
    model = Fn(lambda s, x: swish(swish(x, s.w), s.w) + F.linear(x, s.w), w=par(D, D)).double()
    if kind == "per example":

        def formula(grad, x, w):
            return swish_formula(grad, x, w)[:2]

        swish = wrapped_swish()
        register_rule(swish, per_example=formula)
    _exact(model, drawn(T, D))


def test_a_custom_autograd_function_gets_a_rule():
    fused = wrapped_fused()
    model = Fn(lambda s, x: fused(s.l(x), s.w * 2), w=par(D), l=nn.Linear(D, D)).double()
    with pytest.raises(UnsupportedUse):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())
    register_rule(fused, per_example=fused_formula)
    check_rule(fused, (torch.randn(4, T, D), nn.Parameter(torch.randn(D))))
    _exact(model, drawn(T, D))


@torch.library.custom_op("discreet_register::scale", mutates_args=())
def _scale_op(x: Tensor, w: Tensor) -> Tensor:
    return x * w


_scale_op.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum((0, 1))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


_OPERATORS = {
    "decorated": _scale_op,
    "packet": torch.ops.discreet_register.scale,
    "overload": torch.ops.discreet_register.scale.default,
}


@pytest.mark.parametrize("registered", list(_OPERATORS))
def test_an_operator_is_met_under_each_of_its_names(registered):
    register_rule(_OPERATORS[registered])
    for called in _OPERATORS.values():
        _exact(Fn(lambda s, x, called=called: called(x, s.w).tanh(), w=par(D)).double(), drawn(T, D))
    check_rule(_scale_op, (torch.randn(4, T, D), nn.Parameter(torch.randn(D))))


def test_an_operator_without_gradient_is_compared_with_its_reference():
    @wrap_torch_function(lambda x, w: (x, w))
    def opaque(x, w):
        return x * w.detach()

    register_rule(opaque, per_example=lambda grad, x, w: (None, (grad * x).sum(1)))
    arguments = (torch.randn(4, T, D), nn.Parameter(torch.randn(D)))
    check_rule(opaque, arguments, reference=torch.mul)
    with pytest.raises(RuntimeError):
        check_rule(opaque, arguments)


def test_a_torch_function_that_has_no_rule_gets_one():
    register_rule(torch.cdist)
    arguments = (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D)))
    check_rule(torch.cdist, arguments)
    _exact(Fn(lambda s, x: torch.cdist(s.l(x), s.w), w=par(3, D), l=nn.Linear(D, D)).double(), drawn(T, D))


def test_folded_rows_stay_with_their_example():
    swish = wrapped_swish()
    register_rule(swish)

    def forward(self, x):
        return swish(self.l(x).flatten(0, 1), self.w).view(x.shape[0], -1)

    model = Fn(forward, w=par(3, D), l=nn.Linear(D, D)).double()
    batch = drawn(T, D)
    report = check(model, loss, batch)
    assert report.passed, report.table()
    gradients = alone(model, loss, batch, size=B)
    bound = 0.7 * float(norms(gradients).median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=report.layout)
    assert relative_gap(found.tensors, weighted(gradients, _shrunk(norms(gradients), bound))) < 1e-9


def test_an_example_that_is_not_finite_stays_alone():
    swish = wrapped_swish()
    register_rule(swish)
    model = Fn(lambda s, x: swish(x, s.w), w=par(3, D)).double()
    batch = drawn(T, D)
    batch["x"][1] = float("nan")
    found = clipped_gradient(
        model, loss, batch, clipping=Clipping.abadi(0.1), layout=check(model, loss, drawn(T, D)).layout
    )
    assert bool(torch.isfinite(found.tensors["w"]).all())
    assert float(found.tensors["w"].norm()) > 0


def test_entries_are_in_the_order_of_the_formula_whatever_that_of_the_call_is():
    @wrap_torch_function(lambda x, scale, shift: (x, scale, shift))
    def affine(x, scale, shift):
        return x * scale + shift

    register_rule(affine, per_example=lambda grad, x, scale, shift: (None, (grad * x).sum(1), grad.sum(1)))
    arguments = {"shift": nn.Parameter(torch.randn(D)), "scale": nn.Parameter(torch.randn(D))}
    check_rule(affine, (torch.randn(4, T, D),), named=arguments)
    _exact(Fn(lambda s, x: affine(x, shift=s.b, scale=s.a), a=par(D), b=par(D)).double(), drawn(T, D))


def test_numbers_that_cancel_are_no_coupling():
    """One number per example, one of them near zero: alone its last bits are others, which was more than 1e-4 of it."""

    @wrap_torch_function(lambda x, w: (x, w))
    def score(x, w):
        return x @ w

    register_rule(score)
    torch.manual_seed(1)
    model = Fn(lambda s, x: score(x, s.w).unsqueeze(1), w=par(256))
    x = torch.randn(64, 256)
    for row in x[::4]:
        row -= (row @ model.w.detach()) / model.w.detach().square().sum() * model.w.detach()
    found = clipped_gradient(model, loss, {"x": x, "target": torch.randn(64)}, clipping=Clipping.automatic())
    assert 0 < float(found.tensors["w"].norm()) <= 64


def test_a_formula_runs_under_the_autocast_of_its_function():
    @wrap_torch_function(lambda x, w: (x, w))
    def linear(x, w):
        return F.linear(x, w)

    register_rule(linear, per_example=lambda grad, x, w: (None, torch.einsum("bto,bti->boi", grad, x)))

    def autocast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch["x"])
        return out.float().flatten(1).square().mean(1)

    model = Fn(lambda s, x: linear(s.l(x).float(), s.w), w=par(3, D), l=nn.Linear(D, D))
    report = check(model, autocast_loss, {"x": torch.randn(B, T, D)})
    assert report.passed, report.table()


def test_rules_of_ours_keep_the_contract():
    check_rule(F.linear, (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3))))
    check_rule(F.embedding, (torch.randint(0, 9, (4, T)), nn.Parameter(torch.randn(9, D))))
    check_rule(F.layer_norm, (torch.randn(4, T, D), (D,), nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))))


def test_both_names_are_public():
    assert discreet.register_rule is register_rule
    assert discreet.check_rule is check_rule
