from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from discreet.errors import ConfigError, LedgerError
from discreet.train import checkpoint as checkpoint_module
from discreet.train.checkpoint import Checkpoint, load, model_tensors, save
from train import toys


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int = 3) -> Checkpoint:
    return Checkpoint(
        step=step,
        microbatch=16,
        model=model_tensors(model),
        optimizer=optimizer.state_dict(),
        scheduler={"last_epoch": 3, "base_lrs": [0.1], "odd": (1, None, True), "type": torch.bfloat16},
        ledger_head="abc",
    )


def _trained(
    optimizer_class: type[torch.optim.Optimizer], **options: object
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = toys.model()
    optimizer = optimizer_class(model.parameters(), **options)
    for _ in range(3):
        toys.loss(model, toys.data()[:20]).mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.Adagrad, {"lr": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.1, "centered": True}),
        (torch.optim.Adam, {"lr": torch.tensor(0.1)}),
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, optimizer_class: type, options: dict[str, object]) -> None:
    model, optimizer = _trained(optimizer_class, **options)
    save(tmp_path, _checkpoint(model, optimizer))
    found = load(tmp_path)
    assert found is not None
    assert (found.step, found.microbatch, found.ledger_head) == (3, 16, "abc")
    assert found.scheduler == {"last_epoch": 3, "base_lrs": [0.1], "odd": (1, None, True), "type": torch.bfloat16}
    other = toys.model()
    other_optimizer = optimizer_class(other.parameters(), **options)
    other.load_state_dict(dict(found.model))
    other_optimizer.load_state_dict(dict(found.optimizer))
    for network, mover in ((model, optimizer), (other, other_optimizer)):
        mover.zero_grad()
        toys.loss(network, toys.data()[:20]).mean().backward()
        mover.step()
    assert torch.equal(toys.weights(model), toys.weights(other))


def test_only_the_newest_is_kept_and_nothing_is_readable_by_others(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    for step in (1, 2, 30):
        save(tmp_path / "checkpoint", _checkpoint(model, optimizer, step=step))
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000030"]
    for path in (tmp_path / "checkpoint").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    path = save(tmp_path, _checkpoint(model, optimizer)) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(LedgerError, match="step-00000003"):
        load(tmp_path)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    save(tmp_path, _checkpoint(model, optimizer))
    (tmp_path / ".step-00000009.tmp").mkdir()
    found = load(tmp_path)
    assert found is not None
    assert found.step == 3


def test_a_failed_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    save(tmp_path, _checkpoint(model, optimizer))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "sync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, _checkpoint(model, optimizer, step=4))
    monkeypatch.undo()
    found = load(tmp_path)
    assert found is not None
    assert found.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    state = {**optimizer.state_dict(), "hook": print}
    with pytest.raises(ConfigError, match=r"optimizer\.hook"):
        save(tmp_path, Checkpoint(1, 1, model_tensors(model), state, None, ""))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    path = save(tmp_path, _checkpoint(model, optimizer))
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())


def test_saving_a_step_again_never_leaves_a_moment_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older checkpoint of the same step goes only after the newer one has its name."""
    model, optimizer = _trained(torch.optim.Adam, lr=0.1)
    save(tmp_path, _checkpoint(model, optimizer))
    (tmp_path / ".step-00000001.tmp").mkdir()
    for microbatch in (8, 4, 2):
        again = dataclasses.replace(_checkpoint(model, optimizer), microbatch=microbatch)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", _cut)
            with pytest.raises(OSError, match="cut"):
                save(tmp_path, again)
        assert load(tmp_path) is not None
        save(tmp_path, again)
        found = load(tmp_path)
        assert found is not None
        assert found.microbatch == microbatch
        assert len(list(tmp_path.glob("step-*"))) == 1
    assert list(tmp_path.glob(".step-*")) == []


def _cut(*_arguments: object) -> None:
    raise OSError("cut")
