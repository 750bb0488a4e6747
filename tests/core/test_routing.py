"""Rows of the batch in another order, as far as the graph shows it: refused, or followed, also without a self-check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blocks import D
from core.unseen import built, drawn, expect_exact, expect_refused


def _turned(h: Tensor) -> Tensor:
    return torch.arange(len(h)).roll(1)


REORDERED = {
    "flipped, counted from the end": lambda h: h.flip(-2),
    "gathered, counted from the end": lambda h: h.gather(-2, _turned(h)[:, None].expand_as(h)),
    "rolled": lambda h: h.roll(1, 0),
    "rolled, counted from the end": lambda h: h.roll(1, -2),
    "turned": lambda h: h[:, None].expand(-1, len(h), -1).rot90(2, (0, 1))[:, 0],
    "sorted values": lambda h: h.sort(0)[0],
    "largest values": lambda h: h.topk(len(h), 0)[0],
    "slices joined": lambda h: torch.cat([h[-1:], h[:-1]]),
    "slices joined, counted from the end": lambda h: torch.cat([h[-1:], h[:-1]], -2),
    "split and joined": lambda h: torch.cat(h.split(1)[::-1]),
    "split by sizes and joined": lambda h: torch.cat(h.split([1, len(h) - 1])[::-1]),
    "rows stacked": lambda h: torch.stack([h[i] for i in reversed(range(len(h)))]),
    "unbound and stacked": lambda h: torch.stack(h.unbind()[::-1]),
    "by a matrix": lambda h: torch.eye(len(h), dtype=h.dtype)[_turned(h)] @ h,
}
KEPT = {
    "picked, counted from the end, and put back": lambda h: h.index_select(-2, _turned(h)),
    "slices joined": lambda h: torch.cat([h[:2], h[2:]]),
    "split and joined": lambda h: torch.cat(h.split(2)),
    "rows stacked": lambda h: torch.stack([h[i] for i in range(len(h))]),
    "unbound and stacked": lambda h: torch.stack(h.unbind()),
    "features in another order": lambda h: torch.cat([h[:, 3:], h[:, :3]], -1).roll(1, -1).flip(-1).sort(-1)[0],
    "times in another order": lambda h: torch.cat([t := h[:, None] * torch.ones(2, 1), t.flip(-2)], -2).sum(-2),
    "by a square frozen layer": lambda h: h @ torch.ones(D, D, dtype=h.dtype),
}


def _model(place, *, back: bool = False) -> nn.Module:
    """The second layer meets placed rows; all others meet those of the batch."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = s.a(x)
        y = s.b(place(h)).tanh()
        return (y.roll(-1, 0) if back else y) + h

    return built(forward, a=nn.Linear(D, D), b=nn.Linear(D, D))


@pytest.mark.parametrize("name", list(REORDERED))
def test_rows_in_another_order_are_refused(name):
    expect_refused(_model(REORDERED[name]), drawn(D), "picked from the batch", "b.weight")


@pytest.mark.parametrize("name", list(KEPT))
def test_rows_at_their_places_are_exact(name):
    expect_exact(_model(KEPT[name], back="picked" in name), drawn(D))
