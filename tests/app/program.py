"""The program as the tests of the command line start it, and the small files that they give it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from app.data_files import idx as idx_bytes
from discreet.app.cli import main

ROWS = 2000


def table(path: Path, *, rows: int = ROWS, header: str = "age,job,income") -> Path:
    generator = np.random.default_rng(0)
    ages = generator.integers(18, 80, rows)
    jobs = generator.choice(["clerk", "smith"], rows)
    labels = np.where(ages + 20 * (jobs == "smith") > 60, "high", "low")
    lines = [header, *(f"{age},{job},{label}" for age, job, label in zip(ages, jobs, labels, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_bytes(array)))


def run_program(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


CANARY = "zebra-7f3a"


def must_refuse(workplace: Path, capsys: pytest.CaptureFixture[str], *words: object) -> None:
    """Exit code 2, one line on stderr that is no traceback, nothing on stdout, nothing written."""
    before = sorted(workplace.rglob("*"))
    code, out, err = run_program(capsys, *words)
    assert code == 2, err
    assert out == ""
    assert err.startswith("discreet: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(workplace.rglob("*")) == before
