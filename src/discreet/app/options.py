"""What a user may say about data and training, and what it stands for: a source, a device, a clipping rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from discreet.app import models
from discreet.app.data import PublicCalibration, SetApart, Source, TableInput, open_source
from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.insight.origin import Origin
from discreet.privacy.plan import Plan
from discreet.train.auto_lr import AutoLR
from discreet.train.setup import clipping_of
from discreet.train.tempered import is_tempered, tempered_clipping

_STAND_IN_FEATURES = 24
_FEATURES_PER_COLUMN = 12
"""A column that is counted privately becomes about so many features: 13 on average for Adult."""
_STAND_IN_CLASSES = 3


@dataclass(frozen=True)
class DataOptions:
    """Where the data lie and what is publicly known about them. See `open_source`.

    Attributes:
        calibration: rows for a temperature. test_origin: whether the user says that the test rows are public.
    """

    path: Path
    target: str | None = None
    test: Path | None = None
    columns: tuple[str, ...] | None = None
    schema: Path | None = None
    classes: int | tuple[str, ...] | None = None
    text_column: str | None = None
    image_size: tuple[int, int] | None = None
    calibration: SetApart | PublicCalibration | None = None
    test_origin: Origin = Origin.PRIVATE


@dataclass(frozen=True)
class TrainOptions:
    """What a user may say about training; None leaves it to the planner or to the defaults of the model.

    With a ``plan``, epsilon, delta, batch, steps and clipping are the plan's.
    """

    epsilon: float
    delta: float | None = None
    model: models.ModelKind = models.ModelKind.AUTO
    batch_size: int | None = None
    steps: int | None = None
    learning_rate: float | AutoLR | None = None
    clipping: Clipping | None = None
    plan: Plan | None = None
    compute: str | None = None
    microbatch: int | None = None
    out: Path | None = None
    resume: bool = False
    device: str = "auto"
    seed: int | None = None


def open_data(data: DataOptions, *, kind: models.ModelKind) -> Source:
    """Read and validate the data for a kind of model."""
    return open_source(
        data.path,
        target=data.target,
        test=data.test,
        columns=data.columns,
        schema=data.schema,
        classes=data.classes,
        text_column=data.text_column,
        image_size=data.image_size,
        text_units=models.text_units(kind),
        calibration=data.calibration,
    )


def stand_in(source: Source, *, kind: models.ModelKind, clipping: Clipping) -> models.ModelSpec:
    """The model for this data, as far as it is public: numbers that are private until released are stood in for."""
    features = max(_STAND_IN_FEATURES, _FEATURES_PER_COLUMN * len(source.statistics))
    input_spec = TableInput(features=features) if source.input is None else source.input
    return models.specify(kind, input_spec=input_spec, classes=_STAND_IN_CLASSES, tempered=is_tempered(clipping))


def rule_asked(options: TrainOptions, examples: int) -> Clipping:
    """The clipping rule: the plan's, the user's, or the one that is chosen from public facts."""
    if options.plan is not None:
        return clipping_of(options.plan)
    if math.isinf(options.epsilon):
        return Clipping.none()
    return options.clipping if options.clipping is not None else tempered_clipping(examples)


def pick_device(name: str) -> torch.device:
    """ "auto" is an accelerator when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'device "{name}": torch does not know it; use auto, cpu or cuda.') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device "{name}": no CUDA device is available; use --device cpu.')
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f'device "{name}": must be below cuda:{count}, as they are counted from 0; name another one.')
    return device
