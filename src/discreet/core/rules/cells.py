"""The arithmetic of recurrent layers over all steps of time: LSTM, GRU, tanh and ReLU networks, in one direction.

One product projects every input, and a loop carries the state. The backward loops over the state alone, with
``d_gate_t = d_state_t * factor_t`` and all factors computed beforehand, or by one fused call a step where there is one.

Shape legend: T = time steps, B = examples (N = rows: B, or B folded), I = inputs, H = state width, P = output width (H,
or that of an LSTM's projection), G = width of all gates (H times their number).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core.kernels import gates

_aten = torch.ops.aten


class Weights(NamedTuple):
    """The parameters of one layer in one direction: (G, I), (G, P), (G,), (G,) and an LSTM's projection (P, H)."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """Both biases, where they enter as a sum."""
        given = [bias for bias in (self.input_bias, self.hidden_bias) if bias is not None]
        return functools.reduce(torch.add, given) if given else None


class Gradients(NamedTuple):
    """What a backward over time leaves: at the gates, by way of the input and of the state, and at the first states.

    Attributes:
        projection: of an LSTM that has one, its input (N, T, H) and the gradient of its output (N, T, P).
    """

    input_NTG: Tensor
    hidden_NTG: Tensor
    state_NP: Tensor
    cell_NH: Tensor | None = None
    projection: tuple[Tensor, Tensor] | None = None


class Cell(abc.ABC):
    """The arithmetic of one kind of layer, in one direction and over all steps. Pure; no tensor given is changed.

    What the loops over time see lies step by step, (T, N, ...): the rows of one step, a power of two apart, would share
    the same places of the cache. So does the output, as PyTorch's own. Names say the order of the axes.
    """

    @abc.abstractmethod
    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """All outputs (T, N, P), the last cell state of an LSTM, and what `backward` needs besides the outputs."""

    @abc.abstractmethod
    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        """Gradients of everything but weights and inputs. ``before`` are the states that the steps started from."""


class Lstm(Cell):
    """Gates in, forget, candidate, out: ``c' = f c + i g``, ``h' = o tanh(c')``, and ``W_hr h'`` where projected."""

    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        assert cell_NH is not None
        gate_TNG = F.linear(input_NTI.transpose(0, 1), weights.input, weights.bias)
        (steps, rows, _), width = gate_TNG.shape, cell_NH.shape[1]
        cell = gate_TNG.new_empty(steps + 1, rows, width)
        cell[0] = cell_NH
        squashed, wide = (gate_TNG.new_empty(steps, rows, width) for _ in range(2))
        output = wide if weights.projection is None else gate_TNG.new_empty(steps, rows, len(weights.projection))
        advance = gates.forward if gates.suit(gate_TNG, cell) else _advanced
        hidden = weights.hidden.mT
        by_step = (value.transpose(0, 1) for value in (gate_TNG, cell[:-1], cell[1:], squashed, wide, output))
        for gate, old, new, flat, state, result in _steps(*by_step):
            gate.addmm_(state_NP, hidden)
            advance(gate, old, new, flat, state)
            if weights.projection is not None:
                torch.mm(state, weights.projection.mT, out=result)
            state_NP = result
        return output, cell[-1].clone(), (gate_TNG, cell, squashed, wide)

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        assert grad_cell_NH is not None
        # What was saved may come back in another order of memory, from hooks that keep it elsewhere meanwhile.
        gate_NTG, cell, squashed, wide = (value.contiguous().transpose(0, 1) for value in kept)
        is_fused = gates.suit(gate_NTG, cell, squashed, grad_NTP, grad_cell_NH)
        grad_NTG = torch.empty_like(gate_NTG) if is_fused else _factors(gate_NTG, cell[:, :-1], squashed)
        projected = None if weights.projection is None else torch.empty_like(grad_NTP)
        state = grad_NTP.new_zeros(grad_NTP.shape[0], grad_NTP.shape[2])
        memory = grad_cell_NH.clone(memory_format=torch.contiguous_format)
        retreat = gates.backward if is_fused else _retreated
        for step, (grad, gate, old, flat, gate_grad) in _backwards(
            grad_NTP, gate_NTG, cell[:, :-1], squashed, grad_NTG
        ):
            above = state.add_(grad)
            if weights.projection is not None and projected is not None:
                above = projected[:, step].copy_(state) @ weights.projection
            retreat(gate, old, flat, above, memory, gate_grad)
            torch.mm(gate_grad, weights.hidden, out=state)
        return Gradients(grad_NTG, grad_NTG, state, memory, None if projected is None else (wide, projected))


def _advanced(gate_N4H: Tensor, before_NH: Tensor, cell_NH: Tensor, squashed_NH: Tensor, state_NH: Tensor) -> None:
    """`discreet.core.kernels.gates.forward` in PyTorch's operations."""
    enter, forget, candidate, leave = gate_N4H.chunk(4, -1)
    inner = candidate.contiguous().tanh()  # takes three times as long over rows that lie apart
    gate_N4H.sigmoid_()
    candidate.copy_(inner)
    torch.mul(forget, before_NH, out=cell_NH).addcmul_(enter, inner)
    torch.mul(leave, torch.tanh(cell_NH, out=squashed_NH), out=state_NH)


