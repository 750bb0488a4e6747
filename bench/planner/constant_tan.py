"""Constant TAN on one data set: does a simulation at 1/64 of the compute rank, and foretell, the real thing?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau

from bench.planner.proxies import Setting, candidates_of, proxy_of
from discreet.insight.extrapolation import Law
from discreet.insight.simulated_run import Candidate, Proxy, Trial, run_simulated
from discreet.insight.simulation import Simulation, rank, simulate

SEEDS = 3
SCALES = (128.0, 64.0, 32.0)
RANGE = (64, 32, 16, 8, 4, 2, 1)
BAND_SDS = 2.0
BAND_SPREAD = 0.013
"""The spec's band, measured on digits: each mean less than two seed deviations from that at the real batch, and 1.3
points between the highest and the lowest mean. Both verdicts are given. Two seed deviations shrink with the test set,
and the sampling noise of a small batch does not (`bench.planner.sampling_noise`), so they are given twice: of the runs
as they are, and after the law that was fitted on cheaper batches has been taken out."""
NEEDED_TAU = 0.8
NEEDED_SAVING = 50.0

Say = Callable[[str], None]


def measure(setting: Setting, *, say: Say) -> dict[str, Any]:
    """Simulate as the product does, then do everything at full size, and compare."""
    prepared = setting.prepare()
    proxy, candidates = proxy_of(prepared, name=setting.name), candidates_of(setting, prepared)
    simulation = simulate(candidates, proxy, scales=SCALES, seeds=SEEDS)
    say(f"{setting.name}: {len(candidates)} candidates simulated in {simulation.seconds:.0f} s: {simulation.chosen}")
    started = time.monotonic()
    full = [run_simulated(c, proxy, factor=1, seed=seed) for seed in range(SEEDS) for c in candidates]
    full_seconds = time.monotonic() - started
    say(f"{setting.name}: the same at full size took {full_seconds:.0f} s")
    chosen = next(candidate for candidate in candidates if candidate.name == simulation.chosen)
    by_batch = over_batches(chosen, proxy, known=[*simulation.trials, *full])
    plan = chosen.plan
    return {
        "examples": plan.examples,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "candidates": len(candidates),
        "seeds": SEEDS,
        "range": band(by_batch, at_batch=plan.batch_size),
        "ranking": agreement(simulation, full),
        "extrapolation": held(simulation, full),
        "saved": {
            "examples": simulation.saved,
            "seconds": full_seconds / simulation.seconds,
            "simulated_seconds": simulation.seconds,
            "full_seconds": full_seconds,
            "met": simulation.saved >= NEEDED_SAVING,
        },
        "simulation": simulation.to_json(),
    }


def over_batches(chosen: Candidate, proxy: Proxy, *, known: list[Trial]) -> dict[int, list[float]]:
    """Accuracies of the chosen candidate at every batch of the range: runs that are there already are not repeated."""
    done = {(t.batch, t.seed): t.accuracy for t in known if t.candidate == chosen.name}
    found: dict[int, list[float]] = {}
    for seed in range(SEEDS):
        for factor in RANGE:
            batch = max(1, round(chosen.plan.batch_size / factor))
            if (batch, seed) not in done:
                done[batch, seed] = run_simulated(chosen, proxy, factor=factor, seed=seed).accuracy
            found.setdefault(batch, []).append(done[batch, seed])
    return dict(sorted(found.items()))


def band(by_batch: dict[int, list[float]], *, at_batch: int) -> dict[str, Any]:
    """Whether the means over a 64-fold range of batches stay within 1.3 points, and two seed sds of the real batch."""
    means = {batch: statistics.fmean(values) for batch, values in by_batch.items()}
    sd = math.sqrt(statistics.fmean(statistics.variance(values) for values in by_batch.values()))
    farthest = max(abs(mean - means[at_batch]) for mean in means.values())
    spread = max(means.values()) - min(means.values())
    return {
        "means": {str(batch): mean for batch, mean in means.items()},
        "sds": {str(batch): statistics.stdev(values) for batch, values in by_batch.items()},
        "seed_sd": sd,
        "spread": spread,
        "farthest": farthest,
        "within_sds": farthest < BAND_SDS * sd,
        "met": spread <= BAND_SPREAD and farthest < BAND_SDS * sd,
    }


def after_law(found: Mapping[str, Any]) -> dict[str, Any]:
    """The band once more, with the change from each batch to the real one taken out as the simulation's law foretells.

    The law was fitted on runs of other seeds at a 128th to a 32nd of the real batch, so nothing of the range is in it.
    """
    fit, spread, at_batch = found["simulation"]["fit"], found["range"], found["batch_size"]
    law = Law(fit["law"])
    corrected = {
        int(batch): mean - fit["slope"] * (law.x(int(batch)) - law.x(at_batch))
        for batch, mean in spread["means"].items()
    }
    farthest = max(abs(mean - corrected[at_batch]) for mean in corrected.values())
    return {"law": law.value, "farthest": farthest, "met": farthest < BAND_SDS * spread["seed_sd"]}


def agreement(simulation: Simulation, full: Sequence[Trial]) -> dict[str, Any]:
    """Kendall's tau between the ranking at B / 64 and that at B, and what following the simulation costs.

    ``one_seed`` says what tau can be: how well one real run of each candidate agrees with another real run of each,
    and one simulated run with a real one, all of different seeds.
    """
    simulated = {standing.candidate: standing.mean for standing in simulation.ranking}
    real = {standing.candidate: standing.mean for standing in rank(full)}
    tau = _tau(simulated, real)
    best = max(real.values())
    mine, others = _by_seed(simulation.trials), _by_seed(full)
    pairs = [(a, b) for a in others for b in others if a != b]
    return {
        "tau": tau,
        "chosen": simulation.chosen,
        "best": next(name for name, mean in real.items() if mean == best),
        "regret": best - real[simulation.chosen],
        "full": {name: real[name] for name in simulated},
        "one_seed": {
            "simulated": statistics.fmean(_tau(mine[a], others[b]) for a, b in pairs),
            "real": statistics.fmean(_tau(others[a], others[b]) for a, b in pairs),
        },
        "met": tau >= NEEDED_TAU,
    }


def _by_seed(trials: Sequence[Trial]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for trial in trials:
        found.setdefault(trial.seed, {})[trial.candidate] = trial.accuracy
    return found


def _tau(first: dict[str, float], second: dict[str, float]) -> float:
    return float(kendalltau([first[name] for name in second], list(second.values())).statistic)


def held(simulation: Simulation, full: list[Trial]) -> dict[str, Any]:
    """Whether the real accuracy of the chosen one lies in the interval that the simulation printed."""
    runs = [trial.accuracy for trial in full if trial.candidate == simulation.chosen]
    fit = simulation.fit
    return {
        "law": fit.law.value,
        "expected": fit.expected,
        "low": fit.low,
        "high": fit.high,
        "real_mean": statistics.fmean(runs),
        "real": runs,
        "runs_inside": sum(fit.low <= run <= fit.high for run in runs),
        "warnings": list(fit.warnings()),
        "met": fit.low <= statistics.fmean(runs) <= fit.high,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The constant-TAN table, one block per data set."""
    lines = []
    for name, found in results.items():
        lines += [
            f"{name}: N {found['examples']}, B {found['batch_size']}, S {found['steps']}, sigma "
            f"{found['noise_multiplier']:.3f}, epsilon {found['epsilon']:g}; {found['candidates']} candidates, "
            f"{found['seeds']} seeds",
            "  batch     " + " ".join(f"{batch:>6}" for batch in found["range"]["means"]),
            "  accuracy  " + " ".join(f"{mean:6.4f}" for mean in found["range"]["means"].values()),
            "  seed sd   " + " ".join(f"{sd:6.4f}" for sd in found["range"]["sds"].values()),
        ]
        spread, ranking, fit, saved = (found[key] for key in ("range", "ranking", "extrapolation", "saved"))
        after = after_law(found)
        lines += [
            _line(
                f"spread {100 * spread['spread']:.2f} points of 1.3; farthest from B {100 * spread['farthest']:.2f}, "
                f"{'within' if spread['within_sds'] else 'NOT within'} 2 sd, {200 * spread['seed_sd']:.2f}",
                spread,
            ),
            _line(
                f"after the law in {after['law']} of cheaper batches: farthest {100 * after['farthest']:.2f}, "
                f"{'within' if after['met'] else 'NOT within'} 2 sd, {200 * spread['seed_sd']:.2f}",
                after,
            ),
            _line(
                f"tau {ranking['tau']:.3f}; chosen {ranking['chosen']}, best {ranking['best']}, regret "
                f"{100 * ranking['regret']:.2f} points; tau of single runs with other real ones: simulated "
                f"{ranking['one_seed']['simulated']:.3f}, real {ranking['one_seed']['real']:.3f}",
                ranking,
            ),
            _line(
                f"foretold by {fit['law']} {fit['expected']:.4f} in [{fit['low']:.4f}, {fit['high']:.4f}], real "
                f"{fit['real_mean']:.4f}; {fit['runs_inside']} of {len(fit['real'])} runs inside",
                fit,
            ),
            _line(f"compute saved {saved['examples']:.1f}x in examples, {saved['seconds']:.1f}x in time", saved),
        ]
    return "\n".join(lines)


def _line(text: str, part: dict[str, Any]) -> str:
    return f"  {'met   ' if part['met'] else 'MISSED'}  {text}"
