"""A small search that the attacks on it share: begun, killed, charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from discreet.privacy.repetitions import Stopping
from discreet.privacy.tuning import plan_search
from discreet.train.contest import Choice, PrivateScore, PublicScore
from discreet.train.trial import Recipe
from discreet.train.tune import Tuned, tune
from train import toys

STEPS = 2
SEED = 9


def share_right(model: nn.Module) -> float:
    features, targets = toys.data(examples=200).tensors
    return float((model(features).argmax(1) == targets).float().mean())


def hits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def build_small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


CHOICES = tuple(Choice(name=f"rate {rate}", build=build_small, recipe=Recipe(rate)) for rate in (0.01, 0.1))


def planned(*, epsilon: float = 3.0, private_score: bool = False, many: bool = False) -> Plan:
    """Seed 9 makes at least three runs of it. ``many``: so does every seed, but for one in 300."""
    return plan_search(
        examples=toys.EXAMPLES,
        epsilon=epsilon,
        runs=1000 if many else 6,
        stopping=Stopping.GEOMETRIC if many else Stopping.LOGARITHMIC,
        private_score=private_score,
        batch_size=30,
        steps=STEPS,
    )


def searched(where: Path, **changes: Any) -> Tuned:
    usual = {"choices": CHOICES, "loss": toys.loss, "score": PublicScore(share_right), "seed": SEED}
    if not changes.get("resume") and "epsilon" not in changes:
        usual["plan"] = planned(private_score=isinstance(changes.get("score"), PrivateScore))
    named = {**usual, **changes}
    return tune(named.pop("choices"), toys.data(), run_dir=where, **named)


class Stopped(Exception):
    """Stands for the death of the process."""


def begun_search(where: Path, *, runs: int = 1, **changes: Any) -> None:
    """A search that died in the run after so many whole ones."""
    left = [runs * STEPS]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    with pytest.raises(Stopped):
        searched(where, on_step=step, **changes)


def charges_of(where: Path) -> list[str]:
    return [record.body["name"] for record in Ledger.read(where / "ledger.jsonl").records if record.kind == "query"]
