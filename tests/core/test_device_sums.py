"""Kernels behind the sums of an accelerator: their chain of factors, scales and shifts, and digests of what they are.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contracts.products import draw, each, needs_card, needs_triton, needs_two_cards
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.forms import Dense, drop_vanishing
from discreet.core.gradient import clipped_gradient
from discreet.core.kernels import dispatch
from discreet.core.outer import Outer
from discreet.core.precision import full_precision
from discreet.core.rng import seed_key
from discreet.core.uses import Derivation, Record, Uses
from discreet.core.windows import Geometry, Windows
from discreet.train.journal import SumJournal

pytestmark = needs_triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    with np.errstate(all="ignore"):
        yield


def _summed(input: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return dispatch.weighted_sum(input.to(DEVICE), grad.to(DEVICE), factor.to(DEVICE)).cpu()


@pytest.mark.parametrize("dead", [(), (0,), (5,), (0, 1, 2), (3, 5), (0, 1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("positions", [16, 97])
def test_examples_without_a_factor_are_passed_over_wherever_they_stand(dead, positions):
    input, grad = draw(6, torch.bfloat16, (6, 2, positions, 40), (6, 2, positions, 24))
    factor = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    exact = each(input, grad)
    for example in dead:
        input[example], factor[example] = float("nan"), 0.0
    alive = [example for example in range(6) if example not in dead]
    wanted = (factor.reshape(-1, 1, 1, 1) * exact)[alive].sum(0).float()
    torch.testing.assert_close(_summed(input, grad, factor), wanted, rtol=1e-5, atol=1e-4)


def test_no_chain_is_longer_than_a_program_holds(monkeypatch):
    from discreet.core.kernels import sums

    monkeypatch.setattr(sums, "_TOGETHER", 4)
    made, chain = [], sums._Chain.of.__func__
    monkeypatch.setattr(sums._Chain, "of", lambda factor_B: made.append(len(factor_B)) or chain(sums._Chain, factor_B))
    test_examples_without_a_factor_are_passed_over_wherever_they_stand(dead=(0, 5), positions=16)
    assert made == [4, 2]


@pytest.mark.parametrize("bound", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("order", ["falling", "rising", "mixed"])
def test_factors_as_far_apart_as_they_can_be(bound, order):
    """Norms from 1e-8 to 1e30 of the bound, in any order: every example keeps its share."""
    lengths = torch.tensor([1e-8, 1.0, 1e15, 1e24, 1e29, 1e30], dtype=torch.float64) * bound
    lengths = {"falling": lengths.flip(0), "rising": lengths, "mixed": lengths[[4, 0, 5, 2, 1, 3]]}[order]
    input, grad = draw(7, torch.bfloat16, (6, 1, 20, 40), (6, 1, 20, 24))
    exact = each(input, grad)
    scale = (lengths / exact.flatten(1).norm(dim=1)).sqrt().reshape(-1, 1, 1, 1)
    input, grad = (input.double() * scale).bfloat16(), (grad.double() * scale).bfloat16()
    exact = each(input, grad)
    norm = exact.flatten(1).norm(dim=1)
    factor = drop_vanishing(bound / norm, bound=bound)
    assert (factor > 0).sum() >= (3 if bound > 1 else 5)
    wanted = (factor.reshape(-1, 1, 1, 1) * exact).sum(0)
    gap = (_summed(input, grad, factor).double() - wanted).norm() / wanted.norm()
    assert gap < 1e-5
    assert float(wanted.norm()) > 0.5 * bound


def test_factors_vanish_sooner_beside_a_large_bound():
    factor = torch.tensor([1e-31, 1e-29, 1e-25, 1.0], dtype=torch.float64)
    assert drop_vanishing(factor, bound=0.1).tolist() == [0.0, 1e-29, 1e-25, 1.0]
    assert drop_vanishing(factor, bound=1e4).tolist() == [0.0, 0.0, 1e-25, 1.0]
    assert drop_vanishing(factor, bound=float("inf")).tolist() == [0.0, 1e-29, 1e-25, 1.0]


@pytest.mark.parametrize("norms", [(1.0, 1e-9, 9e29), (9e29, 1e-9, 1.0), (9e29, 1.0, 1e-9)], ids=str)
def test_a_long_gradient_beside_a_tiny_one_does_not_wipe_out_the_others(norms):
    """With gamma at 1e-9 factors reached 1e9: their ratio to the least was no float32 number, and the sum was lost."""
    rule, norm = Clipping.automatic(1e-9), torch.tensor(norms, dtype=torch.float64)
    factor = drop_vanishing(1 / (norm + rule.gamma), bound=rule.clip_bound, largest=rule.largest_factor)
    assert rule.factor(torch.zeros(1)) <= rule.largest_factor
    input, grad = draw(9, torch.bfloat16, (3, 1, 16, 8), (3, 1, 16, 8))
    scale = (norm / each(input, grad).flatten(1).norm(dim=1)).sqrt().reshape(-1, 1, 1, 1)
    input, grad = (input.double() * scale).bfloat16(), (grad.double() * scale).bfloat16()
    wanted = (factor.reshape(-1, 1, 1, 1) * each(input, grad)).sum(0).float()
    torch.testing.assert_close(_summed(input, grad, factor), wanted, rtol=1e-4, atol=1e-5)


def test_a_chain_is_made_anew_for_factors_that_were_changed_in_place():
    input, grad = draw(8, torch.bfloat16, (3, 1, 16, 8), (3, 1, 16, 8))
    factor = torch.rand(3).to(DEVICE)
    one = _summed(input, grad, factor)
    factor.mul_(2.0)
    torch.testing.assert_close(_summed(input, grad, factor), 2 * one)


def test_a_chain_is_made_anew_for_other_factors():
    input, grad = draw(8, torch.bfloat16, (3, 1, 16, 8), (3, 1, 16, 8))
    for _ in range(3):
        factor = torch.rand(3)
        wanted = (factor.double().reshape(-1, 1, 1, 1) * each(input, grad)).sum(0).float()
        torch.testing.assert_close(_summed(input, grad, factor), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 7), (2, 130, 70), (1, 64, 64), (4, 1, 1)], ids=str)
def test_gradients_of_scale_and_shift(dtype, sizes):
    from discreet.core.kernels import affine

    generator = torch.Generator().manual_seed(2)
    input, grad = (torch.randn(sizes, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    mean, rstd = input.float().mean(2), input.float().var(2, unbiased=False).add(1e-5).rsqrt()
    scale, shift = affine.scale_grads(input, grad, mean, rstd)
    normal = (input.double() - mean.double().unsqueeze(2)) * rstd.double().unsqueeze(2)
    torch.testing.assert_close(scale.double(), (normal * grad.double()).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.double(), grad.double().sum(1), rtol=1e-4, atol=1e-4)


def test_programs_lie_along_the_axis_that_has_room_for_them(monkeypatch):
    """There are 65,535 at most along the others: a norm over 256 channels of 128 by 128 pixels has one more."""
    from discreet.core.kernels import affine

    kernel, grids = affine._affine_kernel, []

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(affine, "_affine_kernel", Watched())
    test_gradients_of_scale_and_shift(torch.float32, (2, 130, 70))
    assert grids == [(2 * 2,)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_with_the_kernel_is_the_one_without(bias, monkeypatch):
    from discreet.core.kernels import affine

    monkeypatch.setattr(dispatch, "scale_grads", affine.scale_grads)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm((5, 10), bias=bias), nn.Flatten(), nn.Linear(50, 2)).to(DEVICE)
    batch = (torch.randn(4, 5, 6, device=DEVICE), torch.randint(2, (4,), device=DEVICE))

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    sums = []
    for used in (False, True):
        monkeypatch.setattr(dispatch, "suit_scales", lambda *operands, positions, used=used: used)
        sums.append(clipped_gradient(model, loss, batch, clipping=Clipping.abadi(0.1)).tensors)
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-4, atol=1e-6)


def _by_hand(words: list[int], *, seed: int, first: int) -> int:
    """``sum_i key_i word_i`` modulo 2^64, in Python's integers."""
    mask, total = 2**64 - 1, 0
    for place, word in enumerate(words, start=first):
        mixed = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        total += word * (mixed ^ (mixed >> 31))
    return struct.unpack("<q", struct.pack("<Q", total & mask))[0]


