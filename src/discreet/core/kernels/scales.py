"""Gradients of the scale and the shift of a normalisation on a processor, for each example: read once by compiled C.

Sums are float32 in blocks of 128 positions or 2,048 pixels, which meet in float64. No number depends on how many
threads there are.

Shape legend: N = rows of the input (examples, or several of one), S = positions, D = normalised numbers, G = groups,
C = channels of all groups, P = pixels.
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
    _demand((input_NSD, each), (grad_NSD, each), (mean_NS, one), (rstd_NS, one))
    scale = torch.empty((rows, width), dtype=torch.float32, device="cpu")
    shift = torch.empty_like(scale)
    operands = (input_NSD, grad_NSD, mean_NS, rstd_NS, scale, shift)
    described = (*(value.data_ptr() for value in operands), positions, width)
    team.for_rows(functools.partial(_compiled.scale_grads, described, _WIDEST), rows, _threads(input_NSD, rows))
    return scale, shift


def group_grads(
    input_NCP: Tensor, grad_NCP: Tensor, mean_NG: Tensor, rstd_NG: Tensor, weight_C: Tensor, *, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """All gradients of a group norm: of its input, (N, C, P), where it is asked for, of scale and of shift, (N, C).

    Args:
        input_NCP, grad_NCP, mean_NG, rstd_NG, weight_C: contiguous, `suit`ed.

    Raises:
        AssertionError: operands of other sizes than the input, or laid out otherwise.
    """
    rows, channels, pixels = input_NCP.shape
    groups = mean_NG.shape[1]
    each, one = input_NCP.shape, (rows, groups)
    _demand(
        (input_NCP, each),
        (grad_NCP, each),
        (mean_NG, one),
        (rstd_NG, one),
        (weight_C, (groups * (channels // groups),)),
    )
    into = torch.empty_like(input_NCP) if input_grad else None
    scale = torch.empty((rows, channels), dtype=torch.float32, device="cpu")
    shift = torch.empty_like(scale)
    operands = (value.data_ptr() for value in (input_NCP, grad_NCP, mean_NG, rstd_NG, weight_C))
    found = (0 if into is None else into.data_ptr(), scale.data_ptr(), shift.data_ptr())
    described = (*operands, *found, groups, channels // groups, pixels)
    units = rows * groups
    team.for_rows(functools.partial(_compiled.group_grads, described, _WIDEST), units, _threads(input_NCP, units))
    return into, scale, shift


def _demand(*operands: tuple[Tensor, tuple[int, ...]]) -> None:
    for value, shape in operands:
        if value.shape != shape or value.dtype is not torch.float32 or not value.is_contiguous() or not value.is_cpu:
            raise AssertionError(f"{tuple(value.shape)}, {value.stride()}, {value.dtype}: read past its end")


def _threads(value: Tensor, units: int) -> int:
    return max(1, min(torch.get_num_threads(), units, value.numel() // _ALONE))
