"""`discreet check`: the self-check of a model on random examples that have the public shape of the data.

The data file is read and validated, and its public shape is used; no private value reaches the model or the output, so
checking costs no budget.
"""

from __future__ import annotations

import torch

from discreet.app import models
from discreet.app.data import ImageInput, InputSpec, Source, TableInput, TextInput
from discreet.app.training import DataOptions, open_data
from discreet.train.check import CheckReport, check

_EXAMPLES = 4
_STAND_IN_FEATURES = 24
_STAND_IN_CLASSES = 3


def check_data(data: DataOptions, *, kind: models.ModelKind) -> CheckReport:
    """Check the model that `discreet train` would build for this data."""
    source = open_data(data, kind=kind)
    input_spec = public_input(source)
    spec = models.specify(kind, input_spec=input_spec, classes=_STAND_IN_CLASSES)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(_STAND_IN_CLASSES, (_EXAMPLES,), generator=generator)
    return check(models.build(spec), models.loss, (_random_features(input_spec, generator), targets))


def public_input(source: Source) -> InputSpec:
    """What the model is fed. The number of features of a table is private until it is released: a stand-in is used."""
    return TableInput(features=_STAND_IN_FEATURES) if source.input is None else source.input


def _random_features(input_spec: InputSpec, generator: torch.Generator) -> torch.Tensor:
    if isinstance(input_spec, TextInput):
        return torch.randint(input_spec.vocabulary, (_EXAMPLES, input_spec.length), generator=generator)
    if isinstance(input_spec, ImageInput):
        shape = (_EXAMPLES, input_spec.channels, input_spec.height, input_spec.width)
        return torch.randn(shape, generator=generator)
    return torch.randn((_EXAMPLES, input_spec.features), generator=generator)
