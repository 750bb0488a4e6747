"""A private score: bounded by one for each example, whatever the score function returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from discreet.core.score import SCORES, is_isolated, summed_scores
from discreet.errors import ConfigError


class _Given(nn.Module):
    """Returns what it is given, and remembers its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, values_B: Tensor) -> Tensor:
        self.modes.append(self.training)
        return values_B


def _score(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def _sum(values: list[float]) -> float:
    batches = [(torch.tensor(values[at : at + 3]), len(values[at : at + 3])) for at in range(0, len(values), 3)]
    return float(summed_scores(_Given(), _score, batches).tensors[SCORES])


def test_the_sum_is_that_of_the_scores():
    assert _sum([1.0, 0.0, 0.5, 1.0, 0.25]) == 2.75


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.5])
def test_one_example_moves_the_sum_by_at_most_one(value):
    """Whatever it scores, at any place, and its share is known exactly."""
    rest = [1.0, 0.0, 0.5, 1.0]
    share = 0.0 if math.isnan(value) else min(1.0, max(0.0, value))
    for place in range(5):
        assert _sum([*rest[:place], value, *rest[place:]]) - _sum(rest) == share


def test_the_sensitivity_is_one():
    assert summed_scores(_Given(), _score, []).sensitivity == 1.0


def test_the_model_is_scored_in_evaluation_mode_and_put_back():
    model = nn.Sequential(_Given(), nn.Dropout(0.5))
    model[1].eval()
    total = summed_scores(model, _score, [(torch.ones(4), 4)])
    assert float(total.tensors[SCORES]) == 4.0
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].modes == [False]


@pytest.mark.parametrize("batch", [torch.ones(3, 1), torch.tensor(1.0), torch.ones(2)])
def test_scores_must_be_one_per_example(batch):
    with pytest.raises(ConfigError, match="one per example"):
        summed_scores(_Given(), _score, [(batch, 3)])


def test_a_score_that_looks_at_others_is_found():
    batch = torch.tensor([0.1, 0.5, 0.9])
    singles = [batch[at : at + 1] for at in range(3)]
    assert is_isolated(_Given(), _score, batch, singles)
    assert not is_isolated(_Given(), lambda model, values: values / values.max(), batch, singles)


def test_a_coupling_that_keeps_the_sum_is_found():
    batch = torch.tensor([0.4, 0.5, 0.6])
    singles = [batch[at : at + 1] for at in range(3)]
    assert not is_isolated(_Given(), lambda model, values: 0.5 + values - values.mean(), batch, singles)
