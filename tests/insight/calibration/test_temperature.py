from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from discreet.insight.calibration import Predictions, fit_public_temperature
from discreet.insight.calibration.temperature import HIGHEST, LOWEST, curvatures, nll, slopes


def sampled(temperature: float, *, rows: int = 4000, classes: int = 5, seed: int = 0) -> Predictions:
    """Predictions whose labels follow the softmax of ``z / temperature``: the best temperature is that."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)) * 3
    scaled = torch.from_numpy(logits / temperature).softmax(1).numpy()
    label = (scaled.cumsum(1) < generator.random((rows, 1))).sum(1).clip(max=classes - 1)
    return Predictions.from_logits(logits, label)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_of_the_labels_is_found(temperature):
    found = fit_public_temperature(sampled(temperature))
    assert abs(found.value - temperature) < 4 * found.std
    assert found.std < 0.05 * temperature


def test_the_standard_error_is_the_spread_over_samples():
    fits = [fit_public_temperature(sampled(2.0, rows=500, seed=seed)) for seed in range(60)]
    spread = np.std([fit.value for fit in fits])
    assert np.mean([fit.std for fit in fits]) == pytest.approx(spread, rel=0.3)


def test_it_is_the_minimum():
    predictions = sampled(2.0)
    found = fit_public_temperature(predictions)
    for other in (0.99, 1.01):
        assert float(nll(predictions, other / found.value).mean()) > found.nll_after
    assert found.calibration_loss == pytest.approx(found.nll_before - found.nll_after)
    assert found.calibration_loss > 0.1


def test_slope_and_curvature_are_derivatives():
    predictions = sampled(2.0, rows=20)
    step = 1e-5
    for beta in (0.1, 1.0, 3.0):
        rise = (nll(predictions, beta + step) - nll(predictions, beta - step)) / (2 * step)
        torch.testing.assert_close(slopes(predictions, beta), rise, rtol=1e-6, atol=1e-6)
        bend = (slopes(predictions, beta + step) - slopes(predictions, beta - step)) / (2 * step)
        torch.testing.assert_close(curvatures(predictions, beta), bend, rtol=1e-5, atol=1e-6)


def test_no_error_wants_the_coldest_and_chance_the_hottest():
    right = fit_public_temperature(Predictions.from_logits(torch.eye(3).double() * 2, torch.arange(3)))
    assert right.value == pytest.approx(LOWEST)
    wrong = fit_public_temperature(Predictions.from_logits(torch.eye(3).double() * 2, torch.tensor([1, 2, 0])))
    assert wrong.value == pytest.approx(HIGHEST)
    for found in (right, wrong):
        assert found.at_bound
        assert math.isinf(found.std)


def test_equal_logits_stay():
    found = fit_public_temperature(Predictions.from_logits(torch.zeros(4, 2), torch.tensor([0, 1, 1, 1])))
    assert found.value == 1
    assert found.calibration_loss == 0


def test_probability_zero_and_huge_logits_are_numbers():
    zero = Predictions.from_probabilities(torch.tensor([[1.0, 0.0]] * 9 + [[0.6, 0.4]]), torch.tensor([0] * 8 + [1, 1]))
    assert 1 < fit_public_temperature(zero).value <= HIGHEST * (1 + 1e-9)
    huge = Predictions.from_logits(torch.tensor([[1e300, 0.0], [2.0, 0.0]], dtype=torch.float64), torch.tensor([1, 0]))
    assert math.isfinite(fit_public_temperature(huge).nll_after)


def test_accuracy_never_changes():
    predictions = sampled(2.0)
    cooled = predictions.at_temperature(fit_public_temperature(predictions).value)
    torch.testing.assert_close(cooled.correct_N, predictions.correct_N)
    assert fit_public_temperature(cooled).value == pytest.approx(1.0, abs=1e-6)


def test_agrees_with_scikit_learns_loss():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    predictions = sampled(2.0, rows=200)
    reference = metrics.log_loss(predictions.target_N, predictions.probability_NK, labels=range(5))
    assert fit_public_temperature(predictions).nll_before == pytest.approx(reference, abs=1e-12)
