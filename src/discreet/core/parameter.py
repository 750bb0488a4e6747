"""Guarded values, what a rule sees of a use of them, and the tables of what is known about functions.

While a model is guarded, each of its trainable parameters has the class `PrivateParameter` (the object, its name and
everything that refers to it stay as they are). PyTorch then hands every function that touches one to
`discreet.core.meeting`, which asks the tables that rules fill here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.axes import Axis
from discreet.core.book import Book
from discreet.core.forms import Dense
from discreet.core.routing import Picking
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse

Function = Callable[..., Any]

RULES: dict[Function, Function] = {}
DERIVABLE: dict[Function, bool] = {}
DECOMPOSITIONS: dict[Function, Function] = {}
OBSERVATIONS: set[Function] = set()
ROUTED: dict[Function, Function] = {}
SIZED: set[Function] = set()
TURNABLE: set[Function] = set()


def _unanswered(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise AssertionError("discreet.core.meeting answers, and was not imported")


_answer: Function = _unanswered


def answered_by(meeting: Function) -> None:
    """Register what answers every function call that involves a guarded value."""
    global _answer
    _answer = meeting


def hand_over(
    cls: type, func: Function, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """``__torch_function__`` of guarded values: the answer of `discreet.core.meeting`."""
    if torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is not None:
        # The compiler records the plain call; its graph meets the rules in `discreet.core.compiled`, or a hook refuses.
        with torch._C.DisableTorchFunctionSubclass():
            return _PLAINLY.get(func, func)(*args, **(kwargs or {}))
    return _answer(func, args, kwargs or {})


_PLAINLY: dict[Function, Function] = {torch.nn.functional.rms_norm: torch.rms_norm}
"""Functions written in Python that look at the class of their arguments even where it is to be ignored."""


class Guarded:
    """A value whose every use is met by a rule or refused."""

    __slots__ = ()
    __torch_function__ = classmethod(hand_over)


class PrivateParameter(Guarded, nn.Parameter):
    """A trainable parameter."""


class DerivedParameter(Guarded, Tensor):
    """A value computed from guarded parameters alone, which remembers how."""

    derivation: Derivation

    def plain(self) -> Tensor:
        """The value as an ordinary tensor without gradient."""
        return self.detach().as_subclass(Tensor)

    @classmethod
    def of(cls, value: Tensor, derivation: Derivation) -> DerivedParameter:
        """A value with its derivation, and with a hook that refuses a gradient past the rules."""
        wrapped = value.detach().as_subclass(cls)
        wrapped.derivation = derivation
        wrapped.requires_grad_().register_hook(refuser(", ".join(derivation.names)))
        return wrapped

    def another(self, value: Tensor, derivation: Derivation) -> DerivedParameter:
        """A value of the same kind: what the compiler traces stays traced."""
        return DerivedParameter.of(value, derivation)


@dataclass(frozen=True)
class Use:
    """One meeting of guarded values with a function, as a rule sees it."""

    book: Book
    function: Function
    names: tuple[str, ...]
    origins: Mapping[int, Derivation]
    axes: Mapping[int, Axis]
    pickings: Mapping[int, Picking] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return function_name(self.function)

    def is_batched(self, operand: Any) -> bool:
        """Whether this plain operand carries examples in dimension 0."""
        return self.axes.get(id(operand), Axis.SHARED) is not Axis.SHARED

    def owner(self, *operands: Any) -> Tensor:
        """The example behind each row of operands whose rows were picked from the batch alike."""
        batched = [operand for operand in operands if self.is_batched(operand)]
        picked = [self.pickings[id(operand)] for operand in batched if self.axes[id(operand)] is Axis.ROUTED]
        owners = [picking.owner for picking in picked if picking.owner is not None]
        if len(owners) != len(batched) or not all(torch.equal(owners[0], owner) for owner in owners):
            raise self.refuse("rows picked from the batch meet rows in another order", "pick both by one index.")
        return owners[0]

    def renamed(self, before: Tensor, after: Tensor) -> Use:
        """This use with one operand replaced by another that carries the examples in the same way."""
        return replace(self, axes={**self.axes, id(after): self.axes[id(before)]})

    def meets_batch(self, size: int) -> bool:
        """Whether an axis of this size, named by the caller, is the batch (a size says less than an operand does)."""
        return self.book.classify_size(self.names, self.name, size)

    def origin(self, guarded: Tensor) -> Derivation:
        """Where a guarded value comes from."""
        return self.origins.get(id(guarded)) or derivation_of(self.book, guarded)

    def derivation(self, guarded: Tensor) -> Derivation:
        """Where a guarded value comes from, for a rule that will record its gradients: once for each record."""
        derivation = self.origin(guarded)
        self.book.expect(derivation)
        return derivation

    def taken(self, value: Any) -> tuple[Derivation | None, Any]:
        """A value as an ordinary one, and where it comes from if it is guarded: its gradients will be recorded."""
        if not isinstance(value, Guarded):
            return None, value
        derivation = self.derivation(value)
        return derivation, derivation.sources[0] if type(value) is PrivateParameter else plain(value)

    def expand(self, guarded: Tensor, rows: int | None = None) -> Tensor:
        """One copy per example, shape (B, *shape), as an ordinary activation whose gradient is booked as it stands.

        With ``rows``, each as often as its example has rows among so many: shape (rows, *shape).
        """
        each = _Expand.apply(self.book.sink, plain(guarded), self.book, self.derivation(guarded))
        folds = 1 if rows is None else rows // self.book.examples
        return each.repeat_interleave(folds, 0) if folds > 1 else each

    def refuse(self, why: str, remedy: str) -> UnsupportedUse:
        """The error for a use that no rule covers."""
        return UnsupportedUse(f"{self.name} on {', '.join(self.names)}: {why}; {remedy}")


class _Expand(torch.autograd.Function):
    """value -> (B, *value.shape); its backward books the incoming gradient, which is per example already."""

    @staticmethod
    def forward(ctx: Any, sink: Tensor, value: Tensor, book: Book, derivation: Derivation) -> Tensor:
        ctx.book, ctx.derivation = book, derivation
        return value.unsqueeze(0).expand(book.examples, *value.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.book.record(ctx.derivation, Dense(grad))
        return None, None, None, None


def rule(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated rule for these functions. A rule has the function's signature after a leading `Use`."""

    def register(meeting: Function) -> Function:
        for function in functions:
            RULES[function] = meeting
        return meeting

    return register


