"""A stream of a forward's own, and a second card: what is queued there is waited for, and launched where it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contracts.products import needs_card, needs_triton, needs_two_cards
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, seed_key
from discreet.core.style import Style
from discreet.train.check import check
from discreet.train.journal import SumJournal

pytestmark = needs_triton


class Late(torch.autograd.Function):
    """The same; its gradient may be a long time in coming."""

    cycles = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(Late.cycles)
        return grad.clone()


class Beside(nn.Module):
    """A first layer on a stream of its own, as two towers are run at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32, bias=False), nn.Linear(32, 2)
        self.side = torch.cuda.Stream()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            hidden = Late.apply(self.first(x))
        torch.cuda.current_stream().wait_stream(self.side)
        return self.last(torch.tanh(hidden))


def _classified(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@needs_card
@pytest.mark.parametrize("style", [Style.flat(), Style.per_layer()], ids=str)
def test_what_is_booked_on_another_stream_is_there_when_it_is_read(style, monkeypatch):
    torch.manual_seed(4)
    model, clipping = Beside().cuda(), Clipping.abadi(0.1, style=style)
    batch = (torch.randn(64, 6, device="cuda"), torch.randint(2, (64,), device="cuda"))
    layout = check(model, _classified, tuple(value[:4] for value in batch), clipping=clipping).layout
    sums = []
    for cycles in (0, 300_000_000):
        with torch.cuda.stream(model.side):
            torch.full((64, 32), 1e6, device="cuda")  # let go of at once: what lies where gradients will be made
        monkeypatch.setattr(Late, "cycles", cycles)
        torch.cuda.synchronize()
        sums.append(clipped_gradient(model, _classified, batch, clipping=clipping, layout=layout).tensors)
        torch.cuda.synchronize()
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-5, atol=1e-7)


@needs_two_cards
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_card_is_as_the_first_while_the_first_is_current(dtype, tmp_path):
    """Kernels, digests and noise are launched where the tensors are."""
    results = []
    for place in ("cuda:0", "cuda:1"):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 3)).to(place, dtype)
        generator = torch.Generator().manual_seed(6)
        batch = torch.randn(8, 20, 12, generator=generator).to(place, dtype)

        def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return model(batch).float().square().sum((1, 2))

        layout = check(model, loss, batch[:4]).layout
        total = clipped_gradient(model, loss, batch, clipping=Clipping.abadi(0.5), layout=layout)
        journal = SumJournal(tmp_path / place.replace(":", ""), key=seed_key(1))
        assert journal.admits(0, total)
        assert journal.admits(0, total)
        released = release(total, noise_multiplier=0.7, source=NoiseSource.insecure_seed(2), divisor=8.0)
        assert all(str(value.device) == place for value in released.tensors.values())
        results.append({name: value.cpu() for name, value in released.tensors.items()})
        assert torch.cuda.current_device() == 0
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)
