"""The ledger: reserve before release, one writer, never a smaller spend, and no composition on the planned path."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest

from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy import ledger as ledger_module
from discreet.privacy.accounting import Gaussian, SampledGaussian, epsilon
from discreet.privacy.chain import parse_chain
from discreet.privacy.ledger import Ledger, LedgerView, key_id
from discreet.privacy.plan import Plan

KEY, OTHER_KEY = "key-1", "key-2"
BEFORE = Gaussian(12.0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.solve(examples=1_000, batch_size=50, steps=40, epsilon=2.0, before=(BEFORE,))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path, plan):
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False, facts={"device": "cpu"}) as opened:
        yield opened


@pytest.fixture
def compositions(monkeypatch):
    """Counts how often the ledger composes."""
    calls = []

    def counted(queries, **arguments):
        calls.append(tuple(queries))
        return epsilon(queries, **arguments)

    monkeypatch.setattr(ledger_module, "compose_epsilon", counted)
    return calls


def test_the_planned_run_spends_exactly_the_plan_without_composing(ledger, plan, compositions):
    assert ledger.reserve_query("bounds", BEFORE)
    for first in range(0, 40, 8):
        assert ledger.reserve_steps(first=first, count=8)
    assert compositions == []
    assert ledger.epsilon() == plan.spent() <= plan.epsilon
    assert ledger.steps_reserved == 40
    assert ledger.within_budget()


def test_one_step_more_than_planned_is_composed_and_refused(ledger, path, compositions):
    ledger.reserve_query("bounds", BEFORE)
    ledger.reserve_steps(first=0, count=40)
    before = path.read_bytes()
    with pytest.raises(
        BudgetExceeded, match=r"steps 40 to 40: epsilon would become 2\.0.*budget of 2\.0.*nothing was released"
    ):
        ledger.reserve_steps(first=40, count=1)
    assert len(compositions) == 1
    assert path.read_bytes() == before


def test_steps_left_over_by_a_query_not_made_may_be_used(path, compositions):
    """The preprocessing was planned and never made: its share may be spent on steps, after a composition."""
    plan = Plan.solve(examples=1_000, batch_size=50, steps=40, epsilon=2.0, before=(Gaussian(4.0),))
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as ledger:
        ledger.reserve_steps(first=0, count=40)
        assert compositions == []
        assert ledger.reserve_steps(first=40, count=1)
        assert len(compositions) == 1
        assert ledger.epsilon() <= plan.epsilon
        with pytest.raises(BudgetExceeded):
            ledger.reserve_steps(first=41, count=1_000)
        with pytest.raises(BudgetExceeded):
            ledger.reserve_query("bounds", Gaussian(4.0))


def test_unplanned_query_stops_the_run_early(ledger, plan):
    ledger.reserve_query("bounds", BEFORE)
    ledger.reserve_query("extra", Gaussian(15.0))
    for done in range(plan.steps):
        try:
            ledger.reserve_steps(first=done, count=1)
        except BudgetExceeded:
            break
    assert 0 < done < plan.steps
    assert ledger.epsilon() <= plan.epsilon
    assert (
        epsilon([*ledger.queries(), SampledGaussian(0.05, plan.noise_multiplier, 1)], delta=plan.delta) > plan.epsilon
    )


def test_replay_under_the_same_key_is_free_and_not_written(ledger, path, plan):
    ledger.reserve_query("bounds", BEFORE)
    ledger.reserve_steps(first=0, count=10)
    before = path.read_bytes()
    assert not ledger.reserve_query("bounds", BEFORE)
    assert not ledger.reserve_steps(first=3, count=7)
    assert path.read_bytes() == before
    assert ledger.reserve_steps(first=8, count=4)
    assert ledger.steps_reserved == 12
    assert ledger.epsilon() == plan.spent(12)


def test_one_name_is_one_draw_of_noise(ledger):
    ledger.reserve_query("bounds", BEFORE)
    with pytest.raises(LedgerError, match="other numbers under this key"):
        ledger.reserve_query("bounds", Gaussian(30.0))


def test_resume_under_the_same_key(path, plan):
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as first:
        first.reserve_query("bounds", BEFORE)
        first.reserve_steps(first=0, count=20)
        head = first.head
    with Ledger.resume(path, key_id=KEY, known_head=head, facts={"from": 10}) as second:
        assert not second.reserve_steps(first=10, count=10)
        assert not second.reserve_query("bounds", BEFORE)
        assert second.reserve_steps(first=20, count=20)
        assert second.epsilon() == plan.spent()
        assert [record.kind for record in second.records] == ["open", "query", "steps", "resume", "steps"]
        assert second.records[3].body == {"key_id": KEY, "same_key": True, "facts": {"from": 10}}


def test_resume_under_a_new_key_charges_again(path, plan):
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as first:
        first.reserve_query("bounds", BEFORE)
        first.reserve_steps(first=0, count=30)
    with Ledger.resume(path, key_id=OTHER_KEY) as second:
        assert second.key_ids == (KEY, OTHER_KEY)
        assert second.reserve_steps(first=20, count=10)
        assert second.steps_reserved == 40
        assert second.epsilon() == plan.spent()
        with pytest.raises(BudgetExceeded):
            second.reserve_steps(first=30, count=1)
        with pytest.raises(BudgetExceeded):
            second.reserve_query("bounds", BEFORE)
    with pytest.raises(LedgerError, match="was replaced earlier"):
        Ledger.resume(path, key_id=KEY)


def test_finished_run_cannot_go_on(path, plan):
    ledger = Ledger.create(path, plan=plan, key_id=KEY, test_mode=False)
    ledger.finish({"key": "destroyed"})
    assert Ledger.read(path).finished
    with pytest.raises(LedgerError, match="is closed"):
        ledger.reserve_steps(first=0, count=1)
    with pytest.raises(LedgerError, match="was finished"):
        Ledger.resume(path, key_id=KEY)


def test_closed_ledger_refuses_and_can_be_resumed(path, plan):
    ledger = Ledger.create(path, plan=plan, key_id=KEY, test_mode=False)
    ledger.close()
    for write in (lambda: ledger.reserve_steps(first=0, count=1), lambda: ledger.note("x"), ledger.finish):
        with pytest.raises(LedgerError, match="is closed"):
            write()
    Ledger.resume(path, key_id=KEY).close()


def test_create_refuses_an_existing_file_and_a_weak_plan(path, plan):
    weak = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 0.95)
    with pytest.raises(BudgetExceeded, match="planned 40 steps spend"):
        Ledger.create(path, plan=weak, key_id=KEY, test_mode=False)
    assert not path.exists()
    Ledger.create(path, plan=plan, key_id=KEY, test_mode=False).close()
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, plan=plan, key_id=KEY, test_mode=False)


def test_facts_must_be_json(path, plan):
    with pytest.raises(ConfigError, match="JSON"):
        Ledger.create(path, plan=plan, key_id=KEY, test_mode=False, facts={"loss": math.nan})
    assert not path.exists()
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as ledger:
        with pytest.raises(ConfigError, match="JSON"):
            ledger.note("x", {"value": math.inf})
        ledger.note("x", {"value": [1, "a", None, {"b": 2.5}]})
    assert Ledger.read(path).records[-1].body["note"] == "x"


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, -3)])
def test_steps_must_be_positive(ledger, first, count):
    with pytest.raises(ConfigError, match="must be at least 0 and 1"):
        ledger.reserve_steps(first=first, count=count)


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


def test_run_without_noise_is_recorded_and_never_stopped(path):
    plan = Plan.solve(examples=100, batch_size=10, steps=5, epsilon=math.inf)
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False) as ledger:
        ledger.reserve_steps(first=0, count=50)
        assert ledger.epsilon() == math.inf


def test_view_tells_what_the_run_was(ledger, path, plan):
    view = Ledger.read(path)
    assert (view.plan, view.key_id, view.test_mode, view.facts) == (plan, KEY, False, {"device": "cpu"})
    assert view.head == ledger.head == ledger.records[-1].hash
    assert not view.finished


def test_key_id_is_a_stable_public_name():
    assert key_id(bytes(32)) == key_id(bytes(32)) != key_id(bytes(31) + b"\x01")
    assert len(key_id(bytes(32))) == 32
    assert bytes(32).hex() not in key_id(bytes(32))


def test_random_histories_never_pass_the_budget_or_lose_a_step(tmp_path, plan):
    """Random reservations, crashes and new keys against a dictionary that remembers everything that was granted."""
    for seed in range(25):
        generator, path, keys = random.Random(seed), tmp_path / f"{seed}.jsonl", ["k0"]
        granted: set[tuple[str, int]] = set()
        ledger = Ledger.create(path, plan=plan, key_id="k0", test_mode=False)
        for _ in range(12):
            action = generator.random()
            if action < 0.2:
                ledger.close()
                if action < 0.08:
                    keys.append(f"k{len(keys)}")
                ledger = Ledger.resume(path, key_id=keys[-1])
                continue
            first, count = generator.randrange(40), generator.randrange(1, 9)
            try:
                ledger.reserve_steps(first=first, count=count)
            except BudgetExceeded:
                continue
            granted |= {(keys[-1], step) for step in range(first, first + count)}
        ledger.close()
        view = Ledger.read(path)
        assert view.steps_reserved == len(granted)
        assert view.epsilon() <= plan.epsilon
        if granted:
            expected = epsilon([SampledGaussian(0.05, plan.noise_multiplier, len(granted))], delta=plan.delta)
            assert view.epsilon() == expected
