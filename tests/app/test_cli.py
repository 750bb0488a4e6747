"""The program as a user types it: results, exit codes, one-line errors, and nothing written when the input is wrong."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from discreet.app.cli import main

ROWS = 2000


def _table(path: Path, *, rows: int = ROWS, header: str = "age,job,income") -> Path:
    generator = np.random.default_rng(0)
    ages = generator.integers(18, 80, rows)
    jobs = generator.choice(["clerk", "smith"], rows)
    labels = np.where(ages + 20 * (jobs == "smith") > 60, "high", "low")
    lines = [header, *(f"{age},{job},{label}" for age, job, label in zip(ages, jobs, labels, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def _idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", size) for size in array.shape)
    with gzip.open(path, "wb") as stream:
        stream.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_train_verify_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    code, out, _ = _run(
        capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 100, "--out", "run", "--json"
    )
    assert code == 0
    record = json.loads(out)
    assert record["private"] is True
    assert 0.99 * 8 < record["epsilon"] <= 8
    assert record["test"]["accuracy"] > 0.6
    assert record["examples"] + record["test"]["examples"] == ROWS
    assert record["steps"] == 100
    assert Path(record["report"]).read_text().startswith("<!DOCTYPE html>")

    code, out, _ = _run(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["epsilon"] == record["epsilon"]

    code, out, _ = _run(capsys, "report", "run")
    assert (code, out.strip()) == (0, "run/release/report.html")
    plan = json.loads((workplace / "run" / "release" / "plan.json").read_text())
    assert plan["before"], "private statistics must be part of the plan"


def test_private_statistics_are_in_the_ledger_before_the_steps(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    assert _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--out", "run")[0] == 0
    kinds = [json.loads(line)["kind"] for line in (workplace / "run" / "ledger.jsonl").read_text().splitlines()]
    assert kinds[:2] == ["open", "query"]
    assert kinds.index("steps") > max(index for index, kind in enumerate(kinds) if kind == "query")
    assert kinds[-1] == "close"


def test_a_public_schema_costs_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    (workplace / "schema.toml").write_text(
        '[target]\nname = "income"\nclasses = ["low", "high"]\n'
        '[column.age]\ntype = "number"\nmin = 0\nmax = 100\n'
        '[column.job]\ntype = "category"\nvalues = ["clerk", "smith"]\n'
    )
    words = ("train", data, "--schema", "schema.toml", "--epsilon", 8, "--steps", 150, "--out", "run", "--json")
    code, out, _ = _run(capsys, *words)
    assert code == 0
    assert json.loads(out)["test"]["accuracy"] > 0.6
    assert json.loads((workplace / "run" / "release" / "plan.json").read_text())["before"] == []


def test_no_noise_is_stamped(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    code, out, _ = _run(capsys, "train", data, "--target", "income", "--epsilon", "inf", "--steps", 30, "--out", "run")
    assert code == 0
    assert "NOT PRIVATE" in out
    assert "not private" in (workplace / "run" / "release" / "report.html").read_text().lower()


def test_a_seed_is_stamped_and_repeats(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    weights = []
    for out_dir in ("a", "b"):
        words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", out_dir, "--seed", 1)
        code, out, _ = _run(capsys, *words)
        assert code == 0
        assert "NOT PRIVATE" in out
        weights.append((workplace / out_dir / "release" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_images_from_idx_files(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(1)
    for name, rows in (("train", 300), ("t10k", 60)):
        labels = generator.integers(0, 2, rows)
        images = generator.integers(0, 60, (rows, 8, 8)) + 150 * labels[:, None, None]
        (workplace / "digits").mkdir(exist_ok=True)
        _idx(workplace / "digits" / f"{name}-images-idx3-ubyte.gz", images)
        _idx(workplace / "digits" / f"{name}-labels-idx1-ubyte.gz", labels)
    words = ("train", "digits", "--epsilon", 8, "--steps", 40, "--classes", 2, "--out", "run", "--json")
    code, out, err = _run(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.9


def test_text(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"spam\twin a prize now {index}" if index % 2 else f"ham\tsee you at home {index}" for index in range(ROWS)]
    (workplace / "messages.tsv").write_text("\n".join(lines) + "\n")
    words = ("train", "messages.tsv", "--columns", "label,text", "--target", "label", "--epsilon", 8)
    code, out, err = _run(capsys, *words, "--steps", 40, "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.9


def test_account_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("account", "--examples", 50000, "--batch-size", 4096, "--steps", 2500, "--delta", 1e-5, "--json")
    code, out, _ = _run(capsys, *sizes, "--noise-multiplier", 3)
    assert code == 0
    assert json.loads(out)["epsilon"] == pytest.approx(6.58, abs=0.01)
    code, out, _ = _run(capsys, *sizes, "--epsilon", 8)
    assert json.loads(out)["noise_multiplier"] == pytest.approx(2.58, abs=0.01)
    code, out, _ = _run(capsys, *sizes, "--noise-multiplier", 3, "--accountant", "rdp")
    assert json.loads(out)["epsilon"] == pytest.approx(7.10, abs=0.01)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_check_prints_a_table_and_spends_nothing(workplace: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    data = _table(workplace / "people.csv")
    before = sorted(workplace.rglob("*"))
    code, out, _ = _run(capsys, "check", data, "--target", "income", "--model", model)
    assert code == 0
    assert "isolation" in out
    assert "norms agree" in out
    assert sorted(workplace.rglob("*")) == before


def test_resume_continues_and_refuses_other_options(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = ["train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run"]
    assert _run(capsys, *words)[0] == 0
    code, _, err = _run(capsys, *words, "--resume")
    assert code == 2
    assert "has ended" in err


def test_budget_spent_by_statistics_exits_3(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--delta", 1e-300, "--out", "run")
    code, _, err = _run(capsys, *words)
    assert code in (2, 3), err
    assert not (workplace / "run").exists()


MALFORMED_FILES = {
    "empty file": "",
    "header only": "age,job,income\n",
    "ragged row": "age,job,income\n1,clerk,low\n2,smith\n3,clerk,high\n",
    "duplicate columns": "age,age,income\n1,2,low\n2,3,high\n",
    "one class only": "age,job,income\n" + "".join(f"{age},clerk,low\n" for age in range(50)),
    "no label anywhere": "age,job,income\n" + "".join(f"{age},clerk,\n" for age in range(50)),
    "NUL byte": "age,job,income\n1,cl\x00erk,low\n2,smith,high\n",
    "only the target": "income\nlow\nhigh\nlow\n",
}


@pytest.mark.parametrize("name", MALFORMED_FILES)
def test_malformed_file(workplace: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (workplace / "bad.csv").write_text(MALFORMED_FILES[name])
    _refused(workplace, capsys, "train", "bad.csv", "--target", "income", "--epsilon", 3, "--out", "run")


def test_not_utf8(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "bad.csv").write_bytes(b"age,job,income\n1,\xff\xfe,low\n2,smith,high\n")
    _refused(workplace, capsys, "train", "bad.csv", "--target", "income", "--epsilon", 3, "--out", "run")


def test_truncated_gzip(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "images").mkdir()
    _idx(workplace / "images" / "train-images-idx3-ubyte.gz", np.zeros((9, 4, 4)))
    _idx(workplace / "images" / "train-labels-idx1-ubyte.gz", np.arange(9))
    path = workplace / "images" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    _refused(workplace, capsys, "train", "images", "--epsilon", 3, "--out", "run")


def test_fewer_labels_than_images(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "images").mkdir()
    _idx(workplace / "images" / "train-images-idx3-ubyte.gz", np.zeros((9, 4, 4)))
    _idx(workplace / "images" / "train-labels-idx1-ubyte.gz", np.arange(8))
    _refused(workplace, capsys, "train", "images", "--epsilon", 3, "--out", "run")


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
    data = _table(workplace / "people.csv")
    _refused(workplace, capsys, "train", data, *MALFORMED_OPTIONS[name], "--out", "run")


@pytest.mark.parametrize(
    "words", [["verify", "nowhere"], ["report", "nowhere"], ["check", "nowhere.csv"], ["frobnicate"], []]
)
def test_other_commands(workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    _refused(workplace, capsys, *words)


def test_rows_of_nan_and_infinity_are_missing_values(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    with data.open("a") as stream:
        stream.write("nan,clerk,low\ninf,smith,high\n-inf,,low\n1e400,clerk,high\n")
    code, _, err = _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run")
    assert code == 0, err


CANARY = "zebra-7f3a"


def test_no_value_from_the_data_is_printed_or_released(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that one row holds shows nowhere outside the private half."""
    data = _table(workplace / "people.csv")
    with data.open("a") as stream:
        stream.write(f"{CANARY},clerk,low\n33,{CANARY},high\n33,clerk,{CANARY}\n")
    code, out, err = _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run")
    assert code == 0
    assert CANARY not in out + err
    for path in (workplace / "run").rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def _refused(workplace: Path, capsys: pytest.CaptureFixture[str], *words: object) -> None:
    """Exit code 2, one line on stderr that is no traceback, nothing on stdout, nothing written."""
    before = sorted(workplace.rglob("*"))
    code, out, err = _run(capsys, *words)
    assert code == 2, err
    assert out == ""
    assert err.startswith("discreet: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(workplace.rglob("*")) == before
