"""Probes inside a run: what finding a rate costs, what it may touch, how a run repeats it."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from discreet.core.probe import LEVELS, RISES
from discreet.errors import ConfigError
from discreet.privacy.ledger import Ledger
from discreet.privacy.verification import verify
from discreet.train import probing as probing_module
from discreet.train import releases as releases_module
from discreet.train.auto_lr import AutoLR, LearningRate, decay
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from discreet.train.probing import find_rate
from discreet.train.rate_search import AGAIN, SECOND_SHARE
from discreet.train.tempered import Tempered, tempered_cross_entropy
from discreet.train.updates import Updates
from train import toys

STEPS = 100


LONG = 160
"""Updates enough for a second search."""


def _private(
    run_dir: Path,
    *,
    rate: LearningRate = "auto",
    network: nn.Module | None = None,
    resume: bool = False,
    microbatch: int | None = None,
    checkpoint_steps: int = 50,
    momentum: bool = False,
    updates: int = STEPS,
) -> Private:
    return toys.private_run(
        run_dir,
        network=network,
        optimizer=partial(torch.optim.SGD, momentum=0.9, lr=123.0) if momentum else partial(torch.optim.Adam, lr=123.0),
        noise_multiplier=1.5,
        batch_size=60,
        steps=updates,
        learning_rate=rate,
        resume=resume,
        microbatch=microbatch,
        checkpoint_steps=checkpoint_steps,
        seed=7,
    )


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "release" / "metrics.jsonl").read_text().splitlines()]


def test_probes_are_updates_of_the_plan_and_cost_nothing_beyond_it(tmp_path):
    """E2, fix B, F11: the epsilon, delta and charges of a run with probes are those of one without, bit by bit."""
    for rate, name in (("auto", "auto"), (0.02, "fixed")):
        private = _private(tmp_path / name, rate=rate)
        seen = [step.index for step in private]
        assert seen[-1] == STEPS - 1
    auto, fixed = (verify(tmp_path / name) for name in ("auto", "fixed"))
    assert (auto.epsilon, auto.delta, auto.steps) == (fixed.epsilon, fixed.delta, fixed.steps)
    charges = [
        [record.body for record in Ledger.read(tmp_path / name / "ledger.jsonl").records if record.kind == "steps"]
        for name in ("auto", "fixed")
    ]
    assert charges[0] == charges[1]


def test_each_index_of_the_plan_has_one_batch_and_one_release(tmp_path, monkeypatch):
    """F1, F2, F3, F6, E4: no batch is met twice, all are divided by the expected batch, and each gives one release of
    the plan's noise; a probe releases its one number and no gradient."""
    released: list[tuple[int, tuple[str, ...]]] = []
    drawn: list[int] = []
    true_release = releases_module.release

    def spy(total: Any, *, noise_multiplier: float, source: Any, divisor: float, into: Any) -> Any:
        assert (noise_multiplier, divisor) == (1.5, 60)
        released.append((source.position, tuple(total.tensors)))
        return true_release(total, noise_multiplier=noise_multiplier, source=source, divisor=divisor, into=into)

    true_draw = releases_module.Releases.draw

    def draw(self: releases_module.Releases) -> np.ndarray:
        drawn.append(self.done)
        return true_draw(self)

    monkeypatch.setattr(releases_module, "release", spy)
    monkeypatch.setattr(releases_module.Releases, "draw", draw)
    private = _private(tmp_path)
    first = next(iter(private))
    probes = first.index
    assert 2 <= probes <= STEPS // 25
    assert drawn == list(range(probes + 1))
    assert [position for position, _ in released] == list(range(probes + 1))
    names = tuple(dict(private.model.named_parameters()))
    assert [kind for _, kind in released] == [(LEVELS,), *[(RISES,)] * (probes - 1), names]
    private.close()


