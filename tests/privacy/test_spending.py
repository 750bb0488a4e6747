"""What records add up to: unions of intervals, keys, and records that cannot follow one another."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.errors import LedgerError
from discreet.privacy.accounting import Gaussian, SampledGaussian, query_to_json
from discreet.privacy.chain import Record
from discreet.privacy.plan import Plan
from discreet.privacy.spending import Spending, is_part_of, union

PLAN = Plan(
    examples=100, batch_size=10, steps=20, noise_multiplier=2.0, epsilon=50.0, delta=1e-3, before=(Gaussian(9.0),)
)
INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda pair: (pair[0], sum(pair))), max_size=8
)


@given(intervals=INTERVALS)
def test_union_has_the_same_members_and_is_disjoint(intervals):
    merged = union(tuple(intervals))
    members = {step for start, end in intervals for step in range(start, end)}
    assert {step for start, end in merged for step in range(start, end)} == members
    assert sum(end - start for start, end in merged) == len(members)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))


def _opening(**changes):
    body = {
        "plan": PLAN.to_json(),
        "plan_fingerprint": PLAN.fingerprint(),
        "key_id": "k1",
        "test_mode": False,
        "facts": {},
    }
    return Record.after(None, kind="open", body=body | changes)


def _spending(*later):
    record = _opening()
    spending = Spending(record)
    for kind, body in later:
        record = Record.after(record, kind=kind, body=body)
        spending.apply(record)
    return spending


def _steps(first, count, **changes):
    body = {"key_id": "k1", "first": first, "count": count, "sample_rate": 0.1, "noise_multiplier": 2.0}
    return "steps", body | changes


def _resume(key_id, *, same):
    return "resume", {"key_id": key_id, "same_key": same, "facts": {}}


def _query(name, query, key_id="k1"):
    return "query", {"key_id": key_id, "name": name, "query": query_to_json(query)}


@given(intervals=INTERVALS)
def test_replayed_steps_count_once_under_one_key(intervals):
    spending = _spending(*(_steps(start, end - start) for start, end in intervals))
    members = {step for start, end in intervals for step in range(start, end)}
    assert spending.steps_reserved() == len(members)
    expected = (SampledGaussian(0.1, 2.0, len(members)),) if members else ()
    assert spending.queries() == expected


def test_new_key_counts_again():
    spending = _spending(_steps(0, 10), _resume("k2", same=False), _steps(5, 5, key_id="k2"))
    assert spending.queries() == (SampledGaussian(0.1, 2.0, 15),)
    assert spending.key_ids == ["k1", "k2"]
    assert not spending.covers(0, 5)
    assert spending.covers(5, 5)


def test_other_numbers_under_the_same_key_count_apart():
    spending = _spending(_steps(0, 10), _steps(0, 10, noise_multiplier=1.0))
    assert spending.queries() == (SampledGaussian(0.1, 1.0, 10), SampledGaussian(0.1, 2.0, 10))


def test_named_queries():
    spending = _spending(_query("bounds", Gaussian(9.0)))
    assert spending.named("bounds") == Gaussian(9.0)
    assert spending.named("other") is None
    assert spending.queries(query=Gaussian(1.0), steps=(0, 3)) == (
        Gaussian(9.0),
        Gaussian(1.0),
        SampledGaussian(0.1, 2.0, 3),
    )
    assert spending.queries() == (Gaussian(9.0),)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (
            [("open", {"plan": {}, "plan_fingerprint": "", "key_id": "", "test_mode": False, "facts": {}})],
            "second 'open'",
        ),
        ([("spend", {})], "kind 'spend' is unknown"),
        ([("steps", {"first": 1})], "'count' is missing"),
        ([_steps(0, 0)], "count=0"),
        ([_steps(-1, 3)], "first=-1"),
        ([_steps(0, 3, noise_multiplier=-2.0)], "noise_multiplier=-2"),
        ([_steps(0, 3, sample_rate=0.0)], "sample_rate=0"),
        ([_steps(0, 3.0)], "'count'"),
        ([_steps(0, 3, key_id=None)], "'key_id'"),
        ([_query("a", Gaussian(1.0)), _query("a", Gaussian(2.0))], "reserved twice"),
        ([("query", {"key_id": "k1", "name": "a", "query": {"type": "laplace"}})], "laplace"),
        ([_resume("k1", same=False)], "contradicts"),
        ([_resume("k2", same=True)], "contradicts"),
        ([_resume("k2", same=False), _resume("k1", same=False)], "contradicts"),
        ([("close", {"facts": {}}), _steps(0, 1)], "after 'close'"),
        ([("close", {"facts": {}}), ("note", {"note": "x", "facts": {}})], "after 'close'"),
    ],
)
def test_what_cannot_follow_is_refused_and_the_line_named(later, message):
    with pytest.raises(LedgerError, match=f"ledger line {len(later) + 1}: .*{message}"):
        _spending(*later)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {}}, "no valid plan or run"),
        ({"plan_fingerprint": "0" * 64}, "plan_fingerprint"),
        ({"test_mode": 0}, "'test_mode'"),
    ],
)
def test_bad_openings(changes, message):
    with pytest.raises(LedgerError, match=f"line 1.*{message}"):
        Spending(_opening(**changes))
    with pytest.raises(LedgerError, match="begins with 'open'"):
        Spending(Record.after(None, kind="note", body={"note": "x", "facts": {}}))


def test_part_of_the_plan():
    steps = SampledGaussian(0.1, 2.0, 20)
    assert is_part_of((), PLAN)
    assert is_part_of((Gaussian(9.0), steps), PLAN)
    assert not is_part_of((Gaussian(9.0), Gaussian(9.0)), PLAN)
    assert not is_part_of((Gaussian(8.9),), PLAN)
    assert not is_part_of((steps, SampledGaussian(0.1, 2.0, 1)), PLAN)
    assert not is_part_of((SampledGaussian(0.1, 2.1, 1),), PLAN)
    assert not is_part_of((SampledGaussian(0.1, 1.9, 1),), PLAN)
