"""Ways to get a wrong norm unseen. Each is exact, or refused by name; never silent.

Numbers in brackets are those of the table of adversarial cases in the engine's specification.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import CASES, B, D, Fn, T, frozen, loss, par, tokens
from discreet.core.axes import Axis, Layout
from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.gradient import backward, clipped_gradient, open_book, settle
from discreet.core.meeting import guard
from discreet.core.parameter import DerivedParameter, PrivateParameter
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import abadi, alone, flat, norms, relative_gap, rows, weighted

R = 0.2
CLIP = Clipping.abadi(R)


def _model(f: Callable[..., Tensor], **parts) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts).double()


def _x(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"x": torch.randn(B, *shape, dtype=torch.float64), "target": torch.randn(B, dtype=torch.float64)}


def _exact(model: nn.Module, batch, *, layout: Layout | None = None) -> None:
    gradients = alone(model, loss, batch, size=B)
    norm_B = norms(gradients)
    bound = 0.7 * float(norm_B.median())
    found = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(bound), layout=layout)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norm_B, bound))) < 4e-5
    assert _unguarded(model)


def _refused(model: nn.Module, batch, *words: str, layout: Layout | None = None) -> None:
    with pytest.raises(UnsupportedUse) as caught:
        clipped_gradient(model, loss, batch, clipping=CLIP, layout=layout)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert _unguarded(model)


def _unguarded(model: nn.Module) -> bool:
    return all(type(p) is nn.Parameter and not p._backward_hooks and p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------- uses without a rule


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


def test_custom_autograd_function_on_a_parameter_is_refused():
    _refused(
        _model(lambda s, x: s.l(_Scale.apply(x, s.w)), w=par(D), l=nn.Linear(D, 2)), _x(T, D), "w", "past every rule"
    )


def test_custom_autograd_function_on_a_derived_value_is_refused():
    model = _model(lambda s, x: s.l(_Scale.apply(x, s.w * 2)), w=par(D), l=nn.Linear(D, 2))
    _refused(model, _x(T, D), "w", "past every rule")


def test_scripted_part_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(D, 3).double())
    _refused(_model(lambda s, x: s.inner(x), inner=scripted), _x(D))


@torch.library.custom_op("discreet_tests::scale", mutates_args=())
def _scale_op(x: Tensor, w: Tensor) -> Tensor:
    return x * w


_scale_op.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum((0, 1))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_custom_op_is_refused():
    _refused(_model(lambda s, x: _scale_op(x, s.w), w=par(D)), _x(T, D))


def test_aten_overload_is_refused():
    _refused(_model(lambda s, x: torch.ops.aten.linear(x, s.w), w=par(3, D)), _x(T, D), "linear", "w")


UNRULED = {
    "distances": (lambda: _model(lambda s, x: torch.cdist(x, s.w), w=par(3, D)), "cdist"),
    "packed sequence": (lambda: _model(_packed, r=nn.LSTM(D, 3, batch_first=True)), "packed"),
    "batch norm": (lambda: _model(lambda s, x: s.n(x), n=nn.BatchNorm1d(T)), "batch_norm"),
    "batch norm, functional": (
        lambda: _model(lambda s, x: F.batch_norm(x, None, None, s.w, training=True), w=par(T)),
        "batch_norm",
    ),
    "setitem": (lambda: _model(lambda s, x: _written(x, s.w), w=par(D)), "__setitem__"),
    "copy into": (lambda: _model(lambda s, x: x + torch.zeros(D).double().copy_(s.w), w=par(D)), "copy_"),
    "cat with activations": (
        lambda: _model(lambda s, x: torch.cat([s.w, s.l(x)])[2:], w=par(2, T, D), l=nn.Linear(D, D)),
        "cat",
    ),
    "complex": (lambda: _model(lambda s, x: (x * s.w.to(torch.complex128)).real, w=par(D)), "w", "complex"),
    "in-place activation of a parameter": (lambda: _model(lambda s, x: x * F.relu(s.w, inplace=True), w=par(D)), "w"),
    "parameter changed in place": (lambda: _model(lambda s, x: x * s.w.mul_(2), w=par(D)), "mul_"),
    "copied inside": (lambda: _model(lambda s, x: copy.deepcopy(s.l)(x), l=nn.Linear(D, 3)), "does not belong"),
    "addmm with factors": (
        lambda: _model(lambda s, x: torch.addmm(s.b, x[:, 0], s.w, beta=0.5), w=par(D, 3), b=par(3)),
        "beta",
    ),
}


def _packed(self, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), T), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]


def _written(x: Tensor, w: Tensor) -> Tensor:
    h = x.clone()
    h[:, 0] = w
    return h


@pytest.mark.parametrize("name", list(UNRULED))
def test_no_rule_no_norm(name):
    build, *words = UNRULED[name]
    _refused(build(), _x(T, D), *words)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
    ],
)
def test_embedding_options_that_break_the_bound_are_refused(options, word):
    model = Fn(lambda s, x: s.e(x), e=nn.Embedding(11, D, **options))
    _refused(model, tokens()(), word)


def test_a_position_table_that_renormalises_itself_is_refused():
    model = Fn(lambda s, x: s.e(x) + s.p(torch.arange(T)), e=nn.Embedding(11, D), p=nn.Embedding(T, D, max_norm=0.1))
    _refused(model, tokens()(), "p.weight", "in place")


# ------------------------------------------------------------------------------------------------------ batch axis


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
    _refused(model, _x(length, D), "last.")


@pytest.mark.parametrize("length", [4, 3, 12, 5])
def test_time_major_is_exact_once_it_is_verified(length):
    torch.manual_seed(3)
    model = _TimeMajor().double()
    batch = _x(length, D)
    report = check(model, loss, rows(batch, range(4), B))
    assert report.passed, report.table()
    _exact(model, batch, layout=report.layout)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 12])
@pytest.mark.parametrize("name", ["position ids (T,)", "position table slice", "expand to T, T equal to B"])
@pytest.mark.parametrize("verified", [False, True])
def test_coincidences_of_length_and_batch_are_no_matter(name, length, verified):
    model, _ = CASES[name].build()
    torch.manual_seed(5)
    x = torch.randint(0, 11, (B, length)) if "ids" in name else torch.randn(B, length, D, dtype=torch.float64)
    batch = {"x": x, "target": torch.randn(B, dtype=torch.float64)}
    _exact(model, batch, layout=check(model, loss, rows(batch, [0, 1, 2], B)).layout if verified else None)


def test_a_layout_that_was_verified_at_one_length_holds_at_another():
    model, batch = CASES["position ids (T,)"].build()
    layout = check(model, loss, batch).layout
    longer = {"x": torch.randint(0, 11, (B, B)), "target": batch["target"]}
    _exact(model, longer, layout=layout)


def test_folded_rows_without_a_verified_layout_are_refused():
    for name in ("addmm, flattened tokens (GPT-2)", "windows (Swin)", "conv on folded frames"):
        model, batch = CASES[name].build()
        _refused(model, batch, "batch of")


def test_rows_folded_the_wrong_way_round_fail_the_check():
    def wrong(self, x):
        h = self.a(x).transpose(0, 1).reshape(-1, D)  # (T * B, D): time first
        return self.o(h).view(x.shape[1], x.shape[0], -1).transpose(0, 1)

    model = Fn(wrong, a=nn.Linear(D, D), o=nn.Linear(D, 2))
    batch = {k: v.float() for k, v in _x(T, D).items()}
    report = check(model, loss, batch)
    assert not report.passed
    assert "o.weight" in "".join(row.name for row in report.rows if row.status.value == "failed")


def test_rows_that_are_no_multiple_of_the_batch_are_refused():
    _refused(
        _model(lambda s, x: s.o(s.a(x)[:3]).sum() + x.sum((1, 2)), a=nn.Linear(D, D), o=nn.Linear(D, 2)), _x(T, D), "o."
    )


def test_a_use_that_the_check_never_saw_is_refused():
    model = _model(lambda s, x: s.l(x) if x.shape[1] == T else s.other(x), l=nn.Linear(D, 2), other=nn.Linear(D, 2))
    layout = check(model, loss, _x(T, D)).layout
    _exact(model, _x(T, D), layout=layout)
    _refused(model, _x(T + 1, D), "other", "never saw", layout=layout)


def test_more_uses_of_the_same_kind_than_the_check_saw_are_like_those():
    model = _model(lambda s, x: sum(s.cell(x[:, t]).tanh() for t in range(x.shape[1])), cell=nn.Linear(D, 2))
    layout = check(model, loss, _x(3, D)).layout
    _exact(model, _x(6, D), layout=layout)


def _steps_and_anchors(self: nn.Module, x: Tensor) -> Tensor:
    """One layer for every step of a sequence, and then for a constant that happens to have B rows."""
    h = x[:, 0]
    for t in range(x.shape[1]):
        h = self.l(h + x[:, t]).tanh()
    return h @ self.l(self.anchors).mT


def test_a_layer_for_the_batch_and_for_a_constant_keeps_its_order():
    """At fewer steps than were checked, the constant comes where activations were: 2.3 times the bound, unnoticed."""
    model = _model(_steps_and_anchors, l=nn.Linear(D, D), anchors=torch.randn(B, D))
    layout = check(model, loss, _x(4, D)).layout
    _exact(model, _x(4, D), layout=layout)
    for length in (3, 5):
        _refused(model, _x(length, D), "l.weight", "self-check", layout=layout)


def test_a_constant_in_the_place_of_an_activation_is_refused():
    def swapped(self, x):
        first, second = (self.anchors, self.a(x)) if self.turned else (self.a(x), self.anchors)
        first, second = self.l(first), self.l(second)
        return second @ first.mT if self.turned else first @ second.mT

    model = _model(swapped, a=nn.Linear(D, D), l=nn.Linear(D, D), anchors=torch.randn(B, D), turned=False)
    layout = check(model, loss, _x(D)).layout
    _exact(model, _x(D), layout=layout)
    model.turned = True
    _refused(model, _x(D), "l.weight", layout=layout)


def test_a_layout_that_contradicts_the_batch_is_refused():
    model, batch = CASES["linear 3-D"].build()
    shared = Layout({(("0.weight", "0.bias"), "linear", 0): (Axis.SHARED,)})
    with pytest.raises((UnsupportedUse, ConfigError)):
        clipped_gradient(model, loss, batch, clipping=CLIP, layout=shared)


def test_inputs_without_the_batch_in_front_are_a_value_of_the_parameter_alone():
    model = _model(lambda s, x: s.l(x.flatten(0, 1)).view(x.shape[0], -1), l=nn.Linear(D, 2))
    _exact(model, _x(T, D))


def test_one_example_alone_needs_no_layout():  # B = 1: [25]
    for name in ("windows (Swin)", "addmm, flattened tokens (GPT-2)", "token and positions (ViT)"):
        model, batch = CASES[name].build()
        one = rows(batch, [2], B)
        gradients = alone(model, loss, one, size=1)
        found = clipped_gradient(model, loss, one, clipping=CLIP)
        assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


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
        assert _unguarded(model)


def test_losses_that_are_functions_of_parameters_alone_are_refused():
    model = _model(lambda s, x: s.w, w=par(B))
    with pytest.raises((ConfigError, UnsupportedUse)):
        clipped_gradient(model, lambda m, b: m.w * 2, _x(D), clipping=CLIP)


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
        _refused(
            _model(lambda s, x, stray=stray: s.l(x * stray), l=nn.Linear(D, 2)), _x(D), "no parameter of this model"
        )
        assert stray.grad is None


def test_an_activation_that_is_a_leaf_gets_no_raw_gradient():
    """A table of 3 B rows might be an activation: training it would be another matter, so nothing comes to it."""
    stray = torch.ones(3 * B, D, dtype=torch.float64, requires_grad=True)
    _exact(_model(lambda s, x: s.l(x * stray[: len(x)]), l=nn.Linear(D, 2)), _x(D))
    assert not stray.grad.any()


@pytest.mark.parametrize("function", ["linear", "addmm"])
def test_a_bias_that_is_spread_over_the_outputs_is_refused(function):
    """One number for all outputs: its gradient is a sum, and the length of what was summed is no norm of it."""
    call = {"linear": lambda s, x: F.linear(x, s.l.weight, s.b), "addmm": lambda s, x: s.b.addmm(x, s.l.weight.t())}
    _refused(_model(call[function], l=nn.Linear(D, 2, bias=False), b=par(1)), _x(D), "b: its shape (1,)", "(2,)")


def test_inputs_may_require_a_gradient():
    batch = _x(D)
    batch["x"].requires_grad_()
    gradients = alone(model := _model(lambda s, x: s.l(x), l=nn.Linear(D, 2)), loss, batch, size=B)
    layout = check(model, loss, {k: v.detach() for k, v in batch.items()}).layout
    found = clipped_gradient(model, loss, batch, clipping=CLIP, layout=layout)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5


def test_nothing_trainable_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        clipped_gradient(frozen(nn.Linear(D, 2), "weight", "bias"), loss, _x(D), clipping=CLIP)


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
    with pytest.raises(RuntimeError):
        clipped_gradient(model, penalised, batch, clipping=CLIP)
    assert _unguarded(model)


def test_two_backward_passes_into_one_book_add_up():  # [27]
    model, batch = CASES["tied head"].build()
    both = lambda m, b: loss(m, b) + (m(b["x"]).sum((1, 2)) / 9).tanh()  # noqa: E731
    whole = clipped_gradient(model, both, batch, clipping=CLIP)
    book = open_book(model, examples=B)
    with guard(book):
        backward(book, loss(model, batch))
        backward(book, (model(batch["x"]).sum((1, 2)) / 9).tanh())
    assert relative_gap(settle(book, CLIP).tensors, whole.tensors) < 1e-12


# --------------------------------------------------------------------------------------------- state and guarding


def test_an_error_in_the_forward_leaves_the_model_unguarded():
    def failing(model, batch):
        model(batch["x"])
        raise RuntimeError("out of memory")

    model, batch = CASES["linear 2-D"].build()
    with pytest.raises(RuntimeError, match="out of memory"):
        clipped_gradient(model, failing, batch, clipping=CLIP)
    assert _unguarded(model)
    _exact(model, batch)


def test_a_model_is_guarded_once_at_a_time():
    model, batch = CASES["linear 2-D"].build()
    with guard(open_book(model, examples=B)), pytest.raises(ConfigError, match="guarded already"):
        clipped_gradient(model, loss, batch, clipping=CLIP)
    assert _unguarded(model)


def test_a_guarded_model_keeps_its_face():
    model, _ = CASES["linear 2-D"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    with guard(open_book(model, examples=B)):
        assert all(isinstance(p, nn.Parameter) and type(p) is PrivateParameter for p in model.parameters())
        assert [id(p) for p in model.parameters()] == objects
        assert list(model.state_dict()) == keys
        assert "Parameter" in repr(next(model.parameters()))
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == objects
    assert _unguarded(model)


def test_a_copy_made_under_guard_works_afterwards():
    model, batch = CASES["linear 2-D"].build()
    with guard(open_book(model, examples=B)):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(batch["x"]), model(batch["x"]))


def test_forwards_without_gradient_run_as_they_are():  # [26]
    model, batch = CASES["token and positions (ViT)"].build()
    plain = model(batch["x"])
    with guard(open_book(model, examples=B)), torch.no_grad():
        assert torch.equal(model(batch["x"]), plain)
        assert torch.equal(model(batch["x"][:2]), plain[:2])
    with guard(open_book(model, examples=B)), torch.inference_mode():
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
    model = _model(lambda s, x: s.l(x) if s.skip else s.l(s.m(x)), l=nn.Linear(D, 2), m=nn.Linear(D, D))
    model.skip = False
    _exact(model, _x(D))
    model.skip = True
    _exact(model, _x(D))


def test_freezing_between_batches_is_seen():  # [28]
    model, batch = CASES["linear 2-D"].build()
    first = clipped_gradient(model, loss, batch, clipping=CLIP)
    model[0].weight.requires_grad_(False)
    second = clipped_gradient(model, loss, batch, clipping=CLIP)
    assert "0.weight" not in second.tensors
    with pytest.raises(ConfigError, match="cannot add"):
        _ = first + second


def test_the_head_may_be_registered_first():  # [5]
    _exact(_model(lambda s, x: s.head(s.body(x).tanh()), head=nn.Linear(4, 2), body=nn.Linear(D, 4)), _x(T, D))


def test_a_module_list_and_a_parameter_list():
    model = _model(
        lambda s, x: sum(layer(x) for layer in s.ls) * s.ps[0] + s.pd["b"],
        ls=nn.ModuleList([nn.Linear(D, 2), nn.Linear(D, 2)]),
        ps=nn.ParameterList([par(2)]),
        pd=nn.ParameterDict({"b": par(2)}),
    )
    _exact(model, _x(T, D))


def test_two_parameters_over_one_storage_are_two_parameters():
    model = _model(lambda s, x: s.b(s.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, D))
    model.b.weight = nn.Parameter(model.a.weight.data)
    _exact(model, _x(D))


def test_a_derived_value_keeps_its_kind_to_itself():
    model, batch = CASES["RMS norm, 1 + w"].build()
    seen = []
    handle = model[1].register_forward_hook(lambda m, i, o: seen.append(type(o)))
    _exact(model, batch)
    handle.remove()
    assert DerivedParameter not in seen


def test_records_are_freed_when_settled():
    model, batch = CASES["linear 3-D gram"].build()
    book = open_book(model, examples=B)
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
    good = _model(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    clipped_gradient(good, loss, _x(T, D), clipping=CLIP)
    bad = _model(lambda s, x: torch.cdist(s.a(x), s.w), a=nn.Linear(D, D), w=par(3, D))
    with pytest.raises(UnsupportedUse):
        clipped_gradient(bad, loss, _x(T, D), clipping=CLIP)
    gc.collect()
    assert len(books) >= 3
    assert not any(book() is not None for book in books)


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
    model, twin = _model(forward, **parts), _model(same, **parts)
    batch = rows(_x(T, D), range(size), B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, for any forward without gradients
        report = check(model, loss, rows(_x(T, D), range(4), B)) if verified else None
    assert report is None or report.passed, report.table()
    assert all(p.grad is None for p in model.parameters())
    gradients = alone(twin, loss, batch, size=size)
    found = clipped_gradient(model, loss, batch, clipping=CLIP, layout=report.layout if report else None)
    assert relative_gap(found.tensors, weighted(gradients, abadi(norms(gradients), R))) < 4e-5
    free = clipped_gradient(model, loss, batch, clipping=Clipping.none(), layout=report.layout if report else None)
    assert relative_gap(free.tensors, weighted(gradients, torch.ones(size))) < 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_dropout_inside_a_checkpoint():
    model = _model(
        lambda s, x: s.c(checkpoint(s.b, s.a(x), use_reentrant=False)),
        a=nn.Linear(D, D),
        b=nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)),
        c=nn.Linear(D, 2),
    )
    batch = _x(T, D)
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
        book = open_book(model, examples=B)
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

    model = _model(forward, w=par(D), mask=torch.ones(D))
    _refused(model, _x(T, D), "changed in place")


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_would_never_run_is_refused(kind):
    """It would be passed over in silence."""
    model = _model(lambda s, x: s.b(s.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    removed = getattr(model.b.weight, kind)(lambda value: None)
    with pytest.raises(UnsupportedUse, match=r"b\.weight: a hook"):
        clipped_gradient(model, loss, _x(D), clipping=CLIP)
    removed.remove()
    _exact(model, _x(D))
