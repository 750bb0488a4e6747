"""Canonical JSON and strict field reading."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.errors import ConfigError
from discreet.privacy.records import Fields, canonical_json, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_canonical_form_is_a_fixed_point_without_line_breaks(value):
    text = canonical_json(value)
    assert "\n" not in text
    assert text.isascii()
    assert parse_json(text, where="test") == value
    assert canonical_json(parse_json(text, where="test")) == text


def test_key_order_does_not_matter():
    assert canonical_json({"b": 1, "a": [1.5]}) == canonical_json({"a": [1.5], "b": 1}) == '{"a":[1.5],"b":1}'


@pytest.mark.parametrize("value", [math.nan, math.inf, {"x": -math.inf}, {1, 2}, b"bytes", object()])
def test_not_json_is_refused(value):
    with pytest.raises(ConfigError, match="not writable as JSON"):
        canonical_json(value)


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":1}', "NaN", '{"a":Infinity}', "[1,]", "{'a':1}", "[" * 200_000])
def test_bad_text_is_refused_and_named(text):
    with pytest.raises(ConfigError, match=r"somewhere\.json"):
        parse_json(text, where="somewhere.json")


@pytest.mark.parametrize(
    ("method", "good", "bad"),
    [
        ("integer", 3, [3.0, True, "3", None]),
        ("number", 3, ["3", True, None, math.nan, math.inf, []]),
        ("number_or_inf", "inf", ["Infinity", math.inf, None]),
        ("text", "a", [1, None, ["a"]]),
        ("flag", True, [1, 0, "true", None]),
        ("items", [], [{}, "a", None]),
        ("texts", ["a"], ["a", [1], None]),
        ("mapping", {"a": 1}, [[], "a", None]),
        ("scalars", {"a": 1, "b": "x"}, [[], {"a": None}, {"a": math.nan}]),
        ("text_mapping", {"a": "b"}, [{"a": 1}, [], None]),
    ],
)
def test_each_reader_takes_its_type_only(method, good, bad):
    def read(value):
        return getattr(Fields({"field": value}, where="thing", names=["field"]), method)("field")

    read(good)
    for value in bad:
        with pytest.raises(ConfigError, match="thing: field 'field'"):
            read(value)


def test_missing_unknown_and_not_an_object():
    with pytest.raises(ConfigError, match="'b' is missing"):
        Fields({"a": 1}, where="thing", names=["a", "b"])
    with pytest.raises(ConfigError, match="'c' is unknown"):
        Fields({"a": 1, "c": 1}, where="thing", names=["a"])
    with pytest.raises(ConfigError, match="not list"):
        Fields([], where="thing", names=["a"])


def test_floats_survive_exactly():
    for value in (0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0):
        assert json.loads(canonical_json(value)) == value
