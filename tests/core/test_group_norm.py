"""All gradients of a group norm in one compiled pass, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contracts.products import EPS, draw
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.kernels import dispatch, scales
from discreet.train.check import check

needs_compiled = pytest.mark.skipif(scales._compiled is None, reason="the compiled module was not built here")
SIZES = [(1, 1, 1, 1), (2, 3, 2, 5), (3, 2, 4, 64), (2, 4, 1, 1024), (1, 2, 3, 2049), (2, 1, 8, 6000), (4, 8, 2, 71)]
"""Rows, groups, channels of each, pixels."""
CHAIN = 2048 // 16 + 8
"""Additions that follow one another at most: of a line in the vectors of four lanes, and a few more."""


@pytest.fixture(autouse=True)
def _unwritten_memory_is_no_number():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[16, 8, 4], ids="by {}".format)
def widest(request, monkeypatch):
    monkeypatch.setattr(scales, "_WIDEST", request.param)


def _operands(sizes, seed=0, offset=0.0):
    rows, groups, channels, pixels = sizes
    shape = (rows, groups * channels, pixels)
    input, grad, weight = draw(seed, torch.float32, shape, shape, (groups * channels,))
    input += offset
    by_group = input.reshape(rows, groups, -1)
    return input, grad, by_group.mean(2), by_group.var(2, unbiased=False).add(1e-5).rsqrt(), weight


def _gradients(operands):
    """The three gradients, and what bounds how they may be rounded; float64."""
    input, grad, mean, rstd, weight = (value.double() for value in operands)
    rows, groups = mean.shape
    shape = (rows, groups, input.shape[1] // groups, -1)
    grad, middle, width = grad.reshape(shape), mean[..., None, None], rstd[..., None, None]
    normal, inner = (input.reshape(shape) - middle) * width, grad * weight.reshape(1, groups, -1, 1)
    level, steep = (value.mean((2, 3), keepdim=True) for value in (inner, inner * normal))
    found = width * (inner - level - normal * steep), (grad * normal).sum(3), grad.sum(3)
    level, steep = (value.abs().mean((2, 3), keepdim=True) for value in (inner, inner * normal))
    sizes = width * (inner.abs() + level + normal.abs() * steep), (grad * normal).abs().sum(3), grad.abs().sum(3)
    flat = [value.reshape(rows, input.shape[1], -1) for value in (found[0], sizes[0])]
    return (flat[0], *(v.flatten(1) for v in found[1:])), (flat[1], *(v.flatten(1) for v in sizes[1:]))


def _assert_within_rounding(found, operands):
    for one, wanted, size in zip(found, *_gradients(operands), strict=True):
        assert one.dtype is torch.float32
        assert one.shape == wanted.shape
        assert ((one - wanted).abs() <= CHAIN / 2 * EPS * size).all()


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradients_are_float64s(sizes, offset):
    operands = _operands(sizes, offset=offset)
    _assert_within_rounding(scales.group_grads(*operands, input_grad=True), operands)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 300)),
    widest=st.sampled_from([16, 8, 4]),
)
def test_gradients_of_any_size_are_float64s(sizes, widest):
    operands = _operands(sizes, seed=sum(sizes))
    before, scales._WIDEST = scales._WIDEST, widest
    try:
        _assert_within_rounding(scales.group_grads(*operands, input_grad=True), operands)
    finally:
        scales._WIDEST = before


@needs_compiled
@pytest.mark.usefixtures("widest")
def test_long_lines_of_one_sign_do_not_drift():
    input, grad, mean, rstd, weight = _operands((1, 1, 1, 3_000_000))
    operands = (torch.full_like(input, 1.1), torch.full_like(grad, 0.3), mean.zero_(), torch.ones_like(rstd), weight)
    _assert_within_rounding(scales.group_grads(*operands, input_grad=True), operands)


@needs_compiled
@pytest.mark.usefixtures("widest")
def test_the_gradient_of_the_input_is_left_out_where_nobody_asks_for_it():
    operands = _operands((3, 2, 2, 70))
    whole, part = (scales.group_grads(*operands, input_grad=asked) for asked in (True, False))
    assert part[0] is None
    assert all(map(torch.equal, whole[1:], part[1:]))


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("sizes", [(1, 7, 2, 100), (5, 1, 3, 33), (3, 32, 1, 64)], ids=str)
def test_threads_change_no_bit(sizes, monkeypatch):
    monkeypatch.setattr(scales, "_ALONE", 1)
    operands, before = _operands(sizes), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = scales.group_grads(*operands, input_grad=True)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert all(map(torch.equal, scales.group_grads(*operands, input_grad=True), alone))
    finally:
        torch.set_num_threads(before)


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("pixel", [0, 15, 64, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_in_its_group(value, pixel):
    """No other example hears of it, whatever is spoilt: an entry, or a statistic."""
    operands = _operands((3, 4, 2, 100))
    clean = scales.group_grads(*operands, input_grad=True)
    hit = torch.zeros(3, 8, dtype=torch.bool)
    hit[1, 2:4] = True  # the channels of group 1
    for which in range(4):
        spoilt = [operand.clone() for operand in operands]
        spoilt[which][(1, 2, pixel) if which < 2 else (1, 1)] = value
        found = scales.group_grads(*spoilt, input_grad=True)
        for one, before in zip(found, clean, strict=True):
            assert torch.equal(one[~hit], before[~hit])
        assert not found[1][1, 2].isfinite() or (which == 3 and value == 0)
        assert not found[0][1, 2:4].isfinite().all()


@needs_compiled
def test_operands_of_other_sizes_are_not_read():
    operands = _operands((2, 3, 2, 30))
    for which, wrong in (
        (1, operands[1][:1]),
        (1, operands[1][..., :29]),
        (0, operands[0].mT.contiguous().mT),
        (1, operands[1].double()),
        (2, operands[2][:1]),
        (3, operands[3].bfloat16()),
        (3, operands[3][:, :2]),
        (4, operands[4][:5]),
        (4, operands[4].to("meta")),
    ):
        given = [*operands[:which], wrong, *operands[which + 1 :]]
        with pytest.raises(AssertionError, match="read past its end"):
            scales.group_grads(*given, input_grad=True)
    with pytest.raises(AssertionError, match="read past its end"):  # four groups of six channels
        scales.group_grads(*operands[:2], torch.ones(2, 4), torch.ones(2, 4), operands[4], input_grad=True)


def test_only_plain_float32_numbers_of_a_few_pixels_are_the_kernels():
    value = torch.ones(2, 6, 4, 4)
    assert dispatch.suit_groups(value, value, pixels=16) == (scales._compiled is not None)
    assert not dispatch.suit_groups(value, value, pixels=15)
    for other in (value.double(), value.bfloat16(), value.to("meta"), value[:0], torch._neg_view(value)):
        assert not dispatch.suit_groups(value, other, pixels=16)


class _Normalised(nn.Module):
    """A group norm whose input and incoming gradient may lie in memory otherwise than they are read."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(3, 6, affine=case != "no scale")
        if case != "no scale":
            nn.init.normal_(self.norm.weight)
            self.norm.weight.requires_grad_(case != "shift alone")
            self.norm.bias.requires_grad_(case != "scale alone")
        self.first.requires_grad_(case != "first of all")

    def forward(self, x):
        value = self.first(x.flatten(0, 1) if self.case == "folded" else x)
        value = value.to(memory_format=torch.channels_last) if self.case == "channels last" else value
        value = self.norm(value)
        value = value.mean((2, 3)) if self.case == "expanded" else value.sin().flatten(1)
        return value.reshape(len(x), -1)


