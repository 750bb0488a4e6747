"""Losses of a batch as bounded sums: whatever the losses are, one example moves a sum by no more than it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from discreet.core.noise import release
from discreet.core.probe import LEVELS, OCTAVES, RISES, counted_levels, summed_rises
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError


class _Table(nn.Module):
    """An example's loss is its first number, and at displaced weights its second."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, rows_B2: Tensor) -> Tensor:
        self.seen += 1
        return torch.where(self.shift.abs() > 0.5, rows_B2[:, 1], rows_B2[:, 0])


SHIFT = {"shift": torch.ones(1, dtype=torch.float64)}


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def _rises(rows: list[tuple[float, float]], *, bound: float = 2.0, at_once: int = 3) -> float:
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)
    pieces = [(table[at : at + at_once], len(table[at : at + at_once])) for at in range(0, len(table), at_once)]
    total = summed_rises(_Table(), _loss, lambda: iter(pieces), shift=SHIFT, bound=bound)
    assert total.sensitivity == bound
    return float(total.tensors[RISES])


def _levels(losses: list[float]) -> Tensor:
    table = torch.tensor([(loss, 0.0) for loss in losses], dtype=torch.float64).reshape(-1, 2)
    return counted_levels(_Table(), _loss, lambda: iter([(table, len(table))])).tensors[LEVELS]


def test_rises_are_clipped_one_by_one_and_summed():
    assert _rises([(1.0, 1.5), (1.0, 9.0), (5.0, 1.0), (0.0, 0.0)]) == 0.5 + 2.0 - 2.0


def test_a_slope_is_no_rise():
    """To and fro: what a slope adds on one side it takes on the other, and half of the sum of both is the curvature."""
    model = nn.Linear(2, 1, bias=False).double()
    rows = torch.tensor([[3.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    shift = {"weight": torch.tensor([[0.25, 0.5]], dtype=torch.float64)}

    def summed(curved: float) -> float:
        def loss(network: nn.Module, batch: Tensor) -> Tensor:
            output_B = network(batch).squeeze(1)
            return output_B + curved * output_B.square()

        return float(summed_rises(model, loss, lambda: iter([(rows, 2)]), shift=shift, bound=9.0).tensors[RISES])

    assert summed(0.0) == pytest.approx(0.0, abs=1e-12)
    assert summed(1.0) == pytest.approx(float((rows @ shift["weight"].T).square().sum()))


def test_one_side_that_is_lost_counts_half():
    """Each sign is clipped by itself: a loss that is lost on one side outweighs the other by no more than the bound."""

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        return torch.where(network.shift > 0, math.inf, 0.0) * torch.ones(len(batch), dtype=torch.float64)

    rows = torch.zeros(3, 2, dtype=torch.float64)
    total = summed_rises(_Table(), loss, lambda: iter([(rows, 3)]), shift=SHIFT, bound=2.0)
    assert float(total.tensors[RISES]) == 3.0


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_microbatches_never_change_the_sum(at_once):
    rows = [(0.125 * k, 0.25 * k) for k in range(7)]
    assert _rises(rows, at_once=at_once) == _rises(rows, at_once=3)


@pytest.mark.parametrize("old", [0.0, 1e6, -1e6, 1e308, -1e308, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("new", [0.0, 1e6, -1e6, 1e308, -1e308, math.nan, math.inf, -math.inf])
def test_one_example_moves_a_rise_by_at_most_the_bound(old, new):
    """E3: whatever its losses are, also infinite or no number; one that is lost at displaced weights counts in full."""
    rest = [(1.0, 1.5), (1.0, 0.75)]
    moved = _rises([*rest, (old, new)]) - _rises(rest)
    assert abs(moved) <= 2.0
    if math.isfinite(old) and not math.isfinite(new):
        assert moved == 2.0
    if not math.isfinite(old):
        assert moved == 0.0


@pytest.mark.parametrize("loss", [0.0, 1e-300, 1e300, -3.0, 0.5, math.nan, math.inf])
def test_one_example_counts_once_or_not_at_all(loss):
    moved = _levels([1.0, 3.0, loss]) - _levels([1.0, 3.0])
    assert float(moved.abs().sum()) == (1.0 if math.isfinite(loss) else 0.0)
    assert (moved >= 0).all()


def test_octaves_hold_what_they_say():
    for octave in (-3, 0, 5):
        for loss in (2.0**octave, 2.0**octave * 1.999, -(2.0**octave)):
            assert float(_levels([loss])[OCTAVES.index(octave)]) == 1.0


def test_no_example_gives_zeros_which_are_released_as_noise():
    """E3: an empty batch releases noise of the stated size and nothing else."""
    assert _rises([]) == 0.0
    total = summed_rises(_Table(), _loss, lambda: iter([]), shift=SHIFT, bound=2.0)
    source = NoiseSource.insecure_seed(4)
    draws = torch.stack(
        [release(total, noise_multiplier=3.0, source=source, divisor=10.0).tensors[RISES] for _ in range(2000)]
    )
    # Standard deviation 3 * 2 / 10; that of its estimate is 1.6 % of it: five of them.
    assert float(draws.std()) == pytest.approx(0.6, rel=0.08)
    assert float(counted_levels(_Table(), _loss, lambda: iter([])).tensors[LEVELS].abs().sum()) == 0.0


def test_weights_buffers_and_gradients_are_what_they_were():
    model = _Table()
    with torch.no_grad():
        model.shift.fill_(-0.1)
    table = torch.ones(4, 2, dtype=torch.float64)
    summed_rises(model, _loss, lambda: iter([(table, 4)]), shift=SHIFT, bound=1.0)
    counted_levels(model, _loss, lambda: iter([(table, 4)]))
    assert float(model.shift.detach()) == -0.1
    assert float(model.seen) == 0.0
    assert model.shift.grad is None


def test_weights_are_put_back_when_a_loss_fails():
    model = _Table()

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        if float(network.shift.detach()) > 0:
            raise RuntimeError("no loss here")
        return network(batch)

    with pytest.raises(RuntimeError, match="no loss here"):
        summed_rises(model, loss, lambda: iter([(torch.ones(1, 2), 1)]), shift=SHIFT, bound=1.0)
    assert float(model.shift.detach()) == 0.0


def test_sums_are_float64_whatever_the_model_computes_in():
    """F12: bfloat16 losses of 256 examples would lose a rise of 2^-7 each in a sum of their own type."""
    model = _Table().to(torch.bfloat16)
    table = torch.tensor([[1.0, 1.0078125]] * 256, dtype=torch.bfloat16)
    total = summed_rises(model, _loss, lambda: iter([(table, 256)]), shift=SHIFT, bound=1.0).tensors[RISES]
    assert total.dtype is torch.float64
    assert float(total) == 256 * 0.0078125


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_rise_needs_a_bound(bound):
    with pytest.raises(ConfigError, match="bound"):
        _rises([(1.0, 2.0)], bound=bound)


def test_losses_must_be_one_per_example():
    """F8: a mean, or one loss for each token, is refused."""
    with pytest.raises(ConfigError, match="one per example"):
        counted_levels(_Table(), lambda model, rows: model(rows).mean(), lambda: iter([(torch.ones(3, 2), 3)]))
