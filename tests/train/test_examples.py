from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from discreet.core.seeded import seeded
from discreet.errors import ConfigError
from discreet.train.examples import BatchedDataset, Examples
from train import toys

CPU = torch.device("cpu")


class _Rows(Dataset):
    """A plain map-style data set over the toys."""

    def __init__(self, shift: float = 0.0) -> None:
        self.features, self.targets = toys.data().tensors
        self.shift = shift

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.features[index] + self.shift, "y": self.targets[index]}


class _Fast(_Rows):
    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[indices], self.targets[indices]


def test_three_kinds_of_data_sets_give_the_same_rows() -> None:
    indices = np.array([3, 11, 50])
    features, targets = Examples(toys.data()).fetch(indices, device=CPU)
    fast = Examples(_Fast()).fetch(indices, device=CPU)
    slow = Examples(_Rows()).fetch(indices, device=CPU)
    assert isinstance(_Fast(), BatchedDataset)
    assert torch.equal(features, fast[0])
    assert torch.equal(features, slow["x"])
    assert torch.equal(targets, fast[1])
    assert torch.equal(targets, slow["y"])


def test_fingerprint_sees_one_bit_of_one_row_and_the_order() -> None:
    base = Examples(toys.data()).fingerprint()
    assert base == Examples(toys.data()).fingerprint()
    features, targets = (tensor.clone() for tensor in toys.data().tensors)
    features[119, 5] = torch.nextafter(features[119, 5], torch.tensor(9.0))
    assert Examples(TensorDataset(features, targets)).fingerprint() != base
    flipped = TensorDataset(toys.data().tensors[0].flip(0), toys.data().tensors[1].flip(0))
    assert Examples(flipped).fingerprint() != base
    assert Examples(_Rows()).fingerprint() != Examples(_Rows(shift=1e-6)).fingerprint()


@pytest.mark.parametrize(
    "hold",
    [
        lambda rows: {"x": rows.numpy()},
        lambda rows: UserDict({"x": rows}),
        lambda rows: SimpleNamespace(x=rows),
        lambda rows: {"x": [rows.numpy().astype(object)]},
    ],
    ids=["array", "dictionary of a class", "object", "array of objects"],
)
def test_fingerprint_sees_one_row_whatever_holds_it(hold: Callable[[torch.Tensor], object]) -> None:
    """The text of an array or a tensor of more than a thousand numbers shows its ends alone."""
    rows = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    changed = rows.clone()
    changed[300, 3] += 1.0
    first, again, other = (
        Examples(DataLoader(TensorDataset(some), collate_fn=lambda items: hold(torch.stack([x for (x,) in items]))))
        for some in (rows, rows.clone(), changed)
    )
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_fingerprint_sees_which_name_a_row_has() -> None:
    def named(one: str, other: str) -> str:
        loader = DataLoader(toys.data(), collate_fn=lambda items: {one: torch.zeros(4), other: torch.ones(4)})
        return Examples(loader).fingerprint()

    assert named("a", "b") != named("b", "a")


class _Sized(_Rows):
    batch = 32


class _Grouping(_Rows):
    def batch(self, batch_size: int) -> list[object]:
        """As in Hugging Face's data sets: something else than the examples at some indices."""
        return [self[index] for index in range(int(batch_size[0]))]


class _Bare:
    def __len__(self) -> int:
        return toys.EXAMPLES

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """By another name, but there is no other way to the rows."""
        return {"x": toys.data().tensors[0][rows]}


@pytest.mark.parametrize("kind", [_Sized, _Grouping, _Bare])
def test_a_data_set_whose_batch_is_something_else_is_read_row_by_row(kind: type[_Rows]) -> None:
    rows = np.array([7, 3])
    assert torch.equal(Examples(kind()).fetch(rows, device=CPU)["x"], toys.data().tensors[0][rows])


