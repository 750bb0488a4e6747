"""The class list of the target: public, or released by threshold; never read off silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discreet.app.data.source import IGNORED
from discreet.core.histogram import Counts
from discreet.errors import ConfigError, DataError

_MOST_NAMES, _LONGEST_NAME = 10, 32
"""What a sentence about the class list shows of it."""


@dataclass(frozen=True)
class ClassList:
    """Names of the classes, in the order of their indices.

    Attributes:
        names: at least two distinct names.
        public: given by the user (True), or released from the training rows (False).
    """

    names: tuple[str, ...]
    public: bool

    def encode(self, labels: Sequence[str]) -> Tensor:
        """Class indices, int64, shape (N,); `IGNORED` for a label that is in no class.

        A label also matches without the spaces around it and without one dot at its end (as in ``adult.test``).
        """
        index = {name: i for i, name in enumerate(self.names)}
        return torch.from_numpy(
            np.fromiter((_find(index, label) for label in labels), dtype=np.int64, count=len(labels))
        )

    def to_json(self) -> dict[str, object]:
        """The record of the class list in a saved run."""
        return {"classes": list(self.names), "source": "public" if self.public else "released"}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ClassList:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: not such a record.
        """
        names = tuple(record["classes"])
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names) or len(names) < 2:
            raise ValueError("classes must be at least two distinct names")
        return cls(names=names, public=record["source"] == "public")

    @property
    def statement(self) -> str:
        """The sentences about where the class list comes from, which classes it holds, and what other rows do."""
        origin = "is public" if self.public else "was released privately by threshold"
        more = len(self.names) - _MOST_NAMES
        shown = ", ".join(clean(name) for name in self.names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        return (
            f"The list of {len(self.names)} classes {origin}: {shown}. Training rows of any other class taught "
            "nothing: each contributed exactly zero."
        )


def public_classes(classes: int | Sequence[str]) -> ClassList:
    """A class list from the user: a number of classes ("0", "1", ...), or their names."""
    names = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(str(name) for name in classes)
    if len(names) < 2:
        raise ConfigError(
            f"{len(names)} classes given: needs at least 2; list every class, e.g. classes = ['no', 'yes']."
        )
    if len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} classes given, {len(set(names))} of them distinct: each must appear once; drop repeats."
        )
    return ClassList(names=names, public=True)


def released_classes(counts: Counts, *, column: str, path: Path) -> ClassList:
    """The classes whose noisy count passed the threshold; numbers in numeric order, else alphabetical."""
    names = tuple(sorted(counts.names[column], key=_class_order))
    if len(names) < 2:
        raise DataError(
            f"{path}: {len(names)} classes of the target reach {counts.threshold:.0f} rows, the least that can be told "
            "privately; needs 2; list the classes with --classes A,B, or in a schema ([target] classes = [...]), and "
            "name another run directory, since this count is charged. A number cannot be the target yet: make "
            "classes of it."
        )
    return ClassList(names=names, public=False)


def clean(name: str) -> str:
    """A name of the data as a terminal may have it: no control characters, and short."""
    plain = "".join(letter if letter.isprintable() else "\u00b7" for letter in name)
    return plain if len(plain) <= _LONGEST_NAME else plain[: _LONGEST_NAME - 1] + "…"


def _class_order(name: str) -> tuple[bool, int, str]:
    numeric = name.isascii() and name.isdigit()
    return (not numeric, int(name) if numeric else 0, name)


def _find(index: dict[str, int], label: str) -> int:
    stripped = label.strip()
    for form in (label, stripped, stripped[:-1] if stripped.endswith(".") else stripped):
        if form in index:
            return index[form]
    return IGNORED
