"""self_check(): may this model be trained on this data set? Asked of the first few examples; then a rehearsal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from discreet.core.clipping import Clipping, ClippingKind
from discreet.core.gradient import LossFunction
from discreet.core.layout import carries
from discreet.errors import CheckFailed, ConfigError
from discreet.train.check import CheckReport, check
from discreet.train.examples import Examples
from discreet.train.fetching import fetched_again, fetched_alone
from discreet.train.step import ClippedStep
from discreet.train.throughput import CHECK_EXAMPLES

CHECK_RANGE = 1e4
"""Numbers beyond it are brought to it before the self-check, and NaN and infinity to zero."""


def self_check(
    model: nn.Module, loss: LossFunction, examples: Examples, rule: Clipping, device: torch.device
) -> CheckReport:
    """Check a model, before it is trained under a clipping rule, on the first few examples; raises `CheckFailed`.

    Numbers that no computation survives are taken out first: a single row must not decide whether training starts.
    """
    count = min(CHECK_EXAMPLES, examples.count)
    batch = tree_map(_tame, examples.fetch(np.arange(count), device=device))
    if not any(carries(leaf, count) for leaf in tree_leaves(batch)):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in tree_leaves(batch)}))
        raise ConfigError(
            f"a batch of {count} examples without a tensor of {count} rows ({type(batch).__name__} of {kinds}): which "
            "part is whose cannot be told; give a collate function that stacks or pads them, (B, ...)."
        )
    compare = Clipping.automatic() if rule.kind is ClippingKind.NONE else rule
    report = check(model, loss, batch, clipping=compare, examples=count)
    report.raise_if_failed()
    again = fetched_again(examples, count=count, device=device)
    alone = not again or fetched_alone(model, loss, examples, count=count, device=device)
    report = report.with_data_set(again=again, alone=alone)
    report.raise_if_failed()
    return report


def rehearse(step: ClippedStep, count: int, *, batch: int) -> None:
    """Ask of a microbatch as large as those of training what its updates ask, before anything is charged.

    Args:
        step: as it will be made. count: examples of the data set, from all over which they are. batch: expected size.

    Raises:
        CheckFailed: it would be refused in training.
    """
    size = min(batch, step.microbatch.size, count)
    try:
        step.ask_again(np.arange(size) * count // size, update=0)
    except CheckFailed as refusal:
        raise CheckFailed(
            f"the self-check on {size} examples failed, so no private training starts: {refusal}"
        ) from None


def _tame(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-CHECK_RANGE, CHECK_RANGE)
