"""Which way to a per-example gradient norm is cheapest, from shapes alone.

A weight of I inputs and O outputs that meets S positions of each example costs, per example and group,

    GRAM   S^2 (I + O) / 2 multiply-adds               ghost norm, arXiv:2110.05679 Eq. 3, upper half only
    KEEP   I O numbers, held until the factors are known   instantiate, then sum what was kept
    DIRECT S I O multiply-adds                         instantiate for the norm, tile by tile, and hold nothing

KEEP replaces the contraction that the weighted sum would do, so its price is memory and the time to move it; GRAM and
DIRECT come on top of that contraction. A convolution has two Gram routes: PIXELS multiplies input pixels with each
other once and adds up shifted copies for the taps of the kernel; WINDOWS unfolds first. DIRECT needs a kernel that
squares its tiles where they are made (`discreet.core.kernels`); without one KEEP is always better, and may be had
wherever GRAM is dear.

Every choice is made from the shape of one example, never from data nor from how many there are: routes round norms up
by amounts of their own. Other lengths may go another way in training: the check takes all in turn (`forced`).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Prices:
    """What things cost on a device, in multiply-adds of the norm's own precision.

    Attributes:
        move: the time that one kept number is written and read again.
        entry: the time of one entry of a Gram matrix: product, sum, shifted copy.
        direct: whether DIRECT may be had.
        unfolded: whether the windows of an image have to be unfolded, and are multiplied whole.
        tap: without unfolding, the time of an entry of a matrix of pixels: made, or added for one tap.
    """

    move: float
    entry: float
    direct: bool = False
    unfolded: bool = True
    tap: float = math.inf


CPU = Prices(move=60.0, entry=20.0)
"""Measured on a CPU, without kernels: 35 to 100 for ``move``."""
PANELS = Prices(move=60.0, entry=35.0, unfolded=False, tap=6.0)
"""Kernels of a CPU, measured: half an entry's tile is made twice over, and packed, summed and multiplied once."""
PANELS_OF_WINDOWS = replace(PANELS, tap=math.inf)
"""The same where pixels are too many to be multiplied with each other at once."""

# NOT MEASURED, the next two: computed from the data sheet of an H100 (3.35 TB/s; 67 TFLOP/s in float32).
ACCELERATOR = Prices(move=80.0, entry=150.0)
"""Without kernels, float32: 8 bytes a kept number; 24 bytes for each entry that is computed, five eighths of them."""
KERNELS = Prices(move=80.0, entry=4.0, direct=True)
"""Kernels in float32, without TF32: an entry takes a few instructions and no memory."""
TENSOR_CORES = Prices(move=1000.0, entry=1800.0, direct=True)
"""Kernels on bfloat16 operands, measured on an H100 at 1,024 positions: DIRECT makes 425 TFLOP/s, Gram matrices 315."""


