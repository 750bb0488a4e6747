"""The updates of one run: draw, charge, sum, release, move. Both kinds of training loop are thin layers over this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from discreet.core.clipping import ClippedSum
from discreet.core.gradient import zero_sum
from discreet.core.noise import release
from discreet.core.world import world_sum
from discreet.errors import BudgetExceeded
from discreet.privacy.plan import Plan
from discreet.train import checkpoint as checkpoints
from discreet.train.auto_lr import RateControl
from discreet.train.environment import describe_environment
from discreet.train.examples import Examples
from discreet.train.run import Run
from discreet.train.step import ClippedStep, write_gradient

RESERVE_STEPS = 16
"""Steps charged to the ledger at once: one fsync for all of them. A crash over-counts by at most this many."""


@dataclass(frozen=True)
class Step:
    """One private update, as the loop sees it: released or public values only.

    Attributes:
        index: 0 for the first update.
        steps: updates in the whole run.
        learning_rate: of the first parameter group, at this update.
        plan: every public number of the run.
    """

    index: int
    steps: int
    learning_rate: float
    plan: Plan

    @cached_property
    def epsilon(self) -> float:
        """An upper bound on what is spent after this update, preprocessing included."""
        return self.plan.spent_at_most(self.index + 1)


class Updates:
    """State of a run between updates.

    **Guarantees.** A step's charge is durable before its batch is drawn. Noise is drawn at position = step index under the
    run's key, so a replay repeats it and nothing else does. The gradient that reaches the optimizer is released.

    Attributes:
        done: updates that the model and the optimizer have behind them.
        last: updates in the whole run; below ``plan.steps`` when a change of key wasted some of the budget.

    Args:
        run: directory, key and ledger.
        step: indices -> clipped sum.
        optimizer: moved by `update` alone.
        rates: sets the learning rate.
        done: where to start.
        checkpoint_steps: updates between checkpoints.
    """

    def __init__(
        self,
        *,
        run: Run,
        step: ClippedStep,
        optimizer: torch.optim.Optimizer,
        rates: RateControl,
        done: int,
        checkpoint_steps: int,
    ) -> None:
        self.run = run
        self.step = step
        self.done = done
        self.last = run.horizon
        self._optimizer = optimizer
        self._move = optimizer.step
        self._rates = rates
        self._checkpoint_steps = checkpoint_steps
        self._source = run.noise("gradient")
        self._reserved = done

    @property
    def plan(self) -> Plan:
        """Every public number of the run."""
        return self.run.plan

    @property
    def finished(self) -> bool:
        """Whether no update is left."""
        return self.done >= self.last

    def draw(self) -> np.ndarray:
        """The Poisson batch of the next update, after its charge is durable; indices, shape (realised batch,).

        Raises:
            BudgetExceeded: no update is left, or the charge would pass the budget. Nothing was drawn.
        """
        if self.finished:
            raise BudgetExceeded(f"update {self.done}: the budget ends after {self.last} updates; make a new plan to go on.")
        if self.done >= self._reserved:
            count = min(RESERVE_STEPS, self.last - self.done)
            self.run.ledger.reserve_steps(first=self.done, count=count)
            self._reserved = self.done + count
        return self.plan.sampling.draw(key=self.run.sampling_key, step=self.done)

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum of the next update."""
        indices = self.draw()
        with self.model_randomness():
            return self.step.clipped_sum(indices)

    def empty_sum(self) -> ClippedSum:
        """The clipped sum of no example."""
        return zero_sum(self.step.parameters, self.step.clipping)

    def update(self, total: ClippedSum) -> Step:
        """Release the sum, write it as the gradient, and move the weights."""
        index = self.done
        self._source.seek(index)
        released = release(world_sum(total), noise_multiplier=self.plan.noise_multiplier, source=self._source)
        write_gradient(released, self.step.parameters, batch_size=self.plan.batch_size)
        rate = self._rates.before_update(index)
        self._move()
        self._rates.after_update()
        self.done += 1
        return Step(index=index, steps=self.last, learning_rate=rate, plan=self.plan)

    @contextmanager
    def model_randomness(self) -> Iterator[None]:
        """Dropout and the like as a function of (key, step); the caller's generators are put back afterwards."""
        devices = sorted({p.device.index or 0 for p in self.step.parameters.values() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.run.torch_seed(self.done))
            yield

    def checkpoint_if_due(self) -> None:
        """Save when the interval has passed, except after the last update."""
        if self.done % self._checkpoint_steps == 0 and not self.finished:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint now, atomically."""
        scheduler = self._rates.scheduler
        return checkpoints.save(
            self.run.checkpoint_dir,
            checkpoints.Checkpoint(
                step=self.done,
                microbatch=self.step.microbatch.size,
                model=checkpoints.model_tensors(self.step.model),
                optimizer=self._optimizer.state_dict(),
                scheduler=scheduler.state_dict() if scheduler is not None else None,
                ledger_head=self.run.ledger.head,
            ),
        )

    def finish(self) -> None:
        """Save the model, end the run, and certify it."""
        self.run.finish(self.step.model)


def begin(
    run: Run,
    step: ClippedStep,
    optimizer: torch.optim.Optimizer,
    rates: RateControl,
    examples: Examples,
    *,
    checkpoint_steps: int,
) -> Updates:
    """Put a run where its checkpoint left it, or at its start; decide whether steps may be replayed under the same key."""
    found = checkpoints.load(run.checkpoint_dir) if run.resumed else None
    done = found.step if found is not None else 0
    environment = describe_environment(
        model=step.model, loss=step.loss, optimizer=optimizer, rates=rates, clipping=step.clipping, examples=examples
    )
    run.adopt(environment, stage="training", done=done)
    updates = Updates(
        run=run, step=step, optimizer=optimizer, rates=rates, done=done, checkpoint_steps=checkpoint_steps
    )
    step.microbatch.on_halving = updates.save
    if found is None:
        # Without this, a crash before the first checkpoint could replay step 0 from other initial weights.
        updates.save()
        return updates
    step.microbatch.size = found.microbatch
    step.model.load_state_dict(dict(found.model))
    optimizer.load_state_dict(dict(found.optimizer))
    if rates.scheduler is not None and found.scheduler is not None:
        rates.scheduler.load_state_dict(dict(found.scheduler))
    run.rewind_log(done)
    return updates
