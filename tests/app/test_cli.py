"""The program as a user types it: results, exit codes, one-line errors, and nothing written when the input is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.program import CANARY, ROWS, idx, run_program, table
from app.reported import page_of
from discreet.train.run import Run


def test_train_verify_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    code, out, _ = run_program(
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

    code, out, _ = run_program(capsys, "verify", "run", "--json")
    assert code == 0
    assert json.loads(out)["epsilon"] == record["epsilon"]
    code, out, _ = run_program(capsys, "verify", "run")
    name, epsilon, *_ = out.split()
    assert (code, name) == (0, "epsilon")
    assert f"\n({epsilon}, " in out

    code, out, _ = run_program(capsys, "report", "run")
    assert (code, out.strip()) == (0, "run/release/report.html")
    plan = json.loads((workplace / "run" / "release" / "plan.json").read_text())
    assert plan["before"], "private statistics must be part of the plan"


def test_private_statistics_are_in_the_ledger_before_the_steps(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(workplace / "people.csv")
    assert (
        run_program(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--out", "run")[0] == 0
    )
    kinds = [json.loads(line)["kind"] for line in (workplace / "run" / "ledger.jsonl").read_text().splitlines()]
    assert kinds[:2] == ["open", "query"]
    assert kinds.index("steps") > max(index for index, kind in enumerate(kinds) if kind == "query")
    assert kinds[-1] == "close"


def test_a_public_schema_costs_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    (workplace / "schema.toml").write_text(
        '[target]\nname = "income"\nclasses = ["low", "high"]\n'
        '[column.age]\ntype = "number"\nmin = 0\nmax = 100\n'
        '[column.job]\ntype = "category"\nvalues = ["clerk", "smith"]\n'
    )
    words = ("train", data, "--schema", "schema.toml", "--epsilon", 8, "--steps", 150, "--out", "run", "--json")
    code, out, _ = run_program(capsys, *words)
    assert code == 0
    assert json.loads(out)["test"]["accuracy"] > 0.6
    assert json.loads((workplace / "run" / "release" / "plan.json").read_text())["before"] == []


def test_no_noise_is_stamped(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    code, out, _ = run_program(
        capsys, "train", data, "--target", "income", "--epsilon", "inf", "--steps", 30, "--out", "run"
    )
    assert code == 0
    assert "NOT PRIVATE" in out
    assert "not private" in (workplace / "run" / "release" / "report.html").read_text().lower()


def test_a_seed_is_stamped_and_repeats(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    weights = []
    for out_dir in ("a", "b"):
        words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", out_dir, "--seed", 1)
        code, out, _ = run_program(capsys, *words)
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
        idx(workplace / "digits" / f"{name}-images-idx3-ubyte.gz", images)
        idx(workplace / "digits" / f"{name}-labels-idx1-ubyte.gz", labels)
    words = ("train", "digits", "--epsilon", 8, "--steps", 40, "--classes", 2, "--out", "run", "--json")
    code, out, err = run_program(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.9


def test_text(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"spam\twin a prize now {index}" if index % 2 else f"ham\tsee you at home {index}" for index in range(ROWS)
    ]
    (workplace / "messages.tsv").write_text("\n".join(lines) + "\n")
    words = ("train", "messages.tsv", "--columns", "label,text", "--target", "label", "--epsilon", 8)
    code, out, err = run_program(capsys, *words, "--steps", 40, "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["accuracy"] > 0.9


def test_account_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("account", "--examples", 50000, "--batch-size", 4096, "--steps", 2500, "--delta", 1e-5, "--json")
    code, out, _ = run_program(capsys, *sizes, "--noise-multiplier", 3)
    assert code == 0
    assert json.loads(out)["epsilon"] == pytest.approx(6.58, abs=0.01)
    code, out, _ = run_program(capsys, *sizes, "--epsilon", 8)
    assert json.loads(out)["noise_multiplier"] == pytest.approx(2.58, abs=0.01)
    code, out, _ = run_program(capsys, *sizes, "--noise-multiplier", 3, "--accountant", "rdp")
    assert json.loads(out)["epsilon"] == pytest.approx(7.10, abs=0.01)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_check_prints_a_table_and_spends_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    data = table(workplace / "people.csv")
    before = sorted(workplace.rglob("*"))
    code, out, _ = run_program(capsys, "check", data, "--target", "income", "--model", model)
    assert code == 0
    assert "isolation" in out
    assert "norms agree" in out
    assert sorted(workplace.rglob("*")) == before


def test_resume_continues_and_refuses_other_options(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    words = ["train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run"]
    assert run_program(capsys, *words)[0] == 0
    code, _, err = run_program(capsys, *words, "--resume")
    assert code == 2
    assert "has ended" in err


@pytest.mark.parametrize("style", ["per_layer", "per_parameter", "groups:1", "groups:1,3"])
def test_a_clipping_style_reaches_plan_certificate_and_report(
    workplace: Path, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    data = table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--steps", 5, "--model", "mlp", "--out", "run")
    code, _, err = run_program(capsys, *words, "--clipping", f"abadi:0.5@{style}")
    assert code == 0, err
    assert run_program(capsys, "verify", "run")[0] == 0
    release = workplace / "run" / "release"
    wanted = {"kind": "abadi", "style": style, "clip_bound": 0.5}
    assert json.loads((release / "plan.json").read_text())["clipping"] == wanted
    assert json.loads((release / "certificate.json").read_text())["mechanism"]["clipping"] == wanted
    assert f"style: {style}</td>" in (release / "report.html").read_text()
    code, _, err = run_program(capsys, *words, "--clipping", "abadi:0.5", "--resume")
    assert code == 2


def test_rows_of_nan_and_infinity_are_missing_values(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    with data.open("a") as stream:
        stream.write("nan,clerk,low\ninf,smith,high\n-inf,,low\n1e400,clerk,high\n")
    code, _, err = run_program(
        capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run"
    )
    assert code == 0, err


def test_no_value_from_the_data_is_printed_or_released(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that one row holds shows nowhere outside the private half."""
    data = table(workplace / "people.csv")
    with data.open("a") as stream:
        stream.write(f"{CANARY},clerk,low\n33,{CANARY},high\n33,clerk,{CANARY}\n")
    code, out, err = run_program(
        capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 20, "--out", "run"
    )
    assert code == 0
    assert CANARY not in out + err
    for path in (workplace / "run").rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_overflowing_weights_still_give_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
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
    code, out, err = run_program(capsys, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["nll"] is None


def test_a_rate_that_sets_itself_says_how(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the result, in the curve of the log, and on the page."""
    words = ("demo", "--epsilon", 8, "--steps", 80, "--batch-size", 200, "--learning-rate", "auto", "--out", "run")
    code, out, err = run_program(capsys, *words, "--json")
    assert code == 0, err
    assert "The learning rate set itself" in " ".join(json.loads(out)["statements"])
    release = workplace / "run" / "release"
    lines = [json.loads(line) for line in (release / "metrics.jsonl").read_text().splitlines()]
    assert sum("probe_rise" in line for line in lines) >= 1
    assert "How the learning rate set itself" in (release / "report.html").read_text()


def _trained(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    assert (
        run_program(capsys, "train", data, "--target", "income", "--epsilon", 8, "--steps", 10, "--out", "run")[0] == 0
    )


def test_another_model_file_is_not_the_certified_one(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trained(workplace, capsys)
    with (workplace / "run" / "release" / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    code, _, err = run_program(capsys, "verify", "run")
    assert code == 1
    assert "is not the model that the ledger ended with" in err


def test_what_is_shared_verifies_without_the_private_half(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trained(workplace, capsys)
    shutil.copytree(workplace / "run" / "release", workplace / "shared" / "release")
    shutil.copy(workplace / "run" / "ledger.jsonl", workplace / "shared")
    assert run_program(capsys, "verify", "shared")[0] == 0
    (workplace / "shared" / "release" / "model.safetensors").unlink()
    assert run_program(capsys, "verify", "shared")[0] == 0
    code, _, err = run_program(capsys, "verify", "run/release")
    assert code == 1
    assert "pass the run directory" in err


def test_rows_of_an_unlisted_class_are_counted_and_told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--classes", "low,hihg", "--epsilon", 8, "--steps", 5)
    _, out, _ = run_program(capsys, *words, "--out", "a", "--json")
    record = json.loads(out)["test"]
    assert 0 < record["unlisted"] < record["examples"]
    _, out, _ = run_program(capsys, *words, "--out", "b")
    assert "of no listed class" in out


def test_every_test_accuracy_is_over_all_test_rows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Page, result, and `discreet calibrate` said 86 % of rows of a listed class, where the log said 64 % of all."""
    lines = table(workplace / "people.csv").read_text().splitlines()
    generator = np.random.default_rng(1)
    blank = [line[: line.rindex(",") + 1] if generator.random() < 0.25 else line for line in lines[1:]]
    (workplace / "people.csv").write_text("\n".join([lines[0], *blank]) + "\n")
    words = ("train", "people.csv", "--target", "income", "--classes", "low,high", "--epsilon", 8, "--steps", 60)
    code, out, err = run_program(capsys, *words, "--out", "run")
    assert code == 0, err
    release = workplace / "run" / "release"
    test = json.loads((release / "result.json").read_text())["test"]
    logged = json.loads((release / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
    rows, listed, unlisted = test["examples"], test["listed"], test["unlisted"]
    assert listed + unlisted == rows
    assert 0.15 * rows < unlisted < 0.35 * rows
    assert test["accuracy"] == logged
    assert test["accuracy"] == pytest.approx(test["listed_accuracy"] * listed / rows)
    assert 0.3 < test["constant_accuracy"] < test["accuracy"] < test["listed_accuracy"]

    assert f"test accuracy {logged:.6g} always the commonest class, NON-PRIVATE" in " ".join(out.split())
    assert f"test nll, over the {listed} rows of a listed class" in out
    assert "The list of 2 classes is public: low, high. Training rows of any other class taught nothing" in out

    page = page_of(workplace / "run").words.replace("\u202f", " ")
    assert f"Measured on {rows} test rows. {unlisted} of them are of no listed class, and count as wrong." in page
    assert f"{100 * logged:.2f} %" in page
    assert f"always the commonest class: {100 * test['constant_accuracy']:.1f} %" in page
    assert f"over the {listed} test rows of a listed class" in page

    code, out, _ = run_program(capsys, "calibrate", "run", "--json")
    found = json.loads(out)
    assert {name: found[name] for name in ("accuracy", "listed_accuracy", "examples", "listed", "unlisted")} == {
        name: test[name] for name in ("accuracy", "listed_accuracy", "examples", "listed", "unlisted")
    }
    assert sum(found["reliability"]["count"]) == listed
    assert found["intervals"]["accuracy"][0] < logged < found["intervals"]["accuracy"][1]
    _, out, _ = run_program(capsys, "calibrate", "run", "--html", "calibration.html")
    assert f"over the {listed} test rows of a listed class" in out
    assert f"accuracy {logged:.4f}" in " ".join(out.split())
    assert f"{listed} rows" in (workplace / "calibration.html").read_text()


def test_names_that_repeat_the_header_do_not_make_it_a_row(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    words = ("train", data, "--columns", "age,job,income", "--target", "income", "--epsilon", 8, "--steps", 5)
    _, out, _ = run_program(capsys, *words, "--out", "run", "--json")
    record = json.loads(out)
    assert record["examples"] + record["test"]["examples"] == ROWS


def test_a_large_delta_is_said_to_be_one(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = table(workplace / "people.csv")
    words = ("train", data, "--target", "income", "--epsilon", 8, "--delta", 0.5, "--steps", 5, "--out", "run")
    assert "above 1 / examples" in run_program(capsys, *words)[1]


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (("--epsilon", 8, "--delta", 0.1), "delta 0.1 is above 1 / examples"),
        (("--epsilon", 20), "epsilon 20 promises little by itself; the usual range is 1 to 8."),
    ],
    ids=["delta", "epsilon"],
)
@pytest.mark.parametrize("command", [("train",), ("tune", "--learning-rates", 0.02)], ids=["train", "tune"])
def test_a_weak_promise_is_said_to_be_one_before_anything_is_charged(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[object, ...],
    numbers: tuple[object, ...],
    told: str,
) -> None:
    """Afterwards nobody can heed it."""

    def interrupted(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    data = table(workplace / "people.csv")
    monkeypatch.setattr(Run, "create", interrupted)
    code, out, err = run_program(
        capsys, command[0], data, "--target", "income", *command[1:], *numbers, "--steps", 5, "--out", "run"
    )
    assert (code, out) == (1, "")
    assert f"discreet: Warning: {told}" in err
    assert err.splitlines()[-1] == "discreet: interrupted; nothing was charged yet; repeat the command."
