"""A temperature and a floor that are trained beside the model: exact gradients, one query, honest probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.style import Style
from discreet.errors import CheckFailed, ConfigError
from discreet.privacy.plan import Plan
from discreet.train.check import Status, check
from discreet.train.make_private import make_private
from discreet.train.setup import clipping_of
from discreet.train.tempered import (
    BOUND,
    FLOOR_BOUND,
    FLOOR_STEEPNESS,
    SMALL_BOUND,
    STEEPNESS,
    TEMPERATURE_BOUND,
    Temperature,
    Tempered,
    body_bound,
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
        model.temperature.floor.fill_(0.5)
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
    body, ends = list(model.body.parameters()), list(model.temperature.parameters())
    found = torch.autograd.grad(losses.sum(), [*body, *ends], retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(plain.sum(), body), strict=False):
        torch.testing.assert_close(one, other)
    held = F.cross_entropy(model(features), targets, reduction="sum")
    for one, other in zip(found[len(body) :], torch.autograd.grad(held, ends), strict=True):
        torch.testing.assert_close(one, other)


def test_ignored_examples_move_nothing() -> None:
    model, (features, targets) = _model(), _batch()
    losses = tempered_cross_entropy(model, features, torch.full_like(targets, -100))
    assert not losses.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses.sum(), list(model.parameters())))


def test_the_output_is_the_mixture_of_a_softmax_and_a_floor() -> None:
    """p = (1 - e) softmax(z / T) + e / K."""
    model, (features, _) = _model(), _batch()
    assert model.temperature.value == pytest.approx(math.exp(0.2 * STEEPNESS))
    floor = model.temperature.share
    assert 0.05 < floor < 0.2
    wanted = (1 - floor) * torch.softmax(model.body(features) / model.temperature.value, 1) + floor / 3
    torch.testing.assert_close(model(features).exp(), wanted)
    torch.testing.assert_close(torch.softmax(model(features), 1), wanted)
    assert torch.equal(model(features).argmax(1), model.body(features).argmax(1))


@pytest.mark.parametrize("floor", [-1e6, -1.0, 0.0, 1.0, 1e6])
def test_a_floor_of_any_size_gives_probabilities(floor: float) -> None:
    """Also where softmax rounds to 0, and where a wild learning rate has moved the floor's parameter far."""
    layer = Temperature()
    with torch.no_grad():
        layer.floor.fill_(floor)
    assert 0 < layer.share < 1
    found = layer(torch.tensor([[0.0, 1e4, -1e4], [1.0, 1.0, 1.0]]))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2), rtol=1e-5, atol=0)


def test_bounds_are_passed_by_what_is_wrong_by_many_nats_alone() -> None:
    """d loss / d log(1 / T) is at most the loss without a floor, and log K; d loss / d e at most 1 / e."""
    model, (features, targets) = _model(), _batch()
    losses = F.nll_loss(model(features), targets, reduction="none")
    without = F.cross_entropy(model.body(features) / model.temperature.value, targets, reduction="none").detach()
    for loss, bare in zip(losses, without.tolist(), strict=True):
        log, floor = torch.autograd.grad(loss, list(model.temperature.parameters()), retain_graph=True)
        assert abs(float(log)) / STEEPNESS <= bare + math.log(3)
        assert abs(float(floor)) / FLOOR_STEEPNESS <= 1 / model.temperature.share


@pytest.mark.parametrize(("random_share", "low", "high"), [(0.0, 0.0, 0.003), (0.2, 0.1, 0.23)])
def test_the_floor_finds_labels_that_are_random_and_vanishes_without(
    random_share: float, low: float, high: float
) -> None:
    """Sure logits, right but for the labels that were drawn anew; clipped gradients, Adam as the program has it."""
    generator = torch.Generator().manual_seed(2)
    right = torch.randint(10, (500,), generator=generator)
    anew = torch.rand(500, generator=generator) < random_share
    targets = torch.where(anew, torch.randint(10, (500,), generator=generator), right)
    logits = 12.0 * F.one_hot(right, 10) + torch.randn(500, 10, generator=generator)
    model = Tempered(nn.Linear(10, 10))
    with torch.no_grad():
        model.body.weight.copy_(torch.eye(10))
        model.body.bias.zero_()
    optimizer, rule = torch.optim.Adam(model.temperature.parameters()), tempered_clipping(500)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        total = clipped_gradient(model, _loss, (logits, targets), clipping=rule).tensors
        for name, parameter in model.temperature.named_parameters():
            parameter.grad = total[f"temperature.{name}"].float()
        optimizer.step()
    assert low <= model.temperature.share <= high


