"""What to change when probabilities cannot be believed, each with its reason.

The figures behind it are in docs/lab-notes.md and in the calibration page: clipping, and not noise, makes a model too
sure of itself (arXiv:2106.07830); a clip bound that is too large for the learning rate leaves it not sure enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TOO_SURE, TOO_UNSURE = 1.2, 0.85
"""Temperatures beyond which the clip bound is worth a change."""

_NORMALISING = ("automatic", "normalized", "psac")
"""Kinds of clipping whose bound only scales the learning rate."""


@dataclass(frozen=True)
class Seen:
    """What advice rests on.

    Attributes:
        temperature: T* of the model as it is, with its standard error; infinite when unknown.
        loss: nats that T* wins. notable: the calibration error is above what chance shows.
        tempered: a temperature is applied already. private: the rows are private, and their figures exact.
        clipping: the public record of the run's clipping rule; empty when the model is not of a run.
    """

    temperature: float
    std: float
    loss: float
    notable: bool
    tempered: bool
    private: bool
    clipping: Mapping[str, object]


def advice(seen: Seen) -> tuple[str, ...]:
    """Sentences, the most useful one first."""
    lines = [*_temperature(seen), *_clipping(seen), *_rest(seen)]
    if seen.private and lines:
        lines.append(
            "These figures are of private rows: choosing anything by them, and training again, is a release of its "
            "own that no ledger holds. Use public rows, or `discreet calibrate --epsilon`."
        )
    return tuple(lines)


def _sure(seen: Seen) -> int:
    """1: too sure beyond doubt; -1: not sure enough; 0: neither."""
    error = 2 * seen.std if math.isfinite(seen.std) else math.inf
    if seen.temperature - error > 1:
        return 1
    return -1 if seen.temperature + error < 1 else 0


def _temperature(seen: Seen) -> list[str]:
    if not _sure(seen):
        if seen.notable:
            return [
                "No temperature mends this: the error differs from bin to bin or from class to class. With public "
                "rows, fit a map of its own to each class (vector scaling)."
            ]
        return ["Nothing to mend that this many rows could show."]
    word = "too sure" if seen.temperature > 1 else "not sure enough"
    again = "Fit the temperature again on more rows" if seen.tempered else "Divide the logits by a temperature"
    return [
        f"{again}: the model is {word}, and T = {seen.temperature:.2f} would win {seen.loss:.3f} nats per row and "
        "change no answer. It is the cheapest remedy: `discreet train --private-temperature` costs no epsilon beyond "
        "that of training, since its rows are in no other query; on public rows it is exact."
    ]


def _clipping(seen: Seen) -> list[str]:
    if seen.tempered or not seen.clipping:
        return []
    kind = str(seen.clipping.get("kind", ""))
    if seen.temperature > TOO_SURE and _sure(seen) > 0:
        if kind in _NORMALISING:
            return [
                "Or clip by a bound instead of normalising every gradient, e.g. --clipping abadi:10: normalised, "
                "examples that are already right pull as hard as those that are wrong, and confidence grows without "
                "end. What normalises more softly (a larger gamma, PSAC) lies between."
            ]
        return [
            f"Or raise the clip bound of {seen.clipping.get('clip_bound')} three- to tenfold, towards the 90 to 95 % "
            "quantile of gradient norms: below it, examples that are already right pull as hard as those that are "
            "wrong, and confidence grows without end. With plain descent divide the learning rate by the same factor; "
            "with Adam leave it."
        ]
    if seen.temperature < TOO_UNSURE and _sure(seen) < 0:
        return [
            "Or make more progress: more steps, a higher learning rate, or a lower clip bound. A bound far above the "
            "gradients' norms only adds noise; with plain descent, a rate that was lowered with it learns too little."
        ]
    return []


def _rest(seen: Seen) -> list[str]:
    if not _sure(seen) or not seen.clipping:
        return []
    lines = []
    if str(seen.clipping.get("kind", "")).startswith("quantile"):
        lines.append(
            "For a bound that follows a quantile, take .7 to .9 where probabilities matter; the median clips too low."
        )
    lines.append(
        "Do not choose clip bound or learning rate by accuracy: it stays within a point where the loss doubles."
    )
    return lines
