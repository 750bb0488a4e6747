"""Intervals for the figures of a report, from the same examples weighted again and again.

The Bayesian bootstrap (Rubin 1981): every example gets an independent weight from Exp(1), instead of being drawn 0, 1,
2, ... times. Any figure that is a function of weighted sums then costs one product of matrices for all replicates. An
interval is the basic one, ``2 x - q``: figures with absolute values in them lie too high, in the sample as in its
replicates, and this one reflects that back.

Weights are a function of a constant: the same predictions give the same report. They protect nothing.

Shape legend: N = examples, M = bins, R = replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.rng import NoiseSource
from discreet.insight.calibration import temperature
from discreet.insight.calibration.bins import BINS, borders, by_rank, place
from discreet.insight.calibration.predictions import Predictions

REPLICATES = 200
COVERAGE = 0.95
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


def intervals(predictions: Predictions, *, beta: float, bins: int = BINS) -> dict[str, Interval]:
    """Intervals of every scalar of a report, by its name there.

    The temperature and its gain come from one Newton step of each replicate, from the optimum of the sample: ``beta* =
    beta - sum w g / sum w h``, exact up to the square of the distance.

    Args:
        predictions: at least one example.
        beta: 1 / T of the sample's optimum. bins: M.
    """
    sums = _Sums(predictions, beta=beta, bins=bins)
    parts = [sums.figures(weight_RN) for weight_RN in _weights(len(predictions))]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    sample = sums.figures(torch.ones(1, len(predictions), dtype=torch.float64, device="cpu"))
    return {name: _interval(name, float(sample[name]), value_R) for name, value_R in whole.items()}


def _weights(examples: int) -> Iterator[Tensor]:
    """Weights of all replicates in chunks, shape (r, N): ``(a^2 + b^2) / 2`` of two normal draws is Exp(1)."""
    source = NoiseSource.insecure_seed(0)
    for first in range(0, REPLICATES, chunk := max(1, _NUMBERS_AT_ONCE // max(1, examples))):
        count = min(chunk, REPLICATES - first)
        draws = source.normal(2 * count * examples, position=source.claim(), name="weights")
        yield (draws.view(2, count, examples) ** 2).sum(0) / 2


class _Sums:
    """Per-example columns whose weighted sums give every figure."""

    def __init__(self, predictions: Predictions, *, beta: float, bins: int) -> None:
        confidence_N, correct_N = predictions.confidence_N, predictions.correct_N
        before_N, after_N = temperature.nll(predictions, 1.0), temperature.nll(predictions, beta)
        self._beta = beta
        self._columns = torch.stack(
            [
                correct_N,
                before_N,
                brier(predictions),
                confidence_N - correct_N,
                before_N - after_N,
                temperature.slopes(predictions, beta),
                temperature.curvatures(predictions, beta),
            ],
            1,
        )
        gap_N1 = (correct_N - confidence_N)[:, None]
        edges = borders(bins)
        self._width_NM = gap_N1 * torch.nn.functional.one_hot(place(confidence_N, edges), bins)
        self._mass_NM = gap_N1 * torch.nn.functional.one_hot(by_rank(confidence_N, bins), bins)

    def figures(self, weight_RN: Tensor) -> dict[str, Tensor]:
        """Each figure under each row of weights, shape (R,)."""
        weight_RN = weight_RN / weight_RN.sum(1, keepdim=True)
        accuracy, nll, brier_R, gap, gain, slope, curvature = (weight_RN @ self._columns).unbind(1)
        step = torch.where(curvature > 0, slope / curvature, torch.zeros_like(slope))
        return {
            "accuracy": accuracy,
            "nll": nll,
            "brier": brier_R,
            "gap": gap,
            "ece": (weight_RN @ self._width_NM).abs().sum(1),
            "adaptive_ece": (weight_RN @ self._mass_NM).abs().sum(1),
            "optimal_temperature": 1 / (self._beta - step).clamp(min=1 / temperature.HIGHEST),
            "calibration_loss": gain + slope * step / 2,
        }


def brier(predictions: Predictions) -> Tensor:
    """``sum_k (p_k - 1{y = k})^2`` of each example, in [0, 2], shape (N,)."""
    truth_NK = torch.nn.functional.one_hot(predictions.target_N, predictions.classes)
    return ((predictions.probability_NK - truth_NK) ** 2).sum(1)


_LEAST = {"gap": -1.0}
_MOST = {"accuracy": 1.0, "ece": 1.0, "adaptive_ece": 1.0, "gap": 1.0, "brier": 2.0}


def _interval(name: str, sample: float, value_R: Tensor) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = (float(torch.quantile(value_R, share)) for share in (tail, 1 - tail))
    least, most = _LEAST.get(name, 0.0), _MOST.get(name, float("inf"))
    return Interval(low=min(most, max(least, 2 * sample - high)), high=min(most, max(least, 2 * sample - low)))
