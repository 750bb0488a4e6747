"""What models under test are made of: named parts and a forward function; batches, and a loss of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, T, D, V = 5, 7, 6, 11


@dataclass(frozen=True)
class Case:
    """One row: how to build it, and how to feed it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    folded: bool = False

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
        """Model and batch in a dtype, from a fixed seed. Starting values that are zero or one are shaken."""
        torch.manual_seed(7)
        model = self.model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        batch = self.batch()
        return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Per example: a curved function of everything that the model puts out, different for each example."""
    out = model(**{k: v for k, v in batch.items() if k != "target"})
    return (out.flatten(1) - batch["target"].unsqueeze(1)).square().mean(1) + out.flatten(1).tanh().sum(1)


def features(*shape: int) -> Callable[[], Any]:
    """Gaussian features (B, *shape) and a target."""
    return lambda: {"x": torch.randn(B, *shape), "target": torch.randn(B)}


def tokens(length: int = T, low: int = 0) -> Callable[[], Any]:
    """Token ids (B, length), with repeats, and a target."""
    return lambda: {"x": torch.randint(low, V, (B, length)), "target": torch.randn(B)}


class Fn(nn.Module):
    """A model made of named parameters, modules and a forward function ``f(self, x)``."""

    def __init__(self, f: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, p in module.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return module


class Seq(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
