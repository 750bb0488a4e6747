"""The same noise never meets two sums, whatever happens between two lives of a run: what an attacker would try."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import discreet
from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy.ledger import Ledger
from discreet.train import secret_files, updates
from discreet.train.loop import Private
from train import toys
from train.charged_run import EVERY, STEPS, charged_run, fresh_model


def _go(private: Private, steps: int) -> None:
    for _, _step in zip(range(steps), private, strict=False):
        pass
    private.close()


def _scaled_loss(constant: float) -> Callable[..., torch.Tensor]:
    held = [constant]  # The record of the environment sees plain numbers, and not what a list holds.
    return lambda model, batch: held[0] * toys.loss(model, batch)


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = [factor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor[0]


def _remove(name: str) -> Callable[[Path], None]:
    def remove(run_dir: Path) -> None:
        path = run_dir / "private" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _nothing(_run_dir: Path) -> None:
    pass


def _moved() -> TensorDataset:
    features, targets = toys.data().tensors
    return TensorDataset(features + 0.1, targets)


CASES = {
    "loss constant in a closure": (lambda: {"loss": _scaled_loss(1.0)}, _nothing, lambda: {"loss": _scaled_loss(-2.0)}),
    "mode of a module": (dict, _nothing, lambda: {"model": toys.model(dropout=0.3).eval()}),
    "attribute of a module": (
        lambda: {"model": nn.Sequential(toys.model(), _Scaled(1.0))},
        _nothing,
        lambda: {"model": nn.Sequential(toys.model(), _Scaled(3.0))},
    ),
    "initial weights, checkpoint lost": (dict, _remove("checkpoint"), lambda: {"model": fresh_model()}),
    "data, record lost": (dict, _remove("state.json"), lambda: {"dataset": _moved()}),
    "weights, journal lost": (dict, _remove("sums"), lambda: {"loss": _scaled_loss(-2.0)}),
    "learning rate": (dict, _nothing, lambda: {"learning_rate": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_changed_between_two_lives_gets_a_new_key(
    tmp_path: Path, reused: Callable[[], list[int]], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    first, between, second = CASES[name]
    _go(charged_run(tmp_path, **first()), 25)
    between(tmp_path)
    with caplog.at_level(logging.WARNING, logger="discreet"):
        private = charged_run(tmp_path, resume=True, **second())
        for step in private:
            assert step.epsilon <= 4.0
    assert reused() == []
    view = Ledger.read(tmp_path / "ledger.jsonl")
    assert len(view.key_ids) == 2
    assert view.steps_reserved <= STEPS
    assert discreet.verify(tmp_path).epsilon <= 4.0
    assert "of 40 updates" in caplog.text


@pytest.mark.parametrize("kept", [0, 5, 15])
def test_a_journal_that_was_rolled_back_gets_a_new_key(
    tmp_path: Path, reused: Callable[[], list[int]], kept: int
) -> None:
    """A copy of the private half from before, or a power failure: the journal does not know what was released since."""
    _go(charged_run(tmp_path, loss=_scaled_loss(1.0), checkpoint_steps=50), 20)
    sums = tmp_path / "private" / "sums"
    sums.write_bytes(b"".join(sums.read_bytes().splitlines(keepends=True)[:kept]))
    private = charged_run(tmp_path, resume=True, loss=_scaled_loss(-2.0), checkpoint_steps=50)
    assert private.done == 0
    for step in private:
        assert step.epsilon <= 4.0
    assert reused() == []
    view = Ledger.read(tmp_path / "ledger.jsonl")
    assert len(view.key_ids) == 2
    assert "the journal of sums lacks updates" in str([record.body for record in view.records])


def test_a_journal_that_ends_inside_the_last_charge_keeps_the_key(tmp_path: Path) -> None:
    """The death of a process between a charge and the first release under it."""
    _go(charged_run(tmp_path), 32)
    with charged_run(tmp_path, resume=True).run as run:
        assert run.ledger.reserve_steps(first=32, count=8)
        key = run.ledger.key_id
    assert charged_run(tmp_path, resume=True).run.ledger.key_id == key


def test_a_ledger_that_lacks_what_was_released_is_refused(tmp_path: Path) -> None:
    """Records are cut off its end, which the checkpoint, from before them, does not know of."""
    _go(charged_run(tmp_path, checkpoint_steps=50), 35)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(LedgerError, match="lacks update 16, whose sum was released"):
        charged_run(tmp_path, resume=True, checkpoint_steps=50)


def test_after_a_change_of_key_each_step_says_what_was_released_before(tmp_path: Path) -> None:
    """The log and the progress line showed the epsilon of a run that had never been interrupted: 8.0 for 10.7."""
    _go(charged_run(tmp_path), EVERY + 3)
    private = charged_run(tmp_path, resume=True, loss=_scaled_loss(2.0))
    first = next(iter(private))
    assert first.index == EVERY
    # Those of the first life, and this one, are out.
    assert first.epsilon >= private.plan.spent(EVERY + 3 + 1)
    for step in private:
        last = step
    assert last.epsilon == pytest.approx(private.epsilon(), rel=1e-9)


def test_the_time_of_a_run_is_that_of_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last checkpoint of each: what came after it is done again."""
    clock = [1000.0]
    monkeypatch.setattr(updates, "monotonic", lambda: clock[0])

    def go(steps: int, *, resume: bool) -> float:
        private = charged_run(tmp_path, resume=resume)
        earlier = private.earlier_seconds
        for _, _step in zip(range(steps), private, strict=False):
            clock[0] += 1.0
        private.close()
        clock[0] += 500.0
        return earlier

    assert go(EVERY + 4, resume=False) == 0.0
    assert go(EVERY + 3, resume=True) == EVERY
    assert go(2, resume=True) == 2 * EVERY
    private = charged_run(tmp_path, resume=True)
    assert private.earlier_seconds == 2 * EVERY


