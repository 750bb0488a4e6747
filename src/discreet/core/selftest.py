"""What the self-check asks the trusted core on a few examples: is the model met, are norms and sums right?

That examples are isolated is asked in `discreet.core.isolation`. Everything here sees single examples' losses and
gradients, so only verdicts leave it: booleans, names and shapes.

Shape legend: B = examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.axes import Layout, UseKey
from discreet.core.book import Book
from discreet.core.brute_force import by_brute_force, norms_of, one_at_a_time
from discreet.core.clipping import Clipping
from discreet.core.compiled import uncompiled
from discreet.core.gradient import LossFunction, backward, batch_size_of, settle, trainable
from discreet.core.layout import SEED, awake, frozen_state, other_rows, take
from discreet.core.meeting import guard
from discreet.core.precision import (
    NARROW,
    NARROW_GAP,
    computes_narrowly,
    ieee_products,
    in_float32,
    is_close,
    widened,
)
from discreet.core.route import Route, forced
from discreet.errors import UnsupportedUse

Parts = Sequence[tuple[Any, int]]
"""Batches with their sizes."""

_PROBES, _PATHS = 8, 16
"""Seeds under which a forward is asked whether it takes another path, and under which paths are then compared."""
_FLOAT32, _DEEP = 2e-3, 0.3
"""How far norms may be off: in float32, and in half precision where float32 was compared as well.

Roundings of bfloat16 add up over the layers: 50 of them on a GPU, whose kernels change with the shape, were 5 %.
"""
_LEFT = {_FLOAT32: torch.finfo(torch.float32).eps, NARROW_GAP: 2.0**-16, _DEEP: 2.0**-16}
"""A 64th of what a gradient that is zero may be of an example's norm: half precision leaves 1e-4 in it."""
_ROUNDED_UP = 5e-2
"""How far a norm may be above, as training takes it: the bound on its rounding is added, which long sequences and large
vocabularies let grow to a percent. The sure way has no such excuse."""


@dataclass(frozen=True)
class ParameterVerdict:
    """What the check found about one trainable parameter.

    Attributes:
        functions: the functions that it met, in order, without repetition; empty when this batch did not use it.
        routes: how its norms are taken and why, where there is a choice; from shapes alone.
        norms_agree: its per-example norms equal brute force, within the tolerance.
        reached: some example has a gradient there; without one there was nothing to compare.
        connected: some example's loss depends on it, be its gradient zero: autograd has a way from one to the other.
    """

    name: str
    shape: tuple[int, ...]
    functions: tuple[str, ...]
    routes: tuple[str, ...]
    norms_agree: bool
    reached: bool
    connected: bool


@dataclass(frozen=True)
class NormVerdict:
    """Engine against one-example-at-a-time autograd, at two batch sizes.

    Attributes:
        isolated: no example's norms moved when all others became copies of it.
        agrees_elsewhere: norms and sum are right for the batches that nobody gave.
    """

    parameters: tuple[ParameterVerdict, ...]
    sum_agrees: bool
    isolated: bool
    agrees_elsewhere: bool
    layout: Layout
    tolerance: float


@uncompiled()
@ieee_products()
def compare_with_brute_force(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    *,
    clipping: Clipping,
    examples: int | None = None,
    elsewhere: Sequence[Any] = (),
) -> NormVerdict:
    """Compare norms and clipped sum with autograd, one example at a time, for B and B - 1 examples and by every route.

    What `torch.compile` was asked to compile is compared as it will be trained, and as it is written. Entries of
    parameters that begin at zero are something else meanwhile (`discreet.core.layout.awake`).

    Args:
        elsewhere: batches of B that nobody gave. What is wrong there is wrong; what is refused or not finite is not.

    Raises:
        UnsupportedUse: a use without a rule.
    """
    size = examples if examples is not None else batch_size_of(batch)
    parameters = trainable(model)
    with awake(parameters):
        tolerance = _tolerance(model, loss, batch, parameters)
        if not any(parameter.dtype in NARROW for parameter in parameters.values()):
            return _compare(model, loss, batch, parameters, size, clipping, tolerance, elsewhere)
        wide = _compare_in_float32(model, loss, batch, size, clipping, elsewhere)
        if wide is None:
            return _compare(model, loss, batch, parameters, size, clipping, tolerance, elsewhere)
        return _both(wide, _compare(model, loss, batch, parameters, size, clipping, _DEEP, ()))


def _compare_in_float32(
    model: nn.Module, loss: LossFunction, batch: Any, size: int, clipping: Clipping, elsewhere: Sequence[Any]
) -> NormVerdict | None:
    """The verdict on a copy in float32; None where there is none: a forward asks for its own dtype, or memory ends."""
    try:
        twin = in_float32(model)
        others = [widened(other) for other in elsewhere]
        return _compare(twin, loss, widened(batch), trainable(twin), size, clipping, _FLOAT32, others)
    except (RuntimeError, TypeError, ValueError):
        return None


