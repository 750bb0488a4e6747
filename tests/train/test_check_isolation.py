"""The self-check sees by behaviour that one example's loss depends on others, whatever the class is called."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from blocks import loss
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.seeded import seeded
from discreet.train.check import check
from train.checking import B, D, T, V, built, drawn, expect_failed


class HandMadeBatchNorm(nn.Module):
    """Nothing in its name or class says what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0).sqrt() + 1e-3)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(D),
        lambda: nn.BatchNorm1d(D, affine=False),
        lambda: nn.BatchNorm1d(D, affine=False, track_running_stats=False),
        lambda: nn.BatchNorm1d(D, track_running_stats=False),
        lambda: HandMadeBatchNorm(),
    ],
)
def test_batch_norm_is_caught(norm):
    model = built(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(D, D), n=norm(), b=nn.Linear(D, 2))
    expect_failed(model, drawn(D), "isolation")


def test_batch_norm_beside_dropout_is_caught():
    model = built(
        lambda s, x: s.b(s.d(s.n(s.a(x)))),
        a=nn.Linear(D, D),
        n=nn.BatchNorm1d(D, affine=False),
        d=nn.Dropout(),
        b=nn.Linear(D, 2),
    )
    expect_failed(model, drawn(D), "isolation")


def test_frozen_batch_norm_passes():
    model = built(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(D, D), n=nn.BatchNorm1d(D), b=nn.Linear(D, 2))
    model.n.requires_grad_(False).eval()
    assert check(model, loss, drawn(D)).passed


def test_a_mean_over_the_tokens_of_the_batch_is_caught():
    """What language-model trainers do: divide by the number of labelled tokens in the whole batch."""
    torch.manual_seed(2)
    model = built(lambda s, x: s.l(s.e(x)), e=nn.Embedding(V, D), l=nn.Linear(D, V))
    labels = torch.randint(0, V, (B, T))
    labels[0, 3:] = -100
    batch = {"x": torch.randint(0, V, (B, T)), "target": labels}

    def by_token(m, b):
        each = F.cross_entropy(m(b["x"]).transpose(1, 2), b["target"], reduction="none", ignore_index=-100).sum(1)
        return each / (b["target"] != -100).sum()

    def by_example(m, b):
        each = F.cross_entropy(m(b["x"]).transpose(1, 2), b["target"], reduction="none", ignore_index=-100).sum(1)
        return each / (b["target"] != -100).sum(1)

    expect_failed(model, batch, "isolation", loss_function=by_token)
    assert check(model, by_example, batch).passed
    even = {"x": batch["x"], "target": torch.randint(0, V, (B, T))}
    expect_failed(model, even, "removed", loss_function=by_token)


def _auxiliary(m, b):
    gates = m.gate(b["x"]).softmax(-1)
    return loss(m, b) + 0.01 * (gates.mean(0).square().sum() * gates.shape[-1])


def test_an_auxiliary_loss_over_the_batch_is_caught():
    model = built(lambda s, x: s.gate(x).softmax(-1) * s.l(x), gate=nn.Linear(D, 4), l=nn.Linear(D, 4))
    expect_failed(model, drawn(D), "isolation", loss_function=_auxiliary)


@pytest.mark.parametrize("weight", [1e-3, 1e-4])
def test_a_faint_auxiliary_loss_is_caught(weight):
    model = built(lambda s, x: s.l(x), l=nn.Linear(D, 4))
    expect_failed(
        model, drawn(D), "isolation", loss_function=lambda m, b: loss(m, b) + weight * m(b["x"]).tanh().mean()
    )


def test_a_faint_coupling_beside_a_large_loss_is_caught():
    def uneven(m, b):
        scale = torch.ones(len(b["x"])).index_fill(0, torch.tensor([0]), 1e4) if len(b["x"]) > 1 else torch.ones(1)
        return loss(m, b) * scale + 0.05 * m(b["x"]).tanh().mean()

    expect_failed(built(lambda s, x: s.l(x), l=nn.Linear(D, 4)), drawn(D), "isolation", loss_function=uneven)


