"""Labelled text: words and character n-grams hashed into a fixed public vocabulary. Nothing is learned from the data.

Shape legend: N = rows, L = length in tokens.
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discreet.app.data.labels import public_classes, released_classes
from discreet.app.data.records import Records
from discreet.app.data.schema import Schema
from discreet.app.data.source import (
    Examples,
    Prepared,
    Request,
    Source,
    SourceKind,
    Task,
    TextInput,
    count_statement,
    digest_of,
    held_out_statement,
)
from discreet.core.histogram import Counts, Names

PADDING = 0

_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_MAX_CHARACTERS = 4000
_HASH = "crc32"


class TextUnits(enum.Enum):
    """What a text is cut into: a bag of words, word pairs and character n-grams, or its words in order."""

    NGRAMS = "ngrams"
    WORDS = "words"


@dataclass(frozen=True)
class TextEncoding:
    """A fixed public map from text to token ids.

    Attributes:
        units: what is hashed.
        vocabulary: number of ids, with 0 for padding.
        length: ids kept per text; the rest is cut off.
    """

    units: TextUnits
    vocabulary: int
    length: int

    @classmethod
    def of(cls, units: TextUnits) -> TextEncoding:
        """The usual sizes: 256 n-grams, or 64 words."""
        return cls(units=units, vocabulary=4096, length=256 if units is TextUnits.NGRAMS else 64)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int32, shape (N, L), padded with 0 on the right."""
        ids_NL = np.zeros((len(texts), self.length), dtype=np.int32)
        cut = _ngrams if self.units is TextUnits.NGRAMS else _words
        memory: dict[str, int] = {}
        for row, text in zip(ids_NL, texts, strict=True):
            pieces = cut(text[:_MAX_CHARACTERS])[: self.length]
            row[: len(pieces)] = [self._id(piece, memory) for piece in pieces]
        return torch.from_numpy(ids_NL)

    def to_json(self) -> dict[str, object]:
        """The record of this encoding in a saved run."""
        return {"units": self.units.value, "vocabulary": self.vocabulary, "length": self.length, "hash": _HASH}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TextEncoding:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: not such a record, or one of another hash.
        """
        if record["hash"] != _HASH:
            raise ValueError(f"the hash must be {_HASH}")
        vocabulary, length = int(record["vocabulary"]), int(record["length"])
        if vocabulary < 2 or length < 1:
            raise ValueError("vocabulary must be at least 2, length at least 1")
        return cls(units=TextUnits(record["units"]), vocabulary=vocabulary, length=length)

    def _id(self, piece: str, memory: dict[str, int]) -> int:
        if piece not in memory:
            memory[piece] = 1 + zlib.crc32(piece.encode("utf-8", "replace")) % (self.vocabulary - 1)
        return memory[piece]


class TextSource(Source):
    """A column of labels and a column of text."""

    def __init__(
        self,
        *,
        train: Records,
        test: Records | None,
        schema: Schema,
        target: str,
        text_column: str,
        classes: int | Sequence[str] | None,
        units: TextUnits,
        calibration: Records | None = None,
    ) -> None:
        self._train, self._test, self._calibration = train, test, calibration
        self._target, self._text_column = target, text_column
        self._schema = schema
        self._encoding = TextEncoding.of(units)
        self._classes = None if classes is None else public_classes(classes)
        super().__init__(
            kind=SourceKind.TEXT,
            path=train.path,
            examples=len(train.rows),
            request=Request(
                buckets={}, names=self._label_names(), classes=None if self._classes is not None else target
            ),
            input_spec=TextInput(vocabulary=self._encoding.vocabulary, length=self._encoding.length),
            calibration_examples=None if calibration is None else len(calibration.rows),
        )

    def _label_names(self) -> dict[str, Names]:
        if self._classes is not None:
            return {}
        labels = self._train.column(self._target)
        return {self._target: Names([None if label in self._schema.missing else label for label in labels])}

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        settings = (self._schema.facts(), self._target, self._text_column, self._classes, self._encoding)
        others = [part for rows in (self._test, self._calibration) if rows is not None for part in rows.parts()]
        return digest_of((repr(settings).encode(), *self._train.parts(), *others))

    def _encode(self, counts: Counts | None) -> Prepared:
        classes = self._classes
        if classes is None:
            assert counts is not None
            classes = released_classes(counts, column=self._target, path=self.path)

        def examples(records: Records) -> Examples:
            return Examples(
                features=self._encoding.encode(records.column(self._text_column)),
                targets=classes.encode(records.column(self._target)),
            )

        hashed = f"Text is hashed into {self._encoding.vocabulary} public ids; no vocabulary is learned from the data."
        test = None if self._test is None else examples(self._test)
        return Prepared(
            train=examples(self._train),
            test=test,
            calibration=None if self._calibration is None else examples(self._calibration),
            task=Task.CLASSIFICATION,
            classes=classes.names,
            input=TextInput(vocabulary=self._encoding.vocabulary, length=self._encoding.length),
            record={
                "kind": self.kind.value,
                "text": {"name": self._text_column, **self._encoding.to_json()},
                "target": {"name": self._target, **classes.to_json()},
            },
            statements=(
                hashed,
                classes.statement,
                *count_statement(counts, columns=self.statistics),
                held_out_statement(test),
            ),
            private=counts is None or counts.private,
        )


def _words(text: str) -> list[str]:
    return [token.lower() for token in _TOKEN.findall(text)]


def _ngrams(text: str) -> list[str]:
    """Distinct words, numbers by length, marks, pairs of words, and trigrams of longer words; in that order."""
    tokens = [f"#{len(token)}" if token.isdigit() else token for token in _words(text)]
    pairs = [f"{first} {second}" for first, second in pairwise(tokens)]
    parts = [f"{part}-" for token in tokens if len(token) > 3 for part in _trigrams(f"<{token}>")]
    return list(dict.fromkeys([*tokens, *pairs, *parts]))


def _trigrams(word: str) -> list[str]:
    return [word[i : i + 3] for i in range(len(word) - 2)]
