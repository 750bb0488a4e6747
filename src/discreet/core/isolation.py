"""Does any example's loss, buffer or parameter depend on other examples? Asked of behaviour, not of class names.

Shape legend: B = examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.compiled import uncompiled
from discreet.core.draws import Draws
from discreet.core.gradient import LossFunction, batch_size_of, check_losses, trainable
from discreet.core.layout import SEED, alike, awake, copies, evaluating, frozen_state, take
from discreet.core.precision import NARROW_GAP, ROUNDING_GAP, computes_narrowly, each_close, ieee_products, is_close


@dataclass(frozen=True)
class IsolationVerdict:
    """Does any example's loss, or any buffer, depend on other examples?

    Attributes:
        by_substitution: no loss moved when another example of the batch was replaced.
        by_removal: no loss moved when the others were removed. Each example keeps the random numbers that were drawn
            for it; where they cannot be told apart, the model is asked in evaluation mode.
        buffers: names of buffers that a training forward changed in a way that depends on the data, and of parameters
            that it wrote at all, frozen or not: both are released as they are.
        moving: names of buffers that a training forward wrote, whatever the data were.
        tables: names of buffers that are not saved, and of another size since a forward met these examples.
        resized: names of all others that are of another size since then, or in every forward, or are there no more:
            their size would be released.
    """

    by_substitution: bool
    by_removal: bool
    buffers: tuple[str, ...]
    moving: tuple[str, ...]
    tables: tuple[str, ...]
    resized: tuple[str, ...]


@uncompiled()
@ieee_products()
def examine_isolation(
    model: nn.Module, loss: LossFunction, batch: Any, *, examples: int | None = None
) -> IsolationVerdict:
    """Replace and remove examples, and see whether losses of the others move. Behaviour decides, not class names.

    Entries of parameters that begin at zero are something else meanwhile (`discreet.core.layout.awake`).
    """
    size = examples if examples is not None else batch_size_of(batch)
    held = {
        _joined(prefix, key): buffer
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
    }
    with awake(trainable(model)):
        verdict = _isolation(model, loss, batch, size)
    for name in (*verdict.buffers, *verdict.resized):
        # What stands there now may be examples.
        prefix, _, key = name.rpartition(".")
        buffers = model.get_submodule(prefix)._buffers
        if name in held:
            buffers[key] = held[name]
        else:
            buffers.pop(key, None)
    return verdict


def _isolation(model: nn.Module, loss: LossFunction, batch: Any, size: int) -> IsolationVerdict:
    before, draws = copies(model), Draws(size)
    with draws.written():
        reference = _losses(model, loss, batch, examples=size)
    # Replacing changes no shape, so that losses of the others keep their bits; removing others changes the kernels.
    exact = 16 * torch.finfo(reference.dtype).eps
    tolerance = 1e-8 if all(each.dtype is torch.float64 for each in (reference, *model.parameters())) else 1e-4
    if computes_narrowly(lambda: _losses(model, loss, batch, examples=size)):
        tolerance = NARROW_GAP
    by_substitution = True
    buffers = _written(model, loss, batch, held=nn.Module.named_parameters, state=_state_of)
    state = _buffers_after(model, loss, batch)
    resized: set[str] = set()
    for row in range(size):
        rows = [other if other != row else (row + 1) % size for other in range(size)]
        replaced = take(batch, rows, size)
        others = [other for other in range(size) if other != row]
        with draws.given(range(size)):  # its own generators may draw something else each time
            losses = _losses(model, loss, replaced, examples=size)
        by_substitution &= is_close(losses[others], reference[others], exact)
        after = _buffers_after(model, loss, replaced)
        resized |= _other_sizes(state, after)
        buffers |= {name for name in state.keys() - resized if not torch.equal(after[name], state[name])}
    stochastic = not torch.equal(_losses(model, loss, batch, examples=size, seed=SEED + 1), reference)
    by_removal, followed = _survives_removal(model, loss, batch, size, tolerance)
    if stochastic and not followed:
        with evaluating(model):
            by_removal, _ = _survives_removal(model, loss, batch, size, tolerance)
    tables = _other_sizes(before, copies(model)) - resized - buffers
    resized |= tables - _unsaved(model)
    values = {name for name in before.keys() - tables - resized - buffers if not torch.equal(before[name], state[name])}
    written = _written(model, loss, batch, held=nn.Module.named_buffers, state=lambda buffer: (buffer._version, 0))
    moving = (values | written) - tables - resized
    found = (tuple(sorted(names)) for names in (buffers, moving, tables - resized, resized))
    return IsolationVerdict(by_substitution, by_removal, *found)


def _other_sizes(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Buffers of another size or type than before, new ones, and those that are gone."""
    same = {name for name in before.keys() & after.keys() if alike(before[name], after[name])}
    return (before.keys() | after.keys()) - same


