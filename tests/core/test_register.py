"""Rules for functions of the user's own: each kind is exact, a wrong one is found out, and ours are never replaced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import discreet
from blocks import B, D, Fn, T, loss, par
from discreet.core import parameter
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.register import register_rule
from discreet.core.rulecheck import check_rule
from discreet.errors import CheckFailed, ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, weighted


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Rules that a test registers end with it."""
    tables = (parameter.RULES, parameter.DECOMPOSITIONS)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def _swish(x: Tensor, w: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    return F.silu(F.linear(x, w, b)) * scale


class _Fused(torch.autograd.Function):
    """A fused kernel, as a user would write one: autograd sees no part of it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x * w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        inner = grad * (1 - torch.tanh(x * w).square())
        return inner * w, (inner * x).reshape(-1, w.shape[0]).sum(0)


def wrapped_swish():
    """A new function of the same body each time, so that tests share no rule."""
    return wrap_torch_function(lambda x, w, b=None, *, scale=1.0: (x, w, b))(_named(_swish))


def wrapped_fused():
    return wrap_torch_function(lambda x, w: (x, w))(lambda x, w: _Fused.apply(x, w))


def _named(function):
    def again(x: Tensor, w: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return function(x, w, b, scale=scale)

    return again


def _swish_formula(grad, x, w, b=None, *, scale=1.0):
    z = F.linear(x, w, b)
    inner = grad * scale * torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z)))
    return None, torch.einsum("bto,bti->boi", inner, x), inner.sum(1)


def _fused_formula(grad, x, w):
    inner = grad * (1 - torch.tanh(x * w).square())
    return None, (inner * x).flatten(1, -2).sum(1)


def _x(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


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
    "decomposition": {"decomposition": _swish},
    "per example": {"per_example": _swish_formula},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_rule_is_exact(kind):
    swish = wrapped_swish()
    register_rule(swish, **KINDS[kind])
    arguments = (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3)))
    check_rule(swish, arguments, named={"scale": 0.5})
    model = Fn(lambda s, x: swish(s.l(x), s.w, s.b, scale=2.0), w=par(3, D), b=par(3), l=nn.Linear(D, D)).double()
    _exact(model, _x(T, D))
    model.w.requires_grad_(False)
    _exact(model, _x(T, D))


@pytest.mark.parametrize("kind", list(KINDS))
def test_shared_between_two_uses_and_a_rule_of_ours(kind):
    swish = wrapped_swish()
    register_rule(swish, **KINDS[kind])
    model = Fn(lambda s, x: swish(swish(x, s.w), s.w) + F.linear(x, s.w), w=par(D, D)).double()
    if kind == "per example":

        def formula(grad, x, w):
            return _swish_formula(grad, x, w)[:2]

        swish = wrapped_swish()
        register_rule(swish, per_example=formula)
    _exact(model, _x(T, D))


def test_a_custom_autograd_function_gets_a_rule():
    fused = wrapped_fused()
    model = Fn(lambda s, x: fused(s.l(x), s.w * 2), w=par(D), l=nn.Linear(D, D)).double()
    with pytest.raises(UnsupportedUse):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())
    register_rule(fused, per_example=_fused_formula)
    check_rule(fused, (torch.randn(4, T, D), nn.Parameter(torch.randn(D))))
    _exact(model, _x(T, D))


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
        _exact(Fn(lambda s, x, called=called: called(x, s.w).tanh(), w=par(D)).double(), _x(T, D))
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
    _exact(Fn(lambda s, x: torch.cdist(s.l(x), s.w), w=par(3, D), l=nn.Linear(D, D)).double(), _x(T, D))


def test_folded_rows_stay_with_their_example():
    swish = wrapped_swish()
    register_rule(swish)

    def forward(self, x):
        return swish(self.l(x).flatten(0, 1), self.w).view(x.shape[0], -1)

    model = Fn(forward, w=par(3, D), l=nn.Linear(D, D)).double()
    batch = _x(T, D)
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
    batch = _x(T, D)
    batch["x"][1] = float("nan")
    found = clipped_gradient(
        model, loss, batch, clipping=Clipping.abadi(0.1), layout=check(model, loss, _x(T, D)).layout
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
    _exact(Fn(lambda s, x: affine(x, shift=s.b, scale=s.a), a=par(D), b=par(D)).double(), _x(T, D))


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


@pytest.mark.parametrize("kind", [{}, {"per_example": lambda grad, x, w: (None, (grad * x).sum(1))}])
def test_an_activation_that_is_changed_after_its_use_is_refused(kind):
    @wrap_torch_function(lambda x, w: (x, w))
    def scaled(x, w):
        return x * w

    def forward(self, x):
        hidden = self.l(x)
        out = scaled(hidden, self.w)
        with torch.no_grad():
            hidden.mul_(3)
        return out

    register_rule(scaled, **kind)
    model = Fn(forward, w=par(D), l=nn.Linear(D, D)).double()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


@pytest.mark.parametrize("kind", [{}, {"per_example": lambda grad, w: (grad,)}])
def test_a_function_of_parameters_alone_needs_a_decomposition(kind):
    @wrap_torch_function(lambda w: (w,))
    def binary(w):
        return w.sign()

    model = Fn(lambda s, x: F.linear(x, binary(s.w)), w=par(3, D)).double()
    with pytest.raises(UnsupportedUse, match="give it a rule"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())
    register_rule(binary, **kind)
    with pytest.raises(UnsupportedUse, match="no argument carries the batch"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


WRONG = {
    "half of it": lambda grad, x, w: (None, 0.5 * _fused_formula(grad, x, w)[1]),
    "of the sum, for everyone": lambda grad, x, w: (None, _fused_formula(grad, x, w)[1].sum(0).expand(len(x), -1)),
    "in another order": lambda grad, x, w: (None, _fused_formula(grad, x, w)[1].flip(0)),
    "of memory in another order": lambda grad, x, w: _fused_formula(grad.as_strided(x.shape, x.stride()), x, w),
    "in half precision": lambda grad, x, w: (None, _fused_formula(grad, x, w)[1].half()),
    "of the first position": lambda grad, x, w: (None, _fused_formula(grad[:, :1], x[:, :1], w)[1]),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_formula_is_found_out(name):
    fused = wrapped_fused()
    register_rule(fused, per_example=WRONG[name])
    with pytest.raises(CheckFailed, match="norms of parameters 1"):
        check_rule(fused, (torch.randn(4, T, D), nn.Parameter(torch.randn(D))))


@pytest.mark.parametrize(
    "found",
    [
        lambda grad, x, w: (None, (grad * x).sum((0, 1))),
        lambda grad, x, w: (None, None),
        lambda grad, x, w: ((grad * x).sum(1),),
        lambda grad, x, w: (grad * x).sum(1),
        lambda grad, x, w: None,
    ],
)
def test_gradients_of_another_shape_are_refused(found):
    fused = wrapped_fused()
    register_rule(fused, per_example=found)
    with pytest.raises(UnsupportedUse, match="per_example returned shapes"):
        check_rule(fused, (torch.randn(4, T, D), nn.Parameter(torch.randn(D))))


def test_a_decomposition_of_another_function_is_found_out():
    swish = wrapped_swish()
    register_rule(swish, decomposition=lambda x, w: F.gelu(F.linear(x, w)))
    with pytest.raises(CheckFailed, match="differs from the plain one"):
        check_rule(swish, (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D))))


def test_a_function_that_mixes_examples_is_refused():
    @wrap_torch_function(lambda x, w: (x, w))
    def centred(x, w):
        return (x - x.mean(0)) * w

    register_rule(centred)
    arguments = (torch.randn(4, T, D), nn.Parameter(torch.randn(D)))
    with pytest.raises(UnsupportedUse, match="alone"):
        check_rule(centred, arguments)
    model = Fn(lambda s, x: centred(x, s.w), w=par(D)).double()
    with pytest.raises(UnsupportedUse, match="alone"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


def test_a_function_that_draws_random_numbers_is_refused():
    @wrap_torch_function(lambda x, w: (x, w))
    def noisy(x, w):
        return F.dropout(x * w, 0.5)

    register_rule(noisy)
    model = Fn(lambda s, x: noisy(x, s.w), w=par(D)).double()
    with pytest.raises(UnsupportedUse, match="random"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


@pytest.mark.parametrize("kind", [{}, {"per_example": lambda grad, x, w: (None, (grad * x).sum(1))}])
def test_a_parameter_that_is_no_argument_is_refused(kind):
    hidden = nn.Parameter(torch.ones(D, dtype=torch.float64))

    @wrap_torch_function(lambda x, w: (x, w))
    def shifted(x, w):
        return x * w + hidden

    register_rule(shifted, **kind)
    model = Fn(lambda s, x: shifted(x, s.w), w=par(D), h=hidden).double()
    with pytest.raises(UnsupportedUse, match="not among its arguments"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


def test_several_outputs_are_refused():
    @wrap_torch_function(lambda x, w: (x, w))
    def pair(x, w):
        return x * w, w * 2

    register_rule(pair)
    model = Fn(lambda s, x: pair(x, s.w)[0], w=par(D)).double()
    with pytest.raises(UnsupportedUse, match="returns a tuple"):
        clipped_gradient(model, loss, _x(T, D), clipping=Clipping.automatic())


@pytest.mark.parametrize(
    "function", [F.linear, torch.exp, Tensor.size, F.multi_head_attention_forward, Tensor.__getitem__, F.embedding_bag]
)
def test_rules_of_ours_are_never_replaced(function):
    for kind in ({}, {"decomposition": lambda *a: None}, {"per_example": lambda *a: ()}):
        with pytest.raises(ConfigError, match="has a rule already"):
            register_rule(function, **kind)


def test_a_rule_is_registered_once():
    swish = wrapped_swish()
    register_rule(swish)
    with pytest.raises(ConfigError, match="has a rule already"):
        register_rule(swish, decomposition=_swish)


def test_two_kinds_at_once_and_no_function_at_all_are_refused():
    with pytest.raises(ConfigError, match="one of the two"):
        register_rule(wrapped_swish(), decomposition=_swish, per_example=_swish_formula)
    for no_function in ("linear", _Fused):
        with pytest.raises(ConfigError, match="is no function"):
            register_rule(no_function)


def test_a_function_that_never_meets_its_parameters_is_found_out():
    register_rule(_swish)
    with pytest.raises(CheckFailed, match="wrap_torch_function"):
        check_rule(_swish, (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D))))


def test_a_check_needs_a_parameter_and_two_examples():
    weight = nn.Parameter(torch.randn(3, D))
    for arguments in ((torch.randn(4, D), torch.randn(3, D)), (weight, weight), (torch.randn(1, D), weight)):
        with pytest.raises(ConfigError, match="at least 2 examples"):
            check_rule(F.linear, arguments)


def test_rules_of_ours_keep_the_contract():
    check_rule(F.linear, (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3))))
    check_rule(F.embedding, (torch.randint(0, 9, (4, T)), nn.Parameter(torch.randn(9, D))))
    check_rule(F.layer_norm, (torch.randn(4, T, D), (D,), nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))))


def test_both_names_are_public():
    assert discreet.register_rule is register_rule
    assert discreet.check_rule is check_rule
