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
from discreet.core.gradient import LossFunction, trainable
from discreet.core.isolation import examine_isolation
from discreet.core.layout import awake, evaluating
from discreet.errors import ConfigError

SCORES = "scores"
"""Name of the one tensor in the sum, shape (1,), float64."""

_TOLERANCE = 1e-3

ScoreFunction = Callable[[nn.Module, Any], Tensor]
"""``score(model, batch) -> Tensor`` of shape (B,): one score per example, such as 1 for a right answer, else 0."""


def is_isolated(
    model: nn.Module, score: ScoreFunction, batch: Any, singles: Sequence[Any], *, loss: LossFunction
) -> bool:
    """Whether each example's score in a batch is its score alone, on these few examples; a verdict and nothing else.

    A score of 0 or 1 hardly moves, so the losses in evaluation mode must be isolated as well. Entries of parameters
    that begin at zero are something else meanwhile (`discreet.core.layout.awake`).

    Args:
        batch: all of them. singles: the same examples in the same order, each as a batch of one.
        loss: per-example losses, as in training.
    """
    with evaluating(model), torch.no_grad():
        verdict = examine_isolation(model, loss, batch, examples=len(singles))
        with awake(trainable(model)):
            together_B = _scores(model, score, batch, len(singles))
            apart_B = torch.cat([_scores(model, score, single, 1) for single in singles])
    alone = verdict.by_substitution and verdict.by_removal and not verdict.buffers and not verdict.resized
    return alone and bool(((together_B - apart_B).abs() < _TOLERANCE).all())


def summed_scores(model: nn.Module, score: ScoreFunction, batches: Iterable[tuple[Any, int]]) -> ClippedSum:
    """Sum the scores of all examples.

    **Guarantees.** Every score is brought to [0, 1], NaN to 0, so adding or removing one example changes the sum by at
    most 1, provided that no example's score depends on another (see `is_isolated`). The sum is exact up to 2^-53 of it.

    Args:
        model: put into evaluation mode, and back.
        score: per-example scores.
        batches: pairs of a batch and its number of examples, which together are each example once.

    Raises:
        ConfigError: the scores are not one per example.
    """
    total = torch.zeros(1, dtype=torch.float64, device="cpu")
    with evaluating(model), torch.no_grad():
        for batch, examples in batches:
            total += _scores(model, score, batch, examples).sum()
    return ClippedSum(tensors={SCORES: total}, sensitivity=1.0)


def _scores(model: nn.Module, score: ScoreFunction, batch: Any, examples: int) -> Tensor:
    """Scores in [0, 1], float64 on the CPU, shape (B,)."""
    scores_B = score(model, batch)
    if not isinstance(scores_B, Tensor) or scores_B.shape != (examples,):
        raise ConfigError(
            f"scores: must be a tensor with one per example, ({examples},); return e.g. "
            "(logits.argmax(1) == targets).float()."
        )
    return scores_B.detach().cpu().to(torch.float64).nan_to_num(nan=0.0).clamp(0.0, 1.0)
