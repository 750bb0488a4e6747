"""What a search is made of: the settings that it chooses among, how runs are scored, and one run under one key.

All of it is made, tried and described before the search is charged: what is found to be wrong afterwards costs the
whole epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from discreet.core.gradient import LossFunction, trainable
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, subkey
from discreet.core.score import SCORES, ScoreFunction, is_isolated, summed_scores
from discreet.errors import CheckFailed, ConfigError
from discreet.privacy.plan import Plan
from discreet.privacy.sampling import PoissonSampling
from discreet.train.auto_lr import RateControl
from discreet.train.check import CheckReport
from discreet.train.environment import describe_environment, digest, source_of, weights_digest, without_addresses
from discreet.train.examples import Examples
from discreet.train.self_check import self_check
from discreet.train.setup import clipping_of
from discreet.train.stillness import Watch
from discreet.train.tempered import check_tempered
from discreet.train.trial import MICROBATCH, Recipe, Schedule, fresh_model, run_trial

_ANY_KEY = bytes(32)
"""Of models that are looked at and thrown away."""


@dataclass(frozen=True)
class Choice:
    """One setting among which a search chooses.

    Attributes:
        name: unique, and public: that of the best is released.
        build: a new model at every call, with weights from torch's global generator, which is seeded before the call.
        recipe: optimiser and learning rate.
    """

    name: str
    build: Callable[[], nn.Module]
    recipe: Recipe


@dataclass(frozen=True)
class PublicScore:
    """Score a model on data outside the guarantee: costs nothing.

    Attributes:
        score: model -> any number, larger is better; it must not read a private example. It is tried on untrained
            models first.
        data: what it reads, e.g. a hash: a search is not resumed with another one.
    """

    score: Callable[[nn.Module], float]
    data: str = ""


@dataclass(frozen=True)
class PrivateScore:
    """Score a model by its mean over the private examples, with noise; charged with the run.

    Attributes:
        score: per-example scores in [0, 1], shape (B,), e.g. right answers; each a function of its own example.
    """

    score: ScoreFunction


class Contest:
    """Everything that a run of a search is made of but its key: settings, data, score.

    Attributes:
        choices: the settings. reports: their self-checks.
        environment: what the runs depend on, for comparison on resume.
        score_noise_std: of a released score; None when scores are public.

    Raises:
        ConfigError: a choice does not make a new model at every call, or a public score is no number.
        CheckFailed: a choice could not be trained privately, or a score is not that of one example alone.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        examples: Examples,
        *,
        loss: LossFunction,
        score: PublicScore | PrivateScore,
        plan: Plan,
    ) -> None:
        assert plan.search is not None
        self.choices = tuple(choices)
        self._examples, self._loss, self._score, self._plan = examples, loss, score, plan
        self._clipping = clipping_of(plan)
        noise = plan.search.score_noise
        self.score_noise_std = None if noise is None else noise / plan.examples
        models = self._built()
        self.reports = [self._checked(model) for model in models]
        self.environment = self._describe(models)

    def model(self, choice: int, *, key: bytes) -> nn.Module:
        """A fresh model of a choice."""
        return fresh_model(self.choices[choice].build, key=key)

    def run(
        self, choice: int, *, key: bytes, private: bool, on_step: Callable[[], None] | None
    ) -> tuple[nn.Module, float]:
        """Train and score one setting under one key."""
        model = self.model(choice, key=key)
        run_trial(
            model,
            self._examples,
            loss=self._loss,
            schedule=Schedule(
                sampling=PoissonSampling(examples=self._plan.examples, batch_size=self._plan.batch_size),
                noise_multiplier=self._plan.noise_multiplier,
                steps=self._plan.steps,
            ),
            recipe=self.choices[choice].recipe,
            clipping=self._clipping,
            layout=self.reports[choice].layout,
            key=key,
            private=private,
            allowed=self.reports[choice].allowed,
            on_step=None if on_step is None else lambda _step: on_step(),
        )
        watch = Watch(model, self.reports[choice].allowed) if private else None
        score = self._scored(model, key=key, private=private, watch=watch)
        # NaN compares with nothing: such a run can only be kept when there is no other.
        return model, score if not math.isnan(score) else -math.inf

    def _scored(self, model: nn.Module, *, key: bytes, private: bool, watch: Watch | None) -> float:
        if isinstance(self._score, PublicScore):
            return _public(self._score, model)
        assert self._plan.search is not None
        assert self._plan.search.score_noise is not None
        device = next(model.parameters()).device
        parts = [
            np.arange(start, min(start + MICROBATCH, self._examples.count))
            for start in range(0, self._examples.count, MICROBATCH)
        ]
        batches = ((self._examples.fetch(part, device=device), len(part)) for part in parts)
        with watch.unmoved() if watch is not None else nullcontext():
            total = summed_scores(model, self._score.score, batches)
        released = release(
            total,
            noise_multiplier=self._plan.search.score_noise,
            source=NoiseSource.keyed(subkey(key, "score noise"), private=private),
            divisor=self._examples.count,
        )
        return float(released.tensors[SCORES])

    def _built(self) -> list[nn.Module]:
        """One model of each choice, after a second one of each was compared with it and with all others.

        A model that two runs share would be trained by both, and the second would hold all that the first has seen:
        what is charged for one run would stand for two.
        """
        pairs = [[self.model(index, key=_ANY_KEY) for _ in range(2)] for index in range(len(self.choices))]
        holder: dict[int, str] = {}
        for choice, (first, second) in zip(self.choices, pairs, strict=True):
            for model in (first, second):
                memory = {tensor.untyped_storage().data_ptr() for tensor in trainable(model).values()}
                shared = memory & holder.keys()
                if shared:
                    raise ConfigError(
                        f"choice {choice.name!r}: its model shares trainable weights with one that was made for "
                        f"{holder[shared.pop()]!r}; make a new model inside build, at every call."
                    )
                holder |= dict.fromkeys(memory, choice.name)
            if weights_digest(first) != weights_digest(second):
                raise ConfigError(
                    f"choice {choice.name!r}: two models of one seed have different weights, so a killed search could "
                    "not go on; draw them from torch's global generator alone."
                )
        return [first for first, _ in pairs]

    def _checked(self, model: nn.Module) -> CheckReport:
        check_tempered(model, self._clipping)
        device = next(model.parameters()).device
        report = self_check(model, self._loss, self._examples, self._clipping, device)
        if isinstance(self._score, PublicScore):
            _public(self._score, model)
            return report
        few = np.arange(min(4, self._examples.count))
        batch = self._examples.fetch(few, device=device)
        singles = [self._examples.fetch(few[at : at + 1], device=device) for at in few]
        if not is_isolated(model, self._score.score, batch, singles, loss=self._loss):
            raise CheckFailed(
                "score: in evaluation mode an example's score or loss depends on other examples of its batch; score "
                "each one by itself."
            )
        return report

    def _describe(self, models: Sequence[nn.Module]) -> dict[str, str]:
        first = models[0]
        optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
        known = describe_environment(
            model=first,
            loss=self._loss,
            optimizer=optimizer,
            rates=RateControl(optimizer, None, steps=1),
            clipping=self._clipping,
            examples=self._examples,
        )
        settings = [
            f"{choice.name}|{choice.recipe!r}|{without_addresses(repr(model))}|{weights_digest(model)}"
            for choice, model in zip(self.choices, models, strict=True)
        ]
        reads = self._score.data if isinstance(self._score, PublicScore) else "the private examples"
        return {**known, "choices": digest(*settings), "score": digest(source_of(self._score.score), reads)}


def _public(score: PublicScore, model: nn.Module) -> float:
    with torch.no_grad():
        value = score.score(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"score: {type(value).__name__} is no number; return one per model, larger for a better one."
        ) from None
