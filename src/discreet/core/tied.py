"""Per-example gradients of a table that is an embedding and a head: a lookup and a sum of outer products, tied.

Shape legend: B = examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.forms import Form, Lookup, wide_dtype
from discreet.core.outer import Outer, grown


@dataclass(frozen=True)
class Tied(Form):
    """One table used as a lookup and as a linear map: ``G_b = lookup_b + outer_b`` (arXiv:2405.18194, section 3).

    The two may oppose each other, in the norm and again in the sum; as in a Gram norm, a bound on what rounding does to
    both, ``4 eps (|lookup_b| + |outer_b|)^2``, is added.
    """

    lookup: Lookup
    outer: Outer

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.lookup.tensors, *self.outer.tensors)

    @property
    def shape(self) -> torch.Size:
        return self.outer.shape

    @property
    def examples(self) -> int:
        return self.outer.examples

    def rows(self, start: int, stop: int) -> Tied:
        return Tied(self.lookup.rows(start, stop), self.outer.rows(start, stop))

    def without(self, bad_B: Tensor) -> Tied:
        return Tied(self.lookup.without(bad_B), self.outer.without(bad_B))

    def joined(self, other: Tied) -> Tied | None:
        outer = self.outer.joined(other.outer)
        return None if outer is None else Tied(self.lookup.joined(other.lookup), outer)

    def norm2(self) -> Tensor:
        return self._with_cross_term(self.outer.norm2())

    def quick_norm2(self) -> Tensor:
        return self._with_cross_term(self.outer.quick_norm2())

    def doubted_norm2(self) -> Tensor:
        return self._with_cross_term(self.outer.doubted_norm2())

    def _with_cross_term(self, outer_B: Tensor) -> Tensor:
        lookup_B = self.lookup.norm2()
        rounding = (4 + self.outer.input.shape[3] / 2) * torch.finfo(wide_dtype(self.outer.grad)).eps
        exact_B = (lookup_B + outer_B + 2 * self.outer.inner(self.lookup)).clamp(min=0)
        exact_B = exact_B + rounding * (lookup_B.sqrt() + outer_B.sqrt()).square()
        return grown(exact_B, torch.maximum(lookup_B, outer_B), wide_dtype(self.outer.grad))

    def per_example(self) -> Tensor:
        return self.lookup.per_example() + self.outer.per_example()

    def weighted_sum(self, factor_B: Tensor) -> Tensor:
        return self.lookup.add_weighted_sum(factor_B, self.outer.weighted_sum(factor_B))

    def reduced(self) -> Tied:
        return Tied(self.lookup.reduced(), self.outer)
