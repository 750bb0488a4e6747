"""The same noise never meets two sums, and no sum is released without its own charge: what an attacker would try."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from torch.utils.data import TensorDataset

import discreet
from discreet.core.clipping import ClippedSum
from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy.ledger import Ledger
from discreet.privacy.verification import CERTIFIED
from discreet.train import releases, secret_files, updates
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from train import toys

STEPS, EVERY = 40, 10


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The positions at which one key's noise was added to two different sums, over all runs of a test."""
    seen: dict[tuple[bytes, int], set[str]] = {}
    original = releases.release

    def spy(total: ClippedSum, *, noise_multiplier: float, source: object, divisor: float, into: object) -> object:
        parts = b"".join(value.numpy().tobytes() for value in total.tensors.values())
        seen.setdefault((source._key, source.position), set()).add(hashlib.sha256(parts).hexdigest())
        return original(total, noise_multiplier=noise_multiplier, source=source, divisor=divisor, into=into)

    monkeypatch.setattr(releases, "release", spy)
    return lambda: [position for (_, position), sums in seen.items() if len(sums) > 1]


def _private(run_dir: Path, *, resume: bool = False, **changes: object) -> Private:
    network = changes.pop("model", None) or toys.model(dropout=0.3)
    optimizer = changes.pop("optimizer", torch.optim.Adam)(network.parameters(), lr=0.05)
    given = {
        "loss": toys.loss,
        "epsilon": 4.0,
        "batch_size": 20,
        "steps": STEPS,
        "learning_rate": 0.05,
        "run_dir": run_dir,
        "resume": resume,
        "checkpoint_steps": EVERY,
    } | changes
    return make_private(network, optimizer, given.pop("dataset", None) or toys.data(), **given)


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


