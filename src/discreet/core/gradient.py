"""clipped_gradient(): model, per-example losses and a batch -> the clipped sum of per-example gradients.

Shape legend: B = examples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from discreet.core import compiled, rules  # noqa: F401  -- registers the compiler's backend and all rules
from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.clipping import BELOW, ClippedSum, Clipping
from discreet.core.layout import observed_layout
from discreet.core.meeting import FOR_ALL, guard
from discreet.core.parameter import Guarded, PrivateParameter
from discreet.core.precision import refuse_forced_tf32
from discreet.core.strays import run_backward
from discreet.core.uses import zeros_like_sums
from discreet.errors import ConfigError, UnsupportedUse

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch) -> Tensor`` of shape (B,): one loss per example."""


def clipped_gradient(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    *,
    clipping: Clipping,
    layout: Layout | None = None,
    examples: int | None = None,
    at_most: int = 0,
) -> ClippedSum:
    """Clip each example's gradient, and sum.

    ``sum_i c(|g_i|) g_i`` with ``g_i`` the gradient of example i's loss over all trainable parameters together, by
    book-keeping (arXiv:2210.00038, Algorithm 1): one forward, one backward without weight gradients, one weighted
    contraction per parameter.

    **Guarantees.** Adding or removing one example changes the gradients by at most ``clipping.sensitivity`` in L2 norm,
    and all tensors, each over its noise weight, by at most the sum's own ``sensitivity``,
    provided that no example's loss depends on another (`discreet.check` tests this). An example whose gradient is not
    finite contributes exactly zero. A use of a parameter that no rule covers raises `UnsupportedUse`.

    Args:
        model: any module; its parameters with ``requires_grad`` are covered, whether or not this batch uses them.
        loss: per-example losses, shape (B,).
        batch: whatever ``loss`` takes; a tensor, or a tuple, list or dict of tensors with dimension 0 = B.
        clipping: the clipping function.
        layout: how every use carries the batch (``CheckReport.layout``, from the self-check). Without it, a forward at
            another batch size finds out first, and folded axes are refused.
        examples: B, when it cannot be read off the batch.
        at_most: of a batch that is cut into microbatches, the most examples that one of them may have.

    Raises:
        UnsupportedUse: a use without an exact rule.
        ConfigError: the losses are not one per example, or nothing is trainable.
    """
    size = examples if examples is not None else batch_size_of(batch)
    parameters = trainable(model)
    if size == 0:
        return zero_sum(parameters, clipping)
    if layout is None and size > 1:
        layout = observed_layout(model, loss, batch, parameters=parameters, size=size)
    book = Book(parameters, examples=size, layout=layout, clipping=clipping, at_most=at_most, batch=batch)
    return settled(book, model, loss, batch, clipping)


def settled(book: Book, model: nn.Module, loss: LossFunction, batch: Any, clipping: Clipping) -> ClippedSum:
    """Forward, backward and settlement of one microbatch into a book that was opened for it."""
    with guard(book):
        backward(book, loss(model, batch))
    return settle(book, clipping)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves: name -> parameter, each object once.

    Raises:
        ConfigError: there are none, or one is complex, sparse, integer, or of a class of its own; or its device rounds
            all products.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ConfigError("no parameter has requires_grad=True: there is nothing to train; unfreeze at least one.")
    for name, parameter in found.items():
        refuse_forced_tf32(parameter.device)
        if not parameter.is_floating_point() or parameter.layout is not torch.strided:
            raise ConfigError(f"{name}: dtype {parameter.dtype}, layout {parameter.layout}; must be dense and real.")
        if type(parameter) not in (nn.Parameter, PrivateParameter):
            raise ConfigError(
                f"{name}: of class {type(parameter).__name__}, whose own ways would be lost while it is guarded; make "
                "it an nn.Parameter (of a lazy layer: run one batch first)."
            )
    return found


def backward(book: Book, losses_B: Tensor) -> None:
    """Run the backward of ``losses_B.sum()`` into the book.

    Raises:
        ConfigError: the losses have another shape than (B,), or do not depend on any trainable parameter.
        UnsupportedUse: they are made of what counts as the same for all examples.
    """
    check_losses(losses_B, examples=book.examples)
    if isinstance(losses_B, Guarded):
        raise UnsupportedUse(f"the losses: {FOR_ALL}.")
    if not losses_B.requires_grad:
        raise ConfigError("the losses depend on no trainable parameter; use the model's output.")
    with book.collecting():
        run_backward(book, losses_B)


def check_losses(losses: object, *, examples: int) -> None:
    """Raise `ConfigError` unless a loss function returned a tensor of shape (B,)."""
    shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses).__name__}"
    if not isinstance(losses, Tensor) or losses.shape != (examples,):
        raise ConfigError(
            f"losses of {shape}: must be a tensor with one per example, ({examples},); "
            'use reduction="none" and sum or average within each example.'
        )


def settle(book: Book, clipping: Clipping) -> ClippedSum:
    """Turn what was booked into a clipped sum; the book is empty afterwards."""
    with torch.no_grad():
        return _bounded(book.settle(clipping), book.parameters, clipping)


def zero_sum(parameters: Mapping[str, Tensor], clipping: Clipping) -> ClippedSum:
    """The clipped sum of no example: what an empty Poisson batch releases noise on."""
    sums = zeros_like_sums(parameters)
    if clipping.following is not None:
        sums[BELOW] = torch.zeros(1, dtype=torch.float64, device=next(iter(sums.values())).device)
    return _bounded(sums, parameters, clipping)


def _bounded(sums: Mapping[str, Tensor], parameters: Mapping[str, Tensor], clipping: Clipping) -> ClippedSum:
    division = clipping.divide(parameters)
    return ClippedSum(tensors=sums, sensitivity=division.sensitivity, noise_weights=division.noise_weights)


def batch_size_of(batch: Any) -> int:
    """B, read off dimension 0 of every tensor in the batch.

    Raises:
        ConfigError: there is no tensor, or they disagree.
    """
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or None in sizes:
        raise ConfigError(
            f"batch sizes {sorted(str(size) for size in sizes)}: dimension 0 of every tensor must be the batch; "
            "pass examples=."
        )
    return int(sizes.pop() or 0)
