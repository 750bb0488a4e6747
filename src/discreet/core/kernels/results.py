"""What the kernels return, and PyTorch's arithmetic in `discreet.core.outer` too.

Shape legend: B = examples, K = groups, S = positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

HARMLESS, NEARER = 1e-24, 0.75
"""What squares that vanished below the normal numbers may come to, whatever stands beside them; and the share of the
largest squared length over which norms grow until they are out of reach."""


@dataclass(frozen=True)
class GramProducts:
    """What a Gram norm is made from, before rounding is added.

    Attributes:
        total_B: ``sum_kst <input_s, input_t> <grad_s, grad_t>``, float64.
        input2_BKS, grad2_BKS: squared norms of the positions, in the precision of the computation.
        spacings: bound on the error of ``total_B``, in spacings of that precision of ``(sum_s |input_s| |grad_s|)^2``.
    """

    total_B: Tensor
    input2_BKS: Tensor
    grad2_BKS: Tensor
    spacings: float


@dataclass(frozen=True)
class Squares:
    """Squared lengths of per-example gradients, before rounding is added.

    Attributes:
        total_B: sum of squares, float64.
        spacings: bound on the error of the gradients, in float32 spacings of ``sum_s |input_s| |grad_s|``.
    """

    total_B: Tensor
    spacings: float
