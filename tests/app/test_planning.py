"""`discreet plan` as a user types it, and training that follows a saved plan exactly."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import numpy as np
import pytest

from discreet.app import planning, training
from discreet.app.cli import main
from discreet.privacy.compute import Machine
from discreet.privacy.plan import Plan

MACHINE = Machine(
    seconds_per_example=1e-5,
    seconds_per_microbatch=1e-3,
    seconds_per_step=2e-3,
    bytes_per_example=2_000.0,
    fixed_bytes=100_000.0,
    free_bytes=1e9,
    parameters=7_106,
    place="a test",
)
SCHEMA = (
    '[target]\nname = "income"\nclasses = ["low", "high"]\n[column.age]\ntype = "number"\nmin = 0\nmax = 100\n'
    '[column.job]\ntype = "category"\nvalues = ["clerk", "smith"]\n'
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _people(tmp_path / "people.csv", rows=2_000)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    return tmp_path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is the same on every machine."""
    for module in (planning, training):
        monkeypatch.setattr(module, "measure_spec", lambda spec, *, device, clipping: MACHINE)


def _people(path: Path, *, rows: int) -> None:
    generator = np.random.default_rng(0)
    ages = generator.integers(18, 80, rows)
    jobs = generator.choice(["clerk", "smith"], rows)
    labels = np.where(ages + 20 * (jobs == "smith") > 60, "high", "low")
    path.write_text(
        "\n".join(["age,job,income", *map(",".join, zip(map(str, ages), jobs, labels, strict=True))]) + "\n"
    )


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_three_plans_from_a_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "plan", "--examples", 60_000, "--epsilon", 3)
    assert code == 0
    header = out.splitlines()[2].split()
    assert header == ["cheap", "knee", "*", "maximal"]
    assert "batch / knee batch" in out
    assert "epsilon halved" in out
    code, out, _ = _run(capsys, "plan", "--examples", 60_000, "--epsilon", 3, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["recommended"] == record["chosen"] == "knee"
    assert record["options"][1]["seconds"] is None


def test_the_command_that_comes_next_can_be_pasted(
    workplace: Path, told: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("people.csv", "--schema", "schema.toml", "--test", "people.csv", "--classes", "low,high", "--model", "mlp")
    code, out, _ = _run(capsys, "plan", *words, "--epsilon", 3, "--steps", 5, "--out", "my plan.json")
    assert code == 0
    (command,) = [line.removeprefix("next  ") for line in out.splitlines() if line.startswith("next  ")]
    assert command == (
        "discreet train people.csv --test people.csv --schema schema.toml --classes low,high --model mlp "
        "--plan 'my plan.json'"
    )
    assert _run(capsys, *shlex.split(command)[1:], "--out", "run")[0] == 0


def test_measured_on_the_file(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "people.csv", "--schema", "schema.toml", "--epsilon", 3, "--compute", "2m", "--json")
    code, out, _ = _run(capsys, *words)
    record = json.loads(out)
    assert code == 0
    assert record["examples_per_second"] > 100
    chosen = next(option for option in record["options"] if option["kind"] == record["recommended"])
    assert 0 < chosen["seconds"] <= 120
    assert chosen["signal_to_noise_at_most"] > 0
    assert chosen["microbatch"] >= 1


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("public", [True, False])
def test_training_follows_a_saved_plan_exactly(
    workplace: Path, capsys: pytest.CaptureFixture[str], public: bool
) -> None:
    data = ("people.csv", *(("--schema", "schema.toml") if public else ("--target", "income")))
    code, out, _ = _run(capsys, "plan", *data, "--epsilon", 8, "--samples", 20_000, "--out", "plan.json")
    assert code == 0
    assert "next  discreet train people.csv --" in out
    code, out, _ = _run(capsys, "train", *data, "--plan", "plan.json", "--out", "run", "--json")
    assert code == 0
    plan = Plan.load("plan.json")
    assert Plan.load("run/release/plan.json") == plan
    assert bool(plan.before) is not public
    record = json.loads(out)
    assert record["noise_multiplier"] == plan.noise_multiplier
    assert (record["batch_size"], record["steps"]) == (plan.batch_size, plan.steps)
    certificate = json.loads(Path("run/release/certificate.json").read_text())
    assert certificate["epsilon"] == plan.spent()


@pytest.mark.usefixtures("told")
def test_the_recommended_plan_is_what_training_would_choose(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("people.csv", "--schema", "schema.toml", "--epsilon", 3)
    for bound in ((), ("--compute", "3s"), ("--compute", "0.5s")):
        assert _run(capsys, "plan", *data, *bound, "--out", "plan.json")[0] == 0
        out = f"run{len(bound)}{bound[-1] if bound else ''}"
        assert _run(capsys, "train", *data, *bound, "--out", out)[0] == 0
        planned, made = Plan.load("plan.json"), Plan.load(f"{out}/release/plan.json")
        assert (planned.batch_size, planned.steps) == (made.batch_size, made.steps)
        assert planned.noise_multiplier == made.noise_multiplier


@pytest.mark.usefixtures("told")
def test_another_plan_can_be_chosen(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "people.csv", "--schema", "schema.toml", "--epsilon", 3, "--out", "plan.json")
    assert _run(capsys, *words, "--choose", "cheap")[0] == 0
    cheap = Plan.load("plan.json")
    assert _run(capsys, *words)[0] == 0
    assert cheap.batch_size < Plan.load("plan.json").batch_size


@pytest.mark.usefixtures("told")
def test_other_data_are_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "plan", "people.csv", "--schema", "schema.toml", "--epsilon", 8, "--out", "plan.json")[0] == 0
    _people(workplace / "more.csv", rows=2_100)
    for words, message in (
        (("more.csv", "--schema", "schema.toml"), "in the plan: N is public and fixed"),
        (("people.csv", "--target", "income"), "charges no private statistics before training, and this data needs"),
    ):
        code, out, err = _run(capsys, "train", *words, "--plan", "plan.json", "--out", "run")
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
        assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epsilon", 3), "--epsilon with --plan"),
        (("--delta", 1e-5), "--delta with --plan"),
        (("--steps", 5), "--steps with --plan"),
        (("--batch-size", 5), "--batch-size with --plan"),
        (("--clipping", "abadi:1"), "--clipping with --plan"),
        (("--compute", "5m"), "--compute with --plan"),
    ],
)
def test_nothing_may_contradict_a_plan(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], message: str
) -> None:
    Plan.solve(examples=100, batch_size=10, steps=2, epsilon=3.0).save("plan.json")
    code, _, err = _run(capsys, "train", "people.csv", "--target", "income", "--plan", "plan.json", *words)
    assert code == 2
    assert message in err


