"""Recurrent layers and cells: LSTM, GRU, tanh and ReLU networks.

A stack of layers is written in single layers of one direction, which are met by a rule that runs over all steps of time
at once: one product projects every input, and a loop carries the state. The backward loops over the state alone, with
``d_gate_t = d_state_t * factor_t`` and all factors computed beforehand. Every weight then books one outer product with
T positions, and no record is made per step.

Shape legend: T = time steps, B = examples (N = rows: B, or B folded), I = inputs, H = state width, P = output width (H,
or that of an LSTM's projection), G = width of all gates (H times their number).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from discreet.core.book import Book
from discreet.core.forms import Dense, Form
from discreet.core.outer import Outer
from discreet.core.parameter import Guarded, Use, decomposition, plain, rule
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse

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
        projection: of an LSTM that has one, its input (T, N, H) and the gradient of its output (T, N, P).
    """

    input_TNG: Tensor
    hidden_TNG: Tensor
    state_NP: Tensor
    cell_NH: Tensor | None = None
    projection: tuple[Tensor, Tensor] | None = None


class Cell(abc.ABC):
    """The arithmetic of one kind of layer, in one direction and over all steps. Pure; no tensor given is changed."""

    @abc.abstractmethod
    def forward(
        self, input_TNI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """All outputs (T, N, P), the last cell state of an LSTM, and what `backward` needs besides the outputs."""

    @abc.abstractmethod
    def backward(
        self, grad_TNP: Tensor, grad_cell_NH: Tensor | None, before_TNP: Tensor, output_TNP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        """Gradients of everything but weights and inputs. ``before`` are the states that the steps started from."""


class Lstm(Cell):
    """Gates in, forget, candidate, out: ``c' = f c + i g``, ``h' = o tanh(c')``, and ``W_hr h'`` where projected."""

    def forward(
        self, input_TNI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        assert cell_NH is not None
        steps, (rows, width) = len(input_TNI), cell_NH.shape
        gate_TNG = F.linear(input_TNI, weights.input, weights.bias)
        cell = gate_TNG.new_empty(steps + 1, rows, width)
        cell[0] = cell_NH
        squashed, wide = (gate_TNG.new_empty(steps, rows, width) for _ in range(2))
        output = wide if weights.projection is None else gate_TNG.new_empty(steps, rows, len(weights.projection))
        enter, forget, candidate, leave = gate_TNG.chunk(4, -1)
        both = gate_TNG[:, :, : 2 * width]
        for gate, pair, i, f, g, o, old, new, q, h, result in _steps(
            gate_TNG, both, enter, forget, candidate, leave, cell[:-1], cell[1:], squashed, wide, output
        ):
            gate.addmm_(state_NP, weights.hidden.mT)
            pair.sigmoid_()
            torch.mul(f, old, out=new).addcmul_(i, g.tanh_())
            torch.mul(o.sigmoid_(), torch.tanh(new, out=q), out=h)
            if weights.projection is not None:
                torch.mm(h, weights.projection.mT, out=result)
            state_NP = result
        return output, cell[-1].clone(), (gate_TNG, cell, squashed, wide)

    def backward(
        self, grad_TNP: Tensor, grad_cell_NH: Tensor | None, before_TNP: Tensor, output_TNP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        assert grad_cell_NH is not None
        gate, cell, squashed, wide = kept
        enter, forget, candidate, leave = gate.chunk(4, -1)
        grad_TN4H = gate.new_empty(*forget.shape[:2], 4, forget.shape[2])
        _aten.sigmoid_backward.grad_input(candidate, enter, grad_input=grad_TN4H[:, :, 0])
        _aten.sigmoid_backward.grad_input(cell[:-1], forget, grad_input=grad_TN4H[:, :, 1])
        _aten.tanh_backward.grad_input(enter, candidate, grad_input=grad_TN4H[:, :, 2])
        _aten.sigmoid_backward.grad_input(squashed, leave, grad_input=grad_TN4H[:, :, 3])
        through = _aten.tanh_backward(leave, squashed)
        grad_TNG = grad_TN4H.flatten(2)
        projected = None if weights.projection is None else torch.empty_like(grad_TNP)
        state, memory = torch.zeros_like(grad_TNP[0]), grad_cell_NH.clone()
        for step, (grad, inner, out, flat, opened, kept_part) in _backwards(
            grad_TNP, grad_TN4H[:, :, :3], grad_TN4H[:, :, 3], grad_TNG, through, forget
        ):
            above = state.add_(grad)
            if weights.projection is not None and projected is not None:
                above = projected[step].copy_(state) @ weights.projection
            memory.addcmul_(above, opened)
            inner.mul_(memory.unsqueeze(1))
            out.mul_(above)
            memory.mul_(kept_part)
            torch.mm(flat, weights.hidden, out=state)
        return Gradients(grad_TNG, grad_TNG, state, memory, None if projected is None else (wide, projected))


class Gru(Cell):
    """Gates reset, update, candidate: ``n = tanh(W x + b + r (U h + c))``, ``h' = (1 - z) n + z h``."""

    def forward(
        self, input_TNI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        width = state_NP.shape[1]
        gate_TNG = F.linear(input_TNI, weights.input, weights.input_bias)
        inner, output = (gate_TNG.new_empty(len(gate_TNG), *state_NP.shape) for _ in range(2))
        both, candidate = gate_TNG[:, :, : 2 * width], gate_TNG[:, :, 2 * width :]
        for pair, n, kept, result in _steps(both, candidate, inner, output):
            part = F.linear(state_NP, weights.hidden, weights.hidden_bias)
            reset, update = pair.add_(part[:, : 2 * width]).sigmoid_().chunk(2, 1)
            n.addcmul_(reset, kept.copy_(part[:, 2 * width :])).tanh_()
            state_NP = torch.lerp(n, state_NP, update, out=result)
        return output, None, (gate_TNG, inner)

    def backward(
        self, grad_TNP: Tensor, grad_cell_NH: Tensor | None, before_TNP: Tensor, output_TNP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        gate, inner = kept
        reset, update, candidate = gate.chunk(3, -1)
        steps, rows, width = reset.shape
        grad_TN4H = gate.new_empty(steps, rows, 4, width)  # reset, update, candidate behind and before the reset gate
        reset_grad, update_grad, hidden_grad, input_grad = grad_TN4H.unbind(2)
        _aten.tanh_backward.grad_input(1 - update, candidate, grad_input=input_grad)
        torch.mul(input_grad, reset, out=hidden_grad)
        _aten.sigmoid_backward.grad_input(input_grad * inner, reset, grad_input=reset_grad)
        _aten.sigmoid_backward.grad_input(before_TNP - candidate, update, grad_input=update_grad)
        flat = grad_TN4H.flatten(2)
        hidden_TNG = flat[:, :, : 3 * width]
        state = torch.zeros_like(grad_TNP[0])
        for _, (grad, each, hidden, carried) in _backwards(grad_TNP, grad_TN4H, hidden_TNG, update):
            each.mul_(state.add_(grad).unsqueeze(1))
            state.mul_(carried).addmm_(hidden, weights.hidden)
        input_TNG = torch.cat([flat[:, :, : 2 * width], input_grad], -1)
        return Gradients(input_TNG, hidden_TNG, state)


class Elman(Cell):
    """``h' = f(W x + b + U h + c)`` with f the hyperbolic tangent, or the positive part."""

    def __init__(self, *, relu: bool) -> None:
        self.relu = relu

    def forward(
        self, input_TNI: Tensor, state_NP: Tensor, cell_NH: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        gate_TNG = F.linear(input_TNI, weights.input, weights.bias)
        output = torch.empty_like(gate_TNG)
        squash = functools.partial(torch.clamp, min=0) if self.relu else torch.tanh
        for gate, result in _steps(gate_TNG, output):
            state_NP = squash(gate.addmm_(state_NP, weights.hidden.mT), out=result)
        return output, None, ()

    def backward(
        self, grad_TNP: Tensor, grad_cell_NH: Tensor | None, before_TNP: Tensor, output_TNP: Tensor, weights: Weights,
        kept: tuple[Tensor, ...],
    ) -> Gradients:  # fmt: skip
        grad_TNG = (output_TNP > 0).to(output_TNP.dtype) if self.relu else 1 - output_TNP.square()
        state = torch.zeros_like(grad_TNP[0])
        for _, (grad, gate) in _backwards(grad_TNP, grad_TNG):
            torch.mm(gate.mul_(state.add_(grad)), weights.hidden, out=state)
        return Gradients(grad_TNG, grad_TNG, state)


def _steps(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The slices of these tensors at each step. All views are made at once: singly they take as long as the work."""
    return zip(*(value.unbind() for value in values), strict=True)


def _backwards(*values: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each step and the slices at it, from the last to the first."""
    return reversed(list(enumerate(_steps(*values))))


def recurrent_layer(
    cell: Cell, input_BTI: Tensor, state_BP: Tensor, cell_BH: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """One layer in one direction with a guarded weight: all outputs (B, T, P), and an LSTM's last cell state."""
    values = tuple(value for value in weights if value is not None)
    return handle_torch_function(recurrent_layer, values, cell, input_BTI, state_BP, cell_BH, weights)


@rule(recurrent_layer)
def meet_layer(
    use: Use, cell: Cell, input_BTI: Tensor, state_BP: Tensor, cell_BH: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """The rule of `recurrent_layer`."""
    if isinstance(input_BTI, Guarded) or not use.is_batched(input_BTI):
        raise use.refuse("its input does not carry the batch", "pass activations [batch, time, features].")
    if any(not isinstance(value, Guarded) and value is not None and value.requires_grad for value in weights):
        raise use.refuse("a weight depends on the examples", "write the recurrence out step by step.")
    where = tuple(use.derivation(value) if isinstance(value, Guarded) else None for value in weights)
    plain_weights = Weights(*(plain(value) for value in weights))
    input_TBI = input_BTI.transpose(0, 1)
    output_TBP, last = _Unroll.apply(use.book.sink, cell, use.book, where, input_TBI, state_BP, cell_BH, *plain_weights)
    return output_TBP.transpose(0, 1), last


class _Unroll(torch.autograd.Function):
    """`Cell.forward`; its backward returns the gradients of input and states, and books those of the weights."""

    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, cell: Cell, book: Book, where: tuple[Derivation | None, ...], input: Tensor,
        state: Tensor, memory: Tensor | None, *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.cell, ctx.book, ctx.where = cell, book, where
        with torch.autocast(input.device.type, enabled=False):
            output, last, kept = cell.forward(input, state, memory, Weights(*weights))
        ctx.save_for_backward(input, state, output, *weights, *kept)
        return output, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        input, state, output, *rest = ctx.saved_tensors
        count = len(Weights._fields)
        weights, kept = Weights(*rest[:count]), tuple(rest[count:])
        before = torch.cat([state.unsqueeze(1), output[:-1].transpose(0, 1)], 1).transpose(0, 1)
        with torch.autocast(input.device.type, enabled=False):
            found = ctx.cell.backward(grad, grad_last, before, output, weights, kept)
            input_grad = found.input_TNG @ weights.input if ctx.needs_input_grad[4] else None
        pairs = _pairs(found, input, before)
        for derivation, (entered, gradient) in zip(ctx.where, pairs, strict=True):
            if derivation is not None:
                ctx.book.record(derivation, _form(entered, gradient, examples=ctx.book.examples))
        return None, None, None, None, input_grad, found.state_NP, found.cell_NH, *[None] * count


def _pairs(found: Gradients, input_TNI: Tensor, before_TNP: Tensor) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
    """For each of `Weights`, what it was multiplied with and the gradient of the product, as (N, T, ...)."""
    input_NTG = found.input_TNG.transpose(0, 1).contiguous()  # met twice by norm and sum: strides would cost more
    hidden_NTG = input_NTG if found.hidden_TNG is found.input_TNG else found.hidden_TNG.transpose(0, 1).contiguous()
    wide, projected = (None, None) if found.projection is None else (x.transpose(0, 1) for x in found.projection)
    entered = input_TNI.transpose(0, 1), before_TNP.transpose(0, 1)
    return (entered[0], input_NTG), (entered[1], hidden_NTG), (None, input_NTG), (None, hidden_NTG), (wide, projected)


def _form(entered_NTI: Tensor | None, gradient_NTO: Tensor | None, *, examples: int) -> Form:
    """Per-example gradients of a weight, or of a bias, with which nothing is multiplied."""
    assert gradient_NTO is not None
    grad_BKSO = gradient_NTO.reshape(examples, 1, -1, gradient_NTO.shape[-1])
    if entered_NTI is None:
        return Dense(grad_BKSO.sum((1, 2), dtype=torch.promote_types(grad_BKSO.dtype, torch.float32)))
    input_BKSI = entered_NTI.reshape(examples, 1, -1, entered_NTI.shape[-1])
    return Outer(input_BKSI, grad_BKSO, torch.Size((grad_BKSO.shape[-1], input_BKSI.shape[-1])))


class _Kind(NamedTuple):
    """A family: PyTorch's function for whole stacks, its function for one step, and the arithmetic of a layer."""

    stack: Callable[..., Any]
    step: Callable[..., Any]
    cell: Cell


def _layer(kind: _Kind, input_TBI: Tensor, states: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
    """One layer in one direction: all outputs (T, B, P), then the last states (B, P) and, for an LSTM, (B, H)."""
    if isinstance(input_TBI, Guarded):
        raise UnsupportedUse(
            f"{kind.stack.__name__}: its input is a parameter; pass activations, and embed them before."
        )
    # A trained first state, repeated for every example, is a table in which each example looks up its own row.
    ids = torch.arange(input_TBI.shape[1], device=input_TBI.device)
    states = [F.embedding(ids, state) if isinstance(state, Guarded) else state for state in states]
    if not has_torch_function(tuple(value for value in weights if value is not None)):
        return _frozen_layer(kind, input_TBI, states, weights)
    known = input_TBI.to(weights.input.dtype), *(state.to(weights.input.dtype) for state in states)
    output_BTP, last = recurrent_layer(kind.cell, known[0].transpose(0, 1), known[1], (*known, None)[2], weights)
    output_TBP = output_BTP.transpose(0, 1)
    return (output_TBP, output_TBP[-1]) if last is None else (output_TBP, output_TBP[-1], last)


def _frozen_layer(kind: _Kind, input_TBI: Tensor, states: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
    first = [state.unsqueeze(0) for state in states]
    values = [value for value in weights if value is not None]
    options = (weights.input_bias is not None, 1, 0.0, False, False, False)
    output_TBP, *last = kind.stack(input_TBI, first if kind is _LSTM else first[0], values, *options)
    return output_TBP, *(state[0] for state in last)


def _stack(
    kind: _Kind, input: Tensor, hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers: outputs as the input lies, and the last states of each layer and direction, (layers, B, P)."""
    if not isinstance(has_biases, bool):  # the form for packed sequences has one argument more in front
        raise UnsupportedUse(
            f"{kind.stack.__name__}: a packed sequence has no batch axis; pass the padded one, "
            "and read each example's output at its own length."
        )
    states = tuple(hx) if kind is _LSTM else (hx,)
    directions = 2 if bidirectional else 1
    layers = _weights(params, num_layers * directions, has_biases=has_biases)
    value_TBX, ends = input.transpose(0, 1) if batch_first else input, []
    for layer in range(num_layers):
        outputs = []
        for slot in range(layer * directions, (layer + 1) * directions):
            turn = slot % directions == 1
            first = [state[slot] for state in states]
            output, *last = _layer(kind, value_TBX.flip(0) if turn else value_TBX, first, layers[slot])
            outputs.append(output.flip(0) if turn else output)
            ends.append(last)
        value_TBX = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if layer < num_layers - 1:
            value_TBX = F.dropout(value_TBX, dropout, train)
    result = value_TBX.transpose(0, 1) if batch_first else value_TBX
    return result, *(torch.stack(part) for part in zip(*ends, strict=True))


def _step(
    kind: _Kind, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:  # fmt: skip
    """One step of one layer: its new state, or states."""
    states = tuple(hx) if kind is _LSTM else (hx,)
    _, *last = _layer(kind, input.unsqueeze(0), states, Weights(w_ih, w_hh, b_ih, b_hh))
    return tuple(last) if kind is _LSTM else last[0]


def _weights(params: Sequence[Tensor], count: int, *, has_biases: bool) -> list[Weights]:
    """The flat list of a stack, layer by layer and direction by direction."""
    each, found = len(params) // count, []
    for start in range(0, len(params), each):
        matrices, rest = params[start : start + 2], params[start + 2 : start + each]
        biases = rest[:2] if has_biases else (None, None)
        found.append(Weights(*matrices, *biases, *rest[2 if has_biases else 0 :]))
    return found


_LSTM = _Kind(torch.lstm, torch.lstm_cell, Lstm())
_KINDS = (
    _LSTM,
    _Kind(torch.gru, torch.gru_cell, Gru()),
    _Kind(torch.rnn_tanh, torch.rnn_tanh_cell, Elman(relu=False)),
    _Kind(torch.rnn_relu, torch.rnn_relu_cell, Elman(relu=True)),
)
for _kind in _KINDS:
    decomposition(_kind.stack)(functools.partial(_stack, _kind))
    decomposition(_kind.step)(functools.partial(_step, _kind))
