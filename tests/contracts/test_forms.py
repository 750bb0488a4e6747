"""Every form keeps the contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.forms import B, FormContract
from discreet.core.forms import Dense, Lookup
from discreet.core.kernels import dispatch
from discreet.core.outer import Outer
from discreet.core.route import ACCELERATOR, CPU, KERNELS, PANELS, TENSOR_CORES, Cost, Route, WindowCost, forced
from discreet.core.tied import Tied
from discreet.core.windows import Geometry, Windows


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
    route: Route | None = None

    def make(self, seed, dtype=torch.float64):
        groups, positions, inputs, outputs = self.sizes
        input, grad = _draw(seed, dtype, (B, groups, positions, inputs), (B, groups, positions, outputs))
        form = Outer(input, grad, torch.Size((groups * outputs, inputs)))
        assert self.route in (None, form.choice.route)
        return form

    def by_hand(self, form):
        each = []
        for b in range(B):
            blocks = []
            for k in range(form.input.shape[1]):
                block = torch.zeros(form.grad.shape[-1], form.input.shape[-1], dtype=form.grad.dtype)
                for s in range(form.input.shape[2]):
                    block += torch.outer(form.grad[b, k, s], form.input[b, k, s])
                blocks.append(block)
            each.append(torch.cat(blocks).reshape(form.shape))
        return torch.stack(each)

    def test_joined_is_the_sum(self):
        one, two = self.make(0), self.make(1)
        joined = one.joined(two)
        torch.testing.assert_close(joined.per_example(), one.per_example() + two.per_example(), rtol=1e-12, atol=1e-12)
        wanted = one.norm2() + two.norm2() + 2 * one.inner(two)
        torch.testing.assert_close(joined.norm2(), wanted, rtol=1e-9, atol=1e-12)


class TestOuterOnePosition(TestOuter):
    sizes, route = (1, 1, 3, 5), Route.PRODUCT


class TestOuterKept(TestOuter):
    sizes, route = (1, 9, 3, 4), Route.KEEP


class TestOuterInTwoTiles(TestOuter):
    sizes, route = (1, 50, 110, 95), Route.GRAM


class TestOuterInFourTiles(TestOuter):
    sizes, route = (2, 101, 230, 240), Route.GRAM


class TestOuterByGram(TestOuter):
    sizes, route = (1, 2, 12, 15), Route.GRAM


class TestOuterGrouped(TestOuter):
    sizes, route = (3, 2, 8, 9), Route.GRAM


class TestOuterGroupedKept(TestOuter):
    sizes, route = (4, 6, 2, 3), Route.KEEP


class TestWindows(FormContract):
    """(folds, channels, outputs, image, kernel), geometry, route."""

    sizes = (1, 2, 3, (7,), (3,))
    geometry = Geometry((1,), (0,), (1,), 1)
    route: Route | None = None

    def make(self, seed, dtype=torch.float64):
        folds, channels, outputs, image, kernel = self.sizes
        shape = torch.Size((outputs, channels // self.geometry.groups, *kernel))
        weight = torch.zeros(shape)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(image) - 1]
        output = convolve(
            torch.zeros(1, channels, *image), weight, None, self.geometry.stride, self.geometry.padding,
            self.geometry.dilation, self.geometry.groups,
        ).shape[2:]  # fmt: skip
        input, grad = _draw(seed, dtype, (B, folds, channels, *image), (B, folds, outputs, *output))
        form = Windows(input, grad, shape, self.geometry)
        assert self.route in (None, form.choice.route), str(form.choice)
        return form

    def by_hand(self, form):
        axes = len(self.sizes[3])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        each = []
        for b in range(B):
            weight = torch.zeros(form.shape, dtype=form.grad.dtype, requires_grad=True)
            g = form.geometry
            output = convolve(form.input[b], weight, None, g.stride, g.padding, g.dilation, g.groups)
            each.append(torch.autograd.grad((output * form.grad[b]).sum(), weight)[0])
        return torch.stack(each)

    def test_every_gram_gives_the_norm(self, form):
        wanted = form.per_example().reshape(B, -1).square().sum(1)
        for route in (Route.PIXELS, Route.WINDOWS):
            torch.testing.assert_close(form._gram_norm2(route), wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(form.unfolded().per_example(), form.per_example(), rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("chunk", [1, 2, B])
    def test_the_sum_by_products_is_that_of_the_library(self, form, chunk, monkeypatch):
        """An accelerator's convolutions may take TF32, or ways that round more."""
        monkeypatch.setattr("discreet.core.windows.examples_at_a_time", lambda _: chunk)
        (factor_B,) = _draw(5, torch.float64, (B,))
        factor_B[1] = 0.0
        torch.testing.assert_close(form._summed_by_parts(factor_B), form.weighted_sum(factor_B), rtol=1e-11, atol=1e-12)

    def test_joined_is_the_sum(self):
        one, two = self.make(0), self.make(1)
        joined = one.joined(two)
        wanted = one.per_example() + two.per_example()
        torch.testing.assert_close(joined.per_example(), wanted, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(joined.norm2(), wanted.reshape(B, -1).square().sum(1), rtol=1e-10, atol=1e-12)


class TestWindowsPlane(TestWindows):
    sizes = (1, 4, 6, (6, 5), (3, 2))
    geometry = Geometry((2, 1), (1, 2), (1, 2), 2)


class TestWindowsByPixels(TestWindows):
    sizes, route = (1, 24, 20, (4, 4), (3, 3)), Route.PIXELS
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)

    @pytest.fixture(autouse=True)
    def _without_a_kernel(self, monkeypatch):
        monkeypatch.setattr(dispatch, "suit_windows", lambda input, grad: False)


