"""Which settings of the grid are worth a run: an oracle that looks needs no run that it would not choose.

Accuracy rises and falls once along the rates. So the first seed walks outward from the middle of the rates, and stops
on a side that is `LOST` behind the best of its kind and form; later seeds take what is within `CLOSE` of the best of
the first. Both are shares of right answers.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.auto_lr.contestants import RATES, grid

LOST, CLOSE = 0.05, 0.02


def outward() -> tuple[str, ...]:
    """All settings of the grid, those in the middle of the rates first."""
    return tuple(sorted(grid(), key=lambda setting: abs(_place(setting))))


def is_worth_a_run(setting: str, first: Mapping[str, float], *, seed: int) -> bool:
    """Whether a setting may still be the best.

    Args:
        setting: of the grid. first: setting -> accuracy with the first seed, as far as there are any. seed: to be run.
    """
    if seed > 0:
        return setting in first and first[setting] >= max(first.values()) - CLOSE
    _, kind, _, shape = setting.split(":")
    place = _place(setting)
    best = max((value for other, value in first.items() if _row(other) == (kind, shape)), default=0.0)
    sign = 1 if place > 0 else -1
    inner = [_setting(kind, sign * distance, shape) for distance in range(1, abs(place))]
    return all(other in first and first[other] >= best - LOST for other in inner)


def _row(setting: str) -> tuple[str, str]:
    _, kind, _, shape = setting.split(":")
    return kind, shape


def _place(setting: str) -> int:
    """Steps from the middle rate."""
    _, kind, rate, _ = setting.split(":")
    return RATES[kind].index(float(rate)) - len(RATES[kind]) // 2


def _setting(kind: str, place: int, shape: str) -> str:
    return f"grid:{kind}:{RATES[kind][place + len(RATES[kind]) // 2]:g}:{shape}"
