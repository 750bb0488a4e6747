"""Reading CSV, TSV and Parquet files into rows of text; a malformed row is named by file and line, never by value."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from discreet.app.data.schema import Schema
from discreet.app.data.split import SetApart, is_test_row
from discreet.errors import ConfigError, DataError

_FIELD_LIMIT = 1 << 24
_UTF_16 = "UTF-16 text, must be UTF-8; convert it, e.g. iconv -f UTF-16 -t UTF-8 FILE > NEW.csv"
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file, must be plain text; unpack it, e.g. gunzip -c FILE > NEW.csv",
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"PK\x03\x04": "a zip file or a spreadsheet (xlsx), must be plain text; export it as CSV, or unpack it",
}
"""First bytes of a file -> what it is, and what to do. A column may well be called PK: the whole mark is looked for."""


@dataclass(frozen=True)
class Records:
    """The rows of one file, as text.

    Attributes:
        path: the file.
        names: column names, public.
        rows: one list of fields per row, stripped of surrounding spaces, as many as there are names.
        places: where each row stands in the file, e.g. "line 17".
    """

    path: Path
    names: tuple[str, ...]
    rows: list[list[str]]
    places: list[str]

    def column(self, name: str) -> list[str]:
        """The fields of one column."""
        position = self.names.index(name)
        return [row[position] for row in self.rows]

    def split(self) -> tuple[Records, Records]:
        """Training and test rows, told apart by `is_test_row`."""
        return self._apart([is_test_row(row) for row in self.rows])

    def set_apart(self, part: SetApart) -> tuple[Records, Records]:
        """Training rows, and those that are kept for calibration."""
        part = part.of(len(self.rows))
        return self._apart([part.holds_row(row) for row in self.rows])

    def part(self, start: int, stop: int) -> Records:
        """The rows from ``start`` up to ``stop``."""
        return Records(path=self.path, names=self.names, rows=self.rows[start:stop], places=self.places[start:stop])

    def _apart(self, chosen: Sequence[bool]) -> tuple[Records, Records]:
        return self._take([not one for one in chosen]), self._take(chosen)

    def parts(self) -> Iterator[bytes]:
        """Everything that the rows hold, in order, for a fingerprint."""
        yield f"{len(self.rows)} x {len(self.names)}".encode()
        yield from (text.encode("utf-8", "surrogatepass") for row in (list(self.names), *self.rows) for text in row)

    def _take(self, mask: Sequence[bool]) -> Records:
        rows = [row for row, keep in zip(self.rows, mask, strict=True) if keep]
        places = [place for place, keep in zip(self.places, mask, strict=True) if keep]
        return Records(path=self.path, names=self.names, rows=rows, places=places)


def read_records(path: Path, *, schema: Schema, columns: tuple[str, ...] | None, keep_bare: bool = False) -> Records:
    """Read a table file.

    Args:
        path: a ``.parquet`` file, or delimited text (UTF-8). ``.csv`` means commas; otherwise the first line tells: a
            tab if there is one, else a comma, else a semicolon. Tab-separated files have no quoting.
        schema: its `header`, `delimiter` and `columns` are used.
        columns: names of the columns of a file without a header (one that repeats them is skipped); they must agree
            with the schema.
        keep_bare: keep a row of delimiters alone, in which no field holds anything; else it is taken for no row.

    Raises:
        ConfigError: names that are repeated, contradict the schema, or are as many as no row has.
        DataError: unreadable, empty, not UTF-8, NUL bytes, broken quotes, or a row of another length.
    """
    if columns is not None and schema.columns is not None and columns != schema.columns:
        raise ConfigError(
            f"{len(columns)} names in --columns, {len(schema.columns)} other ones in the schema; give only one."
        )
    names = columns if columns is not None else schema.columns
    _check_distinct(names, where="--columns")
    if path.suffix.lower() in {".parquet", ".pq"}:
        return _read_parquet(path, names=names)
    return _read_delimited(path, schema=schema, names=names, keep_bare=keep_bare)


def optional_import(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra holds it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package '{module.split('.')[0]}'; pip install 'discreet[{extra}]'."
        ) from error


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; anything that prevents reading becomes a `DataError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error


def _read_delimited(path: Path, *, schema: Schema, names: tuple[str, ...] | None, keep_bare: bool) -> Records:
    text = _decode(path)
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    if not first:
        raise DataError(f"{path}: the file is empty; it needs one row per example.")
    delimiter = schema.delimiter or _delimiter(path, first)
    lines = _parse(path, text, delimiter=delimiter, keep_bare=keep_bare)
    # A first line that is exactly the given names is a header and no row, whether or not the names were needed.
    has_header = schema.header if schema.header is not None else names is None or tuple(lines[0][0]) == names
    if has_header:
        header = lines.pop(0)[0]
        _check_header(path, header, names)
        names = tuple(header) if names is None else names
    assert names is not None
    if not lines:
        raise DataError(f"{path}: no row after the header; it needs one row per example.")
    _check_lengths(path, lines, names=names)
    return Records(
        path=path, names=names, rows=[fields for fields, _ in lines], places=[f"line {number}" for _, number in lines]
    )


def _decode(path: Path) -> str:
    raw = read_bytes(path)
    for signature, remedy in _OTHER_FORMATS.items():
        if raw.startswith(signature):
            raise DataError(f"{path}: is {remedy}.")
    position = raw.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{path}, line {_line_of(raw, position)}: holds a NUL byte; the file must be UTF-8 text: convert it."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _line_of(raw, error.start)
        # `from None`: the cause would carry the bytes of the row into a traceback.
        raise DataError(f"{path}, line {line}: not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8.") from None


def _line_of(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1


def _delimiter(path: Path, first: str) -> str:
    preferred = (",", ";", "\t") if path.suffix.lower() == ".csv" else ("\t", ",", ";")
    return next((mark for mark in preferred if mark in first), ",")


def _parse(path: Path, text: str, *, delimiter: str, keep_bare: bool) -> list[tuple[list[str], int]]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True
    )
    lines: list[tuple[list[str], int]] = []
    start = 1
    usual_limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        for fields in reader:
            if any(fields) or (keep_bare and len(fields) > 1):
                lines.append(([field.strip() for field in fields], start))
            start = reader.line_num + 1
    except csv.Error:
        raise DataError(
            f"{path}, line {start}: broken quotes or an overlong field; close the quotes, or double the ones inside."
        ) from None
    finally:
        csv.field_size_limit(usual_limit)
    return lines


def _check_header(path: Path, header: list[str], names: tuple[str, ...] | None) -> None:
    if names is not None and len(header) != len(names):
        raise ConfigError(
            f"{path}: {len(names)} column names given, the header has {len(header)}; they must be as many."
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or "" in header:
        # Not named: where a header is missing, the first line is a row of private values.
        raise DataError(
            f"{path}, line 1: a column name is repeated or empty; correct it (pandas: index=False), or set "
            "header = true and columns = [...] in a schema to rename them all."
        )


def _check_distinct(names: tuple[str, ...] | None, *, where: str) -> None:
    for name in names or ():
        if not name or (names or ()).count(name) > 1:
            raise ConfigError(f"{where}: column name '{name}' is empty or repeated; each must appear once.")


def _check_lengths(path: Path, lines: list[tuple[list[str], int]], *, names: tuple[str, ...]) -> None:
    if all(len(fields) != len(names) for fields, _ in lines):
        raise ConfigError(
            f"{path}: {len(names)} columns named, no row has as many fields; correct --columns, or set delimiter = "
            "in a schema."
        )
    for fields, number in lines:
        if len(fields) != len(names):
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields, must be {len(names)}; quote fields with a delimiter."
            )


def _read_parquet(path: Path, *, names: tuple[str, ...] | None) -> Records:
    arrow = optional_import("pyarrow", extra="parquet", purpose=f"{path}: reading Parquet")
    parquet = optional_import("pyarrow.parquet", extra="parquet", purpose=f"{path}: reading Parquet")
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException):
        raise DataError(f"{path}: not a readable Parquet file; check that it is complete.") from None
    own = tuple(str(name) for name in table.column_names)
    if names is not None and len(names) != len(own):
        raise ConfigError(f"{path}: {len(names)} column names given, the file has {len(own)}; they must be as many.")
    names = own if names is None else names
    if len(set(own)) != len(own):
        raise DataError(f"{path}: a column name is repeated; rename it.")
    for name, kind in zip(names, table.schema.types, strict=True):
        binary = (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_fixed_size_binary)
        if arrow.types.is_nested(kind) or any(holds(kind) for holds in binary):
            raise DataError(f"{path}, column '{name}': nested or binary values; a column must hold numbers or text.")
    if table.num_rows == 0:
        raise DataError(f"{path}: no row; it needs one row per example.")
    fields = []
    for name, column in zip(names, table.columns, strict=True):
        try:
            # Python's dates end with the year 9999, and have no nanoseconds.
            held = column.cast("string") if arrow.types.is_temporal(column.type) else column
            fields.append(["" if value is None else str(value).strip() for value in held.to_pylist()])
        except (ValueError, OverflowError, arrow.ArrowException):
            # `from None`: the cause would carry a value into a traceback.
            raise DataError(
                f"{path}, column '{name}': holds values that have no text; write the column as text or as numbers."
            ) from None
    rows = [list(row) for row in zip(*fields, strict=True)]
    return Records(path=path, names=names, rows=rows, places=[f"row {i + 1}" for i in range(len(rows))])
