from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from discreet.app.data import IGNORED, Examples
from discreet.app.evaluation import evaluate


class _Fixed(nn.Module):
    """Logits are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return features


def test_figures_by_hand() -> None:
    features = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, math.log(3.0)], [5.0, 0.0]])
    targets = torch.tensor([0, 1, 0, IGNORED])
    found = evaluate(_Fixed().train(), Examples(features=features, targets=targets))
    assert found is not None
    assert found.examples == 4
    assert found.accuracy == 1 / 4
    assert found.nll == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 3)
    assert 0 <= found.ece <= 1
    assert (found.listed, found.unlisted) == (3, 1)


def test_a_constant_answer_is_judged_on_the_same_rows_as_the_model() -> None:
    """The commonest label is one that no answer can name: of the others, class 1 is the commonest."""
    targets = torch.tensor([IGNORED, IGNORED, IGNORED, 1, 1, 0])
    found = evaluate(_Fixed(), Examples(features=torch.tensor([[0.0, 1.0]]).repeat(6, 1), targets=targets))
    assert found is not None
    assert found.constant_accuracy == found.accuracy == 2 / 6


def test_without_a_row_of_a_listed_class_nothing_is_said_of_probabilities() -> None:
    examples = Examples(features=torch.zeros(3, 2), targets=torch.full((3,), IGNORED))
    found = evaluate(_Fixed(), examples)
    assert found is not None
    assert (found.accuracy, found.constant_accuracy, found.listed) == (0.0, 0.0, 0)
    assert (found.nll, found.ece) == (None, None)


def test_mode_is_put_back() -> None:
    model = _Fixed().train()
    evaluate(model, Examples(features=torch.zeros(2, 2), targets=torch.zeros(2, dtype=torch.int64)))
    assert model.training


def test_many_rows_are_evaluated_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 3, generator=generator)
    targets = torch.randint(3, (5000,), generator=generator)
    found = evaluate(_Fixed(), Examples(features=features, targets=targets))
    assert found is not None
    assert found.accuracy == float((features.argmax(1) == targets).double().mean())


def test_no_row_is_no_figure() -> None:
    assert evaluate(_Fixed(), Examples(features=torch.zeros(0, 2), targets=torch.zeros(0, dtype=torch.int64))) is None
