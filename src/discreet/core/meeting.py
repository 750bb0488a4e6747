"""How a use of a parameter is met by a rule, or refused.

Every function that touches a guarded value comes to `_meet`, which has one of four answers:

1. no gradient can flow (``no_grad``, or a mere observation such as ``p.shape``): the plain function;
2. a function of parameters alone (``1 + w``, ``w.t()``, ``w[index]``): a `DerivedParameter`, which remembers how;
3. a function that also takes activations, and for which there is a rule: the rule;
4. anything else: `UnsupportedUse`. Fail closed: a norm is right or there is none.

A gradient that would reach a guarded value behind the rules' back (a custom ``autograd.Function``, a scripted module)
hits a hook that refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

from discreet.core.axes import Axis
from discreet.core.book import Book
from discreet.core.derived import derive
from discreet.core.parameter import (
    DECOMPOSITIONS,
    DERIVABLE,
    OBSERVATIONS,
    ROUTED,
    RULES,
    SIZED,
    TURNABLE,
    DerivedParameter,
    Function,
    Guarded,
    PrivateParameter,
    Use,
    answered_by,
    derivation_of,
    function_name,
    hand_over,
    refuser,
)
from discreet.errors import ConfigError, UnsupportedUse

_active: Book | None = None
_compiler: Callable[[Book], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
_hidden = False


@contextlib.contextmanager
def guard(book: Book) -> Iterator[None]:
    """Guard the book's parameters: every use inside is met by a rule and booked there, or refused.

    Raises:
        ConfigError: a model is guarded already (one backward is booked at a time).
        UnsupportedUse: somebody waits for the gradient of a parameter, which is never made.
    """
    global _active
    if _active is not None:
        raise ConfigError("a model is guarded already: finish that microbatch before the next one begins.")
    _active = book  # before all else: another thread may want to guard a model now
    classes: dict[str, type] = {}
    hooks: list[RemovableHandle] = []
    try:
        waiting = [n for n, p in book.parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks]
        if waiting:
            raise UnsupportedUse(
                f"{', '.join(waiting)}: a hook waits for a gradient that is never made (sums are clipped before they "
                "are added up), and would be passed over in silence; remove it, and change p.grad once it is written."
            )
        for name, parameter in book.parameters.items():
            book.derivation_of(parameter)  # known before it is met: here everything is still at hand
            classes[name] = type(parameter)
            hooks.append(parameter.register_hook(refuser(name)))
            parameter.__class__ = PrivateParameter
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


def hide_from_compiler(skip: Function, disable: Function, at_work: Callable[[], object]) -> None:
    """Keep the compiler from eager meetings: it may see the call that meets a parameter, and nothing behind it.

    Args:
        skip: marks code whose own frame is not compiled.
        disable: wraps a function in which nothing is compiled.
        at_work: says what frames are compiled by now; None where they are run as they are.
    """
    global _hidden
    if not _hidden:
        unseen = disable(_meet)

        def meet(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (_meet if at_work() is None else unseen)(func, args, kwargs)

        skip(hand_over.__code__)
        skip(meet.__code__)
        answered_by(meet)
        _hidden = True


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


def _meet(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer one function call that involves a guarded value. See the module docstring."""
    if func in DECOMPOSITIONS and _active is not None and torch.is_grad_enabled():
        return DECOMPOSITIONS[func](*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        book = _active
        if func in OBSERVATIONS:
            return func(*args, **kwargs)
        transformed = torch._C._functorch.peek_interpreter_stack() is not None or fwAD._current_level >= 0
        if transformed and book is not None:
            raise UnsupportedUse(
                f"{function_name(func)} on a trained parameter inside torch.func (vmap, grad, jvp) or forward_ad: what "
                "it sees there is not the batch; write the examples' axis out, or transform frozen layers alone."
            )
        if book is None or not torch.is_grad_enabled():
            plain_args, plain_kwargs = tree_map_only(DerivedParameter, lambda leaf: leaf.plain(), (args, kwargs))
            return func(*plain_args, **plain_kwargs)
        guarded, operands = _tensors((*args, *kwargs.values()), [], [])
        origins = {id(leaf): derivation_of(book, leaf) for leaf in guarded}
        names = tuple({name: None for origin in origins.values() for name in origin.names})
        if func not in RULES and func not in DERIVABLE and func not in ROUTED:
            raise _no_rule(func, names, guarded[0])
        pickings = {id(one): picking for one in operands if (picking := book.trail.trace(one)) is not None}
        axes = book.classify(
            names,
            function_name(func),
            operands,
            may_be_second=func in TURNABLE,
            pickings=pickings,
            may_be_routed=func in ROUTED,
        )
        is_routed = Axis.ROUTED in axes
        is_turned = Axis.SECOND in axes and not is_routed
        if is_turned:
            operands, axes, args, kwargs = _turned(operands, axes, args, kwargs)
        found = {id(operand): axis for operand, axis in zip(operands, axes, strict=True)}
        use = Use(book, func, names, origins, found, pickings)
        if is_routed:
            return ROUTED[func](use, *args, **kwargs)
        if is_turned:
            return RULES[func](use, *args, **kwargs).transpose(0, 1).contiguous()
        batched = axes.count(Axis.SHARED) < len(axes)
        meeting = RULES.get(func)
        if meeting is not None and (batched or func in SIZED):
            return meeting(use, *args, **kwargs)
        if not batched and func in DERIVABLE:
            return derive(use, args, kwargs, isometric=DERIVABLE[func])
        raise _no_rule(func, names, guarded[0])


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.Size})


