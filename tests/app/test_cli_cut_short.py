"""The program cut short: interrupts, full disks, closed pipes; one line says so, and resume goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.program import run_program, table
from discreet.app import commands
from discreet.app.cli import main
from discreet.app.report.text import duration
from discreet.app.runs import what_next
from discreet.train import updates
from discreet.train.run import Run


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


def test_a_command_that_keeps_nothing_offers_no_resumption(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "COMMANDS", dict.fromkeys(commands.COMMANDS, interrupted))
    assert main(["verify", "run"]) == 1
    assert capsys.readouterr().err == "discreet: interrupted; repeat the command.\n"
    for words in (["demo"], ["demo", "--out", "new"], ["demo", "--resume"]):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert err.endswith("repeat the command.\n")
        assert "--resume" not in err
    assert not list(workplace.iterdir())


WORDS = ("--target", "income", "--epsilon", 8, "--steps", 60)


def test_an_interrupted_run_is_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever named none cannot know which one to resume."""

    def interrupted(_run: Run, _record: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupted)
    code, _, err = run_program(capsys, "train", table(workplace / "people.csv", rows=500), *WORDS)
    (run,) = (workplace / "runs").iterdir()
    assert code == 1
    assert err.splitlines()[-1] == (
        "discreet: interrupted; nothing is lost up to the last checkpoint: repeat the command with --resume --out "
        f"runs/{run.name}."
    )


