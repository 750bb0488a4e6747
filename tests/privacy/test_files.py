"""Durable files: what happens when the disk is full, the folder is read-only, or two processes want one file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from discreet.errors import LedgerError
from discreet.privacy.files import AppendOnlyFile, write_atomically


def _failing(monkeypatch, name, error):
    def fail(*_arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(f"discreet.privacy.files.os.{name}", fail)


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "one")
    _failing(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "two")
    assert path.read_text() == "one"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_link_beside_the_file_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    (tmp_path / "file.tmp").symlink_to(outside)
    write_atomically(tmp_path / "file", "one")
    assert outside.read_text() == "untouched"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "outside"]


def test_an_interrupted_write_leaves_nothing_beside(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("discreet.privacy.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", "one")
    assert not list(tmp_path.iterdir())


def test_create_append_hold(tmp_path):
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    file.append(b"b\n")
    file.close()
    file.close()
    again, content = AppendOnlyFile.hold(tmp_path / "log")
    assert content == b"a\nb\n"
    again.cut(2)
    again.append(b"c\n")
    again.close()
    assert (tmp_path / "log").read_bytes() == b"a\nc\n"
    with pytest.raises(LedgerError, match="is closed"):
        again.append(b"d\n")


def test_create_refuses_an_existing_file(tmp_path):
    (tmp_path / "log").write_bytes(b"old")
    with pytest.raises(LedgerError, match="exists already"):
        AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    assert (tmp_path / "log").read_bytes() == b"old"


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(LedgerError, match="cannot be created"):
        AppendOnlyFile.create(tmp_path / "no" / "log", first=b"a\n")
    with pytest.raises(LedgerError, match="cannot be opened"):
        AppendOnlyFile.hold(tmp_path / "log")


@pytest.mark.parametrize("name", ["fsync", "write"])
def test_failed_create_leaves_nothing_behind(tmp_path, monkeypatch, name):
    _failing(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(LedgerError, match="No space"):
        AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    assert not list(tmp_path.iterdir())


def test_second_holder_is_refused_in_this_process(tmp_path):
    first = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    with pytest.raises(LedgerError, match="another process"):
        AppendOnlyFile.hold(tmp_path / "log")
    first.close()
    AppendOnlyFile.hold(tmp_path / "log")[0].close()


def test_second_holder_is_refused_in_another_process(tmp_path, repository):
    first = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    program = (
        "import sys; from pathlib import Path; from discreet.errors import LedgerError\n"
        "from discreet.privacy.files import AppendOnlyFile\n"
        "try:\n    AppendOnlyFile.hold(Path(sys.argv[1]))\n"
        "except LedgerError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    assert "another process is writing it" in done.stdout
    first.close()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    assert done.stdout == ""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["write", "fsync"])
def test_failed_append_leaves_the_old_content_and_refuses_more(tmp_path, monkeypatch, name, error):
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    with monkeypatch.context() as patch:
        _failing(patch, name, error)
        with pytest.raises(LedgerError, match="record not written"):
            file.append(b"b\n")
    assert (tmp_path / "log").read_bytes() == b"a\n"
    with pytest.raises(LedgerError, match="in doubt"):
        file.append(b"c\n")
    file.close()


def test_half_written_line_is_cut_back(tmp_path, monkeypatch):
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    write = os.write
    monkeypatch.setattr("discreet.privacy.files.os.write", lambda descriptor, line: write(descriptor, line[:3]))
    with pytest.raises(LedgerError, match="record not written"):
        file.append(b"bbbbbb\n")
    assert (tmp_path / "log").read_bytes() == b"a\n"
    file.close()


def test_file_size_limit_of_the_system(tmp_path, repository):
    """A real limit, not a fake: the process may write 4,096 bytes per file, and no line may be half there."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from discreet.errors import LedgerError\n"
        "from discreet.privacy.files import AppendOnlyFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "file = AppendOnlyFile.create(Path(sys.argv[1]), first=b'x' * 99 + b'\\n')\n"
        "count = 1\n"
        "try:\n"
        "    while True:\n"
        "        file.append(b'y' * 99 + b'\\n'); count += 1\n"
        "except LedgerError as error:\n"
        "    print(count, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    assert done.stdout.startswith("40 ")
    assert "record not written" in done.stdout
    assert len((tmp_path / "log").read_bytes()) == 4_000


def test_change_by_somebody_else_is_seen(tmp_path):
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    with open(tmp_path / "log", "ab") as other:
        other.write(b"stranger\n")
    with pytest.raises(LedgerError, match="changed or replaced"):
        file.append(b"b\n")
    assert (tmp_path / "log").read_bytes() == b"a\nstranger\n"
    file.close()


@pytest.mark.parametrize("replacement", [None, b"a\n"])
def test_replacement_and_removal_are_seen(tmp_path, replacement):
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    (tmp_path / "log").unlink()
    if replacement is not None:
        (tmp_path / "log").write_bytes(replacement)
    with pytest.raises(LedgerError, match="changed or replaced"):
        file.append(b"b\n")
    file.close()


def test_append_syncs_before_it_returns(tmp_path, monkeypatch):
    events = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr("discreet.privacy.files.os.write", lambda d, line: events.append("write") or write(d, line))
    monkeypatch.setattr("discreet.privacy.files.os.fsync", lambda d: events.append("fsync") or fsync(d))
    file = AppendOnlyFile.create(tmp_path / "log", first=b"a\n")
    assert events == ["write", "fsync", "fsync"]  # the line, then the folder's entry
    file.append(b"b\n")
    assert events[3:] == ["write", "fsync"]
    file.close()


def test_what_could_not_be_written_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomically(path, "old")

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_text() == "old"