def _tensors(values: Iterable[Any], guarded: list[Tensor], operands: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Guarded values, and other tensors, inside tuples, lists and dicts: all that arguments of functions are made of.

    In order; added to the two lists.
    """
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is Tensor:
            operands.append(value)
        elif kind is PrivateParameter:
            guarded.append(value)
        elif isinstance(value, Tensor):
            (guarded if isinstance(value, Guarded) else operands).append(value)
        elif isinstance(value, (tuple, list)):
            _tensors(value, guarded, operands)
        elif isinstance(value, dict):
            _tensors(value.values(), guarded, operands)
    return guarded, operands


FOR_ALL = (
    "made of parameters and of tensors without the batch in dimension 0, which count as the same for all examples; "
    "where they hold examples, call the model once for each of a pair, or keep an example's rows together and let "
    "gradients through (torch.stack(pair, 1).flatten(0, 1).requires_grad_() for torch.cat(pair))"
)
"""What is said of a value that looks like an activation, and is not one."""


def _no_rule(func: Function, names: tuple[str, ...], guarded: Tensor) -> UnsupportedUse:
    usual = (
        "its rule is for activations, and no argument carries the batch in dimension 0; write what is made of "
        "parameters alone in torch functions, or register a function of your own with such a decomposition."
        if func in RULES
        else "freeze the parameter (requires_grad=False), write this part with linear, convolution, embedding, "
        "normalisation or elementwise functions, or give it a rule (discreet.register_rule)."
    )
    if isinstance(guarded, DerivedParameter) and not guarded.derivation.isometric:
        usual = f"it is {FOR_ALL}; or {usual}"
    return UnsupportedUse(
        f"{function_name(func)} on {', '.join(names)} (shape {tuple(guarded.shape)}): no exact rule for it; "
        f"{_REMEDIES.get(func, usual)}"
    )


_GUARDED = "a batch is in the model: change parameters after its update, or before training begins."
_FAST_PATH = "it has no gradient in torch either; call the module, or F.multi_head_attention_forward."
_REMEDIES: dict[Function, str] = {
    torch.nn.functional.batch_norm: "use GroupNorm, LayerNorm or RMSNorm: BatchNorm mixes examples.",
    **dict.fromkeys((torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd), _FAST_PATH),
    **dict.fromkeys((Tensor.requires_grad_, Tensor.requires_grad.__set__, Tensor.data.__set__), _GUARDED),
    torch._has_compatible_shallow_copy_type: _GUARDED,
}
"""What to write instead, where the usual advice would not help."""


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


answered_by(_meet)
