"""The three shapes that a per-example gradient takes, each with the same five pure functions.

    Outer    G_b = sum_s grad_bs (x) input_bs        linear, matmul, convolution
    Lookup   G_b = sum_s onehot(id_bs) (x) grad_bs   embedding, integer indexing
    Dense    G_b as it stands                        biases, scales, tokens, and whatever is instantiated

    norm2          (B,)           |G_b|^2, at least float32, never below the true value by more than rounding
    gram           (B, B)         <G_b, G_c>: the neural tangent kernel of this use
    inner(other)   (B,)           <G_b, H_b>, for two uses of one parameter
    per_example    (B, *shape)    G_b
    weighted_sum   (*shape)       sum_b c_b G_b

They are tied by identities, tested for every form: ``diag(gram) == norm2 == |per_example|^2``,
``inner(self) == norm2``, ``weighted_sum(e_i) == per_example[i]``.

Shape legend: B = examples, K = groups, S = positions (tokens, pixels), I = inputs, O = outputs, V = rows, D = width.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from discreet.core.route import Cost, Route, choose

_CHUNK_NUMBERS = 1 << 24


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
        """Squared norms, shape (B,)."""

    @abc.abstractmethod
    def per_example(self) -> Tensor:
        """Gradients, shape (B, *shape)."""

    @abc.abstractmethod
    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        """``sum_b factor_b G_b``, of `shape`."""

    def gram(self) -> Tensor:
        """Inner products between examples, shape (B, B)."""
        flat = _wide(self.per_example()).flatten(1)
        return flat @ flat.T

    def inner(self, other: Form) -> Tensor:
        """Inner products with another use of the same value, example by example, shape (B,)."""
        chunk = _examples_at_a_time(math.prod(self.shape))
        parts = []
        for start in range(0, self.examples, chunk):
            stop = min(start + chunk, self.examples)
            mine, theirs = self.rows(start, stop).per_example(), other.rows(start, stop).per_example()
            parts.append((_wide(mine) * _wide(theirs)).flatten(1).sum(1))
        return torch.cat(parts)

    def reduced(self) -> Form:
        """What to hold until the factors are known: itself, or the instantiated gradients when those are smaller."""
        return self


@dataclass(frozen=True)
class Dense(Form):
    """Gradients as they stand: ``grad`` has shape (B, *shape)."""

    grad: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.grad.shape[1:]

    @property
    def examples(self) -> int:
        return self.grad.shape[0]

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Dense:
        return Dense(_zero_rows(self.grad, bad_B))

    def norm2(self) -> Tensor:
        return _wide(self.grad).flatten(1).square().sum(1)

    def per_example(self) -> Tensor:
        return self.grad

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        flat = _wide(self.grad).flatten(1)
        return (factor_B.to(flat.dtype) @ flat).reshape(self.shape)


@dataclass(frozen=True)
class Outer(Form):
    """Sums of outer products, group by group.

    Attributes:
        input: (B, K, S, I).
        grad: (B, K, S, O).
        value_shape: the parameter's own shape, holding K * O * I numbers in (K, O, I) order.
        transposed: the parameter is stored as (I, O) instead, as in ``x @ w`` (K = 1 only).
    """

    input: Tensor
    grad: Tensor
    value_shape: torch.Size
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.value_shape

    @property
    def examples(self) -> int:
        return self.input.shape[0]

    @property
    def cost(self) -> Cost:
        """Shape of this use, for the choice of route."""
        _, groups, positions, inputs = self.input.shape
        return Cost(groups=groups, positions=positions, inputs=inputs, outputs=self.grad.shape[-1])

    def rows(self, start: int, stop: int) -> Outer:
        return replace(self, input=self.input[start:stop], grad=self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Outer:
        return replace(self, input=_zero_rows(self.input, bad_B), grad=_zero_rows(self.grad, bad_B))

    def joined(self, other: Outer) -> Outer:
        """Two uses of one value as one use with more positions: exact, cross terms included."""
        return replace(
            self, input=torch.cat([self.input, other.input], dim=2), grad=torch.cat([self.grad, other.grad], dim=2)
        )

    def norm2(self) -> Tensor:
        if self.input.shape[2] == 1:
            return (_wide(self.input).square().sum(-1) * _wide(self.grad).square().sum(-1)).flatten(1).sum(1)
        if choose(self.cost) is Route.GRAM:
            return self._norm2_by_gram()
        chunk = _examples_at_a_time(math.prod(self.shape))
        starts = range(0, self.examples, chunk)
        return torch.cat([Dense(self.rows(start, start + chunk).per_example()).norm2() for start in starts])

    def _norm2_by_gram(self) -> Tensor:
        """Eq. 3, arXiv:2110.05679: ``<input input^T, grad grad^T>``, rounded up.

        The signed sum cancels where positions oppose each other, and a norm that came out too small would break the
        sensitivity; so a bound on its rounding error, ``4 eps (sum_s |input_s| |grad_s|)^2``, is added.
        """
        chunk = _examples_at_a_time(2 * self.input.shape[1] * self.input.shape[2] ** 2)
        parts = []
        for start in range(0, self.examples, chunk):
            part = self.rows(start, start + chunk)
            input_BKSI, grad_BKSO = _wide(part.input), _wide(part.grad)
            gram_B = ((input_BKSI @ input_BKSI.mT) * (grad_BKSO @ grad_BKSO.mT)).flatten(1).sum(1)
            size_B = (input_BKSI.norm(dim=-1) * grad_BKSO.norm(dim=-1)).flatten(1).sum(1)
            parts.append(gram_B.clamp(min=0) + 4 * torch.finfo(gram_B.dtype).eps * size_B.square())
        return torch.cat(parts)

    def per_example(self) -> Tensor:
        grad_BKOI = _wide(self.grad).mT @ _wide(self.input)
        if self.transposed:
            grad_BKOI = grad_BKOI.mT
        return grad_BKOI.reshape(self.examples, *self.value_shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        grad_BKSO, input_BKSI = _wide(self.grad), _wide(self.input)
        scaled_BKSO = grad_BKSO * factor_B.to(grad_BKSO.dtype).reshape(-1, 1, 1, 1)
        left = scaled_BKSO.transpose(0, 1).flatten(1, 2)
        right = input_BKSI.transpose(0, 1).flatten(1, 2)
        if self.transposed:
            left, right = right, left
        return (left.mT @ right).reshape(self.value_shape)

    def reduced(self) -> Form:
        if choose(self.cost) is Route.KEEP:
            return Dense(self.per_example())
        return self


@dataclass(frozen=True)
class Lookup(Form):
    """Rows picked by integer ids.

    Attributes:
        ids: (B, S) int64.
        grad: (B, S, D).
        num_rows: V.
    """

    ids: Tensor
    grad: Tensor
    num_rows: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_rows, self.grad.shape[-1]))

    @property
    def examples(self) -> int:
        return self.ids.shape[0]

    def rows(self, start: int, stop: int) -> Lookup:
        return replace(self, ids=self.ids[start:stop], grad=self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Lookup:
        return replace(self, grad=_zero_rows(self.grad, bad_B))

    def joined(self, other: Lookup) -> Lookup:
        """Two lookups in one table as one with more positions: exact, cross terms included."""
        return replace(self, ids=torch.cat([self.ids, other.ids], 1), grad=torch.cat([self.grad, other.grad], 1))

    def norm2(self) -> Tensor:
        """Gradients of equal ids within an example are added before squaring; cost O(B S D), not O(B V D)."""
        grad_BSD = _wide(self.grad)
        example_B1 = torch.arange(self.examples, device=self.ids.device).unsqueeze(1)
        cells, cell_of = torch.unique(self.ids + example_B1 * self.num_rows, return_inverse=True)
        sums = grad_BSD.new_zeros(cells.numel(), grad_BSD.shape[-1])
        sums.index_add_(0, cell_of.flatten(), grad_BSD.flatten(0, 1))
        owner = torch.div(cells, self.num_rows, rounding_mode="floor")
        return grad_BSD.new_zeros(self.examples).index_add_(0, owner, sums.square().sum(1))

    def per_example(self) -> Tensor:
        grad_BSD = _wide(self.grad)
        example_B1 = torch.arange(self.examples, device=self.ids.device).unsqueeze(1)
        table = grad_BSD.new_zeros(self.examples * self.num_rows, grad_BSD.shape[-1])
        table.index_add_(0, (self.ids + example_B1 * self.num_rows).flatten(), grad_BSD.flatten(0, 1))
        return table.reshape(self.examples, *self.shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        grad_BSD = _wide(self.grad)
        scaled_BSD = grad_BSD * factor_B.to(grad_BSD.dtype).reshape(-1, 1, 1)
        return grad_BSD.new_zeros(self.shape).index_add_(0, self.ids.flatten(), scaled_BSD.flatten(0, 1))


def _wide(value: Tensor) -> Tensor:
    """At least float32: norms and sums never accumulate in half precision."""
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)


def _zero_rows(value: Tensor, bad_B: Tensor) -> Tensor:
    return value.masked_fill(bad_B.reshape(-1, *[1] * (value.dim() - 1)), 0)


def _examples_at_a_time(numbers_per_example: int) -> int:
    return max(1, _CHUNK_NUMBERS // max(1, numbers_per_example))
