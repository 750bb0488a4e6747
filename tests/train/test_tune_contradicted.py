"""A search that goes on with other numbers, another score or other weights than it began with is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from discreet.core.clipping import Clipping
from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy.repetitions import Stopping
from discreet.privacy.verification import verify
from discreet.train.contest import PrivateScore, PublicScore
from discreet.train.run import Run
from train.attacked import CHOICES, SEED, STEPS, begun_search, build_small, hits, planned, searched, share_right


@pytest.mark.parametrize(
    "score",
    [
        PublicScore(lambda model: -share_right(model)),
        PublicScore(share_right, data="another file"),
    ],
)
def test_a_search_does_not_go_on_under_another_score(tmp_path, score):
    begun_search(tmp_path / "run")
    with pytest.raises(ConfigError, match="score: changed since the search began"):
        searched(tmp_path / "run", score=score, resume=True)


def test_a_search_does_not_go_on_under_another_private_score(tmp_path):
    begun_search(tmp_path / "run", score=PrivateScore(hits))

    def first_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).argmax(1) == 0).float()

    with pytest.raises(ConfigError, match="score: changed since the search began"):
        searched(tmp_path / "run", score=PrivateScore(first_class), resume=True)


def test_a_search_does_not_go_on_from_other_starting_weights(tmp_path):
    """The same architecture, of which the model's description shows nothing."""

    def warm() -> nn.Module:
        model = build_small()
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        return model

    begun_search(tmp_path / "run")
    choices = (CHOICES[0], dataclasses.replace(CHOICES[1], build=warm))
    with pytest.raises(ConfigError, match="choices: changed since the search began"):
        searched(tmp_path / "run", choices=choices, resume=True)


CONTRADICTIONS = {
    "epsilon": {"epsilon": 30.0},
    "delta": {"delta": 1e-3},
    "runs": {"runs": 100},
    "stopping": {"stopping": Stopping.GEOMETRIC},
    "batch_size": {"batch_size": 60},
    "steps": {"steps": 1},
    "clipping": {"clipping": Clipping.abadi(3.0)},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_resumed_search_is_not_told_other_numbers(tmp_path, name):
    begun_search(tmp_path / "run")
    with pytest.raises(ConfigError, match=name):
        searched(tmp_path / "run", resume=True, **CONTRADICTIONS[name])
    plan = planned()
    assert plan.search is not None
    same = {"epsilon": 3.0, "delta": plan.delta, "runs": 6, "batch_size": 30, "steps": STEPS, "plan": plan}
    assert searched(tmp_path / "run", resume=True, stopping=Stopping.LOGARITHMIC, **same).epsilon <= 3.0


@pytest.mark.parametrize("name", [name for name in CONTRADICTIONS if name != "clipping"])
def test_a_plan_and_its_numbers_are_not_given_both(tmp_path, name):
    with pytest.raises(ConfigError, match="with a plan"):
        searched(tmp_path / "run", plan=planned(), **CONTRADICTIONS[name])
    assert not (tmp_path / "run").exists()


def test_another_seed_is_another_search(tmp_path):
    begun_search(tmp_path / "run")
    for seed in (SEED + 1, None):
        with pytest.raises(ConfigError, match="not what the run"):
            searched(tmp_path / "run", resume=True, seed=seed)


def test_an_edited_plan_does_not_stretch_the_budget(tmp_path):
    """The ledger holds the plan; the file beside it is a copy, and verify compares the two."""
    begun_search(tmp_path / "run")
    path = tmp_path / "run" / "release" / "plan.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "epsilon": 300.0}))
    with pytest.raises(LedgerError, match=r"plan\.json: field 'epsilon' differs"):
        verify(tmp_path / "run")
    assert _resumed_epsilon(tmp_path / "run") == 3.0


def _resumed_epsilon(where: Path) -> float:
    with Run.resume(where, seed=SEED) as run:
        with pytest.raises(BudgetExceeded):
            run.ledger.reserve_query("another search", run.plan.queries()[-1])
        return run.plan.epsilon
