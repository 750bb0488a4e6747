"""A temperature that is trained beside the model: exact gradients, one query, and probabilities that are right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.style import Style
from discreet.errors import ConfigError
from discreet.privacy.plan import Plan
from discreet.train.check import check
from discreet.train.loop import make_private
from discreet.train.setup import clipping_of
from discreet.train.tempered import (
    BOUND,
    SMALL_BOUND,
    STEEPNESS,
    TEMPERATURE_BOUND,
    Tempered,
    check_tempered,
    is_tempered,
    reason,
    tempered_clipping,
    tempered_cross_entropy,
)


def _model() -> Tempered:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tempered(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))).double()
    with torch.no_grad():
        model.temperature.log.fill_(-0.2)
    return model


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert isinstance(model, Tempered)
    return tempered_cross_entropy(model, *batch)


def _batch(size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 4 * torch.randn(size, 5, generator=generator, dtype=torch.float64), torch.arange(size) % 3


def test_each_part_has_the_gradient_of_its_own_loss() -> None:
    model, (features, targets) = _model(), _batch()
    losses = tempered_cross_entropy(model, features, targets)
    plain = F.cross_entropy(model.body(features), targets, reduction="none")
    assert torch.equal(losses, plain)
    body, log = list(model.body.parameters()), model.temperature.log
    found = torch.autograd.grad(losses.sum(), [*body, log], retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(plain.sum(), body), strict=False):
        torch.testing.assert_close(one, other)
    held = F.cross_entropy(model(features), targets, reduction="sum")
    torch.testing.assert_close(found[-1], torch.autograd.grad(held, [log])[0])


def test_ignored_examples_move_nothing() -> None:
    model, (features, targets) = _model(), _batch()
    losses = tempered_cross_entropy(model, features, torch.full_like(targets, -100))
    assert not losses.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses.sum(), list(model.parameters())))


def test_the_value_is_the_temperature() -> None:
    model, (features, _) = _model(), _batch()
    assert model.temperature.value == pytest.approx(math.exp(0.2 * STEEPNESS))
    torch.testing.assert_close(model(features), model.body(features) / model.temperature.value)


@pytest.mark.parametrize("examples", [500, 50_000])
def test_temperature_and_model_are_one_query(examples: int) -> None:
    """S^2 = R^2 + (k R)^2, and no example moves the whitened sum by more."""
    model, batch, rule = _model(), _batch(), tempered_clipping(examples)
    assert check(model, _loss, batch, clipping=rule).passed
    bound, share = (BOUND, 0.1) if examples >= 20_000 else (SMALL_BOUND, 0.25)
    whole = clipped_gradient(model, _loss, batch, clipping=rule)
    assert whole.sensitivity == pytest.approx(bound * math.hypot(1.0, share), rel=1e-12)
    bounds = {
        group[0].split(".")[0]: each.clip_bound
        for group, each in rule.divide(dict(model.named_parameters())).rules.items()
    }
    assert bounds == pytest.approx({"body": bound, "temperature": STEEPNESS * TEMPERATURE_BOUND})
    for out in range(7):
        rows = [row for row in range(7) if row != out]
        rest = clipped_gradient(model, _loss, (batch[0][rows], batch[1][rows]), clipping=rule)
        moved = math.hypot(
            *(
                float((value - rest.tensors[name]).norm()) / whole.noise_weights.get(name, 1.0)
                for name, value in whole.tensors.items()
            )
        )
        assert moved <= whole.sensitivity


def test_the_rule_survives_the_plan() -> None:
    rule = tempered_clipping(1000)
    plan = Plan.solve(examples=1000, batch_size=100, steps=5, noise_multiplier=1.0, clipping=rule.describe())
    found = clipping_of(Plan.from_json(plan.to_json()))
    assert found.describe() == rule.describe()
    assert is_tempered(found)
    assert "temperature" in reason(found, 1000)


def test_a_temperature_without_a_group_of_its_own_is_refused() -> None:
    for rule in (Clipping.automatic(), Clipping.abadi(1.0, style=Style.per_layer())):
        with pytest.raises(ConfigError, match="Tempered"):
            check_tempered(_model(), rule)
    with pytest.raises(ConfigError, match="wrap it"):
        check_tempered(_model().body, tempered_clipping(1000))
    check_tempered(_model(), Clipping.none())
    check_tempered(_model(), tempered_clipping(10))
    check_tempered(_model().body, Clipping.automatic())


def _noisy_classes(examples: int, seed: int) -> TensorDataset:
    """Two classes that a linear model knows; a fifth of the labels is wrong, so no one should be surer than .9."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(examples, 8, generator=generator)
    targets = (features[:, 0] > 0) ^ (torch.rand(examples, generator=generator) < 0.2)
    return TensorDataset(features, targets.long())


def _nll(run_dir: Path, *, tempered: bool) -> tuple[float, float]:
    """(negative log-likelihood, accuracy) on fresh rows, in test mode."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        body: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    model = Tempered(body) if tempered else body
    private = make_private(
        model,
        torch.optim.Adam(model.parameters()),
        _noisy_classes(3000, 3),
        loss=_loss if tempered else _plain,
        epsilon=3.0,
        batch_size=600,
        steps=120,
        learning_rate=0.02,
        run_dir=run_dir,
        seed=5,
        clipping=None if tempered else Clipping.abadi(0.1),
    )
    for _ in private:
        pass
    features, targets = _noisy_classes(5000, 4).tensors
    with torch.no_grad():
        logits = model(features)
    return float(F.cross_entropy(logits, targets)), float((logits.argmax(1) == targets).float().mean())


def _plain(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_tempered_model_is_as_accurate_and_knows_how_sure_it_may_be(tmp_path: Path) -> None:
    """The floor is .500 nats. Clipped alone the model is far above it; with the temperature it is near."""
    tempered, accuracy = _nll(tmp_path / "tempered", tempered=True)
    clipped, accuracy_clipped = _nll(tmp_path / "clipped", tempered=False)
    assert accuracy > accuracy_clipped - 0.02
    assert tempered < 0.57
    assert clipped > tempered + 0.03