def test_nothing_changed_costs_nothing(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    _go(charged_run(tmp_path), 25)
    for _ in range(2):
        _go(charged_run(tmp_path, resume=True), 3)
    private = charged_run(tmp_path, resume=True)
    assert (private.done, private.steps) == (20, STEPS)
    _go(private, STEPS)
    assert reused() == []
    assert Ledger.read(tmp_path / "ledger.jsonl").key_ids == (private.run.ledger.key_id,)


def test_the_unchanged_loop_draws_again_under_the_new_key(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    for life, constant in enumerate((1.0, 1.00005)):  # less than a loop may be from loss=
        network = toys.model()
        optimizer = torch.optim.Adam(network.parameters())
        private = charged_run(
            tmp_path, resume=life > 0, model=network, optimizer=lambda *_args, o=optimizer, **_named: o
        )
        for batch in private.loader:
            private.backward(constant * toys.loss(network, batch))
            optimizer.step()
            if life == 0 and private.done == 25:
                break
        private.close()
    assert reused() == []
    assert len(Ledger.read(tmp_path / "ledger.jsonl").key_ids) == 2
    assert discreet.verify(tmp_path).finished


def test_a_step_broken_off_and_saved_is_not_repeated_with_other_weights(
    tmp_path: Path, reused: Callable[[], list[int]]
) -> None:
    """As Ctrl-C inside optimizer.step() leaves it: weights half moved, the update not counted."""
    private = charged_run(tmp_path)
    batches = iter(private)
    for _ in range(25):
        next(batches)
    private._updates.releases.done -= 1
    private.save()
    private.close()
    _go(charged_run(tmp_path, resume=True), 5)
    assert reused() == []


def test_no_updates_left_is_told(tmp_path: Path) -> None:
    _go(charged_run(tmp_path, steps=8), 3)
    with pytest.raises(BudgetExceeded, match=r"0 of 8 updates left: .*\(data\); start a new run"):
        charged_run(tmp_path, resume=True, steps=8, dataset=_moved())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Sequential(nn.Linear(6, 2))}, "another model"),
        ({"optimizer": torch.optim.SGD}, "another optimizer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_charge(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _go(charged_run(tmp_path), 25)
    before = Ledger.read(tmp_path / "ledger.jsonl").steps_reserved
    with pytest.raises(ConfigError, match=message):
        charged_run(tmp_path, resume=True, **changes)
    view = Ledger.read(tmp_path / "ledger.jsonl")
    assert view.steps_reserved == before
    assert len(view.key_ids) == 1


def test_a_full_disk_stops_before_the_noise(tmp_path: Path, reused: object, monkeypatch: pytest.MonkeyPatch) -> None:
    private = charged_run(tmp_path)
    steps = iter(private)
    next(steps)
    weights = toys.weights(private.model)

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(secret_files.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        next(steps)
    assert torch.equal(toys.weights(private.model), weights)
    monkeypatch.undo()
    private.close()
    resumed = charged_run(tmp_path, resume=True)
    assert (resumed.done, resumed.steps) == (0, STEPS)


@pytest.mark.parametrize("content", [b"", b"short", bytes(32)])
def test_a_key_that_is_no_secret_is_never_used(tmp_path: Path, content: bytes) -> None:
    """An empty or zeroed file is what a power failure, or an interrupted end of a run, may leave."""
    _go(charged_run(tmp_path), 2)
    (tmp_path / "private" / "key").write_bytes(content)
    with pytest.raises((ConfigError, LedgerError), match="key"):
        charged_run(tmp_path, resume=True)
    assert len(Ledger.read(tmp_path / "ledger.jsonl").key_ids) == 1
