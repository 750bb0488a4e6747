from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch

from discreet.errors import ConfigError
from discreet.insight.calibration import (
    NonPrivateCalibrationReport,
    Predictions,
    calibration_report,
    fit_public_temperature,
)
from discreet.insight.calibration.bootstrap import REPLICATES, brier, intervals
from discreet.insight.calibration.report import MOST_GROUPS
from discreet.insight.origin import Origin


def sample(seed: int, *, rows: int = 600, temperature: float = 1.6) -> Predictions:
    """Predictions that are too sure of themselves by a known temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, 4)) * 2.5
    truth = torch.from_numpy(logits / temperature).softmax(1).numpy()
    label = (truth.cumsum(1) < generator.random((rows, 1))).sum(1).clip(max=3)
    return Predictions.from_logits(logits, label)


def test_figures_by_hand():
    """Four rows of two classes, all sums on paper."""
    second = torch.tensor([0.9, 0.9, 0.6, 0.2], dtype=torch.float64)
    target = torch.tensor([1, 0, 1, 0])
    predictions = Predictions.from_probabilities(torch.stack([1 - second, second], 1), target, groups=list("aabb"))
    found = calibration_report(predictions, bins=5)
    assert found.accuracy == 0.75
    assert found.nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) - math.log(0.9) + math.log(0.6 * 0.8)) / 4)
    assert found.brier == pytest.approx(2 * (0.01 + 0.81 + 0.16 + 0.04) / 4)
    assert found.gap == pytest.approx((0.9 + 0.9 + 0.6 + 0.8) / 4 - 0.75)
    # Bins of fifths, right borders inside: .6 in the third; .8 (which is 1 - .2) in the fourth; .9, .9 in the last.
    assert found.ece == pytest.approx((0.8 + 0.4 + 0.2) / 4)
    assert found.mce == pytest.approx(0.4)
    assert found.mce_examples == 1
    assert [group.name for group in found.groups] == ["a", "b"]
    assert found.groups[0].ece == pytest.approx(0.4)
    assert found.groups[1].gap == pytest.approx(0.7 - 1.0)


def test_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    predictions = sample(0)
    found = calibration_report(predictions)
    truth, probability = predictions.target_N.numpy(), predictions.probability_NK.numpy()
    assert found.nll == pytest.approx(metrics.log_loss(truth, probability, labels=range(4)), abs=1e-12)
    assert found.accuracy == metrics.accuracy_score(truth, probability.argmax(1))
    binary = Predictions.from_probabilities(probability[:, :2] / probability[:, :2].sum(1, keepdims=True), truth % 2)
    reference = metrics.brier_score_loss(truth % 2, binary.probability_NK[:, 1].numpy())
    assert calibration_report(binary).brier == pytest.approx(2 * reference, abs=1e-12)


def test_a_known_miscalibration_is_seen_and_a_perfect_model_is_not_blamed():
    wrong = calibration_report(sample(0, rows=4000))
    assert wrong.notable
    assert wrong.gap > 0
    assert wrong.temperature.value == pytest.approx(1.6, abs=4 * wrong.temperature.std)
    perfect = [calibration_report(sample(seed, temperature=1.0)) for seed in range(40)]
    # At 5 % each, more than 7 of 40 happens once in 500.
    assert sum(report.notable for report in perfect) <= 7


@pytest.fixture(scope="module")
def samples():
    """60 samples with their intervals, and the truth: the figures of 100,000 rows."""
    large = sample(10_000, rows=100_000)
    fitted = fit_public_temperature(large)
    truth = {
        "accuracy": float(large.correct_N.mean()),
        "nll": fitted.nll_before,
        "brier": float(brier(large).mean()),
        "gap": float((large.confidence_N - large.correct_N).mean()),
        "optimal_temperature": fitted.value,
        "calibration_loss": fitted.calibration_loss,
    }
    small = [sample(seed) for seed in range(60)]
    return truth, [intervals(one, beta=1 / fit_public_temperature(one).value) for one in small]


@pytest.mark.parametrize("name", ["accuracy", "nll", "brier", "gap", "optimal_temperature", "calibration_loss"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(samples, name):
    """At a coverage of 95 %, fewer than 51 of 60 happens once in 3,000; intervals of a quarter of the width, which
    cover 38 %, are told apart."""
    truth, found = samples
    assert sum(each[name].low <= truth[name] <= each[name].high for each in found) >= 51
    narrow = [(each[name].low + each[name].high, each[name].high - each[name].low) for each in found]
    assert sum(abs(truth[name] - both / 2) <= width / 8 for both, width in narrow) < 51


def test_intervals_are_the_same_every_time():
    assert intervals(sample(0), beta=1.0) == intervals(sample(0), beta=1.0)
    assert REPLICATES >= 200


def test_a_true_class_of_probability_zero_has_infinite_loss():
    probability = torch.tensor([[1.0, 0.0], [0.7, 0.3]])
    found = calibration_report(Predictions.from_probabilities(probability, torch.tensor([1, 0])))
    assert math.isinf(found.nll)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["nll"] is None


def test_one_class_and_one_row_have_a_report():
    for predictions in (
        Predictions.from_logits(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)),
        Predictions.from_logits(torch.tensor([[3.0, 0.0]]), torch.tensor([1])),
    ):
        json.dumps(calibration_report(predictions).to_json(), allow_nan=False)


def test_private_examples_stamp_type_log_and_record(caplog):
    with caplog.at_level(logging.WARNING, logger="discreet"):
        found = calibration_report(sample(0), origin=Origin.PRIVATE)
    assert isinstance(found, NonPrivateCalibrationReport)
    assert found.to_json()["stamp"] == "NON-PRIVATE"
    assert "NON-PRIVATE" in caplog.text
    caplog.clear()
    public = calibration_report(sample(0))
    assert not isinstance(public, NonPrivateCalibrationReport)
    assert public.to_json()["stamp"] == ""
    assert caplog.text == ""


def test_too_many_groups_are_refused():
    predictions = Predictions.from_logits(
        torch.zeros(200, 2), torch.zeros(200, dtype=torch.int64), groups=[str(row) for row in range(200)]
    )
    with pytest.raises(ConfigError, match=f"200 groups: at most {MOST_GROUPS}"):
        calibration_report(predictions)
