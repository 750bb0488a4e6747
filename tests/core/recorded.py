"""What the tests of recordings share: what stands in for CUDA graphs, a small model, and when two sums are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.replay import Replay
from discreet.train.check import check

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Again:
    """Runs what was recorded once more, into the memory of the first time."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        Again.made += 1

    def record(self, once: Callable[[], ClippedSum]) -> tuple[Callable[[], None], ClippedSum]:
        once()
        return once, once()


class Words(nn.Module):
    """A small model with a table, attention-free mixing, a norm and a head that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.mix, self.norm = nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.drop = nn.Dropout(0.0)
        self.scale = torch.ones(8, device=DEVICE)
        self.scales = {"mix": 1.0}

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.mix(self.table(ids_BT)) * self.scales["mix"]) * self.scale
        return self.norm(self.drop(mixed)) @ self.table.weight.T


def words_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, wanted = model(batch["ids"]), batch["wanted"]
    return F.cross_entropy(logits.mT, wanted, reduction="none").mean(1) * batch["weight"]


def drawn(examples: int, *, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for `words_loss`; the same at every call with one seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (examples, length), generator=generator).to(DEVICE)
    return {"ids": ids, "wanted": ids.flip(1).contiguous(), "weight": torch.ones(examples, device=DEVICE)}


def first_rows(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: value[:count] for name, value in batch.items()}


def prepared(clipping: Clipping = Clipping.automatic()) -> tuple[nn.Module, Replay, Callable[..., ClippedSum]]:  # noqa: B008
    """A model, its recordings, and what makes the same sums as written."""
    model = Words().to(DEVICE)
    layout = check(model, words_loss, drawn(4), clipping=clipping).layout
    made = Replay(model, words_loss, clipping=clipping, layout=layout)
    return model, made, lambda batch: clipped_gradient(model, words_loss, batch, clipping=clipping, layout=layout)


def expect_same(found: ClippedSum, wanted: ClippedSum) -> None:
    assert found.sensitivity == wanted.sensitivity
    assert found.noise_weights == wanted.noise_weights
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-5, atol=1e-6)
