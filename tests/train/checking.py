"""What the tests of the self-check share: small models and batches, and what a failed check looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blocks import Fn, loss
from discreet.errors import CheckFailed
from discreet.train.check import Status, check

B, T, D, V = 4, 7, 6, 11


def drawn(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, *shape), "target": torch.randn(B)}


def built(f, **parts) -> nn.Module:
    torch.manual_seed(1)
    return Fn(f, **parts)


def expect_failed(model, batch, what: str, *, loss_function=loss) -> None:
    report = check(model, loss_function, batch)
    failed = [row for row in report.rows if row.status is Status.FAILED]
    assert not report.passed
    assert any(what in f"{row.name} {row.what}" for row in failed), report.table()
    with pytest.raises(CheckFailed, match="no private training starts"):
        report.raise_if_failed()


class RunningMean(nn.Module):
    """Keeps a mean of what it saw, and never uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(D))
        self.lin = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.lin(x)
