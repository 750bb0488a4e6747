"""How a use of a parameter is met by a rule, or refused.

While a model is guarded, each of its trainable parameters has the class `PrivateParameter` (the object, its name and
everything that refers to it stay as they are). PyTorch then hands every function that touches one to `_meet`, which has
one of four answers:

1. no gradient can flow (``no_grad``, or a mere observation such as ``p.shape``): the plain function;
2. a function of parameters alone (``1 + w``, ``w.t()``, ``w[index]``): a `DerivedParameter`, which remembers how;
3. a function that also takes activations, and for which there is a rule: the rule;
4. anything else: `UnsupportedUse`. Fail closed: a norm is right or there is none.

A gradient that would reach a guarded value behind the rules' back (a custom ``autograd.Function``, a scripted module)
hits a hook that refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from discreet.core.book import Axis, Book
from discreet.core.forms import Dense, Form
from discreet.core.routing import Picking
from discreet.core.uses import Derivation
from discreet.errors import ConfigError, UnsupportedUse

Function = Callable[..., Any]

_active: Book | None = None
_compiler: Callable[[Book], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
_rules: dict[Function, Function] = {}
_derivable: dict[Function, bool] = {}
_decompositions: dict[Function, Function] = {}
_observations: set[Function] = set()
_routed: dict[Function, Function] = {}


def _hand_over(
    cls: type, func: Function, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    if torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is not None:
        # The compiler records the plain call; its graph meets the rules in `discreet.core.compiled`, or a hook refuses.
        with torch._C.DisableTorchFunctionSubclass():
            return _PLAINLY.get(func, func)(*args, **(kwargs or {}))
    return _answer(func, args, kwargs or {})


_PLAINLY: dict[Function, Function] = {torch.nn.functional.rms_norm: torch.rms_norm}
"""Functions written in Python that look at the class of their arguments even where it is to be ignored."""


class PrivateParameter(nn.Parameter):
    """A trainable parameter whose every use is met by a rule or refused."""

    __torch_function__ = classmethod(_hand_over)


class DerivedParameter(Tensor):
    """A value computed from guarded parameters alone, which remembers how."""

    derivation: Derivation

    __torch_function__ = classmethod(_hand_over)

    def plain(self) -> Tensor:
        """The value as an ordinary tensor without gradient."""
        return self.detach().as_subclass(Tensor)

    @classmethod
    def of(cls, value: Tensor, derivation: Derivation) -> DerivedParameter:
        """A value with its derivation, and with a hook that refuses a gradient past the rules."""
        wrapped = value.detach().as_subclass(cls)
        wrapped.derivation = derivation
        wrapped.requires_grad_().register_hook(_refuser(", ".join(derivation.names)))
        return wrapped

    def another(self, value: Tensor, derivation: Derivation) -> DerivedParameter:
        """A value of the same kind: what the compiler traces stays traced."""
        return DerivedParameter.of(value, derivation)


Guarded = (PrivateParameter, DerivedParameter)


@dataclass(frozen=True)
class Use:
    """One meeting of guarded values with a function, as a rule sees it."""

    book: Book
    function: Function
    names: tuple[str, ...]
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

    def derivation(self, guarded: Tensor) -> Derivation:
        """Where a guarded value comes from, for a rule that will record its gradients: once for each record."""
        derivation = _derivation(self.book, guarded)
        self.book.expect(derivation)
        return derivation

    def record(self, guarded_derivation: Derivation, form: Form) -> None:
        """Book the per-example gradients of a guarded value; called from the backward."""
        self.book.record(guarded_derivation, form)

    def expand(self, guarded: Tensor) -> Tensor:
        """One copy per example, shape (B, *shape), as an ordinary activation whose gradient is booked as it stands."""
        return _Expand.apply(self.book.sink, plain(guarded), self.book, self.derivation(guarded))

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
            _rules[function] = meeting
        return meeting

    return register


def routed_rule(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated rule for uses of these functions on rows that were picked from the batch."""

    def register(meeting: Function) -> Function:
        for function in functions:
            _routed[function] = meeting
        return meeting

    return register