def test_digests_are_their_definition():
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(9000, generator=generator), torch.randn(3, 4, dtype=torch.float64, generator=generator)]
    key = bytes(range(200, 216))
    found = dispatch.digests([value.to(DEVICE) for value in values], key).cpu().tolist()
    wanted = []
    for value in values:
        words = np.frombuffer(value.numpy().tobytes(), dtype="<u4").tolist()
        for start in range(0, len(words), 8192):
            first, part = len(wanted) * 8192, words[start : start + 8192]
            wanted.append([_by_hand(part, seed=seed, first=first) for seed in struct.unpack("<QQ", key)])
    assert found == wanted


def test_a_sum_on_an_accelerator_is_admitted_again_and_another_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "draw", lambda *values: True)
    generator = torch.Generator().manual_seed(5)
    tensors = {"a": torch.randn(9000, generator=generator), "b": torch.randn(3, 2, generator=generator)}
    tensors = {name: value.to(DEVICE) for name, value in tensors.items()}

    def journal() -> SumJournal:
        return SumJournal(tmp_path / "sums", key=seed_key(1))

    assert journal().admits(0, ClippedSum(tensors=tensors, sensitivity=1.0))
    assert journal().admits(0, ClippedSum(tensors=dict(reversed(tensors.items())), sensitivity=1.0))
    for name, place in (("a", 0), ("a", 8191), ("a", 8999), ("b", 5)):
        other = {key: value.clone() for key, value in tensors.items()}
        bits = other[name].view(-1).view(torch.int32)
        bits[place] ^= 1
        assert not journal().admits(0, ClippedSum(tensors=other, sensitivity=1.0))
    swapped = {"a": tensors["a"].flip(0), "b": tensors["b"]}
    assert not journal().admits(0, ClippedSum(tensors=swapped, sensitivity=1.0))
    monkeypatch.setattr(dispatch, "draw", lambda *values: False)
    assert not journal().admits(0, ClippedSum(tensors=tensors, sensitivity=1.0))  # told by other means: a new key


