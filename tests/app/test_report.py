"""The report: what it says, what it refuses to say, and what hostile names cannot make it do."""

from __future__ import annotations

import errno
import json
import math
import os
from html.parser import HTMLParser

import pytest

from discreet.app.report import Stamp, plots, read_run, render_report, write_report
from discreet.app.report.meaning import certainty, found_members
from discreet.app.report.parts import MOST_ROWS
from discreet.app.report.rate import rate_section
from discreet.app.report.record import Metric, RunRecord
from discreet.app.report.story import budget_shares
from discreet.app.report.text import LONGEST, duration, percent, plain, safe, scientific, upward, wilson
from discreet.errors import DataError
from discreet.privacy.accounting import Gaussian
from discreet.privacy.certificate import write_certificate
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>1</script>",
    "javascript:alert(1)",
    "\u202egnp.exe\u202c",
    "\u2066\u2069\u200f\u061c",
    "\x00\x1b[31m\r\n",
    "\ud800",
    "<!--",
    "]]><svg onload=1>",
    "=HYPERLINK(1)",
    "&lt;b&gt;",
    "N" * 1_000_000,
]

PLAN = {
    "examples": 32561,
    "batch_size": 2048,
    "steps": 1200,
    "noise_multiplier": 3.41,
    "epsilon": 3.0,
    "delta": 1.086e-5,
    "relation": "add_remove",
    "accountant": "pld",
    "clipping": {"kind": "automatic", "style": "flat", "clip_bound": 1.0, "gamma": 0.01},
    "before": [
        {"type": "gaussian", "noise_multiplier": 9.0, "count": 1},
        {"type": "selection", "delta": 1e-7},
    ],
    "versions": {"torch": "2.13.0"},
}
CERTIFICATE = {
    "private": True,
    "epsilon": 2.9984,
    "delta": 1.086e-5,
    "unit": "one row",
    "adjacency": "add_remove",
    "accountant": "pld",
    "queries": [
        {"type": "gaussian", "noise_multiplier": 9.0, "count": 1},
        {"type": "selection", "delta": 1e-7},
        {"type": "sampled_gaussian", "sample_rate": 2048 / 32561, "noise_multiplier": 3.41, "count": 1200},
    ],
    "not_covered": ["the test rows", "other runs on the same data"],
    "ledger": {"head": "9f2c", "records": 1207},
}
RESULT = {
    "epsilon": 2.9984,
    "delta": 1.086e-5,
    "noise_multiplier": 3.41,
    "steps": 1200,
    "examples": 32561,
    "seconds": 143.2,
    "private": True,
    "model": {"kind": "mlp", "width": 128, "classes": 2, "input": {"kind": "table", "features": 104}},
    "test": {"accuracy": 0.8493, "nll": 0.3262, "ece": 0.0121, "examples": 16281},
    "statements": ["Bounds are public."],
}
CHECK = {"passed": True, "rows": [{"name": "w", "what": "norms", "status": "passed", "detail": "error 1e-7"}]}
SCHEMA = {
    "columns": [{"name": "age", "source": "public", "encodings": [{"as": "number", "min": 17, "max": 90}]}],
    "target": {"name": "income", "classes": ["no", "yes"], "source": "public"},
}
METRICS = [
    {"step": step, "epsilon": step / 400, "learning_rate": 0.001, "test_accuracy": 0.8} for step in range(0, 1201, 100)
]