def decomposition(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated function as what these functions do, written in functions that have rules of their own.

    Its parts meet the parameters, and each part's operands are classified: a mistake here changes what is computed, and
    never makes a norm wrong. It is where a function whose batch is not in dimension 0 moves it there.
    """

    def register(written: Function) -> Function:
        for function in functions:
            _decompositions[function] = written
        return written

    return register


def derivable(*functions: Function, isometric: bool = False) -> None:
    """Declare pure, differentiable functions that may be applied to parameters alone.

    Args:
        functions: they must be supported by ``torch.func.vjp`` and ``vmap``.
        isometric: they rearrange one tensor's entries and change nothing else, so that gradient norms are kept.
    """
    for function in functions:
        _derivable[function] = isometric


def observation(*functions: Function) -> None:
    """Declare functions through which no gradient flows to the parameter: they run as they are."""
    _observations.update(functions)


def is_known(function: Function) -> bool:
    """Whether a guarded value that meets this function has an answer already."""
    return any(function in answers for answers in (_rules, _routed, _derivable, _decompositions, _observations))


def plain(value: Any) -> Any:
    """A guarded tensor as an ordinary one without gradient; anything else unchanged."""
    if isinstance(value, PrivateParameter):
        return value.detach()
    if isinstance(value, DerivedParameter):
        return value.plain()
    return value


def function_name(function: Function) -> str:
    """A readable name: torch's own names for its C classes are not the ones that users write."""
    name = str(getattr(function, "__qualname__", None) or getattr(function, "__name__", None) or function)
    return name.replace("TensorBase.", "Tensor.").replace("_VariableFunctionsClass.", "torch.")


@contextlib.contextmanager
def guard(book: Book) -> Iterator[None]:
    """Guard the book's parameters: every use inside is met by a rule and booked there, or refused.

    Raises:
        ConfigError: a model is guarded already (one backward is booked at a time).
    """
    global _active
    if _active is not None:
        raise ConfigError("a model is guarded already: finish that microbatch before the next one begins.")
    classes = {}
    hooks = []
    try:
        for name, parameter in book.parameters.items():
            classes[name] = type(parameter)
            hooks.append(parameter.register_hook(_refuser(name)))
            parameter.__class__ = PrivateParameter
        _active = book
        with _compiler(book):
            yield
    finally:
        _active = None
        book.trail.forget()
        for hook in hooks:
            hook.remove()
        for name, original in classes.items():
            book.parameters[name].__class__ = original


def compiled_through(compiler: Callable[[Book], contextlib.AbstractContextManager[None]]) -> None:
    """Register what surrounds every guarded forward, so that compiled code in it meets the rules."""
    global _compiler
    _compiler = compiler


def hide_from_compiler(skip: Function, disable: Function) -> None:
    """Keep the compiler from eager meetings: it may see the call that meets a parameter, and nothing behind it.

    Args:
        skip: marks code whose own frame is not compiled.
        disable: wraps a function in which nothing is compiled.
    """
    global _answer
    if _answer is _meet:
        skip(_hand_over.__code__)
        _answer = disable(_meet)


def active() -> Book | None:
    """The book of the model that is guarded now."""
    return _active


@contextlib.contextmanager
def instead(book: Book) -> Iterator[None]:
    """Book in another book for a while; for tracing."""
    global _active
    before, _active = _active, book
    try:
        yield
    finally:
        _active = before


def _refuser(name: str) -> Callable[[Tensor], None]:
    def refuse(gradient: Tensor) -> None:
        raise UnsupportedUse(
            f"{name}: a gradient reached it past every rule (a custom autograd.Function or a scripted module uses it); "
            "write that part with ordinary torch functions."
        )

    return refuse


def _derivation(book: Book, guarded: Tensor) -> Derivation:
    if isinstance(guarded, DerivedParameter):
        return guarded.derivation
    return Derivation.of(book.name_of(guarded), guarded)


def _meet(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer one function call that involves a guarded value. See the module docstring."""
    if func in _decompositions and _active is not None and torch.is_grad_enabled():
        return _decompositions[func](*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        book = _active
        if func in _observations:
            return func(*args, **kwargs)
        if book is None or not torch.is_grad_enabled():
            plain_args, plain_kwargs = tree_map(_unwrap_derived, (args, kwargs))
            return func(*plain_args, **plain_kwargs)
        leaves = _leaves((args, kwargs))
        guarded = [leaf for leaf in leaves if isinstance(leaf, Guarded)]
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Guarded)]
        names = tuple(dict.fromkeys(name for leaf in guarded for name in _derivation(book, leaf).names))
        if func not in _rules and func not in _derivable and func not in _routed:
            raise _no_rule(func, names, guarded[0])
        found = ((id(operand), book.trail.trace(operand)) for operand in operands)
        pickings = {key: picking for key, picking in found if picking is not None}
        axes = book.classify(
            names,
            function_name(func),
            operands,
            may_be_second=func in _turnable,
            pickings=pickings,
            may_be_routed=func in _routed,
        )
        if Axis.ROUTED in axes:
            found = {id(operand): axis for operand, axis in zip(operands, axes, strict=True)}
            return _routed[func](Use(book, func, names, found, pickings), *args, **kwargs)
        if Axis.SECOND in axes:
            operands, axes, args, kwargs = _turned(operands, axes, args, kwargs)
            use = Use(book, func, names, {id(operand): axis for operand, axis in zip(operands, axes, strict=True)})
            return _rules[func](use, *args, **kwargs).transpose(0, 1).contiguous()
        use = Use(
            book, func, names, {id(operand): axis for operand, axis in zip(operands, axes, strict=True)}, pickings
        )
        batched = any(axis is not Axis.SHARED for axis in axes)
        meeting = _rules.get(func)
        if meeting is not None and (batched or func in _sized):
            return meeting(use, *args, **kwargs)
        if not batched and func in _derivable:
            return derive(use, args, kwargs, isometric=_derivable[func])
        raise _no_rule(func, names, guarded[0])


_answer = _meet


def _leaves(value: Any) -> list[Any]:
    """What is inside tuples, lists and dicts, in order: all that arguments of torch functions are made of."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _leaves(part)]
    return _leaves(tuple(value.values())) if isinstance(value, dict) else [value]


def _no_rule(func: Function, names: tuple[str, ...], guarded: Tensor) -> UnsupportedUse:
    usual = (
        "freeze the parameter (requires_grad=False), or write this part with linear, convolution, embedding, "
        "normalisation or elementwise functions."
    )
    return UnsupportedUse(
        f"{function_name(func)} on {', '.join(names)} (shape {tuple(guarded.shape)}): no exact rule for it; "
        f"{_REMEDIES.get(func, usual)}"
    )


_FAST_PATH = "it has no gradient in torch either; call the module, or F.multi_head_attention_forward."
_REMEDIES: dict[Function, str] = {
    torch.nn.functional.batch_norm: "use GroupNorm, LayerNorm or RMSNorm: BatchNorm mixes examples.",
    **dict.fromkeys((torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd), _FAST_PATH),
}
"""What to write instead, where the usual advice would not help."""


def _unwrap_derived(leaf: Any) -> Any:
    return leaf.plain() if isinstance(leaf, DerivedParameter) else leaf


_sized: set[Function] = set()


def sized(*functions: Function) -> None:
    """Declare functions whose size arguments may name the batch (``expand``, ``repeat``): their rule sees every use."""
    _sized.update(functions)


_turnable: set[Function] = set()


def turnable(*functions: Function) -> None:
    """Declare functions that act on the last axes of one activation, so that its first two may change places.

    Their rule then also covers (time, B, ...), once the self-check has verified that the batch is dimension 1.
    """
    _turnable.update(functions)


def _turned(
    operands: list[Tensor], axes: list[Axis], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Axis], tuple[Any, ...], dict[str, Any]]:
    """The same call with every operand that has the batch in dimension 1 turned to have it in dimension 0."""
    turned = {
        id(operand): operand.transpose(0, 1)
        for operand, axis in zip(operands, axes, strict=True)
        if axis is Axis.SECOND
    }
    args, kwargs = tree_map(lambda leaf: turned.get(id(leaf), leaf), (args, kwargs))
    axes = [Axis.BATCH if axis is Axis.SECOND else axis for axis in axes]
    return [turned.get(id(operand), operand) for operand in operands], axes, args, kwargs


@dataclass(frozen=True)
class Replay:
    """A function of parameters alone, as it is run again on other values of them: the ``rebuild`` of a `Derivation`.

    Attributes:
        use: the meeting at which it ran first.
        names: the parameters whose values a call takes, in order.
        parts: for each argument, how it is made from parameters, or None.
        constants: for each argument, itself where it is no such value, with the version that a tensor had.
        piece: of a result in pieces, which one.
    """

    use: Use
    names: tuple[str, ...]
    parts: tuple[Derivation | None, ...]
    constants: tuple[tuple[Any, int], ...]
    spec: TreeSpec
    piece: int | None = None

    def __call__(self, *sources: Tensor) -> Any:
        if any(isinstance(leaf, Tensor) and leaf._version != version for leaf, version in self.constants):
            raise self.use.refuse("a tensor that it read was changed in place since", "change a copy of it.")
        known = dict(zip(self.names, sources, strict=True))
        filled = [
            constant if part is None else part.rebuild(*(known[name] for name in part.names))
            for part, (constant, _) in zip(self.parts, self.constants, strict=True)
        ]
        args, kwargs = tree_unflatten(filled, self.spec)
        result = self.use.function(*args, **kwargs)
        return result if self.piece is None else result[self.piece]


def derive(use: Use, args: tuple[Any, ...], kwargs: dict[str, Any], *, isometric: bool) -> Any:
    """Apply a function to parameters alone, and remember how each result was made."""
    leaves, spec = tree_flatten((args, kwargs))
    parts = tuple(_derivation(use.book, leaf) if isinstance(leaf, Guarded) else None for leaf in leaves)
    origins = [part for part in parts if part is not None]
    names = tuple(dict.fromkeys(name for part in origins for name in part.names))
    values = {name: source for part in origins for name, source in zip(part.names, part.sources, strict=True)}
    kept = [None if part is not None else use.book.kept(leaf) for part, leaf in zip(parts, leaves, strict=True)]
    constants = tuple((leaf, leaf._version if isinstance(leaf, Tensor) else 0) for leaf in kept)
    call = Replay(use, names, parts, constants, spec)
    keeps_norm = isometric and len(origins) == 1 and origins[0].isometric
    plain_leaves = [plain(leaf) for leaf in leaves]
    versions = [leaf._version for leaf in plain_leaves if isinstance(leaf, Tensor)]
    plain_args, plain_kwargs = tree_unflatten(plain_leaves, spec)
    with torch.no_grad():
        result = use.function(*plain_args, **plain_kwargs)
    if versions != [leaf._version for leaf in plain_leaves if isinstance(leaf, Tensor)]:
        raise use.refuse(f"it changes {', '.join(names)} in place", "write it out of place (no inplace=, max_norm=).")
    sources = tuple(values[name] for name in names)
    head = next(leaf for leaf in leaves if isinstance(leaf, Guarded))
    if isinstance(result, Tensor):
        return _wrap(result, Derivation(names, sources, call, keeps_norm), like=head)
    pieces = [
        _wrap(piece, Derivation(names, sources, replace(call, piece=index), False), like=head)
        for index, piece in enumerate(result)
    ]
    return type(result)(pieces) if type(result) in (tuple, list) else tuple(pieces)


def cast(use: Use, guarded: Tensor, result: Tensor) -> Tensor:
    """A guarded value in another dtype or memory order: the same value, so the same derivation."""
    known = _derivation(use.book, guarded)
    derivation = Derivation(known.names, known.sources, known.rebuild, known.isometric, known.identity)
    return _wrap(result, derivation, like=guarded)


def _wrap(value: Tensor, derivation: Derivation, *, like: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise UnsupportedUse(
            f"{', '.join(derivation.names)} as {value.dtype}: no real gradient comes back; keep it floating point."
        )
    if isinstance(like, DerivedParameter):
        return like.another(value, derivation)
    return DerivedParameter.of(value, derivation)
