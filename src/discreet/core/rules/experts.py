"""Rules for rows that were picked from the batch, as a mixture of experts picks them: linear maps, one per expert.

A grouped product multiplies consecutive rows by one matrix of a stack; ``F.linear(x[picked], weight[expert])`` does the
same for one expert at a time. Both book which example each row belongs to (`discreet.core.routing`).

Shape legend: B = examples, E = experts, S = picked rows, I = inputs, O = outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from discreet.core.forms import Dense, Form, wide
from discreet.core.parameter import Guarded, Use, routed_rule, rule
from discreet.core.routed import Routed
from discreet.core.rules.contraction import Operation, contract
from discreet.core.rules.linear import Linear

_REMEDY = (
    "pick rows by x[index] from [batch * positions, features], or run the experts one by one (implementation eager)."
)


@dataclass(frozen=True)
class RoutedLinear(Linear):
    """A linear map of picked rows: one expert, or a layer that every picked row goes through."""

    owner: Tensor

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        expert = torch.zeros_like(self.owner)
        pair = (grad, input) if self.transposed else (input, grad)
        return Routed(*pair, self.owner, expert, examples, weight.shape)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        return Dense(wide(grad).new_zeros(examples, grad.shape[1]).index_add_(0, self.owner, wide(grad)))


@dataclass(frozen=True)
class Grouped(Operation):
    """``y_s = x_s weight[expert_s]`` for a weight (E, I, O); row ``ends[e]`` is the first that is not of expert e."""

    ends: Tensor
    owner: Tensor

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch._grouped_mm(input, weight, offs=self.ends)

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return torch._grouped_mm(grad.contiguous(), weight.mT, offs=self.ends)

    def weight_form(self, grad: Tensor, input: Tensor, weight: Tensor, examples: int) -> Form:
        row_S = torch.arange(len(input), device=input.device, dtype=self.ends.dtype)
        expert_S = torch.searchsorted(self.ends, row_S, right=True)
        return Routed(grad, input, self.owner, expert_S, examples, weight.shape)

    def bias_form(self, grad: Tensor, examples: int) -> Form:
        raise AssertionError("a grouped product has no bias")


_grouped = getattr(torch, "_grouped_mm", None)
_GROUPED = () if _grouped is None else (_grouped,)  # older releases have none


@rule(*_GROUPED)
@routed_rule(*_GROUPED)
def grouped_mm(
    use: Use,
    input: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``F.grouped_mm`` of picked rows (S, I), sorted by expert, and a guarded stack (E, I, O)."""
    if (
        not isinstance(weight, Guarded)
        or weight.dim() != 3
        or offs is None
        or bias is not None
        or out_dtype is not None
    ):
        raise use.refuse("other than rows, a stack of matrices and offs", "pass rows (S, I), weight (E, I, O), offs.")
    if len(offs) != len(weight) or int(offs[-1]) != len(input):
        raise use.refuse(f"offs end at {int(offs[-1])} of {len(input)} rows", "every row needs an expert.")
    picking = use.pickings.get(id(input))
    if picking is None or picking.owner is None:
        raise use.refuse("where its rows were picked from is not known", _REMEDY)
    return contract(use, Grouped(offs, picking.owner), input, weight, None)


@routed_rule(F.linear)
def linear(use: Use, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of picked rows."""
    return contract(use, RoutedLinear(transposed=False, owner=use.owner(input)), input, weight, bias)


@routed_rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def matmul(use: Use, input: Tensor, other: Tensor) -> Tensor:
    """``x[picked] @ weight``."""
    if isinstance(input, Guarded) or other.dim() != 2:
        raise use.refuse(f"a weight of shape {tuple(other.shape)}", "multiply picked rows by a matrix on the right.")
    return contract(use, RoutedLinear(transposed=True, owner=use.owner(input)), input, other, None)


@routed_rule(torch.add, torch.mul, Tensor.add, Tensor.mul, Tensor.__add__, Tensor.__radd__, Tensor.__mul__,
             Tensor.__rmul__, Tensor.add_, Tensor.mul_, Tensor.__iadd__, Tensor.__imul__)  # fmt: skip
def pointwise(use: Use, *args: Any, **named: Any) -> Tensor:
    """Sums and products of picked rows with a bias or a scale, expert by expert."""
    plain = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor) and use.is_batched(leaf)]
    owner = use.owner(*plain)

    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, Guarded):
            return leaf
        if leaf.dim() > 1:
            raise use.refuse(f"a parameter of shape {tuple(leaf.shape)}", "give it one axis, or none.")
        return use.expand(leaf)[owner].reshape(len(owner), -1)

    if isinstance(args[0], Guarded) and use.function in (Tensor.add_, Tensor.mul_, Tensor.__iadd__, Tensor.__imul__):
        raise use.refuse("a parameter is changed in place by activations", "write it out of place.")
    substituted, names = tree_map(spread, (args, named))
    return use.function(*substituted, **names)
