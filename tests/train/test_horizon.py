"""However often a run is killed and changed, its budget holds, and it is told truly how many updates are left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from discreet.privacy.accounting import Gaussian, SampledGaussian, epsilon
from discreet.privacy.ledger import Ledger, key_id
from discreet.privacy.plan import Plan
from discreet.train.horizon import Charges, updates_allowed

STEPS, BLOCK = 60, 16


def _ledger(path: Path, **changes: object) -> Ledger:
    given = {"examples": 500, "batch_size": 50, "steps": STEPS, "epsilon": 3.0} | changes
    return Ledger.create(path, plan=Plan.solve(**given), key_id=key_id(b"0"), test_mode=False)


def _reserve(ledger: Ledger, *, done: int, until: int, last: int) -> None:
    """As training does: in blocks, none beyond the horizon."""
    while done < until:
        count = min(BLOCK, last - done)
        ledger.reserve_steps(first=done, count=count)
        done += count


@pytest.mark.parametrize("seed", range(25))
def test_random_lives_of_a_run(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "ledger.jsonl"
    before = (Gaussian(noise_multiplier=8.0),) if seed % 2 else ()
    ledger = _ledger(path, before=before)
    for query in before:
        ledger.reserve_query("statistics", query)
    done = lives = 0
    last = updates_allowed(ledger, done=0)
    assert last == STEPS
    while done < last and lives < 12:
        lives += 1
        reached = draw.randint(done, last)
        _reserve(ledger, done=done, until=reached, last=last)
        done = draw.randint(done, reached)  # the checkpoint that is found
        ledger.close()
        key = b"%d" % lives if draw.random() < 0.5 else None
        name = ledger.key_id if key is None else key_id(key)
        ledger = Ledger.resume(path, key_id=name)
        if key is not None and before and draw.random() < 0.3 and ledger.epsilon() < 2.5:
            ledger.reserve_query("statistics", before[0])
        last = updates_allowed(ledger, done=done)
        assert done <= last <= STEPS
        assert ledger.epsilon() <= ledger.plan.epsilon
    _reserve(ledger, done=done, until=last, last=last)
    assert ledger.within_budget()
    assert ledger.epsilon() <= 3.0
    ledger.close()


def test_statistics_that_are_drawn_again_cost_updates(tmp_path: Path) -> None:
    query = Gaussian(noise_multiplier=3.0)
    with _ledger(tmp_path / "a", before=(query,)) as ledger:
        ledger.reserve_query("statistics", query)
        ledger.reserve_steps(first=0, count=16)
    with Ledger.resume(tmp_path / "a", key_id=key_id(b"1")) as ledger:
        ledger.reserve_query("statistics", query)
        last = updates_allowed(ledger, done=10)
        assert 10 < last < STEPS - 6
        _reserve(ledger, done=10, until=last, last=last)
        assert ledger.epsilon() <= ledger.plan.epsilon
        assert updates_allowed(ledger, done=last) == last


@pytest.mark.parametrize("seed", range(25))
def test_no_update_says_that_less_is_spent_than_was_released(tmp_path: Path, seed: int) -> None:
    """Through crashes, replays and replaced keys: what a step says is at least all that has left the process."""
    draw = random.Random(seed)
    path = tmp_path / "ledger.jsonl"
    before = (Gaussian(noise_multiplier=8.0),)
    ledger = _ledger(path, before=before)
    plan = ledger.plan
    ledger.reserve_query("statistics", before[0])
    released, asked, done = set[tuple[str, int]](), 1, 0
    for life in range(6):
        last, charges = updates_allowed(ledger, done=done), Charges.of(ledger, done=done)
        reached = draw.randint(done, last)
        for index in range(done, reached):
            if index % BLOCK == done % BLOCK:
                ledger.reserve_steps(first=index, count=min(BLOCK, last - index))
            released.add((ledger.key_id, index))
            assert charges.steps(index) >= len(released)
            if index + 1 < reached and index % 7:
                continue
            told = plan.charged_at_most(charges.steps(index), besides=charges.besides)
            steps = SampledGaussian(plan.sample_rate, plan.noise_multiplier, len(released))
            assert told >= epsilon((*before * asked, steps), delta=plan.delta)
        done = draw.randint(done, reached)
        ledger.close()
        fresh = draw.random() < 0.5
        ledger = Ledger.resume(path, key_id=key_id(b"life %d" % life) if fresh else ledger.key_id)
        if fresh and draw.random() < 0.3 and ledger.epsilon() < 2.5:
            ledger.reserve_query("statistics", before[0])
            asked += 1
    ledger.close()


def test_a_run_without_interruption_says_what_its_plan_says(tmp_path: Path) -> None:
    with _ledger(tmp_path / "ledger.jsonl") as ledger:
        charges = Charges.of(ledger, done=0)
        assert charges == Charges()
        assert [charges.steps(index) for index in (0, 5, STEPS - 1)] == [1, 6, STEPS]
        assert ledger.plan.charged_at_most(6) == ledger.plan.spent_at_most(6)
