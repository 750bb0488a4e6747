"""Gradients of the scale and the shift of a normalisation on a processor, for each example: read once by compiled C.

Sums are float32 in blocks of 128 positions, which meet in float64. No number depends on how many threads there are.

Shape legend: N = rows of the input (examples, or several of one), S = positions, D = normalised numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from discreet.core import team
from discreet.core.kernels import processor

try:
    from discreet.core.kernels import _affine as _compiled
except ImportError:
    _compiled = None

_ALONE = 1 << 16
"""Numbers that are read in no more time than it takes to wake a second thread."""
_WIDEST = 16
"""Numbers of the widest vector that may be used."""


def suit(*operands: Tensor) -> bool:
    """Whether these are plain float32 tensors of a processor, and the compiled module was built."""
    return _compiled is not None and all(processor.is_plain(value) for value in operands)


def scale_grads(input_NSD: Tensor, grad_NSD: Tensor, mean_NS: Tensor, rstd_NS: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_s grad (input - mean) rstd`` and ``sum_s grad``, both (N, D), float32.

    Args:
        input_NSD, grad_NSD, mean_NS, rstd_NS: contiguous, `suit`ed.

    Raises:
        AssertionError: operands of other sizes than the input, or laid out otherwise.
    """
    rows, positions, width = input_NSD.shape
    each, one = input_NSD.shape, input_NSD.shape[:2]
    for value, shape in ((input_NSD, each), (grad_NSD, each), (mean_NS, one), (rstd_NS, one)):
        if value.shape != shape or value.dtype is not torch.float32 or not value.is_contiguous() or not value.is_cpu:
            raise AssertionError(f"{tuple(value.shape)}, {value.stride()}, {value.dtype}: read past its end")
    scale = torch.empty((rows, width), dtype=torch.float32, device="cpu")
    shift = torch.empty_like(scale)
    operands = (input_NSD, grad_NSD, mean_NS, rstd_NS, scale, shift)
    described = (*(value.data_ptr() for value in operands), positions, width)
    threads = max(1, min(torch.get_num_threads(), rows, input_NSD.numel() // _ALONE))
    team.for_rows(functools.partial(_compiled.scale_grads, described, _WIDEST), rows, threads)
    return scale, shift
