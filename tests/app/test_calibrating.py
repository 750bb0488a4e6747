"""`discreet calibrate`: predictions of any model from a file; within a budget, or stamped; one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from discreet.app.cli import main
from discreet.app.predictions import Faults, Scale, load_predictions
from discreet.core.calibration import Neighbours, Reliability, summed_reliability
from discreet.core.clipping import Clipping
from discreet.insight.calibration import Predictions, calibration_report
from discreet.insight.calibration.advice import Seen, advice
from discreet.privacy.verification import verify
from discreet.train.tempered import tempered_clipping

ROWS = 600
CLASSES = ("cat", "dog", "eel")
SCORES = ("--columns", "p_cat,p_dog,p_eel")
BUDGET = (*SCORES, "--probabilities", "--epsilon", 1)


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are too sure, labels, groups."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(ROWS, 3)) * 2.5
    truth = torch.from_numpy(logits / 1.7).softmax(1).numpy()
    label = (truth.cumsum(1) < generator.random((ROWS, 1))).sum(1).clip(max=2)
    return logits, label, generator.choice(["town", "rural"], ROWS)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    logits, label, group = made()
    probability = torch.from_numpy(logits).softmax(1).numpy()
    rows = [
        f"{CLASSES[y]},{','.join(repr(float(p)) for p in row)},{where}"
        for y, row, where in zip(label, probability, group, strict=True)
    ]
    path = tmp_path / "predictions.csv"
    path.write_text("\n".join(["label,p_cat,p_dog,p_eel,where", *rows]) + "\n")
    return path


def _run(capsys, *words):
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_table_of_probabilities_has_the_report_of_its_numbers(table, capsys):
    code, out, _ = _run(capsys, "calibrate", table, "--public", "--group", "where", "--json")
    assert code == 0
    found = json.loads(out)
    logits, label, group = made()
    exact = calibration_report(Predictions.from_logits(logits, label, groups=list(group))).to_json()
    assert found["stamp"] == ""
    for name in ("ece", "nll", "brier", "accuracy", "optimal_temperature", "ece_floor", "mce"):
        assert found[name] == pytest.approx(exact[name], rel=1e-6)
    assert [each["name"] for each in found["groups"]] == ["rural", "town"]
    assert any("Divide the logits" in line for line in found["advice"])


def test_an_archive_of_logits_has_the_same_report(table, capsys):
    logits, label, group = made()
    np.savez("predictions.npz", logits=logits, labels=label, groups=group)
    _, out, _ = _run(capsys, "calibrate", "predictions.npz", "--public", "--json")
    _, other, _ = _run(capsys, "calibrate", table, "--public", "--group", "where", "--json")
    first, second = json.loads(out), json.loads(other)
    assert first["ece"] == pytest.approx(second["ece"], abs=1e-9)
    assert len(first["groups"]) == 2


def test_one_column_is_the_second_of_two_classes(tmp_path):
    path = tmp_path / "scores.tsv"
    path.write_text("y\tscore\n1\t0.9\n0\t0.2\n1.0\t0.6\n")
    found = load_predictions(path, label=None, group=None, scale=Scale.AUTO)
    assert found.scale is Scale.PROBABILITIES
    torch.testing.assert_close(found.scores_NK.exp()[:, 1], torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64))
    assert found.target_N.tolist() == [1, 0, 1]
    path.write_text("y\tscore\n1\t2.5\n0\t-1\n")
    found = load_predictions(path, label=None, group=None, scale=Scale.AUTO)
    assert found.scale is Scale.LOGITS
    assert found.scores_NK.tolist() == [[0, 2.5], [0, -1]]


def test_numbers_between_0_and_1_may_be_logits(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("label,a,b\na,0.5,0.5\nb,0.1,0.9\n")
    assert load_predictions(path, label=None, group=None, scale=Scale.AUTO).scale is Scale.PROBABILITIES
    assert load_predictions(path, label=None, group=None, scale=Scale.LOGITS).scores_NK.tolist() == [
        [0.5, 0.5],
        [0.1, 0.9],
    ]


def test_what_was_not_said_to_be_public_is_stamped_everywhere(table, capsys):
    code, out, _ = _run(capsys, "calibrate", table, *SCORES, "--html", "page.html")
    assert code == 0
    assert out.startswith("NON-PRIVATE")
    assert "no ledger holds" in out
    assert "NON-PRIVATE" in Path("page.html").read_text()
    _, out, _ = _run(capsys, "calibrate", table, *SCORES, "--json")
    assert json.loads(out)["stamp"] == "NON-PRIVATE"
    _, out, _ = _run(capsys, "calibrate", table, *SCORES, "--public", "--html", "page.html")
    assert "NON-PRIVATE" not in out + Path("page.html").read_text()


def test_the_page_is_one_file_with_its_pictures(table, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    _run(capsys, "calibrate", table, "--public", "--group", "where", "--html", "page.html")
    page = Path("page.html").read_text()
    for drawn in ("reliability-", "temperature-", "groups-"):
        assert f'id="{drawn}' in page
    assert page.count("<svg") == 3
    for outside in ("<script", "http://", "https://", "<img"):
        assert outside not in page


def test_names_of_groups_and_files_are_escaped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a&b.csv"
    rows = [f"{index % 2},0.7,{'<script>' if index % 3 else '$x^2$'}" for index in range(60)]
    path.write_text("\n".join(["label,score,where", *rows]) + "\n")
    code, _, _ = _run(capsys, "calibrate", path, "--public", "--group", "where", "--html", "page.html")
    assert code == 0
    assert "<script" not in Path("page.html").read_text()


def test_a_budget_is_charged_certified_and_verified(table, capsys):
    code, out, _ = _run(capsys, "calibrate", table, *BUDGET, "--out", "audit", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["private"] is True
    assert found["ece"] > found["ece_without_noise"] >= 0
    assert "stamp" not in found
    checked = verify("audit")
    assert 0.99 < checked.epsilon <= 1.0
    assert checked.private
    assert checked.finished
    assert "one calibration report" in checked.statement
    certificate = json.loads(Path("audit/release/certificate.json").read_text())
    assert "calibration report" in certificate["mechanism"]["name"]
    assert json.loads(Path("audit/release/calibration.json").read_text())["ece"] == found["ece"]
    assert not Path("audit/private/key").exists()
    code, _, err = _run(capsys, "calibrate", table, *BUDGET, "--out", "audit")
    assert code == 2
    assert "holds a run already" in err


def _report_sums(path: Path, scale: Scale) -> torch.Tensor:
    """What `discreet calibrate --epsilon` adds noise to."""
    found = load_predictions(path, label=None, group=None, scale=scale, faults=Faults.HARMLESS)
    scores = found.scores_NK.clamp(min=-1e4)
    asked = Reliability(bins=15, nll_bound=5.0)
    total = summed_reliability(scores, found.target_N, asked=asked, neighbours=Neighbours.ADD_REMOVE)
    return torch.cat([value.flatten() for value in total.tensors.values()])


HEADS = {
    "names": ("label,p_cat,p_dog", "cat,0.8,0.2", "1,0.4,0.6"),
    "numbers for names": ("label,p_1,p_0", "1,0.8,0.2", "0,0.4,0.6"),
    "one column": ("label,score", "1,0.8", "0,0.4"),
}
STRANGE = ("1.0", "2", "-1", "nobody", "", "nan", "1e400", "cat")
CELLS = ("1.001", "-0.1", "nan", "inf", "-inf", "1e400", "", "nobody", "0", "1")


@pytest.mark.parametrize("scale", [Scale.LOGITS, Scale.PROBABILITIES])
@pytest.mark.parametrize("head", HEADS)
def test_no_row_of_a_file_moves_a_report_within_a_budget_by_more_than_its_sensitivity(tmp_path, head, scale):
    """Neighbouring files, and not neighbouring tensors: reading them is part of the query."""
    header, *usual = HEADS[head]
    lines = [header, *(usual * 200)]
    (tmp_path / "one.csv").write_text("\n".join(lines) + "\n")
    without = _report_sums(tmp_path / "one.csv", scale)
    largest = 0.0
    width = header.count(",")
    for row in [*((label, *["0.5"] * width) for label in STRANGE), *(("1", *[cell] * width) for cell in CELLS)]:
        (tmp_path / "other.csv").write_text("\n".join([*lines, ",".join(row)]) + "\n")
        moved = float((_report_sums(tmp_path / "other.csv", scale) - without).norm())
        assert moved <= np.sqrt(2) * (1 + 1e-9)
        largest = max(largest, moved)
    assert largest > 0.7


@pytest.mark.parametrize("name", ["logits", "probabilities"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7.0])
def test_no_row_of_an_archive_ends_a_report_within_a_budget(tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.chdir(tmp_path)
    numbers, labels = np.full((300, 2), 0.5), np.zeros(300, dtype=int)
    numbers[7], labels[7] = (value, -value), 5
    np.savez("rows.npz", **{name: numbers}, labels=labels)
    code, out, err = _run(capsys, "calibrate", "rows.npz", "--epsilon", 1, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["examples"] == 300


def test_within_a_budget_no_row_says_what_the_numbers_are(table, capsys):
    code, out, err = _run(capsys, "calibrate", table, *SCORES, "--epsilon", 1, "--out", "audit")
    assert (code, out) == (2, "")
    assert "say which they are" in err
    assert not Path("audit").exists()


def test_a_file_of_which_nothing_can_be_read_is_not_charged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("label,score\n" + "yes,x\n" * 50)
    code, _, err = _run(capsys, "calibrate", "rows.csv", "--probabilities", "--epsilon", 1, "--out", "audit")
    assert code == 2
    assert "no row has numbers" in err
    assert not Path("audit").exists()


def test_two_budgeted_reports_carry_different_noise(table, capsys):
    found = [json.loads(_run(capsys, "calibrate", table, *BUDGET, "--json")[1])["gap"] for _ in range(2)]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere.csv"], "no such file"),
        (["predictions.csv", "--label", "nothing"], "not a column"),
        (["predictions.csv", "--group", "nothing"], "not a column"),
        (["predictions.csv"], "column 'where': not a finite number"),
        (["predictions.csv", "--columns", "p_cat,nothing"], "'nothing' is no column of scores"),
        (["predictions.csv", "--columns", "p_cat,label"], "'label' is no column of scores"),
        (["predictions.csv", "--logits", "--probabilities"], "leave one out"),
        (["predictions.csv", "--epsilon", "1", "--public"], "public rows need no noise"),
        (["predictions.csv", "--epsilon", "1", "--group", "where"], "not reported within a budget"),
        (["predictions.csv", "--epsilon", "0"], "above 0"),
        (["predictions.csv", "--epsilon", "inf"], "finite"),
        (["predictions.csv", "--out", "x"], "without --epsilon"),
        (["predictions.csv", "--delta", "0.1"], "without --epsilon"),
        ([".", "--epsilon", "1"], "a run, whose report"),
        ([".", "--public"], "a run, whose report"),
        ([".", "--logits"], "a run, whose report"),
        (["."], "plan.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(table, capsys, words, line):
    code, out, err = _run(capsys, "calibrate", *words)
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("label,a,b\na,0.5,x\n", "not a finite number"),
        ("label,a,b\na,0.5,nan\n", "not a finite number"),
        ("label,a,b\nc,0.5,0.5\n", "neither the name"),
        ("label,a,b\n2,0.5,0.5\n", "neither the name"),
        ("label,a,b\n-1,0.5,0.5\n", "neither the name"),
        ("label\na\n", "no column beside label"),
        ("first,a,b\na,0.5,0.5\n", "0 columns are called label"),
        ("label,target,a,b\na,a,0.5,0.5\n", "2 columns are called label"),
        ("label,a,b\n", "no row"),
    ],
)
def test_a_wrong_table_is_one_line_without_its_values(tmp_path, capsys, text, line):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    code, _, err = _run(capsys, "calibrate", path, "--public")
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"labels": np.zeros(3, dtype=int)}, "0 of the arrays"),
        ({"logits": np.zeros((3, 2)), "probabilities": np.zeros((3, 2)), "labels": np.zeros(3, dtype=int)}, "2 of the"),
        ({"logits": np.zeros((3, 2))}, "no array of labels"),
        ({"logits": np.zeros((3, 2)), "labels": np.zeros(2, dtype=int)}, "3 rows of numbers for 2"),
        ({"logits": np.zeros((3, 2)), "labels": np.zeros(3)}, "whole numbers"),
        ({"logits": np.zeros((3, 2)), "labels": np.array([0, 1, 2])}, "outside 0 to 1"),
        ({"logits": np.full((3, 2), np.nan), "labels": np.zeros(3, dtype=int)}, "not finite"),
        ({"probabilities": np.full((3, 2), 0.7), "labels": np.zeros(3, dtype=int)}, "no probabilities"),
        ({"logits": np.array([[object()]]), "labels": np.zeros(1, dtype=int)}, "plain arrays"),
    ],
)
def test_a_wrong_archive_is_one_line(tmp_path, capsys, arrays, line):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    code, _, err = _run(capsys, "calibrate", path, "--public")
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_is_no_archive_is_one_line(tmp_path, capsys):
    path = tmp_path / "wrong.npz"
    path.write_bytes(b"PK\x03\x04 nonsense")
    assert _run(capsys, "calibrate", path, "--public")[0] == 2


def _seen(**changes):
    return Seen(
        **{
            "temperature": 1.0,
            "std": 0.01,
            "loss": 0.1,
            "fitted": False,
            "private": False,
            "clipping": Clipping.automatic(),
            **changes,
        }
    )


def test_advice_follows_what_was_seen():
    sure = advice(_seen(temperature=1.9))
    assert "Divide the logits by a temperature" in sure[0]
    assert "abadi:10" in sure[1]
    assert "raise the clip bound of 0.1" in advice(_seen(temperature=1.9, clipping=Clipping.abadi(0.1)))[1]
    assert "more steps" in advice(_seen(temperature=0.6))[1]
    assert "by accuracy" in sure[-1]
    assert ".7 to .9" in advice(_seen(temperature=1.9, clipping=Clipping.quantile(0.5)))[2]
    # Within two standard errors of 1 nothing is said against the model.
    assert "Nothing to mend" in advice(_seen(temperature=1.5, std=0.3))[0]
    assert "no ledger holds" in advice(_seen(temperature=1.9, private=True))[-1]
    assert not any("clip bound of" in line for line in advice(_seen(temperature=1.9, clipping=None)))
    assert "again on more rows" in advice(_seen(temperature=1.9, fitted=True))[0]


@pytest.mark.parametrize("temperature", [0.85, 0.9, 1.0, 1.04, 1.2])
@pytest.mark.parametrize("private", [False, True])
def test_near_one_there_is_no_advice(temperature, private):
    assert advice(_seen(temperature=temperature, std=0.001, private=private)) == ()


@pytest.mark.parametrize(("examples", "bound"), [(1000, "0.5"), (50_000, "6")])
def test_the_bound_of_a_tempered_rule_is_that_of_the_model(examples, bound):
    said = " ".join(advice(_seen(temperature=1.4, clipping=tempered_clipping(examples))))
    assert f"whose clip bound is {bound})" in said
    assert "raise the clip bound" not in said
