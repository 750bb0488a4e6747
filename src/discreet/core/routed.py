"""Per-example gradients of weights that meet rows picked from the batch, each row by one of E experts.

Shape legend: B = examples, E = experts, S = picked rows, I = inputs, O = outputs, C = cells (example, expert), M = rows
of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from discreet.core.forms import Form, wide
from discreet.core.outer import Outer


@dataclass(frozen=True)
class Routed(Form):
    """``G_b[e] = sum_s grad_s (x) input_s`` over the rows s of example b that expert e works on.

    Rows of one (example, expert) cell are the positions of a sum of outer products, so each cell is an `Outer`, and the
    squared norm of an example is the sum over its cells. Cells are padded to the next power of two.

    Attributes:
        input: (S, I).
        grad: (S, O).
        owner: the example of each row, (S,) int64.
        expert: the expert of each row, (S,) int64.
        num_examples: B.
        value_shape: the parameter's own shape, holding E * O * I numbers in (E, O, I) order.
    """

    input: Tensor
    grad: Tensor
    owner: Tensor
    expert: Tensor
    num_examples: int
    value_shape: torch.Size

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.input, self.grad, self.owner, self.expert)

    @property
    def shape(self) -> torch.Size:
        return self.value_shape

    @property
    def examples(self) -> int:
        return self.num_examples

    @property
    def num_experts(self) -> int:
        """E."""
        return math.prod(self.value_shape) // max(1, self.input.shape[1] * self.grad.shape[1])

    def rows(self, start: int, stop: int) -> Routed:
        kept = (self.owner >= start) & (self.owner < stop)
        return Routed(
            self.input[kept], self.grad[kept], self.owner[kept] - start, self.expert[kept], stop - start,
            self.value_shape,
        )  # fmt: skip

    def without(self, bad_B: Tensor) -> Routed:
        bad_S1 = bad_B[self.owner].unsqueeze(1)
        return replace(self, input=self.input.masked_fill(bad_S1, 0), grad=self.grad.masked_fill(bad_S1, 0))

    def joined(self, other: Routed) -> Routed | None:
        if self.input.shape[1] != other.input.shape[1] or self.value_shape != other.value_shape:
            return None
        return replace(
            self,
            input=torch.cat([self.input, other.input]),
            grad=torch.cat([self.grad, other.grad]),
            owner=torch.cat([self.owner, other.owner]),
            expert=torch.cat([self.expert, other.expert]),
        )

    def norm2(self) -> Tensor:
        norm2_B = torch.zeros(self.num_examples, dtype=torch.float64, device=self.input.device)
        for cell_C, outer in self._cells():
            norm2_B.index_add_(0, cell_C // self.num_experts, outer.norm2())
        return norm2_B

    def per_example(self) -> Tensor:
        size = torch.Size((self.grad.shape[1], self.input.shape[1]))
        each = wide(self.grad).new_zeros(self.num_examples * self.num_experts, *size)
        for cell_C, outer in self._cells():
            each.index_copy_(0, cell_C, outer.per_example())
        return each.reshape(self.num_examples, *self.value_shape)

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        order = self.expert.argsort()
        counts = torch.bincount(self.expert, minlength=self.num_experts).tolist()
        input, grad, factor = self.input[order], self.grad[order], factor_B[self.owner[order]]
        size = torch.Size((self.grad.shape[1], self.input.shape[1]))
        sums, start = wide(grad).new_zeros(self.num_experts, *size), 0
        for expert, count in enumerate(counts):
            its_own = slice(start, start + count)
            if count:
                rows = Outer(input[its_own, None, None], grad[its_own, None, None], size)
                sums[expert] = rows.weighted_sum(factor[its_own])
            start += count
        return sums.reshape(self.value_shape)

    def _cells(self) -> Iterator[tuple[Tensor, Outer]]:
        """Cells of about the same number of rows together: their numbers ``b E + e``, and their rows as positions."""
        cell_S, order = (self.owner * self.num_experts + self.expert).sort()
        cells, counts = torch.unique_consecutive(cell_S, return_counts=True)
        starts = counts.cumsum(0) - counts
        size = torch.Size((self.grad.shape[1], self.input.shape[1]))
        largest, length = int(counts.max()) if len(counts) else 0, 1
        while length < 2 * largest:
            chosen = (counts <= length) & (2 * counts > length)
            if bool(chosen.any()):
                step_M = torch.arange(length, device=order.device)
                exists_CM = step_M < counts[chosen].unsqueeze(1)
                row_CM = order[(starts[chosen].unsqueeze(1) + step_M).clamp(max=len(order) - 1)]
                input, grad = (
                    value[row_CM].masked_fill(~exists_CM.unsqueeze(-1), 0).unsqueeze(1)
                    for value in (self.input, self.grad)
                )
                yield cells[chosen], Outer(input, grad, size)
            length *= 2
