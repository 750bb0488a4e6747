"""`discreet plan --simulate`: on public data it ranks and foretells, on private data it refuses or is stamped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.test_tuning import _run, _table

PLAN = ("plan", "people.csv", "--target", "income", "--epsilon", 3, "--steps", 12, "--batch-size", 128)
QUICK = ("--throughput", 1e5, "--learning-rates", "0.02,0.0001")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _table(tmp_path / "people.csv", rows=1200, seed=0)
    _table(tmp_path / "public.csv", rows=600, seed=1)
    return tmp_path


def test_public_data_choose_and_the_plan_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*PLAN, *QUICK, "--simulate", "public.csv", "--out", "plan.json", "--html", "p.html", "--json")
    code, out, err = _run(capsys, *words)
    assert code == 0, err
    record = json.loads(out)["simulation"]
    assert record["stamp"] == ""
    assert (record["model"], record["learning_rate"]) == ("mlp", 0.02)
    assert record["fit"]["at_batch"] == 128
    written = json.loads((workplace / "plan.simulation.json").read_text())
    assert written["points"] == record["points"]
    page = (workplace / "p.html").read_text()
    assert "Simulated at constant noise per update" in page
    assert "NON-PRIVATE" not in page
    notes = json.loads((workplace / "plan.json").read_text())["notes"]
    assert any("chosen by simulation at constant TAN on public data" in note for note in notes)
    # Training follows the plan that was saved.
    words = ("train", "people.csv", "--target", "income", "--plan", "plan.json", "--out", "run", "--json")
    code, out, err = _run(capsys, *words, "--learning-rate", record["learning_rate"])
    assert code == 0, err
    assert json.loads(out)["batch_size"] == 128


@pytest.mark.parametrize("copied", [False, True])
def test_private_data_are_refused_also_under_another_name(
    workplace: Path, capsys: pytest.CaptureFixture[str], copied: bool
) -> None:
    name = "copy.csv" if copied else "people.csv"
    if copied:
        shutil.copy(workplace / "people.csv", workplace / "copy.csv")
    code, out, err = _run(capsys, *PLAN, *QUICK, "--simulate", name)
    assert (code, out) == (2, "")
    assert "each trial would cost a full epsilon" in err
    assert len(err.splitlines()) == 1


def test_private_data_with_the_flag_are_stamped_in_every_place(
    workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = (
        *PLAN,
        *QUICK,
        "--simulate",
        "people.csv",
        "--unaccounted-search",
        "--out",
        "plan.json",
        "--html",
        "p.html",
    )
    code, out, err = _run(capsys, *words)
    assert code == 0, err
    assert "NON-PRIVATE" in out
    assert "NON-PRIVATE" in caplog.text
    assert json.loads((workplace / "plan.simulation.json").read_text())["stamp"] == "NON-PRIVATE"
    assert "NON-PRIVATE" in (workplace / "p.html").read_text()
    assert any("NON-PRIVATE search" in note for note in json.loads((workplace / "plan.json").read_text())["notes"])


def test_steps_are_compared_at_one_budget(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*PLAN, "--throughput", 1e5, "--learning-rates", "0.02", "--simulate-steps", "12,48")
    code, out, err = _run(capsys, *words, "--simulate", "public.csv", "--json")
    assert code == 0, err
    trials = json.loads(out)["simulation"]["trials"]
    assert {(trial["steps"], trial["candidate"]) for trial in trials} == {
        (12, "mlp at 0.02, 12 steps"),
        (48, "mlp at 0.01, 48 steps"),
    }
    # B ~ 1 / sqrt(S): 128 becomes 64, and a quarter of it is simulated.
    assert 64 // 4 in {trial["batch"] for trial in trials if trial["steps"] == 48}


@pytest.mark.parametrize("words", [("--learning-rates", "0.1"), ("--models", "mlp"), ("--unaccounted-search",)])
def test_options_of_a_simulation_without_one_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, _, err = _run(capsys, *PLAN, "--throughput", 1e5, *words)
    assert code == 2
    assert "without --simulate" in err


def test_too_few_seeds_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, *PLAN, *QUICK, "--simulate", "public.csv", "--seeds", 2)
    assert code == 2
    assert "at least 3" in err
