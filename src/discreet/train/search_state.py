"""What a search keeps between its runs, in the private half: which run is next, and the best so far.

Scores and weights of a run that is not the best are never written. When the search ends, or its key is destroyed, all
of this goes. The record is sealed under the run's key: a state that was edited, or that another search left in the same
folder, would choose among other runs than those that were charged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.files import file_digest
from discreet.privacy.records import Fields, canonical_json, parse_json
from discreet.train.checkpoint import model_tensors
from discreet.train.secret_files import replace_secret, sync

_STATE = "state.json"


@dataclass(frozen=True)
class Best:
    """The best run so far.

    Attributes:
        run: its number. choice: index of its setting. score: as it was selected by. sha256: of its weights' file.
    """

    run: int
    choice: int
    score: float
    sha256: str


class SearchState:
    """The folder ``private/search`` of a run directory.

    **Guarantees.** `keep` is whole or not at all: a crash leaves the state before or after a run, never between.

    Attributes:
        environment: what the runs depend on, as recorded before the first.
        done: runs behind the search. best: among them; None before the first.
    """

    def __init__(self, path: Path, *, key: bytes, environment: Mapping[str, str], done: int, best: Best | None) -> None:
        self._path = path
        self._key = key
        self.environment = dict(environment)
        self.done = done
        self.best = best

    @classmethod
    def create(cls, path: Path, *, key: bytes, environment: Mapping[str, str]) -> SearchState:
        """The state before the first run, durable.

        Args:
            path: the folder, made if missing. key: seals the record; secret, and of this search alone.
            environment: what the runs depend on.
        """
        path.mkdir(mode=0o700, exist_ok=True)
        state = cls(path, key=key, environment=environment, done=0, best=None)
        state._write()
        return state

    @classmethod
    def load(cls, path: Path, *, key: bytes) -> SearchState | None:
        """The state that an earlier process left; None when there is none.

        Raises:
            LedgerError: it is damaged, was edited, or is that of another search.
        """
        if not (path / _STATE).exists():
            return None
        try:
            sealed = parse_json((path / _STATE).read_text(encoding="ascii"), where=_STATE)
            fields = Fields(sealed, where=_STATE, names=("record", "seal"))
            record = fields.mapping("record")
            whole = hmac.compare_digest(fields.text("seal"), _seal(key, record))
        except (ConfigError, UnicodeDecodeError) as error:
            raise LedgerError(f"{path / _STATE}: {error}; restore it, or start a new search.") from None
        if not whole:
            raise LedgerError(
                f"{path / _STATE}: was changed, or belongs to another search; restore it, or start a new search."
            )
        state = _unpacked(path, key, record)
        if state.best is not None and (not state._weights.exists() or file_digest(state._weights) != state.best.sha256):
            raise LedgerError(f"{state._weights}: is not what was kept; restore it, or start a new search.")
        return state

    def keep(self, *, run: int, choice: int, score: float, model: nn.Module) -> None:
        """Take in one more run: its weights when it is the best, and nothing of it otherwise.

        Raises:
            OSError: the disk refused; what was kept before is untouched on it.
        """
        if self.best is None or score > self.best.score:
            old = None if self.best is None else self._weights
            name = self._path / f"run-{run}.safetensors"
            try:
                save_file({key: value.contiguous().cpu() for key, value in model_tensors(model).items()}, name)
            except SafetensorError as error:
                raise OSError(f"{name}: cannot be written ({error})") from error
            name.chmod(0o600)
            sync(name)
            self.best = Best(run=run, choice=choice, score=score, sha256=file_digest(name))
        else:
            old = None
        self.done = run + 1
        self._write()
        if old is not None:
            old.unlink(missing_ok=True)

    def tensors(self) -> dict[str, Tensor]:
        """State of the best model."""
        assert self.best is not None
        return load_file(self._weights)

    @property
    def _weights(self) -> Path:
        assert self.best is not None
        return self._path / f"run-{self.best.run}.safetensors"

    def _write(self) -> None:
        best = None if self.best is None else {**vars(self.best), "score": self.best.score.hex()}
        record = {"environment": self.environment, "done": self.done, "best": best}
        sealed = {"record": record, "seal": _seal(self._key, record)}
        replace_secret(self._path / _STATE, canonical_json(sealed).encode("ascii"))


def _seal(key: bytes, record: Mapping[str, object]) -> str:
    return hmac.new(key, canonical_json(record).encode("ascii"), hashlib.sha256).hexdigest()


def _unpacked(path: Path, key: bytes, record: Mapping[str, Any]) -> SearchState:
    """A record whose seal was right; an infinite score has no JSON number, so scores are kept as hexadecimal text."""
    best = record["best"]
    if best is not None:
        best = Best(**{**best, "score": float.fromhex(best["score"])})
    return SearchState(path, key=key, environment=record["environment"], done=record["done"], best=best)
