"""The shapes that a per-example gradient takes, each with the same pure functions.

    Outer    G_b = sum_s grad_bs (x) input_bs        linear, matmul                              outer.py
    Windows  the same over the windows of an image   convolution                                 windows.py
    Lookup   G_b = sum_s onehot(id_bs) (x) grad_bs   embedding, integer indexing
    Dense    G_b as it stands                        biases, scales, tokens, and whatever is instantiated
    Tied     a Lookup plus an Outer of one table     tied embedding and head                     tied.py
    Routed   Outer of the rows that an expert gets   stacked weights of experts                  routed.py

    norm2          (B,)           |G_b|^2 in float64, never below the norm of what weighted_sum adds
    quick_norm2    (B,)           the same by a faster way, or NaN where that is in doubt
    doubted_norm2  (B,)           the same for where it is, without a jump to what the faster way finds elsewhere
    gram           (B, B)         <G_b, G_c>: the neural tangent kernel of this use
    inner(other)   (B,)           <G_b, H_b>, for two uses of one parameter
    per_example    (B, *shape)    G_b
    weighted_sum   (*shape)       sum_b c_b G_b

They are tied by identities, tested for every form: ``diag(gram) == norm2 == |per_example|^2``,
``inner(self) == norm2``, ``weighted_sum(e_i) == per_example[i]``.

Shape legend: B = examples, S = positions (tokens), V = rows, D = width.
"""

from __future__ import annotations

import abc
import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from discreet.core.route import Choice

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_NUMBERS = 1 << 24
_requires_grad = operator.attrgetter("requires_grad")
_VANISHING = 1e-30
_BLOCK = 256


class Form(abc.ABC):
    """Per-example gradients of one parameter value, in whatever shape is cheapest to hold."""

    @property
    @abc.abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the parameter value that these are gradients of."""

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """B."""

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> Form:
        """The same for examples ``start`` to ``stop``."""

    @abc.abstractmethod
    def without(self, bad_B: Tensor) -> Form:
        """The same with the marked examples' tensors set to exactly zero (0 * NaN would stay NaN)."""

    @abc.abstractmethod
    def norm2(self) -> Tensor:
        """Squared norms, shape (B,), float64."""

    def quick_norm2(self) -> Tensor:
        """Squared norms where a faster way is sure of them, NaN elsewhere."""
        return self.norm2()

    def doubted_norm2(self) -> Tensor:
        """Squared norms for where that way is not: what it adds for rounding goes over, without a jump."""
        return self.norm2()

    @abc.abstractmethod
    def per_example(self) -> Tensor:
        """Gradients, shape (B, *shape)."""

    @abc.abstractmethod
    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        """``sum_b factor_b G_b``, of `shape`."""

    def gram(self) -> Tensor:
        """Inner products between examples, shape (B, B)."""
        flat = wide(self.per_example()).reshape(self.examples, -1)
        return flat @ flat.T

    def inner(self, other: Form) -> Tensor:
        """Inner products with another use of the same value, example by example, shape (B,)."""
        chunk = examples_at_a_time(math.prod(self.shape))
        parts = []
        for start in range(0, self.examples, chunk):
            stop = min(start + chunk, self.examples)
            mine, theirs = self.rows(start, stop).per_example(), other.rows(start, stop).per_example()
            parts.append((wide(mine) * wide(theirs)).reshape(stop - start, -1).sum(1))
        return torch.cat(parts)

    @property
    def choice(self) -> Choice | None:
        """The route to the norm, where there is more than one."""
        return None

    @abc.abstractmethod
    def joined(self, other: Self) -> Form | None:
        """Two uses of one value as one, exact with its cross terms; None when that needs instantiating."""

    def add_per_example(self, to: Tensor) -> None:
        """Add the per-example gradients to a tensor of shape (B, *shape), in place."""
        to += self.per_example()

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""

    @property
    def rounds(self) -> bool:
        """Whether sums of it are float32."""
        return any(value.is_floating_point() and wide_dtype(value) is torch.float32 for value in self.tensors)

    def detached(self) -> Self:
        """The same without the graph behind it: a book that held that would hold the graph, which holds the book."""
        if not any(map(_requires_grad, self.tensors)):
            return self
        free = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **free)

    def reduced(self) -> Form:
        """What to hold until the factors are known: itself, or the instantiated gradients when those are smaller."""
        return self


@dataclass(frozen=True)
class Dense(Form):
    """Gradients as they stand.

    Attributes:
        grad: (B, *shape).
        scratch: made by the engine for this form alone, so that the weighted sum may overwrite it.
        known_norm2: their squared norms, (B,), float64, where what made them told those too.
    """

    grad: Tensor
    scratch: bool = False
    known_norm2: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.grad,)

    @property
    def shape(self) -> torch.Size:
        return self.grad.shape[1:]

    @property
    def examples(self) -> int:
        return self.grad.shape[0]

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.grad[start:stop], self.scratch)

    def without(self, bad_B: Tensor) -> Dense:
        return Dense(zero_rows(self.grad, bad_B), scratch=True)

    def joined(self, other: Dense) -> Dense:
        return Dense(wide(self.grad) + wide(other.grad), scratch=True)

    def norm2(self) -> Tensor:
        return square_sum(self.grad)

    def quick_norm2(self) -> Tensor:
        return self.norm2() if self.known_norm2 is None else self.known_norm2

    def per_example(self) -> Tensor:
        return self.grad

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        flat = wide(self.grad).reshape(self.examples, -1)
        if self.examples == 1 and self.scratch:
            return flat.mul_(factor_B.to(flat.dtype)).reshape(self.shape)
        return (factor_B.to(flat.dtype) @ flat).reshape(self.shape)


