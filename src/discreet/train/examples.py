"""Private examples as the training step sees them: fetched by index, collated, and fingerprinted."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from discreet.core.seeded import seeded
from discreet.errors import ConfigError

_FINGERPRINT_BLOCK = 4096
_MADE_UP_SEED = _FINGERPRINT_SEED = 20_778


@runtime_checkable
class BatchedDataset(Protocol):
    """A map-style data set that can fetch many examples at once; the fast path for tensors in memory."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Tensor) -> Any:
        """The examples at these int64 indices, collated."""
        ...


Data = Dataset[Any] | BatchedDataset | DataLoader[Any]


class Examples:
    """A map-style data set (or the one inside a DataLoader) with its way to collate.

    Only the data set and ``collate_fn`` of a DataLoader are used: which examples form a batch is the plan's business,
    and a batch size of the loader would contradict it.

    Raises:
        ConfigError: the data set is iterable-style, a tuple of tensors, or empty; or the loader's sampler may leave
            examples out, or prefer some.
    """

    def __init__(self, source: Data) -> None:
        dataset = source.dataset if isinstance(source, DataLoader) else source
        if isinstance(source, DataLoader):
            _refuse_choice(source)
        self._collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(source, DataLoader) and source.collate_fn is not None:
            self._collate = source.collate_fn
        if isinstance(dataset, IterableDataset):
            raise ConfigError("an IterableDataset cannot be Poisson-sampled by index; pass a map-style data set.")
        if isinstance(dataset, tuple) and all(isinstance(part, (Tensor, np.ndarray)) for part in dataset):
            raise ConfigError(
                f"a tuple of {len(dataset)} tensors: it would count as {len(dataset)} examples, whatever their rows; "
                "pass torch.utils.data.TensorDataset(inputs, targets)."
            )
        self._dataset: Any = dataset
        self._batched = _gives_batches(dataset)
        # A class of one's own may make something else of the tensors.
        self._of_tensors = getattr(type(dataset), "__getitem__", None) is TensorDataset.__getitem__
        self.count = len(self._dataset)
        if self.count < 1:
            raise ConfigError("an empty data set: there is nothing to train on; pass at least one example.")

    def fetch(self, indices: np.ndarray, *, device: torch.device) -> Any:
        """The collated batch of these examples, on ``device``."""
        batch = self._batch(indices)
        _open(batch)
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    def made_up(self, *, device: torch.device) -> Any:
        """A batch of one example that is none, of the shapes of the first; the same at every call."""
        with seeded(_MADE_UP_SEED, devices=[device.index or 0] if device.type == "cuda" else []):
            return made_up(self.fetch(np.zeros(1, dtype=np.int64), device=device))

    def _batch(self, indices: np.ndarray) -> Any:
        if self._collate is not default_collate:
            return self._collate([self._dataset[int(index)] for index in indices])
        if self._of_tensors:
            rows = torch.from_numpy(indices)
            return tuple(tensor[rows] for tensor in self._dataset.tensors)
        if self._batched:
            return self._dataset.batch(torch.from_numpy(indices))
        return self._collate([self._dataset[int(index)] for index in indices])

    def fingerprint(self) -> str:
        """SHA-256 over all examples in order. Kept in the private half: it identifies the data.

        A transform that draws at random gives the same one in every process, as far as it draws from the global
        generators.
        """
        digest = hashlib.sha256(str(self.count).encode())
        with seeded(_FINGERPRINT_SEED):
            for start in range(0, self.count, _FINGERPRINT_BLOCK):
                indices = np.arange(start, min(start + _FINGERPRINT_BLOCK, self.count))
                _absorb(digest, self._batch(indices))
        return digest.hexdigest()


def _refuse_choice(loader: DataLoader[Any]) -> None:
    """Refuse a sampler that does not mean every example, once: those that it leaves out would be trained on."""
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    own = batches is not None and type(batches) is not BatchSampler
    if own or not isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise ConfigError(
            f"a DataLoader with a {type(batches if own else sampler).__name__}: batches are Poisson samples of the "
            "whole data set, so it would not be asked; pass loader.dataset, or Subset(dataset, indices) of "
            "torch.utils.data."
        )


def _open(batch: Any) -> None:
    """Let all that goes through a batch see the tensors in a mapping or a dataclass of a class of its own.

    To torch that is one leaf and no tensor, and so is the `BatchEncoding` of a tokenizer.
    """
    for leaf in tree_leaves(batch):
        held = _held(leaf)
        if any(isinstance(part, Tensor) for part in tree_leaves(list(held.values()))):
            _make_known(type(leaf), by_name=not isinstance(leaf, Mapping))
            _open(batch)
            return


def _held(thing: Any) -> Mapping[Any, Any]:
    """What is in a mapping, or in a dataclass that can be made again from it; else nothing."""
    if isinstance(thing, Mapping):
        return thing
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) and not isinstance(thing, type) else ()
    return {field.name: getattr(thing, field.name) for field in fields} if all(f.init for f in fields) else {}


def _make_known(kind: Callable[..., Any], *, by_name: bool) -> None:
    def parts(thing: Any) -> tuple[list[Any], list[Any]]:
        held = _held(thing)
        return list(held.values()), list(held)

    def made(values: Iterable[Any], names: list[Any]) -> Any:
        held = dict(zip(names, values, strict=True))
        return kind(**held) if by_name else kind(held)

    register_pytree_node(kind, parts, made)


def _gives_batches(dataset: Any) -> bool:
    """Whether ``batch`` is that of a `BatchedDataset`, and no size or other method of the same name.

    It is where it takes ``indices``, or where there is no other way to the rows.
    """
    if not isinstance(dataset, BatchedDataset) or not callable(dataset.batch):
        return False
    if getattr(type(dataset), "__getitem__", None) in (None, Dataset.__getitem__):
        return True
    try:
        return list(inspect.signature(dataset.batch).parameters)[:1] == ["indices"]
    except (TypeError, ValueError):
        return False


def made_up(batch: Any) -> Any:
    """A batch of the same shapes that holds no example: random numbers for numbers, 0 for whole ones.

    0 is what every table and every list of classes has. Draws from torch's global generator. What is no tensor stays.
    """

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.randn_like(leaf) if leaf.is_floating_point() else torch.zeros_like(leaf)

    return tree_map(fill, batch)


def _absorb(digest: hashlib._Hash, batch: Any) -> None:
    """Take in all of a batch. The text of an array, or of what holds tensors, leaves most of it out."""
    leaves, structure = tree_flatten(batch)
    digest.update(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(_bytes_of(leaf))
        elif isinstance(leaf, Mapping):
            _absorb(digest, dict(leaf))
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
            digest.update(repr(leaf).encode())
        else:
            digest.update(_written_out(leaf))


def _bytes_of(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content


class _Writer(pickle.Pickler):
    """Writes objects out, to be hashed and never read; tensors by their bytes, for torch would add an address."""

    def persistent_id(self, thing: Any) -> bytes | None:
        return _bytes_of(thing) if isinstance(thing, Tensor) else None


def _written_out(leaf: Any) -> bytes:
    content = io.BytesIO()
    try:
        _Writer(content, protocol=4).dump(leaf)
    except (pickle.PicklingError, TypeError, AttributeError):
        return repr(leaf).encode()
    return content.getvalue()