class Page(HTMLParser):
    """What a browser would see: elements, attributes, and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


def make_run(folder, **changes):
    """A run folder with good files, except for those that ``changes`` replaces; None leaves a file out."""
    files = {
        "plan": PLAN,
        "certificate": CERTIFICATE,
        "result": RESULT,
        "check": CHECK,
        "schema": SCHEMA,
        **changes,
    }
    metrics = files.pop("metrics", METRICS)
    release = folder / "release"
    release.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (release / f"{name}.json").write_text(text, encoding="utf-8")
    if metrics is not None:
        text = metrics if isinstance(metrics, str) else "".join(json.dumps(line) + "\n" for line in metrics)
        (release / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


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


# --- hostile content --------------------------------------------------------------------------------------------------


def poisoned(name):
    """Every text of every file replaced by ``name``."""
    query = {"type": name, "name": name, "noise_multiplier": 2.0, "count": 1}
    return {
        "plan": {**PLAN, "relation": name, "clipping": {name: name}, "before": [query], "versions": {name: name}},
        "certificate": {
            **CERTIFICATE,
            **dict.fromkeys(("unit", "adjacency", "accountant", "statement"), name),
            "queries": [query],
            "not_covered": [name],
            "ledger": {"head": name, "records": name},
        },
        "result": {**RESULT, "model": {"kind": name}, "statements": [name]},
        "check": {"passed": True, "rows": [{"name": name, "what": name, "status": name, "detail": name}]},
        "schema": {
            "columns": [{"name": name, "source": name, "encodings": [{"as": name, "values": [name]}]}],
            "target": {"name": name, "classes": [name, name], "source": name},
        },
    }


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(tmp_path, name):
    calm = page_of(make_run(tmp_path / "calm", **poisoned("name")))
    page = page_of(make_run(tmp_path / "run", **poisoned(name)))
    assert sorted(set(page.tags)) == sorted(set(calm.tags))
    assert page.tags == calm.tags
    assert {key for key, _ in page.attributes} == {key for key, _ in calm.attributes}
    assert "script" not in page.tags
    assert not [key for key, _ in page.attributes if key.startswith("on")]


@pytest.mark.parametrize("name", ["<b>x</b>", "a'b\"c", "x&y", "\u202egnp"])
def test_a_hostile_run_folder_name_stays_text(tmp_path, name):
    page = page_of(make_run(tmp_path / name.replace("/", "_")))
    assert "b" not in page.tags
    assert "\u202e" not in page.words


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_safe_text_has_no_markup_and_no_hidden_characters(name):
    text = safe(name)
    assert not set(text) & set("<>\"'\u202e\u2066\u200f\x00\x1b\r\n")
    assert len(text) <= 6 * LONGEST
    text.encode("utf-8")


def test_a_huge_name_does_not_make_a_huge_page(tmp_path):
    path = write_report(make_run(tmp_path / "r", **poisoned("N" * 1_000_000)))
    assert path.stat().st_size < 200_000


def test_many_rows_are_cut_with_a_count(tmp_path):
    columns = [{"name": f"c{i}", "source": "public", "encodings": []} for i in range(5000)]
    path = write_report(make_run(tmp_path / "r", schema={"columns": columns}))
    assert f"and {plain(5000 - MOST_ROWS)} more rows" in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 200_000


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    text = write_report(make_run(tmp_path / "r")).read_text(encoding="utf-8")
    page = Page(text)
    policy = dict(page.attributes)["content"]
    policies = [value for key, value in page.attributes if key == "content" and "default-src" in value]
    assert policy is not None
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert "://" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "base", "a"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key in {"src", "srcset", "action", "data", "ping"}]
    references = [value for key, value in page.attributes if key.endswith("href")]
    assert all(value.startswith("#") for value in references)
    assert "url(" not in text.replace("url(#", "")


def test_a_link_in_place_of_the_page_is_replaced_and_not_followed(tmp_path):
    folder = make_run(tmp_path / "r")
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    (folder / "release" / "report.html").symlink_to(outside)
    path = write_report(folder)
    assert outside.read_text() == "untouched"
    assert not path.is_symlink()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_beside_the_page(tmp_path, monkeypatch, call):
    folder = make_run(tmp_path / "r")
    before = sorted(item.name for item in (folder / "release").iterdir())

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"discreet.privacy.files.os.{call}", full)
    with pytest.raises(DataError, match=r"report\.html: cannot be written \(No space left .* free some space"):
        write_report(folder)
    assert sorted(item.name for item in (folder / "release").iterdir()) == before


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"plan": None}, "plan.json"),
        ({"plan": "{}"}, "plan.json"),
        ({"plan": '{"examples": 1'}, "plan.json"),
        ({"plan": "[1, 2]"}, "plan.json"),
        ({"plan": '{"epsilon": 3, "epsilon": 1}'}, "plan.json"),
        ({"certificate": ""}, "certificate.json"),
        ({"certificate": {**CERTIFICATE, "not_covered": []}}, "certificate.json"),
        ({"result": "nonsense"}, "result.json"),
        ({"check": "null"}, "check.json"),
        ({"schema": "[" * 100_000}, "schema.json"),
        ({"result": '{"seconds": ' + "9" * 5000 + "}"}, "result.json"),
        ({"metrics": '{"step": 1}\n{"step": oops}\n'}, "metrics.jsonl: line 2"),
        ({"metrics": '{"step": -1}\n'}, "metrics.jsonl: line 1"),
        ({"metrics": '{"step": true}\n'}, "metrics.jsonl: line 1"),
        ({"metrics": "[]\n"}, "metrics.jsonl: line 1"),
        ({"metrics": "\n"}, "metrics.jsonl: line 1"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, changes, named):
    folder = make_run(tmp_path / "r", **changes)
    with pytest.raises(DataError) as caught:
        write_report(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "release" / "report.html").exists()


def test_bytes_that_are_no_text_are_named(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "release" / "result.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(DataError, match=r"result\.json: not UTF-8 at byte 11"):
        write_report(folder)


def test_a_link_is_not_read(tmp_path):
    folder = make_run(tmp_path / "r", result=None)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "release" / "result.json").symlink_to(secret)
    with pytest.raises(DataError, match=r"result\.json: is a link"):
        write_report(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json: missing"):
        write_report(tmp_path)


def test_a_last_line_torn_by_a_crash_is_left_out(tmp_path):
    run = read_run(make_run(tmp_path / "r", metrics='{"step": 1, "epsilon": 0.5}\n{"step": 2, "eps'))
    assert [metric.step for metric in run.metrics] == [1]


@pytest.mark.parametrize("value", ["NaN", '"text"', "null", "true", "[1]"])
def test_metrics_that_are_no_numbers_are_left_out(tmp_path, value):
    run = read_run(make_run(tmp_path / "r", metrics=f'{{"step": 1, "epsilon": {value}, "test_nll": 0.5}}\n'))
    assert run.metrics[0].values == {"test_nll": 0.5}


@pytest.mark.parametrize(
    "key", ["examples", "batch_size", "steps", "delta", "before", "clipping", "accountant", "relation"]
)
def test_each_optional_key_of_the_plan_may_be_absent(tmp_path, key):
    plan = {name: value for name, value in PLAN.items() if name != key}
    assert "Check it yourself" in render_report(read_run(make_run(tmp_path / "r", plan=plan)))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.9981, "2.999"), (3.0, "3.000"), (0.0, "0.000"), (1e-9, "0.001"), (math.inf, "∞"), (None, "unknown")],
)
def test_epsilon_is_rounded_up(value, shown):
    assert upward(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0801e-5, "1.09 × 10⁻⁵"), (1e-7, "1.00 × 10⁻⁷"), (9.999e-6, "1.00 × 10⁻⁵"), (0.0, "0"), (None, "unknown")],
)
def test_delta_is_rounded_up(value, shown):
    assert scientific(value) == shown


def test_plain_figures():
    assert plain(32561.0) == "32\u202f561"
    assert plain(0.5) == "0.5"
    assert plain(None) == "unknown"
    assert percent(0.8493) == "84.9\u202f%"
    assert [duration(value).replace("\u00a0", " ") for value in (4.21, 200, 7500, None)] == [
        *("4.2 s", "3 min 20 s", "2 h 05 min", "unknown")
    ]


def test_wilson_interval_against_the_published_example():
    low, high = wilson(0.0, count=10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson(0.81, count=263)
    assert (low, high) == pytest.approx((0.7583, 0.8529), abs=2e-3)


def test_certainty_follows_the_odds():
    assert certainty(0.0, delta=0.0, prior=0.3) == pytest.approx(0.3)
    assert certainty(math.log(3), delta=0.0, prior=0.5) == pytest.approx(0.75)
    assert certainty(math.inf, delta=0.0, prior=0.5) == 1.0
    assert certainty(5000.0, delta=0.1, prior=0.5) == 1.0


def test_found_members_is_the_optimal_test_of_randomised_response():
    # Randomised response at epsilon = ln 3 keeps the truth with probability 3/4: at 25 % false alarms it finds 75 %.
    assert found_members(math.log(3), delta=0.0, false_alarms=0.25) == pytest.approx(0.75)
    assert found_members(0.0, delta=0.0, false_alarms=0.01) == pytest.approx(0.01)
    assert found_members(1e4, delta=0.0, false_alarms=0.01) == pytest.approx(1.0)
    assert found_members(math.inf, delta=0.0, false_alarms=0.01) == 1.0


def test_every_answer_that_a_learning_rate_rests_on_is_shown() -> None:
    probe = {"probe_displacement": 0.25, "probe_rise": 1.234, "probe_noise": 0.1, "probe_rate": 0.021}

    def run(*metrics: Metric) -> RunRecord:
        return RunRecord(name="run", plan={}, certificate={}, result={}, check={}, schema={}, metrics=tuple(metrics))

    page = rate_section(run(Metric(step=1, values={"loss_level": 2.0}), Metric(step=2, values=probe)))
    for text in ("0.25", "+1.23 ± 0.10", "0.021"):
        assert text in page
    assert rate_section(run(Metric(step=1, values={"learning_rate": 0.02}))) == ""
