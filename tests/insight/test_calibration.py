from __future__ import annotations

import numpy as np
import pytest
import torch

from discreet.errors import ConfigError
from discreet.insight.calibration import expected_calibration_error


def _by_hand(probability: np.ndarray, target: np.ndarray, bins: int) -> float:
    """Eq. 3 of arXiv:1706.04599, bin by bin."""
    confidence, right = probability.max(1), probability.argmax(1) == target
    total = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_equation_3(bins: int) -> None:
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.full(4, 0.6), 500)
    target = generator.integers(0, 4, 500)
    found = expected_calibration_error(torch.from_numpy(probability), torch.from_numpy(target), bins=bins)
    assert found == pytest.approx(_by_hand(probability, target, bins), abs=1e-12)


def test_perfect_and_worst() -> None:
    sure = torch.eye(3, dtype=torch.float64)
    assert expected_calibration_error(sure, torch.arange(3)) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1


def test_no_example_is_no_error() -> None:
    assert expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0


def test_bins_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="bins=0"):
        expected_calibration_error(torch.eye(2), torch.arange(2), bins=0)
