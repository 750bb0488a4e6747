"""A backward that gives a gradient to nothing but the book: raw ones are refused, also in graphs made on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from discreet.core.book import Book
from discreet.core.parameter import Guarded
from discreet.errors import UnsupportedUse


def nodes(value: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graph behind a value, once."""
    todo = [] if value.grad_fn is None else [value.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
        yield node


def run_backward(book: Book, losses_B: Tensor) -> None:
    """The backward of the losses' sum; activations that are leaves get zeros.

    Raises:
        UnsupportedUse: something else would get a gradient, raw, without clipping or noise.
    """
    with contextlib.ExitStack() as stack:
        for leaf in _strays(book, losses_B):
            stack.callback(leaf.register_hook(torch.zeros_like).remove)
        outermost = stack.enter_context(_seeing_inner_backwards(book))
        outermost(losses_B.sum())


@contextlib.contextmanager
def _seeing_inner_backwards(book: Book) -> Iterator[Callable[[Tensor], None]]:
    """Look for strays in graphs that are made and run within the backward, as reentrant checkpoints do, as well.

    Yields the backward that does not look.
    """
    plain = torch.autograd.backward

    @functools.wraps(plain)
    def seen(
        tensors: Tensor | Sequence[Tensor], grad_tensors: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool | None = None, create_graph: bool = False,
        grad_variables: Tensor | Sequence[Tensor] | None = None, inputs: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
            _strays(book, tensor, inner=True)
        plain(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)

    torch.autograd.backward = seen
    try:
        yield plain
    finally:
        torch.autograd.backward = plain


def _strays(book: Book, value: Tensor, *, inner: bool = False) -> list[Tensor]:
    """Leaves behind a value that belong to no book.

    Raises:
        UnsupportedUse: a parameter, or a tensor that is no activation by its shape; but what goes into an inner graph
            is a leaf of it, of any shape.
    """
    found = []
    known = {id(book.sink), *(id(parameter) for parameter in book.parameters.values())}
    for node in nodes(value):
        leaf = getattr(node, "variable", None)
        if leaf is None or id(leaf) in known or isinstance(leaf, Guarded):
            continue
        strange = leaf.dim() == 0 or leaf.shape[0] % book.examples
        if isinstance(leaf, nn.Parameter) or (strange and not inner):
            raise UnsupportedUse(
                f"a trainable tensor of shape {tuple(leaf.shape)} is no parameter of this model: it would get a raw "
                "gradient; register it in the model, or detach it."
            )
        found.append(leaf)
    return found
