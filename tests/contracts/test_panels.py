"""The compiled products of a processor keep the contract of products, with either kind of vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.products import EPS, ProductContract, draw, each, met, pair
from discreet.core import team
from discreet.core.clipping import Clipping
from discreet.core.forms import wide
from discreet.core.gradient import clipped_gradient
from discreet.core.kernels import processor
from discreet.core.kernels.processor import Spread
from discreet.core.kernels.results import HARMLESS
from discreet.core.route import Route, forced
from discreet.core.windows import Geometry, Windows

pytestmark = pytest.mark.skipif(not processor._is_there(), reason="no compiled products for this processor")


class TestGramPanels(ProductContract):
    narrow = False

    def total(self, input, grad):
        operands = [Spread(wide(input))], [Spread(wide(grad))]
        found = processor.gram_norm2(*operands, rounded=False, narrow=self.narrow)
        return found, 4 + sum(values[0].places.spacings for values in operands)

    def norm2(self, input, grad, *, harmless=HARMLESS):
        operands = [Spread(wide(input))], [Spread(wide(grad))]
        return processor.gram_norm2(*operands, harmless=harmless, narrow=self.narrow)

    @pytest.mark.parametrize("positions", [1, 5, 16, 50, 97])
    def test_several_operands_stand_for_all_their_pairs(self, positions):
        inputs = draw(1, torch.float32, (3, 1, positions, 20), (3, 1, positions, 700))
        grads = draw(2, torch.float32, (3, 1, positions, 33), (3, 1, positions, 4), (3, 1, positions, 64))
        spread = [[Spread(value) for value in values] for values in (inputs, grads)]
        found = processor.gram_norm2(*spread, rounded=False, narrow=self.narrow)
        wanted = sum(each(x, g).square().flatten(1).sum(1) for x in inputs for g in grads)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
        assert (processor.gram_norm2(*spread, narrow=self.narrow) >= wanted).all()

    @pytest.mark.parametrize("sizes", [(3, 2, 5, 7, 40), (1, 1, 300, 17, 16), (2, 1, 64, 33, 100), (2, 3, 1, 1, 1)])
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (2, 0, 1, 3), (3, 2, 1, 0)])
    def test_products_are_float64s_within_their_bound(self, sizes, order):
        input, grad = (_laid_out(value, order) for value in pair(sizes, torch.float32))
        found, norm2 = processor.products(Spread(input), Spread(grad), narrow=self.narrow)
        lengths = grad.double().abs().mT @ input.double().abs()
        assert found.shape == lengths.shape
        assert ((found - each(input, grad)).abs() <= (sizes[2] + 1) * EPS * lengths).all()
        torch.testing.assert_close(norm2, _squares(found), rtol=1e-14, atol=0.0)

    @pytest.mark.parametrize("hostile", [torch.nan, torch.inf, 1e38, 1e-30])
    def test_what_one_example_holds_is_seen_in_its_own_products_alone(self, hostile):
        input, grad = pair((3, 2, 300, 9, 20), torch.float32)
        wanted = processor.products(Spread(input), Spread(grad), narrow=self.narrow)
        for changed in (input.clone(), grad.clone()):
            changed[1, 1, 299, -1] = hostile
            operands = (changed, grad) if changed.shape == input.shape else (input, changed)
            products, norm2 = processor.products(*map(Spread, operands), narrow=self.narrow)
            assert torch.equal(norm2.isnan(), _squares(products).isnan())
            torch.testing.assert_close(norm2, _squares(products), rtol=1e-14, atol=0.0, equal_nan=True)
            assert torch.equal(norm2.isfinite(), products.isfinite().flatten(1).all(1))
            assert norm2[::2].isfinite().all()
            for one, other in zip(wanted, (products, norm2), strict=True):
                assert torch.equal(one[::2], other[::2])


class TestGramNarrowPanels(TestGramPanels):
    """AVX2, which a processor with AVX-512 has too."""

    narrow = True


def _squares(products):
    return products.double().square().flatten(1).sum(1)


def _laid_out(value, order):
    """The same numbers, with the axes in this order in memory."""
    return value.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])


def _in_threads(threads, function):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(threads, openmp, monkeypatch):
    input, grad = (Spread(value) for value in pair((5, 2, 70, 90, 40), torch.float32))

    def run():
        return processor.gram_norm2([input], [grad]), *processor.products(input, grad)

    alone = _in_threads(1, run)
    if not openmp:
        monkeypatch.setattr(team, "_parallel", None)
    together = _in_threads(threads, run)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


IMAGES = (  # folds, channels, groups, image, outputs, kernel, stride, padding, dilation
    (1, 3, 1, (9,), 5, (3,), (1,), (1,), (1,)),
    (2, 4, 2, (7, 8), 6, (3, 2), (1, 1), (0, 0), (1, 1)),
    (1, 1, 1, (28, 28), 16, (8, 8), (2, 2), (3, 3), (1, 1)),
    (1, 16, 1, (13, 13), 32, (4, 4), (2, 2), (0, 0), (1, 1)),
    (1, 20, 1, (8, 8), 17, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 18, 1, (16, 4), 33, (1, 1), (1, 2), (0, 0), (1, 1)),
    (1, 300, 1, (6, 34), 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 7, 1, (16, 16), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 6, 3, (9, 11), 9, (2, 3), (2, 1), (2, 3), (2, 2)),
    (1, 2, 1, (5, 6, 7), 4, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    (1, 8, 8, (6, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 5, 1, (16,), 6, (3,), (1,), (1,), (1,)),  # of 18 pixels the last are an order of their own, and one is no zero
    (1, 80, 2, (4, 5), 4, (3, 3), (1, 1), (0, 2), (1, 1)),
)


def _image(image):
    folds, channels, _, size, outputs, kernel, stride, padding, dilation = image
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(wide + 2 * pad - gap * (taps - 1) - 1) // step + 1 for wide, taps, step, pad, gap in spans]
    return draw(3, torch.float32, (4, folds, channels, *size), (4, folds, outputs, *out))


def _channels_last(value):
    return value.movedim(2, -1).contiguous().movedim(-1, 2)


def _among_others(value):
    """The same numbers with steps between them, over which there is nothing to be read."""
    room = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), torch.nan)
    return room[..., 1::2].copy_(value)


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("route", [Route.WINDOWS, Route.PIXELS, Route.KEEP])
@pytest.mark.parametrize("channels_last", [False, True])
def test_windows_are_read_where_they_lie(image, route, channels_last):
    """Norms and gradients of a convolution, against its own unfolded windows in float64."""
    _, channels, groups, _, outputs, kernel, stride, padding, dilation = image
    input, grad = _image(image)
    if channels_last:
        input, grad = _channels_last(input), _channels_last(grad)
    shape = torch.Size((outputs, channels // groups, *kernel))
    geometry = Geometry(stride, padding, dilation, groups)
    form, exact = Windows(input, grad, shape, geometry), Windows(input.double(), grad.double(), shape, geometry)
    with forced(route):
        assert form.choice.route is route
        norm2 = form.quick_norm2()
    wanted = exact.unfolded().norm2()
    bound = 200 * EPS * met(exact.unfolded().input, exact.unfolded().grad).square()
    assert ((norm2 - wanted).abs() <= bound).all()
    assert (norm2 >= wanted * (1 - 1e-6)).all()
    torch.testing.assert_close(form.per_example().double(), exact.per_example(), rtol=1e-4, atol=1e-4)
    if route is Route.KEEP:
        kept = form.reduced()
        torch.testing.assert_close(kept.quick_norm2(), _squares(kept.grad), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("laid", [torch.clone, _channels_last, _among_others])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_zeros_that_the_kernel_puts_around_change_no_bit(image, laid, narrow, threads, monkeypatch):
    monkeypatch.setattr(processor, "_ALONE", 1)
    _, _, groups, size, _, kernel, stride, padding, dilation = image
    input, grad = _image(image)
    out, none, one = grad.shape[3:], (0,) * len(size), (1,) * len(size)
    padded = F.pad(input, [pad for pad in reversed(padding) for _ in range(2)])
    wanted, found = [], []
    for value, around, results in ((padded, none, wanted), (laid(input), padding, found)):
        grads = processor.Windows(laid(grad), out, one, one, none, one, groups)
        rows, pixels = (
            processor.Windows(value, out, kernel, stride, around, dilation, groups, by_pixel=told)
            for told in (False, True)
        )
        for windows in (rows, pixels):
            norm2 = _in_threads(threads, lambda a=windows, b=grads: processor.gram_norm2([a], [b], narrow=narrow))
            products = _in_threads(threads, lambda a=windows, b=grads: processor.products(a, b, narrow=narrow))
            results += [norm2, *products]
        assert torch.equal(results[-2], results[-5])  # sums by pixels are those by windows
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_defaults_of_a_program_are_not_its_results(dtype):
    """Memory that is written to is float32 on a processor, whatever tensors are by default."""
    input, grad = pair((3, 1, 37, 20, 33), torch.float32)
    wanted = each(input, grad)
    processor._places.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            products, squares = processor.products(Spread(input), Spread(grad))
            norm2 = processor.gram_norm2([Spread(input)], [Spread(grad)])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(products.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm2, _squares(wanted), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(squares, _squares(products), rtol=1e-14, atol=0.0)


def test_operands_without_number_are_refused():
    with pytest.raises(ValueError, match="operands: a tuple of 1 to 16"):
        processor._compiled.gram_norm2((), (), 1, 1, (0.0, 0.0, 0.0, 0.0), 0, 0, False, 0, 0, 1, 0)


def test_operands_of_other_sizes_are_not_read():
    input, grad = (Spread(value) for value in pair((2, 1, 30, 4, 5), torch.float32))
    for other in (grad.value[:1], grad.value[:, :, :29], grad.value.expand(2, 2, 30, 5)):
        with pytest.raises(AssertionError, match="past their ends"):
            processor.gram_norm2([input], [Spread(other)])
        with pytest.raises(AssertionError, match="past their ends"):
            processor.products(input, Spread(other))
    with pytest.raises(AssertionError, match="no plain float32"):
        processor.gram_norm2([input], [Spread(grad.value.bfloat16())])


def _windows(**other):
    usual = {"value": torch.randn(2, 1, 4, 5), "output": (4,), "kernel": (3,), "stride": (1,), "padding": (1,)}
    return processor.Windows(**{**usual, "dilation": (1,), "groups": 1, "by_pixel": False, **other})


@pytest.mark.parametrize("by_pixel", [False, True])
def test_windows_beyond_their_image_are_not_read(by_pixel):
    grad = [Spread(torch.randn(2, 1, 4, 5))]
    assert processor.gram_norm2([_windows(by_pixel=by_pixel)], grad).shape == (2,)
    assert processor.gram_norm2([_windows(by_pixel=by_pixel, output=(1,), dilation=(3,))], [_rows(1)]).shape == (2,)
    for wrong in (
        {"output": (6,)},
        {"output": (0,)},
        {"kernel": (5,)},
        {"kernel": (0,)},
        {"stride": (2,)},
        {"stride": (0,)},
        {"dilation": (2,)},
        {"dilation": (0,)},
        {"padding": (0,), "output": (4,)},
        {"padding": (-1,), "output": (1,)},
        {"groups": 3},
        {"value": torch.randn(2, 1, 4, 3)},
        {"value": torch.randn(2, 1, 0, 5)},
    ):
        with pytest.raises(AssertionError, match="read past"):
            _windows(by_pixel=by_pixel, **wrong)
    four = (1,) * 4
    with pytest.raises(AssertionError, match="read past"):
        processor.Windows(torch.randn(2, 1, 4, *four), four, four, four, (0,) * 4, four, 1, by_pixel=by_pixel)
    with pytest.raises(ValueError, match="zip"):
        _windows(by_pixel=by_pixel, kernel=(3, 1))


def _rows(positions):
    return Spread(torch.randn(2, 1, positions, 5))


@pytest.mark.parametrize("by_pixel", [False, True])
def test_windows_come_alone(by_pixel):
    windows, rows = _windows(by_pixel=by_pixel), _rows(4)
    for operands in (([windows, windows], [rows]), ([rows], [windows])):
        with pytest.raises(ValueError, match="the only operand"):
            processor.gram_norm2(*operands)
    with pytest.raises(ValueError, match="the only operand"):
        processor.products(rows, windows)
    assert processor.products(windows, rows)[0].shape == (2, 1, 5, 12)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, torch.tensor])
def test_numbers_of_another_kind_do_not_overflow_where_windows_lie(kind):
    """A stride of numpy's small integers led the compiled code past an image, and left its places to plain ones."""
    model = nn.Conv2d(16, 4, 3)
    images = torch.randn(3, 16, 8, 64)
    twos = (kind(2), kind(2))

    def summed(stride: Any, batch: Tensor) -> Tensor:
        def losses(network: nn.Module, some: Tensor) -> Tensor:
            return F.conv2d(some, network.weight, network.bias, stride=stride).square().flatten(1).sum(1)

        return clipped_gradient(model, losses, batch, clipping=Clipping.none()).tensors["weight"]

    found = summed(twos, images)
    model.zero_grad()
    F.conv2d(images, model.weight, model.bias, stride=2).square().sum().backward()
    assert torch.allclose(found, model.weight.grad, rtol=1e-4, atol=1e-2)
    assert torch.equal(summed((2, 2), images), found)
