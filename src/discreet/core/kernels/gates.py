"""One step of an LSTM in time on a processor, all gates at once, in compiled C.

PyTorch's operations would take ten calls for it, each over numbers that lie apart; a step of 64 examples is too short
for them.

Shape legend: N = rows, H = state width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from discreet.core import team
from discreet.core.kernels import processor

try:
    from discreet.core.kernels import _gates as _compiled
except ImportError:
    _compiled = None

_ALONE = 1 << 15
"""Numbers of a state whose gates take no longer than it takes to wake a second thread."""


def suit(*values: Tensor) -> bool:
    """Whether these are plain float32 tensors of a processor, and the compiled module was built."""
    return _compiled is not None and all(processor.is_plain(value) for value in values)


def forward(gate_N4H: Tensor, before_NH: Tensor, cell_NH: Tensor, squashed_NH: Tensor, state_NH: Tensor) -> None:
    """``c' = f c + i g``, ``h' = o tanh(c')``, with what each gate lets through in its own place.

    Args:
        gate_N4H: what enters the gates (in, forget, candidate, out); becomes what leaves them. Rows may lie apart.
        before_NH: the cell before.
        cell_NH, squashed_NH, state_NH: written: the cell, its hyperbolic tangent, and the state.
    """
    gates = _rows(gate_N4H, like_NH=cell_NH)
    others = _side_by_side(before_NH, cell_NH, squashed_NH, state_NH)
    _by_rows(lambda *rows: _compiled.forward(*gates, *others, *rows), cell_NH)


def backward(
    gate_N4H: Tensor,
    before_NH: Tensor,
    squashed_NH: Tensor,
    state_grad_NH: Tensor,
    cell_grad_NH: Tensor,
    gate_grad_N4H: Tensor,
) -> None:
    """Gradients of what entered the gates.

    Args:
        gate_N4H, before_NH, squashed_NH: as `forward` left them.
        state_grad_NH: the gradient of the state.
        cell_grad_NH: that of the cell, by way of later steps; becomes that of the cell before.
        gate_grad_N4H: written. Rows may lie apart.
    """
    gates, grads = (_rows(value, like_NH=cell_grad_NH) for value in (gate_N4H, gate_grad_N4H))
    others = _side_by_side(before_NH, squashed_NH, state_grad_NH, cell_grad_NH)
    _by_rows(lambda *rows: _compiled.backward(*gates, *others, *grads, *rows), cell_grad_NH)


def _rows(gate_N4H: Tensor, *, like_NH: Tensor) -> tuple[int, int]:
    """Where all gates of the first row begin, and how far rows lie apart.

    Raises:
        AssertionError: gates of one row do not lie side by side, or are of another size than these.
    """
    rows, width = like_NH.shape
    if gate_N4H.shape != (rows, 4 * width) or gate_N4H.stride(1) != 1 or gate_N4H.dtype is not torch.float32:
        raise AssertionError(f"gates of {_layout(gate_N4H)}: the compiled code would read past their end")
    return gate_N4H.data_ptr(), gate_N4H.stride(0)


def _side_by_side(*values_NH: Tensor) -> tuple[int, ...]:
    """Where these values begin.

    Raises:
        AssertionError: they are of several sizes, or have gaps.
    """
    for value in values_NH:
        if value.shape != values_NH[0].shape or not value.is_contiguous() or value.dtype is not torch.float32:
            raise AssertionError(f"rows of {_layout(value)}: the compiled code would read past their end")
    return tuple(value.data_ptr() for value in values_NH)


def _layout(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}, strides {value.stride()}, {value.dtype}"


def _by_rows(kernel: Callable[[int, int, int], None], like_NH: Tensor) -> None:
    """Run a kernel, with as many rows for each thread."""
    rows, width = like_NH.shape
    threads = min(torch.get_num_threads(), rows, like_NH.numel() // _ALONE)
    if threads < 2:
        kernel(0, rows, width)
        return
    edges = [rows * thread // threads for thread in range(threads + 1)]
    team.for_each(lambda share: kernel(*share, width), list(itertools.pairwise(edges)))
