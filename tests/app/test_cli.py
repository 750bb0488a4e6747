"""The program as a user types it: results, exit codes, one-line errors, and nothing written when the input is wrong."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from discreet.app.cli import main
from discreet.train.run import Run

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


def test_private_statistics_are_in_the_ledger_before_the_steps(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    lines = [
        f"spam\twin a prize now {index}" if index % 2 else f"ham\tsee you at home {index}" for index in range(ROWS)
    ]
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
def test_check_prints_a_table_and_spends_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
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


@pytest.mark.parametrize("style", ["per_layer", "per_parameter", "groups:1", "groups:1,3"])
def test_a_clipping_style_reaches_plan_certificate_and_report(
    workplace: Path, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    data = _table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--model", "mlp", "--out", "run")
    code, _, err = _run(capsys, *words, "--clipping", f"abadi:0.5@{style}")
    assert code == 0, err
    assert _run(capsys, "verify", "run")[0] == 0
    release = workplace / "run" / "release"
    wanted = {"kind": "abadi", "style": style, "clip_bound": 0.5}
    assert json.loads((release / "plan.json").read_text())["clipping"] == wanted
    assert json.loads((release / "certificate.json").read_text())["mechanism"]["clipping"] == wanted
    assert f"style: {style}</td>" in (release / "report.html").read_text()
    code, _, err = _run(capsys, *words, "--clipping", "abadi:0.5", "--resume")
    assert code == 2


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
    data = _table(workplace / "people.csv")
    _, _, err = _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--clipping", text, "--out", "run")
    assert told in err


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


def _start(words: tuple[object, ...], *, outside: Callable[[], None]) -> multiprocessing.Process:
    """The program in a forked child, which has torch loaded already; stderr goes to the file ``err``."""

    def child() -> None:
        torch.set_num_threads(1)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        outside()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main([str(word) for word in words]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def _no_change() -> None:
    """The surroundings are as usual."""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_finishes_later(
    workplace: Path, capsys: pytest.CaptureFixture[str], sign: signal.Signals
) -> None:
    data = _table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 400, "--batch-size", 20, "--out", "run")
    process = _start(words, outside=_no_change)
    while process.is_alive() and not (workplace / "run" / "private" / "checkpoint" / "step-00000050").exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, sign)
    process.join(60)
    err = (workplace / "err").read_text()
    assert process.exitcode == 1, err
    assert err.splitlines()[-1].startswith("discreet: interrupted")
    assert "Traceback" not in err
    assert (workplace / "out").read_text() == ""
    code, out, _ = _run(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["finished"] is False
    assert json.loads(out)["statement"].startswith("NOT FINISHED")
    code, out, err = _run(capsys, *words, "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 400
    assert _run(capsys, "verify", "run")[0] == 0


def test_resume_with_another_rate_keeps_the_statistics_and_tells_what_it_cost(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _table(workplace / "people.csv")
    words = ["train", data, "--target", "income", "--epsilon", 8, "--steps", 90, "--out", "run"]

    def interrupted(_run: Run, record: dict[str, object]) -> None:
        if int(record["step"]) >= 63:
            raise KeyboardInterrupt

    for rate in ("0.02", "0.01"):
        with monkeypatch.context() as patched:
            patched.setattr(Run, "log", interrupted)
            code, _, err = _run(capsys, *words, "--learning-rate", rate, *(["--resume"] if rate == "0.01" else []))
        assert code == 1, err
    code, out, err = _run(capsys, *words, "--learning-rate", "0.01", "--resume", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["epsilon"] <= 8
    assert record["steps"] == 90 - (64 - 50)
    assert "76 of the 90 planned updates" in " ".join(record["statements"])
    kinds = [
        json.loads(line)["body"].get("name") for line in (workplace / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert len([name for name in kinds if name]) == len(set(kinds) - {None})


def test_an_unexpected_error_is_one_line_without_its_message(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_arguments: object) -> None:
        raise IndexError(f"Target {CANARY} is out of bounds.")

    data = _table(workplace / "people.csv")
    monkeypatch.setattr("discreet.app.models.loss", loss)
    code, out, err = _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--out", "run")
    assert code == 1
    assert out == ""
    assert err.startswith("discreet: IndexError at ")
    assert err.count("\n") == 1
    assert CANARY not in err


def test_overflowing_weights_still_give_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = (
        "train",
        data,
        "--target",
        "income",
        "--epsilon",
        8,
        "--steps",
        20,
        "--learning-rate",
        1e30,
        "--out",
        "run",
    )
    code, out, err = _run(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["nll"] is None


def test_a_rate_that_sets_itself_says_how(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the result, in the curve of the log, and on the page."""
    words = ("demo", "--epsilon", 8, "--steps", 80, "--batch-size", 200, "--learning-rate", "auto", "--out", "run")
    code, out, err = _run(capsys, *words, "--json")
    assert code == 0, err
    assert "The learning rate set itself" in " ".join(json.loads(out)["statements"])
    release = workplace / "run" / "release"
    lines = [json.loads(line) for line in (release / "metrics.jsonl").read_text().splitlines()]
    assert sum("probe_rise" in line for line in lines) >= 1
    assert "How the learning rate set itself" in (release / "report.html").read_text()