@pytest.mark.parametrize("draw", [torch.rand, np.random.random_sample, lambda _size: random.random()])
def test_a_transform_that_draws_has_one_fingerprint_and_one_batch_per_seed(draw: Callable[[int], object]) -> None:
    """Augmentation by numpy or by Python's random made every resumed run look like one on other data."""

    class Augmented(_Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": self.features[index] + torch.as_tensor(draw(1), dtype=torch.float32)}

    examples = Examples(Augmented())
    rows = np.arange(3)
    assert examples.fingerprint() == examples.fingerprint()
    with seeded(7):
        first = examples.fetch(rows, device=CPU)["x"]
    assert not torch.equal(first, examples.fetch(rows, device=CPU)["x"])
    with seeded(7):
        assert torch.equal(first, examples.fetch(rows, device=CPU)["x"])


def test_seeding_gives_the_callers_generators_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random_sample()), float(torch.rand(()))

    with seeded(1):
        expected = drawn()
        with pytest.raises(IndexError), seeded(2):
            drawn()[3]
        following = drawn()
    with seeded(1):
        assert (drawn(), drawn()) == (expected, following)


def test_collate_of_a_loader_is_used() -> None:
    loader = DataLoader(_Rows(), collate_fn=lambda rows: torch.stack([row["x"] for row in rows]))
    assert Examples(loader).fetch(np.array([1, 2]), device=CPU).shape == (2, 6)


class _Hundredfold(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        rows, targets = super().__getitem__(index)
        return 100 * rows, targets


def test_what_a_class_of_ones_own_makes_of_its_tensors_is_used() -> None:
    """Its tensors were taken as they are, past its ``__getitem__``, and no check could see it."""
    plain, own = toys.data(), _Hundredfold(*toys.data().tensors)
    for source in (own, DataLoader(own, batch_size=5)):
        rows, targets = Examples(source).fetch(np.array([3, 11]), device=CPU)
        assert torch.equal(rows, 100 * plain.tensors[0][[3, 11]])
        assert torch.equal(targets, plain.tensors[1][[3, 11]])


class _LongestFirst(SubsetRandomSampler):
    pass


@pytest.mark.parametrize(
    "given",
    [
        {"sampler": SubsetRandomSampler(range(90))},
        {"sampler": WeightedRandomSampler(torch.ones(120), 120)},
        {"sampler": _LongestFirst(range(120))},
        {"sampler": list(range(90))},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(range(90)), 8, drop_last=False)},
        {"batch_sampler": [[0, 1], [2, 3]]},
    ],
    ids=["subset", "weighted", "of one's own", "a list", "subset in batches", "batches"],
)
def test_a_sampler_that_may_leave_rows_out_is_refused(given: dict[str, object]) -> None:
    """It was passed over: of a data set that is cut in two by samplers, the validation rows were trained on."""
    with pytest.raises(ConfigError, match="Subset"):
        Examples(DataLoader(toys.data(), **given))


@pytest.mark.parametrize(
    "given",
    [
        {"shuffle": True, "drop_last": True},
        {"sampler": SequentialSampler(toys.data())},
        {"batch_sampler": BatchSampler(RandomSampler(toys.data()), 8, drop_last=True)},
    ],
    ids=["shuffled", "in order", "in batches"],
)
def test_a_sampler_of_every_row_is_not_needed(given: dict[str, object]) -> None:
    assert Examples(DataLoader(toys.data(), **given)).count == toys.EXAMPLES


def test_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        Examples(TensorDataset(torch.zeros(0, 2)))


def test_a_tuple_of_tensors_is_not_taken_for_two_examples() -> None:
    inputs = torch.zeros(5, 3)
    with pytest.raises(ConfigError, match=r"a tuple of 2 tensors.*TensorDataset"):
        Examples((inputs, inputs))  # type: ignore[arg-type]
    assert Examples([inputs[0], inputs[1]]).count == 2  # type: ignore[arg-type]
    assert Examples(TensorDataset(inputs, inputs)).count == 5
