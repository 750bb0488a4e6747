"""How good a classifier is on held-out examples. These figures are about those examples, which no guarantee covers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.app.data.source import IGNORED, Examples
from discreet.insight.calibration import (
    CalibrationReport,
    Predictions,
    calibration_report,
    expected_calibration_error,
)
from discreet.insight.origin import Origin

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out examples.

    Attributes:
        accuracy: share of right answers; a row whose class is not in the class list counts as wrong.
        nll: mean negative log-likelihood in nats, over the rows whose class is in the list; None when there is no such
            row, or when it is not finite, because the weights have overflowed.
        ece: expected calibration error, over the same rows; None likewise.
        examples: rows in all.
        constant_accuracy: what the best constant answer has: the share, of all rows, of the commonest listed class.
        unlisted: rows whose class is not in the class list.
        stamp: NON-PRIVATE unless the user says that these rows are public.
    """

    accuracy: float
    nll: float | None
    ece: float | None
    examples: int
    constant_accuracy: float
    unlisted: int = 0
    stamp: str = ""

    @property
    def listed(self) -> int:
        """Rows whose class is in the class list: those that figures of probabilities are over."""
        return self.examples - self.unlisted

    def to_json(self) -> dict[str, float | int | str | None]:
        """As it stands in ``result.json``."""
        return {**dataclasses.asdict(self), "listed": self.listed}


def evaluate(
    model: nn.Module, examples: Examples, *, temperature: float = 1.0, origin: Origin = Origin.PRIVATE
) -> Evaluation | None:
    """Evaluate in evaluation mode, and put the mode back; None when there is no row.

    Args:
        model: gives logits. examples: held out.
        temperature: what its logits are divided by. origin: whose rows these are.
    """
    if not len(examples):
        return None
    logits, targets = logits_of(model, examples) / temperature, examples.targets
    known = targets != IGNORED
    correct = int((logits.argmax(1) == targets).sum())
    nll = float(F.cross_entropy(logits[known], targets[known])) if bool(known.any()) else math.nan
    finite = bool(known.any()) and bool(torch.isfinite(logits[known]).all())
    ece = expected_calibration_error(logits[known].softmax(1), targets[known]) if finite else math.nan
    return Evaluation(
        accuracy=correct / len(targets),
        nll=_finite(nll),
        ece=_finite(ece),
        examples=len(targets),
        constant_accuracy=int(torch.bincount(targets[known], minlength=1).max()) / len(targets),
        unlisted=int((~known).sum()),
        stamp=origin.stamp,
    )


def logits_of(model: nn.Module, examples: Examples) -> Tensor:
    """What a model says of each row, float64 on the CPU, shape (N, K); in evaluation mode, which is put back."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                model(examples.batch(rows)[0].to(device)).double().cpu()
                for rows in np.array_split(np.arange(len(examples)), max(1, -(-len(examples) // _ROWS_AT_ONCE)))
            ]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def calibration_of(
    model: nn.Module, examples: Examples, *, origin: Origin, temperature: float = 1.0
) -> CalibrationReport | None:
    """The report over the rows whose class is in the list; None where there is none, or weights have overflowed."""
    if not len(examples):
        return None
    logits, targets = logits_of(model, examples) / temperature, examples.targets
    known = (targets != IGNORED) & torch.isfinite(logits).all(1)
    if not bool(known.any()) or int(known.sum()) < int((targets != IGNORED).sum()):
        return None
    return calibration_report(Predictions.from_logits(logits[known], targets[known]), origin=origin)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
