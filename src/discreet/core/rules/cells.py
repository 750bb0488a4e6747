"""The arithmetic of recurrent layers over all steps of time: LSTM, GRU, tanh and ReLU networks, in one direction.

One product projects every input, and the state is carried from step to step: by compiled code where it suits, and else
by a loop of PyTorch's operations, whose backward has all factors of ``d_gate_t = d_state_t * factor_t`` beforehand.

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

from discreet.core.kernels import recurrence

_aten = torch.ops.aten
_DENSE = torch.contiguous_format


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
        is_fused, bias = recurrence.suit(input_NTI, state_NP, cell_NH, *weights), weights.bias
        gate = _projected(input_NTI, weights.input, None if is_fused else bias)
        (steps, rows, _), width = gate.shape, cell_NH.shape[1]
        cell = gate.new_empty(steps + 1, rows, width)
        cell[0] = cell_NH
        squashed, wide = (gate.new_empty(steps, rows, width) for _ in range(2))
        output = wide if weights.projection is None else gate.new_empty(steps, rows, len(weights.projection))
        if is_fused:
            first, matrices = state_NP.contiguous(), (weights.hidden, bias, weights.projection)
            recurrence.Lstm(gate, cell, squashed, wide, output, first, *matrices).forward()
        else:
            _lstm_steps(gate, cell, squashed, wide, output, state_NP, weights)
        return output, cell[-1].clone(), (gate, cell, squashed, wide)

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        assert grad_cell_NH is not None
        # What was saved may come back in another order of memory, from hooks that keep it elsewhere meanwhile.
        gate, cell, squashed, wide = (value.contiguous() for value in kept)
        grad, memory = _rows_together(grad_NTP), grad_cell_NH.clone(memory_format=torch.contiguous_format)
        state = grad.new_zeros(grad.shape[1:])
        projected = None if weights.projection is None else torch.empty_like(grad, memory_format=_DENSE)
        if recurrence.suit(gate, cell, squashed, wide, grad, memory, *weights):
            gate_grad, matrices = torch.empty_like(gate), (weights.hidden, None, weights.projection)
            output = wide if projected is None else projected  # of the states, it needs only their sizes
            layer = recurrence.Lstm(gate, cell, squashed, wide, output, state, *matrices)
            layer.backward(grad, state, memory, gate_grad, projected)
        else:
            gate_grad = _factors(gate, cell[:-1], squashed)
            _lstm_steps_back(gate, squashed, grad, state, memory, gate_grad, projected, weights)
        by_row = gate_grad.transpose(0, 1)
        put_out = None if projected is None else (wide.transpose(0, 1), projected.transpose(0, 1))
        return Gradients(by_row, by_row, state, memory, put_out)


def _lstm_steps(
    gate_TNG: Tensor, cell: Tensor, squashed_TNH: Tensor, wide_TNH: Tensor, output_TNP: Tensor, state_NP: Tensor,
    weights: Weights,
) -> None:  # fmt: skip
    """`discreet.core.kernels.recurrence.Lstm.forward` in PyTorch's operations."""
    for gate, old, new, flat, state, result in zip(
        gate_TNG, cell[:-1], cell[1:], squashed_TNH, wide_TNH, output_TNP, strict=True
    ):
        gate.addmm_(state_NP, weights.hidden.mT)
        enter, forget, candidate, leave = gate.chunk(4, -1)
        inner = candidate.contiguous().tanh()  # takes three times as long over rows that lie apart
        gate.sigmoid_()
        candidate.copy_(inner)
        torch.mul(forget, old, out=new).addcmul_(enter, inner)
        torch.mul(leave, torch.tanh(new, out=flat), out=state)
        if weights.projection is not None:
            torch.mm(state, weights.projection.mT, out=result)
        state_NP = result


