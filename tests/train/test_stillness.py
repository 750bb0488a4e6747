"""A buffer that follows only some examples is refused before anything of their batch is released."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from discreet.errors import UnsupportedUse
from discreet.train.contest import Choice, PrivateScore
from discreet.train.loop import Private, make_private
from discreet.train.trial import Recipe
from discreet.train.tune import tune
from train import toys

FAR = 50.0


class _Largest(nn.Module):
    """Divides by the largest number so far, as an observer of ranges does that was set on public data."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.how = how
        self.register_buffer("largest", torch.tensor(10.0))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(1))
        self.frozen = nn.Parameter(torch.tensor(10.0), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        if len(rows) > len(self.table):
            self.table = torch.zeros(len(rows))
        seen = rows.detach().abs().max()
        if seen > self.largest:
            if self.how == "written":
                self.largest.copy_(seen)
            elif self.how == "exchanged":
                self.largest = seen
            elif self.how == "frozen parameter":
                with torch.no_grad():
                    self.frozen.copy_(seen)
        return self.layer(rows / 10.0)


def _data(*, far: bool) -> TensorDataset:
    features, targets = toys.data().tensors
    if far:
        features[100, 0] = FAR
    return TensorDataset(features, targets)


def _private(run_dir: Path, *, how: str, far: bool = True) -> Private:
    network = _Largest(how)
    moved = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return make_private(
        network,
        torch.optim.Adam(moved),
        _data(far=far),
        loss=toys.loss,
        noise_multiplier=1.0,
        batch_size=60,
        steps=12,
        learning_rate=0.01,
        microbatch=20,
        run_dir=run_dir,
    )


@pytest.mark.parametrize("how", ["written", "exchanged", "frozen parameter"])
def test_what_one_example_writes_ends_the_run_before_a_release(tmp_path: Path, how: str) -> None:
    """Before, the largest number of all private rows stood in the released model, exactly."""
    private = _private(tmp_path / "run", how=how)
    name = "frozen" if how == "frozen parameter" else "largest"
    with pytest.raises(UnsupportedUse, match=f"{name}: a forward wrote it"):
        for _ in private:
            pass
    assert not (tmp_path / "run" / "release" / "model.safetensors").exists()
    private.close()


def test_an_unchanged_loop_is_watched_as_well(tmp_path: Path) -> None:
    private = _private(tmp_path / "run", how="written")
    optimizer = private._updates._optimizer

    def loop() -> None:
        for features, targets in private.loader:
            private.backward(nn.functional.cross_entropy(private.model(features), targets, reduction="none"))
            optimizer.step()

    with pytest.raises(UnsupportedUse, match="largest: a forward wrote it"):
        loop()
    private.close()


def test_a_search_is_watched_as_well(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedUse, match="largest: a forward wrote it"):
        tune(
            [Choice("only", lambda: _Largest("written"), Recipe(0.01))],
            _data(far=True),
            loss=toys.loss,
            score=PrivateScore(lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float()),
            epsilon=3.0,
            batch_size=60,
            steps=12,
            run_dir=tmp_path / "run",
        )


def test_counters_and_tables_of_sizes_are_no_statistics(tmp_path: Path) -> None:
    private = _private(tmp_path / "run", how="written", far=False)
    assert private.check_report.moving == ("calls",)
    for _ in private:
        pass
    assert float(private.model.calls) >= 12
    assert float(private.model.largest) == 10.0
