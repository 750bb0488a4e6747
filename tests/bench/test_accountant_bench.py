"""The accountant's benchmark: random questions have right answers, and wrong answers are seen."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bench import accountant as bench

QUESTIONS = bench.questions(32, seed=7)


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_random_questions(question):
    """Never above the target, at most 0.5 % too much noise, monotone; the benchmark itself asks a thousand."""
    row = bench.random_row(*question)
    assert row["wrong"] == "", row
    assert "refused" in row or row["evaluations"] <= 3


@pytest.mark.parametrize(("factor", "fault"), [(1.02, "0.5 % too much noise"), (0.99, "not the reported value")])
def test_a_wrong_answer_is_seen(monkeypatch, factor, fault):
    solve = bench.solve_noise

    def wrong(**question):
        found = solve(**question)
        return dataclasses.replace(found, noise_multiplier=factor * found.noise_multiplier)

    monkeypatch.setattr(bench, "solve_noise", wrong)
    assert fault in bench.random_row(0.02, 300, 2.0, 1e-6, bench.Relation.ADD_REMOVE, "delta")["wrong"]


def test_it_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "POINTS", bench.POINTS[6:9])
    assert bench.main(["--random", "3", "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "De et al., CIFAR-100" in printed
    assert "wrong: 0" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert [len(written["published"]), len(written["random"])] == [3, 3]