def test_a_plan_that_was_edited_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Plan.solve(examples=100, batch_size=10, steps=2, epsilon=3.0).save("plan.json")
    record = json.loads(Path("plan.json").read_text())
    Path("plan.json").write_text(json.dumps(record | {"noise_multiplier": 0.3}))
    code, _, err = _run(capsys, "train", "people.csv", "--target", "income", "--plan", "plan.json", "--out", "run")
    assert code == 3
    assert "above the target" in err
    assert not Path("run").exists()


WRONG = {
    "epsilon 0": (("--examples", 60_000, "--epsilon", 0), "--epsilon 0.0: must be above 0"),
    "epsilon NaN": (("--examples", 60_000, "--epsilon", "nan"), "--epsilon nan: must be above 0"),
    "epsilon inf": (("--examples", 60_000, "--epsilon", "inf"), "no noise to weigh"),
    "delta 1/N": (("--examples", 60_000, "--epsilon", 3, "--delta", 1e-4), "below 1 / examples"),
    "delta 0": (("--examples", 60_000, "--epsilon", 3, "--delta", 0), "--delta 0.0"),
    "batch": (("--examples", 60_000, "--epsilon", 3, "--batch-size", 60_001), "from 1 to the 60000 examples"),
    "no time": (("--examples", 60_000, "--epsilon", 3, "--compute", "0s"), "90s, 5m"),
    "too little time": (
        ("--examples", 60_000, "--epsilon", 3, "--compute", "1s", "--throughput", 10),
        "allows 10 examples, and 10 steps of 8 need 80; give it 8 times that",
    ),
    "unknown speed": (("--examples", 60_000, "--epsilon", 3, "--compute", "5m"), "depends on the model"),
    "two bounds": (("--examples", 60_000, "--epsilon", 3, "--samples", 10_000, "--epochs", 2), "one way only"),
    "money": (("--examples", 60_000, "--epsilon", 3, "--money", 5), "price_per_hour"),
    "one row": (("--examples", 1, "--epsilon", 3), "examples=1"),
    "nothing": (("--epsilon", 3), "needs DATA or --examples"),
    "both": (("people.csv", "--target", "income", "--examples", 9, "--epsilon", 3), "the file says them"),
    "kind": (("--examples", 60_000, "--epsilon", 3, "--choose", "best"), "cheap, knee, maximal"),
    "folder": (("--examples", 60_000, "--epsilon", 3, "--out", "."), "is a directory"),
    "page": (("--examples", 60_000, "--epsilon", 3, "--html", "nowhere/plan.html"), "cannot be written"),
    "simulation alone": (("--examples", 60_000, "--epsilon", 3, "--simulation", "s.json"), "without --html"),
    "no simulation": (
        ("--examples", 60_000, "--epsilon", 3, "--simulation", "s.json", "--html", "p.html"),
        "cannot be read as a simulation",
    ),
    "throughput": (("--examples", 60_000, "--epsilon", 3, "--throughput", -1), "examples per second"),
    "parameters": (("--examples", 60_000, "--epsilon", 3, "--parameters", 0), "--parameters 0"),
    "parameters alone": (("--examples", 60_000, "--epsilon", 3, "--parameters", 9), "without --throughput"),
    "no folder": (("--examples", 60_000, "--epsilon", 3, "--out", "nowhere/plan.json"), "nowhere is no directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line(workplace: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, message = WRONG[name]
    code, out, err = _run(capsys, "plan", *words)
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("plan.json").exists()


def test_no_epsilon_and_no_plan(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _run(capsys, "train", "people.csv", "--target", "income")
    assert code == 2
    assert "--epsilon: is missing" in err


def test_it_answers_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """In about a second on an idle core; processor time, as other work may share it, and a bound far above it."""
    _run(capsys, "plan", "--examples", 50_000, "--epsilon", 2)
    started = time.process_time()
    assert _run(capsys, "plan", "--examples", 60_000, "--epsilon", 3)[0] == 0
    assert time.process_time() - started < 5
