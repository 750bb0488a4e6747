"""The ledger: reserve before release, one writer, never a smaller spend, and no composition on the planned path."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.privacy import ledger as ledger_module
from discreet.privacy.accounting import Gaussian, SampledGaussian, epsilon
from discreet.privacy.ledger import Ledger, key_id
from discreet.privacy.plan import Plan
from discreet.privacy.spending import Spending
from privacy.small_ledger import BEFORE, KEY, OTHER_KEY


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


def test_after_an_interrupt_inside_a_write_only_a_fresh_reader_goes_on(path, plan, monkeypatch):
    """As Ctrl-C between the file and this object leaves it: the next record would bear the number of the last."""
    with Ledger.create(path, plan=plan, key_id="k", test_mode=False) as ledger, monkeypatch.context() as patch:
        patch.setattr(Spending, "apply", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve_steps(first=0, count=4)
        patch.undo()
        with pytest.raises(LedgerError, match="a write was interrupted"):
            ledger.reserve_steps(first=4, count=4)
    with Ledger.resume(path, key_id="k") as again:
        assert again.steps_reserved == 4
        assert again.reserve_steps(first=4, count=4)
    assert Ledger.read(path).steps_reserved == 8


def _interrupted(*_):
    raise KeyboardInterrupt


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