def test_what_the_copy_engine_can_read_is_decided_by_steps_and_addresses():
    from discreet.core.kernels.operands import described

    value = torch.zeros(3, 2, 20, 64, dtype=torch.bfloat16)
    assert described(value, 16, 64)[1]
    assert described(value[:, :1], 16, 64)[1]
    assert described(value[..., 8:], 16, 64)[1]
    for other in (
        value[..., 1:],  # begins between two blocks of 16 bytes
        value[..., :63].contiguous(),  # so do its rows
        value.mT,  # numbers of a row lie apart
        value[:, :, :1].expand(3, 2, 20, 64),  # one row for all positions
        value[..., :4],  # less than a block
    ):
        assert described(other, 16, 64) == (other, False)


def test_how_a_sum_is_cut_follows_from_its_shape():
    from discreet.core.kernels import sums

    assert [sums._depth(positions) for positions in (16, 32, 64, 100, 128, 197, 1024)] == [32, 32, 64, 64, 64, 32, 64]
    assert [sums._shares(tiles, 256, 264) for tiles in (36, 64, 144, 256, 2358)] == [7, 4, 3, 1, 1]
    assert sums._shares(36, 2, 264) == 2


def test_small_parameters_of_an_accelerator_are_settled_together():
    """A dozen launches for each take longer there than a copy: biases of 1,024 numbers for 128 examples."""
    for device, together in (("cpu", False), ("meta", True)):
        parameter, grad = torch.zeros(1024, device=device), torch.zeros(128, 1024, device=device)
        record = Record.of(Derivation.of("bias", parameter), Dense(grad), None)
        assert (Uses.of("bias", [(0, record)], 128, 128).small is not None) is together


