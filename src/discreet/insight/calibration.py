"""Are predicted probabilities what they say? The expected calibration error of a classifier.

Shape legend: N = examples, K = classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discreet.errors import ConfigError


def expected_calibration_error(probability_NK: Tensor, target_N: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence (Eq. 3, arXiv:1706.04599).

    ``sum_b (|b| / N) |accuracy(b) - confidence(b)|`` with the confidence of the most probable class. Edge cases: empty
    bins count nothing; no example gives 0.

    Args:
        probability_NK: rows that sum to 1.
        target_N: class indices, int64.
        bins: number of bins on (0, 1].
    """
    if bins < 1:
        raise ConfigError(f"bins={bins}: must be at least 1; the usual number is 15.")
    if not len(target_N):
        return 0.0
    confidence_N, predicted_N = probability_NK.to(torch.float64).max(1)
    bin_N = (confidence_N * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap_N = (predicted_N == target_N).to(torch.float64) - confidence_N
    gaps = torch.zeros(bins, dtype=torch.float64, device=gap_N.device).index_add_(0, bin_N, gap_N)
    return float(gaps.abs().sum() / len(target_N))
