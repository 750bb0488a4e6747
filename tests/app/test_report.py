"""The report: what it says, what it refuses to say, and what hostile names cannot make it do."""

from __future__ import annotations

import math

import pytest

from app.reported import CERTIFICATE, CHECK, PLAN, RESULT, SCHEMA, make_run, page_of
from discreet.app.report import Stamp, plots, read_run, write_report
from discreet.app.report.believed import verdict
from discreet.app.report.rate import rate_section
from discreet.app.report.record import Metric, RunRecord
from discreet.app.report.story import budget_shares
from discreet.app.report.text import upward
from discreet.privacy.accounting import Gaussian
from discreet.privacy.certificate import write_certificate
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan

# --- what it says -----------------------------------------------------------------------------------------------------


def test_a_private_run_states_its_figures_and_no_stamp(tmp_path):
    words = page_of(make_run(tmp_path / "adult")).words
    assert "A multilayer perceptron of width 128, trained on 32 561 examples in 2" in words
    for expected in (
        "adult",
        "2.999",
        "1.09 × 10⁻⁵",
        "84.93",
        "84.4",
        "85.5",
        "the test rows",
        "Bounds are public.",
        "9f2c",
    ):
        assert expected in words
    assert "NOT PRIVATE" not in words
    assert "UNVERIFIED" not in words
    assert "discreet verify adult" in words


def test_a_constant_answer_stands_beside_the_accuracy_under_the_same_stamp(tmp_path):
    test = {**RESULT["test"], "constant_accuracy": 0.7638}
    words = page_of(make_run(tmp_path / "r", result={**RESULT, "test": {**test, "stamp": "NON-PRIVATE"}})).words
    assert "on held-out rows, NON-PRIVATE; always the commonest class: 76.4" in words
    assert "Always the commonest class, NON-PRIVATE" in words
    assert "76.38" in words
    words = page_of(make_run(tmp_path / "s", result={**RESULT, "test": test})).words
    assert "on held-out rows; always the commonest class: 76.4" in words
    assert "NON-PRIVATE" not in words


def test_a_verdict_on_rows_of_a_listed_class_names_them():
    record = {"accuracy": 0.62, "gap": 0.04, "ece": 0.05, "ece_floor": 0.01, "ece_floor_high": 0.02}
    assert verdict(record).startswith("On average it says 66.0\u202f% and is right 62.0\u202f%")
    record |= {"listed_accuracy": 0.92, "unlisted": 276, "listed": 571, "examples": 847}
    assert verdict(record).startswith(
        "On rows of a listed class it says on average 96.0\u202f% and is right 92.0\u202f%"
    )


def test_what_somebody_may_believe_afterwards_has_its_delta(tmp_path):
    words = page_of(make_run(tmp_path / "adult")).words
    assert "At most this sure afterwards, except with probability δ = 1.09 × 10⁻⁵" in words


def test_the_page_is_where_the_design_says_and_is_a_function_of_the_run(tmp_path):
    run = make_run(tmp_path / "adult")
    path = write_report(run)
    assert path == run / "release" / "report.html"
    first = path.read_bytes()
    assert write_report(run).read_bytes() == first
    assert {entry.name for entry in path.parent.iterdir()} == {
        *("plan.json", "certificate.json", "result.json", "check.json", "schema.json", "metrics.jsonl", "report.html")
    }


def test_sections_stand_in_reading_order(tmp_path):
    words = page_of(make_run(tmp_path / "adult")).words
    headings = [
        "The guarantee",
        "What is not covered",
        "How good the model is",
        "Where the budget went",
        "How it went",
        "The data",
        "The self-check",
        "The plan",
        "Check it yourself",
    ]
    places = [words.index(heading) for heading in headings]
    assert places == sorted(places)


def test_only_a_plan_still_gives_a_page_that_claims_nothing(tmp_path):
    folder = make_run(tmp_path / "r", certificate=None, result=None, check=None, schema=None, metrics=None)
    words = page_of(folder).words
    assert "UNVERIFIED" in words
    assert "This run carries no guarantee." in words
    assert "factor of" not in words


@pytest.mark.parametrize(
    "changes",
    [
        {"certificate": {**CERTIFICATE, "private": False}},
        {"result": {**RESULT, "private": False}},
        {"plan": {**PLAN, "noise_multiplier": 0.0, "epsilon": "inf"}},
        {"plan": {**PLAN, "private": False}},
    ],
)
def test_one_file_that_says_not_private_is_enough(tmp_path, changes):
    folder = make_run(tmp_path / "r", **changes)
    assert read_run(folder).stamp is Stamp.NOT_PRIVATE
    words = page_of(folder).words
    assert "NOT PRIVATE" in words
    assert "factor of" not in words
    assert "2.999" not in words.split("The plan")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"certificate": None},
        {"certificate": {key: value for key, value in CERTIFICATE.items() if key != "private"}},
        {"certificate": {**CERTIFICATE, "private": "true"}},
        {"certificate": {**CERTIFICATE, "epsilon": 2.5}},
        {"certificate": {**CERTIFICATE, "delta": 1e-9}},
    ],
)
def test_a_claim_that_is_absent_or_contradicted_is_unverified(tmp_path, changes):
    folder = make_run(tmp_path / "r", **changes)
    assert read_run(folder).stamp is Stamp.UNVERIFIED
    assert "UNVERIFIED" in page_of(folder).words


