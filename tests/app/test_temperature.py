"""A temperature as part of a run: set apart, charged, stored, verified; and what happens when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from discreet.app.cli import main
from discreet.app.data import PublicCalibration, SetApart, digits, open_source, usual_share
from discreet.app.data.split import is_test_row
from discreet.app.evaluation import logits_of
from discreet.app.temperature import _fit, conclusion, plan_calibration, statement
from discreet.errors import ConfigError
from discreet.privacy.accounting import HeldOut
from discreet.privacy.certificate import temperature_of
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from discreet.privacy.verification import verify
from discreet.train.run import Run, Stage

ROWS = 3000
SCHEMA = """
[target]
name = "label"
classes = ["no", "yes"]
[column.a]
type = "number"
min = -4
max = 4
[column.b]
type = "number"
min = -4
max = 4
"""


def _table(path: Path, *, rows: int = ROWS, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(2, rows))
    label = np.where(generator.random(rows) < 1 / (1 + np.exp(-2 * a - b)), "yes", "no")
    lines = [f"{x:.4f},{y:.4f},{z}" for x, y, z in zip(a, b, label, strict=True)]
    path.write_text("\n".join(["a,b,label", *lines]) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.toml").write_text(SCHEMA)
    _table(tmp_path / "copy.csv")
    return _table(tmp_path / "rows.csv")


def _run(capsys, *words):
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _train(capsys, data, *words):
    usual = ("--schema", "schema.toml", "--epsilon", 2, "--steps", 20, "--batch-size", 200, "--json")
    return _run(capsys, "train", data, *usual, *words)


def test_a_private_temperature_costs_no_more_epsilon_and_is_verified(data, capsys):
    code, out, _ = _train(capsys, data, "--private-temperature", "--out", "run")
    assert code == 0
    result = json.loads(out)
    found = verify("run")
    assert found.epsilon <= 2
    assert result["temperature"] == found.temperature > 0
    assert json.loads(Path("run/release/temperature.json").read_text())["temperature"] == found.temperature
    certificate = json.loads(Path("run/release/certificate.json").read_text())
    assert certificate["epsilon"] == max(certificate["epsilon_training"], certificate["epsilon_calibration"])
    assert 0.99 * 2 < certificate["epsilon_calibration"] <= 2
    # The parts and the test rows are all there is, and no row is in two of them.
    apart = certificate["calibration"]["examples"]
    held_out = result["test"]["examples"]
    assert result["examples"] + apart + held_out == ROWS
    assert abs(apart - usual_share(ROWS - held_out) * (ROWS - held_out)) < 150
    assert set(result["test"]["before_temperature"]) == {"nll", "ece"}
    assert any("+-" in line and "parallel composition" in line for line in result["statements"])
    assert any("trained with the model in the same query" in line for line in result["statements"])
    page = Path("run/release/report.html").read_text()
    assert "Can its probabilities be believed?" in page
    assert "divided by the temperature" in page
    assert "and for nothing else; all others were asked at" in page
    code, out, _ = _run(capsys, "calibrate", "run", "--json")
    assert code == 0
    assert json.loads(out)["ece"] == result["test"]["ece"]


def test_figures_of_held_out_private_rows_are_stamped_and_public_ones_are_not(data, capsys):
    _, out, _ = _train(capsys, data, "--out", "private")
    assert json.loads(out)["test"]["stamp"] == "NON-PRIVATE"
    page = Path("private/release/report.html").read_text()
    assert "on held-out rows, NON-PRIVATE" in page
    metrics = [json.loads(line) for line in Path("private/release/metrics.jsonl").read_text().splitlines()]
    assert {line["test_stamp"] for line in metrics if "test_accuracy" in line} == {"NON-PRIVATE"}
    other = _table(data.parent / "other.csv", seed=1)
    _, out, _ = _train(capsys, data, "--out", "public", "--test", other, "--public-test")
    test = json.loads(out)["test"]
    assert test["stamp"] == ""
    assert "NON-PRIVATE" not in Path("public/release/report.html").read_text()
    for name in (
        "nll",
        "ece",
        "ece_floor",
        "adaptive_ece",
        "classwise_ece",
        "brier",
        "mce",
        "gap",
        "optimal_temperature",
    ):
        assert isinstance(test[name], float)
    code, _, err = _train(capsys, data, "--out", "third", "--public-test")
    assert code == 2
    assert "--public-test without --test" in err


def test_a_public_temperature_is_exact_and_costs_nothing(data, capsys):
    other = _table(data.parent / "other.csv", seed=2)
    code, out, _ = _train(capsys, data, "--public-temperature", other, "--out", "run")
    assert code == 0
    found = verify("run")
    assert json.loads(out)["temperature"] == found.temperature
    record = json.loads(Path("run/release/temperature.json").read_text())
    assert record["examples"] == ROWS
    assert record["noise_std"] == 0
    assert not any(isinstance(query, HeldOut) for query in Ledger.read("run/ledger.jsonl").queries())


def test_an_edited_temperature_is_distrusted(data, capsys):
    _train(capsys, data, "--private-temperature", "--out", "run")
    path = Path("run/release/temperature.json")
    path.write_text(path.read_text().replace('"temperature": ', '"temperature": 1'))
    code, _, err = _run(capsys, "verify", "run")
    assert code == 1
    assert "temperature.json: is not the temperature in the ledger" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--private-temperature", "--public-temperature", "rows.csv"), "one of them is enough"),
        (("--public-temperature", "nowhere.csv"), "no such file"),
        (("--public-temperature", "rows.csv"), "is the private data itself"),
        (("--test", "copy.csv", "--public-test"), "is the private data itself"),
        (("--private-temperature", "--epsilon", 0.5), "examples times epsilon of at least 500"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(data, capsys, words, line):
    code, out, err = _train(capsys, data, *words, "--out", "run")
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("run").exists()


def test_other_options_on_resume_are_refused(data, capsys):
    source = open_source(data, schema="schema.toml", calibration=SetApart())
    calibration = plan_calibration(source.examples, apart=source.calibration_examples, epsilon=2.0, delta=1e-4)
    assert calibration.examples == source.calibration_examples
    plan = Plan.solve(examples=source.examples, batch_size=200, steps=20, epsilon=2.0, delta=1e-4)
    Run.create(Path("run"), plan=plan).close()
    code, _, err = _train(capsys, data, "--private-temperature", "--delta", 1e-4, "--out", "run", "--resume")
    assert code == 2
    assert "--private-temperature" in err


class _Rows:
    """What `conclusion` needs of examples."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(count, 2, generator=generator)
        self.targets = (self.features[:, 0] + torch.randn(count, generator=generator) > 0).long()

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows):
        index = torch.as_tensor(rows)
        return self.features[index], self.targets[index]


