"""What the self-check cannot see on four examples is asked of a microbatch, and again while training draws batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from discreet.core.precision import each_close
from discreet.errors import CheckFailed
from discreet.train.recheck import ask_again, is_due
from discreet.train.step import ClippedStep
from train import toys
from train.short_run import run_and_optimizer


def test_ever_fewer_updates_ask() -> None:
    assert [update for update in range(70) if is_due(update)] == [0, 1, 3, 7, 15, 31, 63]


class _Later(nn.Module):
    """From some forward in training on, examples look at each other."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.network, self.updates, self._after = toys.model(), 0, after

    def forward(self, rows: Tensor) -> Tensor:
        return self.network(rows - rows.mean(0) if self.updates >= self._after else rows)


@pytest.mark.parametrize(("after", "noticed"), [(2, 3), (3, 3), (5, 7)])
@pytest.mark.parametrize("loop", ["steps", "microbatches"])
def test_a_coupling_that_begins_later(tmp_path: Path, loop: str, after: int, noticed: int) -> None:
    network = _Later(after=after)
    private, optimizer = run_and_optimizer(tmp_path, network=network)

    def train() -> None:
        if loop == "steps":
            for step in private:
                network.updates = step.index + 1
            return
        for batch in private.loader:
            private.backward(toys.loss(network, batch))
            optimizer.step()
            network.updates = private.done

    with pytest.raises(CheckFailed, match=rf"update {noticed}: an example's loss depends on others"):
        train()
    assert private.done == noticed


class _Rare(nn.Module):
    """Examples above 9 change what becomes of all others; the first four have none."""

    def __init__(self) -> None:
        super().__init__()
        self.network = toys.model()

    def forward(self, rows: Tensor) -> Tensor:
        return self.network(rows * (2.0 if bool((rows.detach() > 9).any()) else 1.0))


def test_a_coupling_by_values_that_the_first_examples_do_not_have(tmp_path: Path) -> None:
    rows, targets = toys.data().tensors
    rows = rows.clone()
    rows[20::7] = 10.0
    private, _ = run_and_optimizer(tmp_path, network=_Rare(), dataset=TensorDataset(rows, targets))
    with pytest.raises(CheckFailed, match="an example's loss depends on others"):
        for _ in private:
            pass
    assert private.done < 12


