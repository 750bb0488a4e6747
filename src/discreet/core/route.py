"""Which way to a per-example gradient norm is cheapest, from shapes alone.

For one operation with S positions, I inputs and O outputs per group, each example costs

    GRAM   S^2 (I + O) multiply-adds, 2 S^2 numbers            (ghost norm, arXiv:2110.05679 Eq. 3)
    KEEP   S I O multiply-adds, I O numbers, held to the end   (instantiate, then sum what was kept)

KEEP costs no second contraction, and frees input and output gradient at once; it is taken whenever the kept gradient is
no larger than what booking would hold, ``I O <= S (I + O)`` numbers. Otherwise GRAM is also the one with fewer
multiply-adds, so the third way of arXiv:2210.00038, to instantiate for the norm and again for the sum, is never best.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Route(enum.Enum):
    """How the norm of one use is computed."""

    GRAM = "gram"
    KEEP = "keep"


@dataclass(frozen=True)
class Cost:
    """Shape of one use per example and group: (positions, inputs, outputs)."""

    positions: int
    inputs: int
    outputs: int


def choose(cost: Cost) -> Route:
    """The cheapest route for this shape. See the module docstring for the rule."""
    kept, booked = cost.inputs * cost.outputs, cost.positions * (cost.inputs + cost.outputs)
    return Route.KEEP if cost.positions > 1 and kept <= booked else Route.GRAM
