"""A bound that follows a quantile of the norms: the same run whatever the microbatch, loop and interruptions."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

import discreet
from discreet.core.clipping import BELOW, Clipping
from discreet.privacy.accounting import SampledGaussian
from discreet.privacy.plan import Plan
from discreet.train.loop import Private
from discreet.train.setup import clipping_of
from train import toys

RULES = [
    Clipping.quantile(0.7, clip_bound=0.5),
    Clipping.quantile(0.7, clip_bound=0.5, style=discreet.Style.per_layer()),
    Clipping.quantile(0.7, style=discreet.Style.groups("0", bounds=(1.0, 2.0), noise_weights=(1.0, 3.0))),
]


def _private(run_dir: Path, **changes: object) -> Private:
    given = {"clipping": RULES[0], "noise_multiplier": 1.0, "batch_size": 20, "steps": 12, "microbatch": 8} | changes
    return toys.private_run(
        run_dir,
        network=toys.model(torch.float64),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        dataset=toys.data(torch.float64),
        learning_rate=None,
        seed=7,
        **given,
    )


def _finish(private: Private) -> tuple[torch.Tensor, float]:
    for _ in private:
        pass
    return toys.weights(private.model), private._updates.step.clipping.clip_bound


@pytest.mark.parametrize("rule", RULES, ids=["flat", "layers", "groups"])
@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatch_never_changes_the_bound_or_the_weights(tmp_path: Path, microbatch: int, rule: Clipping) -> None:
    runs = [_finish(_private(tmp_path / str(size), clipping=rule, microbatch=size)) for size in (microbatch, 64)]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-10, atol=1e-12)
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != rule.clip_bound


@pytest.mark.parametrize("batch_size", [1, 20])
def test_an_unchanged_loop_makes_the_same_run(tmp_path: Path, batch_size: int) -> None:
    """Empty batches too: the stand-in for one is not counted as an example below the bound."""
    expected = _finish(_private(tmp_path / "iterated", batch_size=batch_size))
    private = _private(tmp_path / "loop", batch_size=batch_size)
    optimizer = private._updates.optimizer
    for features, targets in private.loader:
        private.backward(torch.nn.functional.cross_entropy(private.model(features), targets, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(toys.weights(private.model), expected[0], rtol=1e-10, atol=1e-12)
    assert private._updates.step.clipping.clip_bound == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_resumed_run_goes_on_from_the_bound_of_its_checkpoint(tmp_path: Path, stop: int) -> None:
    expected = _finish(_private(tmp_path / "whole", checkpoint_steps=3))
    private = _private(tmp_path / "cut", checkpoint_steps=3)
    for step in private:
        if step.index + 1 == stop:
            break
    private.close()
    changes = {"noise_multiplier": None, "batch_size": None, "steps": None, "clipping": None}
    resumed = _private(tmp_path / "cut", checkpoint_steps=3, resume=True, **changes)
    assert torch.equal(_finish(resumed)[0], expected[0])
    assert resumed._updates.step.clipping.clip_bound == expected[1]
    assert resumed.plan.clipping == RULES[0].describe()
    # A step that is repeated with its old bound is charged once.
    assert resumed.run.ledger.steps_reserved == 12


def test_the_ledger_charges_one_event_a_step_for_count_and_gradient(tmp_path: Path) -> None:
    """The plan's sigma is that of both queries together, so a step is one sampled Gaussian and nothing else."""
    private = _private(tmp_path)
    _finish(private)
    queries = private.run.ledger.queries()
    assert {type(query) for query in queries} == {SampledGaussian}
    assert {query.noise_multiplier for query in queries} == {1.0}
    assert sum(query.count for query in queries) == 12


@pytest.mark.parametrize("rule", RULES, ids=["flat", "layers", "groups"])
def test_the_plan_says_the_rule_it_began_with(rule: Clipping) -> None:
    plan = Plan.solve(examples=120, batch_size=20, steps=3, noise_multiplier=1.0, clipping=rule.describe())
    assert clipping_of(Plan.from_json(plan.to_json())).describe() == rule.describe()


@pytest.mark.parametrize(
    "rule",
    [
        Clipping.abadi(0.3),
        Clipping.automatic(0.2),
        Clipping.normalized(),
        Clipping.psac(0.05),
        Clipping.global_(7.0),
        Clipping.none(),
        Clipping.abadi(0.3, style=discreet.Style.groups("0", bounds=(2.0, 0.1))),
    ],
    ids=lambda rule: rule.kind.value,
)
def test_every_rule_survives_the_plan(rule: Clipping) -> None:
    plan = Plan.solve(examples=120, batch_size=20, steps=3, noise_multiplier=1.0, clipping=rule.describe())
    found = clipping_of(Plan.from_json(plan.to_json()))
    assert found.describe() == rule.describe()
    names = ("0.weight", "0.bias", "2.weight")
    assert found.divide(names).sensitivity == rule.divide(names).sensitivity


def test_the_released_count_has_its_own_noise(tmp_path: Path) -> None:
    """Its standard deviation, over the expected batch: sigma sqrt(1 + k^2 / 4) / (k B)."""
    rule = Clipping.quantile(0.7, clip_bound=0.5, count_share=0.2)
    division = rule.divide(["w"])
    total = discreet.ClippedSum(
        {"w": torch.zeros(1, dtype=torch.float64), BELOW: torch.zeros(20_000, dtype=torch.float64)},
        sensitivity=division.sensitivity,
        noise_weights=division.noise_weights,
    )
    source = discreet.NoiseSource.keyed(bytes(32), private=False)
    found = discreet.release(total, noise_multiplier=1.5, source=source, divisor=50.0).tensors[BELOW]
    expected = 1.5 * math.sqrt(1.01) / (0.2 * 50.0)
    # 20,000 draws: five standard errors of a standard deviation are 2.5 %; false alarms 6e-7.
    assert float(found.std()) == pytest.approx(expected, rel=0.025)
