from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.style import Style
from discreet.errors import ConfigError
from discreet.privacy.compute import Machine
from discreet.privacy.plan import Plan
from discreet.train import setup
from discreet.train.setup import check_plan, clipping_of, covered_parameters, default_clipping, solve_plan
from train import toys

NOTHING = {
    "epsilon": None,
    "delta": None,
    "noise_multiplier": None,
    "batch_size": None,
    "steps": None,
    "compute": None,
    "machine": lambda _: Machine(seconds_per_example=1e-3, seconds_per_step=1e-2),
    "clipping": None,
}


RULES = [
    Clipping.automatic(),
    Clipping.automatic(gamma=0.3),
    Clipping.abadi(2.5),
    Clipping.abadi(2.5, style=Style.per_parameter()),
    Clipping.automatic(style=Style.groups("encoder.0", "head")),
    Clipping.none(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.describe()))
def test_a_plan_gives_back_its_clipping(rule: Clipping) -> None:
    plan = Plan.solve(examples=100, batch_size=10, steps=5, epsilon=3.0, clipping=rule.describe())
    assert clipping_of(Plan.from_json(plan.to_json())) == rule


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "abadi", "clip_bound": 1.0},
        {"kind": "abadi", "style": "flat"},
        {"kind": "softly", "style": "flat"},
        {"kind": "abadi", "style": "layers", "clip_bound": 1.0},
        {"kind": "abadi", "style": "flat", "clip_bound": "wide"},
        {"kind": "automatic", "style": "flat", "gamma": 0.01, "clip_bound": 0.5},
        {"kind": "none", "style": "per_layer"},
    ],
    ids=str,
)
def test_a_plan_whose_clipping_is_not_what_training_would_do_is_refused(record: dict[str, str | float]) -> None:
    plan = Plan.solve(examples=100, batch_size=10, steps=5, epsilon=3.0, clipping=record)
    with pytest.raises(ConfigError, match=r"^clipping \{.*\} in the plan: "):
        clipping_of(plan)


def test_no_guarantee_no_clipping() -> None:
    assert default_clipping(math.inf) == Clipping.none()
    assert default_clipping(3.0) == default_clipping(None) == Clipping.automatic()
    assert clipping_of(solve_plan(100, **(NOTHING | {"epsilon": math.inf}))) == Clipping.none()


def test_what_is_given_is_kept_and_the_rest_is_planned() -> None:
    plan = solve_plan(1000, **(NOTHING | {"epsilon": 2.0, "steps": 77}))
    assert (plan.steps, plan.epsilon) == (77, 2.0)
    assert 1 <= plan.batch_size <= 1000
    fixed = solve_plan(1000, **(NOTHING | {"noise_multiplier": 1.5, "steps": 10, "batch_size": 50}))
    assert (fixed.noise_multiplier, fixed.steps, fixed.batch_size) == (1.5, 10, 50)


def test_a_bound_on_compute_is_kept_and_noted() -> None:
    free = solve_plan(10_000, **(NOTHING | {"epsilon": 2.0}))
    plan = solve_plan(10_000, **(NOTHING | {"epsilon": 2.0, "compute": "10s"}))
    assert plan.steps * (1e-3 * plan.batch_size + 1e-2) <= 10.0
    assert plan.steps * plan.batch_size < free.steps * free.batch_size
    assert plan.notes == ("compute: 10s, 1,000 examples a second (as told)",)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"epsilon": 1.0, "noise_multiplier": 1.0},
        {"noise_multiplier": 1.0},
        {"epsilon": 1.0, "compute": "5m", "batch_size": 10, "steps": 10},
        {"epsilon": 1.0, "compute": "5 minutes"},
        {"epsilon": 1.0, "compute": "0.01s"},
    ],
)
def test_contradictions_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        solve_plan(1000, **(NOTHING | given))


def test_a_plan_of_other_data_or_clipping_is_refused() -> None:
    plan = Plan.solve(examples=100, batch_size=10, steps=5, epsilon=3.0)
    check_plan(plan, clipping=Clipping.automatic(), examples=100)
    with pytest.raises(ConfigError, match="101 examples"):
        check_plan(plan, clipping=None, examples=101)
    with pytest.raises(ConfigError, match="abadi"):
        check_plan(plan, clipping=Clipping.abadi(1.0), examples=100)


@pytest.mark.parametrize("places", [("cpu", "meta"), ("cuda:0", "cuda:1"), ("mps:0",)])
def test_parameters_are_on_one_device_that_knows_float64(places: tuple[str, ...], monkeypatch) -> None:
    """Norms are added up there; PyTorch would say that it expected all tensors on one device, and not what to do."""
    model = nn.Linear(3, 2)
    spread = {place: types.SimpleNamespace(device=torch.device(place)) for place in places}
    monkeypatch.setattr(setup, "trainable", lambda _: spread)
    with pytest.raises(ConfigError, match=f"{places[-1]}: must be on one device.*move the model"):
        covered_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_exactly_the_trainable_parameters_are_covered() -> None:
    model = toys.model()
    model[0].weight.requires_grad_(False)
    assert set(covered_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))) == {
        "0.bias",
        "3.weight",
        "3.bias",
    }
    with pytest.raises(ConfigError, match="closure"):
        covered_parameters(nn.Linear(2, 2), torch.optim.LBFGS(nn.Linear(2, 2).parameters()))