class TestWindowsUnfolded(TestWindows):
    sizes, route = (1, 30, 40, (9, 9), (3, 3)), Route.WINDOWS
    geometry = Geometry((4, 4), (1, 1), (1, 1), 1)


class TestWindowsFolded(TestWindows):
    sizes = (2, 24, 20, (4, 4), (3, 3))
    geometry = Geometry((1, 1), (1, 1), (2, 1), 1)


class TestWindowsKept(TestWindows):
    sizes, route = (2, 4, 4, (9, 9), (3, 3)), Route.KEEP
    geometry = Geometry((1, 1), (1, 1), (1, 1), 4)


class TestWindowsSpace(TestWindows):
    sizes = (1, 2, 2, (4, 3, 5), (2, 2, 3))
    geometry = Geometry((1, 2, 1), (0, 1, 1), (1, 1, 2), 1)


class TestTied(FormContract):
    sizes = (4, 7)  # positions of the head, of the lookup

    def make(self, seed, dtype=torch.float64):
        positions, places = self.sizes
        ids = torch.randint(0, 6, (B, places), generator=torch.Generator().manual_seed(seed))
        input, grad, rows = _draw(seed, dtype, (B, 1, positions, 3), (B, 1, positions, 6), (B, places, 3))
        return Tied(Lookup(ids, rows, 6), Outer(input, grad, torch.Size((6, 3))))

    def by_hand(self, form):
        return TestLookup.by_hand(self, form.lookup) + TestOuter.by_hand(self, form.outer)

    def poison(self, form, bad, value):
        return Tied(FormContract.poison(self, form.lookup, bad, value), form.outer)

    def scaled(self, form, scale):
        return Tied(FormContract.scaled(self, form.lookup, scale), FormContract.scaled(self, form.outer, scale))

    def test_uses_that_oppose_each_other_keep_their_rounding(self):
        """A lookup that undoes the head: the norm must bound what the sum leaves behind, not the exact zero."""
        for seed in range(20):
            input, grad = (1e3 * value for value in _draw(seed, torch.float32, (B, 1, 1, 24), (B, 1, 1, 6)))
            rows = -(grad[:, 0, 0, :, None] * input[:, 0, 0, None, :])
            form = Tied(Lookup(torch.arange(6).repeat(B, 1), rows, 6), Outer(input, grad, torch.Size((6, 24))))
            for b in range(B):
                unit = torch.zeros(B)
                unit[b] = 1
                assert form.weighted_sum(unit).norm() <= form.quick_norm2()[b].sqrt() * (1 + 2.0**-18)


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
        form = Outer(*(torch.cat([value, value]) for value in (form.input, form.grad)), form.shape)
        assert form.choice.route is Route.GRAM
        added = form.weighted_sum(torch.tensor([1.0, 0.0])).double().norm()
        assert float(added) <= float(form.norm2()[0].sqrt()) * (1 + 2.0**-18)
        assert float(added) <= float(form.quick_norm2()[0].sqrt()) * (1 + 2.0**-18)


@pytest.mark.parametrize("positions", [1, 2, 5, 50, 5000])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 64), (64, 64), (768, 3072)])
@pytest.mark.parametrize("examples", [1, 2, 64])
def test_what_is_kept_is_never_more_than_what_would_be_booked(positions, inputs, outputs, examples):
    cost = Cost(positions, inputs, outputs, examples)
    choice = cost.choose()
    if choice.route is Route.KEEP:
        assert cost.kept <= positions * (inputs + outputs)
        assert choice.keep <= choice.gram
    elif choice.route is Route.GRAM:
        assert choice.gram < choice.keep or choice.kept > choice.booked
    else:
        assert positions == 1


