"""A run: its key, its ledger, its metrics, and whether it may go on under the key that it had.

Noise, batches and dropout masks are functions of (key, step). A step is replayed under its key only when nothing that
could change its sum has changed: the environment record says what that is, and the journal of sums proves it. Otherwise
the run goes on under a new key, and the steps are charged again.
"""

from __future__ import annotations

import enum
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from discreet.core.rng import KEY_BYTES, NoiseSource, seed_key, subkey
from discreet.errors import ConfigError, LedgerError
from discreet.privacy.accounting import Query, query_to_json
from discreet.privacy.files import held, write_atomically
from discreet.privacy.ledger import Ledger, key_id
from discreet.privacy.plan import Plan
from discreet.train.checkpoint import load as load_checkpoint
from discreet.train.journal import SumJournal
from discreet.train.run_directory import (
    CHECKPOINT,
    KEY,
    LEDGER,
    LOCK,
    PLAN,
    SEARCH,
    STATE,
    SUMS,
    end,
    mend_end,
    read_key,
    refuse_earlier,
    write_model,
)
from discreet.train.secret_files import replace_secret

PREPROCESSING = "preprocessing"

Environment = Mapping[str, str]
"""Everything beyond (key, plan) that the bits of a step depend on: data, code, device, threads. Private."""


class Stage(enum.Enum):
    """What draws noise under the run's key, and the kind of ledger record that says that it did."""

    DATA = "data"
    TRAINING = "training"

    @property
    def charge(self) -> str:
        """Kind of the records by which this stage charges the ledger."""
        return "query" if self is Stage.DATA else "steps"


