"""Recurrent layers and cells: LSTM, GRU, tanh and ReLU networks.

A stack of layers is written in single layers of one direction, which are met by a rule that runs over all steps of time
at once (`discreet.core.rules.cells`). Every weight then books one outer product with T positions, and no record is
made per step.

Shape legend: T = time steps, B = examples (N = rows: B, or B folded), I = inputs, H = state width, P = output width (H,
or that of an LSTM's projection), G = width of all gates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from discreet.core.book import Book
from discreet.core.forms import Dense, Form, wide_dtype
from discreet.core.outer import Outer
from discreet.core.parameter import Guarded, Use, decomposition, plain, rule
from discreet.core.rules.cells import Cell, Elman, Gradients, Gru, Lstm, Weights
from discreet.core.rules.once import differentiable_once
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse


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
    return _Unroll.apply(use.book.sink, cell, use.book, where, input_BTI, state_BP, cell_BH, *plain_weights)


class _Unroll(torch.autograd.Function):
    """`Cell.forward`; its backward returns the gradients of input and states, and books those of the weights."""

    @staticmethod
    def forward(
        ctx: Any, sink: Tensor, cell: Cell, book: Book, where: tuple[Derivation | None, ...], input: Tensor,
        state: Tensor, memory: Tensor | None, *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.cell, ctx.book, ctx.where = cell, book, where
        input = input.contiguous()  # met by one product here, and by norm and sum in the backward
        with torch.autocast(input.device.type, enabled=False):
            output, last, kept = cell.forward(input, state, memory, Weights(*weights))
        output = output.transpose(0, 1)
        ctx.save_for_backward(input, state, output, *weights, *kept)
        return output, last

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        input, state, output, *rest = ctx.saved_tensors
        count = len(Weights._fields)
        weights, kept = Weights(*rest[:count]), tuple(rest[count:])
        before = torch.cat([state.unsqueeze(0), output.transpose(0, 1)[:-1]]).transpose(0, 1)
        with torch.autocast(input.device.type, enabled=False):
            found = ctx.cell.backward(grad, grad_last, before, output, weights, kept)
            input_grad = _times(found.input_NTG, weights.input) if ctx.needs_input_grad[4] else None
        for derivation, form in zip(ctx.where, _forms(found, input, before, examples=ctx.book.examples), strict=True):
            if derivation is not None:
                assert form is not None
                ctx.book.record(derivation, form)
        return None, None, None, None, input_grad, found.state_NP, found.cell_NH, *[None] * count


def _times(grad_NTG: Tensor, weight_GI: Tensor) -> Tensor:
    """A product over rows in the order in which they lie in memory."""
    if grad_NTG.is_contiguous():
        return grad_NTG @ weight_GI
    return (grad_NTG.transpose(0, 1) @ weight_GI).transpose(0, 1)


def _forms(
    found: Gradients, input_NTI: Tensor, before_NTP: Tensor, *, examples: int
) -> tuple[Form, Form, Form, Form, Form | None]:
    """Per-example gradients of each of `Weights`. Both biases share one, where both enter as a sum."""
    bias = _of_bias(found.input_NTG, examples=examples)
    return (
        _of_weight(input_NTI, found.input_NTG, examples=examples),
        _of_weight(before_NTP, found.hidden_NTG, examples=examples),
        bias,
        bias if found.hidden_NTG is found.input_NTG else _of_bias(found.hidden_NTG, examples=examples),
        None if found.projection is None else _of_weight(*found.projection, examples=examples),
    )


def _of_weight(entered_NTI: Tensor, grad_NTO: Tensor, *, examples: int) -> Form:
    input_BKSI, grad_BKSO = (value.reshape(examples, 1, -1, value.shape[-1]) for value in (entered_NTI, grad_NTO))
    return Outer(input_BKSI, grad_BKSO, torch.Size((grad_BKSO.shape[-1], input_BKSI.shape[-1])))


def _of_bias(grad_NTO: Tensor, *, examples: int) -> Form:
    return Dense(grad_NTO.reshape(examples, -1, grad_NTO.shape[-1]).sum(1, dtype=wide_dtype(grad_NTO)))


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
    options = (weights.input_bias is not None, 1, 0.0, True, False, False)  # without "train" cuDNN has no backward
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
