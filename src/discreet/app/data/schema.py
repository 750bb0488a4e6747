"""Public facts about the data, from a TOML file. What it states need not be computed privately.

    header = false                    # the first line is a row; needs `columns`   (default: true unless columns are
    given) delimiter = ","                   # default: told from the name and the first line
    columns = ["age", "job", "note", "income"]
    missing = ["?", ""]               # texts that mean "no value"                 (default: "", ?, NA, N/A, NaN, null,
    None)

    [target]
    name = "income"
    classes = ["<=50K", ">50K"]       # or a number of classes, for labels 0, 1, ...

    [column.age]
    type = "number"                   # without min and max, they are computed privately
    min = 0
    max = 100

    [column.job]
    type = "category"                 # without values, they are computed privately
    values = ["clerk", "smith"]

    [column.note]
    type = "drop"                     # or "text": words and character n-grams, hashed

Write only what you know without looking at the data: a bound read off the private rows is a leak that nothing counts.
"""

from __future__ import annotations

import difflib
import enum
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from discreet.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_MISSING = frozenset({"", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"})
"""Texts that mean "no value" unless the schema says otherwise."""


class ColumnType(enum.Enum):
    """What a column holds."""

    NUMBER = "number"
    CATEGORY = "category"
    TEXT = "text"
    DROP = "drop"


@dataclass(frozen=True)
class ColumnSchema:
    """Public facts about one column.

    Attributes:
        type: what it holds.
        bounds: public range of a number; None: computed privately.
        values: public list of categories; None: computed privately.
    """

    type: ColumnType
    bounds: tuple[float, float] | None = None
    values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Schema:
    """Public facts about a data file; everything may be left out."""

    columns: tuple[str, ...] | None = None
    header: bool | None = None
    delimiter: str | None = None
    missing: frozenset[str] = DEFAULT_MISSING
    target: str | None = None
    classes: int | tuple[str, ...] | None = None
    column: Mapping[str, ColumnSchema] = field(default_factory=dict)

    def facts(self) -> tuple[object, ...]:
        """All facts in a fixed order, so that equal schemas have equal text."""
        described = (self.columns, self.header, self.delimiter, sorted(self.missing), self.target, self.classes)
        return (*described, sorted((name, repr(column)) for name, column in self.column.items()))


def read_schema(path: str | Path) -> Schema:
    """Read and check a schema file.

    Raises:
        ConfigError: not readable, not TOML, an unknown key (the nearest valid one is named), or a value of the wrong
        type.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"schema {path}: cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"schema {path}: not UTF-8; save it as UTF-8 text.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"schema {path}: not valid TOML ({error}); see the example in docs/quickstart.md.") from error
    return parse_schema(tree, where=f"schema {path}")


def parse_schema(tree: Mapping[str, object], *, where: str) -> Schema:
    """Check a parsed schema; ``where`` begins every message."""
    _check_keys(tree, {"header", "delimiter", "columns", "missing", "target", "column"}, where=where)
    target = _table(tree, "target", where=where)
    _check_keys(target, {"name", "classes"}, where=f"{where}, [target]")
    columns = _texts(tree, "columns", where=where)
    header = tree.get("header")
    if header is not None and not isinstance(header, bool):
        raise ConfigError(f"{where}: header = {header!r} must be true or false; write header = false.")
    if header is False and columns is None:
        raise ConfigError(f"{where}: header = false needs the column names; add columns = [...].")
    delimiter = _text(tree, "delimiter", where=where)
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ConfigError(f"{where}: delimiter = {delimiter!r} must be one character; write delimiter = ','.")
    missing = _texts(tree, "missing", where=where, unique=False)
    return Schema(
        columns=columns,
        header=header,
        delimiter=delimiter,
        missing=DEFAULT_MISSING if missing is None else frozenset(text.strip() for text in missing),
        target=_text(target, "name", where=f"{where}, [target]"),
        classes=_classes(target, where=f"{where}, [target]"),
        column={
            name: _column(
                _table(_table(tree, "column", where=where), name, where=where), where=f"{where}, [column.{name}]"
            )
            for name in _table(tree, "column", where=where)
        },
    )


def nearest(name: str, choices: Collection[str]) -> str:
    """A hint at the most similar of some PUBLIC names, or their list."""
    close = closest(name, choices)
    return f"valid are {', '.join(sorted(choices))}." if close is None else f"did you mean '{close}'?"


def closest(name: str, choices: Collection[str]) -> str | None:
    """The one of some names that is most similar; None where none is."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1)), None)


def _check_keys(table: Mapping[str, object], valid: Collection[str], *, where: str) -> None:
    for key in table:
        if key not in valid:
            raise ConfigError(f"{where}: key '{key}' is not known; {nearest(key, valid)}")


def _table(tree: Mapping[str, object], key: str, *, where: str) -> Mapping[str, object]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: '{key}' must be a table; write [{key}] on its own line, with keys below.")
    return value


def _text(table: Mapping[str, object], key: str, *, where: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: {key} = {value!r} must be text; put it in quotes.")
    return value


def _texts(table: Mapping[str, object], key: str, *, where: str, unique: bool = True) -> tuple[str, ...] | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {key} must be a list of texts, not empty; write {key} = ['a', 'b'].")
    repeated = sorted({item for item in value if value.count(item) > 1}) if unique else []
    if repeated:
        raise ConfigError(f"{where}: {key} lists '{repeated[0]}' more than once; each must appear once.")
    return tuple(value)


def _classes(target: Mapping[str, object], *, where: str) -> int | tuple[str, ...] | None:
    value = target.get("classes")
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 2:
            raise ConfigError(f"{where}: classes = {value} must be at least 2; count every class.")
        return value
    names = _texts(target, "classes", where=where)
    if names is not None and len(names) < 2:
        raise ConfigError(f"{where}: classes has {len(names)} name; must have at least 2; list every class.")
    return names


def _column(table: Mapping[str, object], *, where: str) -> ColumnSchema:
    _check_keys(table, {"type", "min", "max", "values"}, where=where)
    types = {kind.value: kind for kind in ColumnType}
    name = _text(table, "type", where=where)
    if name is None:
        raise ConfigError(f"{where}: type is missing; it must be one of {', '.join(sorted(types))}.")
    if name not in types:
        raise ConfigError(f"{where}: type = '{name}' is not known; {nearest(name, types)}")
    kind = types[name]
    if "values" in table and kind is not ColumnType.CATEGORY:
        raise ConfigError(f"{where}: values belong to type 'category', not '{name}'; drop them or change the type.")
    if ("min" in table or "max" in table) and kind is not ColumnType.NUMBER:
        raise ConfigError(f"{where}: min and max belong to type 'number', not '{name}'; drop them or change the type.")
    return ColumnSchema(type=kind, bounds=_bounds(table, where=where), values=_texts(table, "values", where=where))


def _bounds(table: Mapping[str, object], *, where: str) -> tuple[float, float] | None:
    if "min" not in table and "max" not in table:
        return None
    low, high = table.get("min"), table.get("max")
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}: min and max must both be finite numbers; write min = 0 and max = 100.")
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    if not low < high:
        raise ConfigError(f"{where}: min = {low} and max = {high}: min must be below max; swap or widen them.")
    return float(low), float(high)
