from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from discreet.errors import ConfigError, DataError
from discreet.insight.calibration import Predictions, expected_calibration_error
from discreet.insight.calibration.bins import borders, by_rank, classwise, equal_mass, equal_width, place


def binary(positive: list[float], truth: list[int]) -> Predictions:
    """Predictions of two classes from the probability of the second."""
    second = torch.tensor(positive, dtype=torch.float64)
    return Predictions.from_probabilities(torch.stack([1 - second, second], 1), torch.tensor(truth))


def random_predictions(*, classes: int, rows: int = 500, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    return Predictions.from_probabilities(
        generator.dirichlet(np.full(classes, 0.6), rows), generator.integers(0, classes, rows)
    )


def _by_hand(probability: np.ndarray, target: np.ndarray, bins: int) -> float:
    """Eq. 3 of arXiv:1706.04599, bin by bin."""
    confidence, right = probability.max(1), probability.argmax(1) == target
    total, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_equation_3(bins):
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.full(4, 0.6), 500)
    target = generator.integers(0, 4, 500)
    found = expected_calibration_error(torch.from_numpy(probability), torch.from_numpy(target), bins=bins)
    assert found == pytest.approx(_by_hand(probability, target, bins), abs=1e-12)


def test_perfect_and_worst():
    sure = torch.eye(3, dtype=torch.float64)
    assert expected_calibration_error(sure, torch.arange(3)) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1


def test_no_example_is_no_error():
    assert expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0


def test_bins_must_be_positive():
    for measure in (equal_width, equal_mass, classwise):
        with pytest.raises(ConfigError, match="bins=0"):
            measure(random_predictions(classes=2), bins=0)
    with pytest.raises(ConfigError, match="bins=0"):
        expected_calibration_error(torch.eye(2), torch.arange(2), bins=0)


def test_confidence_of_exactly_one_is_in_the_last_bin():
    """Where torchmetrics 1.9.0 puts it into a bin of its own, and gives .525 and, as the largest gap, 1.0."""
    table = equal_width(binary([0.95, 1.0], [1, 0]), bins=10)
    assert table.ece == pytest.approx(0.475)
    assert table.mce == pytest.approx(0.475)
    assert int(table.count_M[-1]) == 2


def test_probability_of_exactly_zero_is_in_the_first_bin():
    table = classwise(binary([0.0, 0.0], [0, 1]), bins=10)[1]
    assert int(table.count_M[0]) == 2
    assert table.ece == 0.5


def test_borders_belong_to_the_bin_on_their_left():
    edges = borders(15)
    assert place(torch.tensor(edges, dtype=torch.float64), edges).tolist() == [0, *range(15)]


def test_empty_bins_count_nothing():
    table = equal_width(binary([0.99, 0.99], [1, 1]), bins=15)
    assert table.ece == pytest.approx(0.01)
    assert table.rms == pytest.approx(0.01)
    assert int((table.count_M > 0).sum()) == 1


def test_two_classes_have_the_confidence_of_the_likelier_one():
    table = equal_width(binary([0.2, 0.8], [0, 1]), bins=10)
    assert table.confidence_M.sum() == pytest.approx(1.6)
    assert table.ece == pytest.approx(0.2)


def test_the_first_of_equally_likely_classes_is_the_answer():
    assert binary([0.5, 0.5], [0, 1]).correct_N.tolist() == [1, 0]


def test_equal_mass_bins_are_of_equal_mass():
    confidence_N = torch.rand(600, dtype=torch.float64)
    assert torch.bincount(by_rank(confidence_N, 15)).tolist() == [40] * 15


