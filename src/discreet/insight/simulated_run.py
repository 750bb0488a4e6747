"""One simulated run at constant TAN: a private run's noise in the parameters and steps, at a k-th of its batch.

    (B, sigma, S) -> (B / k, sigma / k, S)        same learning rate, same clipping (arXiv:2210.03403, section 4)

**A simulation is not private**, although the run that it stands for is: its sigma is tiny. Charging it is void, too:
each trial has the signal-to-noise of a full run and would cost a whole epsilon in the best of worlds. So private data
are refused here, unless the caller asks for an unaccounted search, which is then stamped NON-PRIVATE in its type, its
log line and its file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from discreet.core.axes import Layout
from discreet.core.clipping import Clipping, ClippingKind
from discreet.core.gradient import LossFunction
from discreet.core.rng import seed_key, subkey
from discreet.errors import ConfigError
from discreet.insight.origin import NON_PRIVATE_STAMP, Origin
from discreet.privacy.plan import Plan
from discreet.privacy.sampling import PoissonSampling
from discreet.train.check import check
from discreet.train.examples import Data, Examples
from discreet.train.setup import clipping_of
from discreet.train.trial import Recipe, Schedule, fresh_model, run_trial

_CHECK_EXAMPLES = 4
_log = logging.getLogger("discreet")


@dataclass(frozen=True)
class Proxy:
    """Data that stand for the private ones.

    Attributes:
        data: training examples, as `make_private` takes them.
        score: accuracy of a model on held-out examples of the same kind, in [0, 1].
        origin: PUBLIC, also for synthetic data; nobody but the caller can know.
        name: for people.
    """

    data: Data
    score: Callable[[nn.Module], float]
    origin: Origin
    name: str


@dataclass(frozen=True)
class Candidate:
    """One setting of the private run: what would be trained in earnest.

    Attributes:
        name: unique among its rivals.
        plan: (B, sigma, S) and the clipping of the real run.
        recipe: optimiser and learning rate.
        build: a model with fresh weights from torch's global generator, which is seeded before the call.
        loss: per-example losses, shape (B,).
    """

    name: str
    plan: Plan
    recipe: Recipe
    build: Callable[[], nn.Module]
    loss: LossFunction


@dataclass(frozen=True)
class Trial:
    """One simulated run: of whom, at which scale, with which randomness, and how accurate it became."""

    candidate: str
    batch: int
    noise_multiplier: float
    steps: int
    seed: int
    accuracy: float


def scaled(plan: Plan, *, factor: float, examples: int) -> Schedule:
    """``(B, sigma, S) -> (B / k, sigma / k, S)`` on a data set of another size.

    B / k is rounded to a whole number and sigma follows it, so that sigma / B is that of the plan exactly. The size of
    the data set enters through the number of passes alone.

    Raises:
        ConfigError: k is below 1, or the proxy has fewer examples than one batch.
    """
    if not 1 <= factor < math.inf:
        raise ConfigError(f"scale {factor}: must be at least 1 and finite; the usual one is 64.")
    batch = max(1, round(plan.batch_size / factor))
    if batch > examples:
        raise ConfigError(
            f"simulated batch of {batch}: must be at most the proxy's {examples} examples; use a larger scale or proxy."
        )
    return Schedule(
        sampling=PoissonSampling(examples=examples, batch_size=batch),
        noise_multiplier=plan.noise_multiplier * batch / plan.batch_size,
        steps=plan.steps,
    )


def run_simulated(
    candidate: Candidate,
    proxy: Proxy,
    *,
    factor: float,
    seed: int,
    unaccounted: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Trial:
    """One simulated run; ``factor=1`` is the real size. The same seed and batch give the same bits.

    Raises:
        ConfigError: private data without ``unaccounted``.
        CheckFailed: the candidate could not be trained privately.
    """
    check_origin(proxy, unaccounted=unaccounted)
    layout = checked_layout(candidate, proxy)
    return run_checked(candidate, proxy, layout=layout, factor=factor, seed=seed, on_step=on_step)


def run_checked(
    candidate: Candidate,
    proxy: Proxy,
    *,
    layout: Layout | None,
    factor: float,
    seed: int,
    on_step: Callable[[int], None] | None,
) -> Trial:
    """`run_simulated` for a caller that has checked the origin of the data and the candidate, for many runs at once."""
    examples = Examples(proxy.data)
    schedule = scaled(candidate.plan, factor=factor, examples=examples.count)
    # A seed starts from the same weights at every batch; batches and noise differ with the batch.
    key = subkey(seed_key(seed), f"simulation|{schedule.sampling.batch_size}|{schedule.steps}")
    model = fresh_model(candidate.build, key=seed_key(seed))
    run_trial(
        model,
        examples,
        loss=candidate.loss,
        schedule=schedule,
        recipe=candidate.recipe,
        clipping=clipping_of(candidate.plan),
        layout=layout,
        key=key,
        private=False,
        on_step=on_step,
    )
    return Trial(
        candidate=candidate.name,
        batch=schedule.sampling.batch_size,
        noise_multiplier=schedule.noise_multiplier,
        steps=schedule.steps,
        seed=seed,
        accuracy=float(proxy.score(model)),
    )


def checked_layout(candidate: Candidate, proxy: Proxy) -> Layout | None:
    """Check on a few examples that the candidate can be trained privately; how its uses carry the batch.

    Raises:
        CheckFailed: it cannot.
    """
    examples, clipping = Examples(proxy.data), clipping_of(candidate.plan)
    model = fresh_model(candidate.build, key=seed_key(0))
    compare = Clipping.automatic() if clipping.kind is ClippingKind.NONE else clipping
    few = min(_CHECK_EXAMPLES, examples.count)
    batch = examples.fetch(np.arange(few), device=next(model.parameters()).device)
    report = check(model, candidate.loss, batch, clipping=compare, examples=few)
    report.raise_if_failed()
    return report.layout


def check_origin(proxy: Proxy, *, unaccounted: bool) -> None:
    """Refuse private data that nobody asked to simulate on; stamp the log where somebody did.

    Raises:
        ConfigError: private data without ``unaccounted``.
    """
    if proxy.origin is Origin.PUBLIC:
        return
    if not unaccounted:
        raise ConfigError(
            f"simulation on private data ({proxy.name}): each trial would cost a full epsilon and none is charged; "
            "simulate on public data of the same kind, use `discreet tune`, or ask for an unaccounted search, which is "
            f"stamped {NON_PRIVATE_STAMP}."
        )
    _log.warning("discreet: %s: simulating on private data (%s) without accounting", NON_PRIVATE_STAMP, proxy.name)