@pytest.fixture
def ready(tmp_path):
    """A run of two steps that are charged, and its model."""
    plan = Plan.solve(examples=2000, batch_size=100, steps=2, epsilon=2.0, delta=1e-4)
    calibration = plan_calibration(2000, apart=400, epsilon=2.0, delta=1e-4)
    plan = Plan.from_json(plan.to_json() | {"calibration": vars(calibration)})
    run = Run.create(tmp_path / "run", plan=plan)
    run.ledger.reserve_steps(first=0, count=2)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]))
    yield run, model
    run.close()


def test_the_sentence_says_whether_the_temperature_is_private(ready, tmp_path):
    run, model = ready
    assert "There is no temperature" in statement(run.plan, run.ledger)[0]
    conclusion(_Rows(400))(run, model)
    assert "fitted privately on 400 rows" in statement(run.plan, run.ledger)[0]
    with Run.create(tmp_path / "seeded", plan=run.plan, seed=1) as seeded:
        conclusion(_Rows(400))(seeded, model)
        assert "NOT PRIVATELY" in statement(seeded.plan, seeded.ledger)[0]
    bare = Plan.solve(examples=2000, batch_size=100, steps=2, epsilon=2.0, delta=1e-4)
    with Run.create(tmp_path / "bare", plan=bare) as without:
        assert statement(bare, without.ledger) == ()


def test_a_repeated_conclusion_asks_nothing_twice(ready):
    run, model = ready
    rows = _Rows(400)
    conclusion(rows)(run, model)
    first, records = temperature_of(run.ledger), len(run.ledger.records)
    # A crash came after the note and before the file; the data changed in between.
    (run.release_dir / "temperature.json").unlink()
    conclusion(_Rows(400, seed=1))(run, model)
    assert temperature_of(run.ledger) == first
    assert len(run.ledger.records) == records
    assert json.loads((run.release_dir / "temperature.json").read_text())["temperature"] == first


