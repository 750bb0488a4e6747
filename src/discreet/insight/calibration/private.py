"""Temperature scaling on private data: a noisy bisection, one bounded sum per question.

The loss falls or rises at ``u = log(1 / T)``; the sign of a noisy sum of slopes says which, and halves the interval.
Each answer costs the same share of the budget. Two things differ from what is in the literature (Zhang et al.,
arXiv:2210.08248, clip gradients of 1 / T at 1):

- slopes are taken in log(1 / T), where they are "loss less entropy" in nats, of the same size for every model, so that
  one bound fits: at 4 nats clipping moves T by a few per cent at most, where slopes in 1 / T clipped at 1 left two
  thirds of the miscalibration;
- a line through the answers near the end gives the last digit, for nothing: it averages their noise, and its own
  uncertainty is known, since the noise is.

Shape legend: N = examples, K = classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from discreet.core.calibration import SLOPE, summed_slopes
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.privacy.accounting import Gaussian, HeldOut, Relation, SampledGaussian, solve_step_noise
from discreet.privacy.plan import CALIBRATION_PART

QUERIES = 8
BOUND = 4.0
"""Nats that one example adds at most; see docs/lab-notes.md for what 1 to 6 give."""

COLDEST, HOTTEST = 0.2, 20.0
"""Temperatures that the bisection can reach."""

LEAST_EXAMPLE_EPSILONS = 500.0
LEAST_EXAMPLES = 200
_NEAR = (0.35, 0.7)
"""Answers so close to the last question, in log T, lie on a line: the closer ones if they show that it rises. Where the
loss bends, as over a floor under all probabilities, the farther ones moved T by 5 %."""


@dataclass(frozen=True)
class PrivateTemperature:
    """A temperature that carries its noise. Everything here is released.

    Attributes:
        value: T.
        noise_std: standard deviation of T from the noise.
        sampling_std: of T from the finite number of examples, for a model that the temperature mends; infinite where
            the answers show no slope.
        examples: how many, public. noise_multiplier, queries, bound: what was asked, public.
        private: False when the noise came from a test seed, or there was none.
    """

    value: float
    noise_std: float
    sampling_std: float
    examples: int
    noise_multiplier: float
    queries: int
    bound: float
    private: bool

    @property
    def std(self) -> float:
        """Standard deviation of T from both."""
        return math.hypot(self.noise_std, self.sampling_std)

    @property
    def at_bound(self) -> bool:
        """At an end of the range: the answers never changed sign."""
        return not COLDEST * 1.02 < self.value < HOTTEST / 1.02

    def to_json(self) -> dict[str, object]:
        """As it stands in ``release/temperature.json``."""
        return {
            "temperature": self.value,
            "noise_std": _finite(self.noise_std),
            "sampling_std": _finite(self.sampling_std),
            "examples": self.examples,
            "noise_multiplier": self.noise_multiplier,
            "queries": self.queries,
            "bound": self.bound,
            "at_bound": self.at_bound,
            "private": self.private,
        }


@dataclass(frozen=True)
class PrivateRows:
    """How private examples may be asked for a temperature. Make it with `within` unless the noise is known.

    Attributes:
        noise_multiplier: of each question, in units of one example's largest share.
        source: the noise; one position is claimed for each question.
        charge: called once, with all questions as one query, before the first: reserve it in a ledger here.
        queries, bound: number of questions, and nats per example.
    """

    noise_multiplier: float
    source: NoiseSource
    charge: Callable[[Gaussian], object]
    queries: int = QUERIES
    bound: float = BOUND

    @classmethod
    def within(
        cls,
        epsilon: float,
        *,
        delta: float,
        source: NoiseSource,
        charge: Callable[[Gaussian], object],
        relation: Relation = Relation.ADD_REMOVE,
    ) -> PrivateRows:
        """The noise with which all questions together are (epsilon, delta)-DP."""
        noise = question_noise(epsilon=epsilon, delta=delta, relation=relation)
        return cls(noise_multiplier=noise, source=source, charge=charge)


def question_noise(
    *, epsilon: float, delta: float, queries: int = QUERIES, relation: Relation = Relation.ADD_REMOVE
) -> float:
    """Noise multiplier of each of so many questions on all examples of a part, certified by the accountant."""
    step = SampledGaussian(sample_rate=1.0, noise_multiplier=1.0, count=queries)
    return solve_step_noise(step, epsilon=epsilon, delta=delta, relation=relation).noise_multiplier


def check_support(examples: int, *, epsilon: float) -> None:
    """Refuse a temperature that the data cannot support. Both numbers are public.

    Raises:
        ConfigError: fewer than 200 examples, or ``examples * epsilon`` below 500: the noise would move T by a quarter.
    """
    if examples < LEAST_EXAMPLES or examples * epsilon < LEAST_EXAMPLE_EPSILONS:
        raise ConfigError(
            f"private temperature from {examples} examples at epsilon {epsilon:g}: needs at least {LEAST_EXAMPLES}, "
            f"and examples times epsilon of at least {LEAST_EXAMPLE_EPSILONS:g}; raise epsilon, set more examples "
            "apart, or use public data."
        )


def fit_private_temperature(
    logits_NK: Tensor, target_N: Tensor, *, rows: PrivateRows, examples: int | None = None
) -> PrivateTemperature:
    """Find the temperature by a noisy bisection in ``[log 1/20, log 5]`` of 1 / T.

    **Guarantees.** ``rows.queries`` Gaussian queries of sensitivity ``bound``, each with ``rows.noise_multiplier``,
    charged before the first. One row moves each sum by at most the bound, whatever it holds: scores that are not
    finite count as "all classes alike", a label that is no class as nothing. No step depends on the rows but through
    the answers: no error is raised for what they hold, and none are looked at twice. Logits must not depend on other
    private rows.

    Edge cases: no row at all gives a temperature of noise, and a standard deviation that says so.

    Args:
        logits_NK: scores before the softmax. target_N: class indices.
        rows: noise, charge, number of questions and bound.
        examples: public number of examples, for the record; None: N.
    """
    if rows.noise_multiplier < 0 or rows.queries < 2:
        raise ConfigError(
            f"queries={rows.queries}: needs at least 2, and noise of at least 0; use PrivateRows.within()."
        )
    rows.charge(Gaussian(noise_multiplier=rows.noise_multiplier, count=rows.queries))
    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    places, answers, noise_std = [], [], 0.0
    for _ in range(rows.queries):
        middle = (low + high) / 2
        total = summed_slopes(logits_NK, target_N, beta=math.exp(middle), bound=rows.bound)
        released = release(total, noise_multiplier=rows.noise_multiplier, source=rows.source)
        places.append(middle)
        answers.append(float(released.tensors[SLOPE]))
        noise_std = released.noise_std
        low, high = (low, middle) if answers[-1] > 0 else (middle, high)
    line = _line(places, answers, noise_std=noise_std, last=(low + high) / 2)
    value = math.exp(-line.root)
    return PrivateTemperature(
        value=value,
        noise_std=value * line.std,
        sampling_std=value / math.sqrt(line.slope) if line.slope > 0 else math.inf,
        examples=len(target_N) if examples is None else examples,
        noise_multiplier=float(rows.noise_multiplier),
        queries=rows.queries,
        bound=float(rows.bound),
        private=rows.source.private and rows.noise_multiplier > 0,
    )


@dataclass(frozen=True)
class _Line:
    """A line through noisy answers: where it is 0, with the standard deviation of that, and how it rises."""

    root: float
    std: float
    slope: float


def _line(places: Sequence[float], answers: Sequence[float], *, noise_std: float, last: float) -> _Line:
    """Least squares through the answers near the end; the bisection's own result where they do not rise.

    ``std(root) = (s / b) sqrt(1 / m + (root - mean x)^2 / Sxx)``, s the known noise of an answer, b the slope. The
    slope is also the curvature of the summed loss in log T. Where the model is calibrated once it is scaled, that is
    the Fisher information, so ``1 / sqrt(b)`` is the error in log T that the finite number of examples leaves.
    """
    for within in _NEAR:
        near = [index for index, place in enumerate(places) if abs(place - last) <= within]
        x, y = np.array(places)[near], np.array(answers)[near]
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * y).sum()) / spread if spread > 0 else 0.0
        # Two standard errors of the slope itself: below that, the line says nothing.
        if spread == 0 or slope <= 2 * noise_std / math.sqrt(spread):
            continue
        root = min(max(float(x.mean()) - float(y.mean()) / slope, float(x.min())), float(x.max()))
        return _Line(
            root=root,
            std=noise_std / slope * math.sqrt(1 / len(x) + (root - float(x.mean())) ** 2 / spread),
            slope=slope,
        )
    return _Line(root=last, std=math.inf, slope=0.0)


def held_out_charge(query: Gaussian) -> HeldOut:
    """The same questions, as asked of a part that a public hash set apart."""
    return HeldOut(part=CALIBRATION_PART, noise_multiplier=query.noise_multiplier, count=query.count)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
