"""One step of an LSTM in time on a processor, all gates at once, in compiled C.

PyTorch's operations would take ten calls for it, each over numbers that lie apart; a step of 64 examples is too short
for them.

Shape legend: N = rows, H = state width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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
    _by_rows(_compiled.forward, cell_NH, [gate_N4H, before_NH, cell_NH, squashed_NH, state_NH])


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
    _by_rows(
        _compiled.backward, cell_grad_NH, [gate_N4H, before_NH, squashed_NH, state_grad_NH, cell_grad_NH, gate_grad_N4H]
    )


def _by_rows(kernel: Callable[..., None], like_NH: Tensor, values: Sequence[Tensor]) -> None:
    """Run a kernel on values that lie as it reads them, with as many rows for each thread."""
    rows, width = like_NH.shape
    described: list[int] = []
    for value in values:
        is_gate = value.shape == (rows, 4 * width) and value.stride(1) == 1
        fits = is_gate or (value.shape == (rows, width) and value.is_contiguous())
        if not fits or value.dtype is not torch.float32:
            raise AssertionError(f"shape {tuple(value.shape)}, {value.stride()}, {value.dtype}: read past their end")
        described += (value.data_ptr(), value.stride(0)) if is_gate else (value.data_ptr(),)
    threads = max(1, min(torch.get_num_threads(), rows, like_NH.numel() // _ALONE))
    if threads == 1:
        kernel(*described, 0, rows, width)
        return
    edges = [rows * thread // threads for thread in range(threads + 1)]
    team.for_each(lambda share: kernel(*described, *share, width), list(itertools.pairwise(edges)))