def test_ties_share_a_bin_and_the_order_of_rows_means_nothing():
    generator = np.random.default_rng(0)
    positive = generator.choice([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 300, p=[0.05, 0.05, 0.1, 0.1, 0.2, 0.5])
    truth = (generator.random(300) < positive).astype(int)
    order = generator.permutation(300)
    first = equal_mass(binary(list(positive), list(truth)))
    second = equal_mass(binary(list(positive[order]), list(truth[order])))
    # Six values of confidence, six bins: each gap by hand.
    by_hand = sum(abs((truth[positive == p] - p).sum()) for p in np.unique(positive)) / 300
    assert first.ece == pytest.approx(by_hand)
    assert second.ece == pytest.approx(first.ece, abs=1e-15)


def test_one_confidence_for_all_is_one_bin():
    table = equal_mass(binary([0.75] * 8, [1] * 6 + [0] * 2))
    assert int(table.count_M.max()) == 8
    assert table.ece == 0


def test_the_largest_gap_needs_one_per_cent_of_the_examples():
    positive = [0.95] * 500 + [0.55] * 2
    table = equal_width(binary(positive, [1] * 500 + [0] * 2), bins=10)
    assert table.mce == pytest.approx(0.05)
    table = equal_width(binary([0.95] * 100 + [0.55] * 2, [1] * 100 + [0] * 2), bins=10)
    assert table.mce == pytest.approx(0.55)


def test_debiased_squares_have_mean_zero_where_nothing_is_wrong():
    """arXiv:1909.10155. Over 400 samples of a perfect model: the squares have mean 0 within five standard errors, and
    those that are not debiased do not."""
    generator = np.random.default_rng(0)
    raw, debiased = [], []
    for _ in range(400):
        positive = generator.uniform(0.5, 1, 300)
        table = equal_width(binary(list(positive), list((generator.random(300) < positive).astype(int))))
        raw.append(table.rms**2)
        share = table.correct_M / table.count_M.clamp(min=1)
        debiased.append(table._squared(share * (1 - share) / (table.count_M - 1)))
    standard_error = np.std(debiased) / 20
    # Within a bin of finite width confidences differ: the true squared gaps are 0 all the same.
    assert abs(np.mean(debiased)) < 5 * standard_error
    assert np.mean(raw) > 20 * standard_error


def test_agrees_with_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration", reason="needs scikit-learn")
    generator = np.random.default_rng(1)
    positive = generator.random(2000)
    truth = (generator.random(2000) < positive**1.5).astype(int)
    share, mean = calibration.calibration_curve(truth, positive, n_bins=15)
    table = classwise(binary(list(positive), list(truth)))[1]
    np.testing.assert_allclose(table.correct_M / table.count_M, share, atol=1e-12)
    np.testing.assert_allclose(table.confidence_M / table.count_M, mean, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(2, 1), torch.tensor([0, 0]), "2 classes at least"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "1 row"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "1 of 2 are outside 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([0, -100]), "1 of 2 are outside"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.zeros(2, 2), torch.tensor([0]), "one for each of 2"),
        (torch.tensor([[0.0, float("nan")], [0.0, float("inf")]]), torch.tensor([0, 0]), "2 of 2 rows are not finite"),
        (torch.zeros(3), torch.tensor([0, 0, 0]), r"\(rows, classes\)"),
    ],
)
def test_wrong_predictions_are_refused(logits, labels, words):
    with pytest.raises(DataError, match=words):
        Predictions.from_logits(logits, labels)


@pytest.mark.parametrize("row", [[0.5, 0.6], [-0.1, 1.1], [float("nan"), 0.5], [5.0, -3.0]])
def test_what_is_no_distribution_is_refused(row):
    with pytest.raises(DataError, match="1 of 2 rows"):
        Predictions.from_probabilities(torch.tensor([[0.5, 0.5], row]), torch.tensor([0, 1]))


def test_groups_are_one_for_each_row():
    with pytest.raises(DataError, match="1 names for 2 rows"):
        Predictions.from_logits(torch.zeros(2, 2), torch.tensor([0, 1]), groups=["a"])


def test_huge_logits_keep_their_order_and_their_size():
    logits = torch.tensor([[1e30, 0.0], [0.0, 1e300], [1.7e308, -1.7e308]], dtype=torch.float64)
    found = Predictions.from_logits(logits, torch.tensor([0, 0, 0]))
    assert found.confidence_N.tolist() == [1, 1, 1]
    assert found.correct_N.tolist() == [1, 0, 1]
    assert bool(torch.isfinite(found.scores_NK).all())


def test_probabilities_and_logits_are_the_same_predictions():
    logits = torch.randn(50, 4, dtype=torch.float64)
    target = torch.randint(0, 4, (50,))
    one, other = Predictions.from_logits(logits, target), Predictions.from_probabilities(logits.softmax(1), target)
    torch.testing.assert_close(one.log_probability_NK, other.log_probability_NK)
