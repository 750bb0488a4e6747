"""The literal algorithm, against its formulas; and what a literal reading does."""

from __future__ import annotations

import math
import random

import pytest
import torch

from train.hyfree import HyFree, fit


@pytest.mark.parametrize("curvature", [0.3, 2.0, 50.0])
def test_an_exact_quadratic_gives_its_best_rate_in_one_probe(curvature):
    """E1: L = (a/2)|w|^2 along its gradient: the best rate is 1 / a. A wrong sign or factor (F4) is caught here."""
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradient = curvature * weights

    def loss(rate: float) -> float:
        return float(0.5 * curvature * (weights - rate * gradient).square().sum())

    state = HyFree(rate=0.01).observe(after=loss(0.01), here=loss(0.0), ahead=loss(-0.01))
    assert state.rate == pytest.approx(1 / curvature, rel=1e-6)


def test_slope_and_curvature_are_those_of_autograd():
    """E1: along any direction m, slope G^T m and curvature m^T H m, here that of Adam at its first step."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    targets = (features[:, 0] > 0).double()
    weights = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(features @ at, targets)

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    direction = gradient.sign()
    _, curved = torch.autograd.functional.hvp(loss, weights.detach(), direction)
    rate = 1e-3
    values = {
        name: float(loss(weights.detach() + sign * rate * direction))
        for name, sign in (("after", -1), ("here", 0), ("ahead", 1))
    }
    found = fit(**values, rate=rate)
    assert found.slope == pytest.approx(float(gradient @ direction), rel=1e-3)
    assert found.curvature == pytest.approx(float(direction @ curved), rel=1e-3)


def test_a_ridge_is_not_accepted():
    assert HyFree(rate=0.1).observe(after=2.0, here=1.0, ahead=0.5).rate == 0.1
    assert math.isnan(fit(after=0.0, here=1.0, ahead=0.5, rate=1.0).best_rate)


def test_three_points_leave_no_residual():
    """F5: the parabola goes through any three points, so a residual says nothing about noise."""
    found = fit(after=0.3, here=7.0, ahead=-2.0, rate=0.5)
    for rate, loss in ((0.5, 0.3), (0.0, 7.0), (-0.5, -2.0)):
        assert 7.0 - found.slope * rate + found.curvature * rate**2 / 2 == pytest.approx(loss)


def test_the_literal_bound_collapses_on_losses_that_stay():
    """E5, F7: on frozen Exp(1) losses the bound falls below 0.1 within 60 probes, without any noise."""
    generator = torch.Generator().manual_seed(1)
    losses = -torch.rand(200_000, generator=generator, dtype=torch.float64).log()
    state = HyFree()
    for _ in range(60):
        here = float(losses.clamp(max=state.bound).mean())
        state = state.observe(after=here, here=here, ahead=here)
    assert state.bound < 0.1


def test_on_noise_alone_the_literal_rate_dies():
    """E6: accepted one time in four, with a median factor of 0.29."""
    rng = random.Random(3)
    factors = []
    for _ in range(20_000):
        after, here, ahead = (rng.gauss(0, 1) for _ in range(3))
        rate = HyFree(rate=1.0).observe(after=after, here=here, ahead=ahead).rate
        if rate != 1.0:
            factors.append(rate)
    # Standard errors: 0.003 of the share, about 0.005 of the median.
    assert len(factors) / 20_000 == pytest.approx(0.25, abs=0.015)
    assert sorted(factors)[len(factors) // 2] == pytest.approx(0.29, abs=0.03)
