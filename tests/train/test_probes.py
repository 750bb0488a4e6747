"""One probe of the learning rate: a bounded sum over a batch, the same however the batch is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from discreet.core.probe import RISES
from discreet.train.probing import probe_sum
from discreet.train.step import ClippedStep, Microbatch
from discreet.train.stillness import Allowed, Watch
from discreet.train.tolerance import Asked, Question


def test_a_probe_that_does_not_fit_is_done_again_in_halves():
    """Nothing is dropped or counted twice: the sum is that of the whole batch."""
    sizes: list[int] = []

    class Hungry(_Curved):
        def forward(self, rows: Tensor) -> Tensor:
            sizes.append(len(rows))
            if len(rows) > 5:
                raise MemoryError
            return super().forward(rows)

    assert _asked(Hungry(), microbatch=20) == pytest.approx(_asked(_Curved(), microbatch=20), rel=1e-12)
    assert sizes[:2] == [20, 10]
    assert max(sizes[2:]) == 5


class _Dropped(nn.Module):
    """Its loss is a dropout mask: the same at every pass, or a rise out of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.dropout(rows[:, 0].abs() + 1.0, p=0.5) + 0 * self.weight


def _step(network: nn.Module, rows: Tensor, *, microbatch: int) -> ClippedStep:
    return ClippedStep(
        model=network,
        loss=lambda model, batch: model(batch),
        fetch=lambda indices: rows[torch.from_numpy(indices)],
        parameters=dict(network.named_parameters()),
        clipping=None,  # type: ignore[arg-type]
        layout=None,
        microbatch=Microbatch(microbatch),
        watch=Watch(network, Allowed()),
    )


def _asked(network: nn.Module, *, seed: int = 3, microbatch: int = 8, rows: int = 20) -> float:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    question = Question(Asked.RISE, displacement=0.5, bound=100.0)
    names: Iterator[str] = iter(dict(network.named_parameters()))
    with torch.random.fork_rng():
        total = probe_sum(
            question,
            step=_step(network, table, microbatch=microbatch),
            indices=np.arange(rows),
            seed=seed,
            directions=lambda name, entries: torch.ones(entries, dtype=torch.float64),
            ratios=dict.fromkeys(names, 1.0),
        )
    return float(total.tensors[RISES])


def test_passes_of_a_probe_share_their_dropout_masks():
    """F9: a loss that depends on nothing but its mask does not rise at all."""
    assert _asked(_Dropped().train()) == 0.0


class _Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.square()


@pytest.mark.parametrize("microbatch", [1, 3, 8, 100])
def test_microbatches_never_change_a_probe(microbatch):
    """F10: losses are summed over all microbatches before one draw of noise."""
    whole = _asked(_Curved(), microbatch=20)
    assert abs(whole) > 0.1
    assert _asked(_Curved(), microbatch=microbatch) == pytest.approx(whole, rel=1e-12)


def test_a_probe_of_no_example_is_zero():
    assert _asked(_Curved(), rows=0) == 0.0


def test_an_example_of_the_worst_kind_moves_what_is_released_by_no_more_than_the_sensitivity(tmp_path):
    """E12, without chance: the sums of two neighbouring batches, with a canary whose loss is infinite or enormous."""
    for canary in (math.inf, 1e30, -1e30):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        rows[-1] = canary
        sums = []
        for count in (19, 20):
            network = _Curved()
            total = probe_sum(
                Question(Asked.RISE, displacement=0.5, bound=4.0),
                step=_step(network, rows, microbatch=8),
                indices=np.arange(count),
                seed=1,
                directions=lambda name, entries: torch.ones(entries, dtype=torch.float64),
                ratios={"weight": 1.0},
            )
            sums.append(float(total.tensors[RISES]))
        assert abs(sums[1] - sums[0]) <= total.sensitivity == 4.0