@pytest.mark.parametrize("examples", [500, 50_000])
def test_temperature_and_model_are_one_query(examples: int) -> None:
    """S^2 = R^2 + 2 (k R)^2, and no example moves the whitened sum by more."""
    model, batch, rule = _model(), _batch(), tempered_clipping(examples)
    assert check(model, _loss, batch, clipping=rule).passed
    bound, share = (BOUND, 0.1) if examples >= 20_000 else (SMALL_BOUND, 0.15)
    whole = clipped_gradient(model, _loss, batch, clipping=rule)
    assert whole.sensitivity == pytest.approx(bound * math.sqrt(1.0 + 2 * share**2), rel=1e-12)
    assert body_bound(rule) == pytest.approx(bound)
    rules = rule.divide(dict(model.named_parameters())).rules
    bounds = {group[0] if len(group) == 1 else "body": each.clip_bound for group, each in rules.items()}
    apart = {"temperature.log": STEEPNESS * TEMPERATURE_BOUND, "temperature.floor": FLOOR_STEEPNESS * FLOOR_BOUND}
    assert bounds == pytest.approx({"body": bound, **apart})
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
    assert "abadi at 0.5" in reason(found, 1000)
    assert "2.2 % larger" in reason(found, 1000)
    assert body_bound(Clipping.abadi(3.0)) == 3.0


def test_a_temperature_without_a_group_of_its_own_is_refused() -> None:
    for rule in (Clipping.automatic(), Clipping.abadi(1.0, style=Style.per_layer())):
        with pytest.raises(ConfigError, match="Tempered"):
            check_tempered(_model(), rule)
    with pytest.raises(ConfigError, match="wrap it"):
        check_tempered(_model().body, tempered_clipping(1000))
    check_tempered(_model(), Clipping.none())
    check_tempered(_model(), tempered_clipping(10))
    check_tempered(_model().body, Clipping.automatic())


def _bare(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model.body(batch[0]), batch[1], reduction="none")


def _looked_at(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        assert torch.isfinite(model(batch[0])).all()
    return _bare(model, batch)


def _cut_off(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return _bare(model, batch) + F.nll_loss(model(batch[0]), batch[1], reduction="none").detach()


def _without_floor(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits = model.body(batch[0])
    return F.cross_entropy(logits * torch.exp(model.temperature.log * STEEPNESS), batch[1], reduction="none")


_DEAF = {
    "the body alone": (_bare, "temperature.log, temperature.floor: no loss depends on it"),
    "looked at": (_looked_at, "temperature.log, temperature.floor: no loss depends on it"),
    "cut off": (_cut_off, "temperature.log, temperature.floor: no loss depends on it"),
    "without the floor": (_without_floor, "temperature: temperature.floor: no loss depends on it"),
}


@pytest.mark.parametrize("case", _DEAF)
def test_a_loss_that_knows_nothing_of_the_temperature_is_refused(case: str, tmp_path: Path) -> None:
    """Noise would be paid for two numbers that stay as they began, and somebody would believe them."""
    deaf, said = _DEAF[case]
    report = check(_model(), deaf, _batch(4), clipping=tempered_clipping(1000))
    assert not report.passed
    (row,) = [row for row in report.rows if row.status is Status.FAILED]
    assert said in f"{row.name}: {row.detail}"
    assert "train with discreet.tempered_cross_entropy" in row.detail
    model = _model().float()
    with pytest.raises(CheckFailed, match=said):
        make_private(
            model,
            torch.optim.Adam(model.parameters()),
            TensorDataset(_batch(60)[0].float(), _batch(60)[1]),
            loss=deaf,
            epsilon=3.0,
            batch_size=20,
            steps=4,
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_rate_that_sets_itself_needs_an_optimizer_to_which_sizes_of_noise_are_nothing(tmp_path: Path) -> None:
    """Before anything is charged: a temperature has more noise than the weights that a rate is found for."""
    model = _model().float()
    with pytest.raises(ConfigError, match=r"SGD and noise of several sizes.*use Adam"):
        make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
            TensorDataset(_batch(60)[0].float(), _batch(60)[1]),
            loss=lambda model, batch: tempered_cross_entropy(model, *batch),
            epsilon=3.0,
            learning_rate="auto",
            batch_size=20,
            steps=4,
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def _ignored(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return tempered_cross_entropy(model, batch[0], torch.full_like(batch[1], -100))


def _checkpointed(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits = model.body(batch[0].clone().requires_grad_())
    tempered = checkpoint(model.temperature, logits, use_reentrant=True)
    return F.nll_loss(tempered, batch[1], reduction="none")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_gradient_that_is_zero_on_these_examples_is_no_reason_to_refuse() -> None:
    """Examples that the loss ignores, a body that says nothing yet, a floor at its lowest; and a second forward."""
    flat = _model()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    silent = Tempered(nn.Sequential(nn.Linear(5, 3), nn.Threshold(1e9, 0.0))).double()
    for model, loss in ((_model(), _ignored), (flat, _loss), (silent, _loss), (_model(), _checkpointed)):
        report = check(model, loss, _batch(4), clipping=tempered_clipping(1000))
        assert report.passed, report.table()


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