def test_an_interruption_after_the_end_does_not_offer_to_resume(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has ended: it could only be refused."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    words = ("train", table(workplace / "people.csv", rows=500), *WORDS, "--out", "run one")
    with monkeypatch.context() as patched:
        patched.setattr("discreet.app.training.write_results", interrupted)
        code, _, err = run_program(capsys, *words)
    last = err.splitlines()[-1]
    assert code == 4
    assert "do not train again; `discreet report 'run one'` writes the page, without the last figures" in last
    assert "--resume" not in last
    assert run_program(capsys, "report", "run one")[0] == 0
    assert run_program(capsys, "verify", "run one")[0] == 0
    # Interrupted between the end of the ledger and its certificate, which --resume alone writes.
    (workplace / "run one" / "release" / "certificate.json").unlink()
    assert "with --resume --out 'run one' once, which writes it; then `discreet" in what_next(Path("run one"))
    run_program(capsys, *words, "--resume")
    assert run_program(capsys, "verify", "run one")[0] == 0


def test_a_new_run_where_one_has_ended_is_not_sent_to_resume_it(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", table(workplace / "people.csv", rows=500), *WORDS, "--out", "run")

    def interrupted(_run: Run, _record: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", interrupted)
        run_program(capsys, *words)
    code, _, err = run_program(capsys, *words)
    assert code == 2
    assert "continue it with resume (--resume)" in err
    assert run_program(capsys, *words, "--resume")[0] == 0
    for again in (words, ("demo", "--out", "run"), ("tune", *words[1:], "--learning-rates", 0.02)):
        code, _, err = run_program(capsys, *again)
        assert code == 2
        assert "--resume" not in err
        assert "run that has ended, and cannot be continued; name another directory" in err
        assert "see `discreet verify run` and `discreet report run`" in err


def _no_change() -> None:
    """The surroundings are as usual."""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_finishes_later(
    workplace: Path, capsys: pytest.CaptureFixture[str], sign: signal.Signals
) -> None:
    data = table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 400, "--batch-size", 20, "--out", "run")
    process = _start(words, outside=_no_change)
    while process.is_alive() and not (workplace / "run" / "private" / "checkpoint" / "step-00000050").exists():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, sign)
    process.join(60)
    err = (workplace / "err").read_text()
    assert process.exitcode == 1, err
    assert err.splitlines()[-1].startswith("discreet: interrupted; nothing is lost up to the last checkpoint")
    assert "Traceback" not in err
    assert (workplace / "out").read_text() == ""
    code, out, _ = run_program(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["finished"] is False
    assert json.loads(out)["statement"].startswith("NOT FINISHED")
    code, out, err = run_program(capsys, *words, "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 400
    assert run_program(capsys, "verify", "run")[0] == 0


def test_resume_with_another_rate_keeps_the_statistics_and_tells_what_it_cost(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(workplace / "people.csv")
    words = ["train", data, "--target", "income", "--epsilon", 8, "--steps", 90, "--out", "run"]

    def interrupted(run_program: Run, record: dict[str, object]) -> None:
        if int(record["step"]) >= 63:
            raise KeyboardInterrupt

    for rate in ("0.02", "0.01"):
        with monkeypatch.context() as patched:
            patched.setattr(Run, "log", interrupted)
            code, _, err = run_program(
                capsys, *words, "--learning-rate", rate, *(["--resume"] if rate == "0.01" else [])
            )
        assert code == 1, err
    code, out, err = run_program(capsys, *words, "--learning-rate", "0.01", "--resume", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["epsilon"] <= 8
    assert record["steps"] == 90 - (64 - 50)
    assert "76 of the 90 planned updates" in " ".join(record["statements"])
    kinds = [
        json.loads(line)["body"].get("name") for line in (workplace / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert len([name for name in kinds if name]) == len(set(kinds) - {None})


def test_the_time_that_is_told_is_that_of_all_processes(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = table(workplace / "people.csv", rows=500)
    words = [
        "train",
        data,
        "--target",
        "income",
        "--epsilon",
        8,
        "--steps",
        90,
        "--learning-rate",
        0.02,
        "--out",
        "run",
    ]

    def interrupted(run_program: Run, record: dict[str, object]) -> None:
        if int(record["step"]) >= 63:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", interrupted)
        patched.setattr(updates, "monotonic", lambda: 100.0 * time.monotonic())
        assert run_program(capsys, *words)[0] == 1
    assert not (workplace / "run" / "release" / "result.json").exists()
    earlier = json.loads(next((workplace / "run").rglob("step-00000050/state.json")).read_text())["seconds"]
    started = time.monotonic()
    code, out, err = run_program(capsys, *words, "--resume", "--json")
    assert code == 0, err
    seconds = json.loads(out)["seconds"]
    assert earlier > 0
    assert earlier - 0.1 <= seconds <= earlier + time.monotonic() - started + 0.1
    page = (workplace / "run" / "release" / "report.html").read_text()
    assert f" in {duration(seconds)}." in page


@pytest.mark.parametrize("kib", [1, 2, 6])
def test_a_full_disk_is_one_line_and_resume_goes_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], kib: int
) -> None:
    """No file may grow beyond some KiB: the ledger, a checkpoint or the certificate is refused."""
    data = table(workplace / "people.csv", rows=500)
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
        code, _, err = run_program(capsys, *words, *(["--resume"] if started else []))
        assert code == 0, err
    code, out, _ = run_program(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 60


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
def test_a_page_that_does_not_fit_is_no_failed_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], form: tuple[str, ...]
) -> None:
    """Whoever took it for one would train again, and pay again."""
    data = table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 60, "--out", "run one", *form)
    limit = (30 << 10, 30 << 10)
    process = _start(words, outside=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    process.join(60)
    last = (workplace / "err").read_text().splitlines()[-1]
    assert process.exitcode == 4, last
    assert last.startswith("discreet: run one/release: report.html cannot be written (File too large); ")
    assert "model, its certificate and its ledger are safe, do not train again" in last
    assert last.endswith("then `discreet report 'run one'` writes the page.")
    out = (workplace / "out").read_text()
    if form:
        assert json.loads(out)["report"] is None
        assert json.loads(out)["epsilon"] <= 8
    else:
        assert "test accuracy" in out
        assert out.split("\nreport")[1].split("\n")[0].split() == ["not", "written"]
    release = workplace / "run one" / "release"
    for name in ("model.safetensors", "certificate.json", "result.json", "calibration.json"):
        assert (release / name).exists()
    assert not [path for path in release.iterdir() if path.name.startswith("report")]
    assert run_program(capsys, "verify", "run one")[0] == 0
    assert run_program(capsys, "report", "run one")[:2] == (0, "run one/release/report.html\n")
    assert "test accuracy" in (release / "report.html").read_text().lower()


def test_a_page_that_still_does_not_fit_is_told_alike(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv", rows=500)
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 3, "--out", "run")
    assert run_program(capsys, *words)[0] == 0
    process = _start(("report", "run"), outside=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    process.join(60)
    assert process.exitcode == 4
    assert "then repeat `discreet report run`" in (workplace / "err").read_text()


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
    data = table(workplace / "people.csv", rows=500)
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