def test_of_two_epsilons_the_larger_is_shown(tmp_path):
    run = read_run(make_run(tmp_path / "r", certificate={**CERTIFICATE, "epsilon": 2.5}))
    assert run.epsilon == 2.9984
    assert run.contradictions == ("epsilon",)


def test_unknown_keys_never_reach_the_page(tmp_path):
    canary = "canary-5181"
    metrics = [{"step": 1, "epsilon": 0.1, "gradient_norm": canary}, {"step": 2, "epsilon": 0.2, "loss": canary}]
    folder = make_run(
        tmp_path / "r",
        result={**RESULT, "note": canary},
        check={**CHECK, "extra": canary},
        schema={**SCHEMA, "row": canary},
        metrics=metrics,
    )
    (folder / "private").mkdir()
    (folder / "private" / "key").write_text(canary)
    assert canary not in write_report(folder).read_text(encoding="utf-8")


def test_a_failed_check_is_said_in_words(tmp_path):
    rows = [{"name": "bn", "what": "isolation", "status": "failed", "detail": "losses depend on others"}]
    words = page_of(make_run(tmp_path / "r", check={"passed": False, "rows": rows})).words
    assert "The self-check failed." in words
    assert "FAILED" in words


@pytest.mark.parametrize("changes", [{}, {"certificate": None}])
def test_budget_shares_are_squared_signal_to_noise(tmp_path, changes):
    shares = budget_shares(read_run(make_run(tmp_path / "r", **changes)))
    rate = 2048 / 32561
    assert [share.share for share in shares] == pytest.approx([1200 * rate**2 * math.expm1(3.41**-2), 1 / 81])


@pytest.mark.parametrize(
    ("key", "value"), [("type", "other"), ("count", -1), ("noise_multiplier", 0), ("sample_rate", 7)]
)
def test_a_query_that_makes_no_sense_takes_no_share(tmp_path, key, value):
    query = {"type": "sampled_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "count": 10, key: value}
    run = read_run(make_run(tmp_path / "r", certificate={**CERTIFICATE, "queries": [query]}))
    assert budget_shares(run) == []


def test_a_real_plan_ledger_and_certificate_become_a_page(tmp_path):
    folder = tmp_path / "real"
    (folder / "release").mkdir(parents=True)
    before = Gaussian(noise_multiplier=20.0)
    plan = Plan.solve(examples=1000, batch_size=100, steps=20, noise_multiplier=2.0, delta=1e-5, before=(before,))
    plan.save(folder / "release" / "plan.json")
    with Ledger.create(folder / "ledger.jsonl", plan=plan, key_id="0" * 64, test_mode=False) as ledger:
        ledger.reserve_query("statistics", before)
        ledger.reserve_steps(first=0, count=20)
        ledger.finish()
    write_certificate(folder)
    run = read_run(folder)
    assert run.stamp is Stamp.PRIVATE
    words = page_of(folder).words
    assert upward(plan.epsilon) in words
    for expected in (
        "Poisson",
        "Conclusions about a person",
        "Training, 20 steps",
        "Private statistics before training",
    ):
        assert expected in words


# --- without the extra ------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_page_says_which_extra_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    page = page_of(make_run(tmp_path / "r"))
    assert "svg" not in page.tags
    assert "discreet[report]" in page.words


def test_with_matplotlib_each_recorded_curve_is_drawn_once(tmp_path):
    pytest.importorskip("matplotlib")
    page = page_of(make_run(tmp_path / "r"))
    assert page.tags.count("svg") == 3
    names = [value for key, value in page.attributes if key == "id"]
    assert len(names) == len(set(names))


def test_long_records_are_thinned_and_keep_their_end():
    points = [(step, float(step)) for step in range(10_000)]
    kept = plots.thinned(points)
    assert len(kept) <= plots.MOST_POINTS + 1
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert plots.thinned([]) == []


def test_every_answer_that_a_learning_rate_rests_on_is_shown() -> None:
    probe = {"probe_displacement": 0.25, "probe_rise": 1.234, "probe_noise": 0.1, "probe_rate": 0.021}

    def run(*metrics: Metric) -> RunRecord:
        return RunRecord(name="run", plan={}, certificate={}, result={}, check={}, schema={}, metrics=tuple(metrics))

    page = rate_section(run(Metric(step=1, values={"loss_level": 2.0}), Metric(step=2, values=probe)))
    for text in ("0.25", "+1.23 ± 0.10", "0.021"):
        assert text in page
    assert rate_section(run(Metric(step=1, values={"learning_rate": 0.02}))) == ""
