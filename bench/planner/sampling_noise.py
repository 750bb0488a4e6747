"""Why does accuracy rise with the batch at constant TAN? The sampling noise of the batch, and what takes it out again.

A gradient of B examples has a variance of at most 1 / B in clip bounds, whatever noise is added. It is the same with
no noise at all, so a second arm trains without: what is seen there is no effect of privacy. The law a + b / B is fitted
on batches of a 128th to a 32nd of the real one, with seeds of their own, and taken out of the runs over the range.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.planner.constant_tan import BAND_SDS, RANGE, SCALES, SEEDS
from bench.planner.proxies import Setting, candidates_of, proxy_of
from discreet.insight.extrapolation import Law, extrapolate
from discreet.insight.simulated_run import Candidate, Proxy, run_simulated
from discreet.insight.simulation import simulate

RANGE_SEEDS = 5
FIT_SEEDS = 9
FIRST_FIT_SEED = 100
SMALL_TEST = 397
"""Test images of the specification's experiment, whose band of two seed deviations is asked for here."""
SUBSETS = 400

Say = Callable[[str], None]


class Judge:
    """Scores a model by its test accuracy, and remembers on which images the last one was right."""

    def __init__(self, proxy: Proxy, test: Any) -> None:
        self._test = test
        self.hits = np.zeros(0, dtype=bool)
        self.proxy = dataclasses.replace(proxy, score=self.score)

    def score(self, model: torch.nn.Module) -> float:
        """Accuracy; the right answers are kept aside."""
        features, targets = self._test.batch(np.arange(len(self._test)))
        with torch.no_grad():
            self.hits = (model(features).argmax(1) == targets).numpy()
        return float(self.hits.mean())


def measure(setting: Setting, *, chosen: str | None, say: Say) -> dict[str, Any]:
    """Both arms over the range, at the candidate that was chosen by simulation (None: choose it now)."""
    prepared = setting.prepare()
    proxy, candidates = proxy_of(prepared, name=setting.name), candidates_of(setting, prepared)
    if chosen is None:
        chosen = simulate(candidates, proxy, scales=SCALES, seeds=SEEDS).chosen
    say(f"{setting.name}: chosen {chosen}")
    candidate = next(each for each in candidates if each.name == chosen)
    silent = dataclasses.replace(candidate.plan, noise_multiplier=0.0, epsilon=math.inf)
    judge = Judge(proxy, prepared.test)
    arms = {"constant TAN": candidate, "no noise": dataclasses.replace(candidate, plan=silent)}
    found: dict[str, Any] = {"candidate": chosen, "seeds": RANGE_SEEDS, "fit_seeds": FIT_SEEDS}
    for name, arm in arms.items():
        found[name] = _arm(arm, judge)
        say(f"{setting.name}, {name}: done")
    return found


def _arm(candidate: Candidate, judge: Judge) -> dict[str, Any]:
    hits: dict[int, list[np.ndarray]] = {}
    for factor in RANGE:
        for seed in range(RANGE_SEEDS):
            trial = run_simulated(candidate, judge.proxy, factor=factor, seed=seed)
            hits.setdefault(trial.batch, []).append(judge.hits)
    cheap: dict[int, list[float]] = {}
    for factor in SCALES:
        for seed in range(FIRST_FIT_SEED, FIRST_FIT_SEED + FIT_SEEDS):
            trial = run_simulated(candidate, judge.proxy, factor=factor, seed=seed)
            cheap.setdefault(trial.batch, []).append(trial.accuracy)
    return judged(hits, cheap, at_batch=candidate.plan.batch_size)


