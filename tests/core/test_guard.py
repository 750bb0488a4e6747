"""A guarded model looks and acts as before, and nothing of a step stays behind in it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from blocks import B, D, T, loss, par
from cases import CASES
from core.unseen import CLIP, built, drawn, expect_exact, is_unguarded
from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import backward, clipped_gradient, settle, trainable
from discreet.core.meeting import guard
from discreet.core.parameter import DerivedParameter, PrivateParameter
from discreet.errors import ConfigError, UnsupportedUse
from oracles import abadi, alone, norms, relative_gap, weighted


def test_an_error_in_the_forward_leaves_the_model_unguarded():
    def failing(model, batch):
        model(batch["x"])
        raise RuntimeError("out of memory")

    model, batch = CASES["linear 2-D"].build()
    with pytest.raises(RuntimeError, match="out of memory"):
        clipped_gradient(model, failing, batch, clipping=CLIP)
    assert is_unguarded(model)
    expect_exact(model, batch)


def test_a_model_is_guarded_once_at_a_time():
    model, batch = CASES["linear 2-D"].build()
    with guard(Book(trainable(model), examples=B)), pytest.raises(ConfigError, match="guarded already"):
        clipped_gradient(model, loss, batch, clipping=CLIP)


class _Watched(dict):
    """A book's parameters; whoever looks at them calls ``seen`` first."""

    def items(self):
        self.seen()
        return super().items()


def test_a_model_is_taken_before_anything_is_asked_of_it():
    """While hooks were looked for, another thread guarded a model too, and the first to end left the other's open."""
    model, _ = CASES["linear 2-D"].build()
    other, _ = CASES["linear 3-D"].build()
    book, refused = Book(trainable(model), examples=B), []

    def meanwhile():
        with pytest.raises(ConfigError, match="guarded already"), guard(Book(trainable(other), examples=B)):
            pass
        refused.append(True)

    book.parameters = _Watched(book.parameters)
    book.parameters.seen = meanwhile
    with guard(book):
        assert refused
    assert is_unguarded(model)
    assert is_unguarded(other)


def test_a_model_is_taken_before_its_parameters_are(monkeypatch):
    """Another thread that began meanwhile guarded a model too, and the first one's uses met its book."""
    model, _ = CASES["linear 2-D"].build()
    other, _ = CASES["linear 3-D"].build()
    known, refused = Book.derivation_of, []

    def meanwhile(self, parameter):
        if not refused:
            refused.append(True)
            with pytest.raises(ConfigError, match="guarded already"), guard(Book(trainable(other), examples=B)):
                pass
        return known(self, parameter)

    monkeypatch.setattr(Book, "derivation_of", meanwhile)
    with guard(Book(trainable(model), examples=B)):
        assert refused
    assert is_unguarded(model)
    assert is_unguarded(other)
    assert is_unguarded(model)


def test_a_guarded_model_keeps_its_face():
    model, _ = CASES["linear 2-D"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    with guard(Book(trainable(model), examples=B)):
        assert all(isinstance(p, nn.Parameter) and type(p) is PrivateParameter for p in model.parameters())
        assert [id(p) for p in model.parameters()] == objects
        assert list(model.state_dict()) == keys
        assert "Parameter" in repr(next(model.parameters()))
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == objects
    assert is_unguarded(model)


def test_a_copy_made_under_guard_works_afterwards():
    model, batch = CASES["linear 2-D"].build()
    with guard(Book(trainable(model), examples=B)):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(batch["x"]), model(batch["x"]))


def test_forwards_without_gradient_run_as_they_are():  # [26]
    model, batch = CASES["token and positions (ViT)"].build()
    plain = model(batch["x"])
    with guard(Book(trainable(model), examples=B)), torch.no_grad():
        assert torch.equal(model(batch["x"]), plain)
        assert torch.equal(model(batch["x"][:2]), plain[:2])
    with guard(Book(trainable(model), examples=B)), torch.inference_mode():
        assert torch.equal(model(batch["x"][:3]), plain[:3])


def test_forwards_between_steps_leave_no_trace():  # [10], [26]
    model, batch = CASES["called twice"].build()
    first = clipped_gradient(model, loss, batch, clipping=CLIP)
    model(batch["x"][:2]).sum().item()
    model.eval()
    model(batch["x"])
    model.train()
    assert relative_gap(clipped_gradient(model, loss, batch, clipping=CLIP).tensors, first.tensors) == 0


def test_a_layer_that_is_skipped_later_leaves_no_stale_norm():  # [10]
    model = built(lambda s, x: s.l(x) if s.skip else s.l(s.m(x)), l=nn.Linear(D, 2), m=nn.Linear(D, D))
    model.skip = False
    expect_exact(model, drawn(D))
    model.skip = True
    expect_exact(model, drawn(D))


def test_freezing_between_batches_is_seen():  # [28]
    model, batch = CASES["linear 2-D"].build()
    first = clipped_gradient(model, loss, batch, clipping=CLIP)
    model[0].weight.requires_grad_(False)
    second = clipped_gradient(model, loss, batch, clipping=CLIP)
    assert "0.weight" not in second.tensors
    with pytest.raises(ConfigError, match="cannot add"):
        _ = first + second


def test_the_head_may_be_registered_first():  # [5]
    expect_exact(built(lambda s, x: s.head(s.body(x).tanh()), head=nn.Linear(4, 2), body=nn.Linear(D, 4)), drawn(T, D))


