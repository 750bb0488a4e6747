"""Losses, backward passes and precisions that could give a wrong norm unseen. Each is exact, or refused by name; never
silent.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks import B, D, T, frozen, loss, par
from cases import CASES
from core.unseen import CLIP, R, built, drawn, expect_exact, expect_refused, is_unguarded
from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import backward, clipped_gradient, settle, trainable
from discreet.core.meeting import guard
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, flat, norms, relative_gap, rows, weighted

# ------------------------------------------------------------------------------------------- losses and batches


def test_losses_must_be_one_per_example():
    model, batch = CASES["linear 2-D"].build()
    for bad in (
        lambda m, b: loss(m, b).mean(),
        lambda m, b: loss(m, b).unsqueeze(1),
        lambda m, b: loss(m, b)[:3],
        lambda m, b: loss(m, b).detach(),
        lambda m, b: torch.zeros(B),
        lambda m, b: m[0].bias[:1].expand(B),
    ):
        with pytest.raises((ConfigError, UnsupportedUse)):
            clipped_gradient(model, bad, batch, clipping=CLIP)
        assert is_unguarded(model)


def test_losses_that_are_functions_of_parameters_alone_are_refused():
    model = built(lambda s, x: s.w, w=par(B))
    with pytest.raises((ConfigError, UnsupportedUse)):
        clipped_gradient(model, lambda m, b: m.w * 2, drawn(D), clipping=CLIP)


def test_an_empty_batch_is_a_sum_of_zeros():  # [25]
    model, _ = CASES["unused parameter"].build()
    empty = {"x": torch.zeros(0, D), "target": torch.zeros(0)}
    total = clipped_gradient(model, loss, empty, clipping=CLIP)
    assert total.tensors.keys() == dict(model.named_parameters()).keys()
    assert not flat(total.tensors).any()
    assert total.sensitivity == R


def test_batches_that_disagree_about_their_size_are_refused():
    model, batch = CASES["linear 2-D"].build()
    with pytest.raises(ConfigError, match="batch sizes"):
        clipped_gradient(model, loss, {**batch, "target": batch["target"][:2]}, clipping=CLIP)


def test_a_batch_whose_layout_cannot_be_verified_is_refused():
    model, batch = CASES["linear 2-D"].build()
    hidden = lambda m, b: loss(m, batch)  # noqa: E731 - the batch reaches the loss past its argument
    with pytest.raises(ConfigError, match="layout"):
        clipped_gradient(model, hidden, None, clipping=CLIP, examples=B)


def test_a_trainable_tensor_outside_the_model_is_refused():
    outside = nn.Parameter(torch.ones(D, dtype=torch.float64))
    for stray in (outside, torch.ones((), dtype=torch.float64, requires_grad=True)):
        expect_refused(
            built(lambda s, x, stray=stray: s.l(x * stray), l=nn.Linear(D, 2)), drawn(D), "no parameter of this model"
        )
        assert stray.grad is None


def test_an_activation_that_is_a_leaf_gets_no_raw_gradient():
    """A table of 3 B rows might be an activation: training it would be another matter, so nothing comes to it."""
    stray = torch.ones(3 * B, D, dtype=torch.float64, requires_grad=True)
    expect_exact(built(lambda s, x: s.l(x * stray[: len(x)]), l=nn.Linear(D, 2)), drawn(D))
    assert not stray.grad.any()


@pytest.mark.parametrize("function", ["linear", "addmm"])
def test_a_bias_that_is_spread_over_the_outputs_is_refused(function):
    """One number for all outputs: its gradient is a sum, and the length of what was summed is no norm of it."""
    call = {"linear": lambda s, x: F.linear(x, s.l.weight, s.b), "addmm": lambda s, x: s.b.addmm(x, s.l.weight.t())}
    expect_refused(
        built(call[function], l=nn.Linear(D, 2, bias=False), b=par(1)), drawn(D), "b: its shape (1,)", "(2,)"
    )


def test_inputs_may_require_a_gradient():
    batch = drawn(D)
    batch["x"].requires_grad_()
    gradients = alone(model := built(lambda s, x: s.l(x), l=nn.Linear(D, 2)), loss, batch, size=B)
    layout = check(model, loss, {k: v.detach() for k, v in batch.items()}).layout
    found = clipped_gradient(model, loss, batch, clipping=CLIP, layout=layout)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


def test_nothing_trainable_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        clipped_gradient(frozen(nn.Linear(D, 2), "weight", "bias"), loss, drawn(D), clipping=CLIP)


def test_an_inner_gradient_books_nothing():
    """An attack on the inputs inside the loss (adversarial training) is a backward, and not the one that trains."""

    def attacked(model, batch):
        z = batch["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(model(z).tanh().sum(), z)
        return model(batch["x"] + 0.1 * g.sign()).square().sum(1)

    model, batch = CASES["linear 2-D"].build()
    gradients = alone(model, attacked, batch, size=B)
    found = clipped_gradient(model, attacked, batch, clipping=CLIP)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


def test_a_gradient_penalty_is_refused():
    def penalised(model, batch):
        z = batch["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(model(z).tanh().sum(), z, create_graph=True)
        return g.square().sum(1)

    model, batch = CASES["linear 2-D"].build()
    with pytest.raises(UnsupportedUse, match="a gradient was taken of a gradient"):
        clipped_gradient(model, penalised, batch, clipping=CLIP)
    assert is_unguarded(model)


LAYERS = {
    "linear": (nn.Linear(D, 2), (D,)),
    "convolution": (nn.Conv1d(D, 2, 2), (D, T)),
    "lstm": (nn.LSTM(D, 2, batch_first=True), (T, D)),
    "gru": (nn.GRU(D, 2, batch_first=True), (T, D)),
    "layer norm": (nn.LayerNorm(D), (D,)),
    "group norm": (nn.GroupNorm(1, D), (D, T)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weights", [False, True], ids=["sum", "weighted"])
def test_a_penalty_on_the_gradient_of_a_sum_is_refused(layer, weights):
    """Its incoming gradient is all ones and needs none itself: the penalty trained nothing, and nobody was told."""

    def penalised(model, batch):
        z = batch["x"].clone().requires_grad_()
        y = model(z)
        first = (y * torch.arange(1.0, y[0].numel() + 1).reshape(y.shape[1:]) if weights else y).sum()
        (g,) = torch.autograd.grad(first, z, create_graph=True)
        return y.flatten(1).sum(1) + g.square().flatten(1).sum(1)

    module, shape = LAYERS[layer]
    recurrent = isinstance(module, nn.RNNBase)
    model = built(lambda s, x: s.l(x)[0] if recurrent else s.l(x), l=module)
    with pytest.raises(UnsupportedUse, match="a gradient was taken of a gradient"):
        clipped_gradient(model, penalised, drawn(*shape), clipping=CLIP)
    assert is_unguarded(model)


def test_an_inner_gradient_may_keep_its_graph_if_nothing_goes_back_through_it():
    def attacked(model, batch):
        z = batch["x"].clone().requires_grad_()
        (g,) = torch.autograd.grad(model(z).tanh().sum(), z, create_graph=True)
        return model(batch["x"] + 0.1 * g.detach()).square().sum(1)

    model, batch = CASES["linear 2-D"].build()
    gradients = alone(model, attacked, batch, size=B)
    found = clipped_gradient(model, attacked, batch, clipping=CLIP)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


def test_two_backward_passes_into_one_book_add_up():  # [27]
    model, batch = CASES["tied head"].build()
    both = lambda m, b: loss(m, b) + (m(b["x"]).sum((1, 2)) / 9).tanh()  # noqa: E731
    whole = clipped_gradient(model, both, batch, clipping=CLIP)
    book = Book(trainable(model), examples=B)
    with guard(book):
        backward(book, loss(model, batch))
        backward(book, (model(batch["x"]).sum((1, 2)) / 9).tanh())
    assert relative_gap(settle(book, CLIP).tensors, whole.tensors) < 1e-12


# ---------------------------------------------------------------------------------------- checkpoints and autocast


@pytest.mark.parametrize("size", [1, 2, B])
@pytest.mark.parametrize("verified", [False, True])
def test_reentrant_checkpoint_is_exact(size, verified):  # [17]
    def forward(self, x):
        h = checkpoint(self.b, self.a(x), use_reentrant=True)
        return self.c(checkpoint(self.b, h, use_reentrant=True))

    def same(self, x):
        return self.c(self.b(self.b(self.a(x))))

    parts = {
        "a": nn.Linear(D, D),
        "b": nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D)),
        "c": nn.Linear(D, 2),
    }
    model, twin = built(forward, **parts), built(same, **parts)
    batch = rows(drawn(T, D), range(size), B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, for any forward without gradients
        report = check(model, loss, rows(drawn(T, D), range(4), B)) if verified else None
    assert report is None or report.passed, report.table()
    assert all(p.grad is None for p in model.parameters())
    gradients = alone(twin, loss, batch, size=size)
    found = clipped_gradient(model, loss, batch, clipping=CLIP, layout=report.layout if report else None)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5
    free = clipped_gradient(model, loss, batch, clipping=Clipping.none(), layout=report.layout if report else None)
    assert relative_gap(free.tensors, weighted(gradients, torch.ones(size))) < 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_dropout_inside_a_checkpoint():
    model = built(
        lambda s, x: s.c(checkpoint(s.b, s.a(x), use_reentrant=False)),
        a=nn.Linear(D, D),
        b=nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)),
        c=nn.Linear(D, 2),
    )
    batch = drawn(T, D)
    layout = check(model, loss, batch).layout
    torch.manual_seed(11)
    found = clipped_gradient(model, loss, batch, clipping=Clipping.none(), layout=layout)
    torch.manual_seed(11)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(loss(model, batch).sum(), list(parameters.values()))
    assert relative_gap(found.tensors, dict(zip(parameters, wanted, strict=True))) < 1e-12


@pytest.mark.parametrize("around", ["model", "everything"])
def test_autocast_never_rounds_a_norm_down(around):  # [15]
    """bfloat16 activations are the model's business; norms and sums are not. The bound holds to float32's precision."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x = torch.randn(4, 1, 64) + 0.02 * torch.randn(4, 20, 64)  # nearly the same token at every position: case 15
    sign = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0).reshape(1, 20, 1)

    def difference(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "model" or torch.is_autocast_enabled("cpu")):
            return (m(b) * sign).float().sum((1, 2))

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "everything"):
        for i in range(4):
            total = clipped_gradient(model, difference, x[i : i + 1], clipping=Clipping.abadi(1e-3))
            assert all(value.dtype is torch.float32 for value in total.tensors.values())
            assert 0.9e-3 < float(flat(total.tensors).norm()) <= 1e-3 * (1 + 1e-6)


