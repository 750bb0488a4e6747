"""The floors against simulation: labels drawn from the predicted probabilities themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from discreet.insight.calibration import Predictions
from discreet.insight.calibration.bins import classwise, equal_mass, equal_width
from discreet.insight.calibration.floor import floor_of, floor_of_mean, mean_deviation, rms_floor

SAMPLES = 60


def ten_classes(rows: int, *, seed: int = 0) -> np.ndarray:
    """Probabilities of a ten-class Bayes classifier with accuracy of about .81: Gaussian classes around ten means."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(10, 20))
    means *= 2.55 / np.linalg.norm(means, axis=1, keepdims=True)
    label = generator.integers(0, 10, rows)
    logits = (means[label] + generator.normal(size=(rows, 20))) @ means.T
    probability = np.exp(logits - logits.max(1, keepdims=True))
    return probability / probability.sum(1, keepdims=True)


def draws(probability: np.ndarray, *, seed: int) -> Predictions:
    """The same predictions with labels drawn from them: calibrated without any error."""
    generator = np.random.default_rng(seed)
    label = (probability.cumsum(1) < generator.random((len(probability), 1))).sum(1).clip(max=9)
    return Predictions.from_probabilities(probability, label)


@pytest.mark.parametrize("rows", [50, 360, 1000, 2000, 10_000])
def test_floors_agree_with_simulation_within_20_per_cent(rows):
    """Means of 60 samples have a standard error of 4 % of themselves at most; the floors are within 10 % besides."""
    probability = ten_classes(rows)
    found = [draws(probability, seed=seed) for seed in range(SAMPLES)]
    for measure, floor in ((equal_width, floor_of), (equal_mass, floor_of)):
        tables = [measure(sample) for sample in found]
        simulated = np.mean([table.ece for table in tables])
        assert floor(tables[0]).mean == pytest.approx(simulated, rel=0.2)
        above = np.mean([table.ece > floor(tables[0]).high for table in tables])
        assert above <= 0.15  # binomial: more than 9 of 60 at 5 % happens once in 500
    tables = [classwise(sample) for sample in found]
    simulated = np.mean([np.mean([table.ece for table in each]) for each in tables])
    assert floor_of_mean(tables[0]).mean == pytest.approx(simulated, rel=0.2)
    squares = np.mean([equal_width(sample).rms ** 2 for sample in found])
    assert rms_floor(equal_width(found[0])) == pytest.approx(math.sqrt(squares), rel=0.2)


def test_a_floor_of_another_size_would_be_seen():
    """The check above is no tautology: half as many rows have a floor 1.4 times as high, outside the 20 %."""
    found = [equal_width(draws(ten_classes(1000), seed=seed)).ece for seed in range(SAMPLES)]
    assert floor_of(equal_width(draws(ten_classes(500), seed=0))).mean != pytest.approx(np.mean(found), rel=0.2)


@pytest.mark.parametrize(("rows", "floor"), [(360, 0.046), (1000, 0.029), (2000, 0.019), (10_000, 0.0096)])
def test_floors_are_those_that_were_published_for_this_recipe(rows, floor):
    assert floor_of(equal_width(draws(ten_classes(rows), seed=0))).mean == pytest.approx(floor, rel=0.2)


def test_de_moivres_deviation_is_that_of_the_binomial_law():
    """`mean_deviation` where all confidences of a bin are equal, against the sum over the binomial law."""
    stats = pytest.importorskip("scipy.stats")
    for count, share in ((1, 0.9), (2, 0.5), (7, 0.97), (40, 0.61), (1000, 0.999)):
        probability = torch.tensor([[1 - share, share]] * count, dtype=torch.float64)
        table = classwise(Predictions.from_probabilities(probability, torch.zeros(count, dtype=torch.int64)))[1]
        seen = np.arange(count + 1)
        exact = (np.abs(seen - count * share) * stats.binom.pmf(seen, count, share)).sum()
        assert mean_deviation(table).sum() == pytest.approx(exact, rel=1e-9)


def test_sure_predictions_have_no_floor():
    sure = Predictions.from_probabilities(torch.eye(3, dtype=torch.float64), torch.arange(3))
    assert floor_of(equal_width(sure)).high == 0
    assert rms_floor(equal_width(sure)) == 0


def test_the_limit_is_the_one_of_the_documents():
    """``sqrt(2 a (1 - a) M / (pi N))`` for bins that share N alike, all at confidence a."""
    confidence = torch.full((15_000,), 0.8, dtype=torch.float64) + torch.linspace(-1e-9, 1e-9, 15_000).double()
    target = torch.zeros(15_000, dtype=torch.int64)
    even = Predictions.from_probabilities(torch.stack([confidence, 1 - confidence], 1), target)
    limit = math.sqrt(2 * 0.8 * 0.2 * 15 / (math.pi * 15_000))
    assert floor_of(equal_mass(even)).mean == pytest.approx(limit, rel=0.01)
