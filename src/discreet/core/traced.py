"""The rules at work on a graph that is being compiled: what stands for parameters, and what is booked there.

The compiler traces a region's forward and backward once, with tensors that hold no numbers. The unchanged rules run in
that trace: a `TracedParameter` hands every function to them as a `PrivateParameter` does, and a `TracedBook` notes each
record. When the traced backward is over, all recorded tensors go into one operator, `discreet::booked`, which
`discreet.core.compiled` turns into outputs of the compiled backward. So what is booked at run time are results like any
other: complete, and never reused by the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from discreet.core.axes import Axis
from discreet.core.book import Book
from discreet.core.derived import Rebuild
from discreet.core.forms import Form
from discreet.core.meeting import _meet
from discreet.core.parameter import DerivedParameter
from discreet.core.routing import Picking, Trail
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse

KIND = "compiled "
"""Marks the keys of uses that the compiler recorded: it sees other functions than eager code calls."""

_library = torch.library.Library("discreet", "DEF")
_library.define("booked(Tensor[] tensors, SymInt[] sizes) -> Tensor")
BOOKED = torch.ops.discreet.booked.default


@torch.library.register_fake("discreet::booked", lib=_library)
def _booked(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """A scalar that stands for a gradient of zero. There is no kernel: what reaches one raises."""
    return tensors[0].new_empty((), dtype=torch.float32)


class TracedParameter(DerivedParameter):
    """What stands for a guarded value in a trace: a shape, and the traced value."""

    inner: Tensor

    @classmethod
    def of(cls, value: Tensor, derivation: Derivation) -> TracedParameter:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device, requires_grad=True
        )
        made.inner, made.derivation = value.detach(), derivation
        return made

    def plain(self) -> Tensor:
        return self.inner

    def another(self, value: Tensor, derivation: Derivation) -> TracedParameter:
        return TracedParameter.of(value, derivation)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _meet(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What only looks at the parameter: on the traced value."""
        args, kwargs = torch.utils._pytree.tree_map_only(TracedParameter, TracedParameter.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class At:
    """The place of a tensor or a size among what the compiled backward returns."""

    index: int


@dataclass(frozen=True)
class TracedUse:
    """One meeting in the trace: how the layout in force saw it, and how it was taken."""

    names: tuple[str, ...]
    function: str
    known: tuple[Axis, ...] | None
    found: tuple[Axis, ...]


class TracedBook(Book):
    """Notes meetings and records of a trace. Names are those of the call that the trace was made for.

    Attributes:
        uses: all meetings, in order.
        expected: for each record to come, the parameters it belongs to.
        templates: the records (origin, form), to be filled with what stands for every tensor and size.
    """

    def __init__(self, real: Book, values: Mapping[str, Tensor], *, examples: int, ticket: Tensor, serial: int) -> None:
        super().__init__(values or real.parameters, examples=real.examples)
        self.examples = examples
        self.kind = KIND
        self.verified, self.trusts, self.trail = real.verified, real.trusts, Trail(examples)
        self._meetings.update(real._meetings)
        self.uses: list[TracedUse] = []
        self.expected: list[tuple[str, ...]] = []
        self.templates: list[Filler] = []
        self._tensors: list[Tensor] = [ticket]
        self._sizes: list[int | torch.SymInt] = [serial]

    def open(self, sink: Tensor) -> None:
        """Begin with the input that stands for the sink; its gradient will be everything that was booked."""
        self.sink = _Close.apply(sink, self)

    def classify(
        self, names: tuple[str, ...], function: str, operands: list[Tensor], *, may_be_second: bool = False,
        pickings: Mapping[int, Picking] | None = None, may_be_routed: bool = False,
    ) -> list[Axis]:  # fmt: skip
        found = super().classify(
            names, function, operands, may_be_second=may_be_second, pickings=pickings, may_be_routed=may_be_routed
        )
        self._note(names, function, tuple(found))
        return found

    def classify_size(self, names: tuple[str, ...], function: str, size: int) -> bool:
        is_batch = super().classify_size(names, function, size)
        self.uses.pop()
        self._note(names, function, (Axis.BATCH if is_batch else Axis.SHARED,))
        return is_batch

    def _note(self, names: tuple[str, ...], function: str, found: tuple[Axis, ...]) -> None:
        ordinal = self._meetings[names, KIND + function] - 1
        key = (names, KIND + function, ordinal)
        known = self.verified.of(key, examples=self.examples) if self.verified is not None else None
        self.uses.append(TracedUse(names, function, known, found))

    def expect(self, derivation: Derivation) -> None:
        self.expected.append(derivation.names)

    def kept(self, constant: object) -> object:
        """A copy: whatever happens to the tensor later in the graph, this is what was read."""
        return constant.detach().clone() if isinstance(constant, Tensor) else constant

    def record(self, derivation: Derivation, form: Form) -> None:
        self.templates.append(filler(mapped((replace(derivation, sources=()), form.detached()), self._placed)))

    def close(self) -> Tensor:
        """All that was recorded, handed to the compiler."""
        return BOOKED(self._tensors, self._sizes)

    def _placed(self, leaf: Any) -> At:
        if isinstance(leaf, Tensor):
            if isinstance(leaf, DerivedParameter):
                raise UnsupportedUse("a guarded value among booked tensors; report it.")
            self._tensors.append(leaf.detach())
            return At(len(self._tensors) - 1)
        self._sizes.append(leaf)
        return At(1 - len(self._sizes))


class _Close(torch.autograd.Function):
    """sink -> sink. Every rule's function takes it, so that its backward is the last of all in the region."""

    @staticmethod
    def forward(ctx: Any, sink: Tensor, book: TracedBook) -> Tensor:
        ctx.book = book
        ctx.set_materialize_grads(False)
        return sink.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        return ctx.book.close(), None


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A record with each tensor, size and `At` in it changed."""
    if isinstance(value, (Tensor, torch.SymInt, At)):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, Rebuild):
        constants = tuple(mapped(leaf, change) for leaf, _ in value.constants)
        versions = (leaf._version if isinstance(leaf, Tensor) else 0 for leaf in constants)
        return replace(value, parts=mapped(value.parts, change), constants=tuple(zip(constants, versions, strict=True)))
    if isinstance(value, (Derivation, Form)) and is_dataclass(value):
        return replace(value, **{field.name: mapped(getattr(value, field.name), change) for field in fields(value)})
    return value


Fill = Callable[[At], Any]
Filler = Callable[[Fill], Any]
"""Makes a record anew, asking for what stands in each place."""


def filler(template: Any) -> Filler:
    """As `mapped`, for a template that is filled again and again: what has no place in it is looked at once."""
    if isinstance(template, At):
        return lambda fill: fill(template)
    if type(template) in (tuple, list) and _has_place(template):
        kind, parts = type(template), [filler(part) for part in template]
        return lambda fill: kind(part(fill) for part in parts)
    if isinstance(template, Rebuild) and _has_place(template):
        return lambda fill: mapped(template, fill)
    if isinstance(template, (Derivation, Form)) and _has_place(template):
        values = {field.name: getattr(template, field.name) for field in fields(template)}
        changing = {name: filler(value) for name, value in values.items() if _has_place(value)}
        return lambda fill: replace(template, **{name: part(fill) for name, part in changing.items()})
    return lambda fill: template


def _has_place(template: Any) -> bool:
    found: list[At] = []
    mapped(template, found.append)
    return bool(found)
