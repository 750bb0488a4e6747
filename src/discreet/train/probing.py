"""Probes of the learning rate: updates that are spent on questions about the loss, before the weights move.

A question, a Poisson batch and the weights give a bounded sum; it is released as the sum of any update is; and what was
released is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discreet.core.clipping import ClippedSum
from discreet.core.probe import LEVELS, RISES, counted_levels, summed_rises
from discreet.train.step import ClippedStep
from discreet.train.tempered import numbers_beside
from discreet.train.tolerance import Asked, Question
from discreet.train.updates import Updates


def find_rate(updates: Updates) -> None:
    """Spend updates on probes of the loss, for as long as the learning rate asks for them; before every update.

    A probe is an update like any other: the same charge, a Poisson batch of its own, one release of one bounded sum
    with the plan's noise. Only what is released is a number about the loss, and the weights stay where they are.
    """
    while not updates.finished and (question := updates.rates.question(updates.done)) is not None:
        index, indices = updates.done, updates.releases.draw()
        with updates.model_randomness():
            total = _sum_of_next(updates, question, indices)
        released = updates.releases.release_sum(total, index=index)
        if released is None:
            continue
        name = LEVELS if question.asked is Asked.LEVEL else RISES
        updates.count_probe(updates.rates.observe(question, released.tensors[name].tolist()))


def _sum_of_next(updates: Updates, question: Question, indices: np.ndarray) -> ClippedSum:
    """The bounded sum of the next update as a probe; displacements are a function of (key, update, parameter)."""
    index, directions = updates.done, updates.run.noise("displacements of probes")
    beside = numbers_beside(updates.step.model)
    ratio_of = {
        id(parameter): ratio
        for group, ratio in zip(updates.optimizer.param_groups, updates.rates.ratios, strict=True)
        for parameter in group["params"]
    }
    return probe_sum(
        question,
        step=updates.step,
        indices=indices,
        seed=updates.run.torch_seed(index),
        directions=lambda name, entries: directions.normal(entries, position=index, name=name),
        ratios={
            name: 0.0 if id(parameter) in beside else ratio_of[id(parameter)]
            for name, parameter in updates.step.parameters.items()
        },
    )


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
