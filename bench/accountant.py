"""The accountant: how long solving the noise takes, and 1,000 random questions whose answers are checked.

    python -m bench.accountant --out bench/out/accountant.json                  # published points, then 1,000 random
    python -m bench.accountant --random 0 --referee 3                           # beside dp_accounting's own search

For each random (N, q, S, epsilon, delta): epsilon is at most the target; with 0.5 % less noise it is above it; one
argument moved by 5 % moves epsilon the right way; nothing is negative, NaN or slow. Times are of one process, and of
the whole call; the number of evaluations is the number of compositions by dp_accounting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from discreet.errors import ConfigError
from discreet.privacy.accounting import Relation, SampledGaussian, epsilon, solve_noise

VAULT = 518e3 / (13e12 / 1024)
POINTS = [  # name, q, steps, epsilon, delta: the tables of published runs
    ("De et al., ImageNet", 16384 / 1_271_167, 71_589, 8.0, 8e-7),
    ("TAN, ImageNet, 18k steps", 1 / 39, 18_000, 8.0, 8e-7),
    ("TAN, ImageNet, 72k steps", 1 / 78, 72_000, 7.97, 8e-7),
    ("TAN, half of ImageNet", 16384 / 635_583, 71_589, 17.98, 16e-7),
    ("TAN, CIFAR-10", 4096 / 50_000, 2_500, 7.1, 1e-5),
    ("TAN, 5,000 of CIFAR-10", 4096 / 5_000, 2_500, 150.3, 1 / 5_000),
    ("De et al., CIFAR-10", 4096 / 50_000, 875, 1.0, 1e-5),
    ("De et al., CIFAR-100", 16384 / 50_000, 250, 1.0, 1e-5),
    ("DP-RandP, full batch", 1.0, 100, 1.0, 1e-5),
    ("VaultGemma", VAULT, 100_000, 2.0, 1.1e-10),
    ("CIFAR-10, batch 512", 512 / 50_000, 2_500, 8.0, 1e-5),
    ("CIFAR-10, batch 512", 512 / 50_000, 875, 1.0, 1e-5),
    ("ImageNet, batch 512", 512 / 1_281_167, 18_000, 8.0, 8e-7),
    ("ImageNet, batch 512", 512 / 1_281_167, 72_000, 8.0, 8e-7),
    ("ImageNet, batch 4096", 4096 / 1_281_167, 18_000, 8.0, 8e-7),
    ("language model, N = 1e7", 2.2e5 / 1e7, 11_000, 4.0, 1e-8),
    ("language model, N = 1e9", 8.8e5 / 1e9, 110_000, 4.0, 1e-8),
    ("epsilon 0.1", 256 / 60_000, 5_000, 0.1, 1e-6),
]
CLOSE = 0.995


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=1_000, metavar="COUNT")
    parser.add_argument(
        "--referee", type=int, default=0, metavar="COUNT", help="time dp_accounting's own search on some"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    published = [published_row(*point) for point in POINTS]
    print(
        f"{'point':26} {'epsilon':>8} {'sigma':>9} {'seconds':>8} {'CPU':>6} {'evaluations':>12} {'within 0.5 %':>13}"
    )
    for row in published:
        print(
            f"{row['name']:26} {row['epsilon']:8g} {row['noise_multiplier']:9.5g} {row['seconds']:8.2f} "
            f"{row['cpu']:6.2f} {row['evaluations']:12d} {row['close']!s:>13}",
            flush=True,
        )
    rows = [random_row(*question) for question in questions(options.random, seed=options.seed)]
    wrong = [row for row in (*published, *rows) if row["wrong"]]
    if rows:
        summarise(rows)
    for row in wrong:
        print("WRONG", json.dumps(row))
    record = {"published": published, "random": rows, "referee": []}
    _write(options.out, record)
    for name, *point in POINTS[: options.referee]:
        sigma, cpu = referee_search(*point)
        print(f"{name:26} dp_accounting's own search: sigma {sigma:.5g}, {cpu:.1f} CPU seconds", flush=True)
        record["referee"].append({"name": name, "noise_multiplier": sigma, "cpu": cpu})
        _write(options.out, record)
    return 1 if wrong else 0


def _write(path: Path | None, record: dict[str, list[dict[str, object]]]) -> None:
    """One line for each row: a thousand rows stay readable, and a change of one is a change of one line."""
    if path is None:
        return
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, sort_keys=True) for row in rows) + "\n]"
        for name, rows in record.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join(parts) + "}\n")


def summarise(rows: list[dict[str, object]]) -> None:
    """One table of all random questions."""
    answered = [row for row in rows if "refused" not in row]
    cpu = np.array([row["cpu"] for row in answered])
    evaluations = np.array([row["evaluations"] for row in answered])
    print(f"\n{len(rows)} random questions, {len(rows) - len(answered)} refused by name, {len(answered)} answered")
    print(f"wrong: {sum(bool(row['wrong']) for row in rows)}")
    print(
        f"epsilon / target: {min(row['ratio'] for row in answered):.5f} to {max(row['ratio'] for row in answered):.5f}"
    )
    print(f"CPU seconds: median {np.median(cpu):.2f}, 99 % {np.quantile(cpu, 0.99):.2f}, most {cpu.max():.2f}")
    print(f"evaluations: mean {evaluations.mean():.2f}, most {evaluations.max()}")


def questions(count: int, *, seed: int) -> list[tuple[object, ...]]:
    """(rate, steps, epsilon, delta, relation, argument to move) from public ranges, log-uniform."""
    generator = np.random.default_rng(seed)
    found = []
    arguments = itertools.cycle(("rate", "steps", "sigma", "delta"))
    for index in range(count):
        examples = round(10 ** generator.uniform(2, 7.5))
        batch = max(1, round(examples ** generator.uniform(0, 1)))
        steps = round(10 ** generator.uniform(0, 5))
        target, below = float(10 ** generator.uniform(-1.5, 1.5)), float(10 ** generator.uniform(0, 4))
        relation = Relation.REPLACE_ONE if index % 5 == 4 else Relation.ADD_REMOVE
        found.append((batch / examples, steps, target, 0.99 / examples / below, relation, next(arguments)))
    return found


def published_row(name: str, rate: float, steps: int, target: float, delta: float) -> dict[str, object]:
    """Time, and whether 0.5 % less noise would be too little."""
    wall, cpu = time.perf_counter(), time.process_time()
    solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=delta)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    close = epsilon([SampledGaussian(rate, solution.noise_multiplier * CLOSE, steps)], delta=delta) > target
    return {
        "name": name,
        "epsilon": target,
        "noise_multiplier": solution.noise_multiplier,
        "seconds": wall,
        "cpu": cpu,
        "evaluations": solution.evaluations,
        "close": close,
        "wrong": not close or solution.epsilon > target,
    }


def referee_search(rate: float, steps: int, target: float, delta: float) -> tuple[float, float]:
    """Sigma by dp_accounting's calibration with its PLD accountant, all defaults, and the CPU seconds it takes."""
    cpu = time.process_time()
    sigma = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        lambda noise: dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps
        ),
        target_epsilon=target,
        target_delta=delta,
        bracket_interval=dp_accounting.LowerEndpointAndGuess(0.1, 1.0),
    )
    return float(sigma), time.process_time() - cpu


