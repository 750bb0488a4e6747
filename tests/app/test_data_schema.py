"""The schema file: what it may say, and how a mistake is told."""

from __future__ import annotations

import pytest

from discreet.app.data.schema import ColumnSchema, ColumnType, Schema, read_schema
from discreet.errors import ConfigError

FULL = """
header = false
delimiter = ";"
columns = ["age", "job", "note", "y"]
missing = ["?", ""]
[target]
name = "y"
classes = ["no", "yes"]
[column.age]
type = "number"
min = 0
max = 99.5
[column.job]
type = "category"
values = ["clerk", "smith"]
[column.note]
type = "drop"
"""


def _read(tmp_path, text):
    path = tmp_path / "schema.toml"
    path.write_text(text, encoding="utf-8")
    return read_schema(path)


def test_a_full_schema(tmp_path):
    assert _read(tmp_path, FULL) == Schema(
        columns=("age", "job", "note", "y"),
        header=False,
        delimiter=";",
        missing=frozenset({"?", ""}),
        target="y",
        classes=("no", "yes"),
        column={
            "age": ColumnSchema(type=ColumnType.NUMBER, bounds=(0.0, 99.5)),
            "job": ColumnSchema(type=ColumnType.CATEGORY, values=("clerk", "smith")),
            "note": ColumnSchema(type=ColumnType.DROP),
        },
    )


def test_an_empty_schema_is_the_default(tmp_path):
    assert _read(tmp_path, "") == Schema()


def test_a_number_of_classes(tmp_path):
    assert _read(tmp_path, "[target]\nclasses = 10").classes == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("headr = true", "did you mean 'header'"),
        ("[target]\nclases = 2", "did you mean 'classes'"),
        ("[column.a]\ntype = 'number'\nmni = 1", "did you mean 'min'"),
        ("[column.a]\ntype = 'numbr'", "did you mean 'number'"),
        ("[column.a]\nmin = 1\nmax = 2", "type is missing"),
        ("header = 'no'", "true or false"),
        ("header = false", "add columns"),
        ("columns = 'a,b'", "list of texts"),
        ("columns = []", "not empty"),
        ("columns = ['a', 'b', 'a']", "'a' more than once"),
        ("delimiter = ',,'", "one character"),
        ("delimiter = 3", "must be text"),
        ("target = 'y'", r"\[target\]"),
        ("column = 3", r"\[column\]"),
        ("[column]\na = 3", r"\[a\]"),
        ("[target]\nname = 3", "must be text"),
        ("[target]\nclasses = 1", "at least 2"),
        ("[target]\nclasses = ['a']", "at least 2"),
        ("[target]\nclasses = ['a', 'a']", "more than once"),
        ("[column.a]\ntype = 'number'\nmin = 2\nmax = 2", "min must be below max"),
        ("[column.a]\ntype = 'number'\nmin = 3\nmax = 2", "min must be below max"),
        ("[column.a]\ntype = 'number'\nmin = 0", "both be finite"),
        ("[column.a]\ntype = 'number'\nmin = 0\nmax = inf", "both be finite"),
        ("[column.a]\ntype = 'number'\nmin = nan\nmax = 1", "both be finite"),
        ("[column.a]\ntype = 'number'\nmin = false\nmax = true", "both be finite"),
        ("[column.a]\ntype = 'category'\nvalues = ['x', 'x']", "more than once"),
        ("[column.a]\ntype = 'category'\nvalues = [1, 2]", "list of texts"),
        ("[column.a]\ntype = 'number'\nvalues = ['x']", "belong to type 'category'"),
        ("[column.a]\ntype = 'category'\nmin = 1", "belong to type 'number'"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_on_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "schema.toml" in str(caught.value)


def test_a_schema_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_schema(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"delimiter = '\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_schema(tmp_path / "latin.toml")
