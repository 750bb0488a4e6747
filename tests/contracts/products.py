"""What every way to a Gram product or to a squared product must keep, in PyTorch's arithmetic or in a kernel's.

Each is held against float64, and against its own bound: what it says to err by is what is added to a norm.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from discreet.core.kernels import dispatch
from discreet.core.kernels.results import HARMLESS, NEARER, GramProducts, Squares

needs_triton = pytest.mark.skipif(
    not dispatch._found(), reason="no Triton of version 3.4 or newer: pip install 'discreet[gpu]' on Linux"
)
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: only a card shows this")
needs_two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (  # examples, groups, positions, inputs, outputs
    *((1, 1, 1, 1, 1), (3, 1, 1, 5, 70), (2, 3, 2, 17, 16), (2, 1, 31, 33, 15), (1, 2, 65, 7, 66)),
    *((1, 1, 64, 64, 64), (1, 1, 97, 40, 129), (1, 2, 130, 20, 3), (1, 1, 193, 4, 5)),
)


def draw(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Gaussian operands, drawn in float64 and then rounded."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def pair(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """An input and a gradient of one use."""
    examples, groups, positions, inputs, outputs = sizes
    return draw(seed, dtype, (examples, groups, positions, inputs), (examples, groups, positions, outputs))


def met(input: Tensor, grad: Tensor, unseen: float = 0.0) -> Tensor:
    """``sum_s |input_s| |grad_s|`` over positions, as a length over groups, (B,), float64.

    ``unseen``: what a length may have lost for each of its squares that fell below the normal numbers.
    """
    lengths = [value.double().norm(dim=-1) + unseen * value.shape[3] ** 0.5 for value in (input, grad)]
    return (lengths[0] * lengths[1]).sum(2).norm(dim=1)


def within_reach(input: Tensor, grad: Tensor) -> Tensor:
    """How much of the way is left to where lengths are out of reach, as a share of where norms begin to grow, (B,)."""
    lengths2 = [value.double().square().flatten(1).sum(1) for value in (input, grad)]
    longest = torch.stack([*lengths2, met(input, grad).square()]).amax(0) * (1 + 1e-3)
    far = torch.finfo(torch.float32).max / 256
    return ((far - longest) / (far * NEARER)).clamp(0.0, 1.0)


def each(input: Tensor, grad: Tensor) -> Tensor:
    """Per-example gradients (B, K, O, I), float64."""
    return grad.double().mT @ input.double()


def strided(value: Tensor, kind: str) -> Tensor:
    """The same numbers in another order of memory."""
    if kind == "transposed":
        return value.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "time first":
        return value.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if kind == "sliced":
        padded = torch.full((*value.shape[:2], 2 * value.shape[2] + 1, value.shape[3] + 3), torch.nan).to(value.dtype)
        padded[:, :, 1::2, 2:-1] = value
        return padded[:, :, 1::2, 2:-1]
    assert kind == "expanded"
    return value[:, :, :1].expand_as(value)


class ProductContract(abc.ABC):
    """Inherit one of the two below, and say how to compute it."""

    dtypes: Sequence[torch.dtype] = DTYPES
    is_kernel = True

    @abc.abstractmethod
    def total(self, input: Tensor, grad: Tensor) -> tuple[Tensor, float]:
        """Squared norms before rounding is added, (B,), and the spacings that it errs by."""

    @abc.abstractmethod
    def norm2(self, input: Tensor, grad: Tensor, *, harmless: float = HARMLESS) -> Tensor:
        """Squared norms with rounding added, (B,)."""

    def gap(self, input: Tensor, grad: Tensor, spacings: float) -> Tensor:
        """How far the squared norms may be off, by their own word."""
        return spacings * EPS * met(input, grad).square()

    @pytest.mark.parametrize("sizes", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_is_float64_within_its_own_bound(self, sizes, dtype):
        input, grad = pair(sizes, dtype)
        total, spacings = self.total(input, grad)
        assert total.dtype is torch.float64
        wanted = each(input, grad).square().flatten(1).sum(1)
        assert ((total - wanted).abs() <= self.gap(input, grad, spacings)).all()
        torch.testing.assert_close(total, wanted, rtol=2e-5, atol=0.0)

    @pytest.mark.parametrize("kind", ["transposed", "time first", "sliced", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_strides_change_no_bit(self, kind, dtype):
        """Of a kernel. PyTorch hands other strides to other products, which round otherwise."""
        input, grad = (strided(value, kind) for value in pair((2, 2, 35, 18, 21), dtype))
        found, wanted = self.total(input, grad)[0], self.total(input.contiguous(), grad.contiguous())[0]
        torch.testing.assert_close(found, wanted, rtol=0.0 if self.is_kernel else 1e-6, atol=0.0)

    def test_runs_do_not_differ(self):
        input, grad = pair((2, 2, 67, 18, 70), torch.float32)
        assert torch.equal(self.norm2(input, grad), self.norm2(input, grad))

    @pytest.mark.parametrize(
        ("value", "dtype"), [(float("nan"), DTYPES[0]), (float("inf"), DTYPES[1]), (-float("inf"), DTYPES[2])]
    )
    @pytest.mark.parametrize("spoilt", [0, 1])
    @pytest.mark.parametrize("at", [0, 36])
    def test_what_is_not_finite_stays_in_its_example(self, value, dtype, spoilt, at):
        operands = pair((4, 2, 37, 18, 21), dtype)
        clean = self.norm2(*operands)
        operands[spoilt][1, 1, at, 17] = float(value)
        operands[spoilt][3, 0, at, 0] = float(value)
        operands[1 - spoilt][3, 0, at] = 0  # zero times infinity
        found = self.norm2(*operands)
        assert torch.isfinite(found).tolist() == [True, False, True, False]
        assert torch.equal(found[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize("trial", range(24))
    def test_opposed_positions_are_rounded_up(self, trial):
        """The norm bounds the example that the weighted sum really adds, in float32."""
        dtype = DTYPES[trial % 3]
        positions, width = 2 + trial % 5, 24 + 8 * (trial % 4)
        input, grad = pair((1, 1, positions, width, width), torch.float32, seed=trial)
        if trial % 2:
            input = input[:, :, :1].expand_as(input) * (1.0 if dtype is torch.float16 else 10.0 ** (trial % 9))
            grad = grad - grad.mean(2, keepdim=True)
        input, grad = input.to(dtype), grad.to(dtype)
        added = (grad.float().mT @ input.float()).double().norm()
        assert float(added) <= float(self.norm2(input, grad)[0].sqrt()) * (1 + 2.0**-18)

    @pytest.mark.parametrize("width", [16, 768, 3000, 5000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_constant_features_do_not_hide_a_norm(self, width, dtype):
        """All products of an entry are equal, so that they are all rounded to the same side."""
        input = torch.full((1, 1, 4, width), 1.1).to(dtype)
        grad = pair((1, 1, 4, 1, 9), torch.float32)[1]
        grad = (grad - grad.mean(2, keepdim=True)).to(dtype)
        exact = each(input, grad).square().sum()
        assert float(self.norm2(input, grad)) >= float(exact)

    @pytest.mark.parametrize("which", ["input", "grad", "all positions together"])
    def test_norms_grow_as_an_operand_nears_what_float32_can_square(self, which):
        """Divided by what is left of its squared length, from half of 1.15e18 on, in every arithmetic."""
        input, grad = pair((5, 1, 20, 24, 16), torch.float32)
        edge = (torch.finfo(torch.float32).max / 256) ** 0.5
        lengths = {"input": input.flatten(1).norm(dim=1), "grad": grad.flatten(1).norm(dim=1)}.get(
            which, met(input, grad)
        )
        far_below = None
        for share in (0.4, 0.51, 0.8, 0.97, 0.999, 1.001, 2.0):
            times = (share * edge / lengths).reshape(-1, 1, 1, 1)
            if which == "input":
                found = self.norm2((input * times).float(), grad * 1e-3)
            elif which == "grad":
                found = self.norm2(input * 1e-3, (grad * times).float())
            else:
                found = self.norm2((input * times.sqrt()).float(), (grad * times.sqrt()).float())
            found, left = found / share**2, min(1.0, (1 - share**2) / 0.75)
            far_below = found if far_below is None else far_below
            if share < 1:  # a length errs by more of what is left the less there is
                torch.testing.assert_close(found, far_below / left**2, rtol=1e-5 / left, atol=0.0)
            else:
                assert found.isinf().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("large", "small"), [(1e18, 3e-23), (1e30, 1e-34), (1e38, 1e-40), (1e-20, 1e-20)])
    def test_tiny_beside_huge_is_never_taken_for_nothing(self, large, small, dtype):
        for one, other in ((large, small), (small, large)):
            input = torch.full((2, 1, 3, 40), one).to(dtype)
            grad = torch.full((2, 1, 3, 50), other).to(dtype)
            found, exact = self.norm2(input, grad), each(input, grad).square().flatten(1).sum(1)
            assert (torch.isnan(found) | (found >= exact * (1 - 1e-6) - 1e-24)).all()

    def test_where_there_is_a_doubt_the_number_can_be_told_too(self):
        """The same number as without one: norms taken from it do not jump where doubts begin."""
        input, grad = torch.full((2, 1, 3, 40), 1e15), torch.full((2, 1, 3, 50), 1e-20)
        input[:, :, :2], grad[:, :, :2] = 1.0, 1.0
        grad[1, :, :2] = 0.01  # beside the norm of the other it is harmless
        found, told = self.norm2(input, grad), self.norm2(input, grad, harmless=math.inf)
        assert torch.isnan(found).tolist() == [False, True]
        assert told[0] == found[0]
        exact = each(input, grad).square().flatten(1).sum(1)
        assert exact[1] <= told[1] <= exact[1] * (1 + 1e-4)

    @given(case=st.data())
    @settings(max_examples=25, suppress_health_check=[HealthCheck.differing_executors])  # inherited, by design
    def test_any_operands_at_all(self, case):
        """Never below the exact norm, and above it by no more than was said."""
        sizes = tuple(case.draw(st.integers(1, most)) for most in (2, 2, 66, 66, 66))
        dtype = case.draw(st.sampled_from(self.dtypes))
        input, grad = pair(sizes, dtype, seed=case.draw(st.integers(0, 99)))
        powers = [case.draw(st.integers(-4, 4) if dtype is torch.float16 else st.integers(-36, 36)) for _ in range(2)]
        for value, power in zip((input, grad), powers, strict=True):
            if case.draw(st.booleans()):  # opposed positions
                value[:, :, 1::2] = -value[:, :, : sizes[2] // 2 * 2 : 2]
            value *= 10.0**power
        exact, spacings = each(input, grad).square().flatten(1).sum(1), self.total(input, grad)[1]
        found = self.norm2(input, grad)
        sure = torch.isfinite(found)
        assert sure.all() or max(map(abs, powers)) > 6
        assert (found >= exact * (1 - 1e-7) - 1e-24)[sure].all()
        rounding = (4 + spacings) * EPS * met(input, grad, unseen=1.1e-19).square() * (1 + 1e-3)
        most = (exact + rounding + self.gap(input, grad, spacings) * (1 + 1e-3)) / within_reach(input, grad).square()
        assert (found <= most * (1 + 1e-5) + 1e-24)[sure].all()


class GramContract(ProductContract):
    """``sum_st <input_s, input_t> <grad_s, grad_t>``."""

    @abc.abstractmethod
    def products(self, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> GramProducts:
        """The Gram product of several operands."""

    @abc.abstractmethod
    def norm2_of(self, inputs: Sequence[Tensor], grads: Sequence[Tensor], *, harmless: float = HARMLESS) -> Tensor:
        """Squared norms with rounding added."""

    def total(self, input: Tensor, grad: Tensor) -> tuple[Tensor, float]:
        found = self.products([input], [grad])
        return found.total_B, found.spacings + 4

    def norm2(self, input: Tensor, grad: Tensor, *, harmless: float = HARMLESS) -> Tensor:
        return self.norm2_of([input], [grad], harmless=harmless)

    @pytest.mark.parametrize("sizes", SHAPES, ids=str)
    def test_positions_get_their_own_norms(self, sizes):
        input, grad = pair(sizes, torch.float32)
        found = self.products([input], [grad])
        torch.testing.assert_close(found.input2_BKS.float(), input.square().sum(-1), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(found.grad2_BKS.float(), grad.square().sum(-1), rtol=1e-5, atol=0.0)

    @pytest.mark.parametrize("positions", [1, 5, 50, 97])
    def test_several_operands_stand_for_all_their_pairs(self, positions):
        inputs = draw(1, torch.float32, (3, 1, positions, 20), (3, 1, positions, 70))
        grads = draw(2, torch.float32, (3, 1, positions, 33), (3, 1, positions, 4), (3, 1, positions, 64))
        found = self.products(inputs, grads)
        wanted = sum(each(x, g).square().flatten(1).sum(1) for x in inputs for g in grads)
        torch.testing.assert_close(found.total_B, wanted, rtol=1e-5, atol=0.0)
        lengths = sum(g.square().sum(-1) for g in grads)
        torch.testing.assert_close(found.grad2_BKS.float(), lengths, rtol=1e-5, atol=0.0)
        assert (self.norm2_of(inputs, grads) >= wanted).all()


class SquaresContract(ProductContract):
    """``|grad^T input|^2``."""

    squares: Callable[[Tensor, Tensor], Squares]

    def total(self, input: Tensor, grad: Tensor) -> tuple[Tensor, float]:
        found = self.squares(input, grad)
        return found.total_B, found.spacings

    def gap(self, input: Tensor, grad: Tensor, spacings: float) -> Tensor:
        length, off = each(input, grad).flatten(1).norm(dim=1), spacings * EPS * met(input, grad)
        return (length + off).square() * (1 + 70 * EPS) - length.square()