def test_bfloat16_parameters_have_float32_sums():
    model, batch = CASES["linear 3-D"].build(torch.float32)
    exact = alone(model.double(), loss, {k: v.double() for k, v in batch.items()}, size=B)
    found = clipped_gradient(
        model.bfloat16(), loss, {k: v.bfloat16() for k, v in batch.items()}, clipping=Clipping.abadi(1e-2)
    )
    assert all(value.dtype is torch.float32 for value in found.tensors.values())
    assert relative_gap(found.tensors, weighted(exact, abadi(norms(exact), 1e-2))) < 0.05


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_fast_float32_is_switched_off_for_norms_and_sums(setting, monkeypatch):
    seen: list[str] = []
    plain = torch.Tensor.__matmul__

    def watched(a, b):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return plain(a, b)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        model, batch = CASES["linear 3-D gram"].build(torch.float32)
        book = Book(trainable(model), examples=B)
        with guard(book):
            backward(book, loss(model, batch))
        monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
        settle(book, CLIP)
        monkeypatch.undo()
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert set(seen) == {"ieee"}


def test_float16_scaling_is_visible_in_the_norm():  # [22]
    """A loss that is scaled before the backward is another loss: its norms are scaled, and clipped as such."""
    model, batch = CASES["linear 2-D"].build()
    scaled = clipped_gradient(model, lambda m, b: 1024 * loss(m, b), batch, clipping=CLIP)
    assert float(flat(scaled.tensors).norm()) <= B * R


def test_a_buffer_that_changes_after_a_derived_value_was_made_is_refused():
    def forward(self, x):
        table = self.w * self.mask
        out = x * table
        self.mask.mul_(0.5)
        return out

    model = built(forward, w=par(D), mask=torch.ones(D))
    expect_refused(model, drawn(T, D), "changed in place")
