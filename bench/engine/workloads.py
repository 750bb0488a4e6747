"""Which model, batch, loss and optimizer each name stands for, in three sizes.

Data is random, and every loss is one number per example: for a language model, one per sequence.

Shape legend: B = examples, T = positions, V = vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.engine import imported, models

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Workload:
    """What every contestant is given."""

    model: nn.Module
    batch: Batch
    loss: Loss
    optimizer: Optimizer

    @property
    def nbytes(self) -> int:
        """Size of the parameters, each once, of the buffers and of the batch."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *self.batch))

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Workload:
        """The same on another device, with parameters and real-valued inputs in another precision."""
        inputs, targets = self.batch
        inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
        model = self.model.to(device=device, dtype=dtype)
        return Workload(model=model, batch=(inputs, targets.to(device)), loss=self.loss, optimizer=self.optimizer)


def classifier_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy per example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over the positions of each sequence."""
    logits_BTV, ids_BT = model(batch[0]), batch[1]
    return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten(), reduction="none").reshape(ids_BT.shape).mean(1)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Plain SGD, with steps so small that the figures of a long run are those of its start."""
    return torch.optim.SGD(parameters, lr=1e-5)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW, with steps so small that the figures of a long run are those of its start."""
    return torch.optim.AdamW(parameters, lr=1e-6)


def _images(model: Callable[[], nn.Module], *, shape: tuple[int, ...], batch: int, optimizer: Optimizer) -> Workload:
    data = (torch.randn(batch, *shape), torch.randint(10, (batch,)))
    return Workload(model=model(), batch=data, loss=classifier_loss, optimizer=optimizer)


def _texts(model: Callable[[], nn.Module], *, vocabulary: int, length: int, batch: int) -> Workload:
    # 0, 1 and 2 are special tokens (padding among them) to some models.
    data = (torch.randint(3, vocabulary, (batch, length)), torch.randint(2, (batch,)))
    return Workload(model=model(), batch=data, loss=classifier_loss, optimizer=adamw)


def _language(
    build: Callable[..., nn.Module], *, vocabulary: int, width: int, depth: int, heads: int, length: int, batch: int
) -> Workload:
    ids_BT = torch.randint(vocabulary, (batch, length + 1))
    model = build(vocabulary=vocabulary, width=width, depth=depth, heads=heads, length=length)
    data = (ids_BT[:, :-1].clone(), ids_BT[:, 1:].clone())
    return Workload(model=model, batch=data, loss=sequence_loss, optimizer=adamw)


def _vit(*, image: int, patch: int, width: int, depth: int, heads: int, batch: int) -> Workload:
    build = partial(
        models.VisionTransformer, image=image, patch=patch, width=width, depth=depth, heads=heads, classes=10
    )
    return _images(build, shape=(3, image, image), batch=batch, optimizer=adamw)


def _lstm(*, vocabulary: int, embedding: int, width: int, length: int, batch: int) -> Workload:
    build = partial(models.Recurrent, vocabulary=vocabulary, embedding=embedding, width=width, classes=2)
    return _texts(build, vocabulary=vocabulary, length=length, batch=batch)


def _roberta(
    *, vocabulary: int, width: int, depth: int, heads: int, feed: int, positions: int, length: int, batch: int
) -> Workload:
    build = partial(
        imported.roberta,
        vocabulary=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        feed=feed,
        length=positions,
    )
    return _texts(build, vocabulary=vocabulary, length=length, batch=batch)


def _mlp(*, inputs: int, hidden: int, batch: int) -> Workload:
    build = partial(models.perceptron, inputs=inputs, hidden=hidden, classes=10)
    return _images(build, shape=(inputs,), batch=batch, optimizer=sgd)


_SQUARE = (3, 32, 32)
_GPT = partial(_language, models.Decoder, width=512, depth=4, heads=8)
_GPT2_SMALL = partial(_language, imported.gpt2, vocabulary=50257, width=768, depth=12, heads=12)
_GPT2_MEDIUM = partial(_language, imported.gpt2, vocabulary=50257, width=1024, depth=24, heads=16)
_LLAMA_1B = partial(imported.llama, key_heads=8, feed=8192)
_WRN = partial(models.wide_resnet, depth=16, widening=4, classes=10)
_RESNET18 = partial(models.resnet18, classes=10)
_RESNET50 = partial(models.resnet50, classes=1000)

_SMALL: Mapping[str, Callable[[], Workload]] = {
    "mlp": partial(_mlp, inputs=784, hidden=1024, batch=512),
    "cnn": partial(_images, models.small_cnn, shape=(1, 28, 28), batch=256, optimizer=sgd),
    "resnet18gn": partial(_images, _RESNET18, shape=_SQUARE, batch=32, optimizer=sgd),
    "wrn16-4gn": partial(_images, _WRN, shape=_SQUARE, batch=16, optimizer=sgd),
    "vit": partial(_vit, image=32, patch=4, width=192, depth=6, heads=3, batch=64),
    "lstm": partial(_lstm, vocabulary=5000, embedding=100, width=128, length=64, batch=64),
    "roberta": partial(
        _roberta, vocabulary=50265, width=512, depth=4, heads=8, feed=2048, positions=128, length=128, batch=16
    ),
    "gpt": partial(_GPT, vocabulary=8000, length=128, batch=8),
    "gpt_50k": partial(_GPT, vocabulary=50257, length=128, batch=8),
    "gpt_long": partial(_GPT, vocabulary=8000, length=512, batch=4),
    "gpt_long_50k": partial(_GPT, vocabulary=50257, length=512, batch=2),
    "gpt2_hf": partial(_language, imported.gpt2, vocabulary=50257, width=512, depth=4, heads=8, length=128, batch=8),
}

_REAL: Mapping[str, Callable[[], Workload]] = {
    "gpt2-small-128": partial(_GPT2_SMALL, length=128, batch=256),
    "gpt2-small-1024": partial(_GPT2_SMALL, length=1024, batch=32),
    "gpt2-medium-128": partial(_GPT2_MEDIUM, length=128, batch=64),
    "gpt2-medium-1024": partial(_GPT2_MEDIUM, length=1024, batch=8),
    "roberta-large": partial(
        _roberta, vocabulary=50265, width=1024, depth=24, heads=16, feed=4096, positions=512, length=128, batch=128
    ),
    "vit-l16": partial(_vit, image=224, patch=16, width=1024, depth=24, heads=16, batch=64),
    "resnet50gn": partial(_images, _RESNET50, shape=(3, 224, 224), batch=128, optimizer=sgd),
    "llama-1b": partial(_language, _LLAMA_1B, vocabulary=128256, width=2048, depth=16, heads=32, length=2048, batch=2),
}
"""Batches that fill an accelerator: on smaller ones every contestant waits for Python."""

_TINY: Mapping[str, Callable[[], Workload]] = {
    "mlp": partial(_mlp, inputs=12, hidden=16, batch=8),
    "vit": partial(_vit, image=8, patch=4, width=16, depth=2, heads=2, batch=4),
    "lstm": partial(_lstm, vocabulary=50, embedding=8, width=12, length=6, batch=4),
    "roberta": partial(_roberta, vocabulary=60, width=16, depth=1, heads=2, feed=32, positions=8, length=6, batch=4),
    "gpt": partial(_language, models.Decoder, vocabulary=50, width=16, depth=2, heads=2, length=6, batch=4),
    "gpt2_hf": partial(_language, imported.gpt2, vocabulary=50, width=16, depth=1, heads=2, length=6, batch=4),
    "llama": partial(
        _language,
        partial(imported.llama, key_heads=1, feed=32),
        vocabulary=50,
        width=16,
        depth=1,
        heads=2,
        length=6,
        batch=4,
    ),
}


class Sizes(enum.Enum):
    """Three sets of workloads: for two cores, for an accelerator, and for the tests of the benchmark itself."""

    SMALL = "small"
    REAL = "real"
    TINY = "tiny"

    @property
    def workloads(self) -> Mapping[str, Callable[[], Workload]]:
        """Name -> a function that builds the workload."""
        return {Sizes.SMALL: _SMALL, Sizes.REAL: _REAL, Sizes.TINY: _TINY}[self]
