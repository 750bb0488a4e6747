"""How well a model does on private examples: a sum of scores between 0 and 1, one per example, to be released with
noise.

Shape legend: B = examples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.clipping import ClippedSum
from discreet.errors import ConfigError

SCORES = "scores"
"""Name of the one tensor in the sum, shape (1,), float64."""

_TOLERANCE = 1e-3

ScoreFunction = Callable[[nn.Module, Any], Tensor]
"""``score(model, batch) -> Tensor`` of shape (B,): one score per example, such as 1 for a right answer, else 0."""


def is_isolated(model: nn.Module, score: ScoreFunction, batch: Any, singles: Sequence[Any]) -> bool:
    """Whether the scores of a batch are those of its examples one at a time, on these few examples; a verdict alone.

    Args:
        batch: all of them. singles: the same examples, each as a batch of one.
    """
    together = summed_scores(model, score, [(batch, len(singles))])
    apart = summed_scores(model, score, [(single, 1) for single in singles])
    return bool((together.tensors[SCORES] - apart.tensors[SCORES]).abs() < _TOLERANCE)


def summed_scores(model: nn.Module, score: ScoreFunction, batches: Iterable[tuple[Any, int]]) -> ClippedSum:
    """Sum the scores of all examples.

    **Guarantees.** Every score is brought to [0, 1], NaN to 0, so adding or removing one example changes the sum by at
    most 1, provided that no example's score depends on another (`discreet.check` tests it for the loss; the model is in
    evaluation mode). The sum is exact up to 2^-53 of it.

    Args:
        model: put into evaluation mode, and back.
        score: per-example scores.
        batches: pairs of a batch and its number of examples, which together are each example once.

    Raises:
        ConfigError: the scores are not one per example.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total = torch.zeros(1, dtype=torch.float64)
    try:
        with torch.no_grad():
            for batch, examples in batches:
                scores_B = score(model, batch)
                if not isinstance(scores_B, Tensor) or scores_B.shape != (examples,):
                    raise ConfigError(
                        f"scores: must be a tensor with one per example, ({examples},); return e.g. "
                        "(logits.argmax(1) == targets).float()."
                    )
                total += scores_B.detach().cpu().to(torch.float64).nan_to_num(nan=0.0).clamp(0.0, 1.0).sum()
    finally:
        for module, training in modes.items():
            module.training = training
    return ClippedSum(tensors={SCORES: total}, sensitivity=1.0)
