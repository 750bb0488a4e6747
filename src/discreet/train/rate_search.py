"""When the tolerance is asked for: before the first update, and once more when the model has learned something.

What noise destroys is what a model knows. A fresh network knows nothing, so its loss says how far random weights
carry, and not how much of what will be learned they bear: where units saturate, a fresh loss hardly rises although the
network is scrambled by a sixth of the noise (docs/lab-notes.md). A model that begins trained has most to lose at the
start. So both are asked, and the smaller of the two tolerances rules. Until the second is known, the rate is no larger
than `discreet.train.tolerance.PRIOR` for the usual number of updates, at which DP-Adam learns something everywhere; a
run too short to ask again keeps to that.

The second search asks for a rise by what was learned so far, and no more than the level; a loss that cannot fall far
(a language model's) is then no licence to scramble. It begins at the tolerance of the rate in force, not at the first
answer, which may be any number where a loss levels off. Answers that leave it open may lower the rate, by as much as
their upper end is below, and never raise it above what is usual.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from discreet.train.tolerance import (
    FEWEST,
    OPEN,
    PRIOR,
    USUAL_UPDATES,
    Answer,
    Question,
    ToleranceSearch,
    Verdict,
)

AGAIN = 8
"""The second search begins when one update in so many is made."""
FIRST_ENOUGH = 0.5
SECOND_SHARE = 50


class RateSearch:
    """Two searches for the tolerance, and the movement of an update that follows.

    Args:
        noise: noise multiplier over expected batch. updates: S, of the whole run.
        prior: where the first search begins; what rules where it says nothing.
    """

    def __init__(self, *, noise: float, updates: int, prior: float = PRIOR) -> None:
        self._updates = updates
        self.first = ToleranceSearch(noise=noise, updates=updates, prior=prior, enough=FIRST_ENOUGH)
        self.second: ToleranceSearch | None = None
        self._first_over = self._second_over = False
        self._said: tuple[int, Verdict] | None = None

    @property
    def asked(self) -> int:
        """Probes made."""
        return self.first.asked + (self.second.asked if self.second is not None else 0)

    @property
    def level(self) -> float | None:
        """The released mean loss that was told last."""
        return self._current.level

    def question(self, done: int) -> Question | None:
        """What to ask when so many updates are made; None when nothing is due, or nothing more can be told."""
        if not self._first_over:
            if (question := self.first.question()) is not None:
                return question
            self._first_over = True
        if self._second_over or not self._is_due(done):
            return None
        if self.second is None:
            self.second = ToleranceSearch(
                noise=self.first.noise,
                updates=self._updates,
                prior=self.verdict().movement,
                share=SECOND_SHARE,
                before=self.first.level,
            )
        question = self.second.question()
        self._second_over = question is None
        return question

    def observe_level(self, shares: Sequence[float]) -> None:
        """Take in the released counts by octave."""
        self._current.observe_level(shares)

    def observe_rise(self, question: Question, mean: float) -> Answer:
        """Take in the released mean rise at a displacement."""
        return self._current.observe_rise(question, mean)

    def verdict(self) -> Verdict:
        """The movement as far as it is known: that of the smaller tolerance."""
        if self._said is None or self._said[0] != self.asked:
            self._said = (self.asked, self._verdict())
        return self._said[1]

    def _verdict(self) -> Verdict:
        first = self.first.verdict()
        if not first.accepted:
            return first
        safe = min(first.movement, PRIOR * math.sqrt(USUAL_UPDATES / self._updates))
        if self.second is None:
            return dataclasses.replace(first, movement=safe)
        second = self.second.verdict()
        if not second.accepted:
            return dataclasses.replace(first, movement=safe, reason=f"{first.reason}; asked again: {second.reason}")
        told = f"{first.tolerance:.3g} at the start, {second.tolerance:.3g} after one update in {AGAIN}"
        reason = f"tolerance {told}, by {self.asked} probes"
        if second.octaves is not None and second.octaves > OPEN:
            likely = second.movement * 2.0**second.octaves
            reason = f"{reason}, which leave {second.octaves:.1f} octaves open: no more than is usual"
            return dataclasses.replace(second, movement=min(safe, likely), reason=reason)
        smaller = min((first, second), key=lambda verdict: verdict.movement)
        return dataclasses.replace(smaller, reason=reason)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"first": self.first.state(), "second": None if self.second is None else self.second.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take in the `state` of a checkpoint."""
        self.first.restore(state["first"])
        if state["second"] is not None:
            self.question(self._updates)
            assert self.second is not None
            self.second.restore(state["second"])
            self._second_over = False
        self._said = None

    @property
    def _current(self) -> ToleranceSearch:
        return self.first if self.second is None else self.second

    def _is_due(self, done: int) -> bool:
        return (
            self.first.verdict().accepted and self._updates >= FEWEST * SECOND_SHARE and done >= self._updates // AGAIN
        )
