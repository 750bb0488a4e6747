"""Simulation at constant TAN: compare settings of a private run at a small share of its cost, on data that are public.

Noise in the parameters and number of steps stay what they are, (B, sigma, S) -> (B / k, sigma / k, S), and so do
learning rate and clipping: "total amount of noise" (arXiv:2210.03403, section 4). Then the same settings win at B / k
as at B, k times cheaper. S is never reduced.

A simulation is not private, and private data are refused: see `discreet.insight.simulated_run`. To search on private
data and pay for it, see `discreet.train.tune`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from discreet.core.axes import Layout
from discreet.errors import ConfigError
from discreet.insight.extrapolation import FEWEST_SEEDS, Extrapolation, extrapolate
from discreet.insight.simulated_run import (
    NON_PRIVATE_STAMP,
    Candidate,
    Origin,
    Proxy,
    Trial,
    check_origin,
    checked_layout,
    run_checked,
)

USUAL_SAVING = 64.0
SMALLEST_BATCH = 16
"""Below this the test loss of scikit-learn's digits leaves that of the full batch (docs/lab-notes.md)."""

OnProgress = Callable[[int, int], None]
"""Told (steps done, steps in all) now and then."""


@dataclass(frozen=True)
class Standing:
    """One line of the ranking: mean and standard deviation over seeds at the scale of the ranking."""

    candidate: str
    mean: float
    sd: float


@dataclass(frozen=True)
class Simulation:
    """What was simulated and what follows.

    Attributes:
        ranking: best first. chosen: the first of them.
        trials: the runs behind the ranking. fitted: the runs of the chosen one behind the line; seeds of their own, so
            that having been chosen does not flatter it.
        fit: the line in log2 batch, and the interval for the real run.
        data: name of the proxy.
        examples_processed: per-example gradients spent here. full_search: what the same comparison costs at full size.
        seconds: wall-clock time.
    """

    ranking: tuple[Standing, ...]
    trials: tuple[Trial, ...]
    fitted: tuple[Trial, ...]
    fit: Extrapolation
    data: str
    examples_processed: int
    full_search: int
    seconds: float

    @property
    def stamp(self) -> str:
        """Empty: public data may be looked at as often as one likes."""
        return ""

    @property
    def chosen(self) -> str:
        """Name of the best candidate."""
        return self.ranking[0].candidate

    @property
    def saved(self) -> float:
        """How many times cheaper than the same comparison at full size, counted in per-example gradients."""
        return self.full_search / self.examples_processed

    def warnings(self) -> tuple[str, ...]:
        """What whoever reads the figures must know first."""
        return self.fit.warnings()

    def note(self) -> str:
        """One line for `Plan.notes`: how the plan's settings were chosen."""
        return f"chosen by simulation at constant TAN on public data ({self.data}): {self.chosen}"

    def to_json(self) -> dict[str, object]:
        """The file: ``points`` and ``fit`` are those of the chosen candidate."""
        return {
            "format": 1,
            "stamp": self.stamp,
            "data": self.data,
            "chosen": self.chosen,
            "points": [{"batch": t.batch, "seed": t.seed, "accuracy": t.accuracy} for t in self.fitted],
            "fit": self.fit.to_json(),
            "ranking": [{"candidate": s.candidate, "mean": s.mean, "sd": s.sd} for s in self.ranking],
            "trials": [
                {
                    "candidate": t.candidate,
                    "batch": t.batch,
                    "noise_multiplier": t.noise_multiplier,
                    "steps": t.steps,
                    "seed": t.seed,
                    "accuracy": t.accuracy,
                }
                for t in (*self.trials, *self.fitted)
            ],
            "examples_processed": self.examples_processed,
            "full_search": self.full_search,
            "saved": self.saved,
            "seconds": self.seconds,
            "warnings": list(self.warnings()),
        }


@dataclass(frozen=True)
class NonPrivateSimulation(Simulation):
    """The same on private data, unaccounted: nothing in it may be released, nor what was chosen by it."""

    @property
    def stamp(self) -> str:
        """What every page and file must show."""
        return NON_PRIVATE_STAMP

    def warnings(self) -> tuple[str, ...]:
        """The stamp first."""
        return (
            f"{NON_PRIVATE_STAMP}: simulated on private data without accounting; every figure here, and the choice of "
            f"{self.chosen!r}, may reveal examples, and no later epsilon covers it.",
            *super().warnings(),
        )

    def note(self) -> str:
        """One line for `Plan.notes`."""
        return f"{NON_PRIVATE_STAMP} search: chosen on private data without accounting: {self.chosen}"


def usual_scales(batch_size: int, *, saving: float = USUAL_SAVING) -> tuple[float, float, float]:
    """Three factors k around ``saving``, a factor of two apart, largest first; the middle one is for the ranking.

    Batches stay at 16 examples or more where that can be.
    """
    middle = max(2.0, min(saving, batch_size / (2 * SMALLEST_BATCH)))
    return (2 * middle, middle, middle / 2)


