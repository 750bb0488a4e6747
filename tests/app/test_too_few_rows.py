"""Data in which nothing could be told privately is refused by its number of rows, which is public, and at no charge."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from app.data_files import PREPROCESSING, idx_folder, prepare, table, write
from app.program import must_refuse, run_program
from discreet.app.data import Preprocessing, Source, open_source
from discreet.errors import DataError

LISTED = '[target]\nname = "label"\nclasses = ["yes", "no"]\n'
SMALL = Preprocessing(noise_multiplier=0.2, delta=0.5)


def _balanced(path: Path, rows: int, *, classes: int = 2) -> Path:
    """One category and a label; with a test file of its own, all rows are training rows."""
    return write(path, "\n".join(["kind,label", *(f"a,class{row % classes}" for row in range(rows))]) + "\n")


def _open(folder: Path, rows: int, *, classes: int = 2) -> Source:
    test = _balanced(folder / "test.csv", 4)
    return open_source(_balanced(folder / f"rows{rows}.csv", rows, classes=classes), target="label", test=test)


def _told(source: Source, *, seeds: range) -> set[str]:
    """The classes that some of these seeds told."""
    told: set[str] = set()
    for seed in seeds:
        with contextlib.suppress(DataError):
            told.update(prepare(source, seed=seed, preprocessing=SMALL).classes)
    return told


@pytest.mark.parametrize("words", [("train",), ("plan",), ("tune", "--learning-rates", "0.1")], ids=lambda w: w[0])
@pytest.mark.parametrize("rows", [2, 20, 60])
def test_too_few_rows_are_refused_before_a_run_exists(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], rows: int
) -> None:
    _balanced(workplace / "few.csv", rows)
    asked = ("few.csv", "--target", "label", "--epsilon", 3)
    must_refuse(workplace, capsys, words[0], *asked, *words[1:], "--out", "run")
    _, _, err = run_program(capsys, words[0], *asked, *words[1:], "--out", "run")
    assert "training rows; two classes of at least" in err
    assert "Nothing was charged." in err


def test_columns_that_cannot_stand_out_are_refused_too(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(workplace / "few.csv", 6)
    write(workplace / "schema.toml", LISTED)
    must_refuse(workplace, capsys, "train", "few.csv", "--schema", "schema.toml", "--epsilon", 3, "--out", "run")


def test_the_least_number_of_rows_is_that_of_two_classes_at_the_threshold(tmp_path: Path) -> None:
    """One row less is refused; and with so many, two classes can be told when the noise does not oppose it."""
    with pytest.raises(DataError, match=r"need \d+;") as refused:
        _open(tmp_path, 3).queries(SMALL)
    least = int(str(refused.value).partition("need ")[2].partition(";")[0])
    with pytest.raises(DataError, match=f"{least - 1} training rows"):
        _open(tmp_path, least - 1).queries(SMALL)
    enough = _open(tmp_path, least)
    assert len(enough.queries(SMALL)) == 2
    assert _told(enough, seeds=range(20)) == {"class0", "class1"}


def test_what_the_rows_hold_decides_nothing(tmp_path: Path) -> None:
    """The refusal is a function of the number of rows: a class for each row passes where two classes do."""
    rows = 400
    assert _open(tmp_path / "two", rows).queries(PREPROCESSING) == _open(tmp_path / "many", rows, classes=rows).queries(
        PREPROCESSING
    )
    for classes in (2, 7):
        with pytest.raises(DataError, match="7 training rows"):
            _open(tmp_path / f"few{classes}", 7, classes=classes).queries(PREPROCESSING)


def test_images_and_text_are_judged_alike(tmp_path: Path) -> None:
    images = open_source(idx_folder(tmp_path / "images", train=8, test=4))
    lines = ["text,label", *(f"word{row},{'ab'[row % 2]}" for row in range(12))]
    text = open_source(write(tmp_path / "notes.csv", "\n".join(lines) + "\n"), target="label")
    for source in (images, text):
        with pytest.raises(DataError, match="two classes of at least"):
            source.queries(PREPROCESSING)


def test_public_facts_leave_nothing_to_refuse(tmp_path: Path) -> None:
    schema = LISTED + '[column.kind]\ntype = "category"\nvalues = ["a"]\n'
    path = write(tmp_path / "few.csv", "kind,label\na,yes\na,no\na,yes\na,no\n")
    source = open_source(path, schema=write(tmp_path / "schema.toml", schema), test=path)
    assert source.queries(PREPROCESSING) == ()


def test_without_noise_nothing_is_too_few(tmp_path: Path) -> None:
    _open(tmp_path, 4).queries(Preprocessing(noise_multiplier=0.0, delta=0.0))
