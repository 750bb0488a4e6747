"""Models and scores that would make a search cost more than it says: shared, remembering, failing, no number."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from discreet.errors import CheckFailed, ConfigError
from discreet.privacy.verification import verify
from discreet.train.contest import Choice, PublicScore
from discreet.train.run_directory import MODEL
from discreet.train.trial import Recipe
from train.attacked import CHOICES, begun_search, build_small, charges_of, searched

_ONE_MODEL = build_small()


@pytest.mark.parametrize(
    "builds",
    [
        (lambda: _ONE_MODEL, build_small),
        (build_small, lambda: nn.Sequential(*_ONE_MODEL), lambda: nn.Sequential(*_ONE_MODEL)),
    ],
)
def test_runs_do_not_share_a_model(tmp_path, builds):
    """Each run would train what the one before has trained: many times the steps that are charged."""
    choices = [Choice(name=str(index), build=build, recipe=Recipe(0.1)) for index, build in enumerate(builds)]
    with pytest.raises(ConfigError, match="shares trainable weights"):
        searched(tmp_path / "run", choices=choices)
    assert not (tmp_path / "run").exists()


def test_a_frozen_part_may_be_shared(tmp_path):
    backbone = nn.Linear(6, 4)
    backbone.requires_grad_(False)
    choices = [
        Choice(name=str(rate), build=lambda: nn.Sequential(backbone, nn.Linear(4, 2)), recipe=Recipe(rate))
        for rate in (0.01, 0.1)
    ]
    before = backbone.weight.clone()
    searched(tmp_path / "run", choices=choices)
    assert torch.equal(backbone.weight, before)


def test_weights_that_no_seed_decides_are_refused(tmp_path):
    generator = torch.Generator()

    def build() -> nn.Module:
        model = build_small()
        nn.init.normal_(model[0].weight, generator=generator)
        return model

    with pytest.raises(ConfigError, match="different weights"):
        searched(tmp_path / "run", choices=[Choice(name="loose", build=build, recipe=Recipe(0.1))])
    assert not (tmp_path / "run").exists()


class _Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights_are_kept_and_released(tmp_path):
    found = searched(tmp_path / "run", choices=[Choice(name="tied", build=_Tied, recipe=Recipe(0.1))])
    assert torch.equal(found.model.first.weight, found.model.second.weight)
    assert verify(tmp_path / "run").finished


@pytest.mark.parametrize(
    ("answer", "error"),
    [(lambda _: "good", ConfigError), (lambda _: None, ConfigError), (lambda _: torch.ones(3), ConfigError)],
)
def test_a_score_that_is_no_number_costs_nothing(tmp_path, answer, error):
    with pytest.raises(error, match="is no number"):
        searched(tmp_path / "run", score=PublicScore(answer))
    assert not (tmp_path / "run").exists()


def test_a_score_that_fails_costs_nothing(tmp_path):
    def fails(_model: nn.Module) -> float:
        raise FileNotFoundError("the public rows")

    with pytest.raises(FileNotFoundError):
        searched(tmp_path / "run", score=PublicScore(fails))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_score_survives_a_crash_and_the_report(tmp_path, value):
    """The first run wins by it, or loses to every other, before and after the crash alike."""
    scores = iter([0.0] * len(CHOICES) + [value] + [0.5] * 100)
    score = PublicScore(lambda _model: next(scores))
    begun_search(tmp_path / "run", score=score)
    scores = iter([0.0] * len(CHOICES) + [0.5] * 100)
    found = searched(tmp_path / "run", score=score, resume=True)
    assert found.score == (math.inf if value == math.inf else 0.5)
    record = json.loads((tmp_path / "run" / "release" / "tuning.json").read_text())
    assert record["score"] == (None if value == math.inf else 0.5)


def test_a_run_that_raises_stays_charged_and_raises_again(tmp_path):
    """Nothing is skipped: a run left out would be a choice that the guarantee does not know."""
    answers = [0]

    def fails(_model: nn.Module) -> float:
        answers[0] += 1
        if answers[0] > len(CHOICES) + 1:
            raise MemoryError
        return 0.5

    for resume in (False, True, True):
        answers[0] = 1 if resume else 0
        with pytest.raises(MemoryError):
            searched(tmp_path / "run", score=PublicScore(fails), resume=resume)
        assert charges_of(tmp_path / "run") == ["search"]
    assert not (tmp_path / "run" / MODEL).exists()


class _Remembers(nn.Module):
    """Keeps the mean of what it has seen in a buffer, which is saved with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_small()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.copy_(x.mean(0))
        return self.inner(x)


def test_a_model_that_remembers_its_inputs_is_not_released(tmp_path):
    with pytest.raises(CheckFailed):
        searched(tmp_path / "run", choices=[Choice(name="remembers", build=_Remembers, recipe=Recipe(0.1))])