@pytest.mark.parametrize("prices", [CPU, PANELS, ACCELERATOR, KERNELS, TENSOR_CORES])
@pytest.mark.parametrize(("positions", "width"), [(254, 512), (248, 512), (8, 256), (192, 512), (2, 4)])
def test_an_example_more_sends_none_another_way(positions, width, prices):
    """Routes round norms up by different amounts: 128 opposed examples moved by 66 bounds when the next one came."""
    costs = [Cost(positions, width, width, examples, prices=prices) for examples in range(1, 200)]
    windows = [WindowCost(positions, width, 8, count, 300, 4, prices=prices) for count in range(1, 200)]
    assert len({cost.choose().route for cost in costs}) == 1
    assert len({cost.choose().route for cost in windows}) == 1


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ((1024, 576, 64, 32, 1156, 9), Route.KEEP),  # ResNet-18, stage 1, at 32 x 32
        ((64, 2304, 256, 32, 100, 9), Route.PIXELS),  # stage 3
        ((16, 4608, 512, 32, 36, 9), Route.PIXELS),  # stage 4
        ((64, 1152, 256, 32, 324, 9), Route.WINDOWS),  # entry to stage 3, stride 2
        ((196, 64, 16, 256, 1156, 64), Route.KEEP),
    ],
)
def test_convolutions_take_the_route_that_was_measured_to_be_fastest(shape, route):
    assert WindowCost(*shape).choose().route is route


@pytest.mark.parametrize("positions", [1, 2])
def test_tiny_gradients_are_seen_beside_huge_inputs(positions):
    """Squares of 3e-23 vanish in float32, and inputs of 5e16 bring them back: a fifth of the bound, were they lost."""
    input = torch.full((2, 1, positions, 40), 5e16)
    grad = torch.full((2, 1, positions, 50), 3e-23)
    form = Outer(input, grad, torch.Size((50, 40)))
    assert form.choice.route is (Route.PRODUCT if positions == 1 else Route.GRAM)
    assert torch.isnan(form.quick_norm2()).all()
    wanted = form.per_example().double().reshape(2, -1).norm(dim=1)
    assert (form.norm2().sqrt() >= wanted * (1 - 1e-6)).all()
    assert (form.norm2().sqrt() <= wanted * 1.001).all()


@pytest.mark.parametrize("width", [513, 4096, 50_257])
def test_wide_features_of_one_size_keep_their_norm(width):
    """What a head of so many words has: one size everywhere, and positions that oppose each other but for a little."""
    for value in (1.4406780004501343, 1.2542372941970825):
        grad = torch.full((1, 1, 6, width), value)
        input = torch.eye(6)[:, :1].expand(6, 3).reshape(1, 1, 6, 3).clone()
        input[0, 0, 1] = -input[0, 0, 0] * (1 - 2**-12)
        form = Outer(input, grad, torch.Size((width, 3)))
        wanted = form.per_example().double().norm()
        assert float(form.quick_norm2().sqrt()) >= float(wanted)


@pytest.mark.parametrize("width", [4096, 25_088, 150_528, 1_000_000])
def test_wide_rows_of_one_size_keep_their_length(width):
    """A flattened image into a linear layer: in float32 a million equal squares add up to 0.14 % too little."""
    for value in (1.1, 0.7, 1.3):
        form = Outer(torch.full((1, 1, 1, width), value), torch.ones(1, 1, 1, 2), torch.Size((2, width)))
        wanted = form.weighted_sum(torch.ones(1, dtype=torch.float64)).double().norm()
        assert float(form.quick_norm2().sqrt()) >= float(wanted) * (1 - 4e-6)


def test_the_norm_of_a_wide_head_is_exact():
    """50,257 words: the bound on rounding may not show in the clipping, as 1 % of a norm would."""
    input, grad = _draw(0, torch.float32, (2, 1, 128, 64), (2, 1, 128, 50_257))
    form = Outer(input, grad, torch.Size((50_257, 64)))
    with forced(Route.GRAM):
        found = form.quick_norm2().sqrt()
    wanted = (form.grad.double()[:, 0].mT @ form.input.double()[:, 0]).flatten(1).norm(dim=1)
    assert (found >= wanted).all()
    torch.testing.assert_close(found, wanted, rtol=3e-4, atol=0)
