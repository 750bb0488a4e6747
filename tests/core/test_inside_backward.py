"""What happens inside the backward, in hooks and custom Functions: gradients asked for, and tensors changed.

Each is exact, or refused by name.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks import D, T, loss
from core.unseen import CLIP, built, drawn, expect_exact, expect_refused, is_unguarded
from discreet.core.gradient import clipped_gradient
from discreet.errors import UnsupportedUse
from discreet.train.check import check

STEPS = 4


class _Equilibrium(nn.Module):
    """A layer at its fixed point (arXiv:1909.01377): its backward solves ``v = J^T v + g``, a product at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.of_input, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        with torch.no_grad():
            self.within.weight.mul_(0.3)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.within(z) + self.of_input(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(40):
                z = self.step(z, x)
        z = self.step(z, x)
        at = z.detach().requires_grad_()
        again = self.step(at, x)

        def solve(grad: Tensor) -> Tensor:
            v = grad
            for _ in range(STEPS):
                v = torch.autograd.grad(again, at, v, retain_graph=True)[0] + grad
            return v

        if z.requires_grad:
            z.register_hook(solve)
        return self.head(z)


def test_a_gradient_that_a_hook_asks_for_books_nothing():
    """Every product with the Jacobian runs the rules' backward; it was booked as if it trained the weights."""
    torch.manual_seed(1)
    expect_exact(_Equilibrium().double(), drawn(D))


class _OfTheInputAlone(torch.autograd.Function):
    """Runs a module, and lets no gradient reach its parameters."""

    @staticmethod
    def forward(ctx, x, module):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = module(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.y, ctx.x, grad)[0], None


def test_a_function_that_passes_its_parameters_over_books_nothing():
    parts = {"a": nn.Linear(D, D), "m": nn.Linear(D, D), "b": nn.Linear(D, 2)}
    expect_exact(built(lambda s, x: s.b(_OfTheInputAlone.apply(s.a(x), s.m)), **parts), drawn(D))


@pytest.mark.parametrize("checked", [False, True])
def test_a_trainable_layer_outside_the_model_is_seen_inside_a_checkpoint(checked):
    """A reentrant checkpoint makes its graph in the backward: the layer got a raw gradient, and nobody was told."""
    outside = nn.Linear(D, D).double()
    model = built(
        lambda s, x: s.b(checkpoint(lambda h: outside(h).tanh(), s.a(x), use_reentrant=True)),
        a=nn.Linear(D, D),
        b=nn.Linear(D, 2),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, for any forward without gradients
        if checked:
            report = check(model, loss, drawn(D))
            assert not report.passed
            assert "is no parameter of this model" in report.table()
        else:
            expect_refused(model, drawn(D), "is no parameter of this model")
    assert all(parameter.grad is None for parameter in outside.parameters())
    assert is_unguarded(model)


class _Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


def _hooked(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda grad: grad.mul_(0.5))
    return y


@pytest.mark.parametrize("change", [_hooked, _Halving.apply])
def test_a_gradient_changed_in_place_after_it_was_booked_is_refused(change):
    """Two branches are given one tensor for their gradient. The first is booked when the other changes it."""
    model = built(lambda s, x: change(s.b(x)) + s.a(x), a=nn.Linear(D, D), b=nn.Linear(D, D))
    expect_refused(model, drawn(T, D), "a.weight", "changed in place after it was booked")


def test_a_gradient_changed_in_place_before_it_is_booked_is_another_gradient():
    expect_exact(built(lambda s, x: s.b(_hooked(s.a(x)).tanh()), a=nn.Linear(D, D), b=nn.Linear(D, 2)), drawn(T, D))


def test_the_next_step_is_as_before():
    """Nothing of a refusal in the middle of a backward stays behind."""
    plain = torch.autograd.backward
    bad = built(lambda s, x: _Halving.apply(s.b(x)) + s.a(x), a=nn.Linear(D, D), b=nn.Linear(D, D))
    with pytest.raises(UnsupportedUse):
        clipped_gradient(bad, loss, drawn(T, D), clipping=CLIP)
    assert torch.autograd.backward is plain
    expect_exact(built(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(D, D), b=nn.Linear(D, 2)), drawn(T, D))


def test_a_parameter_whose_uses_were_both_changed_is_named_once():
    def twice(s, x):
        h = s.a(x)
        if h.requires_grad:
            h.register_hook(lambda _: h.detach().mul_(2) * 0)
        return s.l(h) + s.l(h)

    with pytest.raises(UnsupportedUse, match=r"^l\.weight: a gradient or an activation was changed in place"):
        clipped_gradient(built(twice, a=nn.Linear(D, D), l=nn.Linear(D, 2)), loss, drawn(D), clipping=CLIP)
