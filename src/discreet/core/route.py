"""Which way to a per-example gradient norm is cheapest, from shapes alone.

A weight of I inputs and O outputs that meets S positions of each example costs, per example and group,

    GRAM   S^2 (I + O) / 2 multiply-adds               ghost norm, arXiv:2110.05679 Eq. 3, upper half only
    KEEP   I O numbers, held until the factors are known   instantiate, then sum what was kept

KEEP replaces the contraction that the weighted sum would do, so its price is memory and the time to move it; GRAM comes
on top of that contraction. A convolution has two Gram routes: PIXELS multiplies input pixels with each other once and
adds up shifted copies for the taps of the kernel; WINDOWS unfolds first. The third way of arXiv:2210.00038, to
instantiate for the norm and again for the sum, is never best where KEEP may be had, and that is wherever GRAM is dear.

Every choice is made from shapes, never from data: it can be told to anyone. So training may take another route than the
self-check, whose batch is smaller: the check takes every route in turn (`forced`).
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

_MOVE = 60.0
"""Multiply-adds in the time that one kept number is written and read again (measured on a CPU: 35 to 100)."""
_ENTRY = 20.0
"""Multiply-adds in the time of one entry of a Gram matrix: product, sum, shifted copy."""


class Route(enum.Enum):
    """How the norm of one use is computed."""

    PRODUCT = "product of norms"
    GRAM = "gram"
    PIXELS = "gram of pixels"
    WINDOWS = "gram of windows"
    KEEP = "instantiate and keep"


@dataclass(frozen=True)
class Choice:
    """A route, and what it was chosen from.

    Attributes:
        route: the way taken.
        gram, keep: what the best Gram route and KEEP cost per example, in multiply-adds.
        kept, booked: numbers held per example, by KEEP and by all other routes.
        routes: all that it was chosen from.
    """

    route: Route
    gram: float
    keep: float
    kept: int
    booked: int
    routes: tuple[Route, ...]

    def __str__(self) -> str:
        if self.route is Route.PRODUCT:
            return self.route.value
        costs = f"gram {_short(self.gram)}, keep {_short(self.keep)} multiply-adds"
        why = f"; kept {_short(self.kept)} > booked {_short(self.booked)} numbers" if self.kept > self.booked else ""
        return f"{self.route.value} ({costs}{why})"


@dataclass(frozen=True)
class Cost:
    """Shape of one use per example and group: (positions, inputs, outputs), and the number of examples."""

    positions: int
    inputs: int
    outputs: int
    examples: int = 2

    @property
    def kept(self) -> int:
        """Numbers that KEEP holds beyond the weight's own gradient, per example."""
        return self.inputs * self.outputs * (self.examples - 1) // self.examples

    def choose(self) -> Choice:
        """The cheapest route of a linear map whose kept gradients are no larger than what booking holds."""
        if self.positions == 1 and _forced is None:
            routes = (Route.PRODUCT, Route.GRAM, Route.KEEP)
            return Choice(Route.PRODUCT, 0.0, 0.0, self.kept, self.inputs + self.outputs, routes)
        gram = self.positions**2 * ((self.inputs + self.outputs) / 2 + _ENTRY)
        booked = self.positions * (self.inputs + self.outputs)
        return _cheaper(self, booked, {Route.GRAM: gram})


@dataclass(frozen=True)
class WindowCost(Cost):
    """The same for a convolution: ``inputs`` is channels times taps; positions are the output's, pixels the input's."""

    pixels: int = 1
    taps: int = 1

    def choose(self) -> Choice:
        """The cheapest route of a convolution."""
        channels = self.inputs // self.taps
        square = self.positions**2
        pixels = self.pixels**2 * (channels + _ENTRY) + square * (self.outputs + self.taps * _ENTRY)
        windows = square * (self.inputs + self.outputs + _ENTRY) + self.positions * self.inputs * _MOVE
        booked = self.pixels * channels + self.positions * self.outputs
        return _cheaper(self, booked, {Route.PIXELS: pixels, Route.WINDOWS: windows})


def _cheaper(cost: Cost, booked: int, grams: dict[Route, float]) -> Choice:
    best = min(grams, key=grams.__getitem__)
    keep = _MOVE * cost.kept
    taken = Route.KEEP if cost.kept <= booked and keep <= grams[best] else best
    if _forced in grams or (_forced is Route.KEEP and cost.kept * cost.examples <= _FORCED_NUMBERS):
        taken = _forced
    return Choice(taken, grams[best], keep, cost.kept, booked, (*grams, Route.KEEP))


_forced: Route | None = None
_FORCED_NUMBERS = 1 << 26
"""Gradients that the self-check may hold in order to try KEEP where it would not be chosen."""


@contextlib.contextmanager
def forced(route: Route) -> Iterator[None]:
    """Take this route inside, wherever it exists: norms must be the same."""
    global _forced
    _forced = route
    try:
        yield
    finally:
        _forced = None


def _short(number: float) -> str:
    if number < 1000:
        return f"{number:.0f}"
    power = min(4, int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g}{' kMGT'[power]}"
