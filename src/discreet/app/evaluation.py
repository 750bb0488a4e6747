"""How good a classifier is on held-out examples. These figures are about those examples, which no guarantee covers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from discreet.app.data.source import IGNORED, Examples
from discreet.insight.calibration import expected_calibration_error

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out examples.

    Attributes:
        accuracy: share of right answers; a row whose class is not in the class list counts as wrong.
        nll: mean negative log-likelihood in nats, over the rows whose class is in the list; None when it is not finite,
            because the weights have overflowed.
        ece: expected calibration error, over the same rows; None likewise.
        examples: rows in all.
        unlisted: rows whose class is not in the class list.
    """

    accuracy: float
    nll: float | None
    ece: float | None
    examples: int
    unlisted: int = 0

    def to_json(self) -> dict[str, float | int | None]:
        """As it stands in ``result.json``."""
        return dataclasses.asdict(self)


def evaluate(model: nn.Module, examples: Examples) -> Evaluation | None:
    """Evaluate in evaluation mode, and put the mode back; None when there is no row."""
    if not len(examples):
        return None
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                model(examples.batch(rows)[0].to(device)).double().cpu()
                for rows in np.array_split(np.arange(len(examples)), -(-len(examples) // _ROWS_AT_ONCE))
            ]
    finally:
        model.train(was_training)
    logits, targets = torch.cat(parts), examples.targets
    known = targets != IGNORED
    correct = int((logits.argmax(1) == targets).sum())
    nll = float(F.cross_entropy(logits[known], targets[known])) if bool(known.any()) else 0.0
    ece = expected_calibration_error(logits[known].softmax(1), targets[known])
    return Evaluation(
        accuracy=correct / len(targets),
        nll=_finite(nll),
        ece=_finite(ece),
        examples=len(targets),
        unlisted=int((~known).sum()),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
