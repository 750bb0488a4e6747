"""Malformed input: each is refused on one line, with value, rule and remedy, and without any value of the data."""

from __future__ import annotations

import builtins
import importlib
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.data_files import prepare, table, write
from discreet.app.data import SourceKind, open_source
from discreet.app.data.records import read_records
from discreet.app.data.schema import Schema, parse_schema
from discreet.errors import ConfigError, DataError

CANARY = "CANARY61803"


def _refused(error, message, path, **options):
    """Open, catch, and check the message and the whole traceback for the canary."""
    with pytest.raises(error, match=message) as caught:
        open_source(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert CANARY not in text
    assert ";" in text  # rule; remedy
    assert CANARY not in "".join(traceback.format_exception(caught.value))


GOOD = f"a,b,label\n1,{CANARY},yes\n2,{CANARY},no\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file is empty"),
        (b"\n \n\n", "file is empty"),
        (b"a,b,label\n", "no row after the header"),
        (GOOD.encode() + f"3,{CANARY}\n".encode(), "line 4: 2 fields, must be 3"),
        (GOOD.encode() + f"3,{CANARY},yes,5\n".encode(), "line 4: 4 fields, must be 3"),
        (GOOD.encode() + f"\n\n3,{CANARY}\n".encode(), "line 6: 2 fields"),
        (GOOD.encode() + f'3,"{CANARY}\n4,x\n'.encode(), "line 4: broken quotes"),
        (GOOD.encode() + f'3,"{CANARY}"x,yes\n'.encode(), "line 4: broken quotes"),
        (GOOD.encode() + CANARY.encode() + b",\xe9,yes\n", "line 4: not UTF-8"),
        (GOOD.encode() + CANARY.encode() + b",\0,yes\n", "line 4: holds a NUL"),
        (GOOD.encode("utf-16"), "is UTF-16 text"),
        (f"a,a,label\n1,{CANARY},yes\n".encode(), "repeated or empty"),
        (f"{CANARY},{CANARY},label\n1,2,yes\n".encode(), "repeated or empty"),
        (f"a,,label\n1,{CANARY},yes\n".encode(), "repeated or empty"),
        (f"a,b,label\n1,{CANARY},\n2,{CANARY},?\n".encode(), "no row has a label"),
        (f"a,b,label\n1,{CANARY},{CANARY}\n2,x,{CANARY}\n".encode(), "one class only"),
    ],
)
def test_malformed_tables(tmp_path, content, message):
    _refused(DataError, message, write(tmp_path / "a.csv", content), target="label")


def test_too_few_rows(tmp_path):
    path = write(tmp_path / "a.csv", f"a,b,label\n1,{CANARY},yes\n")
    _refused(DataError, "1 training rows", path, target="label", classes=["yes", "no"], test=path)


@pytest.mark.parametrize("value", ["inf", "-inf", "1e999", CANARY, "1;2", "0x1f"])
def test_a_declared_number_must_be_finite(tmp_path, value):
    schema = parse_schema({"column": {"a": {"type": "number", "min": 0, "max": 9}}}, where="schema")
    path = write(tmp_path / "a.csv", f"a,b,label\n1,x,yes\n2,y,no\n{value},{CANARY},no\n")
    _refused(DataError, "line 4, column 'a': not a finite number", path, target="label", schema=schema, test=path)


@pytest.mark.parametrize("value", ["", "?", "NaN", "nan", "NA", "null"])
def test_missing_values_are_no_error(tmp_path, value):
    schema = parse_schema({"column": {"a": {"type": "number"}}}, where="schema")
    path = write(tmp_path / "a.csv", f"a,b,label\n1,x,yes\n2,y,no\n{value},z,no\n")
    assert open_source(path, target="label", schema=schema, test=path).examples == 3


def test_the_line_counts_newlines_inside_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b,label\n1,"x\ny",yes\n2,z\n')
    _refused(DataError, "line 4: 2 fields", path, target="label")


def test_an_unknown_target_does_not_list_a_header_that_may_be_a_row(tmp_path):
    path = write(tmp_path / "a.csv", f"39,{CANARY},yes\n40,x,no\n")
    _refused(ConfigError, "target 'label': not a column", path, target="label")


def test_one_column_hints_at_the_delimiter(tmp_path):
    path = write(tmp_path / "a.csv", GOOD.replace(",", "|"))
    _refused(ConfigError, r"which has one column; .* or set delimiter = in a schema", path, target="label")


def test_no_target(tmp_path):
    _refused(ConfigError, "no target given", write(tmp_path / "a.csv", GOOD))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["a", "b"], "2 columns named, no row has as many"),
        (["a", "b", "c", "label"], "4 columns named, no row has as many"),
        (["a", "a", "label"], "'a' is empty or repeated"),
        (["a", "", "label"], "'' is empty or repeated"),
    ],
)
def test_wrong_names_of_columns(tmp_path, columns, message):
    _refused(ConfigError, message, write(tmp_path / "a.csv", GOOD), target="label", columns=columns)


def test_names_that_contradict_the_schema(tmp_path):
    schema = parse_schema({"columns": ["x", "y", "label"]}, where="schema")
    path = write(tmp_path / "a.csv", GOOD)
    _refused(ConfigError, "give only one", path, target="label", columns=["a", "b", "label"], schema=schema)


def test_names_that_do_not_fit_the_header(tmp_path):
    schema = parse_schema({"header": True}, where="schema")
    path = write(tmp_path / "a.csv", GOOD)
    _refused(ConfigError, "header has 3", path, target="label", columns=["a", "label"], schema=schema)


