"""A root search for decreasing positive functions that are expensive: few evaluations, and a result that is never
above.

Solves ``f(x) = target`` for f decreasing in x > 0, where each f(x) costs a composition of privacy losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 0.9991
"""A value in [WINDOW, 1] x target ends the search."""

_AIM = 0.9996
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
) -> Root | None:
    """An x with ``WINDOW * target <= function(x) <= target``.

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
    """
    seen: list[tuple[float, float]] = []
    x = guess(_AIM * target)
    for evaluations in range(1, _MAX_EVALUATIONS + 1):
        value = function(x)
        seen.append((x, value))
        if WINDOW * target <= value <= target:
            return Root(x=x, value=value, evaluations=evaluations)
        below = max((point for point, height in seen if height > target), default=None)
        above = min((point for point, height in seen if height <= target), default=None)
        if below is not None and above is not None and above / below < 1 + 1e-9:
            break
        proposal = _corrected(seen[0], target, guess, guess_value) if len(seen) == 1 else _interpolated(seen, target)
        x = _inside(proposal, below, above, evaluations=evaluations)
    best = min((point for point in seen if point[1] <= target), default=None)
    return None if best is None else Root(x=best[0], value=best[1], evaluations=len(seen))


def _corrected(
    first: tuple[float, float], target: float, guess: Callable[[float], float], guess_value: Callable[[float], float]
) -> float:
    """The model's x once its values are scaled to agree with the first evaluation."""
    x, value = first
    modelled = guess_value(x)
    if not (0 < value < math.inf and 0 < modelled < math.inf):
        return math.nan
    return guess(_AIM * target * modelled / value)


def _interpolated(seen: list[tuple[float, float]], target: float) -> float:
    """Inverse interpolation: log x as a polynomial in log f through the (at most) three evaluations nearest."""
    finite = [(math.log(x), math.log(value / target)) for x, value in seen if _TINY < value < math.inf]
    near = sorted(finite, key=lambda point: abs(point[1]))[:3]
    if len(near) < 2 or len({height for _, height in near}) < len(near):
        return math.nan
    wanted, log_x = math.log(_AIM), 0.0
    for index, (point, height) in enumerate(near):
        others = [other for position, (_, other) in enumerate(near) if position != index]
        log_x += point * math.prod((wanted - other) / (height - other) for other in others)
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
