"""Neighbouring data sets, rows of NaN and infinity among them: no row moves a bounded sum by more than it says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from discreet.core.calibration import (
    BRIER,
    COUNT,
    GAP,
    NLL,
    RIGHT,
    SLOPE,
    Neighbours,
    Reliability,
    summed_reliability,
    summed_slopes,
    unweighted,
)
from discreet.errors import ConfigError

INF, NAN = math.inf, math.nan
ROWS = [
    [0.0, 0.0, 0.0],
    [1.0, -2.0, 0.5],
    [30.0, 0.0, -30.0],
    [1e30, 0.0, 0.0],
    [1.7e308, -1.7e308, 0.0],
    [-1e300, -1e300, -1e300],
    [5e-324, 0.0, -5e-324],
    [NAN, 0.0, 0.0],
    [INF, 0.0, 0.0],
    [-INF, 0.0, 0.0],
    [INF, INF, -INF],
    [NAN, NAN, NAN],
    [2.0, 2.0, 2.0],
    [0.3, 0.3, -4.0],
]
LABELS = [0, 1, 2, -1, 3, -100, 2**62]
BASE = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
TARGET = torch.arange(20) % 3
HOSTILE = [(torch.tensor([row], dtype=torch.float64), torch.tensor([label])) for row in ROWS for label in LABELS]


def _stacked(total):
    return torch.cat([value.flatten() for value in total.tensors.values()])


def _with(rows):
    return torch.cat([BASE, *[row for row, _ in rows]]), torch.cat([TARGET, *[label for _, label in rows]])


@pytest.mark.parametrize("beta", [1e-3, 0.05, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("bound", [0.5, 4.0])
def test_no_row_moves_the_slopes_by_more_than_the_bound(beta, bound):
    def slopes(rows):
        total = summed_slopes(*_with(rows), beta=beta, bound=bound)
        assert total.sensitivity == bound
        return float(total.tensors[SLOPE])

    without = slopes([])
    alone = [slopes([row]) - without for row in HOSTILE]
    assert max(abs(moved) for moved in alone) <= bound * (1 + 1e-12)
    assert max(alone) - min(alone) <= 2 * bound * (1 + 1e-12)
    # The bound is reached where slopes are large: it is the sensitivity and not a loose figure.
    if beta >= 1:
        assert max(alone) == pytest.approx(bound)


@pytest.mark.parametrize("bins", [3, 15])
def test_no_row_moves_the_report_by_more_than_its_sensitivity(bins):
    asked = Reliability(bins=bins, nll_bound=5.0)

    def sums(rows):
        return _stacked(summed_reliability(*_with(rows), asked=asked, neighbours=Neighbours.ADD_REMOVE))

    without = sums([])
    moved = [sums([row]) - without for row in HOSTILE]
    added = asked.sensitivity(Neighbours.ADD_REMOVE)
    assert added == pytest.approx(math.sqrt(2))
    assert max(float(each.norm()) for each in moved) <= added * (1 + 1e-12)
    replaced = 2 * asked.sensitivity(Neighbours.REPLACE_ONE)
    assert replaced == pytest.approx(math.sqrt(5.5))
    largest = max(float((one - other).norm()) for one, other in itertools.combinations(moved, 2))
    assert largest <= replaced * (1 + 1e-12)


def test_the_sensitivities_of_the_report_are_nearly_attained():
    """A sure wrong answer moves everything by its most: one of 1, and four of 1/2."""
    asked = Reliability(bins=15, nll_bound=5.0)
    wrong = summed_reliability(
        torch.tensor([[50.0, 0.0]]), torch.tensor([1]), asked=asked, neighbours=Neighbours.ADD_REMOVE
    )
    assert float(_stacked(wrong).norm()) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_rows_that_are_no_rows_count_as_said():
    nothing = summed_slopes(torch.tensor([[NAN, 1.0], [3.0, 0.0]]), torch.tensor([0, 7]), beta=1.0, bound=4.0)
    assert float(nothing.tensors[SLOPE]) == 0
    asked = Reliability(bins=10, nll_bound=5.0)
    strange = summed_reliability(
        torch.tensor([[NAN, 1.0], [3.0, 0.0]]), torch.tensor([0, 7]), asked=asked, neighbours=Neighbours.ADD_REMOVE
    )
    # The first counts as .5 and .5, so its answer is class 0, and right; the second is wrong.
    assert float(unweighted(RIGHT, strange.tensors[RIGHT], examples=2, asked=asked)) == 0.5


def test_no_row_is_a_sum_of_zero():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert float(summed_slopes(*empty, beta=1.0, bound=4.0).tensors[SLOPE]) == 0
    asked = Reliability(bins=3, nll_bound=5.0)
    assert float(_stacked(summed_reliability(*empty, asked=asked, neighbours=Neighbours.REPLACE_ONE)).norm()) == 0


def test_slopes_are_derivatives_of_the_loss():
    """In log beta, where nothing is clipped."""

    def loss(beta):
        return torch.nn.functional.cross_entropy(beta * BASE, TARGET, reduction="sum")

    step = 1e-5
    for beta in (0.3, 1.0, 2.0):
        by_hand = (loss(beta * math.exp(step)) - loss(beta * math.exp(-step))) / (2 * step)
        found = summed_slopes(BASE, TARGET, beta=beta, bound=1e9)
        assert float(found.tensors[SLOPE]) == pytest.approx(float(by_hand), rel=1e-6)


def test_without_noise_the_report_is_the_exact_one():
    asked = Reliability(bins=15, nll_bound=50.0)
    total = summed_reliability(BASE, TARGET, asked=asked, neighbours=Neighbours.ADD_REMOVE)
    probability = BASE.softmax(1)
    found = {name: unweighted(name, value, examples=20, asked=asked) for name, value in total.tensors.items()}
    confidence, answer = probability.max(1)
    right = (answer == TARGET).double()
    assert float(found[RIGHT]) == pytest.approx(float(right.mean()))
    assert float(found[NLL]) == pytest.approx(float(torch.nn.functional.cross_entropy(BASE, TARGET)))
    truth = torch.nn.functional.one_hot(TARGET, 3)
    assert float(found[BRIER]) == pytest.approx(float(((probability - truth) ** 2).sum(1).mean()))
    assert float(found[COUNT].sum()) == pytest.approx(20)
    assert float(found[GAP].sum()) == pytest.approx(float((right - confidence).sum()))


@pytest.mark.parametrize(
    ("scores", "target"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(scores, target):
    with pytest.raises(ConfigError, match="at least 2 classes"):
        summed_slopes(scores, target, beta=1.0, bound=4.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, INF, NAN])
def test_inverse_temperatures_are_positive_numbers(beta):
    with pytest.raises(ConfigError, match="beta"):
        summed_slopes(BASE, TARGET, beta=beta, bound=4.0)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="bins=2"):
        Reliability(bins=2, nll_bound=5.0)
    with pytest.raises(ConfigError, match="nll_bound"):
        Reliability(bins=15, nll_bound=INF)


def test_sums_are_on_the_host_whatever_the_default_device_is():
    asked = Reliability(bins=5, nll_bound=4.0)
    given = {"asked": asked, "neighbours": Neighbours.ADD_REMOVE}
    with torch.device("meta"):
        found = summed_reliability(BASE, TARGET, **given)
    assert torch.equal(_stacked(found), _stacked(summed_reliability(BASE, TARGET, **given)))