def _factors(gate_TNG: Tensor, before_TNH: Tensor, squashed_TNH: Tensor) -> Tensor:
    """What the gradient of the cell, or that of the state, is multiplied by at each gate; for all steps at once."""
    enter, forget, candidate, leave = gate_TNG.chunk(4, -1)
    grad_TNG = torch.empty_like(gate_TNG)
    of_enter, of_forget, of_candidate, of_leave = grad_TNG.chunk(4, -1)
    _aten.sigmoid_backward.grad_input(candidate, enter, grad_input=of_enter)
    _aten.sigmoid_backward.grad_input(before_TNH, forget, grad_input=of_forget)
    _aten.tanh_backward.grad_input(enter, candidate, grad_input=of_candidate)
    _aten.sigmoid_backward.grad_input(squashed_TNH, leave, grad_input=of_leave)
    return grad_TNG


def _lstm_steps_back(
    gate_TNG: Tensor, squashed_TNH: Tensor, grad_TNP: Tensor, state_NP: Tensor, memory_NH: Tensor,
    gate_grad_TNG: Tensor, projected_TNP: Tensor | None, weights: Weights,
) -> None:  # fmt: skip
    """`discreet.core.kernels.recurrence.Lstm.backward` in PyTorch's operations, over `_factors`."""
    for step, (grad, gate, flat, gate_grad) in _backwards(grad_TNP, gate_TNG, squashed_TNH, gate_grad_TNG):
        above = state_NP.add_(grad)
        if weights.projection is not None and projected_TNP is not None:
            above = projected_TNP[step].copy_(state_NP) @ weights.projection
        _, forget, _, leave = gate.chunk(4, -1)
        memory_NH.addcmul_(above, _aten.tanh_backward(leave, flat))
        inner, outer = gate_grad.unflatten(1, (4, -1)).split([3, 1], 1)
        inner.mul_(memory_NH.unsqueeze(1))
        outer.mul_(above.unsqueeze(1))
        memory_NH.mul_(forget)
        torch.mm(gate_grad, weights.hidden, out=state_NP)


class Gru(Cell):
    """Gates reset, update, candidate: ``n = tanh(W x + b + r (U h + c))``, ``h' = (1 - z) n + z h``."""

    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        is_fused = recurrence.suit(input_NTI, state_NP, *weights)
        gate = _projected(input_NTI, weights.input, None if is_fused else weights.input_bias)
        inner, output = (gate.new_empty(len(gate), *state_NP.shape) for _ in range(2))
        if is_fused:
            matrices = (weights.input_bias, weights.hidden, weights.hidden_bias)
            recurrence.Gru(gate, inner, output, state_NP.contiguous(), *matrices).forward()
        else:
            _gru_steps(gate, inner, output, state_NP, weights)
        return output, None, (gate, inner)

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        gate, inner = (value.contiguous() for value in kept)
        grad, output = _rows_together(grad_NTP), output_NTP.transpose(0, 1).contiguous()
        first, state = before_NTP[:, 0].contiguous(), grad.new_zeros(grad.shape[1:])
        if recurrence.suit(gate, inner, output, first, grad, *weights):
            input_grad, hidden_grad = torch.empty_like(gate), torch.empty_like(gate)
            layer = recurrence.Gru(gate, inner, output, first, None, weights.hidden, None)
            layer.backward(grad, state, input_grad, hidden_grad)
        else:
            input_grad, hidden_grad = _gru_steps_back(gate, inner, before_NTP.transpose(0, 1), grad, state, weights)
        return Gradients(input_grad.transpose(0, 1), hidden_grad.transpose(0, 1), state)


def _gru_steps(gate_TNG: Tensor, inner_TNH: Tensor, output_TNH: Tensor, state_NH: Tensor, weights: Weights) -> None:
    """`discreet.core.kernels.recurrence.Gru.forward` in PyTorch's operations."""
    width = state_NH.shape[1]
    for gate, kept, result in zip(gate_TNG, inner_TNH, output_TNH, strict=True):
        both, n = gate.split([2 * width, width], -1)
        part = F.linear(state_NH, weights.hidden, weights.hidden_bias)
        reset, update = both.add_(part[:, : 2 * width]).sigmoid_().chunk(2, 1)
        n.addcmul_(reset, kept.copy_(part[:, 2 * width :]))
        n.copy_(n.contiguous().tanh_())
        state_NH = torch.lerp(n, state_NH, update, out=result)


