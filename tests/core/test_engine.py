"""The engine against one-example-at-a-time autograd, for every model of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blocks import B, Fn, loss
from cases import CASES
from discreet.core import book
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.style import Style
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


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("count", [2, 3])
def test_layers_that_share_both_operands_count_each(length, count):
    """``a(x) + b(x)``: both meet one input, and the addition hands both the very same gradient."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(count)).double()
    model = Fn(lambda s, x: sum(layer(x) for layer in s.layers), layers=layers)
    batch = {"x": torch.randn(6, length, 32).double(), "target": torch.randn(6).double()}
    gradients = alone(model, loss, batch, size=6)
    norm_B = norms(gradients)
    bound = 0.5 * float(norm_B.min())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound))
    assert relative_gap(found.tensors, weighted(gradients, abadi(norm_B, bound) * ROUNDING_MARGIN)) < 1e-9


@pytest.mark.parametrize("examples", [4096, 16384])
def test_a_large_microbatch_keeps_the_bound(examples):
    """Aligned examples: what one moves is rounded at the size of the whole sum."""
    model = Fn(lambda s, x: x * s.b, b=nn.Parameter(torch.ones(())))
    x = torch.rand(examples, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.7
    x[0] = 5
    per_example = lambda m, b: m(b)  # noqa: E731
    layout = check(model, per_example, x[:4]).layout
    whole = clipped_gradient(model, per_example, x, clipping=Clipping.abadi(1.0), layout=layout).tensors["b"]
    rest = clipped_gradient(model, per_example, x[1:], clipping=Clipping.abadi(1.0), layout=layout).tensors["b"]
    assert float((whole.double() - rest.double()).abs()) <= 1.0


@pytest.mark.parametrize(("width", "feature"), [(768, 1.4406780004501343), (1024, 1.2542372941970825)])
def test_wide_features_that_are_constant_keep_the_bound(width, feature):
    """Every product in an entry of the Gram matrix rounds the same way, and the two positions oppose each other."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(width, width, bias=False)
    x, g = (torch.randn(4, 2, width, generator=generator) for _ in range(2))
    x[0, 0], x[0, 1] = feature, feature * 1.002
    g[0, 1] = -g[0, 0]
    losses = lambda m, b: (m(b[0]) * b[1]).flatten(1).sum(1)  # noqa: E731
    clipping = Clipping.abadi(1.0)
    layout = check(model, losses, (x[1:], g[1:])).layout
    whole = clipped_gradient(model, losses, (x, g), clipping=clipping, layout=layout).tensors["weight"]
    rest = clipped_gradient(model, losses, (x[1:], g[1:]), clipping=clipping, layout=layout).tensors["weight"]
    assert float((whole - rest).norm()) <= 1.0


class Queue:
    """Stands for a stream of an accelerator."""

    def __init__(self) -> None:
        self.waited_for: list[Queue] = []

    def wait_stream(self, other: Queue) -> None:
        self.waited_for.append(other)


@pytest.mark.parametrize("style", [Style.flat(), Style.per_layer()], ids=str)
def test_what_a_stream_of_the_forward_books_is_waited_for(style, monkeypatch):
    """PyTorch waits for the streams of leaves that get a gradient. Parameters get none here: a norm that was read on
    another stream could have been read before it was there."""
    main, side, turns = Queue(), Queue(), []

    def stream_of(value: torch.Tensor) -> Queue:
        if torch._C._current_graph_task_id() == -1:
            return main
        turns.append(value)
        return side if len(turns) == 1 else main  # of the first layer that has a gradient, the last one

    monkeypatch.setattr(book, "_stream_of", stream_of)
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
    model = Fn(lambda s, x: s.b(torch.tanh(s.a(x))), a=a, b=b)
    batch = {"x": torch.randn(4, 3), "target": torch.randn(4)}
    layout = check(model, loss, batch).layout
    main.waited_for.clear()
    turns.clear()
    clipped_gradient(model, loss, batch, clipping=Clipping.abadi(1.0, style=style), layout=layout)
    assert side in main.waited_for
    assert side.waited_for == []
