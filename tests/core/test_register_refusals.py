"""Rules for functions of the user's own: wrong ones are found out, some uses refused, and ours never replaced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from blocks import D, Fn, T, loss, par
from core.own_functions import Fused, fused_formula, plain_swish, swish_formula, wrapped_fused, wrapped_swish
from core.unseen import drawn
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.register import register_rule
from discreet.core.rulecheck import check_rule
from discreet.errors import CheckFailed, ConfigError, UnsupportedUse
from discreet.train.check import check

pytestmark = pytest.mark.usefixtures("registry")


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
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


@pytest.mark.parametrize("kind", [{}, {"per_example": lambda grad, w: (grad,)}])
def test_a_function_of_parameters_alone_needs_a_decomposition(kind):
    @wrap_torch_function(lambda w: (w,))
    def binary(w):
        return w.sign()

    model = Fn(lambda s, x: F.linear(x, binary(s.w)), w=par(3, D)).double()
    with pytest.raises(UnsupportedUse, match="give it a rule"):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())
    register_rule(binary, **kind)
    with pytest.raises(UnsupportedUse, match="no argument carries the batch"):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


WRONG = {
    "half of it": lambda grad, x, w: (None, 0.5 * fused_formula(grad, x, w)[1]),
    "of the sum, for everyone": lambda grad, x, w: (None, fused_formula(grad, x, w)[1].sum(0).expand(len(x), -1)),
    "in another order": lambda grad, x, w: (None, fused_formula(grad, x, w)[1].flip(0)),
    "of memory in another order": lambda grad, x, w: fused_formula(grad.as_strided(x.shape, x.stride()), x, w),
    "in half precision": lambda grad, x, w: (None, fused_formula(grad, x, w)[1].half()),
    "of the first position": lambda grad, x, w: (None, fused_formula(grad[:, :1], x[:, :1], w)[1]),
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
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


def test_a_function_that_draws_random_numbers_is_refused():
    @wrap_torch_function(lambda x, w: (x, w))
    def noisy(x, w):
        return F.dropout(x * w, 0.5)

    register_rule(noisy)
    model = Fn(lambda s, x: noisy(x, s.w), w=par(D)).double()
    with pytest.raises(UnsupportedUse, match="random"):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


@pytest.mark.parametrize("kind", [{}, {"per_example": lambda grad, x, w: (None, (grad * x).sum(1))}])
def test_a_parameter_that_is_no_argument_is_refused(kind):
    hidden = nn.Parameter(torch.ones(D, dtype=torch.float64))

    @wrap_torch_function(lambda x, w: (x, w))
    def shifted(x, w):
        return x * w + hidden

    register_rule(shifted, **kind)
    model = Fn(lambda s, x: shifted(x, s.w), w=par(D), h=hidden).double()
    with pytest.raises(UnsupportedUse, match="not among its arguments"):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


def test_several_outputs_are_refused():
    @wrap_torch_function(lambda x, w: (x, w))
    def pair(x, w):
        return x * w, w * 2

    register_rule(pair)
    model = Fn(lambda s, x: pair(x, s.w)[0], w=par(D)).double()
    with pytest.raises(UnsupportedUse, match="returns a tuple"):
        clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.automatic())


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
        register_rule(swish, decomposition=plain_swish)


def test_two_kinds_at_once_and_no_function_at_all_are_refused():
    with pytest.raises(ConfigError, match="one of the two"):
        register_rule(wrapped_swish(), decomposition=plain_swish, per_example=swish_formula)
    for no_function in ("linear", Fused):
        with pytest.raises(ConfigError, match="is no function"):
            register_rule(no_function)


def test_a_function_that_never_meets_its_parameters_is_found_out():
    register_rule(plain_swish)
    with pytest.raises(CheckFailed, match="wrap_torch_function"):
        check_rule(plain_swish, (torch.randn(4, T, D), nn.Parameter(torch.randn(3, D))))


def test_a_check_needs_a_parameter_and_two_examples():
    weight = nn.Parameter(torch.randn(3, D))
    for arguments in ((torch.randn(4, D), torch.randn(3, D)), (weight, weight), (torch.randn(1, D), weight)):
        with pytest.raises(ConfigError, match="at least 2 examples"):
            check_rule(F.linear, arguments)


def test_a_function_that_autograd_runs_past_every_rule_is_refused():
    """It was taken, and never met."""
    with pytest.raises(ConfigError, match="wrap_torch_function"):
        register_rule(Fused.apply)


def test_the_check_says_that_a_rule_of_ones_own_is_wrong():
    """It said that the fault was to be reported."""
    fused = wrapped_fused()
    register_rule(fused, per_example=WRONG["of the first position"])
    model = Fn(lambda s, x: fused(x, s.w), w=par(D)).double()
    report = check(model, loss, drawn(T, D))
    assert not report.passed
    assert "correct the rule of" in str(report)
