"""What a row of the zoo is: a named architecture from its configuration, a batch, and one loss per example.

Nothing is downloaded. Every parameter is shaken after construction, so that no gradient is zero only because an
architecture starts with a zero (adapters, LayerScale, the last layer of a residual branch).

Shape legend: B = examples, T = tokens, V = words.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.packages import make_importable

B, T, V = 5, 9, 61

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class ZooModel:
    """One row: how to build it, how to feed it, and what is worth knowing about it.

    Attributes:
        name: as people call it.
        family: the package that defines it, as it is imported; ``torch`` for those built here.
        build: the model, in float32, in evaluation mode.
        batch: a batch of B examples as keyword arguments of the loss.
        loss: one loss per example, shape (B,).
        notes: what it exercises.
        shake: standard deviation added to every parameter.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Loss
    notes: str
    shake: float = 0.02

    @property
    def installed(self) -> bool:
        """Whether the package that defines the model is there."""
        return importlib.util.find_spec(self.family) is not None

    def make(self, dtype: torch.dtype = torch.float64, *, training: bool = False) -> tuple[nn.Module, Batch]:
        """Model and batch, the same numbers every time, in a dtype."""
        make_importable()
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(self.shake * torch.randn_like(parameter))
        batch = self.batch()
        model = model.to(dtype).train(training)
        return model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


# ------------------------------------------------------------------------------------------------------------ batches


def tokens(length: int = T, *, words: int = V, low: int = 3) -> Callable[[], Batch]:
    """Token ids with repeats, (B, T)."""
    return lambda: {"input_ids": torch.randint(low, words, (B, length))}


def images(side: int = 32, *, channels: int = 3) -> Callable[[], Batch]:
    """Gaussian images, (B, C, side, side)."""
    return lambda: {"pixel_values": torch.randn(B, channels, side, side)}


def signals(*shape: int, name: str = "x") -> Callable[[], Batch]:
    """Gaussian features, (B, *shape)."""
    return lambda: {name: torch.randn(B, *shape)}


# ------------------------------------------------------------------------------------------------------------- losses


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of each sequence over its own tokens."""
    target_BT = batch["input_ids"][:, 1:]
    logits_BTV = model(**batch, use_cache=False).logits  # virtual tokens, if any, come first
    return _mean_cross_entropy(logits_BTV[:, -target_BT.shape[1] - 1 : -1], target_BT)


def masked_token(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the tokens of each sequence, of a model that sees both sides."""
    return _mean_cross_entropy(model(**batch).logits, batch["input_ids"].roll(1, 1))


def translation(model: nn.Module, batch: Batch) -> Tensor:
    """An encoder reads the source, a decoder predicts the source's reverse; one loss per pair."""
    target = batch["input_ids"].flip(1)
    logits_BTV = model(**batch, decoder_input_ids=target, use_cache=False).logits
    return _mean_cross_entropy(logits_BTV[:, :-1], target[:, 1:])


def classes(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of one label per example, read off the row's own data; the model returns ``.logits``."""
    return _label_loss(model(**batch).logits, batch)


def plain_classes(model: nn.Module, batch: Batch) -> Tensor:
    """The same for models that take one tensor and return logits."""
    return _label_loss(model(*batch.values()), batch)


def curved(output: Tensor) -> Tensor:
    """Any output (B, ...) -> (B,): curved, and different in every entry."""
    flat = output.flatten(1)
    ramp = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat - ramp).square().mean(1) + (flat * ramp).tanh().mean(1)


def hidden_state(model: nn.Module, batch: Batch) -> Tensor:
    """For towers without a head: a curved function of the last hidden state."""
    return curved(model(**batch).last_hidden_state)


def _mean_cross_entropy(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none").mean(1)


def _label_loss(logits_BK: Tensor, batch: Batch) -> Tensor:
    (data,) = batch.values()
    label_B = data.flatten(1)[:, :4].long().abs().sum(1) % logits_BK.shape[1]
    return F.cross_entropy(logits_BK, label_B, reduction="none")
