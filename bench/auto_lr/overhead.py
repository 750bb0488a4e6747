"""``python -m bench.auto_lr.overhead``: what asking costs, in time and in noise, inside one run.

    python -m bench.auto_lr.overhead --data DATA --tasks digits toy mnist --small

A probe is one of the plan's updates: it takes the place of a gradient and adds nothing to the run. Two questions
remain. How long does a probe take beside an update? Medians of the processor time of both, from the same run, so that
load on the machine counts on both sides. And what do the missing updates cost? No gradient is noisier, but the sum of
all has fewer terms: as much as if each had been ``1 / sqrt(1 - probes / updates)`` times as noisy.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.auto_lr.tasks import TASKS, Task, load
from discreet.core.gradient import trainable
from discreet.train.make_private import make_private


@dataclass(frozen=True)
class Cost:
    """Of one run: processor seconds of each probe and of each update that moved the weights."""

    probes: list[float]
    updates: list[float]

    @classmethod
    def split(cls, turns: Sequence[tuple[float, int]]) -> Cost:
        """From (seconds, probes before the update) of every turn of the loop; its update takes what most take."""
        updates = [seconds for seconds, probes in turns if not probes]
        usual = statistics.median(updates)
        shared = [((seconds - usual) / probes, probes) for seconds, probes in turns if probes]
        return cls(
            probes=[seconds for seconds, probes in shared for _ in range(probes)],
            updates=updates + [usual] * len(shared),
        )

    @property
    def ratio(self) -> float:
        """Median probe over median update."""
        return statistics.median(self.probes) / statistics.median(self.updates)

    @property
    def share_of_time(self) -> float:
        """Of the probes, in the whole run."""
        return sum(self.probes) / (sum(self.probes) + sum(self.updates))

    @property
    def added_time(self) -> float:
        """Share by which the run is longer than with a gradient in every update; negative where probes are quick."""
        return self.share_of_updates * (self.ratio - 1)

    @property
    def share_of_updates(self) -> float:
        """Spent on probes."""
        return len(self.probes) / (len(self.probes) + len(self.updates))

    @property
    def noise(self) -> float:
        """Share by which every gradient would have to be noisier to lose as much as the missing ones lose."""
        return 1 / math.sqrt(1 - self.share_of_updates) - 1


def measure(task: Task, epsilon: float, *, seed: int = 0) -> Cost:
    """One run at a rate that sets itself, with a clock beside the loop."""
    model, plan = task.model(seed), task.plan(epsilon)
    turns = []
    with tempfile.TemporaryDirectory() as where:
        private = make_private(
            model,
            torch.optim.Adam(trainable(model).values()),
            task.train,
            loss=task.loss,
            plan=plan,
            learning_rate="auto",
            run_dir=Path(where) / "run",
            checkpoint_steps=plan.steps,
            seed=seed,
        )
        done, then = 0, time.process_time()
        for step in private:
            now = time.process_time()
            turns.append((now - then, step.index - done))
            done, then = step.index + 1, now
    return Cost.split(turns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line for each task."""
    parser = argparse.ArgumentParser(prog="python -m bench.auto_lr.overhead", description="what asking costs")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["digits", "toy"])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--small", action="store_true", help="cut every task, as in the benchmark")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.tasks:
        cost = measure(load(name, options.data, small=options.small), options.epsilon)
        print(
            f"{name}: {len(cost.probes)} probes among {len(cost.probes) + len(cost.updates)} updates "
            f"({cost.share_of_updates:.1%}), a probe takes {cost.ratio:.2f} of an update, {cost.share_of_time:.1%} of "
            f"the time; the run is {cost.added_time:+.1%} longer; as if gradients were {cost.noise:.1%} noisier",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
