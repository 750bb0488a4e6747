"""One probe of the learning rate: a question, a Poisson batch and the weights -> a bounded sum, ready for release."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discreet.core.clipping import ClippedSum
from discreet.core.probe import counted_levels, summed_rises
from discreet.train.step import ClippedStep
from discreet.train.tolerance import Asked, Question


def probe_sum(
    question: Question,
    *,
    step: ClippedStep,
    indices: np.ndarray,
    seed: int,
    directions: Callable[[str, int], Tensor],
    ratios: Mapping[str, float],
) -> ClippedSum:
    """Answer a question over these examples, microbatch by microbatch; zeros when there are none.

    The model runs in the modes in which it is trained, as the self-check saw it; every pass over a microbatch meets the
    same dropout masks. No gradient is taken, and weights and buffers are what they were.

    Args:
        question: what is asked. step: model, loss and data. indices: the batch, shape (realised batch,).
        seed: of the model's own randomness; the caller's generators are the caller's to put back.
        directions: (parameter, entries) -> standard normal draws, independent of the data.
        ratios: parameter -> rate of its group over that of the first group; 0 for one that is no weight and stays.
    """

    def batches() -> Iterator[tuple[Any, int]]:
        for position, part in enumerate(step.microbatch.split(indices)):
            batch = step.fetch(part)
            torch.manual_seed(seed + position)
            yield batch, len(part)

    with step.watch.unmoved(but=tuple(step.parameters)) if step.watch is not None else nullcontext():
        if question.asked is Asked.LEVEL:
            return step.fitted(lambda: counted_levels(step.model, step.loss, batches), realised=len(indices))
        shift = {
            name: (directions(name, parameter.numel()) * (question.displacement * ratios[name]))
            .to(parameter.dtype)
            .view(parameter.shape)
            for name, parameter in step.parameters.items()
        }
        return step.fitted(
            lambda: summed_rises(step.model, step.loss, batches, shift=shift, bound=question.bound),
            realised=len(indices),
        )
