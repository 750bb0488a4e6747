"""torch.compile: a region that the compiler recorded is traced through the rules, or run call by call.

While a model is guarded, whatever `torch.compile` compiles in it (the model, a block, the loss) is handed to a backend
of ours. What it receives is a graph of plain calls, with the guarded parameters among its inputs. There are two ways
to run it, and both are exact:

- **traced**: forward and backward are compiled with the rules inside (`discreet.core.traced`). The compiled backward
  returns the input gradients, and behind them all that the rules book; norms and sums are taken from it as ever.
- **call by call**: every call of the graph meets the rules as in eager code. So the layout is found out, and so a
  region runs whose trace met something that only data tell (rows picked by them), or a call that does not fit a trace.

Nothing else can happen: a use of a parameter outside of such a graph is eager code, which is guarded itself, and a
gradient that came to a parameter by any other way meets the hook that refuses it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.lowering import (
    AS_RECORDED,
    INDUCTOR,
    WITHOUT_KERNELS,
    Compiler,
    Graph,
    Wish,
    by_inductor,
    settings,
    without_kernels,
)
from discreet.core.meeting import active, compiled_through, hide_from_compiler, instead
from discreet.core.parameter import DerivedParameter, Guarded, PrivateParameter, plain
from discreet.core.traced import KIND, TracedBook, TracedParameter
from discreet.core.uses import Derivation
from discreet.errors import UnsupportedUse

_tickets = itertools.count(1)
_calls: weakref.WeakValueDictionary[int, _Call] = weakref.WeakValueDictionary()
_backends: dict[frozenset[Any], Backend] = {}
_MOST_LAYOUTS = _MOST_GRAPHS = 64


@dataclass(frozen=True, eq=False)
class _Call:
    """One forward of a traced region: where its backward books.

    Attributes:
        names: name at tracing -> name of the parameter in this call.
        values: name in this call -> the parameter's value.
    """

    book: Book
    names: Mapping[str, str]
    values: Mapping[str, Tensor]


class Backend:
    """What the compiler hands its graphs to, under one layout; None while that is still to be found out."""

    def __init__(self, layout: Layout | None) -> None:
        self._layout = layout

    def __call__(self, graph: Graph, inputs: Sequence[Any]) -> Callable[..., Any]:
        region, book, wish = Region(graph), active(), Wish.of_caller()
        guarded = any(isinstance(value, Guarded) for value in inputs)
        if not torch.is_grad_enabled() and not guarded and not _switches_gradients(graph):
            return _compiled_plainly(graph, inputs, wish)  # another model's evaluation
        if (refusal := wish.refusal(inputs)) is not None:
            return functools.partial(_refuse, refusal)
        if self._layout is not None and book is not None and torch.is_grad_enabled() and wish.name != AS_RECORDED:
            region.compile(book, inputs, wish)
        return region


def _compiled_plainly(graph: Graph, inputs: Sequence[Any], wish: Wish) -> Callable[..., Any]:
    if wish.name != INDUCTOR and wish.backend is not None:
        return wish.backend(graph, list(inputs))
    with settings():
        return compiler(graph, inputs, None, wish.options)


def _refuse(refusal: UnsupportedUse, *_: Any) -> Any:
    raise refusal


class Region:
    """A recorded graph, and its traced form where there is one."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._run: Callable[..., Any] | None = None
        self._books: list[TracedBook] = []
        self._slots: dict[int, str] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._batch: int | None = None
        self._examples = 0
        self._trusted = False

    def compile(self, book: Book, inputs: Sequence[Any], wish: Wish) -> None:
        """Trace and compile; on any obstacle the graph stays, and says so once."""
        try:
            self._prepare(book, inputs)
            self._run = compile_traced(self, book, inputs, wish)
        # Compilers raise errors of every kind; the recorded graph is exact, whatever stopped them.
        except Exception as error:  # noqa: BLE001
            self._run = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"a compiled region of {len(self._slots)} parameters runs call by call, exact and slower: {reason}",
                stacklevel=2,
            )

    def _prepare(self, book: Book, inputs: Sequence[Any]) -> None:
        if any(isinstance(value, DerivedParameter) for value in inputs):
            raise NotImplementedError("a value made of parameters comes in from outside of it")
        if any(parameter.requires_grad for parameter in self._graph.parameters()):
            raise NotImplementedError("the compiler took a parameter for a constant")
        if any(node.target in ("as_strided", torch.as_strided) for node in self._graph.graph.nodes):
            # It reads by the strides of the trace, and Inductor lays out what a convolution returns in another order.
            raise NotImplementedError("it reads memory by strides (as_strided), which the compiler may change")
        self._slots = {
            at: book.name_of(value) for at, value in enumerate(inputs) if isinstance(value, PrivateParameter)
        }
        self._shapes = {at: inputs[at].shape for at in self._slots}
        self._trusted, self._examples = book.trusts, book.examples
        shapes = [node.meta["example_value"] for node in self._graph.graph.find_nodes(op="placeholder")]
        sized = (at for at, value in enumerate(shapes) if self._is_batch(at, value, book.examples))
        self._batch = next(sized, None)

    def _is_batch(self, at: int, value: Any, examples: int) -> bool:
        if at in self._slots or not isinstance(value, Tensor) or value.dim() == 0:
            return False
        size = value.shape[0]
        return size.node.hint == examples if isinstance(size, torch.SymInt) else size == examples

    def traced(self, book: Book, sink: Tensor, ticket: Tensor, *inputs: Any) -> Any:
        """The graph with the rules in it, on whatever tensors a compiler traces with."""
        names = self._slots
        examples = self._examples if self._batch is None else inputs[self._batch].shape[0]
        traced = TracedBook(
            book, {name: inputs[at] for at, name in names.items()}, examples=examples, ticket=ticket,
            serial=len(self._books),
        )  # fmt: skip
        traced.open(sink)
        given = [
            TracedParameter.of(value, Derivation.of(names[at], value)) if at in names else value
            for at, value in enumerate(inputs)
        ]
        with instead(traced), torch._C._EnableTorchFunction():
            outputs = self._graph(*given)
        for output in tree_leaves(outputs):
            if isinstance(output, Guarded):
                raise NotImplementedError("it returns a value made of parameters alone")
            if isinstance(output, Tensor) and output.requires_grad and traced.trail.trace(output) is not None:
                raise NotImplementedError("rows picked from the batch leave it")
        self._books.append(traced)
        return outputs

    def __call__(self, *args: Any) -> Any:
        book = active()
        if book is None or not torch.is_grad_enabled():
            return self._graph(*(plain(arg) for arg in args))
        book.compiled = True
        names = {
            name: book.name_of(args[at]) for at, name in self._slots.items() if isinstance(args[at], PrivateParameter)
        }
        if self._run is None or not self._fits(book, args, names):
            # The compiler's own code switches off what guards the parameters.
            with book.of_kind(KIND), torch._C._EnableTorchFunction():
                return self._graph(*args)
        values = {names[name]: args[at].detach() for at, name in self._slots.items()}
        call, ticket = _Call(book, names, values), next(_tickets)
        _calls[ticket] = call
        book.holds.append(call)
        for expected in self._books[-1].expected:
            book.expect(_named(expected, call))
        given = [values[names[self._slots[at]]] if at in self._slots else arg for at, arg in enumerate(args)]
        return self._run(book.sink[0], torch.tensor(ticket, device="cpu"), *given)

    def _fits(self, book: Book, args: Sequence[Any], names: Mapping[str, str]) -> bool:
        """Whether this call is one that the trace was made for: same batch, same layout, no rows picked outside."""
        examples = self._examples if self._batch is None else args[self._batch].shape[0]
        if len(names) < len(self._slots) or any(args[at].shape != shape for at, shape in self._shapes.items()):
            return False
        if examples != book.examples or (examples == 1) != (self._examples == 1):
            return False
        if self._trusted != book.trusts and any(use.known is None for use in self._books[-1].uses):
            return False
        if any(
            isinstance(arg, Guarded) != (at in self._slots)
            or (isinstance(arg, Tensor) and at not in self._slots and book.trail.trace(arg) is not None)
            for at, arg in enumerate(args)
        ):
            return False
        uses = [
            (tuple(names[name] for name in use.names), KIND + use.function, use.known, use.found)
            for use in self._books[-1].uses
        ]
        return book.meets_again(uses)

    def deliver(self, results: Sequence[Any], places: Mapping[int, int], serial: int) -> None:
        """Book what a compiled backward returned.

        Args:
            results: what it returned beyond the input gradients.
            places: where each tensor and size of the trace is among the results.
            serial: the trace that it was compiled from.
        """
        call = _calls.get(int(results[places[0]]))
        if call is None:
            return  # its book is gone: a backward that trains nothing
        for template in self._books[serial].templates:
            derivation, form = template(lambda at: results[places[at.index]])
            call.book.record(_sourced(derivation, call), form)


