"""The ledger as a file: two writers, kills, cuts, flipped bits, a full disk. Damage is seen and named."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from discreet.errors import LedgerError
from discreet.privacy.chain import parse_chain
from discreet.privacy.ledger import Ledger, LedgerView
from privacy.small_ledger import KEY


def test_second_writer_is_refused_and_readers_are_not(ledger, path):
    with pytest.raises(LedgerError, match="another process is writing it"):
        Ledger.resume(path, key_id=KEY)
    assert type(Ledger.read(path)) is LedgerView
    ledger.reserve_steps(first=0, count=1)


def test_two_processes_on_one_ledger(ledger, path, repository):
    program = (
        "import sys; from discreet.errors import LedgerError; from discreet.privacy.ledger import Ledger\n"
        "try:\n    Ledger.resume(sys.argv[1], key_id='key-1')\n"
        "except LedgerError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    assert "another process is writing it" in done.stdout


def test_reservations_survive_sigkill(path, plan, repository):
    """A process prints each step after its reservation returned, and is killed: every printed step is in the ledger."""
    program = (
        "import sys, json; from discreet.privacy.ledger import Ledger; from discreet.privacy.plan import Plan\n"
        "plan = Plan.from_json(json.loads(sys.argv[2]))\n"
        "ledger = Ledger.create(sys.argv[1], plan=plan, key_id='key-1', test_mode=False)\n"
        "for step in range(plan.steps):\n"
        "    ledger.reserve_steps(first=step, count=1); print(step, flush=True)\n"
        "    if step == 17: sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-c", program, str(path), json.dumps(plan.to_json())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        seen = 0
        while seen < 18:
            assert process.stdout.readline() == f"{seen}\n"
            seen += 1
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    with Ledger.resume(path, key_id=KEY) as ledger:
        assert ledger.steps_reserved == seen
        assert 0 < ledger.epsilon() < plan.spent(seen)  # the planned preprocessing was not made


def _written(path, plan) -> tuple[bytes, list[int]]:
    """A small ledger's bytes, and the steps reserved after each of its lines."""
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as ledger:
        for first in range(0, 9, 3):
            ledger.reserve_steps(first=first, count=3)
    return path.read_bytes(), [0, 3, 6, 9]


def test_truncation_at_every_byte_never_reads_less_than_its_whole_lines(path, plan):
    content, reserved = _written(path, plan)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n") + (content[size : size + 1] == b"\n")
        if whole == 0:
            with pytest.raises(LedgerError, match="nothing was ever reserved"):
                Ledger.read(path)
            continue
        view = Ledger.read(path)
        assert view.steps_reserved == reserved[whole - 1]


def test_resume_after_truncation_at_many_bytes_repairs_the_file(path, plan):
    content, reserved = _written(path, plan)
    first_line = content.index(b"\n") + 1
    for size in [*range(first_line, len(content), 37), len(content) - 1, len(content)]:
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n") + (content[size : size + 1] == b"\n")
        torn = size not in {first_line} and content[size - 1 : size] != b"\n" and content[size : size + 1] != b"\n"
        with Ledger.resume(path, key_id=KEY) as ledger:
            assert ledger.steps_reserved == reserved[whole - 1]
            assert ledger.torn == b""
            ledger.reserve_steps(first=0, count=12)
        again = Ledger.read(path)
        assert again.steps_reserved == 12
        assert again.torn == b""
        notes = [record for record in again.records if record.kind == "note"]
        assert len(notes) == int(torn)
        assert parse_chain(path.read_bytes()).records[:whole] == parse_chain(content).records[:whole]


def test_tampering_with_each_line_is_seen_and_named(path, plan):
    content, _ = _written(path, plan)
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        changed = line.replace(b'"count":3', b'"count":1') if number > 1 else line.replace(b'"steps":40', b'"steps":41')
        assert changed != line
        path.write_bytes(b"".join([*lines[: number - 1], changed, *lines[number:]]))
        for opener in (Ledger.read, lambda place: Ledger.resume(place, key_id=KEY)):
            with pytest.raises(LedgerError, match=f"ledger line {number}: its hash does not fit"):
                opener(path)
        if number < len(lines):
            path.write_bytes(b"".join([*lines[: number - 1], *lines[number:]]))
            with pytest.raises(LedgerError, match=f"ledger line {number}"):
                Ledger.read(path)


def test_random_bit_flips_are_seen(path, plan):
    content, _ = _written(path, plan)
    generator = random.Random(1)
    for _ in range(400):
        position, bit = generator.randrange(len(content) - 1), generator.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        with pytest.raises(LedgerError, match="ledger line"):
            Ledger.read(path)


def test_refused_resume_leaves_the_file_as_it_was_and_unlocked(path, plan):
    content, _ = _written(path, plan)
    damaged = content.replace(b'"count":3', b'"count":2', 1)
    path.write_bytes(damaged)
    with pytest.raises(LedgerError):
        Ledger.resume(path, key_id=KEY)
    assert path.read_bytes() == damaged
    path.write_bytes(content)
    Ledger.resume(path, key_id=KEY).close()


def test_records_cut_off_are_seen_by_a_known_head(path, plan):
    content, _ = _written(path, plan)
    head = Ledger.read(path).head
    path.write_bytes(content[: content[:-1].rindex(b"\n") + 1])
    with pytest.raises(LedgerError, match=f"lacks the record {head[:12]}"):
        Ledger.resume(path, key_id=KEY, known_head=head)


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_full_disk_raises_before_anything_can_be_released(ledger, path, monkeypatch, name):
    ledger.reserve_steps(first=0, count=5)
    before = path.read_bytes()

    def fail(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"discreet.privacy.files.os.{name}", fail)
        with pytest.raises(LedgerError, match=r"No space left.*nothing was released"):
            ledger.reserve_steps(first=5, count=5)
    assert ledger.steps_reserved == 5
    assert path.read_bytes() == before
    with pytest.raises(LedgerError, match="in doubt"):
        ledger.reserve_steps(first=5, count=5)
    ledger.close()
    with Ledger.resume(path, key_id=KEY) as again:
        assert again.reserve_steps(first=5, count=5)
        assert again.steps_reserved == 10


@pytest.mark.parametrize("kept", [0, 1, 50, 200])
def test_disk_that_fills_inside_a_line(ledger, path, monkeypatch, kept):
    """The half line cannot be taken off again either: the next resume sets it aside."""
    ledger.reserve_steps(first=0, count=5)
    write = os.write
    monkeypatch.setattr("discreet.privacy.files.os.write", lambda descriptor, line: write(descriptor, line[:kept]))
    monkeypatch.setattr(
        "discreet.privacy.files.os.ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
    )
    with pytest.raises(LedgerError, match="record not written"):
        ledger.reserve_steps(first=5, count=5)
    monkeypatch.undo()
    ledger.close()
    assert Ledger.read(path).steps_reserved == 5
    with Ledger.resume(path, key_id=KEY) as again:
        assert again.steps_reserved == 5
        assert [record.kind for record in again.records].count("note") == int(kept > 0)


def test_missing_and_empty_files(path):
    for opener in (Ledger.read, lambda place: Ledger.resume(place, key_id=KEY)):
        with pytest.raises(LedgerError, match=r"cannot be (read|opened)"):
            opener(path)
    path.write_bytes(b"")
    for opener in (Ledger.read, lambda place: Ledger.resume(place, key_id=KEY)):
        with pytest.raises(LedgerError, match="nothing was ever reserved; delete the file"):
            opener(path)
