"""Figures and page of a run that has ended: written as far as the system lets, and what is missing is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from app.reported import RESULT as FIGURES
from app.reported import make_run
from discreet.app import results
from discreet.app.results import CALIBRATION, RESULT, Written, write_results
from discreet.errors import NotWritten

RECORDS = {RESULT: FIGURES, CALIBRATION: {"ece": 0.01}}


def _refuse(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    true_write = results.write_atomically

    def write(path: Path, text: str) -> None:
        if path.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true_write(path, text)

    monkeypatch.setattr(results, "write_atomically", write)


def test_all_is_written_and_nothing_is_told(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    written = write_results(run_dir, RECORDS)
    assert written == Written(run_dir)
    assert written.page == run_dir / "release" / "report.html"
    assert written.page.exists()
    written.raise_if_missing()


def test_one_file_that_is_refused_keeps_no_other_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that stand nowhere else are told to be kept; the page is made from what there is."""
    run_dir = make_run(tmp_path / "r")
    _refuse(monkeypatch, RESULT)
    written = write_results(run_dir, RECORDS)
    assert written.missing == (RESULT,)
    assert (run_dir / "release" / CALIBRATION).exists()
    assert written.page is not None
    with pytest.raises(NotWritten, match=r"result\.json cannot be written \(No space .* keep what is printed") as told:
        written.raise_if_missing()
    assert "discreet report" not in str(told.value)


def test_a_page_of_before_is_not_left_where_the_new_one_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "r")
    page = run_dir / "release" / "report.html"
    page.write_text("while it went on")
    _refuse(monkeypatch, CALIBRATION, "report.html")
    written = write_results(run_dir, RECORDS)
    assert (written.missing, written.page) == ((CALIBRATION, "report.html"), None)
    assert not page.exists()
    with pytest.raises(NotWritten, match=r"calibration\.json and report\.html cannot be written") as told:
        written.raise_if_missing()
    assert "keep what is printed here" in str(told.value)
    assert str(told.value).endswith("writes the page.")
    assert "\n" not in str(told.value)


def test_a_damaged_release_is_a_missing_page_too(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "r")
    (run_dir / "release" / "check.json").write_text("{")
    assert write_results(run_dir, RECORDS).missing == ("report.html",)
