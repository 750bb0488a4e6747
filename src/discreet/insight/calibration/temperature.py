"""Temperature scaling on public data: one number that the logits are divided by, so that confidence fits.

``T* = argmin_T mean NLL(z / T)``. T above 1: the model is too sure of itself; below 1: not sure enough. The most
probable class, and so the accuracy, never changes. The loss is convex in beta = 1 / T, so there is one minimum.

Shape legend: N = examples, K = classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import optimize
from torch import Tensor

from discreet.insight.calibration.predictions import Predictions

LOWEST, HIGHEST = 0.01, 100.0
"""Temperatures that are looked at; a model that is always right wants 0, one that is worse than chance infinity."""


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
        value: T.
        std: standard error of T from the finite number of examples; infinite where T is at an end of the range.
        nll_before, nll_after: mean negative log-likelihood at T = 1 and at this T, on the examples it was fitted to.
        examples: how many.
    """

    value: float
    std: float
    nll_before: float
    nll_after: float
    examples: int

    @property
    def at_bound(self) -> bool:
        """No minimum inside the range: every answer right, or the model worse than chance."""
        return not LOWEST * (1 + 1e-6) < self.value < HIGHEST * (1 - 1e-6)

    @property
    def calibration_loss(self) -> float:
        """``NLL - NLL(T*)``: nats per example that the temperature wins; the most stable figure of miscalibration."""
        return self.nll_before - self.nll_after


def fit_public_temperature(predictions: Predictions) -> Temperature:
    """The temperature with the least NLL, to 1e-10 of its logarithm.

    Edge cases: where the loss falls up to an end of the range [0.01, 100] (no error at all; or worse than chance), that
    end, with an infinite standard error. Where all logits of every row are equal, 1.
    """

    def slope(log_beta: float) -> float:
        return float(slopes(predictions, math.exp(log_beta)).mean())

    low, high = -math.log(HIGHEST), -math.log(LOWEST)
    if slope(low) >= 0 and slope(high) <= 0:
        log_beta = 0.0
    elif slope(low) >= 0:
        log_beta = low
    elif slope(high) <= 0:
        log_beta = high
    else:
        log_beta = float(optimize.brentq(slope, low, high, xtol=1e-10))
    beta = math.exp(log_beta)
    inside = low < log_beta < high
    return Temperature(
        value=1.0 / beta,
        std=_standard_error(predictions, beta) if inside else math.inf,
        nll_before=float(nll(predictions, 1.0).mean()),
        nll_after=float(nll(predictions, beta).mean()),
        examples=len(predictions),
    )


def nll(predictions: Predictions, beta: float) -> Tensor:
    """``-log softmax(beta z)_y`` of each example, shape (N,), in nats."""
    scores_NK = beta * predictions.scores_NK
    return torch.logsumexp(scores_NK, 1) - _true(scores_NK, predictions.target_N)


def slopes(predictions: Predictions, beta: float) -> Tensor:
    """``d NLL_i / d beta = sum_k p_k z_k - z_y``, shape (N,)."""
    probability_NK = torch.softmax(beta * predictions.scores_NK, 1)
    return (probability_NK * predictions.scores_NK).sum(1) - _true(predictions.scores_NK, predictions.target_N)


def curvatures(predictions: Predictions, beta: float) -> Tensor:
    """``d^2 NLL_i / d beta^2``, the variance of z under the prediction, shape (N,)."""
    scores_NK = predictions.scores_NK
    probability_NK = torch.softmax(beta * scores_NK, 1)
    mean_N1 = (probability_NK * scores_NK).sum(1, keepdim=True)
    return (probability_NK * (scores_NK - mean_N1) ** 2).sum(1)


def _standard_error(predictions: Predictions, beta: float) -> float:
    """By the sandwich: ``sd(beta) = sqrt(sum g_i^2) / sum h_i``, and ``sd(T) = T^2 sd(beta)``."""
    curvature = float(curvatures(predictions, beta).sum())
    if curvature <= 0:
        return math.inf
    return math.sqrt(float((slopes(predictions, beta) ** 2).sum())) / curvature / beta**2


def _true(scores_NK: Tensor, target_N: Tensor) -> Tensor:
    return scores_NK.gather(1, target_N[:, None]).squeeze(1)