@dataclass(frozen=True)
class Lookup(Form):
    """Rows picked by integer ids.

    Attributes:
        ids: (B, S) int64.
        grad: (B, S, D).
        num_rows: V.
        merged: gradients of equal ids within an example are added up already; all but one of them are zero.
    """

    ids: Tensor
    grad: Tensor
    num_rows: int
    merged: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.ids, self.grad)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_rows, self.grad.shape[-1]))

    @property
    def examples(self) -> int:
        return self.ids.shape[0]

    def rows(self, start: int, stop: int) -> Lookup:
        return replace(self, ids=self.ids[start:stop], grad=self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Lookup:
        return replace(self, grad=zero_rows(self.grad, bad_B))

    def joined(self, other: Lookup) -> Lookup:
        """Two lookups in one table as one with more positions: exact, cross terms included."""
        return Lookup(torch.cat([self.ids, other.ids], 1), torch.cat([self.grad, other.grad], 1), self.num_rows)

    def norm2(self) -> Tensor:
        return square_sum(self.reduced().grad)

    def per_example(self) -> Tensor:
        table = wide(self.grad).new_zeros(self.examples, *self.shape)
        self.add_per_example(table)
        return table

    def add_per_example(self, to: Tensor) -> None:
        to.flatten(0, 1).index_add_(0, self._cell_BS().flatten(), wide(self.grad).flatten(0, 1))

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        return self.add_weighted_sum(factor_B, wide(self.grad).new_zeros(self.shape))

    def add_weighted_sum(self, factor_B: Tensor, to_VD: Tensor) -> Tensor:
        """Add the weighted sum to a table, in place: only the rows that were picked are touched."""
        grad_BSD = self.reduced().grad
        scaled_BSD = grad_BSD * factor_B.to(grad_BSD.dtype).reshape(-1, 1, 1)
        return to_VD.index_add_(0, self.ids.flatten(), scaled_BSD.flatten(0, 1))

    def reduced(self) -> Lookup:
        """Gradients of equal ids within an example added up, at cost O(B S D) and not O(B V D).

        Norm and sum then see the very same numbers: what cancels within an example cancels once, before any scaling.
        """
        if self.merged:
            return self
        cell_N = self._cell_BS().flatten()
        # Every place is sent to the first of its cell. `torch.unique` would do, and wait for the device to count them.
        order_N = cell_N.argsort(stable=True)
        fresh_N = torch.ones_like(cell_N, dtype=torch.bool)
        fresh_N[1:] = cell_N[order_N].diff() != 0
        place_N = torch.arange(len(cell_N), device=cell_N.device)
        start_N = torch.where(fresh_N, place_N, 0).cummax(0).values if len(cell_N) else place_N
        first_N = torch.empty_like(order_N).scatter_(0, order_N, order_N[start_N])
        grad_BSD = wide(self.grad)
        grad = torch.zeros_like(grad_BSD).flatten(0, 1).index_add_(0, first_N, grad_BSD.flatten(0, 1))
        return replace(self, grad=grad.reshape(grad_BSD.shape), merged=True)

    def _cell_BS(self) -> Tensor:
        """One number for each (example, id)."""
        return self.ids + torch.arange(self.examples, device=self.ids.device).unsqueeze(1) * self.num_rows


def wide(value: Tensor) -> Tensor:
    """At least float32: norms and sums never accumulate in half precision."""
    dtype = wide_dtype(value)
    return value if value.dtype is dtype else value.to(dtype)


def wide_dtype(value: Tensor) -> torch.dtype:
    """The dtype that `wide` makes of a value."""
    return torch.float64 if value.dtype is torch.float64 else torch.float32


def drop_vanishing(factor_B: Tensor, *, bound: float, largest: float = 1.0) -> Tensor:
    """Factors with those set to 0 that come near the subnormal numbers, which keep only a few bits.

    Args:
        bound: the clip bound. Beside one above 1 factors vanish sooner: a sum over the least of them is still finite.
        largest: no factor is above it; two of them are never 1e36 apart, so that their ratio is a float32 number.
    """
    least = _VANISHING * max(1.0, bound if math.isfinite(bound) else 1.0, largest * 1e-6)
    return torch.where(factor_B < least, torch.zeros_like(factor_B), factor_B)


def square_sum(value: Tensor) -> Tensor:
    """Squared norm of each example's gradient, (B,), float64."""
    return squares_along(wide(value).reshape(value.shape[0], -1), block=_BLOCK)


def squares_along(value: Tensor, *, block: int) -> Tensor:
    """Squared lengths along the last axis, float64: blocks in their own precision, whose squares meet in float64.

    A sum of a million equal squares in float32 is 0.1 % too small. Entries below 1e-22 vanish, lengths above 1e19 are
    infinite: both safe.
    """
    whole = value.shape[-1] // block * block
    rest = torch.linalg.vector_norm(value[..., whole:], dim=-1).to(torch.float64).square()
    if whole == 0:
        return rest
    blocks = torch.linalg.vector_norm(value[..., :whole].unflatten(-1, (-1, block)), dim=-1)
    return blocks.to(torch.float64).square().sum(-1) + rest


def zero_rows(value: Tensor, bad_B: Tensor) -> Tensor:
    """The marked examples set to exactly zero."""
    return value.masked_fill(bad_B.reshape(-1, *[1] * (value.dim() - 1)), 0)


def examples_at_a_time(numbers_per_example: int) -> int:
    """How many examples make a chunk of `CHUNK_NUMBERS`."""
    return max(1, CHUNK_NUMBERS // max(1, numbers_per_example))
