"""What to change when probabilities cannot be believed, each with its reason.

The figures behind it are in docs/lab-notes.md and in the calibration page: clipping, and not noise, makes a model too
sure of itself (arXiv:2106.07830); a clip bound that is too large for the learning rate leaves it not sure enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from discreet.core.clipping import Clipping, ClippingKind
from discreet.train.tempered import body_bound, is_tempered

TOO_SURE, TOO_UNSURE = 1.2, 0.85
"""Temperatures beyond which something is worth a change: between them it would win a few thousandths of a nat."""

_NORMALISING = (ClippingKind.AUTOMATIC, ClippingKind.NORMALIZED, ClippingKind.PSAC)
"""Kinds of clipping whose bound only scales the learning rate."""


@dataclass(frozen=True)
class Seen:
    """What advice rests on.

    Attributes:
        temperature: T* of the model as it is, with its standard error; infinite when unknown.
        loss: nats that T* wins.
        fitted: a temperature from rows of its own is applied already. private: the rows are private, and their figures
            exact.
        clipping: the run's rule; None when the model is not of a run.
    """

    temperature: float
    std: float
    loss: float
    fitted: bool
    private: bool
    clipping: Clipping | None


def advice(seen: Seen) -> tuple[str, ...]:
    """Sentences, the most useful one first; none where T* is between .85 and 1.2."""
    if TOO_UNSURE <= seen.temperature <= TOO_SURE:
        return ()
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
        return ["Nothing to mend that this many rows could show."]
    word = "too sure" if seen.temperature > 1 else "not sure enough"
    again = "Fit the temperature again on more rows" if seen.fitted else "Divide the logits by a temperature"
    return [
        f"{again}: the model is {word}, and T = {seen.temperature:.2f} would win {seen.loss:.3f} nats per row and "
        "change no answer. It is the cheapest remedy: `discreet train --private-temperature` costs no epsilon beyond "
        "that of training, since its rows are in no other query; on public rows it is exact."
    ]


def _clipping(seen: Seen) -> list[str]:
    if seen.fitted or seen.clipping is None or not _sure(seen):
        return []
    if is_tempered(seen.clipping):
        return [
            "Or train longer: a temperature was trained beside the model (whose clip bound is "
            f"{body_bound(seen.clipping):g}), and it has not arrived, or its noise moved it. More steps, more rows or "
            "a larger epsilon bring it nearer."
        ]
    if seen.temperature > TOO_SURE:
        if seen.clipping.kind in _NORMALISING:
            return [
                "Or clip by a bound instead of normalising every gradient, e.g. --clipping abadi:10: normalised, "
                "examples that are already right pull as hard as those that are wrong, and confidence grows without "
                "end. What normalises more softly (a larger gamma, PSAC) lies between."
            ]
        return [
            f"Or raise the clip bound of {seen.clipping.clip_bound:g} three- to tenfold, towards the 90 to 95 % "
            "quantile of gradient norms: below it, examples that are already right pull as hard as those that are "
            "wrong, and confidence grows without end. With plain descent divide the learning rate by the same factor; "
            "with Adam leave it."
        ]
    return [
        "Or make more progress: more steps, a higher learning rate, or a lower clip bound. A bound far above the "
        "gradients' norms only adds noise; with plain descent, a rate that was lowered with it learns too little."
    ]


def _rest(seen: Seen) -> list[str]:
    if not _sure(seen) or seen.clipping is None:
        return []
    lines = []
    if seen.clipping.kind is ClippingKind.QUANTILE:
        lines.append(
            "For a bound that follows a quantile, take .7 to .9 where probabilities matter; the median clips too low."
        )
    lines.append(
        "Do not choose clip bound or learning rate by accuracy: it stays within a point where the loss doubles."
    )
    return lines
