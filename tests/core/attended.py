"""Models with attention, and the layouts that the self-check verifies for them."""

from __future__ import annotations

import torch
from torch import nn

from blocks import Fn, loss
from discreet.core.axes import Layout
from discreet.train.check import check

T, S, E, A = 7, 4, 8, 2
"""Positions of a query, positions of a memory, features, heads."""


def shaken_model(forward, dtype=torch.float64, **parts) -> nn.Module:
    torch.manual_seed(3)
    model = Fn(forward, **parts)
    with torch.no_grad():
        for p in model.parameters():  # biases start at zero
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def verified(model, batch) -> Layout:
    report = check(model, loss, batch)
    assert report.passed, report.table()
    return report.layout
