"""What a classifier said and what was true: the one input of everything about calibration.

Shape legend: N = examples, K = classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from discreet.errors import DataError

LOWEST = math.log(5e-324)
"""Log-probability that stands for 0 where a product with it is taken: that of the smallest number of float64."""

_FURTHEST = -1e300
"""No score lies further from the largest one: a hundred times as much is still a number."""

_SUM_TOLERANCE = 1e-2
"""How far the probabilities of a row may be from 1 in sum: half precision and rounded files come with such errors."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted probabilities of N examples with their labels; make one with `from_logits` or `from_probabilities`.

    Attributes:
        log_probability_NK: natural logarithms, float64, on the CPU; ``-inf`` where a probability of 0 was given.
        target_N: class indices in ``[0, K)``, int64.
        groups: a public name of each example's group, or None.
    """

    log_probability_NK: Tensor
    target_N: Tensor
    groups: tuple[str, ...] | None = None

    @classmethod
    def from_logits(
        cls, logits_NK: Tensor | np.ndarray, target_N: Tensor | np.ndarray, *, groups: Sequence[str] | None = None
    ) -> Predictions:
        """From scores before the softmax, of any size.

        Raises:
            DataError: shapes, labels or groups do not fit, no row, one class, or a logit that is NaN or infinite.
        """
        logits = _matrix(logits_NK)
        broken = int((~torch.isfinite(logits).all(1)).sum())
        if broken:
            raise DataError(
                f"logits: {broken} of {len(logits)} rows are not finite; leave them out, or mend the model."
            )
        # The largest logit first: log_softmax would otherwise lose huge ones to overflow.
        return cls._made(torch.log_softmax(logits - logits.amax(1, keepdim=True), 1), target_N, groups)

    @classmethod
    def from_probabilities(
        cls, probability_NK: Tensor | np.ndarray, target_N: Tensor | np.ndarray, *, groups: Sequence[str] | None = None
    ) -> Predictions:
        """From probabilities; each row is divided by its sum, which must be 1 but for rounding.

        Raises:
            DataError: as `from_logits`, or a row that is no distribution.
        """
        probability = _matrix(probability_NK)
        total_N1 = probability.sum(1, keepdim=True)
        good_N = (probability >= 0).all(1) & ((total_N1 - 1).abs() <= _SUM_TOLERANCE).squeeze(1)
        if not bool(good_N.all()):
            raise DataError(
                f"probabilities: {int((~good_N).sum())} of {len(good_N)} rows are negative or do not sum to 1; "
                "if they are logits, say so."
            )
        return cls._made((probability / total_N1).log(), target_N, groups)

    @classmethod
    def _made(
        cls, log_probability_NK: Tensor, target_N: Tensor | np.ndarray, groups: Sequence[str] | None
    ) -> Predictions:
        target = _labels(target_N, rows=len(log_probability_NK), classes=log_probability_NK.shape[1])
        named = None if groups is None else tuple(str(name) for name in groups)
        if named is not None and len(named) != len(target):
            raise DataError(f"groups: {len(named)} names for {len(target)} rows; give one for each row.")
        return cls(log_probability_NK=log_probability_NK, target_N=target, groups=named)

    def __len__(self) -> int:
        return len(self.target_N)

    @property
    def classes(self) -> int:
        """K."""
        return self.log_probability_NK.shape[1]

    @cached_property
    def probability_NK(self) -> Tensor:
        """Probabilities, float64."""
        return self.log_probability_NK.exp()

    @cached_property
    def confidence_N(self) -> Tensor:
        """Probability of the most probable class."""
        return self.probability_NK.amax(1)

    @cached_property
    def correct_N(self) -> Tensor:
        """1 where the most probable class is the true one (of several, the first counts), else 0; float64."""
        return (self.log_probability_NK.argmax(1) == self.target_N).to(torch.float64)

    @cached_property
    def scores_NK(self) -> Tensor:
        """Log-probabilities without infinities: what a temperature divides."""
        infinite_NK = torch.isinf(self.log_probability_NK)
        return torch.where(infinite_NK, LOWEST, self.log_probability_NK).clamp(min=_FURTHEST)

    def at_temperature(self, temperature: float) -> Predictions:
        """The same predictions with logits divided by a temperature above 0. The most probable class stays."""
        scaled_NK = torch.log_softmax(self.scores_NK / temperature, 1)
        return replace(self, log_probability_NK=scaled_NK)

    def rows(self, mask_N: Tensor) -> Predictions:
        """The examples where a mask holds; their groups are dropped."""
        return Predictions(log_probability_NK=self.log_probability_NK[mask_N], target_N=self.target_N[mask_N])


def _matrix(values_NK: Tensor | np.ndarray) -> Tensor:
    matrix = torch.as_tensor(values_NK).detach().to(device="cpu", dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or not len(matrix):
        raise DataError(
            f"predictions of shape {tuple(matrix.shape)}: must be (rows, classes), with 1 row and 2 classes at least."
        )
    return matrix


def _labels(target_N: Tensor | np.ndarray, *, rows: int, classes: int) -> Tensor:
    target = torch.as_tensor(target_N).detach().cpu()
    if target.shape != (rows,) or target.is_floating_point() or target.is_complex():
        raise DataError(f"labels of shape {tuple(target.shape)}: must be whole numbers, one for each of {rows} rows.")
    target = target.to(torch.int64)
    outside = int(((target < 0) | (target >= classes)).sum())
    if outside:
        raise DataError(f"labels: {outside} of {rows} are outside 0 to {classes - 1}; leave those rows out.")
    return target