def simulate(
    candidates: Sequence[Candidate],
    proxy: Proxy,
    *,
    scales: Sequence[float] | None = None,
    seeds: int = FEWEST_SEEDS,
    first_seed: int = 0,
    unaccounted: bool = False,
    on_progress: OnProgress | None = None,
) -> Simulation:
    """Rank candidates at a small batch, then fit the best one against log2 batch and extrapolate to its real batch.

    All candidates meet the same batches, noise and initial weights at the same seed, so that their differences are
    theirs. Each run of the fit has a seed of its own, so that they share nothing, as the interval assumes.

    Args:
        candidates: a small grid, fixed before anything was looked at.
        proxy: what to train on and how to score.
        scales: factors k >= 1, at least three; None: `usual_scales` of the first candidate. The ranking is at the
            middle one.
        seeds: runs per candidate, and per batch size of the fit; at least 3.
        first_seed: of the ranking; those of the fit follow.
        unaccounted: allow private data, and get a `NonPrivateSimulation`.
        on_progress: see `OnProgress`.

    Raises:
        ConfigError: private data without ``unaccounted``, or too few candidates, scales or seeds.
        CheckFailed: a candidate could not be trained privately.
    """
    check_origin(proxy, unaccounted=unaccounted)
    factors = tuple(scales) if scales is not None else usual_scales(candidates[0].plan.batch_size if candidates else 1)
    _check_request(candidates, factors, seeds)
    started = time.monotonic()
    field = _Field(proxy, steps=_steps_in_all(candidates, scales=len(factors), seeds=seeds), on_progress=on_progress)
    middle = sorted(factors)[len(factors) // 2]
    by_name = {candidate.name: candidate for candidate in candidates}
    trials = [
        field.run(candidate, factor=middle, seed=first_seed + seed) for seed in range(seeds) for candidate in candidates
    ]
    ranking = rank(trials)
    best = by_name[ranking[0].candidate]
    again = [factor for _ in range(seeds) for factor in factors]
    fitted = [field.run(best, factor=factor, seed=first_seed + seeds + place) for place, factor in enumerate(again)]
    found = NonPrivateSimulation if proxy.origin is Origin.PRIVATE else Simulation
    return found(
        ranking=ranking,
        trials=tuple(trials),
        fitted=tuple(fitted),
        fit=fit_of(fitted, at_batch=best.plan.batch_size),
        data=proxy.name,
        examples_processed=sum(trial.batch * trial.steps for trial in (*trials, *fitted)),
        full_search=seeds * sum(c.plan.batch_size * c.plan.steps for c in candidates),
        seconds=time.monotonic() - started,
    )


def rank(trials: Sequence[Trial]) -> tuple[Standing, ...]:
    """Candidates by their mean accuracy over seeds, best first; ties in the order of appearance."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        scores.setdefault(trial.candidate, []).append(trial.accuracy)
    standings = [
        Standing(candidate=name, mean=statistics.fmean(values), sd=statistics.stdev(values) if len(values) > 1 else 0.0)
        for name, values in scores.items()
    ]
    return tuple(sorted(standings, key=lambda standing: -standing.mean))


def fit_of(trials: Sequence[Trial], *, at_batch: int) -> Extrapolation:
    """The line through the runs of one candidate."""
    scores: dict[int, list[float]] = {}
    for trial in trials:
        scores.setdefault(trial.batch, []).append(trial.accuracy)
    return extrapolate(scores, at_batch=at_batch)


class _Field:
    """Runs one trial after the other, and counts steps."""

    def __init__(self, proxy: Proxy, *, steps: int, on_progress: OnProgress | None) -> None:
        self._proxy, self._steps, self._on_progress = proxy, steps, on_progress
        self._before = 0
        self._layouts: dict[str, Layout | None] = {}

    def run(self, candidate: Candidate, *, factor: float, seed: int) -> Trial:
        if candidate.name not in self._layouts:
            self._layouts[candidate.name] = checked_layout(candidate, self._proxy)
        layout = self._layouts[candidate.name]
        trial = run_checked(candidate, self._proxy, layout=layout, factor=factor, seed=seed, on_step=self._show)
        self._before += trial.steps
        return trial

    def _show(self, step: int) -> None:
        if self._on_progress is not None:
            self._on_progress(min(self._steps, self._before + step), self._steps)


def _steps_in_all(candidates: Sequence[Candidate], *, scales: int, seeds: int) -> int:
    """Who will be chosen is not known yet: its runs are counted as the longest."""
    steps = [candidate.plan.steps for candidate in candidates]
    return seeds * (sum(steps) + scales * max(steps))


def _check_request(candidates: Sequence[Candidate], factors: Sequence[float], seeds: int) -> None:
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"candidates {names}: needs at least one, each with its own name.")
    if len(set(factors)) < 3 or seeds < FEWEST_SEEDS:
        raise ConfigError(
            f"{len(set(factors))} scales and {seeds} seeds: an interval needs at least 3 of each; the default does."
        )
