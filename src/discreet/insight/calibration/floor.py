"""How large a calibration error a perfectly calibrated model would show, by chance alone, on so many examples.

ECE is a sum of absolute values, so it is never 0 on a finite sample: a perfect ten-class model shows .03 on 1,000 rows.
Differences below this floor mean nothing.

Under perfect calibration the right answers of bin m, given the confidences, are a sum of Bernoulli(p_i), so S_m has
mean 0 and variance ``v_m = sum p_i (1 - p_i)``. Bins are independent. (The hypothesis is that of consistency
resampling, Broecker & Smith 2007; here its moments are taken in closed form instead of being simulated.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from discreet.insight.calibration.bins import Bins

_QUANTILE = 1.6448536269514722
"""Of the normal law: 5 % lie above."""


@dataclass(frozen=True)
class Floor:
    """What chance alone shows.

    Attributes:
        mean: expected error of a perfectly calibrated model with these confidences.
        high: the error that it stays below in 95 of 100 samples (normal law for the sum over bins).
    """

    mean: float
    high: float


def floor_of(bins: Bins) -> Floor:
    """Floor of `Bins.ece`: ``sum_m E|S_m| / N``."""
    return floor_of_mean([bins])


def floor_of_mean(tables: Sequence[Bins]) -> Floor:
    """Floor of the mean ECE over several tables of the same examples, as the classwise ECE is.

    Tables are taken as independent for `Floor.high`. Those of classes are not quite: one class more is another one
    less. The mean is exact all the same.
    """
    means, variances = 0.0, 0.0
    for bins in tables:
        if not bins.examples:
            continue
        deviation_M = mean_deviation(bins)
        means += float(deviation_M.sum()) / bins.examples
        variances += float((bins.variance_M.numpy() - deviation_M**2).clip(min=0).sum()) / bins.examples**2
    count = max(1, len(tables))
    return Floor(mean=means / count, high=(means + _QUANTILE * math.sqrt(variances)) / count)


def rms_floor(bins: Bins) -> float:
    """``sqrt(E[rms^2]) = sqrt(sum_m v_m / n_m / N)`` under perfect calibration."""
    if not bins.examples:
        return 0.0
    return math.sqrt(float((bins.variance_M / bins.count_M.clamp(min=1)).sum()) / bins.examples)


def mean_deviation(bins: Bins) -> np.ndarray:
    """``E|S_m|`` of each bin, shape (M,).

    De Moivre's closed form for a binomial variable X of n trials at p, the mean confidence of the bin:
    ``E|X - n p| = 2 k C(n, k) p^k (1 - p)^(n - k + 1)``, k = floor(n p) + 1 (Diaconis & Zabell 1991, Eq. 1.1); scaled
    by the root of v_m over n p (1 - p), since the confidences of a bin are not all equal. For many examples it goes to
    ``sqrt(2 v_m / pi)``, and so the whole floor to ``sqrt(2 a (1 - a) M / (pi N))`` where M bins share N alike.
    """
    count = bins.count_M.numpy()
    variance = bins.variance_M.numpy()
    share = np.divide(bins.confidence_M.numpy(), count, out=np.zeros_like(count), where=count > 0).clip(0.0, 1.0)
    spread = count * share * (1 - share)
    chance = spread > 0
    n, p = count[chance], share[chance]
    k = np.floor(n * p) + 1
    log_value = (
        math.log(2)
        + np.log(k)
        + special.gammaln(n + 1)
        - special.gammaln(k + 1)
        - special.gammaln(n - k + 1)
        + special.xlogy(k, p)
        + special.xlog1py(n - k + 1, -p)
    )
    found = np.zeros_like(count)
    found[chance] = np.exp(log_value) * np.sqrt(variance[chance] / spread[chance])
    return found