def _unsaved(model: nn.Module) -> set[str]:
    """Buffers that are registered as not to be saved with the model."""
    return {
        _joined(prefix, key) for prefix, module in model.named_modules() for key in module._non_persistent_buffers_set
    }


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _survives_removal(
    model: nn.Module, loss: LossFunction, batch: Any, size: int, tolerance: float
) -> tuple[bool, bool]:
    """Whether each loss is the same without the others; and whether examples kept what was drawn for them."""
    draws, alone = Draws(size), []
    with draws.written():
        reference = _losses(model, loss, batch, examples=size)
    for row in range(size):
        try:
            with draws.given([row]):
                alone.append(_losses(model, loss, take(batch, [row], size), examples=1))
        except (ValueError, RuntimeError, IndexError):
            return False, draws.followed
    rounding = tolerance / 10 * float(reference.nan_to_num(0.0, 0.0, 0.0).abs().max())  # of a loss near zero
    return each_close(torch.cat(alone), reference, tolerance, least=rounding), draws.followed


@uncompiled()
@ieee_products()
def first_losses_agree(
    model: nn.Module, loss: LossFunction, one: tuple[Any, int], other: tuple[Any, int], *, first: int
) -> bool:
    """Whether two batches, each with its size, begin with the same examples as far as their first losses show it.

    In evaluation mode where they do not agree and draw what cannot be given to the other.
    """

    def losses_of(batch: tuple[Any, int], *, seed: int = SEED) -> Tensor:
        return _losses(model, loss, batch[0], examples=batch[1], seed=seed)[:first]

    def agree() -> tuple[bool, bool]:
        draws = Draws(one[1])
        with draws.written():
            wanted = losses_of(one)
        with draws.given([row % one[1] for row in range(other[1])]):
            found = losses_of(other)
        same = each_close(found, wanted, ROUNDING_GAP)
        same = same or (computes_narrowly(lambda: losses_of(one)) and each_close(found, wanted, NARROW_GAP))
        return same, draws.followed

    with awake(trainable(model)):
        same, followed = agree()
        if same or followed or torch.equal(losses_of(one, seed=SEED + 1), losses_of(one)):
            return same
        with evaluating(model):
            return agree()[0]


def _losses(model: nn.Module, loss: LossFunction, batch: Any, *, examples: int, seed: int = SEED) -> Tensor:
    with frozen_state(model, seed=seed), torch.enable_grad():  # as in training: a forward may ask for gradients
        losses = loss(model, batch)
    check_losses(losses, examples=examples)
    return losses.detach().clone()


def _buffers_after(model: nn.Module, loss: LossFunction, batch: Any) -> dict[str, Tensor]:
    with frozen_state(model), torch.enable_grad():
        loss(model, batch)
        return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _written(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    *,
    held: Callable[[nn.Module], Iterator[tuple[str, Tensor]]],
    state: Callable[[Tensor], tuple[int, int]],
) -> set[str]:
    """What a forward writes, exchanges, adds or removes. No copy is made: a frozen model may fill the memory."""
    before = {name: (value, state(value)) for name, value in held(model)}
    with frozen_state(model), torch.enable_grad():
        loss(model, batch)
        after = {name: (value, state(value)) for name, value in held(model)}
    known = {name for name, (value, _) in after.items() if name in before and value is before[name][0]}
    return (before.keys() | after.keys()) - {name for name in known if after[name][1] == before[name][1]}


def _state_of(parameter: Tensor) -> tuple[int, int]:
    """How often it was written through torch, and the sum of its bits, which sees the other writes."""
    if parameter.layout is not torch.strided or type(parameter.data) is not Tensor:
        return parameter._version, 0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(parameter.element_size(), torch.uint8)
    return parameter._version, int(parameter.detach().flatten().view(bits).sum(dtype=torch.int64))