def test_schema_columns_must_exist(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    schema = parse_schema({"column": {"bb": {"type": "drop"}}}, where="schema")
    _refused(ConfigError, "schema column 'bb': not a column", path, target="label", schema=schema)
    named = parse_schema({"columns": ["a", "b", "label"], "column": {"bb": {"type": "drop"}}}, where="schema")
    _refused(ConfigError, "did you mean 'b'", path, target="label", schema=named)
    onto = parse_schema({"column": {"label": {"type": "category"}}}, where="schema")
    _refused(ConfigError, "is the target", path, target="label", schema=onto)


def test_nothing_beside_the_target(tmp_path):
    path = write(tmp_path / "a.csv", f"{CANARY},label\n" + "1,yes\n2,no\n" * 20)
    schema = parse_schema({"columns": ["a", "label"], "column": {"a": {"type": "drop"}}}, where="schema")
    _refused(DataError, "no column beside the target", path, target="label", schema=schema, test=path)


def test_class_lists_that_match_nothing(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    _refused(DataError, "no label is in the given class list", path, target="label", classes=["Y", "N"])
    _refused(ConfigError, "1 classes given", path, target="label", classes=["yes"])


def test_test_files_must_fit(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    other = write(tmp_path / "b.csv", f"a,c,label\n1,{CANARY},yes\n")
    _refused(DataError, "not those of", path, target="label", test=other)
    _refused(ConfigError, "a folder, but", path, target="label", test=tmp_path)
    _refused(DataError, "no such file", path, target="label", test=tmp_path / "none.csv")


def test_paths_and_kinds_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    _refused(DataError, "no such file", tmp_path / "none.csv", target="label")
    _refused(ConfigError, "images are asked for", path, target="label", kind=SourceKind.IMAGES)
    _refused(ConfigError, "needs a file", tmp_path, target="label", kind=SourceKind.TABLE)
    _refused(ConfigError, "no columns", tmp_path, columns=["a"])
    _refused(ConfigError, "a file, but the training data is a folder", tmp_path, test=path)


def test_a_header_is_skipped_and_a_bom_ignored(tmp_path):
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + GOOD.encode() * 1)
    assert open_source(path, target="label", test=path).examples == 2


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.data", ";"), ("a.csv", ";"), ("a.txt", ",")])
def test_the_delimiter_is_told_from_the_first_line(tmp_path, name, mark):
    path = write(tmp_path / name, GOOD.replace(",", mark))
    assert open_source(path, target="label", test=path).examples == 2


# ---- Parquet


def _parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_is_read_like_text(tmp_path):
    count = 900
    columns = {
        "age": list(range(20, 80)) * 15,
        "height": [1.5, None, 1.75] * 300,
        "job": ["clerk", "smith", None] * 300,
        "label": [True, False] * 450,
    }
    path = _parquet(tmp_path / "a.parquet", columns)
    prepared = prepare(open_source(path, target="label", test=path))
    assert len(prepared.train) == count
    assert prepared.classes == ("False", "True")
    assert [column["encodings"][0]["as"] for column in prepared.record["columns"]] == ["number", "number", "category"]


def test_malformed_parquet(tmp_path):
    _refused(DataError, "not a readable Parquet", write(tmp_path / "a.parquet", GOOD), target="label")
    _refused(DataError, "no row", _parquet(tmp_path / "b.parquet", {"a": [], "label": []}), target="label")
    nested = _parquet(tmp_path / "c.parquet", {"a": [[1], [2]], "label": [CANARY, "x"]})
    _refused(DataError, "column 'a': nested", nested, target="label")
    good = _parquet(tmp_path / "d.parquet", {"a": [1, 2], "label": [CANARY, "x"]})
    _refused(ConfigError, "2 other|file has 2", good, target="label", columns=["a", "b", "label"])


def test_parquet_cells_that_python_has_no_value_for(tmp_path):
    """One row with a nanosecond, or in the year 12000, must not end the program; and no error may quote it."""
    nano = pa.array([1_600_000_000_000_000_001, 1_600_000_000_000_000_000], type=pa.timestamp("ns"))
    far = pa.array([3_700_000, None], type=pa.date32())
    length = pa.array([1_001, 5], type=pa.duration("ns"))
    path = _parquet(tmp_path / "a.parquet", {"a": nano, "b": far, "c": length, "label": ["x", "y"]})
    rows = read_records(path, schema=Schema(), columns=None).rows
    assert [row[0][-3:] for row in rows] == ["001", "000"]
    assert [row[1] for row in rows] == ["12100-04-04", ""]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(6)])
def test_parquet_bytes_are_no_text(tmp_path, kind):
    raw = pa.array([CANARY[:6].encode().ljust(6), b"x     "], type=kind)
    path = _parquet(tmp_path / "a.parquet", {"a": raw, "label": ["x", "y"]})
    _refused(DataError, "column 'a': nested or binary", path, target="label")


def test_parquet_text_that_is_no_text(tmp_path):
    broken = pa.array([CANARY.encode() + b"\xff", b"x"], type=pa.binary()).view(pa.string())
    path = _parquet(tmp_path / "a.parquet", {"a": broken, "label": ["x", "y"]})
    _refused(DataError, "column 'a': holds values that have no text", path, target="label")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = _parquet(tmp_path / "a.parquet", {"a": [1, 2], "label": ["x", "y"]})
    real = importlib.import_module

    def without(name, package=None):
        if name.startswith("pyarrow"):
            raise builtins.ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"discreet\[parquet\]"):
        open_source(path, target="label")


def test_nothing_is_written(tmp_path):
    path = table(tmp_path / "in" / "a.csv")
    before = sorted(tmp_path.rglob("*"))
    prepare(open_source(path, target="label"))
    assert sorted(tmp_path.rglob("*")) == before