class Run:
    """One training run on disk, held by one process. Make it with `create` or `resume`; use it as a context manager.

    Attributes:
        path: the run directory.
        plan: fixed for the life of the run.
        ledger: open for writing.
        private: False in test mode and without noise; then every artefact says NOT PRIVATE.
        resumed: whether it was started by an earlier process.
        closed: nothing may be released any more: the run was finished, or let go of.
    """

    def __init__(self, path: Path, *, plan: Plan, ledger: Ledger, key: bytes, resumed: bool) -> None:
        self.path = path
        self.plan = plan
        self.ledger = ledger
        self.private = plan.noise_multiplier > 0 and not ledger.test_mode
        self.resumed = resumed
        self.closed = False
        self._key = key
        self._taken = False

    def take(self) -> None:
        """Begin to train under this run; once, for two that do would draw the same noise, and share each charge.

        Raises:
            ConfigError: somebody else does.
        """
        if self._taken:
            raise ConfigError(
                f"{self.path}: this run is trained already; go on with what make_private returned, or close the run "
                "and resume it."
            )
        self._taken = True

    def __reduce__(self) -> str:
        """Refuse every copy: two runs with one key would put the same noise on two sums."""
        raise ConfigError(
            "a run cannot be copied or pickled: its noise would be used twice; start another run instead."
        )

    @classmethod
    def create(cls, path: Path, *, plan: Plan, seed: int | None = None) -> Run:
        """Start a run in a directory that does not hold one yet.

        Args:
            path: created if missing.
            plan: what may be spent.
            seed: test mode: noise that anyone can redo; every artefact says NOT PRIVATE.

        Raises:
            ConfigError: there is a run already, or what another one released, or another process is starting one.
        """
        refuse_earlier(path)
        key = secrets.token_bytes(KEY_BYTES) if seed is None else seed_key(seed)
        with ExitStack() as stack:
            try:
                (path / "release").mkdir(parents=True, exist_ok=True)
                (path / "private").mkdir(mode=0o700, exist_ok=True)
                (path / "private").chmod(0o700)
                # Of two that start here at once, the second would change the key and the plan of the first.
                stack.enter_context(held(path / LOCK))
                refuse_earlier(path)
                for left in (SUMS, STATE):
                    (path / left).unlink(missing_ok=True)
                for folder in (SEARCH, CHECKPOINT):
                    if (path / folder).exists():
                        shutil.rmtree(path / folder)
                replace_secret(path / KEY, key)
                plan.save(path / PLAN)
            except OSError as error:
                raise ConfigError(
                    f"{path}: cannot be written ({error.strerror}); name a run directory that can."
                ) from None
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
        key = read_key(path)
        if key is None:
            mend_end(path)
            raise ConfigError(
                f"{path}: this run has ended; see `discreet verify` and `discreet report`, or start a new run in "
                "another directory."
            )
        found = load_checkpoint(path / CHECKPOINT)
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
        return self.path / CHECKPOINT

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
        kept = self._state()["preprocessing key"] if purpose == PREPROCESSING else None
        key = subkey(self._key, f"noise for {purpose}") if kept is None else bytes.fromhex(kept)
        return NoiseSource.keyed(key, private=self.private)

    def key_for(self, purpose: str) -> bytes:
        """A secret key for one purpose of a search, such as one of its runs; purposes never share a bit."""
        return subkey(self._key, f"search|{purpose}")

    def sums(self) -> SumJournal:
        """What each step released under the current key stood for."""
        return SumJournal(self.path / SUMS, key=self._key)

    def torch_seed(self, step: int) -> int:
        """Seed of dropout and other randomness inside the model at this step, the same at every replay."""
        return int.from_bytes(subkey(self._key, f"torch|{step}")[:8], "little") >> 1

    def adopt(self, environment: Environment, *, stage: Stage) -> None:
        """Record what the bits of a stage depend on; on resume, compare.

        When something differs, or nobody knows any more, the run gets a new key: the same noise must not meet another
        sum. Whatever the stage draws from then on is charged again.

        Args:
            environment: what the bits depend on.
            stage: before preprocessing, or before the first update.
        """
        known = self._state()["environment"].get(stage.value)
        if known is None and self.charged(stage):
            self.renew_key(["the record of the environment is missing"], stage=stage)
        elif known is not None and known != dict(environment):
            self.renew_key(self.changed(environment, stage=stage), stage=stage)
        state = self._state()
        state["environment"][stage.value] = dict(environment)
        self._keep(state)

    def changed(self, environment: Environment, *, stage: Stage) -> list[str]:
        """What differs from the record of a stage, by name; nothing when there is no record yet.

        For whoever must refuse to go on rather than `adopt`, and so keep the key.
        """
        known = self._state()["environment"].get(stage.value)
        if known is None:
            return []
        return sorted(name for name in {*known, *environment} if known.get(name) != environment.get(name))

    def charged(self, stage: Stage) -> bool:
        """Whether a stage has drawn, or may have drawn, noise under the current key."""
        current = self.ledger.key_id
        return any(record.kind == stage.charge and record.body["key_id"] == current for record in self.ledger.records)

    def renew_key(self, changed: Sequence[str], *, stage: Stage = Stage.TRAINING) -> None:
        """Go on under a fresh key. A change of training leaves the private statistics, drawn before it, as they are.

        Args:
            changed: why, in public words; recorded in the ledger.
            stage: the first stage that must draw anew.

        Raises:
            ConfigError: in test mode, where the key is the seed.
        """
        what = ", ".join(changed)
        if self.ledger.test_mode:
            raise ConfigError(
                f"{what}: changed since the run began; a test run cannot change its key; start a new one."
            )
        state = self._state()
        if stage is Stage.TRAINING and state["preprocessing key"] is None:
            # Kept before the old key goes, so that a crash in between cannot lose it.
            state["preprocessing key"] = subkey(self._key, f"noise for {PREPROCESSING}").hex()
            self._keep(state)
        self._key = secrets.token_bytes(KEY_BYTES)
        replace_secret(self.path / KEY, self._key)
        self.ledger.close()
        self.ledger = Ledger.resume(self.path / LEDGER, key_id=key_id(self._key), facts={"changed": what})
        if stage is Stage.DATA:
            self._keep({**state, "preprocessing key": None})

    def _state(self) -> dict[str, Any]:
        path = self.path / STATE
        if not path.exists():
            return {"environment": {}, "preprocessing key": None}
        try:
            state = json.loads(path.read_text())
            return {"environment": dict(state["environment"]), "preprocessing key": state["preprocessing key"]}
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{path}: cannot be read ({type(error).__name__}); remove it, and steps are charged anew."
            ) from None

    def _keep(self, state: Mapping[str, Any]) -> None:
        replace_secret(self.path / STATE, json.dumps(state, sort_keys=True).encode())

    def reserve_query(self, name: str, query: Query) -> None:
        """Charge a query on all examples (private preprocessing) before it is released.

        One that is repeated with the noise of an earlier key was charged under that key.
        """
        if self._state()["preprocessing key"] is not None:
            wanted = {"name": name, "query": query_to_json(query)}
            for record in self.ledger.records:
                if record.kind == "query" and {key: record.body[key] for key in wanted} == wanted:
                    return
        self.ledger.reserve_query(name, query)

    def log(self, record: Mapping[str, float | int | str]) -> None:
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
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(json.dumps(record))
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def write(self, name: str, record: Mapping[str, object]) -> Path:
        """Write one JSON file of the release half."""
        path = self.release_dir / name
        write_atomically(path, json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n")
        return path

    def finish(self, model: nn.Module | None) -> None:
        """End the run: save the model, destroy the key, close the ledger for good, certify.

        Without the key nobody can subtract the noise. A crash in between is mended by the next `resume`.

        Args:
            model: what was trained; None for a run that only asked the data something.
        """
        if model is not None:
            write_model(self.path, model)
        self.closed = True
        end(self.path, self.ledger)

    def close(self) -> None:
        """Let go of the ledger; the run can be resumed."""
        self.closed = True
        self.ledger.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
