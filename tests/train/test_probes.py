"""Probes of the learning rate inside a run: what they cost, what they may touch, how a run repeats them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from discreet.core.probe import LEVELS, RISES
from discreet.errors import ConfigError
from discreet.privacy.ledger import Ledger
from discreet.privacy.verification import verify
from discreet.train import probing as probing_module
from discreet.train import updates as updates_module
from discreet.train.auto_lr import AutoLR, LearningRate, decay
from discreet.train.loop import Private, make_private
from discreet.train.probing import probe_sum
from discreet.train.rate_search import AGAIN, SECOND_SHARE
from discreet.train.step import ClippedStep, Microbatch
from discreet.train.stillness import Allowed, Watch
from discreet.train.tempered import Tempered, tempered_cross_entropy
from discreet.train.tolerance import Asked, Question
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
    network = network if network is not None else toys.model()
    make = torch.optim.SGD if momentum else torch.optim.Adam
    options: dict[str, Any] = {"momentum": 0.9} if momentum else {}
    return make_private(
        network,
        make(network.parameters(), lr=123.0, **options),
        toys.data(),
        loss=toys.loss,
        noise_multiplier=1.5,
        batch_size=60,
        steps=updates,
        learning_rate=rate,
        run_dir=run_dir,
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
    true_release = updates_module.release

    def spy(total: Any, *, noise_multiplier: float, source: Any, divisor: float, into: Any) -> Any:
        assert (noise_multiplier, divisor) == (1.5, 60)
        released.append((source.position, tuple(total.tensors)))
        return true_release(total, noise_multiplier=noise_multiplier, source=source, divisor=divisor, into=into)

    true_draw = updates_module.Updates.draw

    def draw(self: updates_module.Updates) -> np.ndarray:
        drawn.append(self.done)
        return true_draw(self)

    monkeypatch.setattr(updates_module, "release", spy)
    monkeypatch.setattr(updates_module.Updates, "draw", draw)
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
    true_release = updates_module.release
    charged: list[int] = []

    def spy(total: Any, **settings: Any) -> Any:
        charged.append(Ledger.read(tmp_path / "ledger.jsonl").steps_reserved)
        return true_release(total, **settings)

    monkeypatch.setattr(updates_module, "release", spy)
    private = _private(tmp_path)
    next(iter(private))
    assert all(count > position for position, count in enumerate(charged))
    private.close()


def test_probes_leave_weights_optimizer_and_gradients_alone(tmp_path):
    """F3, E4: nothing is stepped twice, nothing is left behind."""
    network = toys.model()
    before = toys.weights(network)
    private = _private(tmp_path, network=network)
    private._updates.find_rate()
    assert private.done >= 2
    assert torch.equal(toys.weights(network), before)
    assert private._updates._optimizer.state_dict()["state"] == {}
    assert all(parameter.grad is None for parameter in network.parameters())
    private.close()


def test_sums_of_all_ranks_are_added_before_the_noise(tmp_path, monkeypatch):
    """F10: a probe's sum goes through the same sum over ranks as a gradient."""
    order: list[str] = []
    true_sum, true_release = updates_module.world_sum, updates_module.release
    monkeypatch.setattr(updates_module, "world_sum", lambda total: (order.append("sum"), true_sum(total))[1])

    def spy(total: Any, **settings: Any) -> Any:
        order.append("release")
        return true_release(total, **settings)

    monkeypatch.setattr(updates_module, "release", spy)
    private = _private(tmp_path)
    next(iter(private))
    assert order == ["sum", "release"] * (len(order) // 2)
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
        _probe_until(private._updates, private._updates._rates.search.asked + stop - before.index - 1)
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
    private = make_private(
        network,
        optimizer,
        toys.data(),
        loss=toys.loss,
        noise_multiplier=1.5,
        batch_size=60,
        steps=LONG,
        run_dir=tmp_path / "loop",
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
        return make_private(
            network,
            torch.optim.Adam(network.parameters()),
            data,
            loss=toys.loss,
            noise_multiplier=1.5,
            batch_size=60,
            steps=STEPS,
            run_dir=tmp_path,
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
    network = toys.model()
    private = make_private(
        network,
        torch.optim.Adam(network.parameters()),
        toys.data(),
        loss=toys.loss,
        epsilon=math.inf,
        batch_size=60,
        steps=STEPS,
        run_dir=tmp_path,
    )
    step = next(iter(private))
    assert step.verdict is not None
    assert step.verdict.accepted
    private.close()


def test_a_scheduler_beside_auto_is_refused_before_anything_is_released(tmp_path, monkeypatch):
    private = _private(tmp_path)
    steps = iter(private)
    next(steps)
    private._updates._optimizer.param_groups[0]["lr"] = 0.5
    monkeypatch.setattr(updates_module, "release", None)
    with pytest.raises(ConfigError, match="also writes lr"):
        next(steps)
    private.close()


def test_a_probe_that_does_not_fit_is_done_again_in_halves():
    """Nothing is dropped or counted twice: the sum is that of the whole batch."""
    sizes: list[int] = []

    class Hungry(_Curved):
        def forward(self, rows: Tensor) -> Tensor:
            sizes.append(len(rows))
            if len(rows) > 5:
                raise MemoryError
            return super().forward(rows)

    assert _asked(Hungry(), microbatch=20) == pytest.approx(_asked(_Curved(), microbatch=20), rel=1e-12)
    assert sizes[:2] == [20, 10]
    assert max(sizes[2:]) == 5


class _Dropped(nn.Module):
    """Its loss is a dropout mask: the same at every pass, or a rise out of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.dropout(rows[:, 0].abs() + 1.0, p=0.5) + 0 * self.weight


def _step(network: nn.Module, rows: Tensor, *, microbatch: int) -> ClippedStep:
    return ClippedStep(
        model=network,
        loss=lambda model, batch: model(batch),
        fetch=lambda indices: rows[torch.from_numpy(indices)],
        parameters=dict(network.named_parameters()),
        clipping=None,  # type: ignore[arg-type]
        layout=None,
        microbatch=Microbatch(microbatch),
        watch=Watch(network, Allowed()),
    )


def _asked(network: nn.Module, *, seed: int = 3, microbatch: int = 8, rows: int = 20) -> float:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    question = Question(Asked.RISE, displacement=0.5, bound=100.0)
    names: Iterator[str] = iter(dict(network.named_parameters()))
    with torch.random.fork_rng():
        total = probe_sum(
            question,
            step=_step(network, table, microbatch=microbatch),
            indices=np.arange(rows),
            seed=seed,
            directions=lambda name, entries: torch.ones(entries, dtype=torch.float64),
            ratios=dict.fromkeys(names, 1.0),
        )
    return float(total.tensors[RISES])


def test_passes_of_a_probe_share_their_dropout_masks():
    """F9: a loss that depends on nothing but its mask does not rise at all."""
    assert _asked(_Dropped().train()) == 0.0


class _Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.square()


@pytest.mark.parametrize("microbatch", [1, 3, 8, 100])
def test_microbatches_never_change_a_probe(microbatch):
    """F10: losses are summed over all microbatches before one draw of noise."""
    whole = _asked(_Curved(), microbatch=20)
    assert abs(whole) > 0.1
    assert _asked(_Curved(), microbatch=microbatch) == pytest.approx(whole, rel=1e-12)


def test_a_probe_of_no_example_is_zero():
    assert _asked(_Curved(), rows=0) == 0.0


def test_an_example_of_the_worst_kind_moves_what_is_released_by_no_more_than_the_sensitivity(tmp_path):
    """E12, without chance: the sums of two neighbouring batches, with a canary whose loss is infinite or enormous."""
    for canary in (math.inf, 1e30, -1e30):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        rows[-1] = canary
        sums = []
        for count in (19, 20):
            network = _Curved()
            total = probe_sum(
                Question(Asked.RISE, displacement=0.5, bound=4.0),
                step=_step(network, rows, microbatch=8),
                indices=np.arange(count),
                seed=1,
                directions=lambda name, entries: torch.ones(entries, dtype=torch.float64),
                ratios={"weight": 1.0},
            )
            sums.append(float(total.tensors[RISES]))
        assert abs(sums[1] - sums[0]) <= total.sensitivity == 4.0


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
    private._updates.find_rate()
    private.close()
    assert shifts
    for shift in shifts:
        still = {name for name, displacement in shift.items() if not displacement.any()}
        assert still == {"temperature.log", "temperature.floor"}


def _probe_until(updates: updates_module.Updates, count: int) -> None:
    """Make so many probes, as `find_rate` does, and stop there."""
    search = updates._rates.search
    assert search is not None
    true_question = search.question
    search.question = lambda done: true_question(done) if search.asked < count else None  # type: ignore[method-assign]
    updates.find_rate()
    del search.question