def _switches_gradients(graph: Graph) -> bool:
    return any(node.target is torch._C._set_grad_enabled for node in graph.graph.nodes)


def _named(names: tuple[str, ...], call: _Call) -> Derivation:
    known = tuple(call.names[name] for name in names)
    return Derivation(known, (), _nothing, isometric=False)


def _nothing(*_: Tensor) -> Tensor:
    raise AssertionError("announced, and never rebuilt")


def _sourced(derivation: Derivation, call: _Call) -> Derivation:
    names = tuple(call.names[name] for name in derivation.names)
    return replace(derivation, names=names, sources=tuple(call.values[name] for name in names))


def compile_traced(region: Region, book: Book, inputs: Sequence[Any], wish: Wish) -> Callable[..., Any]:
    """Forward and backward of a region, with the rules in them, by the compiler that was wished for."""
    outputs = len(next(iter(region._graph.graph.find_nodes(op="output"))).args[0])

    def region_with_rules(*given: Any) -> Any:
        return region.traced(book, *given)

    graph = fx.Graph()
    given = [graph.placeholder(f"input_{at}") for at in range(len(inputs) + 2)]
    together = graph.call_function(region_with_rules, tuple(given))
    graph.output(tuple(graph.call_function(operator.getitem, (together, at)) for at in range(outputs)))
    mode = torch._guards.TracingContext.get().fake_mode
    sink = mode.from_tensor(torch.zeros((), device=book.sink.device, requires_grad=True), static_shapes=True)
    ticket = mode.from_tensor(torch.tensor(0, device="cpu"), static_shapes=True)
    kept = [plain(value) for value in inputs]  # until the trace is made: a tensor is known by its identity
    values = [
        mode.from_tensor(value, static_shapes=True) if at in region._slots else value for at, value in enumerate(kept)
    ]
    how = without_kernels if wish.name == WITHOUT_KERNELS else compiler
    deliver = region.deliver if region._slots else None  # without a parameter nothing is booked
    with settings():
        return how(fx.GraphModule({}, graph), [sink, ticket, *values], deliver, wish.options)


