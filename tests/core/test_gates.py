"""The fused step of an LSTM: PyTorch's own operations in float64, to a few spacings of float32."""

from __future__ import annotations

import math

import pytest
import torch

from discreet.core.kernels import gates
from discreet.core.rules.cells import _advanced, _factors, _retreated

needs_compiled = pytest.mark.skipif(gates._compiled is None, reason="the compiled module was not built here")
STEPS = {"compiled": (gates.forward, gates.backward), "torch": (_advanced, _retreated)}
SIZES = [(1, 1), (3, 5), (2, 16), (64, 128), (7, 33), (300, 256)]


def _inputs(rows, width, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, 2, 4 * width, generator=generator) * scale
    return wide[:, 1], torch.randn(rows, width, generator=generator)


def _exact(entering, before):
    """Gates, cell, its tangent and the state, float64 with a graph."""
    i, f, g, o = entering.double().requires_grad_().chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * before.double() + i * g
    return torch.cat([i, f, g, o], 1), cell, cell.tanh(), o * cell.tanh()


@needs_compiled
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_a_step_is_float64s(kind, rows, width):
    gate, before = _inputs(rows, width)
    wanted = _exact(gate.clone(), before)
    cell, squashed, state = (torch.full_like(before, torch.nan) for _ in range(3))
    neighbour = gate._base[:, 0].clone()
    STEPS[kind][0](gate, before, cell, squashed, state)
    for found, exact in zip((gate, cell, squashed, state), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=5e-7)
    assert torch.equal(gate._base[:, 0], neighbour)


@needs_compiled
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_its_gradients_are_autograds(kind, rows, width):
    gate, before = _inputs(rows, width)
    entering, old = gate.double().requires_grad_(), before.double().requires_grad_()
    i, f, g, o = entering.chunk(4, 1)
    cell = f.sigmoid() * old + i.sigmoid() * g.tanh()
    state = o.sigmoid() * cell.tanh()
    state_grad, cell_grad = (torch.randn(rows, width, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    wanted = torch.autograd.grad([state, cell], [entering, old], [state_grad.double(), cell_grad.double()])
    kept = [torch.empty_like(before) for _ in range(3)]
    STEPS[kind][0](gate, before, *kept)
    gate_grad = torch.full((rows, 3, 4 * width), torch.nan)[:, 1]
    if kind == "torch":
        gate_grad.copy_(_factors(gate, before, kept[1]))
    STEPS[kind][1](gate, before, kept[1], state_grad, cell_grad, gate_grad)
    torch.testing.assert_close(gate_grad.double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cell_grad.double(), wanted[1], rtol=1e-5, atol=1e-6)


@needs_compiled
def test_every_size_of_a_number_is_squashed_as_by_float64():
    """Two spacings, from the smallest numbers to where both functions are flat."""
    sizes = torch.logspace(-30, 3, 4001, dtype=torch.float64).float()
    value = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])
    gate = torch.stack([value] * 4).flatten().unsqueeze(0).clone()
    found = [torch.empty(1, len(value)) for _ in range(3)]
    gates.forward(gate, torch.zeros(1, len(value)), *found)
    enter, _, candidate, _ = gate.double().chunk(4, 1)
    for result, exact in ((enter, value.double().sigmoid()), (candidate, value.double().tanh())):
        gap = (result[0] - exact).abs()
        assert (gap <= 3 * torch.finfo(torch.float32).eps * exact.abs() + 1e-37).all()
    assert gate[0, len(value) // 2] == 0.5
    assert candidate[0, len(value) // 2] == 0.0


@needs_compiled
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5, 10, 15])
def test_what_is_not_finite_stays_in_its_place(bad, at):
    gate, before = _inputs(3, 4)
    gate[1, at] = bad
    wanted = _exact(gate.clone(), before)
    found = [torch.empty_like(before) for _ in range(3)]
    gates.forward(gate, before, *found)
    for result, exact in zip((gate, *found), wanted, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-7, equal_nan=True)


@needs_compiled
def test_threads_change_no_bit():
    results = []
    before_threads = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            gate, before = _inputs(300, 512)
            found = [torch.empty_like(before) for _ in range(3)]
            gates.forward(gate, before, *found)
            results.append((gate.clone(), *found))
    finally:
        torch.set_num_threads(before_threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_compiled
def test_what_lies_otherwise_is_not_read():
    gate, before = _inputs(3, 4)
    for at, other in enumerate((gate[:, :15], gate[:2], gate.t().contiguous().t(), gate.double())):
        with pytest.raises(AssertionError, match="past their end"):
            gates.forward(other, before, *(torch.empty(3, 4) for _ in range(3)))
        with pytest.raises(AssertionError, match="past their end"):
            gates.backward(gate, *(torch.zeros(3, 4) for _ in range(4)), torch.empty_like(other))
        for wrong in (before[:2], before.t().contiguous().t(), before.double(), before[:1].expand(3, 4)):
            kept = [torch.empty(3, 4) for _ in range(4)]
            kept[at] = wrong
            with pytest.raises(AssertionError, match="past their end"):
                gates.forward(gate, *kept)
            with pytest.raises(AssertionError, match="past their end"):
                gates.backward(gate, *kept, torch.empty(3, 16))


def test_what_suits():
    value = torch.ones(2, 3)
    assert not gates.suit(torch._efficientzerotensor((2, 3)))
    assert gates.suit(value) == (gates._compiled is not None)
    assert not gates.suit(value, value.double())
    assert not gates.suit(value.bfloat16())
    assert not gates.suit(value.to("meta"))
