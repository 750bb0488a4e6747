"""Bounded sums over private predictions: what a private temperature and a private calibration report are made of.

**Guarantees.** Every row is made harmless by itself before it is added: scores that are not all finite stand for "all
classes alike", and a label that is no class for a wrong answer. So one row moves a sum by at most its sensitivity,
whatever it holds, provided that its scores do not depend on other rows: that is the caller's business.

Shape legend: N = rows, K = classes, M = bins.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.clipping import ClippedSum
from discreet.errors import ConfigError

SLOPE = "slope"
"""Name of the one tensor of `summed_slopes`, shape (1,)."""

COUNT, GAP, RIGHT, BRIER, NLL = "count", "gap", "right", "brier", "nll"
"""Names of the tensors of `summed_reliability`: (M,), (M,), (1,), (1,), (1,)."""

_WEIGHT = 0.5
"""Of all entries beside the gaps, which need the least noise: `sum |gap|` adds up the noise of all bins."""

_FURTHEST = 1e300


class Neighbours(enum.Enum):
    """What one row more, one less, or one in the place of another is; in the order of what they can move."""

    ADD_REMOVE = "add_remove"
    REPLACE_ONE = "replace_one"


@dataclass(frozen=True)
class Reliability:
    """Which bounded sums a report asks for.

    Attributes:
        bins: M, at least 3: intervals of equal width of the confidence, closed on the right.
        nll_bound: a row's negative log-likelihood counts as at most so many nats.
    """

    bins: int
    nll_bound: float

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or self.bins < 3:
            raise ConfigError(f"bins={self.bins}: must be a whole number of at least 3; the usual number is 15.")
        if not 0 < self.nll_bound < math.inf:
            raise ConfigError(f"nll_bound={self.nll_bound}: must be finite and above 0; the usual value is 5 nats.")

    def sensitivity(self, neighbours: Neighbours) -> float:
        """Largest L2 change of the stacked sums over that of one row added, for the given neighbours.

        One row is in one bin: a gap of at most 1, and w in that bin's count; right, Brier score and loss, centred and
        scaled to [-1, 1], times w. Added or removed: ``sqrt(1 + 4 w^2)``. Replaced, and in another bin: the two gaps
        stand apart, ``sqrt(2)``, and so do the counts; the others move by 2 each: ``sqrt(2 + 14 w^2)``. (In the same
        bin the gaps differ by at most 1 + 1 / M, whose square is below 2.) For replace-one *half* of it is returned,
        since the accountant doubles.
        """
        if neighbours is Neighbours.ADD_REMOVE:
            return math.sqrt(1 + 4 * _WEIGHT**2)
        return math.sqrt(2 + 14 * _WEIGHT**2) / 2


def summed_slopes(scores_NK: Tensor, target_N: Tensor, *, beta: float, bound: float) -> ClippedSum:
    """``sum_i clip(d NLL_i / d log beta, -bound, bound)`` of ``softmax(beta z)``.

    In logarithms of beta the slope is ``sum_k p_k beta z_k - beta z_y``: the loss of the row less the entropy of its
    prediction, in nats. It has the same size whatever the scale of the logits, so one bound fits all models.

    **Guarantees.** Adding or removing one row moves the sum by at most ``bound``; replacing one by at most twice that.
    Rows whose label is no class add exactly 0, and so do rows of scores that are not finite.

    Args:
        scores_NK: logits or log-probabilities. target_N: class indices, int64.
        beta: inverse temperature, finite and above 0. bound: in nats, finite and above 0.

    Raises:
        ConfigError: shapes do not fit, or beta or bound is out of range.
    """
    if not (0 < beta < math.inf and 0 < bound < math.inf):
        raise ConfigError(f"beta={beta}, bound={bound}: must be finite and above 0; the usual bound is 4 nats.")
    scores, label_N, known_N = _harmless(scores_NK, target_N)
    scaled_NK = (beta * scores).clamp(min=-_FURTHEST)
    probability_NK = torch.softmax(scaled_NK, 1)
    slope_N = (probability_NK * scaled_NK).sum(1) - scaled_NK.gather(1, label_N[:, None]).squeeze(1)
    slope_N = torch.where(known_N, slope_N.nan_to_num(nan=0.0).clamp(-bound, bound), 0.0)
    return ClippedSum(tensors={SLOPE: slope_N.sum().reshape(1)}, sensitivity=float(bound))


def summed_reliability(
    scores_NK: Tensor, target_N: Tensor, *, asked: Reliability, neighbours: Neighbours
) -> ClippedSum:
    """Counts and gaps per bin of confidence, and the sums behind accuracy, Brier score and loss, in one query.

    ``gap_m = sum over bin m of (right - confidence)``. The other entries are ``w count_m``, ``w (2 right - 1)``,
    ``w (brier - 1)`` and ``w (2 min(nll, bound) / bound - 1)``; `unweighted` undoes that after the noise.

    **Guarantees.** The stacked vector moves by at most `Reliability.sensitivity` (twice that for one row replaced).

    Raises:
        ConfigError: shapes do not fit.
    """
    scores, label_N, known_N = _harmless(scores_NK, target_N)
    log_probability_NK = torch.log_softmax(scores, 1)
    probability_NK = log_probability_NK.exp()
    confidence_N, answer_N = probability_NK.max(1)
    right_N = ((answer_N == label_N) & known_N).to(torch.float64)
    loss_N = -log_probability_NK.gather(1, label_N[:, None]).squeeze(1)
    loss_N = torch.where(known_N, loss_N.nan_to_num(nan=asked.nll_bound), asked.nll_bound).clamp(0, asked.nll_bound)
    true_N = torch.where(known_N, probability_NK.gather(1, label_N[:, None]).squeeze(1), 0.0)
    brier_N = ((probability_NK**2).sum(1) - 2 * true_N + 1).clamp(0, 2)
    borders = torch.linspace(0, 1, asked.bins + 1, dtype=torch.float64, device="cpu")[1:-1]
    bin_N = torch.searchsorted(borders, confidence_N.contiguous(), side="left")

    def by_bin(value_N: Tensor) -> Tensor:
        return torch.zeros(asked.bins, dtype=torch.float64, device="cpu").index_add_(0, bin_N, value_N)

    return ClippedSum(
        tensors={
            GAP: by_bin((right_N - confidence_N).clamp(-1, 1)),
            COUNT: _WEIGHT * by_bin(torch.ones_like(right_N)),
            RIGHT: _WEIGHT * (2 * right_N - 1).sum().reshape(1),
            BRIER: _WEIGHT * (brier_N - 1).sum().reshape(1),
            NLL: _WEIGHT * (2 * loss_N / asked.nll_bound - 1).sum().reshape(1),
        },
        sensitivity=asked.sensitivity(neighbours),
    )


def unweighted(name: str, value: Tensor, *, examples: int, asked: Reliability) -> Tensor:
    """From a noisy entry of `summed_reliability` to what it stands for: a sum for gaps and counts, else a mean."""
    if name == GAP:
        return value
    if name == COUNT:
        return value / _WEIGHT
    mean = value / (_WEIGHT * examples)
    if name == RIGHT:
        return (mean + 1) / 2
    return mean + 1 if name == BRIER else (mean + 1) / 2 * asked.nll_bound


def unit_of(name: str, *, examples: int, asked: Reliability) -> float:
    """How much of `unweighted` one unit of noise in an entry is."""
    units = {GAP: 1.0, COUNT: 1 / _WEIGHT, RIGHT: 0.5, BRIER: 1.0, NLL: asked.nll_bound / 2}
    return units[name] if name in (GAP, COUNT) else units[name] / (_WEIGHT * examples)


def _harmless(scores_NK: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores below a largest one of 0, labels inside ``[0, K)``, and which labels were; all row by row."""
    if scores_NK.ndim != 2 or scores_NK.shape[1] < 2 or target_N.shape != scores_NK.shape[:1]:
        raise ConfigError(
            f"scores of shape {tuple(scores_NK.shape)}, labels of shape {tuple(target_N.shape)}: must be (rows, "
            "classes) with at least 2 classes, and (rows,)."
        )
    scores = scores_NK.detach().to(device="cpu", dtype=torch.float64)
    label_N = target_N.detach().to(device="cpu", dtype=torch.int64)
    known_N = (label_N >= 0) & (label_N < scores.shape[1])
    finite_N1 = torch.isfinite(scores).all(1, keepdim=True)
    scores = torch.where(finite_N1, scores, 0.0)
    scores = (scores - scores.amax(1, keepdim=True)).clamp(min=-_FURTHEST)
    return scores, torch.where(known_N, label_N, 0), known_N
