"""E12: an attack on what a probe releases, with the worst example that it may meet.

An example that is lost at displaced weights moves the sum by the whole bound. Somebody who knows everything else sees
releases with it and without, and bounds epsilon from below; Clopper-Pearson, each side at 1e-4: a false alarm in 5,000
runs of this test. The bound must stay below what one Gaussian query costs; with half the noise it must not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor, nn

from discreet.core.clipping import ClippedSum
from discreet.core.noise import release
from discreet.core.probe import RISES, summed_rises
from discreet.core.rng import NoiseSource
from discreet.privacy.accounting import Gaussian, epsilon

BOUND, SIGMA, DELTA = 2.0, 1.0, 1e-3
RELEASES, MISTAKE = 20_000, 1e-4


class _Fragile(nn.Module):
    """All losses are 0; at any other weights, those of marked examples are 1e9."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, marks_B: Tensor) -> Tensor:
        return torch.where(self.shift != 0, 1e9 * marks_B, 0.0 * marks_B)


def _probed(marks: list[float]) -> ClippedSum:
    batch = torch.tensor(marks)
    return summed_rises(
        _Fragile(),
        lambda model, rows: model(rows),
        lambda: iter([(batch, len(batch))]),
        shift={"shift": torch.ones(())},
        bound=BOUND,
    )


def _releases(total: ClippedSum, *, noise: float, seed: int) -> np.ndarray:
    source = NoiseSource.insecure_seed(seed)
    return np.array(
        [float(release(total, noise_multiplier=noise, source=source).tensors[RISES]) for _ in range(RELEASES)]
    )


def _audited(*, noise: float, cut: float) -> float:
    """A lower bound on epsilon at `DELTA`, true but for two mistakes of 1e-4.

    Releases beyond ``cut`` bounds say "there"; the cut is fixed beforehand, and not chosen from the releases.
    """
    without = _releases(_probed([0.0] * 5), noise=noise, seed=1)
    within = _releases(_probed([0.0] * 5 + [1.0]), noise=noise, seed=2)
    hits, alarms = int((within > cut * BOUND).sum()), int((without > cut * BOUND).sum())
    least = float(beta.ppf(MISTAKE, hits, RELEASES - hits + 1))
    most = float(beta.ppf(1 - MISTAKE, alarms + 1, RELEASES - alarms))
    return math.log((least - DELTA) / most)


def test_an_attack_on_a_probe_learns_no_more_than_is_charged():
    charged = epsilon([Gaussian(SIGMA, 1)], delta=DELTA)
    found = _audited(noise=SIGMA, cut=2.5)
    assert 0.5 * charged < found < charged


def test_the_attack_would_see_half_the_noise():
    assert _audited(noise=SIGMA / 2, cut=1.5) > epsilon([Gaussian(SIGMA, 1)], delta=DELTA)
