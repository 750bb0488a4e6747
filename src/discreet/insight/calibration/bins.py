"""Bins of confidence: how often one was right among those who were so sure, and the errors that follow.

Shape legend: N = examples, K = classes, M = bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from discreet.errors import ConfigError
from discreet.insight.calibration.predictions import Predictions

BINS = 15
LEAST_SHARE = 0.01
"""A bin with a smaller share of the examples says nothing about the largest gap."""


@dataclass(frozen=True)
class Bins:
    """Sums over bins of confidence.

    Attributes:
        edges: M + 1 borders from 0 to 1. A bin holds its right border and not its left one; the first holds 0 as well.
            For bins of equal mass, the smallest and largest confidence seen stand for them.
        count_M, confidence_M, correct_M, variance_M: number of examples, and sums of confidence p, of right answers and
            of p (1 - p), float64.
    """

    edges: tuple[float, ...]
    count_M: Tensor
    confidence_M: Tensor
    correct_M: Tensor
    variance_M: Tensor

    @property
    def examples(self) -> float:
        """N."""
        return float(self.count_M.sum())

    @property
    def gap_M(self) -> Tensor:
        """``S_m``, the sum of (right - confidence) in each bin; its absolute value over N is the bin's part in ECE."""
        return self.correct_M - self.confidence_M

    @property
    def ece(self) -> float:
        """``sum_m |S_m| / N`` (Eq. 3, arXiv:1706.04599); 0 without examples."""
        return float(self.gap_M.abs().sum() / self.examples) if self.examples else 0.0

    @property
    def rms(self) -> float:
        """``sqrt(sum_m (n_m / N) (S_m / n_m)^2)``."""
        return math.sqrt(self._squared(torch.zeros_like(self.count_M)))

    @property
    def rms_debiased(self) -> float:
        """The same without what chance adds: ``a_m (1 - a_m) / (n_m - 1)`` is taken off each squared gap, ``a_m`` the
        share of right answers (arXiv:1909.10155, section 4). Bins of one example are left out; never below 0."""
        share_M = self.correct_M / self.count_M.clamp(min=1)
        chance_M = share_M * (1 - share_M) / (self.count_M - 1).clamp(min=1)
        alone = self.count_M < 2
        return math.sqrt(max(0.0, self._squared(torch.where(alone, torch.inf, chance_M))))

    def _squared(self, off_M: Tensor) -> float:
        if not self.examples:
            return 0.0
        size_M = self.count_M.clamp(min=1)
        counted = (self.count_M > 0) & torch.isfinite(off_M)
        each_M = torch.where(counted, (self.gap_M / size_M) ** 2 - off_M, torch.zeros_like(off_M))
        return float((self.count_M * each_M).sum() / self.examples)

    @property
    def largest(self) -> int | None:
        """The bin with the largest gap among those with at least 1 % of the examples: its gap is the MCE."""
        big_M = self.count_M >= max(1.0, LEAST_SHARE * self.examples)
        if not bool(big_M.any()):
            return None
        return int(
            torch.where(big_M, self.gap_M.abs() / self.count_M.clamp(min=1), -torch.ones_like(self.gap_M)).argmax()
        )

    @property
    def mce(self) -> float:
        """Maximum calibration error: ``|S_m| / n_m`` of `largest`; 0 where no bin is large enough."""
        index = self.largest
        return 0.0 if index is None else float(self.gap_M[index].abs() / self.count_M[index])


def equal_width(predictions: Predictions, *, bins: int = BINS) -> Bins:
    """Confidence of the most probable class in ``bins`` intervals of one width, closed on the right."""
    edges = borders(bins)
    return _sums(predictions.confidence_N, predictions.correct_N, place(predictions.confidence_N, edges), edges)


def equal_mass(predictions: Predictions, *, bins: int = BINS) -> Bins:
    """Bins of about N / M examples each, for the adaptive ECE.

    Equal confidences always share a bin, that of their middle rank, so that the order of the rows means nothing; with
    many ties some bins are then empty, and others larger.
    """
    _check(bins)
    confidence_N = predictions.confidence_N
    index_N = by_rank(confidence_N, bins)
    edges = [float(confidence_N.min())] if len(predictions) else [0.0]
    for bin_ in range(bins):
        inside = confidence_N[index_N == bin_]
        edges.append(float(inside.max()) if len(inside) else edges[-1])
    return _sums(confidence_N, predictions.correct_N, index_N, tuple(edges))


def classwise(predictions: Predictions, *, bins: int = BINS) -> tuple[Bins, ...]:
    """For each class, bins of equal width of its own probability, and whether it was the true class."""
    edges = borders(bins)
    found = []
    for index in range(predictions.classes):
        probability_N = predictions.probability_NK[:, index]
        is_it_N = (predictions.target_N == index).to(torch.float64)
        found.append(_sums(probability_N, is_it_N, place(probability_N, edges), edges))
    return tuple(found)


def borders(bins: int) -> tuple[float, ...]:
    """0, 1 / M, ..., 1."""
    _check(bins)
    return tuple(float(edge) for edge in np.linspace(0.0, 1.0, bins + 1))


def place(value_N: Tensor, edges: tuple[float, ...]) -> Tensor:
    """The bin of each value: ``edges[m] < value <= edges[m + 1]``; 0 is in the first, and 1 in the last."""
    return torch.searchsorted(
        torch.tensor(edges[1:-1], dtype=torch.float64, device="cpu"), value_N.contiguous(), side="left"
    )


def by_rank(value_N: Tensor, bins: int) -> Tensor:
    """``floor(M r / N)``, r the middle rank of all that have the same value."""
    _, inverse_N, count_U = torch.unique(value_N, return_inverse=True, return_counts=True)
    middle_U = count_U.cumsum(0).to(torch.float64) - count_U / 2
    return (middle_U * bins / max(1, len(value_N))).floor().long().clamp(0, bins - 1)[inverse_N]


def expected_calibration_error(probability_NK: Tensor, target_N: Tensor, *, bins: int = BINS) -> float:
    """The ECE alone; see `Bins.ece`. No example gives 0.

    Args:
        probability_NK: rows that sum to 1.
        target_N: class indices, int64.
        bins: number of bins on (0, 1].
    """
    _check(bins)
    if not len(target_N):
        return 0.0
    return equal_width(Predictions.from_probabilities(probability_NK, target_N), bins=bins).ece


def _check(bins: int) -> None:
    if bins < 1:
        raise ConfigError(f"bins={bins}: must be at least 1; the usual number is 15.")


def _sums(confidence_N: Tensor, correct_N: Tensor, index_N: Tensor, edges: tuple[float, ...]) -> Bins:
    def total(value_N: Tensor) -> Tensor:
        return torch.zeros(len(edges) - 1, dtype=torch.float64, device="cpu").index_add_(0, index_N, value_N)

    return Bins(
        edges=edges,
        count_M=total(torch.ones_like(confidence_N)),
        confidence_M=total(confidence_N),
        correct_M=total(correct_N),
        variance_M=total(confidence_N * (1 - confidence_N)),
    )