class Route(enum.Enum):
    """How the norm of one use is computed."""

    PRODUCT = "product of norms"
    GRAM = "gram"
    DIRECT = "instantiate twice"
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
        direct: what DIRECT costs, where it may be had.
    """

    route: Route
    gram: float
    keep: float
    kept: int
    booked: int
    routes: tuple[Route, ...]
    direct: float | None = None

    def __str__(self) -> str:
        if self.route is Route.PRODUCT:
            return self.route.value
        why = f"; kept {_short(self.kept)} > booked {_short(self.booked)} numbers" if self.kept > self.booked else ""
        direct = "" if self.direct is None else f", direct {_short(self.direct)}"
        return f"{self.route.value} (gram {_short(self.gram)}{direct}, keep {_short(self.keep)} multiply-adds{why})"


@dataclass(frozen=True)
class Cost:
    """Shape of one use per example and group: (positions, inputs, outputs), and the prices."""

    positions: int
    inputs: int
    outputs: int
    examples: int = 2  # for `forced` alone
    prices: Prices = field(default=CPU, kw_only=True)

    @property
    def kept(self) -> int:
        """Numbers that KEEP holds, per example."""
        return self.inputs * self.outputs

    def choose(self) -> Choice:
        """The cheapest route whose kept gradients are no larger than what booking holds."""
        return self._chosen() if _forced is not None else _known(self)

    def _chosen(self) -> Choice:
        """Of a linear map."""
        if self.positions == 1 and _forced is None:
            routes = (Route.PRODUCT, Route.GRAM, Route.KEEP)
            return Choice(Route.PRODUCT, 0.0, 0.0, self.kept, self.inputs + self.outputs, routes)
        gram = self.positions**2 * ((self.inputs + self.outputs) / 2 + self.prices.entry)
        direct = float(self.positions * self.inputs * self.outputs) if self.prices.direct else None
        booked = self.positions * (self.inputs + self.outputs)
        return _cheaper(self, booked, {Route.GRAM: gram}, direct=direct)


@dataclass(frozen=True)
class WindowCost(Cost):
    """The same for a convolution: ``inputs`` is channels times taps; positions are the output's, pixels the input's."""

    pixels: int = 1
    taps: int = 1

    def _chosen(self) -> Choice:
        """Of a convolution."""
        channels = self.inputs // self.taps
        square = self.positions**2
        booked = self.pixels * channels + self.positions * self.outputs
        if not self.prices.unfolded:
            windows = square * ((self.inputs + self.outputs) / 2 + self.prices.entry)
            pixels = self.pixels**2 * (channels / 2 + self.prices.tap)
            pixels += square * (self.outputs / 2 + self.prices.entry + self.taps * self.prices.tap)
            return _cheaper(self, booked, {Route.WINDOWS: windows, Route.PIXELS: pixels})
        pixels = self.pixels**2 * (channels + self.prices.entry) + square * (
            self.outputs + self.taps * self.prices.entry
        )
        windows = square * (self.inputs + self.outputs + self.prices.entry)
        windows += self.positions * self.inputs * self.prices.move
        return _cheaper(self, booked, {Route.PIXELS: pixels, Route.WINDOWS: windows})


@functools.lru_cache(maxsize=4096)
def _known(cost: Cost) -> Choice:
    return cost._chosen()


def _cheaper(cost: Cost, booked: int, grams: dict[Route, float], *, direct: float | None = None) -> Choice:
    best = min(grams, key=grams.__getitem__)
    others = grams if direct is None else {**grams, Route.DIRECT: direct}
    taken = min(others, key=others.__getitem__)
    keep = cost.prices.move * cost.kept
    if cost.kept <= booked and keep <= others[taken]:
        taken = Route.KEEP
    if _forced is not None and _forced.takes(cost, others):
        taken = _forced.route
    return Choice(taken, grams[best], keep, cost.kept, booked, (*others, Route.KEEP), direct)


_FORCED_WORK, _FORCED_NUMBERS = 1 << 28, 1 << 22
"""Multiply-adds per example, and kept numbers in all, that the self-check may spend on a route it would not choose."""


class _Forced:
    """A route to be taken wherever it exists, within what it may cost."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self._left = _FORCED_NUMBERS

    def takes(self, cost: Cost, grams: dict[Route, float]) -> bool:
        """Whether this use takes the route; one that keeps uses up what may be kept."""
        if self.route is not Route.KEEP:
            return self.route in grams and grams[self.route] <= _FORCED_WORK
        numbers = cost.kept * cost.examples
        if numbers > self._left:
            return False
        self._left -= numbers
        return True


_forced: _Forced | None = None


@contextlib.contextmanager
def forced(route: Route) -> Iterator[None]:
    """Take this route inside, wherever it exists and is not far too dear: norms must be the same."""
    global _forced
    _forced = _Forced(route)
    try:
        yield
    finally:
        _forced = None


def _short(number: float) -> str:
    if number < 1000:
        return f"{number:.0f}"
    power = min(4, int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g}{' kMGT'[power]}"
