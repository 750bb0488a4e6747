"""How many updates a budget still allows, read off the ledger alone."""

from __future__ import annotations

from collections import Counter

from discreet.privacy.accounting import Query, SampledGaussian, epsilon
from discreet.privacy.ledger import LedgerView


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


def _charged_ahead(ledger: LedgerView, *, done: int) -> int:
    """Steps from ``done`` on that are reserved under the current key: repeating them is free."""
    steps: set[int] = set()
    for record in ledger.records:
        if record.kind == "steps" and record.body["key_id"] == ledger.key_id:
            first, count = int(str(record.body["first"])), int(str(record.body["count"]))
            steps.update(range(max(first, done), first + count))
    return len(steps)


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