def _factors(gate_NTG: Tensor, before_NTH: Tensor, squashed_NTH: Tensor) -> Tensor:
    """What the gradient of the cell, or that of the state, is multiplied by at each gate; for all steps at once."""
    enter, forget, candidate, leave = gate_NTG.chunk(4, -1)
    grad_NTG = torch.empty_like(gate_NTG)
    of_enter, of_forget, of_candidate, of_leave = grad_NTG.chunk(4, -1)
    _aten.sigmoid_backward.grad_input(candidate, enter, grad_input=of_enter)
    _aten.sigmoid_backward.grad_input(before_NTH, forget, grad_input=of_forget)
    _aten.tanh_backward.grad_input(enter, candidate, grad_input=of_candidate)
    _aten.sigmoid_backward.grad_input(squashed_NTH, leave, grad_input=of_leave)
    return grad_NTG


def _retreated(
    gate_N4H: Tensor, before_NH: Tensor, squashed_NH: Tensor, state_grad_NH: Tensor, cell_grad_NH: Tensor,
    gate_grad_N4H: Tensor,
) -> None:  # fmt: skip
    """`discreet.core.kernels.gates.backward` in PyTorch's operations, with `_factors` in the gradient's place."""
    _, forget, _, leave = gate_N4H.chunk(4, -1)
    cell_grad_NH.addcmul_(state_grad_NH, _aten.tanh_backward(leave, squashed_NH))
    inner, outer = gate_grad_N4H.unflatten(1, (4, -1)).split([3, 1], 1)
    inner.mul_(cell_grad_NH.unsqueeze(1))
    outer.mul_(state_grad_NH.unsqueeze(1))
    cell_grad_NH.mul_(forget)


class Gru(Cell):
    """Gates reset, update, candidate: ``n = tanh(W x + b + r (U h + c))``, ``h' = (1 - z) n + z h``."""

    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        width = state_NP.shape[1]
        gate_NTG = F.linear(input_NTI, weights.input, weights.input_bias)
        inner = gate_NTG.new_empty(*gate_NTG.shape[:2], width)
        output = gate_NTG.new_empty(gate_NTG.shape[1], *state_NP.shape)
        both, candidate = gate_NTG[:, :, : 2 * width], gate_NTG[:, :, 2 * width :]
        for pair, n, kept, result in _steps(both, candidate, inner, output.transpose(0, 1)):
            part = F.linear(state_NP, weights.hidden, weights.hidden_bias)
            reset, update = pair.add_(part[:, : 2 * width]).sigmoid_().chunk(2, 1)
            n.addcmul_(reset, kept.copy_(part[:, 2 * width :]))
            n.copy_(n.contiguous().tanh_())
            state_NP = torch.lerp(n, state_NP, update, out=result)
        return output, None, (gate_NTG, inner)

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        gate, inner = kept
        reset, update, candidate = gate.chunk(3, -1)
        rows, steps, width = reset.shape
        grad_NT4H = gate.new_empty(rows, steps, 4, width)  # reset, update, candidate behind and before the reset gate
        reset_grad, update_grad, hidden_grad, input_grad = grad_NT4H.unbind(2)
        _aten.tanh_backward.grad_input(1 - update, candidate, grad_input=input_grad)
        torch.mul(input_grad, reset, out=hidden_grad)
        _aten.sigmoid_backward.grad_input(input_grad * inner, reset, grad_input=reset_grad)
        _aten.sigmoid_backward.grad_input(before_NTP - candidate, update, grad_input=update_grad)
        flat = grad_NT4H.flatten(2)
        hidden_NTG = flat[:, :, : 3 * width]
        state = torch.zeros_like(grad_NTP[:, 0])
        for _, (grad, each, hidden, carried) in _backwards(grad_NTP, grad_NT4H, hidden_NTG, update):
            each.mul_(state.add_(grad).unsqueeze(1))
            state.mul_(carried).addmm_(hidden, weights.hidden)
        input_NTG = torch.cat([flat[:, :, : 2 * width], input_grad], -1)
        return Gradients(input_NTG, hidden_NTG.contiguous(), state)


class Elman(Cell):
    """``h' = f(W x + b + U h + c)`` with f the hyperbolic tangent, or the positive part."""

    def __init__(self, *, relu: bool) -> None:
        self.relu = relu

    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        gate_NTG = F.linear(input_NTI, weights.input, weights.bias)
        output_TNP = gate_NTG.new_empty(gate_NTG.shape[1], *state_NP.shape)
        for gate, result in _steps(gate_NTG, output_TNP.transpose(0, 1)):
            torch.addmm(gate, state_NP, weights.hidden.mT, out=result)
            state_NP = result.clamp_(min=0) if self.relu else result.tanh_()
        return output_TNP, None, ()

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        grad_NTG = (output_NTP > 0).to(output_NTP.dtype) if self.relu else 1 - output_NTP.square()
        state = torch.zeros_like(grad_NTP[:, 0])
        for _, (grad, gate) in _backwards(grad_NTP, grad_NTG):
            torch.mm(gate.mul_(state.add_(grad)), weights.hidden, out=state)
        return Gradients(grad_NTG, grad_NTG, state)


def _steps(*values_NTX: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The slices of these tensors at each step. All views are made at once: singly they take as long as the work."""
    return zip(*(value.unbind(1) for value in values_NTX), strict=True)


def _backwards(*values_NTX: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each step and the slices at it, from the last to the first."""
    return reversed(list(enumerate(_steps(*values_NTX))))