def test_noise_is_bound_to_the_question(ready, tmp_path):
    """Other rows under the same key, before anything was noted: other noise, and not the same one on two sums.

    In test mode: the answers of 400 rows show a slope in two of three runs, and where they do not, the temperature is
    the last midpoint of the bisection, one of a few dozen. Two such runs agreed in one of a hundred without a seed.
    """
    run, model = ready
    with Run.create(tmp_path / "seeded", plan=run.plan, seed=1) as seeded:
        first = _fit(seeded, logits_of(model, _Rows(400)), _Rows(400).targets)
        again = _fit(seeded, logits_of(model, _Rows(400)), _Rows(400).targets)
        assert first == again
        # One row more whose slope is 0: without noise of its own the answers would be equal.
        features = torch.cat([logits_of(model, _Rows(400)), torch.zeros(1, 2, dtype=torch.float64)])
        other = _fit(seeded, features, torch.cat([_Rows(400).targets, torch.tensor([-100])]))
    assert other["temperature"] != first["temperature"]


def test_a_new_key_that_cannot_pay_again_ends_without_a_temperature(ready):
    run, model = ready
    conclusion(_Rows(400))(run, model)
    run.renew_key(["test"], stage=Stage.TRAINING)
    assert temperature_of(run.ledger) is None
    conclusion(_Rows(400))(run, model)
    # Twice eight questions pass epsilon 2: refused, noted nowhere, and the run may end.
    assert temperature_of(run.ledger) is None
    assert run.ledger.epsilon() <= 2.0
    # The file of the earlier key's temperature would contradict the ledger for good.
    run.finish(model)
    assert verify(run.path).temperature is None


def test_the_part_is_a_function_of_each_row_alone(tmp_path):
    path = _table(tmp_path / "rows.csv", rows=400)
    lines = path.read_text().splitlines()
    (tmp_path / "fewer.csv").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    part = SetApart(0.2)
    rows = [line.split(",") for line in lines[1:]]
    chosen = [part.holds_row(row) for row in rows]
    assert 50 < sum(chosen) < 110
    assert chosen[1:] == [part.holds_row(row) for row in rows[1:]]
    # The two splits say nothing of each other: 400 rows at .2 and .2 share 16 on average.
    both = sum(one and is_test_row(row) for one, row in zip(chosen, rows, strict=True))
    assert 4 <= both <= 32
    (tmp_path / "schema.toml").write_text(SCHEMA)
    whole = open_source(path, schema=tmp_path / "schema.toml", calibration=part)
    less = open_source(tmp_path / "fewer.csv", schema=tmp_path / "schema.toml", calibration=part)
    assert (whole.examples + whole.calibration_examples) - (less.examples + less.calibration_examples) in (0, 1)


def test_rows_that_are_set_apart_are_counted_nowhere(tmp_path):
    """Private statistics see the other rows alone: their names hold nothing of a row that was set apart."""
    path = _table(tmp_path / "rows.csv", rows=400)
    source = open_source(path, target="label", calibration=SetApart(0.3))
    assert {len(names.value_N) for names in source._request.names.values()} == {source.examples}
    assert open_source(path, target="label").fingerprint() != source.fingerprint()


def test_public_rows_must_have_the_form_of_the_private_ones(tmp_path):
    path = _table(tmp_path / "rows.csv", rows=400)
    other = tmp_path / "other.csv"
    other.write_text("a,c,label\n1,2,yes\n")
    with pytest.raises(ValueError, match="its columns are not those"):
        open_source(path, target="label", calibration=PublicCalibration(other))


def test_digits_can_be_set_apart():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    whole, cut = digits(), digits(SetApart(0.2))
    assert len(cut.train) + len(cut.calibration) == len(whole.train)
    assert len(cut.test) == len(whole.test)
    assert whole.calibration is None


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6, float("nan")])
def test_shares_are_shares(share):
    with pytest.raises(ConfigError, match="share"):
        SetApart(share)


@pytest.mark.parametrize(("rows", "share"), [(1000, 0.2), (30_000, 0.1), (60_000, 0.05), (10**7, 0.05), (0, 0.2)])
def test_the_usual_share_is_about_three_thousand_rows(rows, share):
    assert usual_share(rows) == share


def test_one_row_more_moves_no_other_row():
    """A share in proportion to 1 / N would: some rows' hashes lie between 3000 / N and 3000 / (N + 1)."""
    changes = [rows for rows in range(1, 100_000) if usual_share(rows) != usual_share(rows + 1)]
    assert len(changes) == 2
