"""Every form keeps the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contracts.forms import B, FormContract
from discreet.core.forms import Dense, Lookup, Outer
from discreet.core.route import Cost, Route, choose


def _draw(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class TestDense(FormContract):
    def make(self, seed, dtype=torch.float64):
        return Dense(_draw(seed, dtype, (B, 3, 4))[0])

    def by_hand(self, form):
        return torch.stack([form.grad[b] for b in range(B)])


class TestDenseScalar(FormContract):
    def make(self, seed, dtype=torch.float64):
        return Dense(_draw(seed, dtype, (B,))[0])

    def by_hand(self, form):
        return form.grad


class TestOuter(FormContract):
    sizes = (1, 4, 3, 5)  # groups, positions, inputs, outputs
    transposed = False
    route: Route | None = None

    def make(self, seed, dtype=torch.float64):
        groups, positions, inputs, outputs = self.sizes
        input, grad = _draw(seed, dtype, (B, groups, positions, inputs), (B, groups, positions, outputs))
        shape = (inputs, outputs) if self.transposed else (groups * outputs, inputs)
        form = Outer(input, grad, torch.Size(shape), transposed=self.transposed)
        assert self.route in (None, choose(form.cost))
        return form

    def by_hand(self, form):
        each = []
        for b in range(B):
            blocks = []
            for k in range(form.input.shape[1]):
                block = torch.zeros(form.grad.shape[-1], form.input.shape[-1], dtype=form.grad.dtype)
                for s in range(form.input.shape[2]):
                    block += torch.outer(form.grad[b, k, s], form.input[b, k, s])
                blocks.append(block.T if self.transposed else block)
            each.append(torch.cat(blocks).reshape(form.shape))
        return torch.stack(each)

    def test_joined_is_the_sum(self):
        one, two = self.make(0), self.make(1)
        joined = one.joined(two)
        torch.testing.assert_close(joined.per_example(), one.per_example() + two.per_example(), rtol=1e-12, atol=1e-12)
        wanted = one.norm2() + two.norm2() + 2 * one.inner(two)
        torch.testing.assert_close(joined.norm2(), wanted, rtol=1e-9, atol=1e-12)


class TestOuterOnePosition(TestOuter):
    sizes, route = (1, 1, 3, 5), Route.GRAM


class TestOuterKept(TestOuter):
    sizes, route = (1, 9, 3, 4), Route.KEEP


class TestOuterByGram(TestOuter):
    sizes, route = (1, 2, 12, 15), Route.GRAM


class TestOuterTransposed(TestOuter):
    sizes, transposed = (1, 2, 12, 15), True


class TestOuterGrouped(TestOuter):
    sizes, route = (3, 2, 8, 9), Route.GRAM


class TestOuterGroupedKept(TestOuter):
    sizes, route = (4, 6, 2, 3), Route.KEEP


class TestLookup(FormContract):
    def make(self, seed, dtype=torch.float64):
        ids = torch.randint(0, 6, (B, 7), generator=torch.Generator().manual_seed(seed))
        return Lookup(ids, _draw(seed, dtype, (B, 7, 3))[0], 6)

    def by_hand(self, form):
        each = torch.zeros(B, form.num_rows, form.grad.shape[-1], dtype=form.grad.dtype)
        for b in range(B):
            for s in range(form.ids.shape[1]):
                each[b, form.ids[b, s]] += form.grad[b, s]
        return each

    def test_joined_is_the_sum(self):
        one, two = self.make(0).reduced(), self.make(1)
        joined = one.joined(two)
        torch.testing.assert_close(joined.per_example(), one.per_example() + two.per_example(), rtol=1e-12, atol=1e-12)
        wanted = (one.per_example() + two.per_example()).reshape(B, -1).square().sum(1)
        torch.testing.assert_close(joined.norm2(), wanted, rtol=1e-12, atol=1e-12)

    def test_opposite_gradients_of_one_id_cancel_before_anything_else(self):
        grad = _draw(0, torch.float32, (B, 6, 3))[0] * 1e15
        both = Lookup(torch.arange(6).repeat(B, 2), torch.cat([grad, -grad], 1), 6)
        assert not both.norm2().any()
        assert not both.weighted_sum(torch.full((B,), 100.0)).any()


def test_gram_norms_are_never_below_what_is_summed():
    """Cancelling positions: the rounded norm must bound the example that the weighted sum really adds."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        positions, width = 2 + trial % 5, 24 + 8 * (trial % 4)
        input = torch.randn(1, 1, positions, width, generator=generator)
        grad = torch.randn(1, 1, positions, width, generator=generator)
        if trial % 2:
            input = input[:, :, :1].expand_as(input) * 10.0 ** (trial % 9)
            grad = grad - grad.mean(2, keepdim=True)
        form = Outer(input.contiguous(), grad, torch.Size((width, width)))
        assert choose(form.cost) is Route.GRAM
        added = form.weighted_sum(torch.ones(1)).double().norm()
        assert float(added) <= float(form.norm2().sqrt()) * (1 + 2.0**-18)


@pytest.mark.parametrize("positions", [1, 2, 5, 50, 5000])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 64), (64, 64), (768, 3072)])
def test_the_route_is_never_the_dearer_one_in_memory(positions, inputs, outputs):
    kept, booked = inputs * outputs, positions * (inputs + outputs)
    route = choose(Cost(positions=positions, inputs=inputs, outputs=outputs))
    assert route is (Route.KEEP if positions > 1 and kept <= booked else Route.GRAM)
    if route is Route.GRAM and positions > 1:
        assert positions * (inputs + outputs) < inputs * outputs  # fewer multiply-adds than instantiating


@pytest.mark.parametrize("positions", [1, 2])
def test_tiny_gradients_are_seen_beside_huge_inputs(positions):
    """Squares of 3e-23 vanish in float32, and inputs of 1e18 bring them back: 4.2 times the bound, were they lost."""
    input = torch.full((2, 1, positions, 40), 1e18)
    grad = torch.full((2, 1, positions, 50), 3e-23)
    form = Outer(input, grad, torch.Size((50, 40)))
    assert choose(form.cost) is Route.GRAM
    wanted = form.per_example().double().reshape(2, -1).norm(dim=1)
    assert (form.norm2().sqrt() >= wanted * (1 - 1e-6)).all()
    assert (form.norm2().sqrt() <= wanted * 1.001).all()
