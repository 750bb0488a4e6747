"""register_rule(): a rule for a function of the user's own.

A function can be met when it reaches ``__torch_function__``: any torch function, an operator of ``torch.library``, and
a Python function under ``torch.overrides.wrap_torch_function``. Three kinds of rule exist, from the safest:

    decomposition   the same function, written in functions that have rules: it can make no norm wrong
    (nothing)       the function is run again in the backward, on each example's rows alone: exact, and B times slower
    per_example     a formula for the per-example gradients: as fast as it is written, and as right

Shape legend: B = examples.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from discreet.core import parameter, rules  # noqa: F401  -- registers all rules
from discreet.core.book import Book
from discreet.core.forms import Dense
from discreet.core.parameter import Guarded, Use, function_name, is_known, plain
from discreet.core.rules.once import differentiable_once
from discreet.core.strays import nodes
from discreet.core.uses import Derivation
from discreet.errors import ConfigError

Function = Callable[..., Any]
PerExample = Callable[..., Sequence[Tensor | None]]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

_own: set[str] = set()


def register_rule(
    function: Function, *, decomposition: Function | None = None, per_example: PerExample | None = None
) -> None:
    """Say how a function of activations and parameters is to be met while a model is guarded.

    Without a further argument, the backward runs the function again on each example alone. This is exact for every
    function that returns one tensor and treats dimension 0 of its activations as independent rows; a row that comes out
    differently alone than in its batch is refused, and so is a trainable tensor that is not among the arguments.

    Args:
        function: what ``__torch_function__`` receives: a torch function, an operator of ``torch.library``, or a Python
            function under ``torch.overrides.wrap_torch_function``.
        decomposition: the same function with the same signature, written in functions that have rules of their own.
        per_example: ``(grad, *arguments)`` to the gradients of each tensor argument, example by example: a tuple with
            one entry per tensor among the arguments, in the order of its own signature, of shape (B, *argument.shape),
            and None for those that are no parameter. What is left out or None in a call has no entry. Arguments arrive
            without their guard; autograd takes care of activations.

    Raises:
        ConfigError: the function has a rule already, or both kinds of rule are given.

    See `discreet.check_rule`, which compares a registered rule with autograd.
    """
    if decomposition is not None and per_example is not None:
        raise ConfigError(f"{function_name(function)}: a decomposition and per_example; give one of the two.")
    targets = targets_of(function)
    for target in targets:
        if is_known(target):
            raise ConfigError(
                f"{function_name(target)} has a rule already, and no rule is ever replaced; wrap it in a function of "
                "your own (torch.overrides.wrap_torch_function), and register that."
            )
    _own.update(map(function_name, targets))
    if decomposition is not None:
        parameter.decomposition(*targets)(decomposition)
    else:
        order = inspect.signature(per_example).parameters if per_example is not None else ()
        parameter.rule(*targets)(functools.partial(_meet, per_example, tuple(order)))


def is_own(name: str) -> bool:
    """Whether the function of this name was given a rule here."""
    return name in _own


def targets_of(function: Any) -> tuple[Function, ...]:
    """The objects under which ``__torch_function__`` may receive this function."""
    if isinstance(function, torch.library.CustomOpDef):
        function = function._opoverload
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    if isinstance(function, torch._ops.OpOverloadPacket):
        return (function, *(getattr(function, overload) for overload in function.overloads()))
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"{function!r} is no function; pass what the model calls.")
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        raise ConfigError(
            f"{owner.__name__}.apply: autograd runs it past every rule; call it in a function of your own, under "
            "torch.overrides.wrap_torch_function, and register that."
        )
    return (function,)


@dataclass(frozen=True)
class _Call:
    """One call of a registered function: its arguments with the tensors taken out, and what is known of each tensor.

    Attributes:
        rows: for each tensor, how many of its rows belong to one example; 0 when it is the same for all.
        origins: for each tensor, where it comes from when it is guarded.
        autocast: the arguments of `torch.autocast` as it is there.
    """

    use: Use
    constants: tuple[Any, ...]
    spec: TreeSpec
    rows: tuple[int, ...]
    origins: tuple[Derivation | None, ...]
    autocast: tuple[str, torch.dtype, bool]

    @property
    def book(self) -> Book:
        """Where the gradients are booked."""
        return self.use.book

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in their places."""
        left = iter(tensors)
        leaves = [next(left) if constant is _TENSOR else constant for constant in self.constants]
        return tree_unflatten(leaves, self.spec)

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """The function itself."""
        args, named = self.arguments(tensors)
        result = self.use.function(*args, **named)
        if not isinstance(result, Tensor):
            raise self.use.refuse(f"it returns a {type(result).__name__}", "register a function that returns a tensor.")
        return result

    def record(self, gradients: Mapping[int, Tensor]) -> None:
        """Book per-example gradients, one for each guarded tensor."""
        for at, origin in enumerate(self.origins):
            if origin is not None:
                self.book.record(origin, Dense(gradients[at]))


class _Tensor:
    """Marks the place of a tensor among the arguments."""


_TENSOR = _Tensor()