def judged(hits: dict[int, list[np.ndarray]], cheap: dict[int, list[float]], *, at_batch: int) -> dict[str, Any]:
    """The band before and after the law, and what the same runs would have shown on a small test set."""
    by_batch = {batch: [float(run.mean()) for run in runs] for batch, runs in sorted(hits.items())}
    fit = extrapolate(cheap, at_batch=at_batch)
    slope = fit.slope if fit.law is Law.INVERSE else inverse_slope(cheap)
    raw = deviations(by_batch, at_batch=at_batch)
    return {
        "means": {str(batch): statistics.fmean(runs) for batch, runs in by_batch.items()},
        "raw": raw,
        "slope": slope,
        "corrected": deviations(without_sampling_noise(by_batch, slope=slope, at_batch=at_batch), at_batch=at_batch),
        "foretold": {"law": fit.law.value, "expected": fit.expected, "low": fit.low, "high": fit.high},
        "real": statistics.fmean(by_batch[at_batch]),
        "small_test": small_tests(hits, at_batch=at_batch),
    }


def inverse_slope(scores: dict[int, list[float]]) -> float:
    """b of a + b / B by least squares."""
    x = [1 / batch for batch, runs in scores.items() for _ in runs]
    y = [run for runs in scores.values() for run in runs]
    return float(np.polyfit(x, y, 1)[0])


def without_sampling_noise(by_batch: dict[int, list[float]], *, slope: float, at_batch: int) -> dict[int, list[float]]:
    """The accuracies as the law says they would be at the real batch."""
    return {batch: [run - slope * (1 / batch - 1 / at_batch) for run in runs] for batch, runs in by_batch.items()}


def deviations(by_batch: dict[int, Sequence[float]], *, at_batch: int) -> dict[str, Any]:
    """How far the means are from that at the real batch, and two seed deviations of one run."""
    means = {batch: statistics.fmean(runs) for batch, runs in by_batch.items()}
    sd = math.sqrt(statistics.fmean(statistics.variance(runs) for runs in by_batch.values()))
    farthest = max(by_batch, key=lambda batch: abs(means[batch] - means[at_batch]))
    off = abs(means[farthest] - means[at_batch])
    return {"farthest": off, "at": farthest, "two_sds": BAND_SDS * sd, "within": off < BAND_SDS * sd}


def small_tests(hits: dict[int, list[np.ndarray]], *, at_batch: int) -> dict[str, float]:
    """The same runs, judged on random parts of the test images: how often the raw band is kept there."""
    generator = np.random.default_rng(0)
    images = len(next(iter(hits.values()))[0])
    found = []
    for _ in range(SUBSETS):
        part = generator.choice(images, size=min(SMALL_TEST, images), replace=False)
        accuracies = {batch: [float(run[part].mean()) for run in runs] for batch, runs in hits.items()}
        found.append(deviations(accuracies, at_batch=at_batch))
    return {
        "images": min(SMALL_TEST, images),
        "within": statistics.fmean(each["within"] for each in found),
        "two_sds": statistics.median(each["two_sds"] for each in found),
        "farthest": statistics.median(each["farthest"] for each in found),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Both arms of each data set."""
    lines = []
    for name, record in found.items():
        lines.append(f"{name}: {record['candidate']}, {record['seeds']} seeds; law from {record['fit_seeds']} others")
        for arm in ("constant TAN", "no noise"):
            of = record[arm]
            lines.append(f"  {arm:12} " + " ".join(f"{batch:>6}" for batch in of["means"]))
            lines.append(" " * 15 + " ".join(f"{mean:6.4f}" for mean in of["means"].values()))
            for label in ("raw", "corrected"):
                part = of[label]
                lines.append(
                    f"    {label:9} farthest {100 * part['farthest']:.2f} points (B = {part['at']}), 2 sd "
                    f"{100 * part['two_sds']:.2f}: {'within' if part['within'] else 'NOT within'}"
                )
            small, foretold = of["small_test"], of["foretold"]
            lines.append(
                f"    slope {of['slope']:+.3f} / B; foretold by {foretold['law']} {foretold['expected']:.4f} in "
                f"[{foretold['low']:.4f}, {foretold['high']:.4f}], real {of['real']:.4f}"
            )
            lines.append(
                f"    on {small['images']} test images: farthest {100 * small['farthest']:.2f}, 2 sd "
                f"{100 * small['two_sds']:.2f}, within in {100 * small['within']:.0f} % of draws"
            )
    return "\n".join(lines)
