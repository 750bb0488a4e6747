"""Which axis is the batch: time first, folded rows, lengths that coincide. Verified, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import B, D, Fn, T, loss
from cases import CASES
from core.unseen import CLIP, R, built, drawn, expect_exact, expect_refused
from discreet.core.axes import Axis, Layout
from discreet.core.gradient import clipped_gradient
from discreet.core.routing import Given
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, norms, relative_gap, rows, weighted


class _TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).transpose(0, 1)  # (T, B, D)
        return self.last(h).transpose(0, 1)


@pytest.mark.parametrize("length", [B, B - 1, B + 1, T, 2 * B, B * (B - 1)])
def test_time_major_is_never_taken_for_the_batch(length):
    torch.manual_seed(3)
    model = _TimeMajor().double()
    expect_refused(model, drawn(length, D), "last.")


@pytest.mark.parametrize("length", [4, 3, 12, 5])
def test_time_major_is_exact_once_it_is_verified(length):
    torch.manual_seed(3)
    model = _TimeMajor().double()
    batch = drawn(length, D)
    report = check(model, loss, rows(batch, range(4), B))
    assert report.passed, report.table()
    expect_exact(model, batch, layout=report.layout)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize("name", ["position ids (T,)", "position table slice", "expand to T, T equal to B"])
@pytest.mark.parametrize("verified", [False, True])
def test_coincidences_of_length_and_batch_are_no_matter(name, length, verified):
    model, _ = CASES[name].build()
    torch.manual_seed(5)
    x = torch.randint(0, 11, (B, length)) if "ids" in name else torch.randn(B, length, D, dtype=torch.float64)
    batch = {"x": x, "target": torch.randn(B, dtype=torch.float64)}
    expect_exact(model, batch, layout=check(model, loss, rows(batch, [0, 1, 2], B)).layout if verified else None)


def test_a_layout_that_was_verified_at_one_length_holds_at_another():
    model, batch = CASES["position ids (T,)"].build()
    layout = check(model, loss, batch).layout
    longer = {"x": torch.randint(0, 11, (B, B)), "target": batch["target"]}
    expect_exact(model, longer, layout=layout)


def test_folded_rows_without_a_verified_layout_are_refused():
    for name in ("addmm, flattened tokens (GPT-2)", "windows (Swin)", "conv on folded frames"):
        model, batch = CASES[name].build()
        expect_refused(model, batch, "batch of")


def test_rows_folded_the_wrong_way_round_fail_the_check():
    def wrong(self, x):
        h = self.a(x).transpose(0, 1).reshape(-1, D)  # (T * B, D): time first
        return self.o(h).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    model = Fn(wrong, a=nn.Linear(D, D), o=nn.Linear(D, 2))
    batch = {k: v.float() for k, v in drawn(T, D).items()}
    report = check(model, loss, batch)
    assert not report.passed
    assert "o.weight" in "".join(row.name for row in report.rows if row.status.value == "failed")


def test_rows_that_are_no_multiple_of_the_batch_are_refused():
    expect_refused(
        built(lambda s, x: s.o(s.a(x)[:3]).sum() + x.sum((1, 2)), a=nn.Linear(D, D), o=nn.Linear(D, 2)),
        drawn(T, D),
        "o.",
    )


def test_a_use_that_the_check_never_saw_is_refused():
    model = built(lambda s, x: s.l(x) if x.shape[1] == T else s.other(x), l=nn.Linear(D, 2), other=nn.Linear(D, 2))
    layout = check(model, loss, drawn(T, D)).layout
    expect_exact(model, drawn(T, D), layout=layout)
    expect_refused(model, drawn(T + 1, D), "other", "never saw", layout=layout)


def test_more_uses_of_the_same_kind_than_the_check_saw_are_like_those():
    model = built(lambda s, x: sum(s.cell(x[:, t]).tanh() for t in range(x.shape[1])), cell=nn.Linear(D, 2))
    layout = check(model, loss, drawn(3, D)).layout
    expect_exact(model, drawn(6, D), layout=layout)


def _steps_and_anchors(self: nn.Module, x: Tensor) -> Tensor:
    """One layer for every step of a sequence, and then for a constant that happens to have B rows."""
    h = x[:, 0]
    for t in range(x.shape[1]):
        h = self.l(h + x[:, t]).tanh()
    return h @ self.l(self.anchors).mT


def test_a_layer_for_the_batch_and_for_a_constant_keeps_its_order():
    """At fewer steps than were checked, the constant comes where activations were: 2.3 times the bound, unnoticed."""
    model = built(_steps_and_anchors, l=nn.Linear(D, D), anchors=torch.randn(B, D))
    layout = check(model, loss, drawn(4, D)).layout
    expect_exact(model, drawn(4, D), layout=layout)
    for length in (3, 5):
        expect_refused(model, drawn(length, D), "l.weight", "self-check", layout=layout)


def test_a_constant_in_the_place_of_an_activation_is_refused():
    def swapped(self, x):
        first, second = (self.anchors, self.a(x)) if self.turned else (self.a(x), self.anchors)
        first, second = self.l(first), self.l(second)
        return second @ first.mT if self.turned else first @ second.mT

    model = built(swapped, a=nn.Linear(D, D), l=nn.Linear(D, D), anchors=torch.randn(B, D), turned=False)
    layout = check(model, loss, drawn(D)).layout
    expect_exact(model, drawn(D), layout=layout)
    model.turned = True
    expect_refused(model, drawn(D), "l.weight", layout=layout)


def test_a_layout_that_contradicts_the_batch_is_refused():
    model, batch = CASES["linear 3-D"].build()
    shared = Layout({(("0.weight", "0.bias"), "linear", 0): (Axis.SHARED,)})
    with pytest.raises((UnsupportedUse, ConfigError)):
        clipped_gradient(model, loss, batch, clipping=CLIP, layout=shared)


def test_inputs_without_the_batch_in_front_are_a_value_of_the_parameter_alone():
    model = built(lambda s, x: s.l(x.flatten(0, 1)).view(x.shape[0], -1), l=nn.Linear(D, 2))
    expect_exact(model, drawn(T, D))


def test_one_example_alone_needs_no_layout():  # B = 1: [25]
    for name in ("windows (Swin)", "addmm, flattened tokens (GPT-2)", "token and positions (ViT)"):
        model, batch = CASES[name].build()
        one = rows(batch, [2], B)
        gradients = alone(model, loss, one, size=1)
        found = clipped_gradient(model, loss, one, clipping=CLIP)
        assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


VIEWS = {
    "frames, one after the other": lambda x: x.flatten(0, 1),
    "answers to choose from": lambda x: x.view(-1, 2, x.shape[-1]),
    "every second number": lambda x: x.flatten(0, 1)[:, ::2],
    "all rows but the first of each": lambda x: x[:, 1:],
    "rows of an example overlap": lambda x: x.as_strided((2 * len(x), 4), (x.stride(0) // 2, 1)),
    "one row late": lambda x: x.flatten()[1 : 1 - x[0].numel()].view(-1, *x.shape[2:])[: (len(x) - 1) * 2],
    "every second row": lambda x: x.flatten(0, 1)[::2],
    "the first half": lambda x: x.flatten(0, 1)[: x.shape[0] * x.shape[1] // 2],
    "time first": lambda x: x.transpose(0, 1),
    "one example for all": lambda x: x[:1].expand(len(x), -1, -1),
    "upwards from the middle": lambda x: x.flatten(0, 1)[len(x) :],
    "a copy": lambda x: x.flatten(0, 1).clone(),
}


@pytest.mark.parametrize("name", list(VIEWS))
@pytest.mark.parametrize("examples", [1, 2, 3, 4])
@pytest.mark.parametrize("storage", ["its own", "shared", "wider"])
def test_a_view_of_the_batch_is_believed_where_each_row_holds_numbers_of_its_example_alone(name, examples, storage):
    """The numbers say whose they are."""
    sizes = (examples + 2, 4, 6) if storage == "shared" else (examples, 4, 7 if storage == "wider" else 6)
    x = torch.arange(examples + 2)[: sizes[0], None, None].expand(sizes).clone()[-examples:, :, :6]
    view = VIEWS[name](x) if storage != "wider" or "late" not in name else x
    view = view if len(view) else x
    owner = view.flatten(1) - x[0, 0, 0]
    true = len(view) % examples == 0
    true = true and bool((owner == (torch.arange(len(view)) // (len(view) // examples)).unsqueeze(1)).all())
    believed = Given((x, torch.zeros(examples)), examples).in_order(view)
    assert believed <= true
    if view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and len(view) > examples > 1:
        assert believed == true


def test_a_view_of_another_type_or_of_something_else_is_not_believed():
    x = torch.zeros(4, 3, 2)
    given = Given({"x": x, "n": 3, "text": "x"}, 4)
    assert given.in_order(x.flatten(0, 1))
    assert not given.in_order(x.view(torch.int32).flatten(0, 1))
    assert not given.in_order(torch.zeros(12, 2))
    assert not given.in_order(torch.zeros(()))


def test_frames_of_the_batch_itself_need_no_check():
    expect_exact(built(lambda s, x: s.l(x.flatten(0, 1)).view(x.shape[0], -1), l=nn.Linear(D, 2)), drawn(T, D))


@pytest.mark.parametrize("examples", [1, 3, 5])
def test_frames_and_answers_that_the_data_set_gave_are_exact_once_they_are_verified(examples):
    def frames(s, x):
        hidden = s.n(s.c(x.flatten(0, 1))).relu().mean(2)
        return s.l(hidden).view(*x.shape[:2], -1)

    parts = {"c": nn.Conv1d(2, 4, 3), "n": nn.GroupNorm(2, 4), "l": nn.Linear(4, 3)}
    model, batch = built(frames, **parts), drawn(3, 2, D)
    some = rows(batch, range(examples), B)

    def chosen(m, b):
        return F.cross_entropy(m(b["x"]).mean(1), b["target"].gt(0).long(), reduction="none")

    layout = check(model, chosen, rows(batch, range(4), B)).layout
    wanted = alone(model, chosen, some, size=examples)
    found = clipped_gradient(model, chosen, some, clipping=CLIP, layout=layout, examples=examples)
    assert relative_gap(found.tensors, weighted(wanted, abadi(norms(wanted), R))) < 4e-5


def test_a_pair_that_is_joined_is_refused_with_its_remedy():
    def paired(m, b):
        one, other = m(torch.cat([b["x"], -b["x"]])).squeeze(1).chunk(2)
        return -F.logsigmoid(one - other)

    model = built(lambda s, x: s.l(x), l=nn.Linear(D, 1))
    with pytest.raises(UnsupportedUse, match=r"torch\.stack"):
        clipped_gradient(model, paired, drawn(D), clipping=CLIP)
    report = check(model, paired, drawn(D))
    assert "torch.stack" in report.table()
