"""How far can noise move the weights before the loss doubles? Asked privately, and answered by a rate.

**The idea.** Under differential privacy an update is mostly noise, and what limits the rate is how much noise the
weights bear. That is a property of model and data at the start, in units of weights, whatever the optimizer: the
*tolerance*, the root mean square of a random displacement at which the mean loss doubles. The rate follows from it by a
constant (`PER_UPDATE`), as docs/lab-notes.md measures. No gradient is needed: it is known before the first update.
Asked later, when the model has learned something, it is the displacement that costs what was learned.

**The search.** Each probe is one of the plan's updates, spent on one bounded number in place of a gradient: the mean
rise of the loss at one displacement, on a Poisson batch of its own. So epsilon is that of the plan, bit by bit,
whatever is probed and how often. The noise of the answer is known; a posterior over the tolerance on a logarithmic grid
says where to ask next, and when to stop. A rate is moved on evidence only: where no displacement was seen to raise the
loss, the prior stays. `discreet.train.rate_search` asks twice.

Differs from HyFreeDP (arXiv:2503.00703), which follows the loss along each update: see docs/lab-notes.md for what that
does to a rate that was right.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from discreet.core.probe import OCTAVES

PRIOR = 0.02
"""Root mean square movement of a weight by one update, before anything is asked: that of DP-Adam at rate 0.02."""
PER_UPDATE = 1.0 / 8.0
"""First movement of an update over the tolerance, for the usual number of updates. Steps of random direction add up
like a square root: with more updates each is smaller by the root of their number."""
USUAL_UPDATES = 300

CAP = 8.0
"""A rise is clipped at so many times the level of the loss."""
WORST_NOISE = 0.5
"""With more noise in an answer, in units of the level, nothing is asked."""
SHARE = 25
"""One update in so many may be spent on the probes of a search, and no more than `MOST` of them."""
MOST, FEWEST = 8, 3
ENOUGH = 0.35
"""Octaves of standard deviation at which the tolerance is known well enough."""

OPEN = 1.0
"""With more octaves of standard deviation than this, the answers leave the tolerance open."""

LEAST_LEARNED = 0.1
"""What a model has learned counts as this share of its loss, at least."""

_STEEPNESS = 2.5
"""Rises grow like this power of the displacement around the tolerance, on all models measured (2 to 3)."""
_PATIENCE = 2
"""After so many answers without a rise, the next question is a standard deviation further out."""
_GRID = np.arange(-36.0, 16.0, 0.125)
_PRIOR_OCTAVES = 2.0
_MODEL_ERROR, _FLOOR_ERROR = 0.4, 0.15
_WORST_LOG_LIKELIHOOD = -8.0
_SIGNIFICANT = 4.0


def per_update(updates: int) -> float:
    """Movement by the first of so many updates, over the tolerance."""
    return PER_UPDATE * math.sqrt(USUAL_UPDATES / updates)


class Asked(enum.Enum):
    """What a probe asks."""

    LEVEL = "level"
    RISE = "rise"


@dataclass(frozen=True)
class Question:
    """One probe.

    Attributes:
        asked: the kind. displacement: root mean square over the weights, for a rise. bound: of one example's rise.
    """

    asked: Asked
    displacement: float = 0.0
    bound: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What a probe released, with its known noise. Safe to log.

    Attributes:
        displacement: as asked. rise: of the mean loss, in units of the search. noise: standard deviation of ``rise``.
    """

    displacement: float
    rise: float
    noise: float


@dataclass(frozen=True)
class Verdict:
    """Where the rate comes from. Released or public, all of it.

    Attributes:
        movement: root mean square movement of a weight by the first update.
        tolerance: the displacement at which the loss rises by the unit of the search; None where it is not known.
        octaves: its standard deviation, in factors of two; None likewise.
        accepted: whether the probes, and not the prior, say so.
        reason: in words.
    """

    movement: float
    tolerance: float | None
    octaves: float | None
    accepted: bool
    reason: str