def _both(wide: NormVerdict, narrow: NormVerdict) -> NormVerdict:
    """The verdict in the model's own precision, which holds only if the one in float32 does."""
    agreed = {verdict.name: verdict.norms_agree for verdict in wide.parameters}
    parameters = tuple(replace(each, norms_agree=each.norms_agree and agreed[each.name]) for each in narrow.parameters)
    return replace(
        narrow,
        parameters=parameters,
        sum_agrees=narrow.sum_agrees and wide.sum_agrees,
        isolated=wide.isolated,
        agrees_elsewhere=wide.agrees_elsewhere,
        tolerance=wide.tolerance,
    )


def _compare(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    parameters: dict[str, nn.Parameter],
    size: int,
    clipping: Clipping,
    tolerance: float,
    elsewhere: Sequence[Any],
) -> NormVerdict:
    rows = other_rows(parameters, batch, size=size)
    parts = ((take(batch, rows, size), len(rows)), (batch, size))
    layout, functions = Layout({}), {name: {} for name in parameters}
    ways = [False]
    for part, count in parts:
        first = _booked(model, loss, part, count, layout=None)
        layout = layout.merged(first.layout())
        tolerance = max(tolerance, _FLOAT32 if first.casts - {torch.float64} else 0.0)
        first.discard()
        if first.compiled:
            ways = [False, True]
            written = _booked(model, loss, part, count, layout=None, as_written=True)
            layout = layout.merged(written.layout())
            written.discard()
    agree, sum_agrees = dict.fromkeys(parameters, True), True
    reached = dict.fromkeys(parameters, False)
    connected: set[str] = set()
    routes: dict[str, dict[str, None]] = {name: {} for name in parameters}
    for part, count in parts:
        with frozen_state(model):
            expected = by_brute_force(model, loss, part, parameters, count, clipping)
        noise = _rounding(expected.norms, parameters, tolerance)
        reached = {name: known or bool(expected.norms[name].any()) for name, known in reached.items()}
        connected |= expected.connected
        for as_written in ways:
            todo: list[Route | None] = [None]
            for route in todo:
                with contextlib.nullcontext() if route is None else forced(route):
                    book = _booked(model, loss, part, count, layout=layout, as_written=as_written)
                    if route is None:
                        todo += book.open_routes()
                        for name, taken in book.routes().items():
                            routes[name].update(dict.fromkeys(taken))
                        for names, function, _ in book.axes:
                            for name in names:
                                functions[name][function] = None
                    taken, sure = book.parameter_norms(), book.parameter_norms(sure=True)
                    for name, wanted in expected.norms.items():
                        nothing = torch.zeros_like(wanted)
                        agree[name] &= is_close(sure.get(name, nothing), wanted, tolerance, noise=noise)
                        agree[name] &= is_close(
                            taken.get(name, nothing), wanted, tolerance, noise=noise, above=_ROUNDED_UP
                        )
                    sum_agrees &= expected.sum_agrees(settle(book, clipping).tensors, tolerance)
    among_copies = []
    for index in range(size):
        with frozen_state(model):
            (row,) = one_at_a_time(model, loss, take(batch, [index] * size, size), parameters, [index])
        among_copies.append(norms_of(row))
    isolated = all(  # `expected` and `noise` are those of the whole batch, which came last
        is_close(wanted.new_tensor(found), wanted, tolerance, noise=noise)
        for found, wanted in zip(zip(*among_copies, strict=True), expected.norms.values(), strict=True)
    )
    verdicts = tuple(
        ParameterVerdict(
            name,
            tuple(value.shape),
            functions=tuple(functions[name]),
            routes=tuple(routes[name]),
            norms_agree=agree[name],
            reached=reached[name],
            connected=name in connected,
        )
        for name, value in parameters.items()
    )
    agrees_elsewhere, layout = _agrees_on_other_paths(model, loss, parts, clipping, tolerance, layout)
    for other in elsewhere:
        agrees, seen = _agrees_elsewhere(model, loss, other, size, clipping, tolerance, layout)
        agrees_elsewhere, layout = agrees_elsewhere and agrees, layout.merged(seen)
    return NormVerdict(verdicts, sum_agrees, isolated, agrees_elsewhere, layout, tolerance)


def _agrees_on_other_paths(
    model: nn.Module, loss: LossFunction, parts: Parts, clipping: Clipping, tolerance: float, layout: Layout
) -> tuple[bool, Layout]:
    """Whether norms and sum are right where random numbers take other paths (dropped layers), and the layout there."""
    uses = {_uses_met(model, loss, *parts[-1], seed=SEED + way) for way in range(_PROBES)}
    agrees = True
    for way in range(1, _PATHS if len(uses) > 1 else 0):
        seen = Layout({})
        for part, count in parts:
            book = _booked(model, loss, part, count, layout=None, seed=SEED + way)
            seen = seen.merged(book.layout())
            book.discard()
        layout = Layout({**seen.axes, **layout.axes})
        agrees &= _agrees_elsewhere(model, loss, *parts[-1], clipping, tolerance, layout, seed=SEED + way)[0]
    return agrees, layout


