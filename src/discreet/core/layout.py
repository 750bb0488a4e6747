"""Where the batch axis is: what looks like the batch at one batch size only was a coincidence.

A position table of T rows, used on T examples, looks exactly like a batch of T rows. So a layout is read off twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.meeting import guard
from discreet.core.seeded import cuda_indices, seeded
from discreet.core.strays import nodes, run_backward
from discreet.errors import ConfigError

SEED = 20_777
_AWAKE = 0.05


def observed_layout(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    parameters: Mapping[str, nn.Parameter],
    size: int,
) -> Layout:
    """How a forward with another number of examples carries them: the second opinion on this batch. Nothing is booked.

    Raises:
        UnsupportedUse: a use that has no rule, or whose batch axis is not dimension 0 at the other size.
        ConfigError: the batch cannot be given another size.
    """
    if not any(carries(leaf, size) for leaf in tree_leaves(batch)):
        raise ConfigError(
            f"a batch without any tensor of {size} rows: its layout cannot be verified; pass layout=check(...).layout."
        )
    rows = other_rows(parameters, batch, size=size)
    other = take(batch, rows, size)
    book = Book(parameters, examples=len(rows), batch=other)
    with frozen_state(model), guard(book):
        losses_B = loss(model, other)
        if recomputes(losses_B):
            run_backward(book, losses_B)
    return book.layout()


def recomputes(losses_B: Tensor) -> bool:
    """Whether some of the forward runs again in the backward, under reentrant activation checkpointing."""
    return any(node.name().startswith("CheckpointFunction") for node in nodes(losses_B))


def other_rows(parameters: Mapping[str, Tensor], batch: Any, *, size: int) -> list[int]:
    """Which examples make a batch of another size: one that no axis of a parameter or of the batch happens to have.

    In reverse: a model that sorts its batch leaves examples that are in order already where they are.
    """
    tensors = [*parameters.values(), *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))]
    taken = {length for tensor in tensors for length in tensor.shape}
    candidates = itertools.chain(range(size - 1, 1, -1), itertools.count(size + 1))
    count = next(candidate for candidate in candidates if candidate not in taken)
    return [row % size for row in reversed(range(count))]


def take(batch: Any, rows: range | list[int], size: int) -> Any:
    """The given rows of every tensor in the batch whose dimension 0 is the batch; other leaves as they are."""

    def pick(leaf: Any) -> Any:
        return leaf[torch.as_tensor(list(rows), device=leaf.device)] if carries(leaf, size) else leaf

    return tree_map(pick, batch)


def carries(leaf: Any, size: int) -> bool:
    """Whether this part of a batch has a row for each example."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


@contextmanager
def frozen_state(model: nn.Module, *, seed: int = SEED) -> Iterator[None]:
    """Run with fixed dropout masks, and put buffers, gradients and random state back afterwards.

    A buffer of another size than before, or a new one, stays: a model that has made a table may know that it did.
    """
    kept = copies(model)
    try:
        with seeded(seed, devices=cuda_indices(p.device for p in model.parameters())):
            yield
    finally:
        put_back(model, kept)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def copies(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model, as they are now."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def put_back(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give buffers the values of these copies, where they are of the same size still and have others."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept and alike(buffer, kept[name]) and not torch.equal(buffer, kept[name]):
                buffer.copy_(kept[name])


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and one type."""
    return one.shape == other.shape and one.dtype == other.dtype


@contextmanager
def awake(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Give small random values to entries that are exactly zero, and put them back afterwards.

    Behind a gate, an adapter or a last layer that begins at zero, every gradient is zero, and no loss depends on
    anything: what is wrong there would be seen after the first update, and not before.
    """
    how = {"generator": torch.Generator().manual_seed(SEED), "device": "cpu"}
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                asleep = parameter == 0
                before = parameter[asleep]
                if before.numel():
                    kept.append((parameter, asleep, before))
                    parameter[asleep] = (torch.randn(before.shape, **how) * _AWAKE).to(before)
        yield
    finally:
        with torch.no_grad():
            for parameter, asleep, before in reversed(kept):
                parameter[asleep] = before
