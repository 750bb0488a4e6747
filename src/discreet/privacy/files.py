"""Durable files: written whole or not at all, or appended to by exactly one process. Every write is synced."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from discreet.errors import ConfigError, LedgerError


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: beside it, fsync, rename, fsync of the folder.

    A link of that name is replaced and not followed, and so is what an earlier crash, or somebody else, left beside it.

    Raises:
        OSError: the old content is untouched, and nothing lies beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    _remove(temporary)
    with ExitStack() as on_failure:  # an interrupt included
        on_failure.callback(_remove, temporary)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        on_failure.pop_all()
    _sync_folder(path.parent)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file that is made for this alone, against all others that ask for it, in whatever process.

    A file and no folder: to be locked over a network, it must be open for writing.

    Raises:
        ConfigError: another one has it.
        OSError: it cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another process is starting a run here; name another directory.") from None
        yield
    finally:
        os.close(descriptor)


class AppendOnlyFile:
    """A file that one process holds, and only ever makes longer (or cuts its own unfinished line off).

    **Guarantees.** When `append` returns, the bytes are on disk. When it raises, this object refuses every later
    append: after a failed sync nobody knows what is on disk but a fresh reader. A second holder, in any process, is
    refused.
    """

    def __init__(self, path: Path, descriptor: int, *, size: int) -> None:
        self.path, self._descriptor, self._size = path, descriptor, size
        self._broken = False
        self._open = True

    @classmethod
    def create(cls, path: Path, *, first: bytes) -> AppendOnlyFile:
        """A new file that holds ``first``, durable with its folder's entry.

        Raises:
            LedgerError: it exists, or cannot be written; then nothing is left behind.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileExistsError:
            raise LedgerError(f"{path}: exists already; resume that run, or choose another run directory.") from None
        except OSError as error:
            raise LedgerError(f"{path}: cannot be created ({_why(error)}); choose a writable run directory.") from None
        file = cls(path, descriptor, size=0)
        with ExitStack() as on_failure:  # an interrupt included: the lock must not outlive the attempt
            on_failure.callback(file.close)
            try:
                file._lock()
                file.append(first)
                _sync_folder(path.parent)
            except OSError as error:
                file._discard()
                raise LedgerError(f"{path}: cannot be made durable ({_why(error)}); nothing was released.") from None
            except LedgerError:
                file._discard()
                raise
            on_failure.pop_all()
        return file

    @classmethod
    def hold(cls, path: Path) -> tuple[AppendOnlyFile, bytes]:
        """Take hold of an existing file, and read it.

        Raises:
            LedgerError: it is missing, unreadable, read-only, or held by somebody else.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot be opened ({_why(error)}); pass the run directory of an earlier run."
            ) from None
        file = cls(path, descriptor, size=0)
        with ExitStack() as on_failure:
            on_failure.callback(file.close)
            try:
                file._lock()
                content = file._read()
            except OSError as error:
                raise LedgerError(f"{path}: cannot be read ({_why(error)}); check disk and permissions.") from None
            on_failure.pop_all()
        file._size = len(content)
        return file, content

    def append(self, line: bytes) -> None:
        """Write ``line`` at the end and sync it.

        Raises:
            LedgerError: closed, in doubt after an earlier failure, changed by somebody else, or not writable now.
        """
        self.check_writable()
        if not self._is_as_left():
            self._broken = True
            raise LedgerError(
                f"{self.path}: was changed or replaced while in use; nothing was released; restore it, resume."
            )
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            self._broken = True
            self._cut_back()
            raise LedgerError(
                f"{self.path}: record not written ({_why(error)}); nothing was released; "
                "free some space or fix the disk, then resume."
            ) from None
        self._size += len(line)

    def cut(self, size: int) -> None:
        """Cut everything after ``size`` bytes off, and sync.

        Raises:
            LedgerError: the system refuses.
        """
        self.check_writable()
        try:
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        except OSError as error:
            self._broken = True
            raise LedgerError(f"{self.path}: cannot be repaired ({_why(error)}); check disk and permissions.") from None
        self._size = size

    def check_writable(self) -> None:
        """Raise a LedgerError if `append` would be refused before it tried."""
        if not self._open:
            raise LedgerError(f"{self.path}: is closed; open it again with Ledger.resume().")
        if self._broken:
            raise LedgerError(f"{self.path}: an earlier write failed, so it is in doubt; open it with Ledger.resume().")

    def close(self) -> None:
        """Release file and lock. Safe to call twice."""
        if self._open:
            self._open = False
            os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(
                f"{self.path}: another process is writing it, or a run of this one that was not closed; wait for it, "
                "stop it, or call close() on what make_private returned (`with` does it); a new process holds none."
            ) from None

    def _read(self) -> bytes:
        parts = []
        while part := os.read(self._descriptor, 1 << 20):
            parts.append(part)
        return b"".join(parts)

    def _is_as_left(self) -> bool:
        """Whether the path still leads to the open file, and the file still ends where this writer left it."""
        try:
            here, there = os.fstat(self._descriptor), os.stat(self.path)
        except OSError:
            return False
        return (here.st_dev, here.st_ino, here.st_size) == (there.st_dev, there.st_ino, self._size)

    def _cut_back(self) -> None:
        """Best effort: take a half-written line off again. If that fails too, the next reader does it."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            return

    def _discard(self) -> None:
        """Undo a `create` whose content was never durable."""
        try:
            os.unlink(self.path)
        except OSError:
            return
        finally:
            self.close()


def _remove(path: Path) -> None:
    """If it is there and can be removed."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable, so that a new or renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
