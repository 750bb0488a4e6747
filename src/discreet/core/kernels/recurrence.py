"""Recurrent layers on a processor, all steps of time in one call of compiled C.

Examples never meet in a recurrence. So each thread takes rows of its own through all steps, and no step waits for
another thread, or for Python; the weights are packed once, in panels of 32 columns, and stay in the cache. No number
depends on how many rows or threads there are.

Shape legend: T = time steps, N = rows, H = state width, P = output width (H, or that of an LSTM's projection), G =
width of all gates. Tensors are contiguous, but weights and the gradients of outputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discreet.core import team
from discreet.core.kernels import processor

try:
    from discreet.core.kernels import _recurrence as _compiled
except ImportError:
    _compiled = None

_COLUMNS = 32
_ROWS = 8
"""Rows that a product meets with one reading of the weights."""
_ALONE = 1 << 18
"""Multiply-adds that take no longer than it takes to wake a second thread."""
_WIDEST = 16
"""Numbers of the widest vector that may be used."""


def suit(*values: Tensor | None) -> bool:
    """Whether these are plain float32 tensors of a processor, and the compiled module was built."""
    return _compiled is not None and all(processor.is_plain(value) for value in values if value is not None)


@dataclass(frozen=True)
class Lstm:
    """``c' = f c + i g``, ``h' = o tanh(c')``, and ``W h'`` where projected.

    Attributes:
        gate_TNG: ``W x`` for the gates in, forget, candidate, out; `forward` leaves what leaves them.
        cell_TNH: (T + 1, N, H), the first cell and, written, those after each step.
        squashed_TNH, wide_TNH: written, the hyperbolic tangent of the cell after each step, and ``o tanh(c')``.
        state_TNP: written, the states; ``wide_TNH`` itself without a projection.
        first_NP: the state before the first step.
        hidden_GP, bias_G, projection_PH: the weights; the bias is the sum of both.
    """

    gate_TNG: Tensor
    cell_TNH: Tensor
    squashed_TNH: Tensor
    wide_TNH: Tensor
    state_TNP: Tensor
    first_NP: Tensor
    hidden_GP: Tensor
    bias_G: Tensor | None
    projection_PH: Tensor | None

    def forward(self) -> None:
        """All steps."""
        self._run("lstm_forward", self.hidden_GP, self.projection_PH)

    def backward(
        self, grad_TNP: Tensor, state_NP: Tensor, cell_NH: Tensor, gate_TNG: Tensor, projected_TNP: Tensor | None
    ) -> None:
        """All steps, from the last to the first.

        Args:
            grad_TNP: the gradients of the states by way of what was put out.
            state_NP: zeros; becomes the gradient of the first state.
            cell_NH: the gradient of the last cell; becomes that of the first.
            gate_TNG: written, the gradients at the gates.
            projected_TNP: written where there is a projection, the gradients of what it puts out.
        """
        steps, rows, width = self.squashed_TNH.shape
        out = self.state_TNP.shape[2]
        room_NH = None if projected_TNP is None else torch.empty_like(cell_NH)
        written = (
            _address(state_NP, rows, out), _address(cell_NH, rows, width), _address(gate_TNG, steps, rows, 4 * width),
            _address(room_NH, rows, width), _address(projected_TNP, steps, rows, out),
        )  # fmt: skip
        if (projected_TNP is None) != (self.projection_PH is None):
            raise AssertionError("a projection and the gradients of what it puts out come together")
        projection = None if self.projection_PH is None else self.projection_PH.mT
        self._run("lstm_backward", self.hidden_GP.mT, projection, _strided(grad_TNP, steps, rows, out), written)

    def _run(self, name: str, hidden: Tensor, projection: Tensor | None, *gradients: tuple[int, ...]) -> None:
        steps, rows, width = self.squashed_TNH.shape
        out = self.state_TNP.shape[2]
        is_backward = bool(gradients)
        hidden_panels = _packed(hidden, 4 * width, out, is_turned=is_backward)
        panels = None if projection is None else _packed(projection, out, width, is_turned=is_backward)
        if panels is None and out != width:
            raise AssertionError(f"states of {out} numbers, cells of {width}: without a projection they are alike")
        layer = (
            width, out, _address(self.gate_TNG, steps, rows, 4 * width),
            _address(self.cell_TNH, steps + 1, rows, width), _address(self.squashed_TNH, steps, rows, width),
            _address(self.wide_TNH, steps, rows, width), _address(self.state_TNP, steps, rows, out),
            _address(self.first_NP, rows, out), _address(self.bias_G, 4 * width), hidden_panels.data_ptr(),
            0 if panels is None else panels.data_ptr(),
        )  # fmt: skip
        _by_rows(name, steps, rows, 4 * width * out, layer, *gradients)


@dataclass(frozen=True)
class Gru:
    """``n = tanh(W x + b + r (U h + c))``, ``h' = (1 - z) n + z h``.

    Attributes:
        gate_TNG: ``W x`` for the gates reset, update, candidate; `forward` leaves what leaves them.
        inner_TNH: written, ``U h + c`` of the candidate.
        state_TNH: written, the states.
        first_NH: the state before the first step.
        bias_G: of what comes from the input.
        hidden_GH, hidden_bias_G: the weights of what comes from the state.
    """

    gate_TNG: Tensor
    inner_TNH: Tensor
    state_TNH: Tensor
    first_NH: Tensor
    bias_G: Tensor | None
    hidden_GH: Tensor
    hidden_bias_G: Tensor | None

    def forward(self) -> None:
        """All steps."""
        self._run("gru_forward", self.hidden_GH)

    def backward(self, grad_TNH: Tensor, state_NH: Tensor, input_TNG: Tensor, hidden_TNG: Tensor) -> None:
        """All steps, from the last to the first.

        Args:
            grad_TNH: the gradients of the states by way of what was put out.
            state_NH: zeros; becomes the gradient of the first state.
            input_TNG, hidden_TNG: written, the gradients of what enters the gates from the input and from the state.
        """
        steps, rows, width = self.inner_TNH.shape
        gates = (steps, rows, 3 * width)
        written = (_address(state_NH, rows, width), _address(input_TNG, *gates), _address(hidden_TNG, *gates))
        self._run("gru_backward", self.hidden_GH.mT, _strided(grad_TNH, steps, rows, width), written)

    def _run(self, name: str, hidden: Tensor, *gradients: tuple[int, ...]) -> None:
        steps, rows, width = self.inner_TNH.shape
        panels = _packed(hidden, 3 * width, width, is_turned=bool(gradients))
        room_NG = self.gate_TNG.new_empty(rows, 3 * width)
        layer = (
            width, _address(self.gate_TNG, steps, rows, 3 * width), _address(self.inner_TNH, steps, rows, width),
            _address(self.state_TNH, steps, rows, width), _address(self.first_NH, rows, width),
            _address(self.bias_G, 3 * width), panels.data_ptr(), _address(self.hidden_bias_G, 3 * width),
            room_NG.data_ptr(),
        )  # fmt: skip
        _by_rows(name, steps, rows, 3 * width * width, layer, *gradients)


@dataclass(frozen=True)
class Elman:
    """``h' = f(W x + b + U h + c)``, f the hyperbolic tangent or the positive part.

    Attributes:
        state_TNH: ``W x``; becomes the states.
        first_NH: the state before the first step.
        bias_H, hidden_HH: the weights; the bias is the sum of both.
        relu: which f.
    """

    state_TNH: Tensor
    first_NH: Tensor
    bias_H: Tensor | None
    hidden_HH: Tensor
    relu: bool

    def forward(self) -> None:
        """All steps."""
        self._run("elman_forward", self.hidden_HH)

    def backward(self, grad_TNH: Tensor, state_NH: Tensor, gate_TNH: Tensor) -> None:
        """All steps, from the last to the first.

        Args:
            grad_TNH: the gradients of the states by way of what was put out.
            state_NH: zeros; becomes the gradient of the first state.
            gate_TNH: written, the gradients of what enters f.
        """
        steps, rows, width = self.state_TNH.shape
        written = (_address(state_NH, rows, width), _address(gate_TNH, steps, rows, width))
        self._run("elman_backward", self.hidden_HH.mT, _strided(grad_TNH, steps, rows, width), written)

    def _run(self, name: str, hidden: Tensor, *gradients: tuple[int, ...]) -> None:
        steps, rows, width = self.state_TNH.shape
        panels = _packed(hidden, width, width, is_turned=bool(gradients))
        layer = (
            width, _address(self.state_TNH, steps, rows, width), _address(self.first_NH, rows, width),
            _address(self.bias_H, width), panels.data_ptr(), int(self.relu),
        )  # fmt: skip
        _by_rows(name, steps, rows, width * width, layer, *gradients)


def _packed(weight_CD: Tensor, out: int, width: int, *, is_turned: bool) -> Tensor:
    """A weight whose rows are met, ``value weight^T``, as (columns / 32, D, 32), zeros beyond the last.

    Args:
        out, width: rows and columns of the layer's own weight.
        is_turned: whether this is that weight transposed.
    """
    if weight_CD.shape != ((width, out) if is_turned else (out, width)) or weight_CD.dtype is not torch.float32:
        raise AssertionError(f"a weight {tuple(weight_CD.shape)}, {weight_CD.dtype}: read past its end")
    padded = F.pad(weight_CD, (0, 0, 0, -len(weight_CD) % _COLUMNS))
    return padded.unflatten(0, (-1, _COLUMNS)).transpose(1, 2).contiguous()


def _address(value: Tensor | None, *shape: int) -> int:
    """Where a tensor begins that lies as the compiled code reads it; 0 for none."""
    if value is None:
        return 0
    if value.shape != shape or value.dtype is not torch.float32 or not value.is_contiguous():
        raise AssertionError(f"{tuple(value.shape)}, {value.stride()}, {value.dtype} for {shape}: read past its end")
    return value.data_ptr()


def _strided(value_TNP: Tensor, *shape: int) -> tuple[int, int, int]:
    """Where a tensor begins, and how far steps and rows lie apart."""
    if value_TNP.shape != shape or value_TNP.dtype is not torch.float32 or value_TNP.stride(2) != 1:
        raise AssertionError(f"{tuple(value_TNP.shape)}, {value_TNP.stride()}, {value_TNP.dtype}: read past its end")
    return (value_TNP.data_ptr(), value_TNP.stride(0), value_TNP.stride(1))


def _by_rows(name: str, steps: int, rows: int, work: int, *described: tuple[int, ...]) -> None:
    """Run a kernel, with as many rows for each thread.

    Args:
        work: multiply-adds of one row at one step.
    """
    kernel, blocks = getattr(_compiled, name), -(-rows // _ROWS)
    threads = max(1, min(torch.get_num_threads(), blocks, steps * rows * work // _ALONE))
    edges = [min(rows, blocks * thread // threads * _ROWS) for thread in range(threads + 1)]
    team.for_each(lambda share: kernel((steps, rows, *share, _WIDEST), *described), list(itertools.pairwise(edges)))
