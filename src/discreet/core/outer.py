"""Per-example gradients that are sums of outer products, and their ghost norms.

Shape legend: B = examples, K = groups, S = positions (tokens, pixels), I = inputs, O = outputs, V = rows, D = width.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from discreet.core.forms import (
    Dense,
    Form,
    Lookup,
    examples_at_a_time,
    squares_along,
    wide,
    wide_dtype,
    zero_rows,
)
from discreet.core.kernels import dispatch
from discreet.core.kernels.results import HARMLESS, NEARER, GramProducts
from discreet.core.route import Choice, Cost, Route

_LENGTH = 4096
"""Squares of one row that are added up in their own precision: those of equal numbers lose 2e-6 of the length."""
_WIDTH = 64
"""Products that are summed in their own precision: each addition may round to the same side."""
_DOUBTED, _SURE = 1e-6, 1e-5
"""Between these shares of a squared norm that may have vanished, the fast way's goes over into the sure one: beyond,
what it finds moves by whole subnormal numbers."""


@dataclass(frozen=True)
class Outer(Form):
    """Sums of outer products, group by group.

    A weight that is stored as (I, O), as in ``x @ w``, has its operands in each other's place.

    Attributes:
        input: (B, K, S, I).
        grad: (B, K, S, O).
        value_shape: the parameter's own shape, holding K * O * I numbers in (K, O, I) order.
    """

    input: Tensor
    grad: Tensor
    value_shape: torch.Size

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.input, self.grad)

    @property
    def shape(self) -> torch.Size:
        return self.value_shape

    @property
    def examples(self) -> int:
        return self.input.shape[0]

    @functools.cached_property
    def choice(self) -> Choice:
        """The route to the norm of this use."""
        examples, _, positions, inputs = self.input.shape
        prices = dispatch.prices(self.input, self.grad, suited=self._suits_kernels)
        return Cost(positions, inputs, self.grad.shape[-1], examples, prices=prices).choose()

    @functools.cached_property
    def _suits_kernels(self) -> bool:
        return dispatch.suit(self.input, self.grad)

    def rows(self, start: int, stop: int) -> Outer:
        return replace(self, input=self.input[start:stop], grad=self.grad[start:stop])

    def without(self, bad_B: Tensor) -> Outer:
        return replace(self, input=zero_rows(self.input, bad_B), grad=zero_rows(self.grad, bad_B))

    def joined(self, other: Outer) -> Outer | None:
        if self.input.shape[1] != other.input.shape[1]:
            return None
        return replace(
            self, input=torch.cat([self.input, other.input], dim=2), grad=torch.cat([self.grad, other.grad], dim=2)
        )

    def quick_norm2(self) -> Tensor:
        return self._quick_norm2(HARMLESS)

    def doubted_norm2(self) -> Tensor:
        if self.input.shape[2] == 1:  # both ways add the same
            return self.norm2()
        return going_over(self._quick_norm2(math.inf), self.norm2(), self.hidden2())

    def hidden2(self) -> Tensor:
        """A bound on squares that may have vanished below float32's normal numbers, (B,), float64."""
        lengths = (torch.linalg.vector_norm(value.double(), dim=-1) for value in (self.input, self.grad))
        input_B, grad_B = (value.flatten(1).sum(1).square() for value in lengths)
        tiny = torch.finfo(wide_dtype(self.grad)).tiny
        return tiny * (self.grad.shape[3] * input_B + self.input.shape[3] * grad_B)

    def _quick_norm2(self, harmless: float) -> Tensor:
        if self.input.shape[2] > 1 and self._suits_kernels:
            if self.choice.route is Route.DIRECT:
                return fused_direct_norm2(self.input, self.grad, harmless=harmless)
            return dispatch.gram_norm2([self.input], [self.grad], harmless=harmless)
        if self.input.shape[2] == 1:
            return self._norm2(wide(self.input), wide(self.grad), harmless)
        if self.input.is_cpu:  # whose libraries add up as they like, and take twice the time in float64
            return self.norm2()
        return torch.cat([part._norm2(wide(part.input), wide(part.grad), harmless) for part in self._parts()])

    def norm2(self) -> Tensor:
        """As `quick_norm2`, in float64: squares of tiny gradients do not vanish beside huge inputs."""
        return torch.cat([part._norm2(part.input.double(), part.grad.double(), HARMLESS) for part in self._parts()])

    def _norm2(self, input_BKSI: Tensor, grad_BKSO: Tensor, harmless: float) -> Tensor:
        summed = wide_dtype(self.grad)
        if self.input.shape[2] == 1:
            return norm2_of_products([input_BKSI.squeeze(2)], [grad_BKSO.squeeze(2)], summed=summed)
        return gram_norm2([input_BKSI], [grad_BKSO], summed=summed, harmless=harmless)

    def _parts(self) -> list[Outer]:
        """A few examples at a time, so that Gram matrices stay small."""
        _, groups, positions, inputs = self.input.shape
        chunk = examples_at_a_time(groups * positions * (4 * positions + inputs))
        return [self.rows(start, start + chunk) for start in range(0, self.examples, chunk)]

    def inner(self, other: Form) -> Tensor:
        """With a lookup in the same table: ``sum_st <grad_lookup_s, input_t> grad_t[id_s]``, at cost O(S T D).

        In float64: a product of two tiny numbers that fell below the normal ones could meet a huge third.
        """
        if not isinstance(other, Lookup) or self.input.shape[1] != 1:
            return super().inner(other)
        grad_BTV, input_BTD = self.grad[:, 0], self.input[:, 0].double()
        ids_BTS = other.ids.unsqueeze(1).expand(-1, grad_BTV.shape[1], -1)
        products = (input_BTD @ other.grad.double().mT).mul_(grad_BTV.gather(2, ids_BTS))
        return products.flatten(1).sum(1)

    def per_example(self) -> Tensor:
        if dispatch.suit_sums(self.input, self.grad):
            return dispatch.products(self.input, self.grad).reshape(self.examples, *self.value_shape)
        return (wide(self.grad).mT @ wide(self.input)).reshape(self.examples, *self.value_shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        if dispatch.suit_sums(self.input, self.grad):
            return dispatch.weighted_sum(self.input, self.grad, factor_B).reshape(self.value_shape)
        left, right = wide(self.grad), wide(self.input)
        if left.shape[1] == 1:
            left_NO, right_NI = _flat_and_scaled(left[:, 0], right[:, 0], factor_B)
            return (left_NO.T @ right_NI).reshape(self.value_shape)
        if left.shape[-1] <= right.shape[-1]:
            left = scaled_by(left, factor_B)
        else:
            right = scaled_by(right, factor_B)
        left, right = (value.transpose(0, 1).flatten(1, 2) for value in (left, right))
        return (left.mT @ right).reshape(self.value_shape)

    def reduced(self) -> Form:
        if self.choice.route is Route.KEEP:
            return Dense(self.per_example(), scratch=True)
        return self


def gram_norm2(
    inputs_BKSI: Sequence[Tensor], grads_BKSO: Sequence[Tensor], *, summed: torch.dtype, harmless: float = HARMLESS
) -> Tensor:
    """Eq. 3, arXiv:2110.05679: ``<input input^T, grad grad^T>`` per example, rounded up; the lower half only.

    Two things differ from the paper. Where positions oppose each other the signed sum cancels, in the norm and again in
    the weighted sum; a bound on its rounding error, ``4 eps (sum_s |input_s| |grad_s|)^2``, covers both. And where a
    square that fell below the normal numbers might have mattered beside a huge one, the result is NaN.

    Args:
        inputs_BKSI, grads_BKSO: the operands, in the precision to compute in. Several stand for all their pairs: the
            result is the sum of the pairs' squared norms.
        summed: the dtype that the weighted sum is computed in.
        harmless: what squares that vanished may come to, before the result is NaN.
    """
    found = gram_products(inputs_BKSI, grads_BKSO)
    inputs, outputs = (sum(value.shape[3] for value in values) for values in (inputs_BKSI, grads_BKSO))
    sums = Sums(inputs, outputs, found.spacings, inputs_BKSI[0].dtype, summed, harmless)
    return rounded_up(found.total_B, found.input2_BKS, found.grad2_BKS, sums)


def fused_direct_norm2(input_BKSI: Tensor, grad_BKSO: Tensor, *, harmless: float = HARMLESS) -> Tensor:
    """Squared lengths of ``grad^T input`` by the kernel, rounded up as a Gram norm is.

    Entries err with ``sum_s |input_s| |grad_s|``. The weighted sum cancels as it does after a Gram norm, so the same
    ``4 eps (sum_s |input_s| |grad_s|)^2`` is added.
    """
    found = dispatch.product_squares(input_BKSI, grad_BKSO)
    lengths = (torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32) for value in (input_BKSI, grad_BKSO))
    sizes = {"inputs": input_BKSI.shape[3], "outputs": grad_BKSO.shape[3]}
    return dispatch.rounded_direct(found, *lengths, **sizes, harmless=harmless)


