"""The file format of the ledger: one canonical JSON record per line, each holding the hash of the one before.

    {"body":{...},"hash":H,"kind":"steps","previous":P,"seq":7}

``H = sha256(canonical JSON of the record without "hash")`` and ``P`` is the hash of record 6 (64 zeros for record 0).
A line must be byte for byte the canonical form, so that no edit, not even of a space, goes unseen. The chain shows
damage and clumsy edits; it cannot show that somebody rewrote the whole file, or cut whole records off its end. The
certificate, which holds the head and the number of records, does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.records import Fields, canonical_json, parse_json

GENESIS = "0" * 64
_NAMES = ("body", "hash", "kind", "previous", "seq")


@dataclass(frozen=True)
class Record:
    """One record of the ledger.

    Attributes:
        seq: 0, 1, 2, ... kind: "open", "query", "steps", "resume", "note" or "close".
        body: what it says. previous, hash: the chain, 64 hex digits each.
    """

    seq: int
    kind: str
    body: Mapping[str, object]
    previous: str
    hash: str

    @classmethod
    def after(cls, last: Record | None, *, kind: str, body: Mapping[str, object]) -> Record:
        """The record that continues a chain (None: that starts one)."""
        seq, previous = (0, GENESIS) if last is None else (last.seq + 1, last.hash)
        return cls(seq=seq, kind=kind, body=body, previous=previous, hash=_hash(seq, kind, body, previous))

    def line(self) -> bytes:
        """The bytes on disk, newline included."""
        record = {"body": self.body, "hash": self.hash, "kind": self.kind, "previous": self.previous, "seq": self.seq}
        return canonical_json(record).encode("ascii") + b"\n"


@dataclass(frozen=True)
class Chain:
    """What a ledger file holds.

    Attributes:
        records: the valid chain.
        torn: bytes after the last newline, if they are not a whole record: the trace of a write that never returned,
            so nothing was released on their account.
        complete_bytes: length of the part that ends in a newline.
        missing_newline: the last record is whole but for its newline. It counts.
    """

    records: tuple[Record, ...]
    torn: bytes
    complete_bytes: int
    missing_newline: bool


def parse_chain(content: bytes) -> Chain:
    """Read a whole file.

    **Guarantees.** Every record of every line that ends in a newline is returned, or the call raises: damage is never
    read as a shorter ledger. Only an unfinished last line is set aside.

    Raises:
        LedgerError: a line is damaged, out of order, or breaks the chain. The line is named, counted from 1.
    """
    complete_bytes = content.rfind(b"\n") + 1
    records: list[Record] = []
    for number, line in enumerate(content[:complete_bytes].split(b"\n")[:-1], start=1):
        records.append(_parse_line(line, number=number, last=records[-1] if records else None))
    tail = content[complete_bytes:]
    whole = _whole_record(tail, number=len(records) + 1, last=records[-1] if records else None)
    if whole is not None:
        records.append(whole)
    torn = b"" if whole is not None else tail
    return Chain(records=tuple(records), torn=torn, complete_bytes=complete_bytes, missing_newline=whole is not None)


def _parse_line(line: bytes, *, number: int, last: Record | None) -> Record:
    where = f"ledger line {number}"
    try:
        fields = Fields(parse_json(line.decode("ascii"), where=where), where=where, names=_NAMES)
        record = Record(
            seq=fields.integer("seq"),
            kind=fields.text("kind"),
            body=fields.mapping("body"),
            previous=fields.text("previous"),
            hash=fields.text("hash"),
        )
        canonical = record.line() == line + b"\n"
        expected_hash = _hash(record.seq, record.kind, record.body, record.previous)
    except (ConfigError, UnicodeDecodeError) as error:
        raise LedgerError(f"{where}: damaged ({error}); restore the file from a copy, never edit it.") from None
    expected = Record.after(last, kind=record.kind, body=record.body)
    if record.hash != expected_hash or not canonical:
        raise LedgerError(
            f"{where}: its hash does not fit its content, so it was changed; restore the file from a copy."
        )
    if record.seq != expected.seq:
        raise LedgerError(
            f"{where}: holds record {record.seq}, not {expected.seq}; a line is missing or moved; restore the file"
        )
    if record.previous != expected.previous:
        raise LedgerError(
            f"{where}: does not continue line {number - 1}, so the chain is broken; restore the file from a copy."
        )
    return record


def _whole_record(tail: bytes, *, number: int, last: Record | None) -> Record | None:
    if not tail:
        return None
    try:
        return _parse_line(tail, number=number, last=last)
    except LedgerError:
        return None


def _hash(seq: int, kind: str, body: Mapping[str, object], previous: str) -> str:
    record = {"body": body, "kind": kind, "previous": previous, "seq": seq}
    return hashlib.sha256(canonical_json(record).encode("ascii")).hexdigest()
