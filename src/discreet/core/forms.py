"""The three shapes that a per-example gradient takes, each with the same five pure functions.

    Outer    G_b = sum_s grad_bs (x) input_bs        linear, matmul, convolution
    Lookup   G_b = sum_s onehot(id_bs) (x) grad_bs   embedding, integer indexing
    Dense    G_b as it stands                        biases, scales, tokens, and whatever is instantiated

    norm2          (B,)           |G_b|^2 in float64, never below the norm of what weighted_sum adds
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

CHUNK_NUMBERS = 1 << 24
_VANISHING = 1e-30


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
        chunk = _examples_at_a_time(math.prod(self.shape))
        parts = []
        for start in range(0, self.examples, chunk):
            stop = min(start + chunk, self.examples)
            mine, theirs = self.rows(start, stop).per_example(), other.rows(start, stop).per_example()
            parts.append((wide(mine) * wide(theirs)).reshape(stop - start, -1).sum(1))
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
        return _square_sum(self.grad)

    def per_example(self) -> Tensor:
        return self.grad

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        flat = wide(self.grad).reshape(self.examples, -1)
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
        return Cost(positions=self.input.shape[2], inputs=self.input.shape[3], outputs=self.grad.shape[-1])

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
            return self._norm2_of_products()
        _, groups, positions, inputs = self.input.shape
        chunk = _examples_at_a_time(groups * positions * (positions + inputs))
        starts = range(0, self.examples, chunk)
        return torch.cat([self.rows(start, start + chunk)._norm2_by_gram() for start in starts])

    def _norm2_of_products(self) -> Tensor:
        """One position: ``sum_k |input_k|^2 |grad_k|^2``, scaled as in `_norm2_by_gram`."""
        input_BKSI, input_peak_B = _scaled(wide(self.input))
        grad_BKSO, grad_peak_B = _scaled(wide(self.grad))
        products_B = (input_BKSI.square().sum(-1) * grad_BKSO.square().sum(-1)).flatten(1).sum(1, dtype=torch.float64)
        return products_B * (input_peak_B * grad_peak_B).square()

    def _norm2_by_gram(self) -> Tensor:
        """Eq. 3, arXiv:2110.05679: ``<input input^T, grad grad^T>``, rounded up.

        Two things differ from the paper. Operands are scaled to a largest entry of 1: squares of tiny gradients vanish
        against huge inputs. And where positions oppose each other the signed sum cancels, in the norm and again in the
        weighted sum; a bound on its rounding error, ``4 eps (sum_s |input_s| |grad_s|)^2``, covers both.
        """
        input_BKSI, input_peak_B = _scaled(wide(self.input))
        grad_BKSO, grad_peak_B = _scaled(wide(self.grad))
        products = (input_BKSI @ input_BKSI.mT).mul_(grad_BKSO @ grad_BKSO.mT)
        gram_B = products.flatten(1).sum(1, dtype=torch.float64)
        size_B = (input_BKSI.norm(dim=-1) * grad_BKSO.norm(dim=-1)).flatten(1).sum(1, dtype=torch.float64)
        rounding = 4 * torch.finfo(input_BKSI.dtype).eps
        return (gram_B.clamp(min=0) + rounding * size_B.square()) * (input_peak_B * grad_peak_B).square()

    def per_example(self) -> Tensor:
        grad_BKOI = wide(self.grad).mT @ wide(self.input)
        if self.transposed:
            grad_BKOI = grad_BKOI.mT
        return grad_BKOI.reshape(self.examples, *self.value_shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        grad_BKSO, input_BKSI = wide(self.grad), wide(self.input)
        kept_B = drop_vanishing(factor_B, scale_B=grad_BKSO.flatten(1).abs().amax(1))
        scaled_BKSO = grad_BKSO * kept_B.to(grad_BKSO.dtype).reshape(-1, 1, 1, 1)
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
        merged: gradients of equal ids within an example are added up already; all but one of them are zero.
    """

    ids: Tensor
    grad: Tensor
    num_rows: int
    merged: bool = False

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
        return Lookup(torch.cat([self.ids, other.ids], 1), torch.cat([self.grad, other.grad], 1), self.num_rows)

    def norm2(self) -> Tensor:
        return _square_sum(self.reduced().grad)

    def per_example(self) -> Tensor:
        grad_BSD = wide(self.grad)
        table = grad_BSD.new_zeros(self.examples * self.num_rows, grad_BSD.shape[-1])
        table.index_add_(0, self._cell_BS().flatten(), grad_BSD.flatten(0, 1))
        return table.reshape(self.examples, *self.shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        grad_BSD = self.reduced().grad
        scaled_BSD = grad_BSD * factor_B.to(grad_BSD.dtype).reshape(-1, 1, 1)
        return grad_BSD.new_zeros(self.shape).index_add_(0, self.ids.flatten(), scaled_BSD.flatten(0, 1))

    def reduced(self) -> Lookup:
        """Gradients of equal ids within an example added up, at cost O(B S D) and not O(B V D).

        Norm and sum then see the very same numbers: what cancels within an example cancels once, before any scaling.
        """
        if self.merged:
            return self
        cells, cell_of = torch.unique(self._cell_BS().flatten(), return_inverse=True)
        grad_BSD = wide(self.grad)
        sums = grad_BSD.new_zeros(cells.numel(), grad_BSD.shape[-1]).index_add_(0, cell_of, grad_BSD.flatten(0, 1))
        position = torch.arange(cell_of.numel(), device=cell_of.device)
        first = torch.full_like(cells, cell_of.numel()).scatter_reduce_(0, cell_of, position, "amin")
        grad = torch.zeros_like(grad_BSD).flatten(0, 1).index_copy_(0, first, sums)
        return replace(self, grad=grad.reshape(grad_BSD.shape), merged=True)

    def _cell_BS(self) -> Tensor:
        """One number for each (example, id)."""
        return self.ids + torch.arange(self.examples, device=self.ids.device).unsqueeze(1) * self.num_rows


def wide(value: Tensor) -> Tensor:
    """At least float32: norms and sums never accumulate in half precision."""
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)


def drop_vanishing(factor_B: Tensor, *, scale_B: Tensor | float = 1.0) -> Tensor:
    """Factors with those set to 0 that come near the subnormal numbers, alone or times a scale.

    Subnormals keep only a few bits: against an input of 1e38 their rounding would pass the bound. Nothing is within it.
    """
    return torch.where(factor_B * scale_B < _VANISHING, torch.zeros_like(factor_B), factor_B)


def _square_sum(value: Tensor) -> Tensor:
    """Squared norm of each example's gradient. Entries below 1e-22 vanish, norms above 1e19 are infinite: both safe."""
    return wide(value).reshape(len(value), -1).square().sum(1).to(torch.float64)


def _scaled(value: Tensor) -> tuple[Tensor, Tensor]:
    """Each example divided by its largest magnitude, and that magnitude in float64; infinity becomes NaN."""
    peak_B = value.flatten(1).abs().amax(1)
    divisor_B = torch.where(peak_B == 0, torch.ones_like(peak_B), peak_B)
    return value / divisor_B.reshape(-1, *[1] * (value.dim() - 1)), peak_B.to(torch.float64)


def _zero_rows(value: Tensor, bad_B: Tensor) -> Tensor:
    return value.masked_fill(bad_B.reshape(-1, *[1] * (value.dim() - 1)), 0)


def _examples_at_a_time(numbers_per_example: int) -> int:
    return max(1, CHUNK_NUMBERS // max(1, numbers_per_example))
