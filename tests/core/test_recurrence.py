"""All steps of a recurrent layer in one compiled call: autograd's own loop in float64, to a few spacings of float32."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from discreet.core.kernels import recurrence
from discreet.core.rules.cells import Elman, Gru, Lstm, Weights

needs_compiled = pytest.mark.skipif(recurrence._compiled is None, reason="the compiled module was not built here")
SIZES = [(1, 1, 1), (3, 2, 5), (2, 7, 16), (5, 9, 33), (4, 17, 70), (3, 8, 300)]
KINDS = ["lstm", "projected", "gru", "tanh", "relu"]
CELLS = {"lstm": Lstm(), "projected": Lstm(), "gru": Gru(), "tanh": Elman(relu=False), "relu": Elman(relu=True)}
GATES = {"lstm": 4, "projected": 4, "gru": 3, "tanh": 1, "relu": 1}


@pytest.fixture(params=[16, 8, 4], ids="by {}".format)
def widest(request, monkeypatch):
    monkeypatch.setattr(recurrence, "_WIDEST", request.param)


@dataclasses.dataclass
class Case:
    """One layer and what enters it, float32."""

    input: torch.Tensor
    state: torch.Tensor
    cell: torch.Tensor | None
    weights: Weights
    grad: torch.Tensor
    grad_cell: torch.Tensor | None


def _case(kind, steps, rows, width, *, scale=1.0, biased=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) * scale

    inputs, gates = 3, GATES[kind] * width
    out = width // 2 + 1 if kind == "projected" else width
    biases = (drawn(gates), drawn(gates)) if biased else (None, None)
    projection = drawn(out, width) / width**0.5 if kind == "projected" else None
    weights = Weights(drawn(gates, inputs), drawn(gates, out) / out**0.5, *biases, projection)
    is_lstm = kind in ("lstm", "projected")
    cells = (drawn(rows, width), drawn(rows, width)) if is_lstm else (None, None)
    return Case(drawn(rows, steps, inputs), drawn(rows, out), cells[0], weights, drawn(rows, steps, out), cells[1])


def _as_double(case):
    def wide(value):
        return None if value is None else value.double()

    weights = Weights(*(wide(value) for value in case.weights))
    values = (getattr(case, name) for name in ("input", "state", "cell", "grad", "grad_cell"))
    input, state, cell, grad, grad_cell = (wide(value) for value in values)
    return Case(input, state, cell, weights, grad, grad_cell)


def _run(kind, case):
    """Everything that a layer puts out and leaves: outputs, last cell, gradients."""
    cell = CELLS[kind]
    output, last, kept = cell.forward(case.input, case.state, case.cell, case.weights)
    output_NTP = output.transpose(0, 1)
    before = torch.cat([case.state.unsqueeze(1), output_NTP[:, :-1]], 1)
    found = cell.backward(case.grad, case.grad_cell, before, output_NTP, case.weights, kept)
    assert isinstance(found.input_NTG, torch.Tensor)
    values = (output_NTP, last, found.input_NTG, found.hidden_NTG, found.state_NP, found.cell_NH)
    return [*values, *(found.projection or ())]


def _by_autograd(kind, case):
    """The same by a loop in float64 whose gates are leaves."""
    w = case.weights
    bias, hidden_bias = (0.0 if value is None else value for value in (w.input_bias, w.hidden_bias))
    state, cell = case.state.clone().requires_grad_(), None if case.cell is None else case.cell.clone().requires_grad_()
    first, first_cell = state, cell
    outputs, entered, hidden, wides = [], [], [], []
    for x in (case.input @ w.input.mT + bias).unbind(1):
        entered.append(x.detach().requires_grad_())
        hidden.append((state @ w.hidden.mT + hidden_bias).detach().requires_grad_())
        # The leaf has the value, and the graph goes on behind it.
        come = state @ w.hidden.mT + hidden_bias + (hidden[-1] - hidden[-1].detach())
        if kind == "gru":
            r, z, n = entered[-1].chunk(3, 1)
            hr, hz, hn = come.chunk(3, 1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            n = (n + r * hn).tanh()
            state = (1 - z) * n + z * state
        elif cell is None:
            state = (entered[-1] + come).relu() if kind == "relu" else (entered[-1] + come).tanh()
        else:
            i, f, g, o = (entered[-1] + come).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            wides.append(o.sigmoid() * cell.tanh())
            state = wides[-1] if w.projection is None else wides[-1] @ w.projection.mT
        state.retain_grad()
        outputs.append(state)
    output = torch.stack(outputs, 1)
    total = (output * case.grad).sum() + (0.0 if cell is None else (cell * case.grad_cell).sum())
    total.backward()
    gathered = [torch.stack([value.grad for value in values], 1) for values in (entered, hidden)]
    last = None if cell is None else cell.detach()
    found = [output.detach(), last, *gathered, first.grad, None if first_cell is None else first_cell.grad]
    if w.projection is not None:
        found += [torch.stack(wides, 1).detach(), torch.stack([value.grad for value in outputs], 1)]
    return found


def _assert_close(found, wanted, tolerance=3e-6):
    assert len(found) == len(wanted)
    for one, exact in zip(found, wanted, strict=True):
        if exact is None:
            assert one is None
            continue
        size = exact.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        spacing = tolerance / 30  # of numbers near one, whose difference a gradient may be
        atol = tolerance * size + spacing
        torch.testing.assert_close(one.double(), exact, rtol=tolerance, atol=atol, equal_nan=True)


def _compiled_only(monkeypatch):
    for name in ("_lstm_steps", "_lstm_steps_back", "_gru_steps", "_gru_steps_back", "_backwards"):
        monkeypatch.setattr(f"discreet.core.rules.cells.{name}", None)


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "rows", "width"), SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_is_autograds(monkeypatch, kind, steps, rows, width, biased):
    case = _case(kind, steps, rows, width, biased=biased)
    wanted = _by_autograd(kind, _as_double(case))
    _compiled_only(monkeypatch)
    _assert_close(_run(kind, case), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_of_operations_is_autograds(monkeypatch, kind):
    """The other way, in both precisions: what no compiled code is for."""
    case = _case(kind, 4, 5, 6)
    _assert_close(_run(kind, _as_double(case)), _by_autograd(kind, _as_double(case)), 1e-13)
    monkeypatch.setattr(recurrence, "_compiled", None)
    _assert_close(_run(kind, case), _by_autograd(kind, _as_double(case)))


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_outputs_may_lie_in_any_way(kind):
    case = _case(kind, 3, 5, 8)
    usual = _run(kind, case)
    out = case.grad.shape[2]
    time_first = case.grad.transpose(0, 1).contiguous().transpose(0, 1)
    spaced = torch.full((5, 3, 2 * out), torch.nan)[:, :, ::2].copy_(case.grad)
    padded = torch.full((5, 4, out + 3), torch.nan)[:, 1:, 2 : 2 + out].copy_(case.grad)
    for grad in (time_first, spaced, padded):
        found = _run(kind, dataclasses.replace(case, grad=grad))
        assert all(one is None or torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    ones = torch.ones(()).expand_as(case.grad)
    _assert_close(_run(kind, dataclasses.replace(case, grad=ones)), [
        None if value is None else value.double()
        for value in _run(kind, dataclasses.replace(case, grad=ones.clone()))
    ], 0.0)  # fmt: skip


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_whatever_is_beside_it(kind):
    """And whatever thread it is in: a factor depends on nobody else, to the last bit."""
    case = _case(kind, 4, 37, 40)
    # Of the library's product that projects the inputs no such promise can be made; zeros have no rounding.
    case = dataclasses.replace(case, input=torch.zeros_like(case.input))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(_run(kind, case))
    finally:
        torch.set_num_threads(before)
    assert all(one is None or torch.equal(one, other) for one, other in zip(*found, strict=True))
    whole = _run(kind, case)
    for start, stop in ((0, 1), (5, 14), (30, 37)):
        rows = slice(start, stop)
        some = Case(*(value if isinstance(value, (Weights, type(None))) else value[rows] for value in (
            case.input, case.state, case.cell, case.weights, case.grad, case.grad_cell
        )))  # fmt: skip
        part = _run(kind, some)
        assert all(one is None or torch.equal(one, other[rows]) for one, other in zip(part, whole, strict=True))


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_example(kind, bad):
    case = _case(kind, 3, 9, 20)
    usual = _run(kind, case)
    case.input[4, 1, 0] = bad
    wanted = _by_autograd(kind, _as_double(case))
    found = _run(kind, case)
    others = [row for row in range(9) if row != 4]
    for one, other, exact in zip(found, usual, wanted, strict=True):
        if one is None:
            continue
        assert torch.equal(one[others], other[others])
        assert torch.equal(one[4].isfinite(), exact[4].isfinite()) or kind == "relu"


@needs_compiled
def test_every_size_of_a_number_is_squashed_as_by_float64():
    """Three spacings, from the smallest numbers to where both functions are flat."""
    sizes = torch.logspace(-30, 3, 4001, dtype=torch.float64).float()
    value = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])
    rows = len(value)
    gate = value.reshape(1, rows, 1).repeat(1, 1, 4)
    cell = torch.zeros(2, rows, 1)
    squashed, wide = torch.empty(1, rows, 1), torch.empty(1, rows, 1)
    hidden = torch.zeros(4, 1)
    recurrence.Lstm(gate, cell, squashed, wide, wide, torch.zeros(rows, 1), hidden, None, None).forward()
    enter, _, candidate, _ = gate[0].double().unbind(1)
    for result, exact in ((enter, value.double().sigmoid()), (candidate, value.double().tanh())):
        gap = (result - exact).abs()
        assert (gap <= 3 * torch.finfo(torch.float32).eps * exact.abs() + 1e-37).all()
    assert enter[rows // 2] == 0.5
    assert candidate[rows // 2] == 0.0


def _lstm(**other):
    usual = {
        "gate_TNG": torch.zeros(2, 3, 16), "cell_TNH": torch.zeros(3, 3, 4), "squashed_TNH": torch.zeros(2, 3, 4),
        "wide_TNH": torch.zeros(2, 3, 4), "state_TNP": torch.zeros(2, 3, 4), "first_NP": torch.zeros(3, 4),
        "hidden_GP": torch.zeros(16, 4), "bias_G": torch.zeros(16), "projection_PH": None,
    }  # fmt: skip
    return recurrence.Lstm(**{**usual, **other})


def _gru(**other):
    usual = {
        "gate_TNG": torch.zeros(2, 3, 12), "inner_TNH": torch.zeros(2, 3, 4), "state_TNH": torch.zeros(2, 3, 4),
        "first_NH": torch.zeros(3, 4), "bias_G": torch.zeros(12), "hidden_GH": torch.zeros(12, 4),
        "hidden_bias_G": torch.zeros(12),
    }  # fmt: skip
    return recurrence.Gru(**{**usual, **other})


def _elman(**other):
    usual = {
        "state_TNH": torch.zeros(2, 3, 4), "first_NH": torch.zeros(3, 4), "bias_H": torch.zeros(4),
        "hidden_HH": torch.zeros(4, 4), "relu": True,
    }  # fmt: skip
    return recurrence.Elman(**{**usual, **other})


def _backward(layer, *, wrong=None, at=0):
    """Run a layer backwards, with one of its tensors exchanged."""
    grad, state = torch.zeros(2, 3, 4), torch.zeros(3, 4)
    given = {
        recurrence.Lstm: [grad, state, torch.zeros(3, 4), torch.zeros(2, 3, 16), None],
        recurrence.Gru: [grad, state, torch.zeros(2, 3, 12), torch.zeros(2, 3, 12)],
        recurrence.Elman: [grad, state, torch.zeros(2, 3, 4)],
    }[type(layer)]
    if wrong is not None:
        given[at] = wrong(given[at])
    layer.backward(*given)


WRONG = {
    "fewer": lambda value: value[:-1],
    "narrower": lambda value: value[..., :-1],
    "turned": lambda value: value.mT.contiguous().mT,
    "double": lambda value: value.double(),
    "spread": lambda value: value[..., :1].expand(value.shape),
}


@needs_compiled
@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("build", [_lstm, _gru, _elman])
def test_what_lies_otherwise_is_not_read(build, how):
    layer, wrong = build(), WRONG[how]
    layer.forward()
    _backward(layer)
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if not isinstance(value, torch.Tensor) or (value.dim() == 1 and how == "turned"):
            continue
        if field.name.startswith("hidden_") and value.dim() == 2 and how in ("turned", "spread"):
            continue  # weights are packed, however they lie
        if build is _elman and field.name == "state_TNH" and how == "fewer":
            continue  # which tells how many steps there are
        with pytest.raises(AssertionError, match="past its end"):
            build(**{field.name: wrong(value)}).forward()
    for at in range({_lstm: 4, _gru: 4, _elman: 3}[build]):
        with pytest.raises(AssertionError, match="past its end"):
            _backward(layer, wrong=wrong, at=at)


@needs_compiled
def test_a_projection_comes_whole():
    with pytest.raises(AssertionError, match="without a projection"):
        _lstm(state_TNP=torch.zeros(2, 3, 2), first_NP=torch.zeros(3, 2), hidden_GP=torch.zeros(16, 2)).forward()
    with pytest.raises(AssertionError, match="come together"):
        _backward(_lstm(), wrong=lambda _: torch.zeros(2, 3, 4), at=4)


def test_what_suits():
    value = torch.ones(2, 3)
    assert not recurrence.suit(torch._efficientzerotensor((2, 3)))
    assert recurrence.suit(value, None) == (recurrence._compiled is not None)
    assert not recurrence.suit(value, value.double())
    assert not recurrence.suit(value.bfloat16())
    assert not recurrence.suit(value.to("meta"))