CASES = ["", "folded", "channels last", "expanded", "shift alone", "scale alone", "first of all", "no scale"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("examples", [2, 5])
def test_a_group_norm_takes_the_kernel_and_is_the_one_in_float64(case, examples, monkeypatch):
    torch.manual_seed(4)
    model = _Normalised(case)
    folds = (2,) if case == "folded" else ()
    batch = (torch.randn(examples, *folds, 3, 7, 9), torch.randn(examples))

    def loss(model, batch):
        return (model(batch[0]).sum(1) - batch[1]).square()

    layout, clipping = check(model, loss, batch).layout, Clipping.abadi(0.1)
    called, plain = [], dispatch.group_grads

    def spy(*operands, input_grad):
        called.append(input_grad)
        return plain(*operands, input_grad=input_grad)

    monkeypatch.setattr(dispatch, "group_grads", spy)
    found = clipped_gradient(model, loss, batch, clipping=clipping, layout=layout).tensors
    guarded = case != "no scale"
    assert called == ([case != "first of all"] if guarded and scales._compiled else [])
    wide_batch = tuple(value.double() for value in batch)
    wide = clipped_gradient(model.double(), loss, wide_batch, clipping=clipping, layout=layout).tensors
    assert len(called) == (guarded and scales._compiled is not None)
    for name, value in wide.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6)
