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
        self.unused = nn.Parameter(torch.zeros(1))

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
    assert is_isolated(_Given(), _score, batch, singles, loss=_score)
    assert not is_isolated(_Given(), lambda model, values: values / values.max(), batch, singles, loss=_score)


def test_a_coupling_that_keeps_the_sum_is_found():
    batch = torch.tensor([0.4, 0.5, 0.6])
    singles = [batch[at : at + 1] for at in range(3)]
    assert not is_isolated(_Given(), lambda model, values: 0.5 + values - values.mean(), batch, singles, loss=_score)


class _Mixing(nn.Module):
    """A classifier whose rows see each other in evaluation mode alone, and a little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, rows: Tensor) -> Tensor:
        logits = self.layer(rows)
        return logits if self.training else logits - 0.01 * logits.mean(0)


def _right(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(rows).argmax(1) == 0).float()


def _loss(model: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(rows), torch.zeros(len(rows), dtype=torch.int64), reduction="none")


def test_a_coupling_that_turns_no_answer_of_the_check_is_found():
    torch.manual_seed(0)
    rows = torch.randn(4, 3)
    singles = [rows[at : at + 1] for at in range(4)]
    assert not is_isolated(_Mixing(), _right, rows, singles, loss=_loss)
    assert is_isolated(nn.Linear(3, 2), _right, rows, singles, loss=_loss)


def test_a_coupling_behind_a_head_of_zeros_is_found():
    """Every logit of the fresh model is 0, and so is every difference: 70 scores moved with one row."""

    def compared(model: nn.Module, rows: Tensor) -> Tensor:
        logits = model(rows)
        return ((logits - logits.mean(0)).argmax(1) == 0).float()

    torch.manual_seed(0)
    head, rows = nn.Linear(3, 2), torch.randn(4, 3)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    singles = [rows[at : at + 1] for at in range(4)]
    assert not is_isolated(head, compared, rows, singles, loss=_loss)
    assert is_isolated(head, _right, rows, singles, loss=_loss)
    assert not head.weight.any()
