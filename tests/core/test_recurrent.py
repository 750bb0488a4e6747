"""Recurrent layers and cells: torch's function, brute force's per-example gradients, and misuse is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from blocks import Fn, frozen, loss, par
from contracts.products import needs_card
from core.brute_force import B, gap, random_batch
from discreet.core.book import Book
from discreet.core.clipping import Clipping
from discreet.core.forms import Dense
from discreet.core.gradient import backward, clipped_gradient, trainable
from discreet.core.meeting import guard
from discreet.core.rules import recurrent
from discreet.errors import UnsupportedUse
from discreet.train.check import check
from oracles import relative_gap

T, D, H = 7, 6, 4
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
OPTIONS = {
    "one layer": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


def _model(forward, dtype=torch.float64, **parts) -> nn.Module:
    torch.manual_seed(3)
    return Fn(forward, **parts).to(dtype)


def _all_of(self, x):
    """Outputs and last states, so that gradients come from all of them."""
    out, last = self.r(x)
    ends = last if isinstance(last, tuple) else (last,)
    return torch.cat([out.flatten(1), *(end.transpose(0, 1).flatten(1) for end in ends)], 1)


def _all_of_time_major(self, x):
    out, last = self.r(x.transpose(0, 1))
    ends = last if isinstance(last, tuple) else (last,)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in (out, *ends)], 1)


def _refused(model, batch, *words: str) -> None:
    with pytest.raises(UnsupportedUse) as caught:
        clipped_gradient(model, loss, batch, clipping=Clipping.abadi(1.0))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(type(p) is nn.Parameter for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_function_and_its_strides_are_torchs(kind, options, batch_first):
    model = _model(lambda s, x: s.r(x), r=KINDS[kind](D, H, batch_first=batch_first, **OPTIONS[options]))
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    given = x if batch_first else x.transpose(0, 1)
    wanted_out, wanted_last = model(given)
    with guard(Book(trainable(model), examples=B)):
        out, last = model(given)
    assert torch.allclose(out, wanted_out, rtol=0, atol=1e-12)
    assert out.stride() == wanted_out.stride()
    pairs = zip(last, wanted_last, strict=True) if kind == "lstm" else [(last, wanted_last)]
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) and one.shape == other.shape for one, other in pairs)
    (grad,) = torch.autograd.grad(out.cos().sum(), x)
    (wanted,) = torch.autograd.grad(wanted_out.cos().sum(), x)
    assert torch.allclose(grad, wanted, rtol=0, atol=1e-12)


def test_gradients_of_given_states_and_inputs_are_torchs():
    model = _model(lambda s, x: s.r(x), r=nn.LSTM(D, H, 2, proj_size=3, batch_first=True))
    sizes = ((B, T, D), (2, B, 3), (2, B, H))
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    def total(x, h, c):
        out, (last_h, last_c) = model.r(x, (h, c))
        return out.cos().sum() + last_h.sin().sum() + last_c.square().sum()

    wanted = torch.autograd.grad(total(*given), given)
    with guard(Book(trainable(model), examples=B)):
        value = total(*given)
    for found, expected in zip(torch.autograd.grad(value, given), wanted, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_dropout_draws_torchs_own_masks(kind):
    model = _model(_all_of, r=KINDS[kind](D, H, 3, dropout=0.4, bidirectional=True, batch_first=True))
    x = random_batch(T, D)["x"]
    torch.manual_seed(9)
    wanted = model(x)
    with guard(Book(trainable(model), examples=B)):
        torch.manual_seed(9)
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-12)
        model.eval()
        assert not torch.allclose(model(x), wanted)


# ----------------------------------------------------------------------------------------- per-example gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_clipped_sum_equals_brute_force(kind, options, dtype, tolerance):
    model = _model(_all_of, dtype, r=KINDS[kind](D, H, batch_first=True, **OPTIONS[options]))
    assert gap(model, random_batch(T, D, dtype=dtype)) < tolerance


@pytest.mark.parametrize("length", [B - 1, B, B + 1, 1])
@pytest.mark.parametrize("kind", list(KINDS))
def test_time_major_whatever_the_length(kind, length):
    model = _model(_all_of_time_major, r=KINDS[kind](D, H, bidirectional=True))
    assert gap(model, random_batch(length, D)) < 1e-9


@pytest.mark.parametrize("batch_first", [True, False])
def test_projected_lstm(batch_first):
    forward = _all_of if batch_first else _all_of_time_major
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": batch_first}
    assert gap(_model(forward, r=nn.LSTM(D, H, **options)), random_batch(T, D)) < 1e-9
    assert gap(_model(forward, r=nn.LSTM(D, H, bias=False, **options)), random_batch(T, D)) < 1e-9


@pytest.mark.parametrize("kind", list(CELLS))
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, bias):
    def unrolled(self, x):
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.r(x[:, t], state)
            outputs.append(state[0] if kind == "lstm" else state)
        return torch.cat([*outputs, state[1]] if kind == "lstm" else outputs, 1)

    assert gap(_model(unrolled, r=CELLS[kind](D, H, bias=bias)), random_batch(T, D)) < 1e-9


FROZEN = {
    "biases": ("r.bias_ih_l0", "r.bias_hh_l0"),
    "one bias": ("r.bias_ih_l0",),
    "weight_hh": ("r.weight_hh_l0",),
    "weight_ih": ("r.weight_ih_l0",),
    "weights (BiTFiT)": ("r.weight_ih_l0", "r.weight_hh_l0", "r.weight_ih_l1", "r.weight_hh_l1"),
    "first layer": ("r.weight_ih_l0", "r.weight_hh_l0", "r.bias_ih_l0", "r.bias_hh_l0"),
    "last layer": ("r.weight_ih_l1", "r.weight_hh_l1", "r.bias_ih_l1", "r.bias_hh_l1"),
}


@pytest.mark.parametrize("names", list(FROZEN))
@pytest.mark.parametrize("kind", list(KINDS))
def test_partly_frozen(kind, names):
    model = frozen(_model(_all_of, r=KINDS[kind](D, H, 2, batch_first=True)), *FROZEN[names])
    assert gap(model, random_batch(T, D)) < 1e-9


def _tied_pair():
    parts = {"a": nn.LSTM(H, H, batch_first=True), "b": nn.LSTM(H, H, batch_first=True)}
    parts["b"].weight_hh_l0 = parts["a"].weight_hh_l0
    parts["b"].bias_ih_l0 = parts["a"].bias_hh_l0
    parts["a"].weight_ih_l0 = parts["b"].weight_hh_l0  # and to itself
    return parts


SHARED = {
    "used twice": (lambda s, x: s.r(s.r(x)[0].tanh())[0], lambda: {"r": nn.GRU(H, H, batch_first=True)}),
    "used twice, other lengths": (
        lambda s, x: s.r(x)[0].sum(1) * s.r(x[:, 2:])[0].sum(1),
        lambda: {"r": nn.LSTM(H, H, batch_first=True)},
    ),
    "tied between layers": (lambda s, x: s.b(s.a(x)[0])[0], _tied_pair),
    "weight in a linear map as well": (
        lambda s, x: nn.functional.linear(s.r(x)[0], s.r.weight_hh_l0),
        lambda: {"r": nn.RNN(H, H, batch_first=True)},
    ),
}


@pytest.mark.parametrize("name", list(SHARED))
def test_shared_weights(name):
    forward, parts = SHARED[name]
    assert gap(_model(forward, **parts()), random_batch(T, H)) < 1e-9


STATES = {
    "computed": (lambda s, x: s.r(x, s.start(x[:, 0]).unsqueeze(0))[0], lambda: {"start": nn.Linear(D, H)}),
    "trained, batch first": (
        lambda s, x: s.r(x, s.h.expand(x.shape[0], -1, -1).transpose(0, 1).contiguous())[0],
        lambda: {"h": par(1, 1, H)},
    ),
    "trained, expanded": (
        lambda s, x: s.r(x, s.h.expand(-1, x.shape[0], -1).contiguous())[0],
        lambda: {"h": par(1, 1, H)},
    ),
    "trained, repeated": (lambda s, x: s.r(x, s.h.repeat(1, x.shape[0], 1))[0], lambda: {"h": par(1, 1, H)}),
}


@pytest.mark.parametrize("name", list(STATES))
def test_first_states(name):
    forward, parts = STATES[name]
    assert gap(_model(forward, r=nn.GRU(D, H, batch_first=True), **parts()), random_batch(T, D)) < 1e-9


def test_a_frozen_layer_is_run_as_in_training():
    """cuDNN has no backward for a layer that was run without: what comes before it would get no gradient."""
    seen = []

    def stack(*given):
        seen.append(given)
        return torch.gru(*given)

    gru = nn.GRU(D, H)
    kind = next(kind for kind in recurrent._KINDS if kind.stack is torch.gru)._replace(stack=stack)
    weights = recurrent.Weights(gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    x = torch.randn(T, B, D)
    output, last = recurrent._frozen_layer(kind, x, [torch.zeros(B, H)], weights)
    assert seen[0][6] is True  # of gru(input, hx, params, has_biases, num_layers, dropout, train, ...)
    wanted, ends = gru(x)
    torch.testing.assert_close((output, last), (wanted, ends[0]))


@needs_card
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_between_others_on_a_card(kind):
    model = _model(_all_of, torch.float32, r=KINDS[kind](D, H, 3, batch_first=True))
    frozen(model, *(name for name, _ in model.named_parameters() if name.endswith("_l1"))).cuda()
    batch = {key: value.float().cuda() for key, value in random_batch(T, D).items()}
    assert check(model, loss, batch).passed


def test_a_trained_first_state_of_a_frozen_layer():
    model = _model(
        lambda s, x: s.r(x, (s.h.repeat(1, x.shape[0], 1), s.c.repeat(1, x.shape[0], 1)))[0].mul(s.scale),
        r=nn.LSTM(D, H, batch_first=True),
        h=par(1, 1, H),
        c=par(1, 1, H),
        scale=par(H),
    )
    frozen(model, *(f"r.{name}" for name, _ in model.r.named_parameters()))
    assert gap(model, random_batch(T, D)) < 1e-9


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_example(kind):
    model = _model(_all_of, r=KINDS[kind](D, H, batch_first=True))
    assert gap(model, random_batch(T, D, size=1), size=1) < 1e-9


def test_unbatched_input_is_one_example_or_refused():
    model = _model(lambda s, x: s.r(x[0])[0].unsqueeze(0), r=nn.LSTM(D, H))
    assert gap(model, random_batch(T, D, size=1), size=1) < 1e-9
    _refused(_model(lambda s, x: s.r(x[:, 0])[0], r=nn.LSTM(D, H)), random_batch(T, D), "r.")


def test_folded_rows():
    def words(self, x):
        inner = self.a(x).flatten(0, 1)  # (B, 3, T, D) -> (B * 3, T, D)
        return self.r(inner)[1].squeeze(0).unflatten(0, (x.shape[0], -1))

    model, batch = _model(words, a=nn.Linear(D, D), r=nn.GRU(D, H, batch_first=True)), random_batch(3, T, D)
    _refused(model, batch, "batch of")
    report = check(model, loss, batch)
    assert report.passed, report.table()
    assert gap(model, batch, layout=report.layout) < 1e-9


def test_activation_checkpoint():
    model = _model(
        lambda s, x: s.o(checkpoint(lambda h: s.r(h)[0], s.a(x), use_reentrant=False)),
        a=nn.Linear(D, D),
        r=nn.LSTM(D, H, 2, batch_first=True),
        o=nn.Linear(H, 2),
    )
    assert gap(model, random_batch(T, D)) < 1e-9


def test_reparametrised_weight():
    model = _model(_all_of, r=nn.LSTM(D, H, batch_first=True))
    nn.utils.parametrizations.weight_norm(model.r, "weight_hh_l0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap of _weight_norm falls back to a loop, and says so
        assert gap(model, random_batch(T, D)) < 1e-9


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_self_check_passes_with_dropout(kind, mode):
    model = _model(
        lambda s, x: s.o(s.d(s.r(s.e(x))[0])),
        torch.float32,
        e=nn.Linear(D, D),
        r=KINDS[kind](D, H, 2, dropout=0.3, bidirectional=True, batch_first=True),
        d=nn.Dropout(0.2),
        o=nn.Linear(2 * H, 2),
    )
    report = check(model.train(mode == "train"), loss, random_batch(T, D, dtype=torch.float32))
    assert report.passed, report.table()


def test_autocast_leaves_the_layer_in_its_own_precision():
    model = _model(_all_of, torch.float32, r=nn.LSTM(D, H, 2, batch_first=True))
    batch = random_batch(T, D, dtype=torch.float32)
    wanted = clipped_gradient(model, loss, batch, clipping=Clipping.automatic())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clipped_gradient(model, loss, batch, clipping=Clipping.automatic())
    assert relative_gap(found.tensors, wanted.tensors) < 1e-5


def test_a_second_backward_is_the_same():
    """Nothing that the backward needs is overwritten by it."""
    model, batch = _model(_all_of, r=nn.GRU(D, H, batch_first=True)), random_batch(T, D)
    batch["x"].requires_grad_()
    with guard(Book(trainable(model), examples=B)):
        value = loss(model, batch).sum()
    first, second = (torch.autograd.grad(value, batch["x"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_record_per_weight_and_not_per_step(kind, monkeypatch):
    booked = []
    monkeypatch.setattr(Book, "record", lambda book, derivation, form: booked.append((derivation.names[0], form)))
    model, batch = _model(_all_of, r=KINDS[kind](D, H, batch_first=True)), random_batch(T, D)
    book = Book(trainable(model), examples=B)
    with guard(book):
        backward(book, loss(model, batch))
    forms = dict(booked)
    assert len(booked) == len(forms) == 4
    assert forms["r.weight_ih_l0"].input.shape == (B, 1, T, D)
    assert forms["r.weight_hh_l0"].input.shape == (B, 1, T, H)
    assert all(isinstance(forms[f"r.bias_{part}_l0"], Dense) for part in ("ih", "hh"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_was_saved_may_come_back_in_another_order_of_memory(kind):
    """Hooks that keep saved tensors elsewhere give no word on strides."""
    model, batch = _model(_all_of, torch.float32, r=KINDS[kind](D, H, batch_first=True)), random_batch(T, D)
    batch = {name: value.float() for name, value in batch.items()}
    layout = check(model, loss, batch).layout
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda value: value, lambda value: value.mT.contiguous().mT if value.dim() > 1 else value
    )
    with hooks:
        assert gap(model, batch, layout=layout) < 1e-4


# ------------------------------------------------------------------------------------------------------------ refusals


def test_packed_sequences_are_refused_by_name():
    for kind in KINDS.values():
        model = _model(
            lambda s, x: s.r(pack_padded_sequence(x, [T] * x.shape[0], batch_first=True))[1],
            r=kind(D, H, batch_first=True),
        )
        _refused(model, random_batch(T, D), "packed", "padded")


def test_a_parameter_as_the_sequence_is_refused():
    _refused(
        _model(lambda s, x: x + s.r(s.w)[0], r=nn.LSTM(D, D), w=par(T, 1, D)),
        random_batch(T, D),
        "input is a parameter",
    )


def test_weights_that_depend_on_the_examples_are_refused():
    def hyper(self, x):
        h = x.new_zeros(1, x.shape[0], H)
        w = self.a(x).mean((0, 1)).reshape(H, D)
        return torch.rnn_tanh(x, h, [w, self.u], False, 1, 0.0, True, False, True)[0]

    _refused(_model(hyper, a=nn.Linear(D, H * D), u=par(H, H)), random_batch(T, D), "recurrent_layer")


def test_swapped_axes_fail_the_check():
    """A batch-first sequence in a time-major layer mixes the examples: refused, or isolation fails."""
    model = _model(lambda s, x: s.r(s.a(x))[0], torch.float32, a=nn.Linear(D, D), r=nn.LSTM(D, H))
    for length in (B, T, 2 * B):
        batch = random_batch(length, D, dtype=torch.float32)
        _refused(model, batch, "r.")
        assert not check(model, loss, batch).passed
