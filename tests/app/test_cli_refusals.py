"""Wrong files and options: exit code 2, one line on stderr, and nothing written."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from app.data_files import write
from app.program import CANARY, idx, must_refuse, run_program, table
from discreet.app.data.records import read_records
from discreet.app.data.schema import Schema
from discreet.app.options import pick_device
from discreet.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("automatic@layers", "flat, per_layer, per_parameter, groups"),
        ("abadi:1@groups:1,1", "different prefixes"),
        ("abadi:-1", "clip bound -1.0"),
        ("abadi:wide@per_layer", "number above 0"),
        ("automatic@groups:head", "no trainable parameter"),
    ],
)
def test_what_is_wrong_with_a_clipping_is_told(
    workplace: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    data = table(workplace / "people.csv")
    _, _, err = run_program(
        capsys, "train", data, "--target", "income", "--epsilon", 8, "--clipping", text, "--out", "run"
    )
    assert told in err


def test_a_card_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match='device "cuda:2": must be below cuda:2'):
        pick_device("cuda:2")


def test_budget_spent_by_statistics_exits_3(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--delta", 1e-300, "--out", "run")
    code, _, err = run_program(capsys, *words)
    assert code in (2, 3), err
    assert not (workplace / "run").exists()


MALFORMED_FILES: dict[str, str | bytes] = {
    "empty file": "",
    "header only": "age,job,income\n",
    "ragged row": "age,job,income\n1,clerk,low\n2,smith\n3,clerk,high\n",
    "duplicate columns": "age,age,income\n1,2,low\n2,3,high\n",
    "one class only": "age,job,income\n" + "".join(f"{age},clerk,low\n" for age in range(50)),
    "no label anywhere": "age,job,income\n" + "".join(f"{age},clerk,\n" for age in range(50)),
    "NUL byte": "age,job,income\n1,cl\x00erk,low\n2,smith,high\n",
    "only the target": "income\nlow\nhigh\nlow\n",
    "not UTF-8": b"age,job,income\n1,\xff\xfe,low\n2,smith,high\n",
}


@pytest.mark.parametrize("name", MALFORMED_FILES)
def test_malformed_file(workplace: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    write(workplace / "bad.csv", MALFORMED_FILES[name])
    must_refuse(workplace, capsys, "train", "bad.csv", "--target", "income", "--epsilon", 3, "--out", "run")


PEOPLE = "age,job,income\n" + "".join(f"{age},clerk,{'low' if age % 2 else 'high'}\n" for age in range(50))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(PEOPLE.encode()), "is a gzip file, must be plain text; unpack it, e.g. gunzip -c"),
        (codecs.BOM_UTF16_LE + PEOPLE.encode("utf-16-le"), "e.g. iconv -f UTF-16 -t UTF-8"),
        (codecs.BOM_UTF16_BE + PEOPLE.encode("utf-16-be"), "e.g. iconv -f UTF-16 -t UTF-8"),
        (b"PK\x03\x04\x14\0\0\0", "is a zip file or a spreadsheet (xlsx), must be plain text; export it as CSV"),
    ],
    ids=["gzip", "UTF-16 little", "UTF-16 big", "xlsx"],
)
def test_a_file_of_another_format_is_called_by_its_name(
    workplace: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    write(workplace / "people.csv", content)
    code, _, err = run_program(capsys, "train", "people.csv", "--target", "income", "--epsilon", 8, "--out", "run")
    assert code == 2
    assert told in err


def test_a_column_called_pk_makes_no_zip_file(workplace: Path) -> None:
    write(workplace / "people.csv", PEOPLE.replace("age", "PK", 1))
    assert read_records(workplace / "people.csv", schema=Schema(), columns=None).names == ("PK", "job", "income")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target", "income", "--epsilon", 8, "--classes", 2), "--classes 2 means the labels 0 to 1, and no row has"),
        (("--target", "income", "--epsilon", 0.05), "list the classes with --classes A,B, or in a schema ([target]"),
        (("--target", "row", "--epsilon", 8), "list the classes with --classes A,B, or in a schema ([target]"),
        (("--schema", "broken.toml", "--epsilon", 8), "see the example in docs/quickstart.md."),
    ],
    ids=["number of classes", "few rows", "a number as the target", "schema"],
)
def test_a_remedy_is_one_that_is_at_hand(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], told: str
) -> None:
    data = table(workplace / "people.csv")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([f"row,{lines[0]}", *(f"{i},{line}" for i, line in enumerate(lines[1:]))]) + "\n")
    write(workplace / "broken.toml", "[target")
    code, _, err = run_program(capsys, "train", data, *words, "--out", "run")
    assert code == 2
    assert told in err


def test_a_file_of_a_run_names_its_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "run" / "release").mkdir(parents=True)
    for name in ("ledger.jsonl", "release/plan.json"):
        write(workplace / "run" / name, "")
        err = run_program(capsys, "verify", Path("run", name))[2]
        assert err == (
            f"discreet: run/{name}: is a file and no run directory; pass its run directory, {workplace / 'run'}.\n"
        )
    write(workplace / "alone.json", "")
    assert "pass the run directory that it belongs to" in run_program(capsys, "verify", "alone.json")[2]


@pytest.mark.parametrize(("labels", "cut"), [(9, 9), (8, 0)], ids=["truncated gzip", "fewer labels than images"])
def test_malformed_images(workplace: Path, capsys: pytest.CaptureFixture[str], labels: int, cut: int) -> None:
    (workplace / "images").mkdir()
    path = workplace / "images" / "train-images-idx3-ubyte.gz"
    idx(path, np.zeros((9, 4, 4)))
    idx(workplace / "images" / "train-labels-idx1-ubyte.gz", np.arange(labels))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    must_refuse(workplace, capsys, "train", "images", "--epsilon", 3, "--out", "run")


MALFORMED_OPTIONS = {
    "no epsilon": ["--target", "income"],
    "epsilon zero": ["--target", "income", "--epsilon", "0"],
    "epsilon negative": ["--target", "income", "--epsilon", "-1"],
    "epsilon nan": ["--target", "income", "--epsilon", "nan"],
    "epsilon word": ["--target", "income", "--epsilon", "three"],
    "no target": ["--epsilon", "3"],
    "unknown target": ["--target", "wealth", "--epsilon", "3"],
    "delta above 1": ["--target", "income", "--epsilon", "3", "--delta", "1.5"],
    "delta zero": ["--target", "income", "--epsilon", "3", "--delta", "0"],
    "batch above examples": ["--target", "income", "--epsilon", "3", "--batch-size", "100000"],
    "batch zero": ["--target", "income", "--epsilon", "3", "--batch-size", "0"],
    "steps negative": ["--target", "income", "--epsilon", "3", "--steps", "-5"],
    "learning rate word": ["--target", "income", "--epsilon", "3", "--learning-rate", "fast"],
    "learning rate negative": ["--target", "income", "--epsilon", "3", "--learning-rate", "-0.1"],
    "clipping word": ["--target", "income", "--epsilon", "3", "--clipping", "hard"],
    "clipping style": ["--target", "income", "--epsilon", "3", "--clipping", "automatic@layers"],
    "clipping style without a name": ["--target", "income", "--epsilon", "3", "--clipping", "automatic@"],
    "clipping groups without a name": ["--target", "income", "--epsilon", "3", "--clipping", "abadi:1@groups:"],
    "clipping groups twice": ["--target", "income", "--epsilon", "3", "--clipping", "abadi:1@groups:1,1"],
    "clipping groups of no parameter": ["--target", "income", "--epsilon", "3", "--clipping", "automatic@groups:head"],
    "clipping number of normalized": ["--target", "income", "--epsilon", "3", "--clipping", "normalized:1"],
    "clipping gamma": ["--target", "income", "--epsilon", "3", "--clipping", "automatic:0"],
    "clipping quantile": ["--target", "income", "--epsilon", "3", "--clipping", "quantile:1"],
    "clipping bound missing": ["--target", "income", "--epsilon", "3", "--clipping", "abadi"],
    "clipping bound": ["--target", "income", "--epsilon", "3", "--clipping", "abadi:-1"],
    "unknown option": ["--target", "income", "--epsilon", "3", "--epsilom", "3"],
    "abbreviated option": ["--target", "income", "--eps", "3"],
    "unknown model": ["--target", "income", "--epsilon", "3", "--model", "forest"],
    "model for images": ["--target", "income", "--epsilon", "3", "--model", "cnn"],
    "missing test file": ["--target", "income", "--epsilon", "3", "--test", "none.csv"],
    "missing schema": ["--target", "income", "--epsilon", "3", "--schema", "none.toml"],
    "wrong number of columns": ["--columns", "a,b", "--target", "b", "--epsilon", "3"],
    "unknown device": ["--target", "income", "--epsilon", "3", "--device", "abacus"],
    "microbatch zero": ["--target", "income", "--epsilon", "3", "--microbatch", "0"],
    "resume nothing": ["--target", "income", "--epsilon", "3", "--resume"],
}


@pytest.mark.parametrize("name", MALFORMED_OPTIONS)
def test_malformed_option(workplace: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data = table(workplace / "people.csv")
    must_refuse(workplace, capsys, "train", data, *MALFORMED_OPTIONS[name], "--out", "run")


@pytest.mark.parametrize(
    "words", [["verify", "nowhere"], ["report", "nowhere"], ["check", "nowhere.csv"], ["frobnicate"], []]
)
def test_other_commands(workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    must_refuse(workplace, capsys, *words)


def test_an_unexpected_error_is_one_line_without_its_message(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_arguments: object) -> None:
        raise IndexError(f"Target {CANARY} is out of bounds.")

    data = table(workplace / "people.csv")
    monkeypatch.setattr("discreet.app.models.loss", loss)
    code, out, err = run_program(
        capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--out", "run"
    )
    assert code == 1
    assert out == ""
    assert err.startswith("discreet: IndexError at ")
    assert err.count("\n") == 1
    assert CANARY not in err