PLACES = [
    "cpu",
    pytest.param("cuda", marks=needs_card),
    pytest.param("cuda:1", marks=needs_two_cards),
]
SHAPES = {  # of the weight; stride, padding, dilation, groups
    "3 x 3": ((12, 8, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
    "steps and groups": ((12, 4, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 2)),
    "depthwise, with holes": ((8, 1, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 8)),
    "one axis": ((12, 8, 5), Geometry((1,), (2,), (1,), 1)),
}


def _windows(name: str, dtype: torch.dtype) -> Windows:
    shape, geometry = SHAPES[name]
    image = (14, 14)[: len(shape) - 2]
    generator = torch.Generator().manual_seed(9)
    input = torch.randn(6, 1, 8, *image, generator=generator)
    taken = [getattr(geometry, part) for part in ("stride", "padding", "dilation")]
    convolve = F.conv1d if len(image) == 1 else F.conv2d
    output = convolve(input[:, 0], torch.zeros(shape), None, *taken, geometry.groups).unsqueeze(1)
    grad = torch.randn(output.shape, generator=generator)
    return Windows(input.to(dtype), grad.to(dtype), torch.Size(shape), geometry)


def _there(form: Windows, place: str) -> Windows:
    return replace(form, input=form.input.to(place), grad=form.grad.to(place))


@pytest.fixture(params=["as it comes", "TF32"])
def asked_for(request):
    """TF32 as PyTorch has it from the start (cuDNN takes it, cuBLAS does not), and wherever it can be asked for."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    kept = [setting.fp32_precision for setting in settings]
    for setting, precision in zip(settings, kept, strict=True):
        setting.fp32_precision = precision if request.param == "as it comes" else "tf32"
    yield
    for setting, precision in zip(settings, kept, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_norms_and_sums_of_convolutions_are_those_of_float64(name, dtype, place, asked_for):
    """TF32, which keeps 10 bits of each factor, is 5e-4 off."""
    form, factor = _windows(name, dtype), torch.linspace(0.1, 1.0, 6)
    exact = replace(form, input=form.input.double(), grad=form.grad.double())
    with full_precision():
        summed = _there(form, place).weighted_sum(factor.to(place)).cpu().double()
        norm2 = _there(form, place).quick_norm2().cpu()
        each = _there(form, place).per_example().cpu().double()
    wanted = exact.weighted_sum(factor.double())
    most = 2e-6 if dtype is torch.float32 else 5e-5  # tensor cores cut what they add up
    assert summed.shape == wanted.shape
    assert float((summed - wanted).norm() / wanted.norm()) < most
    assert float((each - exact.per_example()).norm() / each.norm()) < most
    wanted2 = exact.norm2()
    assert (norm2 >= wanted2 * (1 - 1e-6)).all()
    assert (norm2 <= wanted2 * (1 + 2e-2)).all()


def test_sums_of_windows_leave_no_room_for_gram_matrices(monkeypatch):
    """512 images of 32 by 32 pixels were summed seven at a time, for matrices that only norms are made of."""
    from discreet.core import windows

    asked = []
    monkeypatch.setattr(windows, "examples_at_a_time", lambda numbers: asked.append(numbers) or 3)
    form, factor = _windows("3 x 3", torch.float32), torch.linspace(0.1, 1.0, 6)
    torch.testing.assert_close(form._summed_by_parts(factor), form.weighted_sum(factor), rtol=1e-4, atol=1e-4)
    assert asked == [14 * 14 * 8 * 9 + 12]


@needs_card
@pytest.mark.parametrize("positions", [1, 40])
def test_products_of_float32_are_float32_on_this_card(positions, asked_for):
    """Whatever the process or its environment asks for (``NVIDIA_TF32_OVERRIDE=1``)."""
    input, grad = draw(11, torch.float32, (64, 1, positions, 256), (64, 1, positions, 192))
    form = Outer(input.cuda(), grad.cuda(), torch.Size((192, 256)))
    with full_precision():
        found = form.weighted_sum(torch.ones(64, device="cuda")).cpu().double()
    wanted = each(input, grad).sum(0)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6