def test_negatives_from_the_batch_are_caught():
    def contrastive(m, b):
        z = F.normalize(m(b["x"]), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)), reduction="none")

    expect_failed(built(lambda s, x: s.l(x), l=nn.Linear(D, 4)), drawn(D), "isolation", loss_function=contrastive)


def test_mixing_examples_is_caught():
    def mixed(m, b):
        return m(0.7 * b["x"] + 0.3 * b["x"].roll(1, 0)).square().sum(1)

    expect_failed(built(lambda s, x: s.l(x), l=nn.Linear(D, 4)), drawn(D), "isolation", loss_function=mixed)


def test_division_by_the_size_of_the_batch_is_caught():
    expect_failed(
        built(lambda s, x: s.l(x), l=nn.Linear(D, 4)),
        drawn(D),
        "removed",
        loss_function=lambda m, b: loss(m, b) / len(b["x"]),
    )


def test_a_gradient_that_is_coupled_where_the_loss_is_not_is_caught():
    """The value of ``h - mean + mean.detach()`` depends on no other example; its gradient does."""
    model = built(lambda s, x: _straight(s.a(x)), a=nn.Linear(D, 3))
    assert not check(model, loss, drawn(D)).passed


def _straight(h: Tensor) -> Tensor:
    mean = h.mean(0, keepdim=True).expand_as(h)
    return h - mean + mean.detach()


def test_a_hook_that_couples_gradients_is_caught():
    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: g / g.norm())
        return self.b(h)

    assert not check(built(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2)), loss, drawn(D)).passed


def _straight_through(model: nn.Module, batch) -> Tensor:
    h, scale = model(batch["x"]), batch["x"].abs().mean()
    return (h + (scale * h - (scale * h).detach())).square().sum(1)


def _hooked(model: nn.Module, batch) -> Tensor:
    h, scale = model(batch["x"]), batch["x"].abs().amax()
    if h.requires_grad:
        h.register_hook(lambda grad: grad * scale)
    return h.square().sum(1)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("loss_function", [_straight_through, _hooked])
def test_a_gradient_that_depends_on_others_is_caught_though_no_loss_does(loss_function, dropout):
    """One example out of the batch moves the gradients of all others, by as much as a clipped one can."""
    model = built(
        lambda s, x: s.b(s.d(s.a(x).tanh())), a=nn.Linear(D, D), d=nn.Dropout(0.3 * dropout), b=nn.Linear(D, 2)
    )
    expect_failed(model, drawn(D), "gradients when the others are replaced", loss_function=loss_function)