def test_a_module_list_and_a_parameter_list():
    model = built(
        lambda s, x: sum(layer(x) for layer in s.ls) * s.ps[0] + s.pd["b"],
        ls=nn.ModuleList([nn.Linear(D, 2), nn.Linear(D, 2)]),
        ps=nn.ParameterList([par(2)]),
        pd=nn.ParameterDict({"b": par(2)}),
    )
    expect_exact(model, drawn(T, D))


def test_two_parameters_over_one_storage_are_two_parameters():
    model = built(lambda s, x: s.b(s.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, D))
    model.b.weight = nn.Parameter(model.a.weight.data)
    expect_exact(model, drawn(D))


def test_a_derived_value_keeps_its_kind_to_itself():
    model, batch = CASES["RMS norm, 1 + w"].build()
    seen = []
    handle = model[1].register_forward_hook(lambda m, i, o: seen.append(type(o)))
    expect_exact(model, batch)
    handle.remove()
    assert DerivedParameter not in seen


def test_records_are_freed_when_settled():
    model, batch = CASES["linear 3-D gram"].build()
    book = Book(trainable(model), examples=B)
    with guard(book):
        backward(book, loss(model, batch))
    assert book._records
    settle(book, CLIP)
    assert not book._records


def test_no_step_leaves_its_book_behind(monkeypatch):
    """A book that held the graph, which holds the book, would stay for ever: no collector sees through the graph."""
    books, plain_init = [], Book.__init__

    def seen(self, *args, **options):
        plain_init(self, *args, **options)
        books.append(weakref.ref(self))

    monkeypatch.setattr(Book, "__init__", seen)
    good = built(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    clipped_gradient(good, loss, drawn(T, D), clipping=CLIP)
    bad = built(lambda s, x: torch.cdist(s.a(x), s.w), a=nn.Linear(D, D), w=par(3, D))
    with pytest.raises(UnsupportedUse):
        clipped_gradient(bad, loss, drawn(T, D), clipping=CLIP)
    gc.collect()
    assert len(books) >= 3
    assert not any(book() is not None for book in books)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_would_never_run_is_refused(kind):
    """It would be passed over in silence."""
    model = built(lambda s, x: s.b(s.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    removed = getattr(model.b.weight, kind)(lambda value: None)
    with pytest.raises(UnsupportedUse, match=r"b\.weight: a hook"):
        clipped_gradient(model, loss, drawn(D), clipping=CLIP)
    removed.remove()
    expect_exact(model, drawn(D))


# ------------------------------------------------------------------------------ memory that is exchanged under a book


def _exponential(model, batch):
    return (batch["x"].to(model.w.dtype) @ model.w.exp()).square().sum(1)


def _expect_step(book, model, batch):
    gradients = alone(model, _exponential, batch, size=B)
    bound = float(norms(gradients).median())
    with guard(book):
        backward(book, _exponential(model, batch))
    found = settle(book, Clipping.abadi(bound))
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), bound))) < 1e-4
    return found


def test_a_book_that_is_used_again_pulls_back_to_the_values_of_now():
    model, batch = built(None, w=par(D, 2)), drawn(D)
    book = Book(trainable(model), examples=B)
    _expect_step(book, model, batch)
    model.w.data = 0.3 * torch.randn(D, 2, dtype=torch.float64)
    _expect_step(book, model, batch)
    model.w.data = model.w.data.t().contiguous().t()
    _expect_step(book, model, batch)
    model.w.data.mul_(0.5)
    _expect_step(book, model, batch)


def test_data_exchanged_between_two_uses_is_seen():
    """Where no gradient is tracked nothing is met, so nobody is told of it."""

    def exchanged(model, batch):
        first, old = batch["x"] @ model.w.exp(), model.w.data
        with torch.no_grad():
            model.w.data = 0.1 * old
        second = batch["x"] @ model.w.exp()
        with torch.no_grad():
            model.w.data = old
        return (first.sin() + second).square().sum(1)

    model, batch = built(None, w=par(D, 2)), drawn(D)
    gradients = alone(model, exchanged, batch, size=B)
    book = Book(trainable(model), examples=B)
    with guard(book):
        backward(book, exchanged(model, batch))
    bound = float(norms(gradients).median())
    found = settle(book, Clipping.abadi(bound))
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), bound))) < 4e-5


def test_a_book_opened_in_float64_leaves_room_for_the_rounding_of_float32():
    model, batch = built(None, w=par(D, 2)), drawn(D)
    book = Book(trainable(model), examples=B)
    assert not book._rounds
    model.float()
    found = _expect_step(book, model, {name: value.float() for name, value in batch.items()})
    assert found.tensors["w"].dtype is torch.float32
    assert book._rounds


def test_a_parameter_changed_in_place_after_its_use_is_refused():
    """What was made of it would be pulled back to the new values."""

    def changed(model, batch):
        y = batch["x"] @ model.w.exp()
        with torch.no_grad():
            model.w.mul_(0.1)
        return y.square().sum(1)

    model, batch = built(None, w=par(D, 2)), drawn(D)
    book = Book(trainable(model), examples=B)
    with guard(book):
        backward(book, changed(model, batch))
    with pytest.raises(UnsupportedUse, match="changed in place since"):
        settle(book, CLIP)
    assert is_unguarded(model)
