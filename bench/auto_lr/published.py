"""``python -m bench.auto_lr.published``: published results of private image classifiers, with nothing set.

    python -m bench.auto_lr.published --data DATA --device cuda --out bench/results/published.json

MNIST at epsilon 2.93 and Fashion-MNIST at 2.7, delta 1e-5, all 60,000 training images. Two models: the tanh network of
Papernot et al. (arXiv:2007.14191, Table 1: .981 and .861, tuned), and a linear layer on scattering features (Tramer &
Boneh, arXiv:2011.11660, Table 1: .987 and .897, tuned). Batch, updates and noise are the planner's, clipping is
automatic, the optimizer is the default, DP-Adam. Contestants differ in the learning rate alone: ``auto`` sets itself;
``fixed`` is the program's; ``auto-sgdm`` is descent with momentum 0.9, at the rate that sets itself.

Accuracy is that of the last update; test images choose nothing. Data and features stay on the device. One line a run,
and one row in the file, as soon as it is there; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.auto_lr import scattering
from bench.auto_lr.__main__ import read, write
from discreet.app import models
from discreet.app.data import Preprocessing
from discreet.app.data.source import Examples
from discreet.app.models import ModelKind
from discreet.app.options import DataOptions, open_data
from discreet.core.gradient import trainable
from discreet.core.rng import NoiseSource
from discreet.train.auto_lr import LearningRate, LinearDecay, decay
from discreet.train.make_private import make_private

DELTA = 1e-5
EPSILONS = {"mnist": 2.93, "fashion_mnist": 2.7}
PUBLISHED = {
    ("mnist", "tanh"): 0.981,
    ("fashion_mnist", "tanh"): 0.861,
    ("mnist", "scatter"): 0.987,
    ("fashion_mnist", "scatter"): 0.897,
}
CONTESTANTS: dict[str, tuple[str, LearningRate]] = {
    "auto": ("adam", "auto"),
    "auto-sgdm": ("sgdm", "auto"),
    "fixed": ("adam", models.defaults(ModelKind.CNN).learning_rate),
}
PIECE = 2000
"""Test images at a time."""


@dataclass(frozen=True)
class Split:
    """Training and test rows, on one device."""

    train: Examples
    test: Examples


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 0 when all of it has been run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.auto_lr.published", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with mnist and fashion_mnist")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(EPSILONS), default=list(EPSILONS))
    parser.add_argument("--models", nargs="+", choices=["scatter", "tanh"], default=["scatter", "tanh"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, help="training and test rows to keep, to try the program out")
    parser.add_argument("--steps", type=int, help="updates, to try the program out; default: the planner's")
    options = parser.parse_args(arguments)
    rows = read(options.out)
    for name in options.sets:
        pixels = load(options.data / name, device=options.device, rows=options.rows)
        for model in options.models:
            split = scattered(pixels) if model == "scatter" else pixels
            for seed in range(options.seeds):
                for contestant in options.contestants:
                    key = {"task": name, "model": model, "seed": seed, "contestant": contestant}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    found = run(split, name, model, contestant, seed=seed, steps=options.steps)
                    rows.append({**key, **found})
                    write(options.out, rows)
                    print(_line(rows[-1]), flush=True)
    return 0


def load(folder: Path, *, device: torch.device, rows: int | None = None) -> Split:
    """Images as the program reads them: uint8, shape (N, 1, 28, 28). That there are ten classes is public, and free."""
    prepared = open_data(DataOptions(folder), kind=ModelKind.CNN).prepare(
        noise_source=NoiseSource.insecure_seed(0), preprocessing=Preprocessing.share(epsilon=math.inf, delta=DELTA)
    )
    assert prepared.test is not None

    def kept(examples: Examples) -> Examples:
        return Examples(examples.features[:rows].to(device), examples.targets[:rows].to(device))

    return Split(kept(prepared.train), kept(prepared.test))


def scattered(split: Split) -> Split:
    """The same rows as scattering features; each is a function of its own image."""

    def of(examples: Examples) -> Examples:
        chunk = 256 if examples.features.device.type == "cpu" else 2048
        return Examples(scattering.features(examples.features, chunk=chunk), examples.targets)

    return Split(of(split.train), of(split.test))


def network(model: str) -> nn.Module:
    """The tanh network of Papernot et al., 26,010 weights; or one linear layer on scattering features."""
    if model == "scatter":
        return nn.Sequential(nn.Flatten(), nn.Linear(scattering.MAPS * 7 * 7, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def run(split: Split, name: str, model: str, contestant: str, *, seed: int, steps: int | None = None) -> dict[str, Any]:
    """One run: what came out, and with what."""
    kind, rate = CONTESTANTS[contestant]
    device = split.train.targets.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trained = network(model).to(device)
    parameters = list(trainable(trained).values())
    optimizer = torch.optim.Adam(parameters) if kind == "adam" else torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    started, used = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as where:
        private = make_private(
            trained,
            optimizer,
            split.train,
            loss=models.loss,
            epsilon=EPSILONS[name],
            delta=DELTA,
            steps=steps,
            learning_rate=rate,
            run_dir=Path(where) / "run",
            checkpoint_steps=1_000_000,
            seed=seed,
        )
        moved = list(private)
        spent = private.epsilon()
    plan, last = private.plan, moved[-1]
    shape = LinearDecay(1.0, plan.steps).at if contestant == "fixed" else lambda step: decay(step, plan.steps)
    return {
        "accuracy": accuracy(trained, split.test),
        "published": PUBLISHED[name, model],
        "epsilon": spent,
        "delta": plan.delta,
        "examples": plan.examples,
        "batch_size": plan.batch_size,
        "updates": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "probes": plan.steps - len(moved),
        "rate": last.learning_rate / shape(last.index),
        "verdict": last.verdict.reason if last.verdict else "given",
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module, test: Examples) -> float:
    """Share of right answers on the test rows."""
    right = 0
    for start in range(0, len(test), PIECE):
        features, targets = test.batch(torch.arange(start, min(start + PIECE, len(test))))
        right += int((model(features).argmax(1) == targets).sum())
    return right / len(test)


def _line(row: dict[str, Any]) -> str:
    met = "met" if row["accuracy"] >= row["published"] else "missed"
    return (
        f"{row['task']} {row['model']} {row['contestant']} seed {row['seed']}: accuracy {row['accuracy']:.4f}, "
        f"published {row['published']:.3f}, {met}; epsilon {row['epsilon']:.4g}, batch {row['batch_size']}, updates "
        f"{row['updates']}, sigma {row['noise_multiplier']:.3f}, rate {row['rate']:.4g} ({row['verdict']}), "
        f"{row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
