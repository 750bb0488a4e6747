"""Progress of long work on stderr: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_FIGURES = 1.0
"""On a bar: a composition takes tens of milliseconds, as long as a whole step of a small model."""


class Progress:
    """Shows steps done, epsilon so far and the time left. Public values only.

    Args:
        steps: updates in the whole run.
        done: updates made by an earlier process.
        unit: what is counted.
    """

    def __init__(self, *, steps: int, done: int = 0, unit: str = "step") -> None:
        self._steps = steps
        self._unit = unit
        self._first = done
        self._started = time.monotonic()
        self._shown = self._started
        self._bar: Any = None
        if sys.stderr.isatty() and find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit=unit, file=sys.stderr, dynamic_ncols=True)

    def show(self, done: int, *, epsilon: Callable[[], float] | None = None, of: int | None = None) -> None:
        """Report that ``done`` updates are made and at most ``epsilon()`` is spent.

        Args:
            epsilon: asked only when it is shown; None where nothing is spent.
            of: steps in all, where that is known only now.
        """
        self._steps = of if of is not None else self._steps
        if self._bar is not None:
            self._bar.total = self._steps
            now = time.monotonic()
            if epsilon is not None and (now - self._shown >= _SECONDS_BETWEEN_FIGURES or done >= self._steps):
                self._shown = now
                self._bar.set_postfix_str(f"epsilon {epsilon():.3f}", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown < SECONDS_BETWEEN_LINES and done < self._steps:
            return
        self._shown = now
        left = (now - self._started) / max(1, done - self._first) * (self._steps - done)
        spent = "" if epsilon is None else f"  epsilon {epsilon():.3f}"
        print(f"{self._unit} {done}/{self._steps}{spent}  {_clock(left)} left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
