"""What the tests of the ledger share: a small plan, and the keys of its runs."""

from __future__ import annotations

from discreet.privacy.accounting import Gaussian
from discreet.privacy.plan import Plan

KEY, OTHER_KEY = "key-1", "key-2"
BEFORE = Gaussian(12.0)


def small_plan() -> Plan:
    """Forty steps after one query on all examples."""
    return Plan.solve(examples=1_000, batch_size=50, steps=40, epsilon=2.0, before=(BEFORE,))