def random_row(
    rate: float, steps: int, target: float, delta: float, relation: Relation, moved: str
) -> dict[str, object]:
    """One question, and what is wrong with its answer ("" for nothing)."""
    row: dict[str, object] = {
        "rate": rate, "steps": steps, "target": target, "delta": delta, "relation": relation.value, "moved": moved
    }  # fmt: skip
    cpu = time.process_time()
    try:
        solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=delta, relation=relation)
    except ConfigError as error:
        return row | {"refused": str(error), "wrong": "" if "resolve" in str(error) else "refused"}
    sigma = solution.noise_multiplier
    row |= {
        "cpu": time.process_time() - cpu,
        "sigma": sigma,
        "ratio": solution.epsilon / target,
        "evaluations": solution.evaluations,
    }

    def spent(q: float, s: float, n: int, d: float) -> float:
        return epsilon([SampledGaussian(q, s, n)], delta=d, relation=relation)

    further = {
        "rate": (min(1.0, rate * 1.05), sigma, steps, delta),
        "steps": (rate, sigma, steps + math.ceil(0.05 * steps), delta),
        "sigma": (rate, sigma / 1.05, steps, delta),
        "delta": (rate, sigma, steps, delta / 1.05),
    }[moved]
    faults = {
        "above the target": not solution.epsilon <= target,
        "not the reported value": solution.epsilon != spent(rate, sigma, steps, delta),
        "more than 0.5 % too much noise": not spent(rate, sigma * CLOSE, steps, delta) > target,
        "not monotone": not spent(*further) >= solution.epsilon,
        "negative or NaN": not solution.epsilon >= 0,
    }
    return row | {"wrong": ", ".join(name for name, fault in faults.items() if fault)}


if __name__ == "__main__":
    raise SystemExit(main())
