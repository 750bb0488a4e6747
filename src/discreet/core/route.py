"""Which of three ways to a per-example gradient norm is cheapest, from shapes alone.

For one operation with S positions, I inputs and O outputs per group, each example costs

    GRAM     S^2 (I + O) multiply-adds, 2 S^2 numbers            (ghost norm, arXiv:2110.05679 Eq. 3)
    DIRECT   S I O multiply-adds, I O numbers, freed at once     (instantiate for the norm only)
    KEEP     S I O multiply-adds, I O numbers, held to the end   (instantiate, then sum what was kept)

KEEP costs no second contraction, and frees input and output gradient at once; it is taken whenever the kept gradient is
no larger than what booking would hold, ``I O <= S (I + O)`` numbers. Otherwise GRAM below ``S (I + O) = I O``, else DIRECT.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Route(enum.Enum):
    """How the norm of one use is computed."""

    GRAM = "gram"
    DIRECT = "direct"
    KEEP = "keep"


@dataclass(frozen=True)
class Cost:
    """Shape of one use per example: groups x (positions, inputs, outputs)."""

    groups: int
    positions: int
    inputs: int
    outputs: int

    @property
    def gradient_numbers(self) -> int:
        """Numbers in one example's gradient."""
        return self.groups * self.inputs * self.outputs

    @property
    def booked_numbers(self) -> int:
        """Numbers per example that booking input and output gradient holds."""
        return self.groups * self.positions * (self.inputs + self.outputs)


def choose(cost: Cost) -> Route:
    """The cheapest route for this shape. See the module docstring for the rule."""
    if cost.positions == 1:
        return Route.GRAM
    if cost.gradient_numbers <= cost.booked_numbers:
        return Route.KEEP
    if cost.positions * (cost.inputs + cost.outputs) < cost.inputs * cost.outputs:
        return Route.GRAM
    return Route.DIRECT
