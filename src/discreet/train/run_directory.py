"""A run directory: what lies where, what a new run may find there, and what is left when the run ends.

release/    plan.json, metrics.jsonl, check.json, model.safetensors, certificate.json: every byte released or public
private/    key, state.json, sums, checkpoint/, lock: mode 0600; destroyed or useless once the run has ended
ledger.jsonl
"""

from __future__ import annotations

import os
import secrets
import shutil
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from discreet.core.rng import KEY_BYTES
from discreet.core.uses import identity_of
from discreet.errors import ConfigError, LedgerError
from discreet.privacy.certificate import write_certificate
from discreet.privacy.files import file_digest
from discreet.privacy.ledger import Ledger
from discreet.train.checkpoint import saved_state
from discreet.train.secret_files import sync

LEDGER = "ledger.jsonl"
KEY = Path("private", "key")
STATE = Path("private", "state.json")
SUMS = Path("private", "sums")
SEARCH = Path("private", "search")
CHECKPOINT = Path("private", "checkpoint")
LOCK = Path("private", "lock")
PLAN = Path("release", "plan.json")
MODEL = Path("release", "model.safetensors")
_DESTROYED_KEY = bytes(KEY_BYTES)


def new_run_dir() -> Path:
    """A new directory below ``runs/``, named by the time in UTC and a random suffix."""
    return Path("runs") / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def refuse_earlier(path: Path) -> None:
    """Refuse a directory that holds a run, or what one released: no charge of a new run would stand for it."""
    if (path / LEDGER).exists():
        raise ConfigError(
            f"{path}: holds a run already; continue it with resume (--resume), or name another directory."
        )
    # A plan is left where a start was broken off before there was a ledger.
    release = path / PLAN.parent
    for left in sorted(release.glob("[!.]*")):
        if not left.name.startswith(PLAN.name):
            raise ConfigError(
                f"{left}: is left of another run, whose ledger is gone; name another directory, or remove {release}."
            )


def read_key(path: Path) -> bytes | None:
    """The run's key; None when it was destroyed, be it half-way.

    Raises:
        LedgerError: the file does not hold a key; a shorter one, or a known one, would be no secret.
    """
    if not (path / KEY).exists():
        return None
    key = (path / KEY).read_bytes()
    if key == _DESTROYED_KEY:
        return None
    if len(key) != KEY_BYTES:
        raise LedgerError(
            f"{path / KEY}: {len(key)} bytes; a key has {KEY_BYTES}; restore the file, or start a new run."
        )
    return key


def write_model(path: Path, model: nn.Module) -> None:
    """Write the model of a run that ends, durably.

    Args:
        path: the run directory.

    Raises:
        OSError: the disk refused.
    """
    temporary = path / "private" / "model.safetensors"
    # Copies: parts of one memory are refused (flattened parameters, an LSTM's on CUDA). What is tied has one.
    copies: dict[object, Tensor] = {}
    state = {
        name: copies.setdefault(identity_of(value), value.detach().to("cpu", copy=True))
        for name, value in saved_state(model).items()
    }
    try:
        save_model(SimpleNamespace(state_dict=lambda: state), str(temporary))  # type: ignore[arg-type]
    except SafetensorError as error:
        raise OSError(f"{temporary}: cannot be written ({error})") from error
    temporary.chmod(0o644)
    sync(temporary)
    temporary.rename(path / MODEL)
    sync((path / MODEL).parent)


def end(path: Path, ledger: Ledger) -> None:
    """Destroy the key, close the ledger for good, certify. `mend_end` does what a crash in between leaves to do."""
    _destroy_key(path)
    ledger.finish(_ending(path))
    write_certificate(path)


def mend_end(path: Path) -> None:
    """Do what is left of `end` after the key was destroyed.

    Raises:
        ConfigError: the key is gone although the run had not ended: nothing can continue it.
    """
    if not (path / MODEL).exists():
        raise ConfigError(f"{path / KEY}: the key is missing, so no step can be repeated; start a new run.")
    _destroy_key(path)
    view = Ledger.read(path / LEDGER)
    if not view.finished:
        Ledger.resume(path / LEDGER, key_id=view.key_id).finish(_ending(path))
    write_certificate(path)


def _destroy_key(path: Path) -> None:
    """Overwrite and remove the key; then what only its holder can use."""
    key = path / KEY
    if key.exists():
        with key.open("r+b") as stream:
            stream.write(_DESTROYED_KEY)
            stream.flush()
            os.fsync(stream.fileno())
        key.unlink()
    # The state may hold the noise key of the private statistics.
    for name in (STATE, SUMS, LOCK):
        (path / name).unlink(missing_ok=True)
    # The best run of a search so far, and its score: only the released one may outlive the search.
    shutil.rmtree(path / SEARCH, ignore_errors=True)
    sync(key.parent)


def _ending(path: Path) -> dict[str, str]:
    """The facts of the ledger's last record: they bind the released model to the certificate."""
    model = {"model_sha256": file_digest(path / MODEL)} if (path / MODEL).exists() else {}
    return {"key": "destroyed", **model}
