"""Layer- and group-wise clipping: the same bound in every style, and nothing booked for longer than it must be."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks import B, D, Fn, loss
from cases import CASES
from discreet.core import book as books
from discreet.core.book import Book
from discreet.core.clipping import ROUNDING_MARGIN, Clipping
from discreet.core.gradient import backward, clipped_gradient, settle, trainable
from discreet.core.meeting import guard
from discreet.core.style import Style, StyleKind
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import Gradients, alone, flat, norms, relative_gap, rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",  # vmap of _weight_norm falls back to a loop, and says so
    "ignore:Using padding='same' with even kernel:UserWarning",  # said by the plain convolution of the oracle
)

R = 0.5
STYLES = {"per_layer": Style.per_layer(), "per_parameter": Style.per_parameter()}


def _by_hand(gradients: Gradients, style: Style) -> dict[str, Tensor]:
    """One norm for each group, each within R / sqrt(K), example by example."""
    groups = style.split(gradients)
    bound = R / math.sqrt(len(groups))
    sums = {}
    for group in groups:
        norm_B = norms({name: gradients[name] for name in group})
        for name in group:
            total = torch.zeros(gradients[name].shape[1:], dtype=torch.float64)
            for norm, each in zip(norm_B.tolist(), gradients[name], strict=True):
                total += each * (1.0 if norm * 1.0 <= bound * ROUNDING_MARGIN else bound * ROUNDING_MARGIN / norm)
            sums[name] = total
    return sums


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("name", list(CASES))
def test_each_group_is_clipped_apart(name, style):
    case = CASES[name]
    model, batch = case.build()
    clipping = Clipping.abadi(R, style=STYLES[style])
    report = check(model, loss, batch, clipping=clipping)
    assert report.passed, report.table()
    found = clipped_gradient(model, loss, batch, clipping=clipping, layout=report.layout)
    assert found.sensitivity == R
    gradients = alone(model, loss, batch, size=B)
    assert relative_gap(found.tensors, _by_hand(gradients, STYLES[style])) < 1e-9


def _deep(depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(D, D), nn.Tanh()))).double()


def _x(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


class _Sequential(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_groups_by_prefix_and_the_rest():
    model = _Sequential(_deep())
    style = Style.groups("inner.0", "inner.4")
    assert [len(group) for group in style.split(dict(model.named_parameters()))] == [2, 8, 2]
    found = clipped_gradient(model, loss, _x(D), clipping=Clipping.abadi(R, style=style))
    assert relative_gap(found.tensors, _by_hand(alone(model, loss, _x(D), size=B), style)) < 1e-9


@pytest.mark.parametrize("style", [Style.per_layer(), Style.groups("inner.0", "inner.2", "inner.4")])
def test_nothing_stays_booked(style, monkeypatch):
    """Records held at once: those of one layer, not those of six."""
    held = []
    honest = books.Book.record

    def watched(self, derivation, form):
        honest(self, derivation, form)
        held.append(sum(len(records) for records in self._records.values()))

    monkeypatch.setattr(books.Book, "record", watched)
    model = _Sequential(_deep())
    clipped_gradient(model, loss, _x(3, D), clipping=Clipping.abadi(R))
    assert max(held) == 12
    held.clear()
    clipped_gradient(model, loss, _x(3, D), clipping=Clipping.abadi(R, style=style))
    assert max(held) <= (1 if style.kind is StyleKind.PER_LAYER else 6)
    assert held[-1] == 0


@pytest.mark.parametrize("style", list(STYLES.values()), ids=list(STYLES))
def test_no_example_moves_the_sum_by_more_than_the_bound_in_any_style(style):
    model = _Sequential(_deep(3)).float()
    clipping = Clipping.abadi(R, style=style)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, 4, D, generator=generator)
    x[1] *= 1e20
    x[2, 0, 0] = float("nan")
    x[3, 1, 1] = float("inf")
    batch = {"x": x, "target": torch.randn(B, generator=generator)}
    layout = check(model, loss, {"x": torch.randn(4, 4, D), "target": torch.randn(4)}).layout
    whole = flat(clipped_gradient(model, loss, batch, clipping=clipping, layout=layout).tensors)
    assert torch.isfinite(whole).all()
    for out in range(B):
        rest = rows(batch, [i for i in range(B) if i != out], B)
        without = flat(clipped_gradient(model, loss, rest, clipping=clipping, layout=layout).tensors)
        assert float((whole - without).norm()) <= R


def test_a_gradient_after_its_group_was_settled_is_refused():
    model = _Sequential(_deep(2))
    clipping = Clipping.abadi(R, style=Style.per_layer())
    book = Book(trainable(model), examples=B, clipping=clipping)
    with guard(book):
        losses = loss(model, _x(D))
        with book.collecting():
            losses.sum().backward(retain_graph=True)
        with pytest.raises(UnsupportedUse, match="flat clipping"):
            backward(book, losses)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_exact_in_any_style(reentrant):
    def forward(self, x):
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=reentrant))

    parts = {
        "a": nn.Linear(D, D),
        "b": nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)),
        "c": nn.Linear(D, 2),
    }
    torch.manual_seed(3)
    model = Fn(forward, **parts).double()
    twin = Fn(lambda self, x: self.c(self.b(self.a(x))), **parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, for any forward without gradients
        layout = check(model, loss, _x(3, D)).layout
    style = Style.per_layer()
    found = clipped_gradient(model, loss, _x(3, D), clipping=Clipping.abadi(R, style=style), layout=layout)
    assert relative_gap(found.tensors, _by_hand(alone(twin, loss, _x(3, D), size=B), style)) < 1e-9


def test_tied_layers_and_unused_parameters():
    def forward(self, x):
        return self.last(self.first(x).tanh() @ self.first.weight)

    torch.manual_seed(4)
    model = Fn(forward, first=nn.Linear(D, D), last=nn.Linear(D, 2), never=nn.Linear(3, 3)).double()
    for style in STYLES.values():
        found = clipped_gradient(model, loss, _x(3, D), clipping=Clipping.abadi(R, style=style))
        assert not found.tensors["never.weight"].any()
        assert relative_gap(found.tensors, _by_hand(alone(model, loss, _x(3, D), size=B), style)) < 1e-9


@pytest.mark.parametrize("style", list(STYLES.values()), ids=list(STYLES))
def test_microbatches_add_up(style):
    model, batch = _Sequential(_deep(3)), _x(3, D)
    clipping = Clipping.automatic(style=style)
    whole = clipped_gradient(model, loss, batch, clipping=clipping)
    parts = [rows(batch, part, B) for part in ([0, 1], [2, 3, 4])]
    first, second = (clipped_gradient(model, loss, part, clipping=clipping) for part in parts)
    assert relative_gap((first + second).tensors, whole.tensors) < 1e-12


def test_an_abandoned_backward_leaves_the_rest_to_the_end():
    """A layer whose output the loss never uses is announced and never recorded: its group settles last, at zero."""
    model = Fn(lambda self, x: (self.a(x), self.b(x))[0], a=nn.Linear(D, 2), b=nn.Linear(D, 2)).double()
    clipping = Clipping.abadi(R, style=Style.per_layer())
    book = Book(trainable(model), examples=B, clipping=clipping)
    with guard(book):
        backward(book, loss(model, _x(3, D)))
    found = settle(book, clipping).tensors
    assert not found["b.weight"].any()
    assert found["a.weight"].any()


@pytest.mark.parametrize("style", [*STYLES.values(), Style.flat(), Style.groups("a", "b.0")])
def test_a_record_is_read_back(style):
    assert Style.parse(style.describe()) == style
    clipping = Clipping.automatic(style=style)
    assert clipping.describe()["style"] == style.describe()


@pytest.mark.parametrize("text", ["", "layer", "groups", "groups:", "flat:a", "groups:a,a"])
def test_records_that_mean_nothing_are_refused(text):
    with pytest.raises(ConfigError):
        Style.parse(text)


def test_a_prefix_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        clipped_gradient(_Sequential(_deep(1)), loss, _x(D), clipping=Clipping.abadi(R, style=Style.groups("encoder")))


def test_blocks_are_found_in_module_lists():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = [nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]) for _ in range(3)]
            self.blocks, self.head = nn.ModuleList(inner), nn.Linear(D, 2)

    style = Style.blocks(Stack())
    assert style.prefixes == ("blocks.0", "blocks.1", "blocks.2")
    assert len(style.split(dict(Stack().named_parameters()))) == 4
    with pytest.raises(ConfigError, match="ModuleList"):
        Style.blocks(_deep())
