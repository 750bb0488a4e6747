"""Files of the private half: mode 0600, and written whole or reported as not written."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def replace_secret(path: Path, content: bytes) -> None:
    """Replace a file durably: beside it, fsync, rename, fsync of the folder.

    Raises:
        OSError: the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _write(temporary, content, flags=os.O_TRUNC, durable=True)
    temporary.rename(path)
    sync(path.parent)


def append_secret(path: Path, line: bytes) -> None:
    """Append a line. It survives the death of the process, and is not synced.

    Raises:
        OSError: the line is not there, or not whole.
    """
    _write(path, line, flags=os.O_APPEND, durable=False)


def cut_secret(path: Path, size: int) -> None:
    """Cut everything after ``size`` bytes off."""
    os.truncate(path, size)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, *, flags: int, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
