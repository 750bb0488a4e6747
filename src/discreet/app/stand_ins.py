"""Random examples of the public shape of the data: for the self-check and for measuring. No row is read."""

from __future__ import annotations

import torch
from torch import Tensor

from discreet.app import models
from discreet.app.data import ImageInput, InputSpec, TextInput
from discreet.core.clipping import Clipping
from discreet.privacy.compute import Machine
from discreet.train.throughput import measure_stand_ins

_MEASURED_EXAMPLES = 64
"""Different examples to measure on; larger microbatches repeat them."""


def random_examples(spec: models.ModelSpec, *, count: int) -> tuple[Tensor, Tensor]:
    """Features and targets as the model of ``spec`` takes them, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(spec.classes, (count,), generator=generator)
    return _random_features(spec.input, count, generator), targets


def measure_spec(spec: models.ModelSpec, *, device: torch.device, clipping: Clipping) -> Machine:
    """What private updates of this model cost on a device; takes a few seconds."""
    with torch.random.fork_rng():
        model = models.build(spec).to(device)
    features, targets = random_examples(spec, count=_MEASURED_EXAMPLES)
    batch = (features.to(device), targets.to(device))
    return measure_stand_ins(model, loss=models.loss, batch=batch, clipping=clipping)


def _random_features(input_spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    if isinstance(input_spec, TextInput):
        return torch.randint(input_spec.vocabulary, (count, input_spec.length), generator=generator)
    if isinstance(input_spec, ImageInput):
        shape = (count, input_spec.channels, input_spec.height, input_spec.width)
        return torch.randn(shape, generator=generator)
    return torch.randn((count, input_spec.features), generator=generator)