def test_a_coupling_from_many_examples_on(tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses_B = toys.loss(network, batch)
        return losses_B + (losses_B.mean() if len(losses_B) > 50 else 0.0)

    with pytest.raises(CheckFailed, match=r"on 70 examples failed.*an example's loss depends on others"):
        run_and_optimizer(tmp_path / "run", loss=loss, batch_size=70)
    assert not (tmp_path / "run").exists()  # nothing was charged


class _Lengths(Dataset[tuple[Tensor, Tensor]]):
    """Rows of six numbers, but for those of every fifth example, which are as many as its index."""

    def __len__(self) -> int:
        return toys.EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        length = index if index > 6 and index % 5 == 0 else 6
        return torch.full((length,), float(index % 3)), torch.tensor(index % 2)


def _padded(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows, targets = zip(*examples, strict=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack(targets)


def test_a_mean_over_padding(tmp_path: Path) -> None:
    """What an example is padded to follows from its company: so does its loss, once lengths differ."""

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        means_B = batch[0].mean(1, keepdim=True)
        return F.cross_entropy(network(means_B.expand(-1, 6)), batch[1], reduction="none")

    loader = DataLoader(_Lengths(), batch_size=4, collate_fn=_padded)
    private, _ = run_and_optimizer(tmp_path, dataset=loader, loss=loss)
    with pytest.raises(CheckFailed, match="an example's loss depends on others"):
        for _ in private:
            pass


class _Augmented(toys.Dicts):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = super().__getitem__(index)
        turns = int(torch.randint(1, 4, ()))  # draws as often as it likes
        return example | {"rows": example["rows"] + 0.1 * torch.randn(turns, 6).mean(0)}


def test_an_augmentation_draws_the_same_again(tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return toys.loss(network, (batch["rows"], batch["labels"]))

    private, _ = run_and_optimizer(tmp_path, dataset=_Augmented(), loss=loss)
    assert sum(1 for _ in private) == 12


WORDS = 9


class _Sentences(Dataset[Tensor]):
    """The first ones are as long as each other; what comes later is not."""

    def __len__(self) -> int:
        return toys.EXAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return 2 + torch.arange(4 if index < 8 else 2 + index * 7 % 13) % (WORDS - 2)


def _masks(words: Tensor) -> Tensor:
    return torch.bernoulli((words > 0) * 0.4).bool()


class _Filler(nn.Module):
    """Guesses hidden words (1) from the mean of those that are left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        seen = (words > 1)[..., None]
        context = (self.table(words) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.table(words) + context)


def _of_masked(network: nn.Module, words: Tensor, masks: Tensor) -> Tensor:
    logits = network(words.masked_fill(masks, 1))
    each = F.cross_entropy(logits.transpose(1, 2), words, reduction="none")
    return (each * masks).sum(1) / masks.sum(1).clamp(min=1)


@pytest.mark.parametrize("where", ["collate", "loss"])
def test_masked_words_of_texts_that_are_padded(tmp_path: Path, where: str) -> None:
    """Masks are drawn for a whole batch, padded to its longest text: other company, other numbers for the same text."""

    def collated(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        words = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return words, _masks(words) if where == "collate" else words > 0

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, masks = batch
        return _of_masked(network, words, _masks(words) if where == "loss" else masks)

    loader = DataLoader(_Sentences(), collate_fn=collated)
    private, _ = run_and_optimizer(tmp_path, dataset=loader, network=_Filler(), loss=loss)
    assert sum(1 for _ in private) == 12


@pytest.mark.parametrize("where", ["collate", "loss"])
def test_masked_words_that_are_coupled(tmp_path: Path, where: str) -> None:
    """The same, and each loss is divided by the number of masks of the batch, or of its longest text."""

    def collated(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
        words = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return words, _masks(words)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, masks = batch
        share = words.shape[1] if where == "collate" else 4.0 if words.shape[1] == 4 else masks.sum()
        return _of_masked(network, words, masks) / share

    loader = DataLoader(_Sentences(), collate_fn=collated)
    with pytest.raises(CheckFailed, match="no private training starts: an example's loss depends on others"):
        run_and_optimizer(tmp_path, dataset=loader, network=_Filler(), loss=loss)


def test_hostile_losses_hide_nothing() -> None:
    """One loss of a million beside others of one: 0.1 % of it is a thousand of them."""
    expected = torch.tensor([1e6, 1.0, 1.1, float("nan"), 0.9])
    assert each_close(expected.clone(), expected, 1e-3)
    assert not each_close(expected + torch.tensor([0.0, 0.01, 0.0, 0.0, 0.0]), expected, 1e-3)
    assert not each_close(expected.nan_to_num(), expected, 1e-3)
    assert each_close(torch.tensor([float("inf")]), torch.tensor([float("nan")]), 1e-3)


class _Sorted(nn.Module):
    """Puts its batch in the order of a key and back, by means that the graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        order = rows[:, 0].detach().round().argsort(stable=True)
        turned = torch.zeros_like(rows).index_copy(0, order.argsort(), rows)
        hidden = torch.tanh(self.first(turned))
        return self.last(torch.zeros_like(hidden).index_copy(0, order, hidden))


def test_norms_that_go_to_other_examples() -> None:
    """Asked of the function itself: the self-check refuses this model on batches that it makes up."""
    torch.manual_seed(0)
    network, (rows, targets) = _Sorted(), toys.data().tensors

    def fetch(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return rows[indices], targets[indices]

    def ask(indices: np.ndarray, update: int) -> None:
        ask_again(network, toys.loss, fetch, indices, layout=None, update=update)

    for update in (0, 1, 3):
        with pytest.raises(CheckFailed, match="norm of an example's gradient is not that of autograd"):
            ask(np.arange(40), update)
    same_key = np.flatnonzero(rows[:, 0].round() == 0)
    assert len(same_key) > 8
    ask(same_key, 0)


def test_norms_of_rows_that_are_not_finite_are_not_compared() -> None:
    rows, targets = toys.data().tensors
    rows = rows.clone()
    rows[::3] = torch.tensor([float("nan"), 1e30, -1e30, 1e38, 0.0, float("inf")])
    for update in (0, 1, 3, 7):
        ask_again(
            toys.model(),
            toys.loss,
            lambda indices: (rows[indices], targets[indices]),
            np.arange(33),
            layout=None,
            update=update,
        )


@pytest.mark.parametrize("count", [0, 1])
def test_no_example_and_one(count: int) -> None:
    rows, targets = (value[:count] for value in toys.data().tensors)
    ask_again(toys.model(), toys.loss, lambda _: (rows, targets), np.arange(count), layout=None, update=0)


def test_asking_again_is_content_with_fewer_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd keeps more than training does: what does not fit there is no reason to train in smaller microbatches."""
    private, _ = run_and_optimizer(tmp_path, microbatch=16)
    asked = []

    def short_of_memory(*given: object, **_: object) -> None:
        asked.append(len(given[3]))
        if asked[-1] > 4:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(sys.modules[ClippedStep.__module__], "ask_again", short_of_memory)
    next(iter(private))
    assert asked == [16, 8, 4]
    assert private._updates.step.microbatch.size == 16
