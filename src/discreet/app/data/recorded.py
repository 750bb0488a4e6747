"""What ``release/schema.json`` says of the rows that a run was trained on, and other rows, encoded in the same way.

    recorded = read_recorded(record, where=path)            # the encoder of training, made again from its record
    rows = recorded.read(file, schema=Schema(), columns=None)
    rows.features(0, 1000)                                  # as in `Examples`

Shape legend: N = rows.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discreet.app.data.images import PIXELS, read_idx
from discreet.app.data.labels import ClassList, clean
from discreet.app.data.records import Records, read_records
from discreet.app.data.schema import DEFAULT_MISSING, Schema, closest
from discreet.app.data.source import ImageInput, InputSpec, SourceKind, TextInput, input_from_json
from discreet.app.data.table_encoding import TableEncoding
from discreet.app.data.text import TextEncoding
from discreet.errors import ConfigError, DataError


@dataclass(frozen=True)
class Rows:
    """Rows that a model is applied to, read and not yet encoded.

    Attributes:
        count: number of rows N.
        features: from a first row and the one after the last to features, as `Examples` holds them.
        labels: the class that the file itself gives each row; None where it has no such column.
        unread: column -> cells that are no numbers where a number was looked for, and are encoded as missing.
    """

    count: int
    features: Callable[[int, int], Tensor]
    labels: tuple[str, ...] | None
    unread: Mapping[str, int]


@dataclass(frozen=True)
class Recorded(abc.ABC):
    """The encoding of a run, of whatever kind.

    Attributes:
        target: name of the label column.
        classes: in the order of the model's outputs.
    """

    target: str
    classes: ClassList

    @property
    @abc.abstractmethod
    def input(self) -> InputSpec:
        """What the model is fed."""

    @abc.abstractmethod
    def read(self, path: Path, *, schema: Schema, columns: tuple[str, ...] | None) -> Rows:
        """Read a file of rows.

        Args:
            path: a file of the form of the training data.
            schema: how the file is written: its ``header``, ``delimiter`` and ``columns`` are used, and nothing else.
            columns: names of the columns of a file without a header.

        Raises:
            ConfigError: options that this kind of data does not have, or that contradict the run.
            DataError: the file cannot be read, is empty, or lacks a column.
        """

    def _records(self, path: Path, names: Sequence[str], *, schema: Schema, columns: tuple[str, ...] | None) -> Records:
        if path.is_dir():
            raise DataError(f"{path}: a folder, but the run was trained on a file; give a file of the same form.")
        records = read_records(path, schema=schema, columns=columns, keep_bare=True)
        lost = [name for name in names if name not in records.names]
        if lost:
            # The others are not listed: where a header is missing, they are a row of private values.
            near = closest(lost[0], [name for name in records.names if name not in names])
            more = f" (and {len(lost) - 1} more that the model takes)" if len(lost) > 1 else ""
            hint = (
                "name the columns as in training, by --columns a,b,c if the file has no header"
                if near is None
                else f"did you mean '{clean(near)}'? Rename it"
            )
            raise DataError(f"{path}: no column '{clean(lost[0])}'{more}, which the model needs; {hint}.")
        return records

    def _labels(self, records: Records) -> tuple[str, ...] | None:
        return tuple(records.column(self.target)) if self.target in records.names else None


@dataclass(frozen=True)
class RecordedTable(Recorded):
    """Columns of numbers and categories. Attributes: encoding: that of training."""

    encoding: TableEncoding

    @property
    def input(self) -> InputSpec:
        return self.encoding.input

    def read(self, path: Path, *, schema: Schema, columns: tuple[str, ...] | None) -> Rows:
        if schema.missing not in (self.encoding.missing, DEFAULT_MISSING):
            raise ConfigError(
                "--schema: its missing = [...] lists other texts than those of the run, which count; leave it out, or "
                "give the schema of the run."
            )
        records = self._records(path, self.encoding.used, schema=schema, columns=columns)
        return Rows(
            count=len(records.rows),
            features=lambda start, stop: self.encoding.encode(records.part(start, stop)),
            labels=self._labels(records),
            unread=self.encoding.unread(records),
        )


@dataclass(frozen=True)
class RecordedText(Recorded):
    """One column of text. Attributes: column: its name; encoding: that of training."""

    column: str
    encoding: TextEncoding

    @property
    def input(self) -> InputSpec:
        return TextInput(vocabulary=self.encoding.vocabulary, length=self.encoding.length)

    def read(self, path: Path, *, schema: Schema, columns: tuple[str, ...] | None) -> Rows:
        records = self._records(path, (self.column,), schema=schema, columns=columns)
        return Rows(
            count=len(records.rows),
            features=lambda start, stop: self.encoding.encode(records.part(start, stop).column(self.column)),
            labels=self._labels(records),
            unread={},
        )


@dataclass(frozen=True)
class RecordedImages(Recorded):
    """Grey images of one size, in an IDX file. Attributes: size: that of training."""

    size: ImageInput

    @property
    def input(self) -> InputSpec:
        return self.size

    def read(self, path: Path, *, schema: Schema, columns: tuple[str, ...] | None) -> Rows:
        if columns is not None or schema != Schema():
            raise ConfigError("--columns or --schema with images: an IDX file has no columns; leave them out.")
        if path.is_dir():
            raise DataError(f"{path}: a folder; give one IDX file of images, e.g. t10k-images-idx3-ubyte.gz.")
        pixels = read_idx(path)
        wanted = (self.size.height, self.size.width)
        if pixels.ndim != 3 or pixels.shape[1:] != wanted or not len(pixels):
            shown = " x ".join(str(side) for side in pixels.shape)
            raise DataError(
                f"{path}: an array of {shown}; must be images x {wanted[0]} x {wanted[1]}, at least 1 of them, as in "
                "training; give the file of images and not that of labels."
            )
        images = torch.from_numpy(pixels).unsqueeze(1)
        return Rows(count=len(images), features=lambda start, stop: images[start:stop], labels=None, unread={})


def read_recorded(record: Mapping[str, Any], *, where: Path) -> Recorded:
    """The encoding that training wrote down.

    Raises:
        ConfigError: images of a kind whose encoding cannot be repeated, or an older run that does not say enough.
        DataError: not such a record.
    """
    try:
        return _of_kind(SourceKind(record["kind"]), record, where=where)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: is no record of an encoding as training writes it ({type(error).__name__}); restore the file "
            "from the run."
        ) from error


def _of_kind(kind: SourceKind, record: Mapping[str, Any], *, where: Path) -> Recorded:
    target, classes = str(record["target"]["name"]), ClassList.from_json(record["target"])
    if kind is SourceKind.TABLE:
        encoding = TableEncoding.from_json(record)
        if not encoding.used:
            raise ValueError("no column is used")
        return RecordedTable(target=target, classes=classes, encoding=encoding)
    if kind is SourceKind.TEXT:
        text = record["text"]
        return RecordedText(
            target=target, classes=classes, column=str(text["name"]), encoding=TextEncoding.from_json(text)
        )
    image = record["image"]
    if "range" not in image:
        raise ConfigError(
            f"{where}: does not say which range of pixels was scaled, as runs on images of an older version do not; "
            "train again, or apply the model as docs/recipes.md says."
        )
    size = input_from_json({name: value for name, value in image.items() if name != "range"})
    if not isinstance(size, ImageInput):
        raise TypeError("the size must be that of images")
    if image["range"] != PIXELS or size.channels != 1:
        known = "scikit-learn's digits" if image["range"] != PIXELS else "a folder of image files"
        raise ConfigError(
            f"{where}: the run was trained on {known}; only tables, texts and grey images of IDX files can be read "
            "again; apply the model as docs/recipes.md says."
        )
    return RecordedImages(target=target, classes=classes, size=size)
