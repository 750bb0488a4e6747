"""measure(): finds planted costs, uses no value, and leaves everything as it was."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from discreet.errors import CheckFailed, ConfigError
from discreet.train import throughput
from discreet.train.make_private import make_private
from discreet.train.throughput import measure


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    features, targets = batch
    return F.cross_entropy(model(features), targets, reduction="none")


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 6), torch.tensor([0, 2, 1, 2])


def test_planted_costs_are_found() -> None:
    """Sleeping is exact from below on any machine; from above only within what other work on it allows."""

    def slow(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.004 + 0.0002 * len(batch[0]))
        return _loss(model, batch)

    found = measure(_model(), loss=slow, batch=_batch())
    quick = measure(_model(), loss=_loss, batch=_batch())
    assert 0.00018 < found.seconds_per_example < 0.002
    assert quick.seconds_per_example < found.seconds_per_example
    assert found.seconds_per_microbatch + 16 * found.seconds_per_example > 0.004
    assert found.parameters == 6 * 8 + 8 + 8 * 3 + 3
    assert found.fixed_bytes == 4 * 4 * found.parameters
    assert found.seconds_per_step > 0


def test_a_slow_model_is_measured_on_smaller_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SECONDS", 0.05)

    def slow(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.001 * len(batch[0]))
        return _loss(model, batch)

    assert measure(_model(), loss=slow, batch=_batch()).largest_microbatch <= 64


def test_what_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if len(batch[0]) > 100:
            raise MemoryError("too much")
        return _loss(model, batch)

    assert measure(_model(), loss=small, batch=_batch()).largest_microbatch == 64


def test_no_value_reaches_the_model() -> None:
    seen: list[torch.Tensor] = []

    def watching(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(batch[0].detach().clone())
        assert not bool(batch[1].any())
        return _loss(model, batch)

    features = torch.full((4, 6), 1e30)
    features[0] = float("nan")
    measure(_model(), loss=watching, batch=(features, torch.tensor([2, 2, 1, 1])))
    assert seen
    assert all(bool((values.abs() < 100).all()) for values in seen)


def test_model_and_randomness_stay_as_they_were() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = _batch()
    torch.manual_seed(7)
    measure(model, loss=_loss, batch=batch)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert model.training


def test_a_model_that_cannot_be_private_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(CheckFailed):
        measure(model, loss=_loss, batch=_batch())


def test_make_private_plans_within_the_time(tmp_path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(5_000, 6), torch.randint(3, (5_000,)))
    model = _model()

    def slow(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.0005 * len(batch[0]))
        return _loss(model, batch)

    arguments = {"loss": slow, "epsilon": 3.0, "learning_rate": None}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = make_private(model, optimizer, data, compute="20s", run_dir=tmp_path / "run", **arguments)
    plan = private.plan
    private.close()
    assert plan.steps * plan.batch_size * 0.0005 <= 20
    assert plan.steps * plan.batch_size > 1_000
    assert plan.notes[0].startswith("compute: 20s, ")
    with pytest.raises(ConfigError, match="with a plan"):
        make_private(model, optimizer, data, compute="20s", plan=plan, loss=_loss, run_dir=tmp_path / "other")
