"""Gradients of a normalisation's scale and shift in one compiled pass, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contracts.products import EPS, draw
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.kernels import dispatch, scales

needs_compiled = pytest.mark.skipif(scales._compiled is None, reason="the compiled module was not built here")
SIZES = [(1, 1, 1), (3, 2, 5), (2, 8, 16), (4, 65, 192), (2, 127, 33), (1, 128, 48), (2, 129, 20), (1, 300, 1050)]
CHAIN = 32
"""Additions that follow one another: eight positions, the eights of a block (or single ones), and products before."""


@pytest.fixture(autouse=True)
def _unwritten_memory_is_no_number():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[16, 8, 4], ids="by {}".format)
def widest(request, monkeypatch):
    monkeypatch.setattr(scales, "_WIDEST", request.param)


@pytest.fixture
def threads():
    """Sets how many there are, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _operands(sizes, seed=0, offset=0.0):
    input, grad = draw(seed, torch.float32, sizes, sizes)
    input += offset
    return input, grad, input.mean(2), input.var(2, unbiased=False).add(1e-5).rsqrt()


def _terms(input, grad, mean, rstd):
    """What is added up over positions, float64."""
    grad = grad.double()
    return grad * ((input.double() - mean.double()[..., None]) * rstd.double()[..., None]), grad


def _assert_within_rounding(found, operands):
    rows, _, width = operands[0].shape
    # A difference errs by half a spacing of itself; products and sums by half a spacing of each.
    for one, terms in zip(found, _terms(*operands), strict=True):
        assert one.dtype is torch.float32
        assert one.shape == (rows, width)
        assert ((one - terms.sum(1)).abs() <= CHAIN / 2 * EPS * terms.abs().sum(1)).all()


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_sums_are_float64s(sizes, offset):
    operands = _operands(sizes, offset=offset)
    _assert_within_rounding(scales.scale_grads(*operands), operands)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 280), st.integers(1, 90)), widest=st.sampled_from([16, 8, 4]))
def test_sums_of_any_size_are_float64s(sizes, widest):
    operands = _operands(sizes, seed=sum(sizes))
    before, scales._WIDEST = scales._WIDEST, widest
    try:
        _assert_within_rounding(scales.scale_grads(*operands), operands)
    finally:
        scales._WIDEST = before


@needs_compiled
@pytest.mark.usefixtures("widest")
def test_long_sums_of_one_sign_do_not_drift():
    """300,000 positions one after another would err by a hundred times as much."""
    input, grad, mean, rstd = _operands((1, 300_000, 3))
    operands = (torch.full_like(input, 1.1), torch.full_like(grad, 0.3), torch.zeros_like(mean), torch.ones_like(rstd))
    _assert_within_rounding(scales.scale_grads(*operands), operands)


@needs_compiled
def test_vectors_of_either_kind_make_the_same_bits(monkeypatch):
    """AVX2 and AVX-512, which both multiply and add in one rounding; what is narrower rounds twice."""
    operands = _operands((2, 200, 61))
    wide = scales.scale_grads(*operands)
    monkeypatch.setattr(scales, "_WIDEST", 8)
    assert all(map(torch.equal, scales.scale_grads(*operands), wide))


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("sizes", [(1, 40, 100), (2, 200, 33), (5, 9, 64), (11, 3, 5), (9, 9, 2500)], ids=str)
def test_threads_change_no_bit(sizes, threads, monkeypatch):
    monkeypatch.setattr(scales, "_ALONE", 1)
    operands = _operands(sizes)
    threads(1)
    alone = scales.scale_grads(*operands)
    for count in (2, 3, 8):
        threads(count)
        assert all(map(torch.equal, scales.scale_grads(*operands), alone))


