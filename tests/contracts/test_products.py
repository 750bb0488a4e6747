"""Every way to a Gram product or a squared product keeps the contract: PyTorch's, and the kernels'.

Without a GPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set in tests/conftest.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contracts.products import GramContract, SquaresContract, draw, each, needs_triton
from discreet.core.forms import square_sum, wide
from discreet.core.kernels import dispatch
from discreet.core.kernels.results import HARMLESS, GramProducts, Squares
from discreet.core.outer import fused_direct_norm2, gram_norm2, gram_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADDED = torch.bfloat16 if DEVICE == "cuda" else torch.float32
"""What weighted sums are made of, where it matters: tiles of float32 would take more memory than most cards have."""
EMPTY = ((0, 1, 3, 4, 5), (2, 1, 0, 4, 5), (2, 1, 3, 0, 5), (2, 1, 3, 4, 0), (2, 0, 3, 4, 5))


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """numpy warns of overflow, which is part of these tests."""
    with np.errstate(all="ignore"):
        yield


class TestGramInTorch(GramContract):
    is_kernel = False

    def products(self, inputs, grads):
        return gram_products([wide(x) for x in inputs], [wide(g) for g in grads])

    def norm2_of(self, inputs, grads, *, harmless=HARMLESS):
        return gram_norm2([wide(x) for x in inputs], [wide(g) for g in grads], summed=torch.float32, harmless=harmless)


@needs_triton
class TestGramKernel(GramContract):
    def products(self, inputs, grads):
        found = dispatch.gram_products([x.to(DEVICE) for x in inputs], [g.to(DEVICE) for g in grads])
        parts = (found.total_B, found.input2_BKS, found.grad2_BKS)
        return GramProducts(*(part.cpu() for part in parts), found.spacings)

    def norm2_of(self, inputs, grads, *, harmless=HARMLESS):
        from discreet.core.kernels import rounding

        found = dispatch.gram_products([x.to(DEVICE) for x in inputs], [g.to(DEVICE) for g in grads])
        widths = (sum(value.shape[3] for value in values) for values in (inputs, grads))
        return rounding.gram_norm2(found, inputs=next(widths), outputs=next(widths), harmless=harmless).cpu()

    @pytest.mark.parametrize(
        "sizes", [(0, 1, 3, 4, 5), (2, 1, 0, 4, 5), (2, 1, 3, 0, 5), (2, 1, 3, 4, 0), (2, 0, 3, 4, 5)]
    )
    def test_of_nothing_it_is_zero(self, sizes):
        examples, groups, positions, inputs, outputs = sizes
        operands = draw(0, torch.float32, (examples, groups, positions, inputs), (examples, groups, positions, outputs))
        found = self.products([operands[0]], [operands[1]])
        assert found.total_B.tolist() == [0.0] * examples
        assert found.input2_BKS.shape == found.grad2_BKS.shape == sizes[:3]


@needs_triton
class TestSquaresKernel(SquaresContract):
    def squares(self, input, grad):
        found = dispatch.product_squares(input.to(DEVICE), grad.to(DEVICE))
        return Squares(found.total_B.cpu(), found.spacings)

    def norm2(self, input, grad, *, harmless=HARMLESS):
        return fused_direct_norm2(input.to(DEVICE), grad.to(DEVICE), harmless=harmless).cpu()

    @pytest.mark.parametrize(
        "sizes", [(0, 1, 3, 4, 5), (2, 1, 0, 4, 5), (2, 1, 3, 0, 5), (2, 1, 3, 4, 0), (2, 0, 3, 4, 5)]
    )
    def test_of_nothing_it_is_zero(self, sizes):
        examples, groups, positions, inputs, outputs = sizes
        operands = draw(0, torch.float32, (examples, groups, positions, inputs), (examples, groups, positions, outputs))
        assert self.squares(*operands).total_B.tolist() == [0.0] * examples


class TestSquaresInTorch(SquaresContract):
    is_kernel = False
    # What is written below knows no end, and no doubt.
    test_norms_grow_as_an_operand_nears_what_float32_can_square = None
    test_where_there_is_a_doubt_the_number_can_be_told_too = None

    def squares(self, input, grad):
        # Half a spacing for each position, and the square of an entry errs with twice that entry.
        return Squares(square_sum(wide(grad).mT @ wide(input)), input.shape[2] / 2 + 1)

    def norm2(self, input, grad):
        lengths = (torch.linalg.vector_norm(wide(value), dim=-1).double() for value in (input, grad))
        one, other = lengths
        met2 = (one * other).sum(2).square().sum(1)
        found = self.squares(input, grad)
        eps = torch.finfo(torch.float32).eps
        return (found.total_B.sqrt() + found.spacings * eps * met2.sqrt()).square() + 4 * eps * met2


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 20, 17, 70), (1, 2, 65, 64, 3), (4, 2, 16, 1, 1)], ids=str)
def test_products_and_their_weighted_sum(dtype, sizes):
    examples, groups, positions, inputs, outputs = sizes
    input, grad = draw(3, dtype, (examples, groups, positions, inputs), (examples, groups, positions, outputs))
    factor = torch.rand(examples, dtype=torch.float64)
    wanted = each(input, grad)
    found = dispatch.products(input.to(DEVICE), grad.to(DEVICE)).cpu()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-4)
    if DEVICE == "cuda" and dtype is not torch.bfloat16:
        return  # never asked for
    summed = dispatch.weighted_sum(input.to(DEVICE), grad.to(DEVICE), factor.to(DEVICE)).cpu()
    torch.testing.assert_close(summed, (factor.reshape(-1, 1, 1, 1) * wanted).sum(0).float(), rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_an_example_without_a_factor_leaves_nothing(value):
    input, grad = draw(4, ADDED, (3, 1, 20, 17), (3, 1, 20, 5))
    input[1, 0, 7, 3] = value
    grad[1, 0, 7] = 1e30
    factor = torch.tensor([0.5, 0.0, 2.0])
    found = dispatch.weighted_sum(input.to(DEVICE), grad.to(DEVICE), factor.to(DEVICE)).cpu()
    kept = dispatch.weighted_sum(input[::2].to(DEVICE), grad[::2].to(DEVICE), factor[::2].to(DEVICE)).cpu()
    assert torch.equal(found, kept)
    products = dispatch.products(input.to(DEVICE), grad.to(DEVICE)).cpu()
    assert torch.isfinite(products[::2]).all()
    assert not torch.isfinite(products[1]).all()


@needs_triton
def test_an_entry_that_overflows_does_not_spoil_the_sum():
    input, grad = draw(5, ADDED, (2, 1, 20, 17), (2, 1, 20, 5))
    input[1, 0, :, 3] = 1e38
    grad[1, 0, :, 2] = 1e38
    found = dispatch.weighted_sum(input.to(DEVICE), grad.to(DEVICE), torch.ones(2, device=DEVICE)).cpu()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0, 2, 3], each(input, grad)[0, 0, 2, 3].float(), rtol=1e-5, atol=1e-5)