@dataclass
class ToleranceSearch:
    """A posterior over the tolerance, and what to ask next.

    Attributes:
        noise: noise multiplier over expected batch: standard deviation of the released mean of a number in [-1, 1].
        updates: S, of the whole run.
        prior: movement of a weight by an update, before anything is asked.
        share: one update in so many may be spent, and one in `SHARE` while the answers leave the tolerance open.
        enough: octaves of standard deviation at which to stop.
        before: the released mean loss before training; None when nothing has been trained yet.
        level: the released mean loss, once known. answers: all so far. asked: probes made.
    """

    noise: float
    updates: int
    prior: float = PRIOR
    share: int = SHARE
    enough: float = ENOUGH
    before: float | None = None
    level: float | None = None
    answers: list[Answer] = dataclasses.field(default_factory=list)
    asked: int = 0

    @property
    def most(self) -> int:
        """Probes that may be made, if the tolerance is not left open; public."""
        return min(MOST, self.updates // self.share)

    @property
    def unit(self) -> float:
        """The rise that is asked for: the level, or less where a model has learned less than that."""
        assert self.level is not None
        if self.before is None:
            return self.level
        return min(self.level, max(self.before - self.level, LEAST_LEARNED * self.level))

    @property
    def refusal(self) -> str | None:
        """Why nothing is asked, from public numbers alone; None where probes are worth their updates."""
        if self.most < FEWEST:
            return f"held: {self.updates} updates are too few to spend {FEWEST} of them on probes"
        if self.noise * CAP > WORST_NOISE:
            return "held: the noise is too large for the batch to see the loss rise"
        return None

    def question(self) -> Question | None:
        """What to ask next; None when the answer is known well enough, or will not be."""
        if self.refusal is not None:
            return None
        if self.level is None:
            return None if self.asked else Question(Asked.LEVEL)
        mean, spread = self._posterior()
        if spread < self.enough and self._rose:
            return None
        limit = self.most if self._rose and spread <= OPEN else min(MOST, self.updates // SHARE)
        if self.asked >= limit:
            return None
        if len(self.answers) >= _PATIENCE and not self._rose:
            mean += spread
        return Question(Asked.RISE, displacement=2.0**mean, bound=CAP * self.unit)

    def observe_level(self, shares: Sequence[float]) -> None:
        """Take in the released counts by octave, as shares of the expected batch.

        Shares within three standard deviations of nothing are left out; if all are, the level stays unknown.
        """
        self.asked += 1
        told = [(share, octave) for share, octave in zip(shares, OCTAVES, strict=True) if share > 3.0 * self.noise]
        whole = math.fsum(share for share, _ in told)
        if whole > 0:
            self.level = math.fsum(share * 1.5 * 2.0**octave for share, octave in told) / whole

    def observe_rise(self, question: Question, mean: float) -> Answer:
        """Take in the released mean rise at a displacement."""
        assert self.level is not None
        self.asked += 1
        answer = Answer(question.displacement, mean / self.unit, self.noise * question.bound / self.unit)
        self.answers.append(answer)
        return answer

    def verdict(self) -> Verdict:
        """The rate as far as it is known."""
        if self.refusal is not None:
            return Verdict(self.prior, None, None, False, self.refusal)
        if not self.answers:
            return Verdict(self.prior, None, None, False, "held: no level of the loss stood out of the noise")
        mean, spread = self._posterior()
        if not self._rose:
            return Verdict(self.prior, None, None, False, "held: no displacement raised the loss beyond its noise")
        movement = 2.0**mean * per_update(self.updates)
        factor = movement / self.prior
        word = "confirmed" if abs(math.log(factor)) < math.log(1.25) else "grown" if factor > 1 else "shrunk"
        return Verdict(
            movement, 2.0**mean, spread, True, f"{word}: {factor:.3g} times the prior, by {len(self.answers)} answers"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        answers = [dataclasses.astuple(answer) for answer in self.answers]
        return {"level": self.level, "asked": self.asked, "answers": answers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take in the `state` of a checkpoint."""
        self.level, self.asked = state["level"], state["asked"]
        self.answers = [Answer(*answer) for answer in state["answers"]]

    @property
    def _rose(self) -> bool:
        """Whether some displacement was seen to raise the loss: without that, the tolerance has no upper end."""
        return any(answer.rise > 0.5 and answer.rise > _SIGNIFICANT * answer.noise for answer in self.answers)

    def _posterior(self) -> tuple[float, float]:
        """Mean and standard deviation of log2 of the tolerance.

        A rise at displacement d is ``min((d / tolerance)^2.5, CAP)`` up to its noise and to 40 % of itself; the prior
        is a Cauchy distribution around the one that the prior movement implies.
        """
        centre = math.log2(self.prior / per_update(self.updates))
        log_K = -np.log1p(((_GRID - centre) / _PRIOR_OCTAVES) ** 2)
        for answer in self.answers:
            expected_K = np.minimum(2.0 ** (_STEEPNESS * (math.log2(answer.displacement) - _GRID)), CAP)
            spread_K = np.sqrt(answer.noise**2 + (_MODEL_ERROR * expected_K) ** 2 + _FLOOR_ERROR**2)
            fit_K = -0.5 * ((answer.rise - expected_K) / spread_K) ** 2 - np.log(spread_K)
            log_K += np.maximum(fit_K, fit_K.max() + _WORST_LOG_LIKELIHOOD)
        weight_K = np.exp(log_K - log_K.max())
        weight_K /= weight_K.sum()
        mean = float(weight_K @ _GRID)
        return mean, math.sqrt(float(weight_K @ (_GRID - mean) ** 2))