def _meet(per_example: PerExample | None, order: Sequence[str], use: Use, *args: Any, **named: Any) -> Tensor:
    # Entries are told apart by their order, which must not be that of the keywords in a model.
    named = dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    leaves, spec = tree_flatten((args, named))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    examples, kind = use.book.examples, use.book.sink.device.type
    call = _Call(
        use=use,
        constants=tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        spec=spec,
        rows=tuple(t.shape[0] // examples if use.is_batched(t) else 0 for t in tensors),
        origins=tuple(use.derivation(t) if isinstance(t, Guarded) else None for t in tensors),
        autocast=(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)),
    )
    values = [plain(tensor) for tensor in tensors]
    if per_example is None:
        return _Alone.apply(use.book.sink, call, *values)
    return _Formula.apply(use.book.sink, call, per_example, *values)


class _Alone(torch.autograd.Function):
    """The function; its backward runs it again, one example at a time."""

    @staticmethod
    def forward(ctx: Any, sink: Tensor, call: _Call, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            output = call.run([tensor.detach() for tensor in tensors])
        if output.requires_grad:
            raise call.use.refuse("it uses a trainable tensor that is not among its arguments", "pass it as one.")
        if output.dim() == 0 or output.shape[0] % call.book.examples or output.numel() == 0:
            raise call.use.refuse(f"an output of shape {tuple(output.shape)}", "return one row or more per example.")
        ctx.call = call
        ctx.save_for_backward(output, *tensors)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        output, *tensors = ctx.saved_tensors
        asked = ctx.needs_input_grad[2:]
        parts: dict[int, list[Tensor]] = {
            at: [] for at, origin in enumerate(call.origins) if origin is not None or asked[at]
        }
        # Rounding is told by an example's largest entry, or the median example's where its own cancel.
        largest_B = output.nan_to_num(0, 0, 0).abs().reshape(call.book.examples, -1).amax(1)
        scales = largest_B.clamp(min=largest_B.median()).tolist()
        for example, scale in enumerate(scales):
            with torch.autocast(*call.autocast):
                _one_example(call, example, tensors, output, grad, parts, scale=scale)
        call.record({at: torch.stack(parts[at]) for at, origin in enumerate(call.origins) if origin is not None})
        into = [torch.cat(parts[at]) if asked[at] else None for at in range(len(tensors))]
        return None, None, *into


def _one_example(
    call: _Call, example: int, tensors: Sequence[Tensor], output: Tensor, grad: Tensor, parts: dict[int, list[Tensor]],
    *, scale: float,
) -> None:  # fmt: skip
    """Run the function on one example's rows, and append its gradients."""
    mine = [
        (tensor[example * rows : (example + 1) * rows] if rows else tensor).detach().requires_grad_(at in parts)
        for at, (tensor, rows) in enumerate(zip(tensors, call.rows, strict=True))
    ]
    rows = output.shape[0] // call.book.examples
    its_own = slice(example * rows, (example + 1) * rows)
    with torch.enable_grad():
        alone = call.run(mine)
    _compare(call.use, alone, output[its_own], scale=scale)
    leaves = [mine[at] for at in parts]
    found = torch.autograd.grad(alone, leaves, grad[its_own], allow_unused=True)
    for at, leaf, gradient in zip(parts, leaves, found, strict=True):
        parts[at].append(torch.zeros_like(leaf) if gradient is None else gradient)


def _compare(use: Use, alone: Tensor, together: Tensor, *, scale: float) -> None:
    """Refuse a function whose rows depend on each other, or that draws random numbers."""
    tolerance = _TOLERANCE.get(together.dtype, 5e-2)
    if alone.shape != together.shape or not torch.allclose(
        alone, together, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    ):
        raise use.refuse(
            "an example comes out differently alone than in its batch",
            "register a decomposition or per_example for it, and draw random numbers outside of it.",
        )


class _Formula(torch.autograd.Function):
    """The function; its backward asks a formula for the per-example gradients, and autograd for the rest."""

    @staticmethod
    def forward(ctx: Any, sink: Tensor, call: _Call, per_example: PerExample, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.per_example = call, per_example
        ctx.inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        with torch.enable_grad():
            ctx.output = call.run(ctx.inputs)
        _refuse_hidden(call.use, ctx.output, ctx.inputs)
        ctx.save_for_backward(*tensors)  # so that torch sees it when one is changed meanwhile
        return ctx.output.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        args, named = call.arguments([tensor.detach() for tensor in ctx.saved_tensors])
        with torch.autocast(*call.autocast):
            found = ctx.per_example(grad, *args, **named)
        found = found if isinstance(found, (tuple, list)) else ()
        shapes = [None if entry is None else tuple(entry.shape) for entry in found]
        due = [
            None if origin is None else (call.book.examples, *tensor.shape)
            for origin, tensor in zip(call.origins, ctx.inputs, strict=True)
        ]
        if len(shapes) != len(due) or any(want not in (None, got) for want, got in zip(due, shapes, strict=False)):
            raise call.use.refuse(f"per_example returned shapes {shapes}", f"return {due}.")
        call.record({at: found[at].detach() for at, origin in enumerate(call.origins) if origin is not None})
        asked = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        into = iter(torch.autograd.grad(ctx.output, asked, grad, allow_unused=True, retain_graph=True) if asked else ())
        return None, None, None, *(next(into) if tensor.requires_grad else None for tensor in ctx.inputs)


def _refuse_hidden(use: Use, output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a function that reached a trainable tensor which was not given to it."""
    known = {id(tensor) for tensor in inputs}
    for node in nodes(output):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise use.refuse("it uses a trainable tensor that is not among its arguments", "pass it as one.")
