"""How many updates a budget still allows, read off the ledger alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from discreet.privacy.accounting import Query, SampledGaussian, epsilon
from discreet.privacy.chain import Record
from discreet.privacy.ledger import LedgerView


@dataclass(frozen=True)
class Charges:
    """What a ledger has charged beyond the updates that a model has behind it.

    Attributes:
        lost: steps that were charged under keys that had to be replaced, and that are made again.
        seen: steps charged in all, so far; some of them may be made again under the same key.
        besides: queries that the plan did not foresee, such as statistics under a second key.
    """

    lost: int = 0
    seen: int = 0
    besides: tuple[Query, ...] = ()

    @classmethod
    def of(cls, ledger: LedgerView, *, done: int) -> Charges:
        """Read off a ledger, at the moment when a process or a key takes over.

        Args:
            done: updates that will not be repeated.
        """
        firsts = [_first_and_count(record)[0] for record in _steps_of_the_key(ledger)]
        ours = len(_reserved(ledger, start=0))
        planned = (
            *ledger.plan.before,
            *(() if ledger.plan.calibration is None else (ledger.plan.calibration.query(),)),
        )
        others = Counter(query for query in ledger.queries() if not isinstance(query, SampledGaussian))
        return cls(
            lost=ledger.steps_reserved - ours - min([*firsts, done]),
            seen=ledger.steps_reserved,
            besides=tuple((others - Counter(planned)).elements()),
        )

    def steps(self, index: int) -> int:
        """Steps that have to be considered released after update ``index``."""
        return max(index + 1 + self.lost, self.seen)


def updates_allowed(ledger: LedgerView, *, done: int) -> int:
    """Updates in the whole run: those behind it, those already charged under the current key, and those still
    affordable.

    After a change of key, the steps that were charged under the old key and are not ``done`` are lost, and so is a
    private statistic that has to be computed again. The result never passes the plan's steps, and reserving up to it
    never raises `BudgetExceeded`.

    Args:
        ledger: everything charged so far.
        done: updates that will not be repeated.
    """
    charged = _charged_ahead(ledger, done=done)
    return min(ledger.plan.steps, done + charged + _affordable(ledger))


def replaced_because(ledger: LedgerView) -> str:
    """Why keys had to be replaced, in the public words of the ledger: what had changed when the run was resumed."""
    facts = [record.body["facts"] for record in ledger.records if record.kind == "resume"]
    said = dict.fromkeys(str(each["changed"]) for each in facts if isinstance(each, Mapping) and "changed" in each)
    return "; ".join(said)


def steps_charged(ledger: LedgerView) -> set[int]:
    """Steps that are charged under the current key."""
    return _reserved(ledger, start=0)


def steps_released(ledger: LedgerView) -> set[int]:
    """Steps that were certainly released under the current key: a later charge under it goes on behind them."""
    released: set[int] = set()
    went_on = 0
    for record in reversed(_steps_of_the_key(ledger)):
        first, count = _first_and_count(record)
        released.update(range(first, min(first + count, went_on)))
        went_on = max(went_on, first)
    return released


def _charged_ahead(ledger: LedgerView, *, done: int) -> int:
    """Steps from ``done`` on that are reserved under the current key: repeating them is free."""
    return len(_reserved(ledger, start=done))


def _reserved(ledger: LedgerView, *, start: int) -> set[int]:
    steps: set[int] = set()
    for record in _steps_of_the_key(ledger):
        first, count = _first_and_count(record)
        steps.update(range(max(first, start), first + count))
    return steps


def _first_and_count(record: Record) -> tuple[int, int]:
    return int(str(record.body["first"])), int(str(record.body["count"]))


def _steps_of_the_key(ledger: LedgerView) -> list[Record]:
    return [each for each in ledger.records if each.kind == "steps" and each.body["key_id"] == ledger.key_id]


def _affordable(ledger: LedgerView) -> int:
    """The largest number of further steps whose composition with all that is charged keeps the budget."""
    plan, charged = ledger.plan, ledger.steps_reserved
    others = [query for query in ledger.queries() if not isinstance(query, SampledGaussian)]
    left = max(0, plan.steps - charged)
    if Counter(others) <= Counter(plan.before):
        return left
    fits, passes = 0, left + 1
    while passes - fits > 1:
        middle = (fits + passes) // 2
        if _spent(ledger, others, steps=charged + middle) <= plan.epsilon:
            fits = middle
        else:
            passes = middle
    return fits


def _spent(ledger: LedgerView, others: list[Query], *, steps: int) -> float:
    plan = ledger.plan
    queries = (*others, SampledGaussian(plan.sample_rate, plan.noise_multiplier, steps))
    return epsilon(queries, delta=plan.delta, relation=plan.relation, accountant=plan.accountant)