def test_a_gradient_that_is_scaled_within_each_example_passes():
    def reversed_by_its_own_size(model, batch):
        h, scale = model(batch["x"]), batch["x"].abs().amax(1, keepdim=True)
        h.requires_grad and h.register_hook(lambda grad: -grad * scale)
        return h.square().sum(1)

    model = built(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    assert check(model, reversed_by_its_own_size, drawn(D)).passed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_coupling_that_begins_at_a_size_is_caught(dropout):
    """The examples of the check are four, and those of a microbatch are many."""

    def forward(s, x: Tensor) -> Tensor:
        h = s.a(x)
        return s.b(s.d((h - h.mean(0) if len(x) >= 16 else h).tanh()))

    model = built(forward, a=nn.Linear(D, D), d=nn.Dropout(dropout), b=nn.Linear(D, 2))
    expect_failed(model, drawn(D), "losses in a larger batch")


def test_a_loss_near_zero_is_no_coupling():
    """A critic's: terms cancel, and alone the last bits are others, which was more than 1e-4 of what is left."""
    torch.manual_seed(0)
    model = nn.Linear(512, 1, bias=False)
    x, weight = torch.randn(6, 512), model.weight.detach()[0]
    x[2] -= (x[2] @ weight) / weight.square().sum() * weight
    report = check(model, lambda m, b: m(b).squeeze(1), x)
    assert report.passed, report.table()


def test_a_model_that_takes_no_larger_batch_is_not_asked():
    def forward(s, x: Tensor) -> Tensor:
        assert len(x) <= B
        return s.a(x)

    assert check(built(forward, a=nn.Linear(D, 2)), loss, drawn(D)).passed


def _noisy(m, b):
    """A denoiser's loss: each example at a level of its own, drawn here."""
    level = torch.rand(len(b["x"]), 1)
    return (m(b["x"] * (1 - level) + torch.randn_like(b["x"]) * level) - b["x"]).square().mean(1)


def _sampled(m, b):
    mean, spread = m(b["x"]).chunk(2, 1)
    return (mean + spread.exp() * torch.randn_like(mean) - b["x"][:, : mean.shape[1]]).square().sum(1)


@pytest.mark.parametrize(
    ("forward", "own"),
    [
        (lambda s, x: s.l(x), _noisy),
        (lambda s, x: s.l(x), _sampled),
        (lambda s, x: F.gumbel_softmax(s.l(x), hard=True) * s.l(x), loss),
        (lambda s, x: s.l(x * torch.empty(len(x), 1).bernoulli_(0.5)), loss),
        (lambda s, x: s.l(F.dropout(x, 0.3)), loss),
        (lambda s, x: s.l(x)[:, torch.randperm(D)[:3]], loss),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_random_numbers_of_each_example_are_no_coupling(forward, own, training):
    model = built(forward, l=nn.Linear(D, D)).train(training)
    report = check(model, own, drawn(D))
    assert report.passed, report.table()


def test_what_follows_from_the_size_of_the_batch_in_training_alone_is_caught_beside_dropout():
    def scaled(s, x):
        return s.l(s.d(s.a(x))) * (len(x) if s.training else 1)

    expect_failed(built(scaled, a=nn.Linear(D, D), d=nn.Dropout(), l=nn.Linear(D, 4)), drawn(D), "removed")


def test_one_coupling_from_sixteen_examples_on_is_caught_beside_dropout():
    def centred(s, x):
        hidden = s.d(s.a(x))
        return s.l(hidden - hidden.mean(0) if s.training and len(x) > 16 else hidden)

    expect_failed(built(centred, a=nn.Linear(D, D), d=nn.Dropout(), l=nn.Linear(D, 4)), drawn(D), "larger batch")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_numbers_at_every_step_belong_to_places_and_not_to_examples(dropout):
    """Whoever leaves moves all others to the numbers of other places, and there is nothing random about it."""

    def numbered(s, x):
        hidden = s.d(x)
        torch.manual_seed(3)
        return s.l(hidden + torch.randn_like(x))

    expect_failed(built(numbered, l=nn.Linear(D, 4), d=nn.Dropout(dropout)), drawn(D), "isolation")


def test_layers_dropped_by_a_random_number_of_python_or_numpy_are_no_coupling():
    def shaken(s, x):
        return s.l(x) * (1 + random.random()) + np.random.rand()

    assert check(built(shaken, l=nn.Linear(D, 4)), loss, drawn(D)).passed


@pytest.mark.parametrize("backward", [True, False])
def test_examples_that_are_attacked_before_they_are_learnt_are_no_coupling(backward):
    """The forward asks for the gradient of its input: a loss is asked for as in training, where gradients are made."""

    def attacked(m, b):
        x = b["x"].clone().requires_grad_()
        clean = m(x).square().sum()
        if backward:
            clean.backward()
            slope = x.grad
        else:
            (slope,) = torch.autograd.grad(clean, x)
        return m(b["x"] + 0.1 * slope.sign()).square().sum(1)

    model = built(lambda s, x: s.l(x.tanh()), l=nn.Linear(D, 4))
    assert check(model, attacked, drawn(D)).passed
    assert all(parameter.grad is None for parameter in model.parameters())  # raw ones


def test_a_reentrant_checkpoint_beside_dropout_is_compared_under_the_same_numbers():
    def saved(s, x):
        return s.l(checkpoint(lambda h: s.d(s.a(h)), s.z(x), use_reentrant=True))

    parts = {"z": nn.Linear(D, D), "a": nn.Linear(D, D), "d": nn.Dropout(), "l": nn.Linear(D, 4)}
    report = check(built(saved, **parts), loss, drawn(D))
    assert report.passed, report.table()


def test_a_graph_that_can_be_gone_through_once_is_compared_as_well():
    def chosen():
        return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])

    def saved(s, x):
        return s.l(checkpoint(lambda h: s.d(s.a(h)), s.z(x), use_reentrant=False, context_fn=chosen))

    parts = {"z": nn.Linear(D, D), "a": nn.Linear(D, D), "d": nn.Dropout(), "l": nn.Linear(D, 4)}
    report = check(built(saved, **parts), loss, drawn(D))
    assert report.passed, report.table()


@pytest.mark.parametrize("tossed", [lambda: float(torch.rand(())), random.random, np.random.rand])
@pytest.mark.parametrize("folded", [False, True])
def test_layers_that_are_dropped_at_random_are_known_wherever_they_are_kept(tossed, folded):
    def dropped(s, x):
        hidden = s.first(x)
        for layer in s.layers:
            if tossed() < 0.5:
                hidden = hidden + layer(hidden.flatten(0, 1)).view_as(hidden) if folded else hidden + layer(hidden)
        return s.last(hidden.tanh())

    layers = nn.ModuleList(nn.Linear(D, D) for _ in range(6))
    model = built(dropped, first=nn.Linear(D, D), layers=layers, last=nn.Linear(D, 4))
    report = check(model, loss, drawn(T, D))
    assert report.passed, report.table()
    for seed in range(20):
        with seeded(seed):
            clipped_gradient(model, loss, drawn(T, D), clipping=Clipping.abadi(1.0), layout=report.layout)


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7])
def test_one_layer_that_is_used_at_times_is_known_where_nothing_else_is_random(chance):
    """Two seeds that took the same path told that there was no other, and training came upon it."""

    def tossed(s, x):
        hidden = s.first(x).tanh()
        return s.last(s.more(hidden).tanh() if torch.rand(()) < chance else hidden)

    model = built(tossed, first=nn.Linear(D, D), more=nn.Linear(D, D), last=nn.Linear(D, 4))
    layout = check(model, loss, drawn(D)).layout
    for seed in range(20):
        with seeded(seed):
            clipped_gradient(model, loss, drawn(D), clipping=Clipping.abadi(1.0), layout=layout)


def test_losses_near_zero_are_compared_by_the_size_of_what_was_subtracted():
    """1 minus a cosine that is nearly 1 has the rounding of 1, whatever is left."""

    def apart(m, b):
        one, other = (F.normalize(m(b["x"] + far * torch.randn_like(b["x"])), dim=1) for far in (0.0, b["far"]))
        return 1 - (one * other).sum(1)

    batch = drawn(D) | {"far": torch.tensor([3e-3, 1.0, 3e-3, 3e-3])[:, None]}
    report = check(built(lambda s, x: s.l(x), l=nn.Linear(D, 16)), apart, batch)
    assert report.passed, report.table()


def test_a_layer_that_is_used_seldom_is_compared_where_it_is():
    """Rows folded the wrong way round, in one forward of two."""

    def wrong(s, x):
        hidden = s.first(x)
        if torch.rand(()) < 0.5:
            return s.last(hidden)
        return s.last(s.seldom(hidden.transpose(0, 1).reshape(-1, D)).tanh().view(T, len(x), D).transpose(0, 1))

    parts = {"first": nn.Linear(D, D), "seldom": nn.Linear(D, D), "last": nn.Linear(D, 4)}
    assert not check(built(wrong, **parts), loss, drawn(T, D)).passed
