"""How rows of a table become features: the one encoder of training and of `discreet predict`.

Training makes it from public and released values; a record of these values in ``release/schema.json`` makes it again.

Shape legend: N = rows, F = features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discreet.app.data.columns import Encoding, NumberEncoding, encoding_from_json, parse_number
from discreet.app.data.records import Records
from discreet.app.data.source import TableInput


@dataclass(frozen=True)
class TableEncoding:
    """The encodings of all columns, in the order of their features.

    Attributes:
        columns: column -> its encodings; none for a column that is not used.
        missing: texts that mean "no value".
    """

    columns: Mapping[str, tuple[Encoding, ...]]
    missing: frozenset[str]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TableEncoding:
        """The encoder of a record that training wrote.

        Args:
            record: holds ``columns``, each with ``name`` and ``encodings``, and ``missing``.

        Raises:
            KeyError, TypeError, ValueError: not such a record.
        """
        columns = {
            str(column["name"]): tuple(encoding_from_json(encoding) for encoding in column["encodings"])
            for column in record["columns"]
        }
        if len(columns) != len(record["columns"]):
            raise ValueError("a column must stand there once")
        return cls(columns=columns, missing=frozenset(record["missing"]))

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that features are made of."""
        return tuple(name for name, found in self.columns.items() if found)

    @property
    def input(self) -> TableInput:
        """What a model is fed."""
        nothing = Records(path=Path(), names=self.used, rows=[], places=[])
        return TableInput(features=self.encode(nothing).shape[1])

    def encode(self, records: Records) -> Tensor:
        """Features, float32, shape (N, F). A row's features are a function of that row alone."""
        parts: list[np.ndarray] = []
        for name in self.used:
            values = records.column(name)
            numbers_N, missing_N = parse_numbers(values, self.missing)
            for encoding in self.columns[name]:
                if isinstance(encoding, NumberEncoding):
                    parts.append(encoding.encode(numbers_N, missing_N))
                else:
                    parts.append(encoding.encode(values, missing_N))
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def unread(self, records: Records) -> dict[str, int]:
        """Column -> cells that are encoded as missing, although they hold a text: a number was looked for."""
        found = {}
        for name in self.used:
            if all(isinstance(encoding, NumberEncoding) for encoding in self.columns[name]):
                numbers_N, missing_N = parse_numbers(records.column(name), self.missing)
                found[name] = int((np.isnan(numbers_N) & ~missing_N).sum())
        return {name: cells for name, cells in found.items() if cells}


def parse_numbers(values: Sequence[str], missing: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that texts stand for, float64, NaN where none, and which texts mean "no value", bool; shape (N,)."""
    missing_N = np.fromiter((value in missing for value in values), dtype=bool, count=len(values))
    numbers_N = np.fromiter((parse_number(value) for value in values), dtype=np.float64, count=len(values))
    return numbers_N, missing_N
