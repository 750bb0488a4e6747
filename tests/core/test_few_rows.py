"""Convolutions where one product takes the place of the library's own way: of few rows, and of single pixels."""

from __future__ import annotations

import pytest
import torch

from discreet.core.rules.convolution import Convolution
from discreet.core.windows import Geometry, Windows

CASES = {
    "line": (Geometry((2,), (1,), (1,), 1), (4,), (9,), (3,)),
    "plane, groups": (Geometry((1, 2), (1, 0), (2, 1), 2), (4,), (6, 5), (3, 2)),
    "space": (Geometry((1, 1, 2), (0, 1, 1), (1, 1, 1), 1), (2,), (4, 3, 4), (2, 3, 2)),
}


def _form(case: str, folds: int, outputs: int, *, dtype: torch.dtype = torch.float64) -> Windows:
    geometry, (channels,), image, kernel = CASES[case]
    spans = zip(image, geometry.padding, geometry.dilation, kernel, geometry.stride, strict=True)
    output = [(size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, pad, gap, taps, step in spans]
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(3, folds, channels, *image, dtype=dtype, generator=generator)
    grad = torch.randn(3, folds, outputs, *output, dtype=dtype, generator=generator)
    return Windows(input, grad, torch.Size((outputs, channels // geometry.groups, *kernel)), geometry)


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("outputs", [2, 600], ids=["many rows", "few rows"])
@pytest.mark.parametrize("case", CASES)
def test_either_way_is_the_sum_of_what_each_example_adds(case, outputs, folds, monkeypatch):
    form, factor_B = _form(case, folds, outputs), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    taken = []
    plain = Windows._summed_by_rows
    monkeypatch.setattr(Windows, "_summed_by_rows", lambda self, f: taken.append(self) or plain(self, f))
    found = form.weighted_sum(factor_B)
    assert bool(taken) is (outputs == 600)
    each = torch.stack([form.rows(at, at + 1).per_example()[0] for at in range(3)])
    torch.testing.assert_close(found, torch.einsum("b,b...->...", factor_B, each), rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()


def test_an_example_that_is_no_number_is_left_out_exactly():
    form = _form("plane, groups", 1, 600, dtype=torch.float32)
    spoilt = Windows(form.input.clone(), form.grad.clone(), form.value_shape, form.geometry)
    spoilt.input[1, 0, 0] = float("nan")
    spoilt.grad[1] = float("inf")
    bad_B, factor_B = torch.tensor([False, True, False]), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.equal(spoilt.without(bad_B).weighted_sum(factor_B), form.without(bad_B).weighted_sum(factor_B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(2,), (3, 2), (1, 2), (1, 3, 2)], ids=str)
def test_what_single_pixels_send_back_is_the_librarys_gradient(stride, dtype):
    generator = torch.Generator().manual_seed(1)
    image = (9, 8, 7)[: len(stride)]
    input = torch.randn(3, 5, *image, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(4, 5, *[1] * len(stride), generator=generator, dtype=torch.float64).to(dtype)
    geometry = Geometry(stride, (0,) * len(stride), (1,) * len(stride), 1)
    output = Convolution(geometry).forward(input, weight, None)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1).contiguous()
    grad = grad.transpose(0, 1)  # as some layers leave it
    found = Convolution(geometry).input_grad(grad, input, weight)
    wanted = torch.ops.aten.convolution_backward(
        *(grad, input, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, geometry.padding, 1),
        [True, False, False],
    )[0]
    assert found.dtype is dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted)
