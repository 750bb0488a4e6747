"""`discreet check`: the self-check of a model on random examples that have the public shape of the data.

The data file is read and validated, and its public shape is used; no private value reaches the model or the output, so
checking costs no budget.
"""

from __future__ import annotations

import torch

from discreet.app import models
from discreet.app.data import ImageInput, InputSpec, TextInput
from discreet.app.training import DataOptions, open_data, stand_in
from discreet.train.check import CheckReport, check

_EXAMPLES = 4


def check_data(data: DataOptions, *, kind: models.ModelKind) -> CheckReport:
    """Check the model that `discreet train` would build for this data."""
    spec = stand_in(open_data(data, kind=kind), kind=kind)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(spec.classes, (_EXAMPLES,), generator=generator)
    return check(models.build(spec), models.loss, (_random_features(spec.input, generator), targets))


def _random_features(input_spec: InputSpec, generator: torch.Generator) -> torch.Tensor:
    if isinstance(input_spec, TextInput):
        return torch.randint(input_spec.vocabulary, (_EXAMPLES, input_spec.length), generator=generator)
    if isinstance(input_spec, ImageInput):
        shape = (_EXAMPLES, input_spec.channels, input_spec.height, input_spec.width)
        return torch.randn(shape, generator=generator)
    return torch.randn((_EXAMPLES, input_spec.features), generator=generator)
