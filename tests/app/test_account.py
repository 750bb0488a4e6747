"""`discreet account`: whichever number is left out, queries from files, attacks in words, and errors on one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discreet.app.cli import main
from discreet.privacy.accounting import Accountant, Gaussian, Relation, SampledGaussian, epsilon, query_to_json
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan

SIZES = ("account", "--examples", 50_000)
BATCH, STEPS, DELTA = ("--batch-size", 4096), ("--steps", 2500), ("--delta", 1e-5)
SIGMA, EPSILON = ("--noise-multiplier", 3), ("--epsilon", 8)


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _facts(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    code, out, err = _run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_whichever_is_left_out(capsys):
    spent = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, *SIGMA)
    assert spent["answer"] == "epsilon"
    assert spent["epsilon"] == pytest.approx(6.5795, abs=1e-3)
    noise = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, *EPSILON)
    assert noise["answer"] == "noise_multiplier"
    assert noise["noise_multiplier"] == pytest.approx(2.577, abs=1e-3)
    assert 7.992 <= noise["epsilon"] <= 8.0
    steps = _facts(capsys, *SIZES, *BATCH, *DELTA, *SIGMA, *EPSILON)
    assert steps["answer"] == "steps"
    assert 7.992 <= steps["epsilon"] <= 8.0
    assert steps["steps"] > 2500
    assert steps["at_limit"] is False
    batch = _facts(capsys, *SIZES, *STEPS, *DELTA, *SIGMA, *EPSILON)
    assert batch["answer"] == "batch_size"
    assert 7.992 <= batch["epsilon"] <= 8.0
    assert batch["sample_rate"] == batch["batch_size"] / 50_000
    delta = _facts(capsys, *SIZES, *BATCH, *STEPS, *SIGMA, *EPSILON)
    assert delta["answer"] == "delta"
    back = _facts(capsys, *SIZES, *BATCH, *STEPS, *SIGMA, "--delta", delta["delta"])
    assert back["epsilon"] == pytest.approx(8.0, rel=1e-3)


def test_relation_accountant_and_truncation(capsys):
    asked = (*SIZES, *BATCH, *STEPS, *DELTA, *SIGMA)
    found = {
        (relation, accountant, cut): _facts(
            capsys, *asked, "--relation", relation, "--accountant", accountant, *cut
        )["epsilon"]
        for relation in ("add_remove", "replace_one")
        for accountant in ("pld", "rdp")
        for cut in ((), ("--largest-batch", 4300))
    }  # fmt: skip
    for (relation, accountant, cut), value in found.items():
        assert value >= found["add_remove", accountant, ()]
        assert value >= found[relation, "pld", cut]
        assert value >= found[relation, accountant, ()]
    assert found["add_remove", "rdp", ()] == pytest.approx(7.10, abs=0.006)
    noise = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, *EPSILON, "--largest-batch", 4300)
    assert 2.577 < noise["noise_multiplier"] < 3.0
    assert noise["epsilon"] <= 8.0


def test_a_file_of_queries_is_asked_about_or_spent_before(tmp_path: Path, capsys):
    queries = [SampledGaussian(0.05, 2.0, 300), Gaussian(9.0, 2), SampledGaussian(0.1, 3.0, 50)]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps([query_to_json(query) for query in queries]))
    found = _facts(capsys, "account", "--queries", file, *DELTA)
    assert found["epsilon"] == epsilon(queries, delta=1e-5)
    assert found["answer"] == "epsilon"
    back = _facts(capsys, "account", "--queries", file, "--epsilon", found["epsilon"])
    assert back["delta"] == pytest.approx(1e-5, rel=1e-3)
    replaced = _facts(capsys, "account", "--queries", file, *DELTA, "--relation", "replace_one", "--accountant", "rdp")
    assert replaced["epsilon"] == epsilon(queries, delta=1e-5, relation=Relation.REPLACE_ONE, accountant=Accountant.RDP)
    alone = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, *EPSILON)["noise_multiplier"]
    after = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, *EPSILON, "--queries", file)
    assert after["noise_multiplier"] > alone
    assert after["epsilon"] <= 8.0


def test_a_ledger_brings_its_own_delta(tmp_path: Path, capsys):
    plan = Plan.solve(examples=5_000, batch_size=250, steps=200, epsilon=2.0, delta=1e-6)
    with Ledger.create(tmp_path / "ledger.jsonl", plan=plan, key_id="a" * 32, test_mode=False) as ledger:
        ledger.reserve_steps(first=0, count=120)
    for path in (tmp_path, tmp_path / "ledger.jsonl"):
        found = _facts(capsys, "account", "--queries", path)
        assert found["epsilon"] == plan.spent(120)
        assert found["delta"] == 1e-6
    assert _facts(capsys, "account", "--queries", tmp_path, "--epsilon", 2)["delta"] < 1e-6


def test_attacks_as_numbers_table_and_words(capsys):
    asked = (*SIZES, *BATCH, *STEPS, *DELTA, *SIGMA, "--curve")
    found = _facts(capsys, *asked)
    assert found["mu"] == pytest.approx(1.415, abs=0.005)
    assert found["attack"]["0.001"] == pytest.approx(0.046, abs=0.001)
    curve = dict(found["curve"])
    assert curve[0.001] == found["attack"]["0.001"]
    assert max(power - rate for rate, power in curve.items()) <= found["advantage"]
    code, out, _ = _run(capsys, *asked)
    assert code == 0
    assert "false alarms  members found, at most" in out
    assert "1 in 1,000 of those that were not, finds 4.6 % of those that were." in out
    assert "75.8 % of the time" in out


def test_no_noise_is_infinite(capsys):
    found = _facts(capsys, *SIZES, *BATCH, *STEPS, *DELTA, "--epsilon", "inf")
    assert found["noise_multiplier"] == 0.0
    assert found["epsilon"] == found["mu"] == "inf"
    assert found["attack"]["0.001"] == 1.0


def test_limits_are_said(capsys):
    found = _facts(capsys, "account", "--examples", 1000, "--steps", 3, *DELTA, "--noise-multiplier", 500, *EPSILON)
    assert (found["batch_size"], found["at_limit"]) == (1000, True)
    code, out, _ = _run(
        capsys, "account", "--examples", 1000, "--steps", 3, *DELTA, "--noise-multiplier", 500, *EPSILON
    )
    assert code == 0
    assert "at limit" in out


BAD = [
    ((*BATCH, *STEPS, *DELTA, "--epsilon", 0), "--epsilon 0.0: must be above 0"),
    ((*BATCH, *STEPS, *DELTA, "--epsilon", "nan"), "--epsilon nan: must be above 0"),
    ((*BATCH, *STEPS, *DELTA, "--epsilon", -1), "--epsilon -1.0: must be above 0"),
    ((*BATCH, *STEPS, *DELTA, "--epsilon", 1e-9), "epsilon=1e-09: must be from 1e-06 to 1e+06"),
    ((*BATCH, *STEPS, "--delta", 2e-5, *EPSILON), "must be below 1 / examples = 2e-05"),
    ((*BATCH, *STEPS, "--delta", 0, *EPSILON), "--delta 0.0: must be above 0 and below 1"),
    ((*BATCH, *STEPS, "--delta", "nan", *EPSILON), "--delta nan: must be above 0 and below 1"),
    (("--batch-size", 50_001, *STEPS, *DELTA, *EPSILON), "batch_size=50001: must be at most the 50000 examples"),
    (("--batch-size", 0, *STEPS, *DELTA, *EPSILON), "batch_size=0: must be an integer of at least 1"),
    ((*BATCH, "--steps", 0, *DELTA, *EPSILON), "--steps 0: must be at least 1"),
    ((*BATCH, *STEPS, *DELTA, "--noise-multiplier", "nan"), "noise_multiplier=nan: must be finite and at least 0"),
    ((*BATCH, *STEPS, *DELTA, "--noise-multiplier", -1), "noise_multiplier=-1.0: must be finite and at least 0"),
    ((*BATCH, *STEPS, *DELTA, *SIGMA, *EPSILON), "left out: none; must be exactly one of"),
    ((*BATCH, *DELTA, *SIGMA), "left out: --steps, --epsilon; must be exactly one of"),
    ((*BATCH, *STEPS, *DELTA, *SIGMA, "--largest-batch", 0), "largest_batch=0: must be an integer of at least 1"),
    ((*BATCH, *STEPS, *SIGMA, "--delta", 1e-15), "delta=1e-15 over 2500 steps: below"),
    ((*BATCH, *STEPS, *DELTA, *SIGMA, "--relation", "other"), "argument --relation: invalid choice"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line(capsys, words, message):
    code, out, err = _run(capsys, *SIZES, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_bad_files_are_one_line(tmp_path: Path, capsys):
    for name, text, message in (
        ("missing.json", None, "cannot be read"),
        ("broken.json", "{", "not valid JSON"),
        ("object.json", "{}", "must be a JSON list of queries, not dict"),
        ("unknown.json", '[{"type": "laplace"}]', "query type 'laplace'"),
        ("twice.json", '[{"type": "gaussian", "type": "gaussian"}]', "duplicate key"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        code, out, err = _run(capsys, "account", "--queries", tmp_path / name, *DELTA)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
    code, _, err = _run(capsys, "account", "--queries", tmp_path)
    assert code == 1
    assert "ledger.jsonl" in err
    code, _, err = _run(capsys, "account", "--steps", 3, *BATCH, *EPSILON, *DELTA)
    assert code == 2
    assert "--examples is missing" in err


def test_a_budget_that_is_spent_already_has_its_own_exit_code(capsys):
    code, out, err = _run(capsys, *SIZES, "--batch-size", 40_000, *DELTA, "--noise-multiplier", 0.2, "--epsilon", 1)
    assert (code, out) == (3, "")
    assert "one step already spends" in err