@needs_compiled
@pytest.mark.usefixtures("widest")
@pytest.mark.parametrize("position", [0, 7, 64, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_with_its_example(value, position):
    """And with its column where a gradient, or an entry behind statistics that are numbers, is none."""
    operands = _operands((3, 100, 37))
    clean = scales.scale_grads(*operands)
    for which in range(4):
        spoilt = [operand.clone() for operand in operands]
        at = (1, position, 20)[: spoilt[which].dim()]
        spoilt[which][at] = value
        scale, shift = scales.scale_grads(*spoilt)
        hit = torch.zeros(3, 37, dtype=torch.bool)
        hit[1, 20 if which < 2 else slice(None)] = True
        assert (scale.isfinite() == ~hit).all()
        assert (shift.isfinite() == ~(hit & (which == 1))).all()
        assert torch.equal(scale[~hit], clean[0][~hit])
        assert torch.equal(shift.nan_to_num(0, 0, 0), clean[1].where(shift.isfinite(), torch.zeros(())))


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_of_a_program_are_not_its_results(dtype):
    operands = _operands((3, 37, 20))
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = scales.scale_grads(*operands)
    finally:
        torch.set_default_dtype(torch.float32)
    _assert_within_rounding(found, operands)


@needs_compiled
def test_operands_of_other_sizes_are_not_read():
    operands = _operands((2, 30, 4))
    for which, wrong in (
        (1, operands[1][:1]),
        (1, operands[1][:, :, :3]),
        (1, operands[1][..., 0]),
        (2, operands[2][:, :29]),
        (3, operands[3].unsqueeze(2)),
        (0, operands[0].mT.contiguous().mT),
        (1, operands[1].expand(2, 30, 4).double()),
        (2, operands[2].bfloat16()),
        (3, operands[3].to("meta")),
    ):
        given = [*operands[:which], wrong, *operands[which + 1 :]]
        with pytest.raises(AssertionError, match="read past its end"):
            scales.scale_grads(*given)


def test_only_sums_of_plain_float32_numbers_are_the_kernels(monkeypatch):
    value = torch.ones(2, 5, 3)
    assert dispatch.suit_scales(value, value, positions=5) == (scales._compiled is not None)
    assert not dispatch.suit_scales(value, value, positions=1)
    for other in (value.double(), value.bfloat16(), value.half(), value.to("meta"), value[:0], torch._neg_view(value)):
        assert not dispatch.suit_scales(value, other, positions=5)
    monkeypatch.setattr(scales, "_compiled", None)
    assert not dispatch.suit_scales(value, value, positions=5)


class _Normalised(nn.Module):
    """A layer norm whose incoming gradient may lie in memory otherwise than its input."""

    def __init__(self, shape, turned, **options):
        super().__init__()
        self.first, self.norm = nn.Linear(shape[-1], shape[-1]), nn.LayerNorm(shape, **options)
        self.turned = turned

    def forward(self, x):
        value = self.norm(self.first(x))
        if self.turned == "transposed":
            value = value.mT.contiguous().mT * 1.0
        return value.mean(1) if self.turned == "expanded" else value.sin().flatten(1)


def _spied(monkeypatch):
    called, plain = [], dispatch.scale_grads

    def spy(*operands):
        called.append(operands[0].shape)
        return plain(*operands)

    monkeypatch.setattr(dispatch, "scale_grads", spy)
    return called


@pytest.mark.parametrize("sizes", [(6, 37, 20), (1, 37, 20), (4, 3, 9, 20)], ids=str)
@pytest.mark.parametrize("turned", ["", "transposed", "expanded"])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=str)
def test_a_layer_norm_takes_the_kernel_and_is_the_one_in_float64(sizes, turned, options, monkeypatch):
    torch.manual_seed(4)
    model = _Normalised(sizes[-1:], turned, **options)
    nn.init.normal_(model.norm.weight)
    batch = (torch.randn(sizes), torch.randn(sizes[0]))

    def loss(model, batch):
        return (model(batch[0]).flatten(1).sum(1) - batch[1]).square()

    called, clipping = _spied(monkeypatch), Clipping.abadi(0.1)
    found = clipped_gradient(model, loss, batch, clipping=clipping).tensors
    assert called == ([(sizes[0], batch[0][0, ..., 0].numel(), 20)] if scales._compiled else [])
    wide = clipped_gradient(model.double(), loss, tuple(v.double() for v in batch), clipping=clipping).tensors
    assert len(called) == (scales._compiled is not None)
    for name, value in wide.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["shift alone", "one position", "two axes", "bfloat16"])
def test_what_the_kernel_brings_nothing_is_left_to_pytorch(case, monkeypatch):
    called = _spied(monkeypatch)
    model = nn.LayerNorm((5, 12) if case == "two axes" else 12)
    model.weight.requires_grad_(case != "shift alone")
    x = torch.randn(3, 12) if case == "one position" else torch.randn(3, 5, 12)
    if case == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    clipped_gradient(model, lambda m, x: F.silu(m(x)).float().flatten(1).sum(1), x, clipping=Clipping.abadi(1.0))
    assert called == []


@pytest.mark.parametrize("positions", [1, 40])
def test_layer_norm_in_half_precision_keeps_its_own_kernels_and_its_digits(positions, monkeypatch):
    """Scale and shift get gradients that are added up in float32: a sum in bfloat16 is off by a percent and more."""
    monkeypatch.setattr("discreet.core.rules.normalisation.affine", None)
    model = nn.LayerNorm(12).bfloat16()
    nn.init.normal_(model.weight)
    x, g = (torch.randn(3, positions, 12).bfloat16() for _ in range(2))

    def met(m, batch):
        return (m(batch["x"]) * batch["g"]).float().flatten(1).sum(1)

    found = clipped_gradient(model, met, {"x": x, "g": g}, clipping=Clipping.abadi(1e6))
    exact = F.layer_norm(x.double(), (12,))
    wanted = {"weight": (exact * g.double()).sum((0, 1)), "bias": g.double().sum((0, 1))}
    for name, value in wanted.items():
        gap = float((found.tensors[name].double() - value).norm() / value.norm())
        assert gap < (3e-3 if name == "weight" else 1e-3), name
