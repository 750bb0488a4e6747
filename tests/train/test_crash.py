"""Kill a run at every kind of instant; resume; the weights are those of the undisturbed run, and the ledger never lies.

Children are forked from a process that has torch loaded, so a whole run takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import discreet
from discreet.errors import ConfigError, DiscreetError
from discreet.privacy.ledger import Ledger
from discreet.train import checkpoint, loop, releases, run, run_directory, updates
from train import toys

STEPS, EVERY = 10, 4
CRASHED = 137


def _child(run_dir: Path, result: Path, *, resume: bool, arm: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    arm()
    network = toys.model(dropout=0.2)
    private = toys.private_run(
        run_dir,
        network=network,
        noise_multiplier=0.8,
        batch_size=20,
        steps=STEPS,
        learning_rate=0.05,
        microbatch=8,
        resume=resume,
        checkpoint_steps=EVERY,
        seed=3,
    )
    for step in private:
        with result.with_suffix(".seen").open("a") as stream:
            stream.write(f"{step.index}\n")
    torch.save(toys.weights(network), result)


def _run(run_dir: Path, result: Path, *, resume: bool = False, arm: Callable[[], None] = lambda: None) -> int:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(run_dir, result), kwargs={"resume": resume, "arm": arm})
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _crash_at(owner: Any, name: str, *, call: int, after: bool) -> Callable[[], None]:
    """Arrange that the process dies right before or right after the given call of a function."""

    def arm() -> None:
        original = getattr(owner, name)
        calls = 0

        def wrapped(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os._exit(CRASHED)
            value = original(*args, **named)
            if calls == call:
                os._exit(CRASHED)
            return value

        setattr(owner, name, wrapped)

    return arm


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _run(folder / "run", folder / "weights.pt") == 0
    return torch.load(folder / "weights.pt", weights_only=True)


POINTS = [
    *[(Ledger, "reserve_steps", call, after) for call in (1,) for after in (False, True)],
    *[(releases, "release", call, after) for call in (1, 3, 5, 10) for after in (False, True)],
    *[(updates, "write_gradient", call, True) for call in (1, 4, 9)],
    *[(checkpoint, "save", call, after) for call in (1, 2, 3) for after in (False, True)],
    *[(checkpoint, "sync", call, after) for call in range(1, 12) for after in (False, True)],
    *[(run_directory, "save_model", 1, after) for after in (False, True)],
    *[(run_directory, "_destroy_key", 1, after) for after in (False, True)],
    *[(Ledger, "finish", 1, after) for after in (False, True)],
    *[(run_directory, "write_certificate", 1, after) for after in (False, True)],
]


@pytest.mark.parametrize(("owner", "name", "call", "after"), POINTS)
def test_crash_point(
    tmp_path: Path, undisturbed: torch.Tensor, owner: Any, name: str, call: int, *, after: bool
) -> None:
    result = tmp_path / "weights.pt"
    assert _run(tmp_path / "run", result, arm=_crash_at(owner, name, call=call, after=after)) == CRASHED
    _check_ledger(tmp_path)
    _finish_and_compare(tmp_path, result, undisturbed)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12])
def test_sigkill_at_any_instant(tmp_path: Path, undisturbed: torch.Tensor, delay: float) -> None:
    result = tmp_path / "weights.pt"
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=_child, args=(tmp_path / "run", result), kwargs={"resume": False, "arm": lambda: None}
    )
    process.start()
    while not (tmp_path / "run" / "ledger.jsonl").exists() and process.is_alive():
        time.sleep(0.001)
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _check_ledger(tmp_path)
    _finish_and_compare(tmp_path, result, undisturbed)


def _check_ledger(folder: Path) -> None:
    """Every update that anybody saw was reserved before."""
    seen = folder / "weights.seen"
    indices = [int(line) for line in seen.read_text().splitlines()] if seen.exists() else []
    if indices:
        assert Ledger.read(folder / "run" / "ledger.jsonl").steps_reserved > max(indices)


def _finish_and_compare(folder: Path, result: Path, undisturbed: torch.Tensor) -> None:
    """Resume (or start, when nothing was reserved yet) and compare bit by bit."""
    started = (folder / "run" / "ledger.jsonl").exists()
    ended = started and not (folder / "run" / "private" / "key").exists()
    if ended:
        with pytest.raises(ConfigError, match="has ended"):
            run.Run.resume(folder / "run", seed=3)
        network = toys.model()
        from safetensors.torch import load_model

        load_model(network, folder / "run" / "release" / "model.safetensors")
        assert torch.equal(toys.weights(network), undisturbed)
    else:
        assert _run(folder / "run", result, resume=started) == 0
        assert torch.equal(torch.load(result, weights_only=True), undisturbed)
    found = discreet.verify(folder / "run")
    assert found.steps == STEPS
    assert found.finished


def _private(run_dir: Path, *, dataset: Any, resume: bool) -> loop.Private:
    return toys.private_run(
        run_dir,
        dataset=dataset,
        epsilon=2.0,
        batch_size=20,
        steps=60,
        learning_rate=0.05,
        resume=resume,
        checkpoint_steps=10,
    )


def test_changed_data_get_a_new_key_and_a_new_charge(tmp_path: Path) -> None:
    first = _private(tmp_path, dataset=toys.data(), resume=False)
    for _, step in zip(range(25), first, strict=False):
        assert step.epsilon <= 2.0
    old_key = (tmp_path / "private" / "key").read_bytes()
    first.close()
    features, targets = toys.data().tensors
    changed = torch.utils.data.TensorDataset(features + 1e-3, targets)
    second = _private(tmp_path, dataset=changed, resume=True)
    assert (tmp_path / "private" / "key").read_bytes() != old_key
    assert second.done == 20
    assert second.steps == 60 - (32 - 20)
    for _ in second:
        pass
    found = discreet.verify(tmp_path)
    assert found.steps == 60
    assert found.epsilon <= 2.0
    notes = [record for record in Ledger.read(tmp_path / "ledger.jsonl").records if record.kind == "resume"]
    assert "data" in str(notes[-1].body)


def test_unchanged_data_keep_the_key(tmp_path: Path) -> None:
    first = _private(tmp_path, dataset=toys.data(), resume=False)
    for _, _step in zip(range(25), first, strict=False):
        pass
    key = (tmp_path / "private" / "key").read_bytes()
    first.close()
    second = _private(tmp_path, dataset=toys.data(), resume=True)
    assert (tmp_path / "private" / "key").read_bytes() == key
    assert (second.done, second.steps) == (20, 60)
    second.close()


def test_a_ledger_that_was_cut_is_refused(tmp_path: Path) -> None:
    first = _private(tmp_path, dataset=toys.data(), resume=False)
    for _, _step in zip(range(25), first, strict=False):
        pass
    first.close()
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:1]))
    with pytest.raises(DiscreetError, match="lacks the record"):
        _private(tmp_path, dataset=toys.data(), resume=True)


def test_private_half_is_closed_to_others(tmp_path: Path) -> None:
    private = _private(tmp_path, dataset=toys.data(), resume=False)
    for path in (tmp_path / "private").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    private.close()