def test_a_charge_is_in_the_ledger_before_a_probe_is_released(tmp_path, monkeypatch):
    true_release = releases_module.release
    charged: list[int] = []

    def spy(total: Any, **settings: Any) -> Any:
        charged.append(Ledger.read(tmp_path / "ledger.jsonl").steps_reserved)
        return true_release(total, **settings)

    monkeypatch.setattr(releases_module, "release", spy)
    private = _private(tmp_path)
    next(iter(private))
    assert all(count > position for position, count in enumerate(charged))
    private.close()


def test_probes_leave_weights_optimizer_and_gradients_alone(tmp_path):
    """F3, E4: nothing is stepped twice, nothing is left behind."""
    network = toys.model()
    before = toys.weights(network)
    private = _private(tmp_path, network=network)
    find_rate(private._updates)
    assert private.done >= 2
    assert torch.equal(toys.weights(network), before)
    assert private._updates.optimizer.state_dict()["state"] == {}
    assert all(parameter.grad is None for parameter in network.parameters())
    private.close()


def test_every_decision_is_in_the_log_and_in_the_step(tmp_path):
    steps = list(_private(tmp_path))
    probes = [record for record in _metrics(tmp_path) if "probe_rise" in record]
    assert len(probes) >= 1
    for record in probes:
        assert record["probe_noise"] == pytest.approx(8 * 1.5 / 60)
        assert record["probe_rate"] > 0
    assert any("loss_level" in record for record in _metrics(tmp_path))
    verdict = steps[0].verdict
    assert verdict is not None
    assert verdict.reason
    assert steps[0].learning_rate == pytest.approx(probes[-1]["probe_rate"] * decay(steps[0].index, STEPS))


