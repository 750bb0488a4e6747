"""A run directory: the key, the ledger, the metrics, and what is left when the run ends.

    release/    plan.json, metrics.jsonl, check.json, model.safetensors, certificate.json: released or public, every byte
    private/    key, environment.json, checkpoint/: mode 0600; destroyed or useless once the run has ended
    ledger.jsonl

Noise, batches and dropout masks are functions of (key, step). A step is replayed under its key only when nothing that
could change its sum has changed: the environment record says what that is. Otherwise the run goes on under a new key, and
the steps are charged again.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from discreet.core.rng import KEY_BYTES, NoiseSource, seed_key, subkey
from discreet.errors import ConfigError
from discreet.privacy.accounting import Query
from discreet.privacy.certificate import write_certificate
from discreet.privacy.ledger import Ledger, key_id
from discreet.privacy.plan import Plan
from discreet.train.checkpoint import load as load_checkpoint, sync

LEDGER = "ledger.jsonl"
KEY = Path("private", "key")
STATE = Path("private", "state.json")
PLAN = Path("release", "plan.json")
MODEL = Path("release", "model.safetensors")
_KEY_DESTROYED = {"key": "destroyed"}

Environment = Mapping[str, str]
"""Everything beyond (key, plan) that the bits of a step depend on: data, code, device, threads. Private."""


class Run:
    """One training run on disk, held by one process. Make it with `create` or `resume`; use it as a context manager.

    Attributes:
        path: the run directory.
        plan: fixed for the life of the run.
        ledger: open for writing.
        private: False in test mode and without noise; then every artefact says NOT PRIVATE.
        resumed: whether it was started by an earlier process.
    """

    def __init__(self, path: Path, *, plan: Plan, ledger: Ledger, key: bytes, resumed: bool) -> None:
        self.path = path
        self.plan = plan
        self.ledger = ledger
        self.private = plan.noise_multiplier > 0 and not ledger.test_mode
        self.resumed = resumed
        self._key = key

    @classmethod
    def create(cls, path: Path, *, plan: Plan, seed: int | None = None) -> Run:
        """Start a run in a directory that does not hold one yet.

        Args:
            path: created if missing.
            plan: what may be spent.
            seed: test mode: noise that anyone can redo; every artefact says NOT PRIVATE.

        Raises:
            ConfigError: there is a run already.
        """
        if (path / LEDGER).exists():
            raise ConfigError(f"{path}: holds a run already; continue it with resume (--resume), or name another directory.")
        key = secrets.token_bytes(KEY_BYTES) if seed is None else seed_key(seed)
        try:
            (path / "release").mkdir(parents=True, exist_ok=True)
            (path / "private").mkdir(mode=0o700, exist_ok=True)
            _write_secret(path / KEY, key)
            plan.save(path / PLAN)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); name a run directory that can.") from None
        ledger = Ledger.create(path / LEDGER, plan=plan, key_id=key_id(key), test_mode=seed is not None)
        return cls(path, plan=plan, ledger=ledger, key=key, resumed=False)

    @classmethod
    def resume(cls, path: Path, *, seed: int | None = None) -> Run:
        """Continue the run in a directory.

        Raises:
            ConfigError: there is no run, it has ended, or it was not started with this seed.
            LedgerError: the ledger is damaged, held by another process, or shorter than the checkpoint knows.
        """
        if not (path / LEDGER).exists():
            raise ConfigError(f"{path}: holds no run to resume; leave out resume (--resume) to start one.")
        if not (path / KEY).exists():
            _conclude(path)
            raise ConfigError(f"{path}: this run has ended; see `discreet verify`, or start a new run in another directory.")
        key = (path / KEY).read_bytes()
        found = load_checkpoint(path / "private" / "checkpoint")
        known_head = found.ledger_head if found is not None else None
        ledger = Ledger.resume(path / LEDGER, key_id=key_id(key), known_head=known_head)
        if ledger.test_mode != (seed is not None) or (seed is not None and key != seed_key(seed)):
            ledger.close()
            raise ConfigError(f"seed={seed}: not what the run in {path} was started with; pass the same seed, or none.")
        return cls(path, plan=ledger.plan, ledger=ledger, key=key, resumed=True)

    @property
    def release_dir(self) -> Path:
        """What may leave the building."""
        return self.path / "release"

    @property
    def checkpoint_dir(self) -> Path:
        """Private training state."""
        return self.path / "private" / "checkpoint"

    @property
    def sampling_key(self) -> bytes:
        """Key of the Poisson batches."""
        return subkey(self._key, "sampling")

    @property
    def initial_seed(self) -> int:
        """Seed of initial weights, for a program that makes the model itself."""
        return int.from_bytes(subkey(self._key, "initial weights")[:8], "little") >> 1

    def noise(self, purpose: str) -> NoiseSource:
        """The noise stream for one purpose ("gradient", "preprocessing"), from its start."""
        key = subkey(self._key, f"noise for {purpose}")
        return NoiseSource.keyed(key, private=self.private)

    def torch_seed(self, step: int) -> int:
        """Seed of dropout and other randomness inside the model at this step, the same at every replay."""
        return int.from_bytes(subkey(self._key, f"torch|{step}")[:8], "little") >> 1

    def adopt(self, environment: Environment, *, stage: str, done: int = 0) -> None:
        """Record what the bits of a stage depend on; on resume, compare.

        When something differs, the run gets a new key: the same noise must not meet another sum. Every further step is
        then charged again, and what was reserved beyond ``done`` under the old key is lost: `horizon` moves forward.

        Args:
            environment: what the bits depend on.
            stage: "data" before preprocessing, "training" before the first update.
            done: updates that will not be repeated.
        """
        state = self._state()
        known = state["environment"].get(stage)
        if known is not None and known != dict(environment):
            names = sorted({*known, *environment})
            self._rekey([name for name in names if known.get(name) != environment.get(name)])
            state["horizon"] = self.plan.steps - (self.ledger.steps_reserved - done)
        state["environment"][stage] = dict(environment)
        _write_secret(self.path / STATE, json.dumps(state, sort_keys=True).encode())

    @property
    def horizon(self) -> int:
        """Updates that the budget allows in all: the plan's steps, less those lost to a change of key."""
        return int(self._state()["horizon"])

    def _state(self) -> dict[str, Any]:
        path = self.path / STATE
        if not path.exists():
            return {"environment": {}, "horizon": self.plan.steps}
        return dict(json.loads(path.read_text()))

    def _rekey(self, changed: list[str]) -> None:
        what = ", ".join(changed)
        if self.ledger.test_mode:
            raise ConfigError(f"{what}: changed since the run began; a test run cannot change its key; start a new one.")
        self._key = secrets.token_bytes(KEY_BYTES)
        _write_secret(self.path / KEY, self._key)
        self.ledger.close()
        self.ledger = Ledger.resume(self.path / LEDGER, key_id=key_id(self._key), facts={"changed": what})

    def reserve_query(self, name: str, query: Query) -> None:
        """Charge a query on all examples (private preprocessing) before it is released."""
        self.ledger.reserve_query(name, query)

    def log(self, record: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl. Released or public values only; no timings of single steps."""
        with (self.release_dir / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(dict(record), allow_nan=False) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop metrics of steps that will be done again, and a torn last line."""
        path = self.release_dir / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step", 0) <= step:
                kept.append(json.dumps(record))
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, name: str, record: Mapping[str, object]) -> Path:
        """Write one JSON file of the release half."""
        path = self.release_dir / name
        path.write_text(json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n")
        return path

    def finish(self, model: nn.Module) -> None:
        """End the run: save the model, destroy the key, close the ledger for good, certify.

        Without the key nobody can subtract the noise. A crash in between is mended by the next `resume`.
        """
        temporary = self.path / "private" / "model.safetensors"
        save_model(model, str(temporary))
        sync(temporary)
        temporary.rename(self.path / MODEL)
        sync(self.release_dir)
        self._destroy_key()
        self.ledger.finish(_KEY_DESTROYED)
        write_certificate(self.path)

    def _destroy_key(self) -> None:
        path = self.path / KEY
        with path.open("r+b") as stream:
            stream.write(bytes(KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()
        sync(path.parent)

    def close(self) -> None:
        """Let go of the ledger; the run can be resumed."""
        self.ledger.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _conclude(path: Path) -> None:
    """Do what is left of `Run.finish` after its key was destroyed.

    Raises:
        ConfigError: the key is gone although the run had not ended: nothing can continue it.
    """
    if not (path / MODEL).exists():
        raise ConfigError(f"{path / KEY}: the key is missing, so no step can be repeated; start a new run.")
    view = Ledger.read(path / LEDGER)
    if not view.finished:
        Ledger.resume(path / LEDGER, key_id=view.key_id).finish(_KEY_DESTROYED)
    write_certificate(path)


def _write_secret(path: Path, content: bytes) -> None:
    """Replace a file of the private half, mode 0600, durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync(path.parent)

