"""What a data set or its collate function makes of an example must not depend on those that are fetched with it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from discreet.errors import CheckFailed, ConfigError
from discreet.train.examples import Data
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from train import toys

WHAT = "fetched with it"
CPU = torch.device("cpu")


def _private(where: Path, data: Data, *, model: nn.Module | None = None, loss=toys.loss) -> Private:
    network = toys.model() if model is None else model
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return make_private(
        network, optimizer, data, loss=loss, noise_multiplier=1.0, batch_size=20, steps=2, learning_rate=None,
        run_dir=where / "run", microbatch=64,
    )  # fmt: skip


def _mixup(items: list[Any]) -> Any:
    x, y = default_collate(items)
    share = torch.rand(())
    return share * x + (1 - share) * x[torch.randperm(len(x))], y


def _mixup_at_times(items: list[Any]) -> Any:
    return _mixup(items) if torch.rand(()) < 0.5 else default_collate(items)


def _standardised(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x - x.mean(0), y


def _pasted(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return torch.cat([x[:, :3], x.roll(1, 0)[:, 3:]], 1), y


COUPLED: dict[str, Callable[[list[Any]], Any]] = {
    "mixed": _mixup,
    "mixed with a chance": _mixup_at_times,
    "standardised": _standardised,
    "pasted": _pasted,
}


@pytest.mark.parametrize("name", list(COUPLED))
def test_a_collate_function_that_couples_examples_is_refused(tmp_path: Path, name: str) -> None:
    """One example out of the batch moved the inputs, and so the clipped gradients, of all others."""
    with pytest.raises(CheckFailed, match=WHAT):
        _private(tmp_path, DataLoader(toys.data(), collate_fn=COUPLED[name]))


class _Batched:
    """Fetches many at once."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.features, self.targets = toys.data().tensors
        self.change = change

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.change(self.features[indices]), self.targets[indices]


def test_a_data_set_that_couples_what_it_fetches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=WHAT):
        _private(tmp_path, _Batched(lambda x: x / x.norm()))


def _noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def test_an_augmentation_of_each_example_passes(tmp_path: Path) -> None:
    for _ in _private(tmp_path, _Batched(_noisy)):
        pass


class _Restless(Dataset):
    """Its own generator goes on with every item; seeded from torch, it is what torch says."""

    def __init__(self, *, seeded: bool) -> None:
        self.data, self.seeded, self.generator = toys.data(), seeded, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.seeded:
            self.generator = np.random.default_rng(int(torch.randint(2**31, ())))
        x, y = self.data[index]
        return x * float(self.generator.uniform(0.9, 1.1)), y


def test_a_generator_of_its_own_is_named(tmp_path: Path) -> None:
    """It was said to couple examples, which it does not."""
    with pytest.raises(CheckFailed, match="gives another example each time") as refusal:
        _private(tmp_path, _Restless(seeded=False))
    assert WHAT not in str(refusal.value)
    assert len(list(_private(tmp_path / "seeded", _Restless(seeded=True)))) == 2


class _Ragged(Dataset):
    """Sentences of different lengths; an item may draw how much of it is there."""

    def __init__(self, *, drops: bool = False) -> None:
        self.drops = drops

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        words = torch.arange(1, 3 + (index * 7) % 5)
        return words[int(torch.randint(2, ())) :] if self.drops else words, index % 2


def _padded(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    words = nn.utils.rnn.pad_sequence([words for words, _ in items], batch_first=True)
    return {"words": words, "target": torch.tensor([target for _, target in items])}


def _with_tokens(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    batch = _padded(items)
    return {**batch, "tokens": (batch["words"] > 0).sum()}


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.drop, self.head = nn.Embedding(9, 4), nn.Dropout(0.2), nn.Linear(4, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.drop((self.words(words) * (words > 0)[..., None]).sum(1)))


def _bag_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(model(batch["words"]), batch["target"], reduction="none")
    return each / batch["tokens"] if "tokens" in batch else each


@pytest.mark.parametrize("drops", [False, True])
def test_padding_to_the_longest_passes(tmp_path: Path, drops: bool) -> None:
    """Another example brings another length: the losses are what they were."""
    data = DataLoader(_Ragged(drops=drops), collate_fn=_padded)
    for _ in _private(tmp_path, data, model=_Bag(), loss=_bag_loss):
        pass


def test_a_number_of_the_whole_batch_is_refused(tmp_path: Path) -> None:
    """It has no row for each example, so the check that takes rows of a batch leaves it as it is."""
    with pytest.raises(CheckFailed, match=WHAT):
        _private(tmp_path, DataLoader(_Ragged(), collate_fn=_with_tokens), model=_Bag(), loss=_bag_loss)


def test_a_collate_function_is_used_whatever_the_data_set_is(tmp_path: Path) -> None:
    """Around a TensorDataset it was passed over."""

    def named(items: list[Any]) -> dict[str, Tensor]:
        x, y = default_collate(items)
        return {"x": 2 * x, "y": y}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    assert len(list(_private(tmp_path, DataLoader(toys.data(), collate_fn=named), loss=loss))) == 2


class _Encoding(UserDict[str, Tensor]):
    """As tokenizers give it: a mapping that torch knows nothing of, whose values are attributes as well."""

    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


@dataclass
class _Pair:
    x: Tensor
    y: Tensor


def _stacked(items: list[Any]) -> dict[str, Tensor]:
    x, y = default_collate(items)
    return {"x": x, "y": y}


def _loss_of_pair(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


@pytest.mark.parametrize("made", [lambda parts: _Encoding(parts), lambda parts: _Pair(**parts)])
def test_a_batch_of_a_class_of_its_own(tmp_path: Path, made: Callable[[dict[str, Tensor]], Any]) -> None:
    """It counted as one leaf without a tensor, and what it holds as coupled."""
    data = DataLoader(toys.data(), collate_fn=lambda items: made(_stacked(items)))
    assert len(list(_private(tmp_path / "alone", data, loss=_loss_of_pair))) == 2
    mixed = DataLoader(
        toys.data(), collate_fn=lambda items: made(_stacked(list(zip(*_standardised(items), strict=True))))
    )
    with pytest.raises(CheckFailed, match=WHAT):
        _private(tmp_path / "mixed", mixed, loss=_loss_of_pair)


def test_a_batch_that_is_a_list_of_examples_is_refused_by_name(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        return toys.loss(model, default_collate(batch))

    with pytest.raises(ConfigError, match="without a tensor of 4 rows"):
        _private(tmp_path, DataLoader(toys.data(), collate_fn=lambda items: items), loss=loss)


def _takes_out(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch.pop("y"), reduction="none")


def _writes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"].sub_(0.1)), batch["y"], reduction="none")


@pytest.mark.parametrize("loss", [_takes_out, _writes])
def test_a_loss_that_changes_its_batch_is_refused_by_name(tmp_path: Path, loss: Any) -> None:
    """The first was a KeyError, the second was said to couple examples."""
    with pytest.raises(ConfigError, match="let it begin with a copy"):
        _private(tmp_path, DataLoader(toys.data(), collate_fn=_stacked), loss=loss)


def test_rows_that_are_not_finite_are_what_they_are(tmp_path: Path) -> None:
    features, targets = toys.data().tensors
    features = features.clone()
    features[1] = float("nan")

    class Rows(_Batched):
        def __init__(self) -> None:
            self.features, self.targets, self.change = features, targets, lambda x: x

    assert len(list(_private(tmp_path, Rows()))) == 2