@pytest.mark.parametrize("momentum", [False, True])
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, momentum):
    """Stopped between probes, after the last one, and later; with the rate that the probes had found."""
    whole = _private(tmp_path / "whole", momentum=momentum)
    rates = {step.index: step.learning_rate for step in whole}
    for stop in (1, 2, len(rates) // 2):
        where = tmp_path / f"stop{stop}"
        private = _private(where, checkpoint_steps=1, momentum=momentum)
        updates = private._updates
        if stop <= 2:
            _probe_until(updates, stop)
        else:
            steps = iter(private)
            for _ in range(stop):
                next(steps)
        private.close()
        again = _private(where, resume=True, checkpoint_steps=1, momentum=momentum)
        # A generator that is left behind makes no checkpoint of its last step, so one step may be done again.
        assert {step.index: step.learning_rate for step in again}.items() <= rates.items()
        assert torch.equal(toys.weights(again.model), toys.weights(whole.model))


def test_a_second_search_is_made_of_updates_too_and_resumes(tmp_path):
    """In the middle of a run: indices of the plan go to probes, nothing else moves, and a stop there changes no bit."""
    whole = _private(tmp_path / "whole", updates=LONG)
    steps = list(whole)
    gaps = [b.index - a.index - 1 for a, b in pairwise(steps) if b.index - a.index > 1]
    assert len(gaps) == 1
    assert 2 <= gaps[0] <= LONG // SECOND_SHARE
    before = next(a for a, b in pairwise(steps) if b.index - a.index > 1)
    assert before.index == LONG // AGAIN - 1
    report = verify(tmp_path / "whole")
    assert report.steps == LONG
    verdict = steps[-1].verdict
    assert verdict is not None
    assert "at the start" in verdict.reason
    for stop in range(before.index + 1, before.index + gaps[0] + 2):
        where = tmp_path / f"stop{stop}"
        private = _private(where, checkpoint_steps=1, updates=LONG)
        moved = iter(private)
        while next(moved).index < before.index:
            pass
        private.save()
        _probe_until(private._updates, private._updates.rates.search.asked + stop - before.index - 1)
        assert private.done == min(stop, before.index + 1 + gaps[0])
        private.save()
        private.close()
        again = _private(where, resume=True, checkpoint_steps=1, updates=LONG)
        rest = {step.index: step.learning_rate for step in again}
        assert rest == {step.index: step.learning_rate for step in steps if step.index > before.index}
        assert torch.equal(toys.weights(again.model), toys.weights(whole.model))


def test_an_unchanged_loop_gets_the_same_rate_and_weights(tmp_path):
    iterated = _private(tmp_path / "iterated", updates=LONG)
    list(iterated)
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters(), lr=9.0)
    private = toys.private_run(
        tmp_path / "loop",
        network=network,
        optimizer=lambda _parameters: optimizer,
        noise_multiplier=1.5,
        batch_size=60,
        steps=LONG,
        seed=7,
    )
    for batch in private.loader:
        private.backward(toys.loss(network, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(toys.weights(network), toys.weights(iterated.model))


def test_the_rate_does_not_depend_on_where_the_search_begins(tmp_path):
    """Within a factor of two, over four orders of magnitude, by the probes of one short and noisy run each."""
    peaks = []
    for prior in (1e-3, 1e-2, 1e-1):
        private = _private(tmp_path / str(prior), rate=AutoLR(prior=prior))
        step = next(iter(private))
        peaks.append(step.learning_rate / (1 - step.index / STEPS))
        private.close()
    assert max(peaks) / min(peaks) < 4


def test_a_probe_that_is_repeated_on_other_data_gets_another_key_and_another_charge(tmp_path):
    """The noise of a probe never meets two sums: what a crash left behind is drawn and charged anew."""
    network = toys.model()

    def private(data: TensorDataset, *, resume: bool = False) -> Private:
        return toys.private_run(
            tmp_path,
            network=network,
            dataset=data,
            noise_multiplier=1.5,
            batch_size=60,
            steps=STEPS,
            resume=resume,
        )

    first = private(toys.data())
    before = first._updates.run.ledger.key_id
    _probe_until(first._updates, 2)
    first.close()
    features, targets = toys.data().tensors
    again = private(TensorDataset(features + 1, targets), resume=True)
    assert again._updates.run.ledger.key_id != before
    next(iter(again))
    assert again._updates.run.ledger.steps_reserved > again.done
    again.close()


def test_without_noise_the_rate_is_found_all_the_same(tmp_path):
    private = toys.private_run(tmp_path, epsilon=math.inf, batch_size=60, steps=STEPS)
    step = next(iter(private))
    assert step.verdict is not None
    assert step.verdict.accepted
    private.close()


def test_a_scheduler_beside_auto_is_refused_before_anything_is_released(tmp_path, monkeypatch):
    private = _private(tmp_path)
    steps = iter(private)
    next(steps)
    private._updates.optimizer.param_groups[0]["lr"] = 0.5
    monkeypatch.setattr(releases_module, "release", None)
    with pytest.raises(ConfigError, match="also writes lr"):
        next(steps)
    private.close()


def test_temperature_and_floor_are_no_weights_and_stay(tmp_path, monkeypatch):
    """What is asked is how much noise the weights bear: a displacement of the temperature has no part in the answer."""
    shifts: list[Any] = []
    true_rises = probing_module.summed_rises

    def spy(*arguments: Any, shift: Any, bound: float) -> Any:
        shifts.append(shift)
        return true_rises(*arguments, shift=shift, bound=bound)

    monkeypatch.setattr(probing_module, "summed_rises", spy)
    network = Tempered(toys.model())
    private = make_private(
        network,
        torch.optim.Adam(network.parameters()),
        toys.data(),
        loss=lambda model, batch: tempered_cross_entropy(model, *batch),
        noise_multiplier=1.5,
        batch_size=60,
        steps=STEPS,
        run_dir=tmp_path,
        seed=7,
    )
    find_rate(private._updates)
    private.close()
    assert shifts
    for shift in shifts:
        still = {name for name, displacement in shift.items() if not displacement.any()}
        assert still == {"temperature.log", "temperature.floor"}


def _probe_until(updates: Updates, count: int) -> None:
    """Make so many probes, as `find_rate` does, and stop there."""
    search = updates.rates.search
    assert search is not None
    true_question = search.question
    search.question = lambda done: true_question(done) if search.asked < count else None  # type: ignore[method-assign]
    find_rate(updates)
    del search.question