def _uses_met(model: nn.Module, loss: LossFunction, batch: Any, count: int, *, seed: int) -> frozenset[UseKey]:
    """The uses of a forward under this seed."""
    book = Book(trainable(model), examples=count, trust_folds=True, batch=batch)
    with frozen_state(model, seed=seed), guard(book):
        loss(model, batch)
    return frozenset(book.axes)


def _agrees_elsewhere(
    model: nn.Module, loss: LossFunction, batch: Any, size: int, clipping: Clipping, tolerance: float, layout: Layout,
    *, seed: int = SEED,
) -> tuple[bool, Layout]:  # fmt: skip
    """Whether norms and sum are right on examples that nobody gave, and how uses carry them, as far as they come."""
    parameters = trainable(model)
    book = Book(parameters, examples=size, layout=layout, trust_folds=True, batch=batch)
    with frozen_state(model, seed=seed):
        expected = by_brute_force(model, loss, batch, parameters, size, clipping)
    try:
        with frozen_state(model, seed=seed), guard(book):
            backward(book, loss(model, batch))
        found = {name: torch.zeros_like(wanted) for name, wanted in expected.norms.items()}
        found |= book.parameter_norms(sure=True)
        sums = settle(book, clipping).tensors
    except UnsupportedUse:
        return True, book.layout()  # training refuses it too
    finite = torch.stack([each.double() for each in (*expected.norms.values(), *found.values())]).isfinite().all(0)
    noise = _rounding(expected.norms, parameters, tolerance)
    agrees = not bool(finite.all()) or expected.sum_agrees(sums, max(tolerance, _ROUNDED_UP))
    for name, wanted in expected.norms.items():
        agrees &= is_close(found[name][finite], wanted[finite], tolerance, noise=noise)
    return agrees, book.layout()


@uncompiled()
@ieee_products()
def norms_agree(
    model: nn.Module, loss: LossFunction, batch: Any, *, layout: Layout | None, examples: int, rows: Sequence[int]
) -> bool:
    """Whether the norms of some rows of a batch are those of autograd, as training takes them, where all are finite."""
    parameters = trainable(model)
    narrow = _tolerance(model, loss, batch, parameters) == NARROW_GAP
    tolerance = _DEEP if narrow else _ROUNDED_UP
    book = _booked(model, loss, batch, examples, layout=layout)
    taken = book.parameter_norms()
    book.discard()
    with frozen_state(model):
        each = [norms_of(row) for row in one_at_a_time(model, loss, batch, parameters, rows)]
    wanted = dict(zip(parameters, torch.tensor(each, dtype=torch.float64, device="cpu").T, strict=True))
    nothing = torch.zeros(examples, device="cpu")
    found = {name: taken.get(name, nothing)[list(rows)].cpu().double() for name in wanted}
    finite = torch.stack([*wanted.values(), *found.values()]).isfinite().all(0)
    noise = _rounding(wanted, parameters, tolerance if narrow else _FLOAT32)
    return all(is_close(found[name][finite], value[finite], tolerance, noise=noise) for name, value in wanted.items())


def _booked(
    model: nn.Module, loss: LossFunction, batch: Any, count: int, *, layout: Layout | None, as_written: bool = False,
    seed: int = SEED,
) -> Book:  # fmt: skip
    book = Book(trainable(model), examples=count, layout=layout, trust_folds=True, batch=batch)
    book.as_written = as_written
    with frozen_state(model, seed=seed), guard(book):
        backward(book, loss(model, batch))
    return book


def _rounding(norms: Mapping[str, Tensor], parameters: Mapping[str, Tensor], tolerance: float) -> float:
    """What rounding leaves of a gradient that is zero by symmetry, as that of an attention's key bias is."""
    norm_B = torch.stack([each.to(torch.float64) for each in norms.values()]).norm(dim=0)
    finite = norm_B[torch.isfinite(norm_B)]
    coarsest = max(_LEFT.get(tolerance, 0.0), *(torch.finfo(parameter.dtype).eps for parameter in parameters.values()))
    return min(64 * coarsest, tolerance / 10) * float(finite.max()) if finite.numel() else 0.0


def _tolerance(model: nn.Module, loss: LossFunction, batch: Any, parameters: dict[str, nn.Parameter]) -> float:
    with frozen_state(model), torch.enable_grad():
        if computes_narrowly(lambda: loss(model, batch)):
            return NARROW_GAP
    return 1e-8 if all(parameter.dtype is torch.float64 for parameter in parameters.values()) else _FLOAT32
