"""The ledger's file format: every damage is seen, only an unfinished last line is set aside."""

from __future__ import annotations

import itertools
import random

import pytest

from discreet.errors import LedgerError
from discreet.privacy.chain import GENESIS, Chain, Record, parse_chain


def _records(count: int) -> list[Record]:
    records: list[Record] = []
    for index in range(count):
        last = records[-1] if records else None
        records.append(Record.after(last, kind="note", body={"note": f"number {index}", "facts": {"value": index / 3}}))
    return records


def _content(records: list[Record]) -> bytes:
    return b"".join(record.line() for record in records)


def test_chain_reads_back():
    records = _records(5)
    chain = parse_chain(_content(records))
    assert chain.records == tuple(records)
    assert chain == Chain(tuple(records), torn=b"", complete_bytes=len(_content(records)), missing_newline=False)
    assert records[0].previous == GENESIS
    assert [record.seq for record in records] == [0, 1, 2, 3, 4]
    assert all(after.previous == before.hash for before, after in itertools.pairwise(records))


def test_empty_file_is_an_empty_chain():
    assert parse_chain(b"").records == ()


def test_truncation_at_every_byte_never_loses_a_whole_line():
    records = _records(4)
    content = _content(records)
    ends = [len(_content(records[:count])) for count in range(5)]
    for size in range(len(content) + 1):
        chain = parse_chain(content[:size])
        whole = sum(end <= size for end in ends[1:])
        at_newline = size + 1 in ends
        assert chain.records == tuple(records[: whole + at_newline])
        assert chain.missing_newline == at_newline
        assert (chain.torn != b"") == (size not in ends and not at_newline)


def test_every_single_byte_change_is_seen():
    """Any byte of any finished line, replaced by any of three others, stops the reader; the line is named."""
    records = _records(3)
    content = _content(records)
    generator = random.Random(0)
    for position in range(len(content)):
        number = content[:position].count(b"\n") + 1
        for _ in range(3):
            byte = generator.choice([value for value in range(256) if value != content[position]])
            changed = content[:position] + bytes([byte]) + content[position + 1 :]
            if position == len(content) - 1 and byte != ord("\n"):
                # The last newline is gone: the line is unfinished, and no longer a record.
                assert len(parse_chain(changed).records) == 2
                continue
            with pytest.raises(LedgerError, match=rf"ledger line ({number}|{number + 1})\b"):
                parse_chain(changed)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_deleting_a_line_is_seen(number):
    lines = _content(_records(5)).splitlines(keepends=True)
    del lines[number - 1]
    with pytest.raises(LedgerError, match=f"ledger line {number}: holds record {number}, not {number - 1}"):
        parse_chain(b"".join(lines))


def test_swapping_repeating_and_inserting_lines_is_seen():
    lines = _content(_records(4)).splitlines(keepends=True)
    for order in ([0, 2, 1, 3], [0, 1, 1, 2, 3], [1, 0, 2, 3]):
        with pytest.raises(LedgerError, match="ledger line"):
            parse_chain(b"".join(lines[index] for index in order))
    with pytest.raises(LedgerError, match="ledger line 3: damaged"):
        parse_chain(lines[0] + lines[1] + b"\n" + lines[2])


def test_a_line_of_another_chain_is_seen():
    records = _records(3)
    stranger = Record.after(
        Record.after(None, kind="note", body={"x": 1}), kind="note", body={"note": "y", "facts": {}}
    )
    with pytest.raises(LedgerError, match="ledger line 2: does not continue line 1"):
        parse_chain(records[0].line() + stranger.line())


def test_same_content_in_another_spelling_is_seen():
    line = _records(1)[0].line()
    for changed in (line.replace(b":", b": ", 1), b" " + line, line[:-1] + b" \n", line[:-1] + b"\r\n"):
        with pytest.raises(LedgerError, match="ledger line 1: its hash does not fit"):
            parse_chain(changed)


@pytest.mark.parametrize("tail", [b"{", b"\x00" * 40, b'{"seq":2}', b"\xff\xfe"])
def test_garbage_after_the_last_newline_is_torn(tail):
    records = _records(2)
    chain = parse_chain(_content(records) + tail)
    assert chain.records == tuple(records)
    assert chain.torn == tail


def test_garbage_with_a_newline_is_damage():
    with pytest.raises(LedgerError, match="ledger line 3: damaged"):
        parse_chain(_content(_records(2)) + b"\x00\x00\n")
