"""Root searches for monotone functions that are expensive: few evaluations, and a result that is never above.

Each value costs a composition of privacy losses. `solve_decreasing` finds a real number (the noise), `largest_within` a
whole one (steps, examples).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 0.9991
"""A value in [WINDOW, 1] x target ends the search, unless another window is asked for."""
_MAX_EVALUATIONS = 60
_WIDEN = 1.6
_LEAP = 16.0
_LARGEST_LOG = 600.0
_TINY = 1e-300


@dataclass(frozen=True)
class Root:
    """Where the search ended: ``value = f(x) <= target``, after ``evaluations`` calls of f."""

    x: float
    value: float
    evaluations: int


def solve_decreasing(
    function: Callable[[float], float],
    *,
    target: float,
    guess: Callable[[float], float],
    guess_value: Callable[[float], float],
    window: float = WINDOW,
    smallest: float = 0.0,
    largest: float = math.inf,
) -> Root | None:
    """An x with ``window * target <= function(x) <= target``.

    The first x is the model's, ``guess(target)``. The second corrects the model by the ratio seen at the first. From
    then on inverse interpolation of log x in log f, kept inside the bracket of the largest x seen that is too small and
    the smallest that is large enough.

    **Guarantees.** The value returned was evaluated at the x returned, and is not above ``target``. If the window
    cannot be hit (a floor under f, or a jump), the best x that is not above the target is returned; None when there is
    none.

    Args:
        function: f, decreasing.
        target: > 0.
        guess: a model's inverse, value -> x > 0; it may be far off.
        guess_value: the model itself, x -> value.
        window: in (0, 1).
        smallest: no smaller x is looked at. It is the answer if f is not above the target there.
        largest: no larger x is looked at. There is no answer if f is above the target there.
    """
    seen: list[tuple[float, float]] = []
    aim = 0.5 * (1 + window)
    x = min(largest, max(smallest, guess(aim * target)))
    for evaluations in range(1, _MAX_EVALUATIONS + 1):
        value = function(x)
        seen.append((x, value))
        if window * target <= value <= target or (x <= smallest and value <= target):
            return Root(x=x, value=value, evaluations=evaluations)
        below = max((point for point, height in seen if height > target), default=None)
        above = min((point for point, height in seen if height <= target), default=None)
        if below is not None and above is not None and above / below < 1 + 1e-9:
            break
        if len(seen) == 1:
            proposal = _corrected(seen[0], aim * target, guess, guess_value)
        else:
            proposal = _interpolated(seen, aim * target)
        if below is not None and below >= largest:
            break
        x = min(largest, max(smallest, _inside(proposal, below, above, evaluations=evaluations)))
    best = min((point for point in seen if point[1] <= target), default=None)
    return None if best is None else Root(x=best[0], value=best[1], evaluations=len(seen))


@dataclass(frozen=True)
class Largest:
    """Where a search for a whole number ended: ``value = f(n) <= target``.

    Attributes:
        n: the number found. value: f(n). evaluations: calls of f.
        at_limit: n is the largest number that was allowed.
    """

    n: int
    value: float
    evaluations: int
    at_limit: bool


def largest_within(
    function: Callable[[int], float], *, target: float, guess: int, limit: int, window: float = WINDOW
) -> Largest | None:
    """A whole number n from 1 to ``limit`` with ``function(n) <= target``, as large as there is.

    **Guarantees.** The value returned was evaluated at the n returned. Either it is at least ``window * target``, or
    ``function(n + 1)`` was seen to be above the target, or n is the limit. None when ``function(1)`` is above.

    Args:
        function: f, increasing.
        target: > 0.
        guess: where to begin; it may be far off.
        limit: >= 1.
        window: in (0, 1); 1 asks for the very largest.
    """
    seen: dict[int, float] = {}
    n = min(max(1, guess), limit)
    for _ in range(_MAX_EVALUATIONS):
        seen[n] = function(n)
        within = max((point for point, value in seen.items() if value <= target), default=0)
        above = min((point for point, value in seen.items() if value > target), default=limit + 1)
        if within and (within + 1 >= above or seen[within] >= window * target):
            break
        if above == 1:
            return None
        n = _between(seen, within, above, target=0.5 * (1 + window) * target)
    return Largest(n=within, value=seen[within], evaluations=len(seen), at_limit=within == limit) if within else None


def _between(seen: dict[int, float], within: int, above: int, *, target: float) -> int:
    """The next n, strictly inside the bracket: by a straight line in log n and log f, or the geometric middle."""
    points = [(math.log(n), math.log(value / target)) for n, value in seen.items() if _TINY < value < math.inf]
    near = sorted(points, key=lambda point: abs(point[1]))[:2]
    proposal = math.nan
    if len(near) == 2 and near[0][1] != near[1][1]:
        slope = (near[1][0] - near[0][0]) / (near[1][1] - near[0][1])
        proposal = math.exp(min(near[0][0] - slope * near[0][1], _LARGEST_LOG))
    elif len(near) == 1:
        # One point alone: epsilon grows like the root of n, roughly.
        proposal = math.exp(min(near[0][0] - 2 * near[0][1], _LARGEST_LOG))
    if not within < proposal < above or len(seen) % 4 == 0:
        proposal = math.sqrt(max(within, 1) * above)
    return min(max(within + 1, round(proposal)), above - 1)


def _corrected(
    first: tuple[float, float], target: float, guess: Callable[[float], float], guess_value: Callable[[float], float]
) -> float:
    """The model's x once its values are scaled to agree with the first evaluation."""
    x, value = first
    modelled = guess_value(x)
    if not (0 < value < math.inf and 0 < modelled < math.inf):
        return math.nan
    return guess(target * modelled / value)


def _interpolated(seen: list[tuple[float, float]], target: float) -> float:
    """Inverse interpolation: log x as a polynomial in log f through the (at most) three evaluations nearest."""
    finite = [(math.log(x), math.log(value / target)) for x, value in seen if _TINY < value < math.inf]
    near = sorted(finite, key=lambda point: abs(point[1]))[:3]
    if len(near) < 2 or len({height for _, height in near}) < len(near):
        return math.nan
    log_x = 0.0
    for index, (point, height) in enumerate(near):
        others = [other for position, (_, other) in enumerate(near) if position != index]
        log_x += point * math.prod((0.0 - other) / (height - other) for other in others)
    return math.exp(min(max(log_x, -_LARGEST_LOG), _LARGEST_LOG))


def _inside(proposal: float, below: float | None, above: float | None, *, evaluations: int) -> float:
    """The proposal if it is inside the bracket and no leap out of it; else the middle, or a step outwards.

    While the bracket is open, a leap is at most sixteenfold, and steps without a proposal grow.
    """
    widen = _WIDEN**evaluations
    if below is None:
        assert above is not None
        return max(proposal, above / _LEAP) if proposal < above else above / widen
    if above is None:
        return min(proposal, below * _LEAP) if proposal > below else below * widen
    return proposal if below < proposal < above else math.sqrt(below * above)
