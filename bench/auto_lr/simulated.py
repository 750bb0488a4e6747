"""``python -m bench.auto_lr.simulated``: the same question in seconds, on an MLP whose clipped sums are written out.

    python -m bench.auto_lr.simulated --data DATA --tasks toy digits adult transfer --epsilons 1 3 --seeds 3

DP-Adam and DP-SGD with momentum, automatic clipping; the grid decays linearly. The noise is torch's: nothing here is
private. The search and its decay are the shipped ones (`discreet.train.rate_search`); the step is a second, independent
implementation. A seed has the same batches and noise at every rate.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from discreet.core.probe import OCTAVES
from discreet.train.auto_lr import decay
from discreet.train.rate_search import RateSearch
from discreet.train.tolerance import Asked, Question

PLANS = {
    "toy": {8: (500, 600, 0.730), 3: (500, 600, 1.14), 1: (500, 600, 2.456)},
    "digits": {8: (353, 300, 2.298), 3: (256, 300, 3.597), 1: (256, 300, 8.952)},
    "adult": {8: (6512, 300, 2.231), 3: (2950, 300, 2.36), 1: (1101, 300, 2.375)},
}
"""Task -> epsilon -> (expected batch, updates, noise multiplier), of the specification and of the planner."""

GRID = {"adam": (0.003, 0.01, 0.02, 0.03, 0.06, 0.1), "sgdm": (0.03, 0.1, 0.3, 1.0, 3.0)}
HIDDEN = 64
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class World:
    """Data, and the network ``W2 relu(W1 x + b1) + b2`` as one vector of weights, shape (D,)."""

    plans: dict[int, tuple[int, int, float]]
    data: Data
    start: Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of W1, b1, W2, b2."""
        classes = int(self.data[1].max()) + 1
        return [(HIDDEN, self.data[0].shape[1]), (HIDDEN,), (classes, HIDDEN), (classes,)]

    def weights(self, seed: int) -> Tensor:
        """Fresh ones, uniform as torch has them, or those of public training."""
        if self.start is not None:
            return self.start.clone()
        generator = torch.Generator().manual_seed(seed)
        fans = [self.data[0].shape[1]] * 2 + [HIDDEN] * 2
        drawn = [
            (torch.rand(math.prod(shape), generator=generator) * 2 - 1) / math.sqrt(fan)
            for shape, fan in zip(self.shapes, fans, strict=True)
        ]
        return torch.cat(drawn)

    def layers(self, weights: Tensor) -> list[Tensor]:
        """W1, b1, W2, b2."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(weights.split(sizes), self.shapes, strict=True)]

    def logits(self, weights: Tensor, features: Tensor) -> Tensor:
        """Shape (B, classes)."""
        first, bias, second, last = self.layers(weights)
        return torch.relu(features @ first.T + bias) @ second.T + last

    def losses(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Shape (B,)."""
        return F.cross_entropy(self.logits(weights, self.data[0][rows]), self.data[1][rows], reduction="none")

    def clipped(self, weights: Tensor, rows: Tensor, gamma: float = 0.01) -> Tensor:
        """``sum_i g_i / (|g_i| + gamma)``, by the products of norms of two layers that meet one position."""
        first, bias, second, _ = self.layers(weights)
        features = self.data[0][rows]
        before = features @ first.T + bias
        hidden = torch.relu(before)
        output = torch.softmax(self.logits(weights, features), 1)
        output[torch.arange(len(rows)), self.data[1][rows]] -= 1
        inner = (output @ second) * (before > 0)
        squares = (output**2).sum(1) * ((hidden**2).sum(1) + 1) + (inner**2).sum(1) * ((features**2).sum(1) + 1)
        factor = 1 / (squares.sqrt() + gamma)[:, None]
        output, inner = (output * factor).nan_to_num(), (inner * factor).nan_to_num()
        return torch.cat([(inner.T @ features).flatten(), inner.sum(0), (output.T @ hidden).flatten(), output.sum(0)])

    def accuracy(self, weights: Tensor) -> float:
        """On the held-out rows, in points."""
        return 100 * float((self.logits(weights, self.data[2]).argmax(1) == self.data[3]).float().mean())

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """A Poisson batch."""
        examples = len(self.data[1])
        return torch.nonzero(torch.rand(examples, generator=generator) < size / examples)[:, 0]


def train(world: World, epsilon: int, *, rate: float, kind: str, seed: int) -> float:
    """Accuracy after a run at this peak rate, with linear decay."""
    updates = world.plans[epsilon][1]
    run = _Run(world, epsilon, kind=kind, seed=seed)
    for step in range(updates):
        run.update(rate * (1 - step / updates))
    return world.accuracy(run.weights)


def automatic(world: World, epsilon: int, *, seed: int) -> tuple[float, float]:
    """Accuracy and peak rate of DP-Adam at the rate that the shipped search finds, with its decay."""
    size, updates, sigma = world.plans[epsilon]
    run = _Run(world, epsilon, kind="adam", seed=seed)
    search = RateSearch(noise=sigma / size, updates=updates)
    step = 0
    while step < updates:
        question = search.question(step)
        if question is not None:
            run.answer(question, search)
        else:
            run.update(search.verdict().movement * decay(step, updates))
        step += 1
    return world.accuracy(run.weights), search.verdict().movement