def gram_products(inputs_BKSI: Sequence[Tensor], grads_BKSO: Sequence[Tensor]) -> GramProducts:
    """What the kernel of that name does, in PyTorch: the lower half only.

    Sums of `_WIDTH` products are made in the precision of the operands, in whatever order a library makes them.
    """
    total_B, input_BKS, grad_BKS = 0.0, [], []
    for start, stop in itertools.pairwise(_edges(inputs_BKSI[0].shape[2])):
        inputs, grads = gram_rows(inputs_BKSI, start, stop), gram_rows(grads_BKSO, start, stop)
        input_BKS.append(inputs.diagonal(offset=start, dim1=2, dim2=3))
        grad_BKS.append(grads.diagonal(offset=start, dim1=2, dim2=3))
        inputs[..., :start] *= 2
        total_B = total_B + sum_of_products(inputs, grads)
    spacings = spacings_of(inputs_BKSI) + spacings_of(grads_BKSO)
    return GramProducts(total_B, torch.cat(input_BKS, 2), torch.cat(grad_BKS, 2), spacings)


def _edges(positions: int) -> list[int]:
    """Where tiles of the lower half begin and end: at multiples of 16, with a thin last tile for a few positions more.

    Products of other widths run at three quarters of the speed: 65 positions are 64 and one.
    """
    even = positions - positions % 16 if positions > 16 and positions % 16 <= 4 else positions
    tiles = 1 if even < 48 else 2 if even < 96 else 4
    edges = [even * tile // tiles // 16 * 16 for tile in range(tiles)] + [even]
    return edges if even == positions else [*edges, positions]


def gram_rows(values: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the sum of the Gram matrices, up to the diagonal, float64."""
    first, *rest = (part for value in values for part in _parts_of(value))
    total = (first[:, :, start:stop] @ first[:, :, :stop].mT).double()
    for part in rest:
        total += part[:, :, start:stop] @ part[:, :, :stop].mT
    return total


def _parts_of(value: Tensor) -> tuple[Tensor, ...]:
    return (value,) if value.dtype is torch.float64 else value.split(_WIDTH, dim=3)


def spacings_of(values: Sequence[Tensor]) -> float:
    """By how many spacings of its own precision an entry of such a Gram matrix errs: half a one for each product."""
    return max(part.shape[3] for value in values for part in _parts_of(value)) / 2


def sum_of_products(one_BKSS: Tensor, other_BKSS: Tensor) -> Tensor:
    """``sum_kst one other`` for each example, of Gram matrices in float64."""
    return (one_BKSS * other_BKSS).flatten(1).sum(1)


@dataclass(frozen=True)
class Sums:
    """What a squared norm was summed from, which decides how far it can be off.

    Attributes:
        inputs, outputs: I and O.
        spacings: those that the entries of both Gram matrices err by, together.
        taken: the dtype that they were added up in.
        summed: the dtype that the weighted sum is computed in.
        harmless: what squares that vanished may come to, before there is a doubt.
    """

    inputs: int
    outputs: int
    spacings: float
    taken: torch.dtype
    summed: torch.dtype
    harmless: float


def rounded_up(gram_B: Tensor, input2_BKS: Tensor, grad2_BKS: Tensor, sums: Sums) -> Tensor:
    """A sum of Gram products with the bound on its rounding added; NaN or infinity where there is no such bound.

    Args:
        gram_B: the signed sum, float64.
        input2_BKS, grad2_BKS: squared norms of the positions.
        sums: how they were summed.
    """
    input_BKS, grad_BKS = (value.clamp(min=0).to(torch.float64).sqrt() for value in (input2_BKS, grad2_BKS))
    # Entries of a Gram matrix err with the length of their own sums: constant features of width 768 hid half a norm.
    slack = 4 * torch.finfo(sums.summed).eps + sums.spacings * torch.finfo(sums.taken).eps
    met2_B = (input_BKS * grad_BKS).sum(2).square().sum(1)
    return _unless_hidden(gram_B.clamp(min=0) + slack * met2_B, met2_B, input_BKS, grad_BKS, sums)


def _unless_hidden(exact_B: Tensor, met2_B: Tensor, input_BKS: Tensor, grad_BKS: Tensor, sums: Sums) -> Tensor:
    """Squared norms; infinite for operands out of reach, and NaN where squares that vanished could add to one.

    Out of reach is an example one of whose operands is longer than 1.1e18 (float32): beside it, entries of the other
    that fell below the normal numbers, 1.2e-38, would be more than rounding. Within it they make 1e-15 at most. So is
    one whose positions come to that, ``sum_s |input_s| |grad_s|``, though they may cancel: products overflow later.
    """
    input2_B, grad2_B = (value.square().flatten(1).sum(1) for value in (input_BKS, grad_BKS))
    input_B, grad_B = (value.flatten(1).sum(1).square() for value in (input_BKS, grad_BKS))
    hidden_B = torch.finfo(sums.taken).tiny * (sums.outputs * input_B + sums.inputs * grad_B)
    sure_B = exact_B.masked_fill(hidden_B > 1e-7 * exact_B + sums.harmless, torch.nan)
    return grown(sure_B, torch.stack([input2_B, grad2_B, met2_B]).amax(0), sums.summed)


def grown(norm2_B: Tensor, length2_B: Tensor, summed: torch.dtype) -> Tensor:
    """Squared norms that grow without bound while a squared length goes out of reach, so that no share jumps there."""
    far = torch.finfo(summed).max / 256
    left_B = ((far - length2_B) / (far * NEARER)).clamp(0.0, 1.0)
    return (norm2_B / left_B.square()).masked_fill(left_B == 0, torch.inf)


def going_over(quick_B: Tensor, sure_B: Tensor, hidden_B: Tensor) -> Tensor:
    """Squared norms in doubt: the larger of both ways where the doubt begins, then a mean of both, then the sure one's.

    Each is a bound, and so is what lies between them. Where there is no doubt, the fast way's is the larger, by what it
    adds for rounding: most of a norm where positions oppose each other. To leave that out at once would move all that
    are alike.

    Args:
        quick_B: by the fast way, asked without a doubt.
        sure_B: in float64.
        hidden_B: a bound on the squares that may have vanished from the first.
    """
    larger_B = torch.maximum(quick_B, sure_B)
    left_B = ((_SURE - (hidden_B - HARMLESS) / quick_B) / (_SURE - _DOUBTED)).clamp(0.0, 1.0).nan_to_num(0.0)
    between_B = sure_B + left_B * (larger_B - sure_B)
    return torch.where(left_B > 0, torch.where(between_B.isnan(), larger_B, between_B), sure_B)


def norm2_of_products(inputs_BKI: Sequence[Tensor], grads_BKO: Sequence[Tensor], *, summed: torch.dtype) -> Tensor:
    """One position: ``sum_k |input_k|^2 |grad_k|^2``, added up over pairs of operands.

    Args:
        inputs_BKI, grads_BKO: pairs, in the precision to compute in.
        summed: the dtype that the weighted sums are computed in.
    """
    taken = inputs_BKI[0].dtype
    input2_BK, grad2_BK = (
        torch.cat([squares_along(value, block=_LENGTH) for value in values], 1) for values in (inputs_BKI, grads_BKO)
    )
    exact_B = (input2_BK * grad2_BK).sum(1)
    inputs, outputs = (max(value.shape[-1] for value in values) for values in (inputs_BKI, grads_BKO))
    sums = Sums(inputs, outputs, 0.0, taken, summed, HARMLESS)
    return _unless_hidden(exact_B, exact_B, input2_BK.sqrt().unsqueeze(2), grad2_BK.sqrt().unsqueeze(2), sums)


def _flat_and_scaled(left_BSO: Tensor, right_BSI: Tensor, factor_B: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands as rows, the narrower one scaled: rows are in the order in which the other lies in memory."""
    is_left = left_BSO.shape[-1] <= right_BSI.shape[-1]
    scaled, other = (left_BSO, right_BSI) if is_left else (right_BSI, left_BSO)
    factor = factor_B.to(scaled.dtype).reshape(-1, 1, 1)
    if other.stride(0) < other.stride(1):  # step by step, as recurrent layers leave it
        scaled, other, factor = (value.transpose(0, 1) for value in (scaled, other, factor))
    scaled = torch.mul(scaled, factor, out=scaled.new_empty(scaled.shape))
    flat = [value.reshape(-1, value.shape[-1]) for value in (scaled, other)]
    return (flat[0], flat[1]) if is_left else (flat[1], flat[0])


def scaled_by(value: Tensor, factor_B: Tensor) -> Tensor:
    """Each example times its factor."""
    return value * factor_B.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1))
