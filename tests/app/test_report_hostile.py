"""Hostile names and damaged files: the page stays text, loads nothing, or is not written."""

from __future__ import annotations

import errno
import os

import pytest

from app.reported import CERTIFICATE, HOSTILE, PLAN, RESULT, Page, make_run, page_of
from discreet.app.report import read_run, render_report, write_report
from discreet.app.report.parts import MOST_ROWS
from discreet.app.report.text import LONGEST, plain, safe
from discreet.errors import DataError, NotWritten


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
    with pytest.raises(NotWritten, match=r"report\.html: cannot be written \(No space left .* free some space"):
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