class _Run:
    """Weights, the state of an optimizer, and a generator of batches and noise."""

    def __init__(self, world: World, epsilon: int, *, kind: str, seed: int) -> None:
        self.weights = world.weights(seed)
        self._world, self._kind = world, kind
        self._size, _, self._sigma = world.plans[epsilon]
        self._generator = torch.Generator().manual_seed(1000 + seed)
        self._mean, self._square, self._turn = torch.zeros_like(self.weights), torch.zeros_like(self.weights), 0

    def update(self, rate: float) -> None:
        """Move the weights by one noisy gradient."""
        total = self._world.clipped(self.weights, self._world.batch(self._size, self._generator))
        gradient = (total + self._sigma * torch.randn(len(total), generator=self._generator)) / self._size
        self._turn += 1
        if self._kind == "sgdm":
            self._mean = 0.9 * self._mean + gradient
            move = self._mean
        else:
            self._mean = 0.9 * self._mean + 0.1 * gradient
            self._square = 0.999 * self._square + 0.001 * gradient**2
            root = (self._square / (1 - 0.999**self._turn)).sqrt()
            move = self._mean / (1 - 0.9**self._turn) / (root + 1e-8)
        self.weights = self.weights - rate * move

    def answer(self, question: Question, search: RateSearch) -> None:
        """Answer a question of the search, with noise."""
        rows = self._world.batch(self._size, self._generator)
        losses = self._world.losses(self.weights, rows)
        if question.asked is Asked.LEVEL:
            place = (torch.frexp(losses).exponent.long() - 1 - OCTAVES[0]).clamp(0, len(OCTAVES) - 1)
            counts = torch.bincount(place, minlength=len(OCTAVES)).double()
            noisy = counts + self._sigma * torch.randn(len(OCTAVES), generator=self._generator)
            search.observe_level((noisy / self._size).tolist())
        else:
            direction = torch.randn(len(self.weights), generator=self._generator)
            moved = self.weights + question.displacement * direction
            rises = (self._world.losses(moved, rows) - losses).clamp(-question.bound, question.bound)
            noise = question.bound * self._sigma * torch.randn((), generator=self._generator)
            search.observe_rise(question, float(rises.sum() + noise) / self._size)


def load(name: str, data: Path) -> World:
    """toy, digits, adult, or transfer: the toy from weights that were trained in public on shifted features."""
    if name == "transfer":
        return _transfer(load("toy", data))
    if name == "digits":
        bundle = load_digits()
        order = torch.randperm(len(bundle.target), generator=torch.Generator().manual_seed(1))
        features = torch.tensor(bundle.data / 8 - 1, dtype=torch.float32)[order]
        targets = torch.tensor(bundle.target)[order]
        return World(PLANS[name], (features[:1437], targets[:1437], features[1437:], targets[1437:]))
    return World(PLANS[name], _adult(data) if name == "adult" else _toy())


def _toy() -> Data:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 3, 40, generator=generator) * 0.55
    parts: list[Tensor] = []
    for count in (20_000, 4_000):
        targets = torch.randint(10, (count,), generator=generator)
        modes = torch.randint(3, (count,), generator=generator)
        parts += [centres[targets, modes] + torch.randn(count, 40, generator=generator), targets]
    return parts[0], parts[1], parts[2], parts[3]


def _transfer(toy: World) -> World:
    shifted = toy.data[0] + 0.6 * torch.randn(40, generator=torch.Generator().manual_seed(9))
    public = World(toy.plans, (shifted, *toy.data[1:]))
    weights = toy.weights(0).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(1500):
        optimizer.zero_grad()
        public.losses(weights, torch.randint(20_000, (256,), generator=generator)).mean().backward()
        optimizer.step()
    return World(toy.plans, toy.data, start=weights.detach())


def _adult(data: Path) -> Data:
    """Numbers at public scales, names as they occur: 107 features."""
    rows: list[list[str]] = []
    counts = []
    for name in ("adult.data", "adult.test"):
        with (data / "adult" / name).open() as stream:
            rows += [row for row in csv.reader(stream, skipinitialspace=True) if len(row) == 15]
        counts.append(len(rows))
    ages, grades, hours = (np.array([float(row[column]) for row in rows]) for column in (0, 4, 12))
    gains, losses = (np.log1p([float(row[column]) for row in rows]) / 5 for column in (10, 11))
    columns = [np.stack([(ages - 40) / 15, (grades - 10) / 3, gains, losses, (hours - 40) / 12], axis=1)]
    for column in (1, 3, 5, 6, 7, 8, 9, 13):
        names = sorted({row[column] for row in rows})
        columns.append(np.eye(len(names))[[names.index(row[column]) for row in rows]])
    features = torch.tensor(np.concatenate(columns, axis=1), dtype=torch.float32)
    targets = torch.tensor([int(row[14].startswith(">")) for row in rows])
    split = counts[0]
    return features[:split], targets[:split], features[split:], targets[split:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per task and epsilon: the grid, and the rate that sets itself."""
    parser = argparse.ArgumentParser(prog="python -m bench.auto_lr.simulated", description="simulated learning rates")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with adult")
    parser.add_argument("--tasks", nargs="+", choices=[*PLANS, "transfer"], default=["digits"])
    parser.add_argument("--epsilons", nargs="+", type=int, choices=(1, 3, 8), default=[1, 3, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--optimizers", nargs="*", choices=list(GRID), default=["adam"], help="of the grid; may be none"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.tasks:
        world = load(name, options.data)
        for epsilon in options.epsilons:
            runs = [automatic(world, epsilon, seed=seed) for seed in range(options.seeds)]
            told = [f"auto {np.mean([run[0] for run in runs]):.2f} at " + " ".join(f"{run[1]:.4f}" for run in runs)]
            for kind in options.optimizers:
                for rate in GRID[kind]:
                    found = [train(world, epsilon, rate=rate, kind=kind, seed=seed) for seed in range(options.seeds)]
                    told.append(f"{kind} {rate:g}: {np.mean(found):.2f}")
            print(f"{name} {epsilon}  " + "  ".join(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
