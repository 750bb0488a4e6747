"""The benchmark of clipping rules: its table, its verdict, and that it makes only what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import calibration as bench
from discreet.app.data import SetApart


def _row(rule: str, seed: int, accuracy: float, nll: float, ece: float) -> dict[str, object]:
    return {"data": "adult", "rule": rule, "seed": seed, "accuracy": accuracy, "nll": nll, "ece": ece}


ROWS = [
    _row(bench.AUTO, 0, 0.85, 0.30, 0.01),
    _row(bench.AUTO, 1, 0.86, 0.32, 0.03),
    _row(bench.SMALL_R, 0, 0.86, 0.70, 0.10),
    _row("abadi 10", 0, 0.84, 0.31, 0.02),
]


def test_the_verdict_compares_means_with_the_best_of_each() -> None:
    said = bench.table(ROWS).splitlines()[-1]
    assert (
        said
        == "adult: default loses 0.50 points of accuracy to the best rule, NLL +0.0 %, ECE 0.20 of that of abadi .1"
    )


def test_the_table_of_the_documentation_has_the_means_and_marks_the_best() -> None:
    lines = bench.markdown(ROWS).splitlines()
    assert lines[2] == "| auto | .855 | **.310** | **.020** |"
    assert f"| {bench.SMALL_R} | **.860** | .700 | .100 |" in lines
    assert "| psac .1 |  |  |  |" in lines


def test_a_private_temperature_is_compared_with_single_rules_and_is_none_itself() -> None:
    said = bench.table([*ROWS, _row(bench.PRIVATE_T, 0, 0.9, 0.30, 0.01)]).splitlines()[-1]
    assert "loses 0.50 points" in said
    assert "NLL +0.0 % (-3.2 % with a private temperature)" in said


def test_the_part_that_is_set_apart_and_the_rest_are_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (300, 1, 2, 2), generator=generator, dtype=torch.uint8)
    rows = bench.Rows(images, torch.randint(10, (300,), generator=generator))
    kept, apart = bench._split(rows, SetApart())
    assert len(kept) + len(apart) == 300
    assert 30 < len(apart) < 90
    assert bench._split(rows, None) == (rows, None)


def test_only_missing_runs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, made = tmp_path / "out.json", []
    out.write_text(json.dumps({"rows": ROWS}))
    monkeypatch.setattr(bench, "open_workload", lambda name, folder, seed, apart: type("W", (), {"train": [0] * 10}))
    monkeypatch.setattr(
        bench, "run", lambda workload, rule, seed: made.append(rule) or {"accuracy": 0.8, "nll": 0.4, "ece": 0.1}
    )
    asked = ["--data", "x", "--sets", "adult", "--rules", f"{bench.AUTO};abadi 1", "--seeds", "2", "--out", str(out)]
    assert bench.main(asked) == 0
    assert len(made) == 2
    assert len(json.loads(out.read_text())["rows"]) == len(ROWS) + 2
    assert bench.main(asked) == 0
    assert len(made) == 2
