"""What (epsilon, delta) means for one person, in numbers; all are bounds on the best possible attacker."""

from __future__ import annotations

import math


def certainty(epsilon: float, *, delta: float, prior: float) -> float:
    """Upper bound on how sure somebody who held ``prior`` can become that a given example was in the data.

    But for an event of probability ``delta``, the odds grow by at most ``e^epsilon``, so the posterior is at most
    ``prior e^eps / (1 - prior + prior e^eps)``; ``delta`` is added for that event. Never overflows.
    """
    grown = prior / (prior + (1 - prior) * math.exp(-epsilon)) if math.isfinite(epsilon) else 1.0
    return min(1.0, grown + delta)


def found_members(epsilon: float, *, delta: float, false_alarms: float) -> float:
    """Largest share of members that a test can find while it accuses at most ``false_alarms`` of the others.

    ``min(e^eps alpha + delta, 1 - e^-eps (1 - delta - alpha))`` (Theorem 2.1, arXiv:1311.0776).
    """
    if not math.isfinite(epsilon):
        return 1.0
    by_growth = math.exp(min(epsilon, 700.0)) * false_alarms + delta
    by_rest = 1 - math.exp(-epsilon) * (1 - delta - false_alarms)
    return max(0.0, min(1.0, by_growth, by_rest))
