"""Data sets and the grid of candidates: rates half a decade apart, fixed before the benchmark was run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from discreet.app import models
from discreet.app.data import Prepared, Preprocessing, digits, open_source
from discreet.app.evaluation import evaluate
from discreet.core.clipping import Clipping
from discreet.core.rng import NoiseSource
from discreet.insight.simulated_run import Candidate, Origin, Proxy
from discreet.privacy.plan import Plan
from discreet.train.trial import Recipe

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SHAPES = (
    (models.ModelKind.LINEAR, 1),
    (models.ModelKind.MLP, 8),
    (models.ModelKind.MLP, 24),
    (models.ModelKind.MLP, 64),
)


@dataclass(frozen=True)
class Setting:
    """The private run that is simulated: what it is about, and its expected batch, steps and epsilon."""

    name: str
    batch_size: int
    steps: int
    epsilon: float
    prepare: Callable[[], Prepared]


def _idx_folder(name: str) -> Prepared:
    root = os.environ.get("DISCREET_DATA", str(Path(__file__).resolve().parents[3] / "shared" / "data"))
    source = open_source(Path(root) / name, classes=10)
    public = Preprocessing(noise_multiplier=0.0, delta=0.0)
    return source.prepare(noise_source=NoiseSource.insecure_seed(0), preprocessing=public)


SETTINGS = {
    "digits": Setting(name="digits", batch_size=1024, steps=400, epsilon=3.0, prepare=digits),
    "fashion_mnist": Setting(
        name="fashion_mnist", batch_size=4096, steps=300, epsilon=1.0, prepare=partial(_idx_folder, "fashion_mnist")
    ),
    "mnist": Setting(name="mnist", batch_size=4096, steps=300, epsilon=1.0, prepare=partial(_idx_folder, "mnist")),
}


def proxy_of(prepared: Prepared, *, name: str) -> Proxy:
    """The training part to train on, the test part to score on. Both are public."""
    assert prepared.test is not None
    test = prepared.test

    def accuracy(model) -> float:
        found = evaluate(model, test)
        assert found is not None
        return found.accuracy

    return Proxy(data=prepared.train, score=accuracy, origin=Origin.PUBLIC, name=name)


def candidates_of(setting: Setting, prepared: Prepared) -> list[Candidate]:
    """Four models times five rates, as `discreet train` trains them: Adam, automatic clipping, linear decay."""
    plan = Plan.solve(
        examples=len(prepared.train),
        batch_size=setting.batch_size,
        steps=setting.steps,
        epsilon=setting.epsilon,
        clipping=Clipping.automatic().describe(),
    )
    found = []
    for kind, width in SHAPES:
        usual = models.specify(kind, input_spec=prepared.input, classes=len(prepared.classes))
        spec = dataclasses.replace(usual, width=width)
        name = kind.value if kind is models.ModelKind.LINEAR else f"{kind.value}-{width}"
        found += [
            Candidate(
                name=f"{name} at {rate:g}",
                plan=plan,
                recipe=Recipe(rate),
                build=lambda spec=spec: models.build(spec),
                loss=models.loss,
            )
            for rate in RATES
        ]
    return found