def _fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))


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
    "initial weights, checkpoint lost": (dict, _remove("checkpoint"), lambda: {"model": _fresh()}),
    "data, record lost": (dict, _remove("state.json"), lambda: {"dataset": _moved()}),
    "weights, journal lost": (dict, _remove("sums"), lambda: {"loss": _scaled_loss(-2.0)}),
    "learning rate": (dict, _nothing, lambda: {"learning_rate": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_changed_between_two_lives_gets_a_new_key(
    tmp_path: Path, reused: Callable[[], list[int]], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    first, between, second = CASES[name]
    _go(_private(tmp_path, **first()), 25)
    between(tmp_path)
    with caplog.at_level(logging.WARNING, logger="discreet"):
        private = _private(tmp_path, resume=True, **second())
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
    _go(_private(tmp_path, loss=_scaled_loss(1.0), checkpoint_steps=50), 20)
    sums = tmp_path / "private" / "sums"
    sums.write_bytes(b"".join(sums.read_bytes().splitlines(keepends=True)[:kept]))
    private = _private(tmp_path, resume=True, loss=_scaled_loss(-2.0), checkpoint_steps=50)
    assert private.done == 0
    for step in private:
        assert step.epsilon <= 4.0
    assert reused() == []
    view = Ledger.read(tmp_path / "ledger.jsonl")
    assert len(view.key_ids) == 2
    assert "the journal of sums lacks updates" in str([record.body for record in view.records])


def test_a_journal_that_ends_inside_the_last_charge_keeps_the_key(tmp_path: Path) -> None:
    """The death of a process between a charge and the first release under it."""
    _go(_private(tmp_path), 32)
    with _private(tmp_path, resume=True).run as run:
        assert run.ledger.reserve_steps(first=32, count=8)
        key = run.ledger.key_id
    assert _private(tmp_path, resume=True).run.ledger.key_id == key


def test_a_ledger_that_lacks_what_was_released_is_refused(tmp_path: Path) -> None:
    """Records are cut off its end, which the checkpoint, from before them, does not know of."""
    _go(_private(tmp_path, checkpoint_steps=50), 35)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(LedgerError, match="lacks update 16, whose sum was released"):
        _private(tmp_path, resume=True, checkpoint_steps=50)


def test_after_a_change_of_key_each_step_says_what_was_released_before(tmp_path: Path) -> None:
    """The log and the progress line showed the epsilon of a run that had never been interrupted: 8.0 for 10.7."""
    _go(_private(tmp_path), EVERY + 3)
    private = _private(tmp_path, resume=True, loss=_scaled_loss(2.0))
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
        private = _private(tmp_path, resume=resume)
        earlier = private.earlier_seconds
        for _, _step in zip(range(steps), private, strict=False):
            clock[0] += 1.0
        private.close()
        clock[0] += 500.0
        return earlier

    assert go(EVERY + 4, resume=False) == 0.0
    assert go(EVERY + 3, resume=True) == EVERY
    assert go(2, resume=True) == 2 * EVERY
    private = _private(tmp_path, resume=True)
    assert private.earlier_seconds == 2 * EVERY


def test_nothing_changed_costs_nothing(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    _go(_private(tmp_path), 25)
    for _ in range(2):
        _go(_private(tmp_path, resume=True), 3)
    private = _private(tmp_path, resume=True)
    assert (private.done, private.steps) == (20, STEPS)
    _go(private, STEPS)
    assert reused() == []
    assert Ledger.read(tmp_path / "ledger.jsonl").key_ids == (private.run.ledger.key_id,)


def test_the_unchanged_loop_draws_again_under_the_new_key(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    for life, constant in enumerate((1.0, 1.00005)):  # less than a loop may be from loss=
        network = toys.model()
        optimizer = torch.optim.Adam(network.parameters())
        private = _private(tmp_path, resume=life > 0, model=network, optimizer=lambda *_args, o=optimizer, **_named: o)
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
    private = _private(tmp_path)
    batches = iter(private)
    for _ in range(25):
        next(batches)
    private._updates.releases.done -= 1
    private.save()
    private.close()
    _go(_private(tmp_path, resume=True), 5)
    assert reused() == []


def test_no_updates_left_is_told(tmp_path: Path) -> None:
    _go(_private(tmp_path, steps=8), 3)
    with pytest.raises(BudgetExceeded, match=r"0 of 8 updates left: .*\(data\); start a new run"):
        _private(tmp_path, resume=True, steps=8, dataset=_moved())


def test_a_batch_is_released_once_and_as_the_update_it_was_drawn_for(tmp_path: Path) -> None:
    """At the edge of a block of reservations, the second release would have had no charge."""
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters())
    private = _private(tmp_path, model=network, optimizer=lambda *_args, **_named: optimizer)
    steps = iter(private)
    for _ in range(releases.RESERVE_STEPS - 1):
        next(steps)
    batches = iter(private.loader)
    private.backward(toys.loss(network, next(batches)))
    next(steps)
    with pytest.raises(ConfigError, match="drawn for update 15, at update 16"):
        optimizer.step()
    assert private.done == private.run.ledger.steps_reserved == releases.RESERVE_STEPS


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_run_cannot_be_copied(tmp_path: Path, duplicate: Callable[[object], object]) -> None:
    private = _private(tmp_path)
    for thing in (private._updates, private._updates.releases, private.run):
        with pytest.raises(ConfigError, match="cannot be copied"):
            duplicate(thing)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(private)


def test_one_run_trains_one_model(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    """The second would go on under a key of its own, and the first find its steps charged by the second."""
    first = _private(tmp_path)
    steps = iter(first)
    for _ in range(11):
        next(steps)
    with pytest.raises(ConfigError, match="this run is trained already"):
        _private(first.run, model=_fresh())
    assert next(steps).index == 11
    first.close()
    assert reused() == []


def test_a_second_thread_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding the position of an update and taking it, the other one would move it on."""
    private = _private(tmp_path)
    made, total = private._updates.releases, private._updates.clipped_sum()
    original, refused = releases.release, []

    def other() -> None:
        try:
            made.release_sum(total, index=0)
        except ConfigError as error:
            refused.append(str(error))

    def meanwhile(*given: object, **named: object) -> object:
        monkeypatch.setattr(releases, "release", original)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return original(*given, **named)

    monkeypatch.setattr(releases, "release", meanwhile)
    assert made.release_sum(total, index=0) is not None
    assert [text.startswith("two threads in one update") for text in refused] == [True]
    assert made._source.position == 1
    private.close()


def test_a_fork_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = _private(tmp_path)
    next(iter(private))
    child = os.getpid() + 1
    monkeypatch.setattr(releases.os, "getpid", lambda: child)
    with pytest.raises(ConfigError, match="fork"):
        next(iter(private))


def test_a_closed_run_takes_no_step(tmp_path: Path) -> None:
    private = _private(tmp_path)
    steps = iter(private)
    next(steps)
    private.close()
    with pytest.raises(ConfigError, match="was closed"):
        next(steps)


def test_a_run_that_is_finished_early_certifies_what_it_spent(tmp_path: Path) -> None:
    private = _private(tmp_path)
    made = 0
    for _ in private:
        made += 1
        if made == 20:
            break
    private.finish()
    found = discreet.verify(tmp_path)
    assert found.finished
    assert made <= found.steps < private.plan.steps
    assert found.epsilon == private.epsilon() < private.plan.epsilon
    assert found.model == CERTIFIED
    saved = load_file(tmp_path / "release" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in private.model.state_dict().items())
    with pytest.raises(ConfigError, match="closed"):
        next(iter(private))
    with pytest.raises(ConfigError, match="this run has ended"):
        _private(tmp_path, resume=True)


def test_weights_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    """Adam in float16, whose squares vanish: all of the budget went, and a model of NaN was released and certified."""
    private = _private(
        tmp_path,
        model=toys.model(torch.float16),
        dataset=toys.data(torch.float16),
        loss=lambda model, batch: toys.loss(model, batch).float(),
    )
    with pytest.raises(ConfigError, match=r"not finite after update [0-7],.*bfloat16"):
        list(private)
    assert 0 < private.done < private.steps
    private.finish()
    assert discreet.verify(tmp_path).finished


def test_parameters_that_are_parts_of_one_memory_are_saved(tmp_path: Path) -> None:
    """As flattened ones are, and those of an LSTM on CUDA: the run was refused when all was done, at its end."""
    network = toys.model()
    network.append(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    network[4][1].weight = network[4][0].weight
    flat = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, network.parameters())
    list(_private(tmp_path, model=network, steps=2))
    again = toys.model().append(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    again[4][1].weight = again[4][0].weight
    load_model(again, tmp_path / "release" / "model.safetensors")
    assert torch.equal(toys.weights(again), toys.weights(network))
    assert len(load_file(tmp_path / "release" / "model.safetensors")) == 6


def test_iterating_a_finished_run_does_nothing(tmp_path: Path) -> None:
    private = _private(tmp_path, steps=3)
    assert len(list(private)) == 3
    assert list(private) == []
    assert list(private.loader) == []


@pytest.mark.parametrize("change", ["freeze", "replace", "add"])
def test_another_model_in_mid_run_is_refused(tmp_path: Path, change: str) -> None:
    network = toys.model()
    private = _private(tmp_path, model=network)
    steps = iter(private)
    next(steps)
    if change == "freeze":
        network[0].weight.requires_grad_(False)
    elif change == "replace":
        network[3] = nn.Linear(8, 2)
    else:
        network.append(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="trainable parameters changed"):
        next(steps)


def test_a_gradient_that_was_not_released_moves_nothing(tmp_path: Path) -> None:
    network = toys.model()
    network[0].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    with pytest.raises(ConfigError, match="not released"):
        _private(tmp_path / "a", model=network)
    assert not (tmp_path / "a").exists()
    network[0].weight.grad = None
    private = _private(tmp_path / "b", model=network)
    steps = iter(private)
    next(steps)
    extra = nn.Parameter(torch.zeros(3))
    extra.grad = torch.ones(3)
    private._updates.optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ConfigError, match="not released"):
        next(steps)


def test_a_late_backward_after_leaving_the_loop_is_refused(tmp_path: Path) -> None:
    network = toys.model()
    private = _private(tmp_path, model=network)
    for batch in private.loader:
        left = batch
        break
    with pytest.raises(ConfigError, match="without a batch"):
        private.backward(toys.loss(network, left))
    assert all(parameter.grad is None for parameter in network.parameters())


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
    _go(_private(tmp_path), 25)
    before = Ledger.read(tmp_path / "ledger.jsonl").steps_reserved
    with pytest.raises(ConfigError, match=message):
        _private(tmp_path, resume=True, **changes)
    view = Ledger.read(tmp_path / "ledger.jsonl")
    assert view.steps_reserved == before
    assert len(view.key_ids) == 1


def test_a_full_disk_stops_before_the_noise(tmp_path: Path, reused: object, monkeypatch: pytest.MonkeyPatch) -> None:
    private = _private(tmp_path)
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
    resumed = _private(tmp_path, resume=True)
    assert (resumed.done, resumed.steps) == (0, STEPS)


@pytest.mark.parametrize("content", [b"", b"short", bytes(32)])
def test_a_key_that_is_no_secret_is_never_used(tmp_path: Path, content: bytes) -> None:
    """An empty or zeroed file is what a power failure, or an interrupted end of a run, may leave."""
    _go(_private(tmp_path), 2)
    (tmp_path / "private" / "key").write_bytes(content)
    with pytest.raises((ConfigError, LedgerError), match="key"):
        _private(tmp_path, resume=True)
    assert len(Ledger.read(tmp_path / "ledger.jsonl").key_ids) == 1