def routed_rule(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated rule for uses of these functions on rows that were picked from the batch."""

    def register(meeting: Function) -> Function:
        for function in functions:
            ROUTED[function] = meeting
        return meeting

    return register


def decomposition(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated function as what these functions do, written in functions that have rules of their own.

    Its parts meet the parameters, and each part's operands are classified: a mistake here changes what is computed, and
    never makes a norm wrong. It is where a function whose batch is not in dimension 0 moves it there.
    """

    def register(written: Function) -> Function:
        for function in functions:
            DECOMPOSITIONS[function] = written
        return written

    return register


def derivable(*functions: Function, isometric: bool = False) -> None:
    """Declare pure, differentiable functions that may be applied to parameters alone.

    Args:
        functions: they must be supported by ``torch.func.vjp`` and ``vmap``.
        isometric: they rearrange one tensor's entries and change nothing else, so that gradient norms are kept.
    """
    for function in functions:
        DERIVABLE[function] = isometric


def sized(*functions: Function) -> None:
    """Declare functions whose size arguments may name the batch (``expand``, ``repeat``): their rule sees every use."""
    SIZED.update(functions)


def turnable(*functions: Function) -> None:
    """Declare functions that act on the last axes of one activation, so that its first two may change places.

    Their rule then also covers (time, B, ...), once the self-check has verified that the batch is dimension 1.
    """
    TURNABLE.update(functions)


def observation(*functions: Function) -> None:
    """Declare functions through which no gradient flows to the parameter: they run as they are."""
    OBSERVATIONS.update(functions)


def is_known(function: Function) -> bool:
    """Whether a guarded value that meets this function has an answer already."""
    return any(function in answers for answers in (RULES, ROUTED, DERIVABLE, DECOMPOSITIONS, OBSERVATIONS))


def plain(value: Any) -> Any:
    """A guarded tensor as an ordinary one without gradient; anything else unchanged."""
    if isinstance(value, PrivateParameter):
        return value.detach()
    if isinstance(value, DerivedParameter):
        return value.plain()
    return value


@functools.lru_cache(maxsize=1024)
def function_name(function: Function) -> str:
    """A readable name: torch's own names for its C classes are not the ones that users write."""
    name = str(getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or function)
    attribute = getattr(getattr(function, "__self__", None), "__name__", "")  # p.data = ... is a call of a descriptor
    name = name.replace("getset_descriptor.", f"Tensor.{attribute}.")
    return name.replace("TensorBase.", "Tensor.").replace("_VariableFunctionsClass.", "torch.")


def refuser(name: str) -> Callable[[Tensor], None]:
    """A hook for a tensor that no gradient may reach."""

    def refuse(gradient: Tensor) -> None:
        raise UnsupportedUse(
            f"{name}: a gradient reached it past every rule (a custom autograd.Function or a scripted module uses it); "
            "write that part with ordinary torch functions, or make it one function that is registered "
            "(torch.overrides.wrap_torch_function, discreet.register_rule)."
        )

    return refuse


def derivation_of(book: Book, guarded: Tensor) -> Derivation:
    """Where a guarded value comes from."""
    if isinstance(guarded, DerivedParameter):
        return guarded.derivation
    return book.derivation_of(guarded)
