from __future__ import annotations

from pathlib import Path

import pytest
import torch

from discreet.core.clipping import ClippedSum
from discreet.core.rng import seed_key
from discreet.train import secret_files
from discreet.train.journal import SumJournal

KEY = seed_key(1)


def _sum(*numbers: float) -> ClippedSum:
    # Not through the engine: the journal sees numbers only.
    return ClippedSum(tensors={"w": torch.tensor(numbers)}, sensitivity=1.0)


def test_the_same_sum_is_admitted_again_and_another_is_not(tmp_path: Path) -> None:
    journal = SumJournal(tmp_path / "sums", key=KEY)
    assert not journal.whole
    assert journal.admits(0, _sum(1.0, 2.0))
    assert journal.admits(1, _sum(1.0, 2.0))
    again = SumJournal(tmp_path / "sums", key=KEY)
    assert again.whole
    assert again.admits(0, _sum(1.0, 2.0))
    assert not again.admits(0, _sum(1.0, 2.0000002))
    assert not again.admits(1, _sum(1.0))
    assert again.admits(0, _sum(1.0, 2.0))


def test_one_sum_at_two_scales_of_noise_is_two_sums(tmp_path: Path) -> None:
    journal = SumJournal(tmp_path / "sums", key=KEY)
    assert journal.admits(0, _sum(1.0))
    assert not journal.admits(0, ClippedSum(tensors={"w": torch.tensor((1.0,))}, sensitivity=2.0))


def test_sums_of_another_key_are_no_hindrance(tmp_path: Path) -> None:
    SumJournal(tmp_path / "sums", key=KEY).admits(0, _sum(1.0))
    assert SumJournal(tmp_path / "sums", key=seed_key(2)).admits(0, _sum(2.0))


def test_digests_say_nothing_without_the_key(tmp_path: Path) -> None:
    lines = []
    for seed in (1, 2):
        SumJournal(tmp_path / str(seed), key=seed_key(seed)).admits(0, _sum(1.0))
        lines.append((tmp_path / str(seed)).read_text().split()[2])
        assert (tmp_path / str(seed)).stat().st_mode & 0o077 == 0
    assert lines[0] != lines[1]


def test_an_unfinished_line_is_cut_off_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "sums"
    journal = SumJournal(path, key=KEY)
    journal.admits(0, _sum(1.0))
    kept = path.read_bytes()
    for length in range(len(kept)):
        path.write_bytes(kept + kept[:length])
        again = SumJournal(path, key=KEY)
        assert again.whole
        assert path.read_bytes() == kept
    path.write_bytes(kept + b"dam\xffaged\n")
    assert not SumJournal(path, key=KEY).whole


def test_a_full_disk_stops_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = SumJournal(tmp_path / "sums", key=KEY)
    monkeypatch.setattr(secret_files.os, "write", lambda _descriptor, content: len(content) - 1)
    with pytest.raises(OSError, match="No space"):
        journal.admits(0, _sum(1.0))


def test_a_restart_forgets(tmp_path: Path) -> None:
    journal = SumJournal(tmp_path / "sums", key=KEY)
    journal.admits(0, _sum(1.0))
    journal.restart()
    assert journal.admits(0, _sum(2.0))
    assert SumJournal(tmp_path / "sums", key=KEY).whole
