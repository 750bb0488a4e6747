"""`discreet tune` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from discreet.app import tuning
from discreet.app.cli import main
from discreet.errors import ConfigError
from discreet.privacy.ledger import Ledger
from discreet.train.tempered import tempered_clipping


def _table(path: Path, *, rows: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    ages = generator.integers(18, 80, rows)
    jobs = generator.choice(["clerk", "smith"], rows)
    labels = np.where(ages + 20 * (jobs == "smith") > 60, "high", "low")
    lines = [f"{age},{job},{label}" for age, job, label in zip(ages, jobs, labels, strict=True)]
    path.write_text("\n".join(["age,job,income", *lines]) + "\n")
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _table(tmp_path / "people.csv", rows=1200, seed=0)
    return tmp_path


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


WORDS = ("people.csv", "--target", "income", "--epsilon", 3, "--learning-rates", "0.01,0.03", "--steps", 20)


def test_tune_verify_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "tune", *WORDS, "--runs", 2, "--out", "run", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["private"] is True
    assert 0.999 * 3 <= record["epsilon"] <= 3
    assert record["chosen"] in {"mlp at 0.01", "mlp at 0.03"}
    assert record["learning_rate"] == float(record["chosen"].split()[-1])
    assert record["test"]["accuracy"] > 0.6
    assert record["test"]["stamp"] == "NON-PRIVATE"
    assert 0.5 < record["test"]["constant_accuracy"] < 1
    assert "seconds" not in record
    # The model that `discreet train` trains, and its probabilities are reported like those of one run.
    assert record["model"]["tempered"] is True
    plan = json.loads((workplace / "run" / "release" / "plan.json").read_text())
    assert plan["clipping"] == tempered_clipping(record["examples"]).describe()
    assert any("chosen from public facts alone" in note for note in plan["notes"])
    calibration = json.loads((workplace / "run" / "release" / "calibration.json").read_text())
    assert calibration["ece"] == pytest.approx(record["test"]["ece"], rel=1e-9)  # added up in another order
    assert calibration["stamp"] == "NON-PRIVATE"
    spent = re.search(r"spends epsilon ([\d.]+)", err)
    assert spent is not None
    assert float(spent.group(1)) == pytest.approx(record["epsilon"], rel=1e-3)
    code, out, _ = _run(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["epsilon"] == record["epsilon"]
    assert "best of a secret random number of runs" in json.loads(out)["statement"]
    page = (workplace / "run" / "release" / "report.html").read_text()
    assert "2.999" in page
    assert "Can its probabilities be believed?" in page
    assert "The search: 2 runs expected" in page
    kinds = [record.kind for record in Ledger.read(workplace / "run" / "ledger.jsonl").records]
    assert kinds == ["open", "query", "query", "query", "close"]


def test_public_rows_may_judge_and_cost_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _table(workplace / "public.csv", rows=300, seed=1)
    _table(workplace / "test.csv", rows=200, seed=2)
    words = (*WORDS, "--runs", 2, "--test", "test.csv", "--score-data", "public.csv", "--out", "run", "--json")
    code, out, err = _run(capsys, "tune", *words)
    assert code == 0, err
    assert json.loads(out)["test"]["examples"] == 200
    plan = json.loads((workplace / "run" / "release" / "plan.json").read_text())
    assert [part["type"] for part in plan["search"]["run"]] == ["sampled_gaussian"]


def test_a_killed_search_resumes_at_no_cost(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = iter(range(5))

    def beat(self: object) -> None:
        if next(beats, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning.Heartbeat, "beat", beat)
    assert _run(capsys, "tune", *WORDS, "--out", "run")[0] == 1
    spent = Ledger.read(workplace / "run" / "ledger.jsonl").epsilon()
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert _run(capsys, "tune", *WORDS, "--out", "run", "--resume", "--runs", 20)[0] == 2
    code, out, err = _run(capsys, "tune", *WORDS, "--out", "run", "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["epsilon"] == spent


def test_a_search_on_other_rows_is_refused_and_can_still_be_undone(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = iter(range(5))
    monkeypatch.setattr(tuning.Heartbeat, "beat", lambda self: next(beats))
    (workplace / "schema.toml").write_text(
        '[target]\nname = "income"\nclasses = ["low", "high"]\n'
        '[column.age]\ntype = "number"\nmin = 0\nmax = 100\n'
        '[column.job]\ntype = "category"\nvalues = ["clerk", "smith"]\n'
    )
    words = ("tune", *WORDS, "--schema", "schema.toml", "--test", "test.csv", "--out", "run")
    _table(workplace / "test.csv", rows=100, seed=2)
    assert _run(capsys, *words)[0] == 1
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    rows = (workplace / "people.csv").read_text()
    (workplace / "people.csv").write_text(rows.replace("\n30,", "\n31,"))
    code, _, err = _run(capsys, *words, "--resume")
    assert code == 2
    assert "data: changed since the search began" in err
    (workplace / "people.csv").write_text(rows)
    assert _run(capsys, *words, "--resume")[0] == 0


def test_a_search_does_not_go_on_with_other_rows_to_score_on(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("test.csv", "public.csv", "other.csv"), start=1):
        _table(workplace / name, rows=200, seed=seed)
    beats = iter(range(5))
    monkeypatch.setattr(tuning.Heartbeat, "beat", lambda self: next(beats))
    words = ("tune", *WORDS, "--test", "test.csv", "--out", "run", "--score-data")
    assert _run(capsys, *words, "public.csv")[0] == 1
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    code, _, err = _run(capsys, *words, "other.csv", "--resume")
    assert code == 2
    assert "score: changed since the search began" in err
    assert _run(capsys, *words, "public.csv", "--resume")[0] == 0


def test_a_copy_of_the_private_rows_is_not_public(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _table(workplace / "test.csv", rows=200, seed=2)
    (workplace / "copy.csv").write_bytes((workplace / "people.csv").read_bytes())
    code, _, err = _run(capsys, "tune", *WORDS, "--test", "test.csv", "--score-data", "copy.csv", "--out", "run")
    assert code == 2
    assert "private or the test data" in err
    assert not (workplace / "run").exists()


def test_rows_to_score_on_must_be_read_as_the_training_rows_are() -> None:
    """Otherwise one draw of noise would meet two sets of counts of the same private rows."""

    class Read:
        def __init__(self, *columns: str) -> None:
            self.record, self.test = {"columns": columns}, "rows"

        def prepare(self, **_named: object) -> Read:
            return self

        def noise(self, _purpose: str) -> None:
            """As a run has it."""

    assert tuning._scoring_rows(Read("age"), Read("age"), Read(), None) == "rows"
    with pytest.raises(ConfigError, match="in another way"):
        tuning._scoring_rows(Read("age", "job"), Read("age"), Read(), None)


def test_the_heartbeat_tells_no_number_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    heart = tuning.Heartbeat()
    heart._shown -= 100
    for _ in range(50):
        heart.beat()
    assert re.fullmatch(r"tuning, \d+ s so far; how far it is stays secret\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("--epsilon", "inf"), "finite"),
        (("--runs", "0"), "runs"),
        (("--learning-rates", "0.01,-1"), "above 0"),
        (("--models", "mlp,tree"), "is no model"),
        (("--learning-rates", "0.01,fast"), "'0.01,fast' must be numbers; write 0.01,0.02"),
        (("--score-data", "people.csv"), "private or the test data"),
        (("--score-data", "public.csv"), "without --test"),
        (("--resume",), "--resume without --out"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    workplace: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, ...], match: str
) -> None:
    _table(workplace / "public.csv", rows=300, seed=1)
    before = sorted(workplace.iterdir())
    code, out, err = _run(capsys, "tune", *WORDS, *change)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert match in err
    assert sorted(workplace.iterdir()) == before
