"""Small private-training set-ups that the tests of `train` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from discreet.train.examples import Data
from discreet.train.loop import Private
from discreet.train.make_private import make_private

EXAMPLES = 120


def data(dtype: torch.dtype = torch.float32, *, examples: int = EXAMPLES) -> TensorDataset:
    """Two classes in the plane, with some noise; the same at every call."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(examples, 6, generator=generator, dtype=torch.float64)
    targets = (features[:, 0] + 0.3 * features[:, 1] > 0).long()
    return TensorDataset(features.to(dtype), targets)


class Dicts(Dataset[dict[str, Tensor]]):
    """The same data by name: rows and labels."""

    def __init__(self) -> None:
        self._data = data()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows, targets = self._data[index]
        return {"rows": rows, "labels": targets}


def model(dtype: torch.dtype = torch.float32, *, dropout: float = 0.0) -> nn.Module:
    """A small network; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)).to(dtype)


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy per example, shape (B,)."""
    return F.cross_entropy(network(batch[0]), batch[1], reduction="none")


def weights(network: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def private_run(
    run_dir: Path,
    *,
    network: nn.Module | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = torch.optim.Adam,
    dataset: Data | None = None,
    **given: object,
) -> Private:
    """A private run of these toys; ``given`` are further arguments of `make_private`."""
    network = model() if network is None else network
    moved = optimizer(network.parameters())
    return make_private(
        network, moved, data() if dataset is None else dataset, run_dir=run_dir, **{"loss": loss, **given}
    )
