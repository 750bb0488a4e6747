"""Text: hashed, never read off; which column holds it is public."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.data_files import prepare, table, write
from discreet.app.data import (
    SourceKind,
    TextInput,
    TextUnits,
    open_source,
)
from discreet.app.data.schema import parse_schema
from discreet.app.data.text import TextEncoding
from discreet.errors import ConfigError


def _messages(path, count=300, sep="\t"):
    lines = [
        f"{'spam' if i % 3 == 0 else 'ham'}{sep}{'win cash now' if i % 3 == 0 else 'see you at home'} {i}"
        for i in range(count)
    ]
    return write(path, "\n".join(lines) + "\n")


def test_text_is_hashed_and_only_labels_are_asked(tmp_path):
    source = open_source(_messages(tmp_path / "messages"), target="label", columns=["label", "text"])
    assert source.kind is SourceKind.TEXT
    assert source.statistics == ("label",)
    prepared = prepare(source)
    assert prepared.classes == ("ham", "spam")
    assert isinstance(prepared.input, TextInput)
    features, targets = prepared.train.batch(np.arange(5))
    assert features.dtype == targets.dtype == torch.int64
    assert features.shape == (5, prepared.input.length)
    assert int(prepared.train.features.min()) >= 0
    assert int(prepared.train.features.max()) < prepared.input.vocabulary


def test_quotes_in_tab_separated_text_are_only_marks(tmp_path):
    path = write(tmp_path / "m", 'ham\tshe said "no\nspam\t"cash" now\nham\t\'"\n' * 20)
    source = open_source(path, target="label", columns=["label", "text"], classes=["ham", "spam"], test=path)
    assert source.examples == 60


def test_hashing_is_stable():
    """Pinned: a saved model must meet the same ids for ever."""
    ids = TextEncoding(units=TextUnits.NGRAMS, vocabulary=4096, length=12).encode(["Win £100 now!", ""])
    assert ids[1].tolist() == [0] * 12
    assert ids[0].tolist() == [2251, 767, 3785, 3627, 1842, 3855, 3304, 3827, 1730, 0, 0, 0]


def test_words_keep_their_order():
    encoding = TextEncoding(units=TextUnits.WORDS, vocabulary=4096, length=4)
    first, second = encoding.encode(["a b c", "c b a b a"])
    assert first[:3].tolist() == second[:3].flip(0).tolist()
    assert int(first[3]) == 0


@pytest.mark.parametrize("text", ["", " ", "\u2028", "😀" * 9000, "a" * 100000, "1" * 5000, "\x07"])
def test_any_text_has_an_encoding(text):
    assert TextEncoding.of(TextUnits.NGRAMS).encode([text]).shape == (1, 256)


def test_schema_and_options_name_the_text(tmp_path):
    path = write(tmp_path / "t.csv", "id,body2,y\n" + "".join(f"{i},word {i},{'ab'[i % 2]}\n" for i in range(50)))
    assert open_source(path, target="y").kind is SourceKind.TABLE
    assert open_source(path, target="y", text_column="body2").kind is SourceKind.TEXT
    schema = parse_schema({"column": {"body2": {"type": "text"}}}, where="schema")
    assert open_source(path, target="y", schema=schema).kind is SourceKind.TEXT
    with pytest.raises(ConfigError, match="2 columns could be the text"):
        open_source(path, target="y", kind=SourceKind.TEXT)
    with pytest.raises(ConfigError, match="'bdy'"):
        open_source(path, target="y", text_column="bdy")


def test_the_input_is_known_before_any_count_where_it_is_public(tmp_path):
    text = open_source(_messages(tmp_path / "messages"), target="label", columns=["label", "text"])
    assert text.input == prepare(text).input
    assert open_source(table(tmp_path / "a.csv"), target="label").input is None
