"""The self-check names what a forward writes: statistics, parameters, buffers of another size; and lets counters be."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from blocks import loss
from discreet.train.check import Status, check
from discreet.train.stillness import Allowed
from train.checking import D, RunningMean, built, drawn


def test_a_buffer_that_learns_from_the_data_is_named():
    model = RunningMean()
    report = check(model, loss, drawn(D))
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert row.name == "buffers"
    assert "seen" in row.detail
    assert not model.seen.any()


_WRITES = {
    "in place": lambda model, mean: model.kept.add_(mean),
    "past autograd": lambda model, mean: model.kept.data.add_(mean),
    "another object": lambda model, mean: setattr(model, "kept", nn.Parameter(model.kept + mean, requires_grad=False)),
    "a trained one": lambda model, mean: model.l.bias.data.add_(1e-6 * mean.mean()),
    "in training alone": lambda model, mean: torch.is_grad_enabled() and model.kept.data.add_(mean),
}


@pytest.mark.parametrize("how", _WRITES)
def test_a_parameter_that_a_forward_writes_is_named(how):
    """A codebook or a teacher that follows the batch: frozen, so it gets no noise, and it is saved with the model."""

    def forward(model, x):
        value = model.l(x)
        with contextlib.nullcontext() if how == "in training alone" else torch.no_grad():
            _WRITES[how](model, x.detach().mean(0))
        return value

    model = built(forward, l=nn.Linear(D, D), kept=nn.Parameter(torch.zeros(D), requires_grad=False))
    row = next(row for row in check(model, loss, drawn(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED
    assert ("l.bias" if how == "a trained one" else "kept") in row.detail
    still = built(lambda s, x: s.l(x), l=nn.Linear(D, D), kept=nn.Parameter(torch.zeros(D), requires_grad=False))
    assert check(still, loss, drawn(D)).passed


def test_a_buffer_that_is_written_in_training_alone_is_named():
    def forward(model, x):
        if torch.is_grad_enabled():
            model.seen.add_(x.detach().mean(0))
        return model.l(x)

    model = built(forward, l=nn.Linear(D, D))
    model.register_buffer("seen", torch.zeros(D))
    row = next(row for row in check(model, loss, drawn(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED


def _bank(model: nn.Module, x: Tensor) -> None:
    model.kept = torch.cat([model.kept, x.detach()])


def _by_rows(model: nn.Module, x: Tensor) -> None:
    if len(x) > len(model.kept):
        model.kept = torch.zeros(len(x), D)


def _once(model: nn.Module, x: Tensor) -> None:
    if model.later is None:
        model.later = torch.zeros(D)


def _new(model: nn.Module, x: Tensor) -> None:
    if "more" not in model._buffers:
        model.register_buffer("more", torch.zeros(D))


def _dropped(model: nn.Module, x: Tensor) -> None:
    if "kept" in model._buffers:
        del model.kept


def _wider(model: nn.Module, x: Tensor) -> None:
    model.kept = model.kept.double()


_RESIZES = {
    "a bank of examples": (_bank, "kept"),
    "a table by rows": (_by_rows, "kept"),
    "made later": (_once, "later"),
    "new": (_new, "more"),
    "dropped": (_dropped, "kept"),
    "another type": (_wider, "kept"),
}


def _sized(write, *, persistent: bool) -> nn.Module:
    def forward(model, x):
        write(model, x)
        return model.l(x)

    model = built(forward, l=nn.Linear(D, D))
    model.register_buffer("kept", torch.ones(2, D), persistent=persistent)
    model.register_buffer("later", None, persistent=persistent)
    return model


@pytest.mark.parametrize("how", _RESIZES)
def test_a_buffer_that_is_saved_and_changes_its_size_is_named(how):
    """Its size is a number of examples, or the length of the longest; a bank holds the examples themselves."""
    write, name = _RESIZES[how]
    model = _sized(write, persistent=True)
    report = check(model, loss, drawn(D))
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert row.name == "buffers"
    assert f"{name}: a forward gives it another size" in row.detail
    assert "persistent=False" in row.detail
    assert torch.equal(model.kept, torch.ones(2, D))
    assert model.later is None
    assert "more" not in dict(model.named_buffers())


def test_a_table_that_is_not_saved_and_follows_from_sizes_passes():
    for write, name in ((_by_rows, "kept"), (_once, "later"), (_wider, "kept")):
        report = check(_sized(write, persistent=False), loss, drawn(D))
        assert report.passed, report.table()
        assert report.allowed == Allowed(tables=(name,))


def test_a_bank_of_examples_is_named_though_it_is_not_saved():
    report = check(_sized(_bank, persistent=False), loss, drawn(D))
    assert not report.passed
    assert "kept: a forward gives it another size" in report.table()


def test_a_state_that_is_made_of_the_examples_is_named():
    """What a recurrent layer keeps of one batch for the next, made anew for each size."""

    def keep(model, x):
        fresh = model.kept.shape != x.shape
        model.kept = x.detach() if fresh else model.kept + x.detach()

    row = next(row for row in check(_sized(keep, persistent=False), loss, drawn(D)).rows if row.name == "buffers")
    assert row.status is Status.FAILED
    assert "kept: a forward writes private statistics" in row.detail


def test_what_every_forward_moves_must_be_movable_by_a_made_up_example():
    class Picky(RunningMean):
        def forward(self, x):
            self.seen.add_(1)
            if not x.abs().max() > 100:
                raise ValueError("too small")
            return self.lin(x)

    batch = drawn(D)
    batch["x"] += 1000.0
    report = check(Picky(), loss, batch)
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert "seen: every forward moves it" in row.detail
    assert "made-up example" in row.detail


def test_a_counter_past_autograd_is_known_to_move():
    def forward(model, x):
        model.kept.data.add_(1)
        return model.l(x)

    model = built(forward, l=nn.Linear(D, D))
    model.register_buffer("kept", torch.zeros(()))
    assert check(model, loss, drawn(D)).allowed == Allowed(moving=("kept",))


def test_a_counter_is_no_secret():
    class Counting(RunningMean):
        def forward(self, x):
            with torch.no_grad():
                self.seen.add_(1)
            return self.lin(x)

    assert check(Counting(), loss, drawn(D)).passed
