"""Measure the proxy table: losses along T at several noise-batch ratios, on public data, at one small batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from discreet.core.rng import seed_key, subkey
from discreet.errors import ConfigError
from discreet.insight.proxy_table import Curves, rolling_mean
from discreet.insight.simulated_run import Candidate, Proxy, check_origin, checked_layout
from discreet.insight.simulation import OnProgress
from discreet.privacy.sampling import PoissonSampling
from discreet.train.examples import Examples
from discreet.train.setup import clipping_of
from discreet.train.trial import Recipe, Schedule, fresh_model, run_trial

PLACES = 24
"""How many numbers of steps a curve is measured at, evenly in log T."""

FIRST_STEPS = 8


def measure_curves(
    candidate: Candidate,
    proxy: Proxy,
    *,
    ratios: Sequence[float],
    recipes: Sequence[Recipe],
    cost: float,
    batch: int = 64,
    seed: int = 0,
    unaccounted: bool = False,
    on_progress: OnProgress | None = None,
) -> Curves:
    """One run per ratio and recipe, scored on the way; at each place the best recipe counts.

    One run gives the whole curve, so its rate must be constant: a decaying one has not ended when it is looked at.

    Args:
        candidate: whose model, loss, clipping and ``plan.steps`` (the longest run) are used.
        ratios: nu = sigma / B, ascending. recipes: without decay.
        cost: compute of one example of one step, for `Curves`.
        batch: the physical batch of every run; sigma is ``nu * batch``.

    Returns:
        Curves of ``1 - accuracy``.

    Raises:
        ConfigError: a recipe decays, private data without ``unaccounted``, or a batch above the proxy's size.
    """
    check_origin(proxy, unaccounted=unaccounted)
    if not recipes or any(recipe.decay for recipe in recipes):
        raise ConfigError("recipes of a table: at least one, none with decay: curves are read before their end.")
    steps = candidate.plan.steps
    places = sorted({round(place) for place in np.geomspace(min(FIRST_STEPS, steps), steps, PLACES)})
    done, in_all = 0, steps * len(ratios) * len(recipes)
    rows: list[np.ndarray] = []
    for ratio in ratios:
        curves = []
        for recipe in recipes:
            curve = _curve(
                dataclasses.replace(candidate, recipe=recipe), proxy, ratio=ratio, batch=batch, places=places, seed=seed
            )
            curves.append(rolling_mean(np.asarray([curve]))[0])
            done += steps
            if on_progress is not None:
                on_progress(done, in_all)
        rows.append(np.min(curves, axis=0))
    return Curves(
        steps_T=tuple(places),
        ratios_V=tuple(float(ratio) for ratio in ratios),
        loss_VT=tuple(tuple(float(value) for value in row) for row in rows),
        cost=cost,
    )


def _curve(
    candidate: Candidate, proxy: Proxy, *, ratio: float, batch: int, places: Sequence[int], seed: int
) -> list[float]:
    key = subkey(seed_key(seed), f"proxy table|{batch}")
    layout, examples = checked_layout(candidate, proxy), Examples(proxy.data)
    model = fresh_model(candidate.build, key=key)
    wanted, losses = set(places), []

    def look(step: int) -> None:
        if step in wanted:
            losses.append(1.0 - _score(proxy, model))

    run_trial(
        model,
        examples,
        loss=candidate.loss,
        schedule=Schedule(
            sampling=PoissonSampling(examples=examples.count, batch_size=batch),
            noise_multiplier=ratio * batch,
            steps=candidate.plan.steps,
        ),
        recipe=candidate.recipe,
        clipping=clipping_of(candidate.plan),
        layout=layout,
        key=key,
        private=False,
        on_step=look,
    )
    return losses


def _score(proxy: Proxy, model: nn.Module) -> float:
    """Score mid-run: without gradients, and without touching the run's random numbers."""
    with torch.random.fork_rng(), torch.no_grad():
        return float(proxy.score(model))
