"""What a search keeps between its runs, in the private half: which run is next, and the best so far.

Scores and weights of a run that is not the best are never written. When the search ends, or its key is destroyed, all
of this goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discreet.errors import LedgerError
from discreet.privacy.files import file_digest
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

    def __init__(self, path: Path, *, environment: Mapping[str, str], done: int, best: Best | None) -> None:
        self._path = path
        self.environment = dict(environment)
        self.done = done
        self.best = best

    @classmethod
    def create(cls, path: Path, *, environment: Mapping[str, str]) -> SearchState:
        """The state before the first run, durable."""
        path.mkdir(mode=0o700, exist_ok=True)
        state = cls(path, environment=environment, done=0, best=None)
        state._write()
        return state

    @classmethod
    def load(cls, path: Path) -> SearchState | None:
        """The state that an earlier process left; None when there is none.

        Raises:
            LedgerError: it is damaged.
        """
        if not (path / _STATE).exists():
            return None
        try:
            record = json.loads((path / _STATE).read_text())
            best = None if record["best"] is None else Best(**record["best"])
            state = cls(path, environment=dict(record["environment"]), done=int(record["done"]), best=best)
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{path / _STATE}: cannot be read ({type(error).__name__}); restore it, or start a new search."
            ) from None
        if best is not None and (not state._weights.exists() or file_digest(state._weights) != best.sha256):
            raise LedgerError(f"{state._weights}: is not what was kept; restore it, or start a new search.")
        return state

    def keep(self, *, run: int, choice: int, score: float, model: nn.Module) -> None:
        """Take in one more run: its weights when it is the best, and nothing of it otherwise."""
        if self.best is None or score > self.best.score:
            old = None if self.best is None else self._weights
            name = self._path / f"run-{run}.safetensors"
            save_file({key: value.contiguous().cpu() for key, value in model_tensors(model).items()}, name)
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
        best = None if self.best is None else vars(self.best)
        record = {"environment": self.environment, "done": self.done, "best": best}
        replace_secret(self._path / _STATE, json.dumps(record, sort_keys=True).encode())
