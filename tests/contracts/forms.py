"""What every form of per-example gradients must keep: five functions tied by identities."""

from __future__ import annotations

import abc

import pytest
import torch
from torch import Tensor

from discreet.core.forms import Form

B = 5


class FormContract(abc.ABC):
    """Inherit, and say how to make one. Everything is float64 unless asked otherwise."""

    tolerance = 1e-10

    @abc.abstractmethod
    def make(self, seed: int, dtype: torch.dtype = torch.float64) -> Form:
        """A form of B examples with random content."""

    @abc.abstractmethod
    def by_hand(self, form: Form) -> Tensor:
        """Its per-example gradients, (B, *shape), written as loops."""

    @pytest.fixture(params=range(3))
    def form(self, request) -> Form:
        return self.make(request.param)

    def test_per_example_is_what_loops_give(self, form):
        each = form.per_example()
        assert each.shape == (B, *form.shape)
        assert form.examples == B
        torch.testing.assert_close(each, self.by_hand(form), rtol=1e-12, atol=1e-12)

    def test_norm2_is_the_square_of_per_example(self, form):
        wanted = form.per_example().reshape(B, -1).square().sum(1)
        found = form.norm2()
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, wanted, rtol=self.tolerance, atol=1e-12)

    def test_the_quick_norm_is_the_sure_one(self, form):
        torch.testing.assert_close(form.quick_norm2(), form.norm2(), rtol=self.tolerance, atol=1e-12)

    def test_added_per_example_is_per_example(self, form):
        total = torch.ones(B, *form.shape, dtype=torch.float64)
        form.add_per_example(total)
        torch.testing.assert_close(total, 1 + form.per_example(), rtol=1e-12, atol=1e-12)

    def test_diagonal_of_gram_is_norm2(self, form):
        gram = form.gram()
        assert gram.shape == (B, B)
        torch.testing.assert_close(gram, gram.T)
        torch.testing.assert_close(gram.diagonal(), form.norm2(), rtol=self.tolerance, atol=1e-12)

    def test_inner_with_itself_is_norm2(self, form):
        torch.testing.assert_close(form.inner(form), form.norm2(), rtol=self.tolerance, atol=1e-12)

    def test_inner_with_another(self, form):
        other = self.make(99)
        wanted = (form.per_example() * other.per_example()).reshape(B, -1).sum(1)
        torch.testing.assert_close(form.inner(other), wanted, rtol=1e-10, atol=1e-12)

    def test_weighted_sum_of_a_unit_vector_is_one_example(self, form):
        for i in range(B):
            unit = torch.zeros(B, dtype=torch.float64)
            unit[i] = 1
            torch.testing.assert_close(form.weighted_sum(unit), form.per_example()[i], rtol=1e-12, atol=1e-12)

    def test_weighted_sum_is_linear(self, form):
        a, b = torch.rand(2, B, dtype=torch.float64) + 0.1
        both = form.weighted_sum(2 * a + 3 * b)
        torch.testing.assert_close(both, 2 * form.weighted_sum(a) + 3 * form.weighted_sum(b), rtol=1e-11, atol=1e-11)

    def test_rows_are_rows(self, form):
        part = form.rows(1, 4)
        assert part.examples == 3
        torch.testing.assert_close(part.per_example(), form.per_example()[1:4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.norm2(), form.norm2()[1:4], rtol=1e-12, atol=1e-12)

    def test_every_route_gives_the_same(self, form):
        held = form.reduced()
        factor = torch.rand(B, dtype=torch.float64)
        torch.testing.assert_close(held.per_example(), form.per_example(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(held.norm2(), form.norm2(), rtol=self.tolerance, atol=1e-12)
        torch.testing.assert_close(held.weighted_sum(factor), form.weighted_sum(factor), rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_without_leaves_exactly_nothing(self, form, value):
        bad = torch.tensor([False, True, False, False, True])
        poisoned = self.poison(form, bad, value)
        assert not torch.isfinite(poisoned.norm2())[bad].any()
        cleaned = poisoned.without(bad)
        assert not cleaned.norm2()[bad].any()
        assert not cleaned.per_example()[bad].any()
        factor = torch.ones(B, dtype=torch.float64)
        wanted = form.weighted_sum(torch.where(bad, 0.0, factor))
        torch.testing.assert_close(cleaned.weighted_sum(factor), wanted, rtol=1e-12, atol=1e-12)

    def poison(self, form: Form, bad: Tensor, value: float) -> Form:
        """The same form with a value that is not finite in the marked examples."""
        import dataclasses

        grad = form.grad.clone()
        grad.reshape(B, -1)[bad, 0] = value
        return dataclasses.replace(form, grad=grad)

    def test_float32_and_bfloat16_accumulate_in_float32(self):
        for dtype in (torch.float32, torch.bfloat16):
            form = self.make(0, dtype)
            factor = torch.rand(B, dtype=torch.float64)
            assert form.weighted_sum(factor).dtype is torch.float32
            wanted = self.make(0).norm2()
            torch.testing.assert_close(form.norm2(), wanted, rtol=5e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-12)

    def test_tiny_and_huge_are_never_taken_for_small(self):
        form = self.make(0, torch.float32)
        for scale in (1e-18, 1e13, 1e15, 1e25):
            found, wanted = self.scaled(form, scale).norm2().sqrt(), form.norm2().sqrt() * scale
            near = torch.isclose(found, wanted, rtol=1e-5, atol=0.0)
            assert (near | ((found >= wanted) & (wanted > 1e16))).all()  # from there on they grow, and give nothing

    def scaled(self, form: Form, scale: float) -> Form:
        """The same form with its gradient multiplied."""
        import dataclasses

        return dataclasses.replace(form, grad=form.grad * scale)
