"""Atomic save and resume: model, optimizer and scheduler, as safetensors and JSON; never pickle.

A checkpoint is a directory ``step-NNNNNNNN`` written under a temporary name, fsynced, and renamed. Its manifest holds
the SHA-256 of every file. The previous one stays until the new one is in place, so a crash at any instant leaves one to
resume from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discreet.core.uses import identity_of
from discreet.errors import ConfigError, LedgerError
from discreet.privacy.files import file_digest
from discreet.train.auto_lr import RateControl
from discreet.train.secret_files import sync

_FORMAT = 2
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_TENSOR_MARK = "__tensor__"
_TUPLE_MARK = "__tuple__"
_KEYS_MARK = "__items__"
_TYPE_MARK = "__dtype__"


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` updates.

    Attributes:
        step: updates done.
        microbatch: the microbatch size in force.
        model: ``model.state_dict()``, tensors only.
        optimizer: ``optimizer.state_dict()``.
        scheduler: the torch scheduler's state, or None.
        rates: what the search for a learning rate has found so far, or None.
        ledger_head: hash of the ledger's last record at that time; a ledger without it was cut.
        clip_bound: where the bound is that follows a quantile of the norms; None when it does not move.
        seconds: that the updates up to here took, over all processes. Private, as times of updates are.
    """

    step: int
    microbatch: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    ledger_head: str
    rates: Mapping[str, Any] | None = None
    clip_bound: float | None = None
    seconds: float = 0.0


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below ``directory`` and remove older ones. Returns its path.

    Raises:
        ConfigError: the optimizer's state holds something that neither JSON nor safetensors can.
        OSError: the disk refused; the older checkpoint is untouched.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    state = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "microbatch": checkpoint.microbatch,
        "ledger_head": checkpoint.ledger_head,
        "clip_bound": checkpoint.clip_bound,
        "seconds": checkpoint.seconds,
        "model": _encode(dict(checkpoint.model), "model", tensors),
        "optimizer": _encode(dict(checkpoint.optimizer), "optimizer", tensors),
        "scheduler": _encode(checkpoint.scheduler, "scheduler", tensors),
        "rates": _encode(checkpoint.rates, "rates", tensors),
    }
    final = _free_name(directory, checkpoint.step)
    temporary = directory / f".{final.name}.tmp"
    for leftover in directory.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps(state, sort_keys=True))
        digests = {name: file_digest(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(digests, sort_keys=True))
        for name in (_TENSORS, _STATE, _MANIFEST):
            os.chmod(temporary / name, 0o600)
            sync(temporary / name)
        sync(temporary)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{temporary}: cannot be written ({error})") from error
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    sync(directory)
    for older in sorted(directory.glob("step-*")):
        if older != final:
            shutil.rmtree(older)
    return final


def load(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint below ``directory``, or None.

    Raises:
        LedgerError: a checkpoint is there, but its files do not match its manifest.
    """
    found = sorted(directory.glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        digests = dict(json.loads((newest / _MANIFEST).read_text()))
        damaged = [name for name in (_TENSORS, _STATE) if file_digest(newest / name) != digests.get(name)]
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(f"{newest}: the checkpoint cannot be read ({error}); remove it to start anew.") from error
    if damaged:
        raise LedgerError(f"{newest / damaged[0]}: does not match its checksum; restore it, or start a new run.")
    state = json.loads((newest / _STATE).read_text())
    if state.get("format") != _FORMAT:
        raise LedgerError(
            f"{newest}: format {state.get('format')} is not {_FORMAT}; resume with the version that wrote it."
        )
    tensors = load_file(newest / _TENSORS)
    return Checkpoint(
        step=state["step"],
        microbatch=state["microbatch"],
        model=_decode(state["model"], tensors),
        optimizer=_decode(state["optimizer"], tensors),
        scheduler=_decode(state["scheduler"], tensors),
        ledger_head=state["ledger_head"],
        rates=_decode(state["rates"], tensors),
        clip_bound=state.get("clip_bound"),
        seconds=state.get("seconds", 0.0),
    )


def restore(found: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, rates: RateControl) -> None:
    """Put model, optimizer, scheduler and the search for a rate into the state of a checkpoint.

    Raises:
        ConfigError: they are not of the kind that was saved. Nothing was charged.
    """
    remedy = "build them as when the run began, or start a new run."
    try:
        model.load_state_dict(dict(found.model))
    except RuntimeError:
        raise ConfigError(
            f"the checkpoint of update {found.step} is of another model: names or shapes differ; {remedy}"
        ) from None
    saved = [set(group) for group in found.optimizer["param_groups"]]
    missing = [set(group) - known for group, known in zip(optimizer.param_groups, saved, strict=False)]
    if (
        len(saved) != len(optimizer.param_groups)
        or any(missing)
        or (rates.scheduler is None) != (found.scheduler is None)
    ):
        raise ConfigError(
            f"the checkpoint of update {found.step} is of another optimizer or scheduler than "
            f"{type(optimizer).__name__}; {remedy}"
        )
    try:
        optimizer.load_state_dict(dict(found.optimizer))
    except ValueError:
        raise ConfigError(f"the checkpoint of update {found.step} has other groups of parameters; {remedy}") from None
    if rates.scheduler is not None and found.scheduler is not None:
        rates.scheduler.load_state_dict(dict(found.scheduler))
    rates.restore(found.rates)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as separate tensors, as `saved_state` has it."""
    return {name: value.detach().clone() for name, value in saved_state(model).items()}


def saved_state(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model, and released in the end: its parameters and buffers, under whatever names.

    What a module adds itself (``get_extra_state``, a hook on ``state_dict``) is refused: no forward is watched there,
    so it may hold statistics of private examples.

    Raises:
        ConfigError: the state holds something else; what is no tensor could not be saved without pickle, either.
    """
    state = model.state_dict()
    known = {identity_of(value) for value in (*model.parameters(), *model.buffers())}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{name}: state of type {type(value).__name__}; only tensors are saved; drop get_extra_state."
            )
        if value.numel() and identity_of(value) not in known:
            raise ConfigError(
                f"{name}: it would be saved with the model, and is neither a parameter nor a buffer: what a forward "
                "writes there would be released without noise; drop get_extra_state and hooks on state_dict."
            )
    return state


def _free_name(directory: Path, step: int) -> Path:
    """A new name that sorts after every earlier checkpoint of this step: the one that is there stays until then."""
    name = f"step-{step:08d}"
    present = sorted(path.name for path in directory.glob(f"{name}*"))
    if not present:
        return directory / name
    last = present[-1].removeprefix(name).lstrip("-")
    return directory / f"{name}-{int(last or 0) + 1:04d}"


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON; tensors move to ``tensors`` and leave their name behind."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().clone().contiguous().cpu()
        return {_TENSOR_MARK: where}
    if isinstance(value, Mapping):
        return {_KEYS_MARK: [[key, _encode(item, f"{where}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE_MARK: [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {_TYPE_MARK: str(value).removeprefix("torch.")}
    raise ConfigError(
        f"{where}: state of type {type(value).__name__} cannot be saved without pickle; use an optimizer or scheduler "
        "whose state is made of tensors, numbers and text."
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR_MARK in value:
        return tensors[value[_TENSOR_MARK]]
    if _TYPE_MARK in value:
        return getattr(torch, value[_TYPE_MARK])
    if _TUPLE_MARK in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE_MARK])
    return {key: _decode(item, tensors) for key, item in value[_KEYS_MARK]}