compiler: Compiler = by_inductor


@contextlib.contextmanager
def _through_rules(book: Book) -> Iterator[None]:
    """While a model is guarded, whatever is compiled in it comes to us, however the user compiled it."""
    if "torch._dynamo" not in sys.modules:
        yield
    elif book.as_written:
        with uncompiled():
            yield
    else:
        import torch._dynamo.config as recording
        from torch._dynamo.eval_frame import skip_code

        at_work = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", bool)  # bool(): never None, as if so
        hide_from_compiler(skip_code, torch.compiler.disable, at_work)

        # A graph for a batch of one, any batch, a batch as long as another axis; without a layout, and with it.
        limit = max(_MOST_GRAPHS, recording.recompile_limit)
        with (
            recording.patch(recompile_limit=limit),
            torch.compiler.set_stance("default", force_backend=_backend(book.verified)),
        ):
            yield


def _backend(layout: Layout | None) -> Backend:
    """The backend for a layout; equal layouts share one, because the compiler keeps what it compiled by its backend."""
    key = frozenset() if layout is None else frozenset(layout.axes.items())
    if key not in _backends:
        if len(_backends) >= _MOST_LAYOUTS:
            _backends.clear()
        _backends[key] = Backend(layout)
    return _backends[key]


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled functions as they were written: the reference that a compiled one is compared with."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


compiled_through(_through_rules)