@pytest.mark.parametrize("kib", [1, 2, 6, 12])
def test_a_full_disk_is_one_line_and_resume_goes_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], kib: int
) -> None:
    """No file may grow beyond some KiB: the ledger, a checkpoint or the report is refused."""
    data = _table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 60, "--out", "run")
    limit = (kib << 10, kib << 10)
    process = _start(words, outside=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    process.join(60)
    err = (workplace / "err").read_text()
    assert process.exitcode in (1, 2), err
    assert err.splitlines()[-1].startswith("discreet: ")
    assert "Traceback" not in err
    started = (workplace / "run" / "ledger.jsonl").exists()
    if not (workplace / "run" / "release" / "certificate.json").exists():
        code, _, err = _run(capsys, *words, *(["--resume"] if started else []))
        assert code == 0, err
    code, out, _ = _run(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 60


def _close_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def _fill() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def _take_streams_away() -> None:
    sys.stdout = sys.stderr = None


def _narrow() -> None:
    sys.stdout = open(1, "w", closefd=False, encoding="ascii")  # noqa: SIM115


@pytest.mark.parametrize(
    ("outside", "code", "message"),
    [
        (_close_pipe, 1, "output was closed"),
        (_fill, 1, "No space left"),
        (_take_streams_away, 0, None),
        (_narrow, 0, None),
    ],
)
def test_odd_outputs(workplace: Path, outside: Callable[[], None], code: int, message: str | None) -> None:
    """A closed pipe, a full or missing output, a narrow encoding: one line at most, and no traceback."""
    data = _table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 3, "--out", "déjà vu/run one")
    process = _start(words, outside=outside)
    process.join(60)
    errors = [line for line in (workplace / "err").read_text().splitlines() if not line.startswith("step ")]
    assert process.exitcode == code, errors
    assert len(errors) == (message is not None), errors
    assert message is None or message in errors[0]
    assert (workplace / "déjà vu" / "run one" / "release" / "certificate.json").exists()


def test_a_reader_that_leaves_causes_no_complaint_at_the_end(tmp_path: Path) -> None:
    """The interpreter flushes once more when it ends."""
    command = (
        f'"{sys.executable}" -m discreet.app.cli account --examples 100 --batch-size 10 --steps 5 --epsilon 3 | true'
    )
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    surroundings.pop("HOME", None)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=surroundings, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "output was closed" in done.stderr


def _trained(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    assert _run(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 10, "--out", "run")[0] == 0


def test_another_model_file_is_not_the_certified_one(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trained(workplace, capsys)
    with (workplace / "run" / "release" / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    code, _, err = _run(capsys, "verify", "run")
    assert code == 1
    assert "is not the model that the ledger ended with" in err


def test_what_is_shared_verifies_without_the_private_half(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trained(workplace, capsys)
    shutil.copytree(workplace / "run" / "release", workplace / "shared" / "release")
    shutil.copy(workplace / "run" / "ledger.jsonl", workplace / "shared")
    assert _run(capsys, "verify", "shared")[0] == 0
    (workplace / "shared" / "release" / "model.safetensors").unlink()
    assert _run(capsys, "verify", "shared")[0] == 0
    code, _, err = _run(capsys, "verify", "run/release")
    assert code == 1
    assert "pass the run directory" in err


def test_rows_of_an_unlisted_class_are_counted_and_told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--classes", "low,hihg", "--epsilon", 8, "--steps", 5)
    _, out, _ = _run(capsys, *words, "--out", "a", "--json")
    record = json.loads(out)["test"]
    assert 0 < record["unlisted"] < record["examples"]
    _, out, _ = _run(capsys, *words, "--out", "b")
    assert "of no listed class" in out


def test_names_that_repeat_the_header_do_not_make_it_a_row(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = ("train", data, "--columns", "age,job,income", "--target", "income", "--epsilon", 8, "--steps", 5)
    _, out, _ = _run(capsys, *words, "--out", "run", "--json")
    record = json.loads(out)
    assert record["examples"] + record["test"]["examples"] == ROWS


def test_a_large_delta_is_said_to_be_one(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--delta", 0.5, "--steps", 5, "--out", "run")
    assert "above 1 / examples" in _run(capsys, *words)[1]