def _gru_steps_back(
    gate_TNG: Tensor, inner_TNH: Tensor, before_TNH: Tensor, grad_TNH: Tensor, state_NH: Tensor, weights: Weights
) -> tuple[Tensor, Tensor]:
    """`discreet.core.kernels.recurrence.Gru.backward` in PyTorch's operations: by way of the input and of the state."""
    reset, update, candidate = gate_TNG.chunk(3, -1)
    steps, rows, width = inner_TNH.shape
    grad = gate_TNG.new_empty(steps, rows, 4, width)  # reset, update, candidate behind and before the reset gate
    of_reset, of_update, of_hidden, of_input = grad.unbind(2)
    _aten.tanh_backward.grad_input(1 - update, candidate, grad_input=of_input)
    torch.mul(of_input, reset, out=of_hidden)
    _aten.sigmoid_backward.grad_input(of_input * inner_TNH, reset, grad_input=of_reset)
    _aten.sigmoid_backward.grad_input(before_TNH - candidate, update, grad_input=of_update)
    flat = grad.flatten(2)
    hidden_TNG = flat[:, :, : 3 * width]
    for _, (above, each, hidden, carried) in _backwards(grad_TNH, grad, hidden_TNG, update):
        each.mul_(state_NH.add_(above).unsqueeze(1))
        state_NH.mul_(carried).addmm_(hidden, weights.hidden)
    return torch.cat([flat[:, :, : 2 * width], of_input], -1), hidden_TNG.contiguous()


class Elman(Cell):
    """``h' = f(W x + b + U h + c)`` with f the hyperbolic tangent, or the positive part."""

    def __init__(self, *, relu: bool) -> None:
        self.relu = relu

    def forward(
        self, input_NTI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        is_fused, bias = recurrence.suit(input_NTI, state_NP, *weights), weights.bias
        output = _projected(input_NTI, weights.input, None if is_fused else bias)
        if is_fused:
            recurrence.Elman(output, state_NP.contiguous(), bias, weights.hidden, self.relu).forward()
            return output, None, ()
        for result in output:
            result.addmm_(state_NP, weights.hidden.mT)
            state_NP = result.clamp_(min=0) if self.relu else result.tanh_()
        return output, None, ()

    def backward(
        self, grad_NTP: Tensor, grad_cell_NH: Tensor | None, before_NTP: Tensor, output_NTP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        grad, output = _rows_together(grad_NTP), output_NTP.transpose(0, 1).contiguous()
        state = grad.new_zeros(grad.shape[1:])
        if recurrence.suit(output, grad, *weights):
            gate_grad = torch.empty_like(output)  # of the first state, it needs only the size
            recurrence.Elman(output, state, None, weights.hidden, self.relu).backward(grad, state, gate_grad)
        else:
            gate_grad = (output > 0).to(output.dtype) if self.relu else 1 - output.square()
            for _, (above, gate) in _backwards(grad, gate_grad):
                torch.mm(gate.mul_(state.add_(above)), weights.hidden, out=state)
        by_row = gate_grad.transpose(0, 1)
        return Gradients(by_row, by_row, state)


def _projected(input_NTI: Tensor, weight_GI: Tensor, bias_G: Tensor | None) -> Tensor:
    """What enters the gates from the input, (T, N, G): one product, as of rows that lie apart many would be made."""
    return F.linear(input_NTI.transpose(0, 1).contiguous(), weight_GI, bias_G)


def _rows_together(grad_NTP: Tensor) -> Tensor:
    """Gradients of outputs as (T, N, P), the numbers of a row side by side."""
    grad_TNP = grad_NTP.transpose(0, 1)
    return grad_TNP if grad_TNP.stride(-1) == 1 else grad_TNP.contiguous()


def _backwards(*values_TNX: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each step and the slices at it, from the last to the first."""
    return reversed(list(enumerate(zip(*values_TNX, strict=True))))
