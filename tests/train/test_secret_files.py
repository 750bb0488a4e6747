from __future__ import annotations

from pathlib import Path

import pytest

from discreet.train import secret_files
from discreet.train.secret_files import append_secret, cut_secret, replace_secret


def test_written_whole_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    replace_secret(path, b"one\n")
    append_secret(path, b"two\n")
    append_secret(tmp_path / "other", b"x")
    assert path.read_bytes() == b"one\ntwo\n"
    cut_secret(path, 4)
    assert path.read_bytes() == b"one\n"
    replace_secret(path, b"3")
    assert path.read_bytes() == b"3"
    assert {item.stat().st_mode & 0o777 for item in tmp_path.iterdir()} == {0o600}


def test_a_short_write_is_an_error_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key cut short would be a key that others can guess."""
    path = tmp_path / "secret"
    replace_secret(path, b"old")
    monkeypatch.setattr(secret_files.os, "write", lambda _descriptor, content: len(content) - 1)
    with pytest.raises(OSError, match="No space"):
        replace_secret(path, b"new")
    assert path.read_bytes() == b"old"
