"""The updates of one run: sum, release, move. Both kinds of training loop are thin layers over this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic

import torch
from torch import nn

from discreet.core.clipping import ClippedSum
from discreet.core.gradient import zero_sum
from discreet.core.seeded import seeded
from discreet.errors import CheckFailed, ConfigError
from discreet.privacy.plan import Plan
from discreet.train import checkpoint as checkpoints
from discreet.train.auto_lr import RateControl
from discreet.train.environment import describe_environment
from discreet.train.examples import Examples
from discreet.train.horizon import Charges
from discreet.train.recheck import is_due
from discreet.train.releases import Releases
from discreet.train.run import Run, Stage
from discreet.train.step import ClippedStep, refuse_dead, write_gradient
from discreet.train.tolerance import Verdict


@dataclass(frozen=True)
class Step:
    """One private update, as the loop sees it: released or public values only.

    Attributes:
        index: position among the updates that the plan pays for. The first ones may have gone into probes of the
            learning rate, so that a loop does not see them.
        steps: updates in the whole run.
        learning_rate: of the first parameter group, at this update.
        plan: every public number of the run.
        charges: what was charged under earlier keys, or by an earlier process.
        verdict: why an automatic rate is what it is; None when the rate was given.
    """

    index: int
    steps: int
    learning_rate: float
    plan: Plan
    charges: Charges
    verdict: Verdict | None = None

    @cached_property
    def epsilon(self) -> float:
        """An upper bound on what updates up to this one spend, preprocessing and replaced keys included.

        The ledger charges up to 16 ahead: what a run that ends here certifies is `Private.epsilon`.
        """
        return self.plan.charged_at_most(self.charges.steps(self.index), besides=self.charges.besides)


Conclusion = Callable[[Run, nn.Module], None]
"""What is done with a run and its model after the last update, before the run is closed for good."""


class Updates:
    """State of a run between updates.

    **Guarantees.** Those of `Releases`; and nothing but released gradients reaches the optimizer.

    Attributes:
        run: directory, key and ledger.
        releases: what the run may draw and release.
        step: indices -> clipped sum.
        optimizer: moved by `update` alone.
        rates: sets the learning rate.
        earlier_seconds: that earlier processes took for the updates from which this one goes on. What they did after
            their last checkpoint is done again, and not counted.

    Args:
        run, step, optimizer, rates, earlier_seconds: the attributes.
        done: where to start.
        checkpoint_steps: updates between checkpoints.
        conclude: called with run and model after the last update, while the run is still open; what it releases must be
            reserved in the run's ledger before.
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
        conclude: Conclusion | None = None,
        earlier_seconds: float = 0.0,
    ) -> None:
        self._conclude = conclude
        self.earlier_seconds = earlier_seconds
        self._began = monotonic()
        self.run = run
        self.step = step
        self.optimizer = optimizer
        self._move, self._moving = optimizer.step, False
        self.rates = rates
        self._checkpoint_steps = checkpoint_steps
        self._moved, self._asked = 0, done
        self.releases = Releases(run, done=done, model=step.model, parameters=step.parameters, optimizer=optimizer)

    def __reduce__(self) -> str:
        """Refuse every copy, as `Releases` does."""
        return self.releases.__reduce__()

    @property
    def plan(self) -> Plan:
        """Every public number of the run."""
        return self.run.plan

    @property
    def done(self) -> int:
        """Updates that the model and the optimizer have behind them."""
        return self.releases.done

    @property
    def finished(self) -> bool:
        """Whether no update is left."""
        return self.releases.finished

    @property
    def verdict(self) -> Verdict | None:
        """Where an automatic learning rate comes from; None when the rate was given."""
        return self.rates.verdict

    @property
    def asks_again(self) -> bool:
        """Whether the next update that moves the weights asks again what the self-check asked; see `recheck`."""
        return is_due(self._moved)

    def clipped_sum(self) -> ClippedSum:
        """The clipped sum of the next update."""
        indices = self.releases.draw()
        with self.model_randomness():
            total = self.step.clipped_sum(indices)
            if self.asks_again:
                with self.asking():
                    self.step.ask_again(indices, update=self.done)
        return total

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What is refused inside, the user can mend and go on from here: the updates before are kept.

        Raises:
            CheckFailed: as it was refused, and what to do about it.
        """
        try:
            yield
        except CheckFailed as refusal:
            self.save()
            doubt = ""
            if self._asked < self.done:
                doubt = (
                    f" Updates {self._asked} to {self.done - 1} were not asked: if they had this fault already, the "
                    "certificate does not cover what they released; then start a new run."
                )
            raise CheckFailed(
                f"update {self.done}: {refusal} This batch is not released. Once it is mended, go on from here with "
                f"resume=True.{doubt}"
            ) from None
        self._asked = self.done + 1

    def empty_sum(self) -> ClippedSum:
        """The clipped sum of no example."""
        return zero_sum(self.step.parameters, self.step.clipping)

    def update(self, total: ClippedSum, *, index: int) -> Step | None:
        """Release the sum, write it as the gradient, and move the weights.

        Args:
            total: the clipped sum of one batch.
            index: the update that the batch was drawn for.

        Returns:
            None when nothing was released, as `Releases.release_sum` has it.

        Raises:
            ConfigError: what `Releases.release_sum` refuses, or a rate that something else wrote beside an automatic
                one. The update is made, and its weights are not finite; asked now and then.
        """
        self.rates.refuse_others()
        released = self.releases.release_sum(total, index=index)
        if released is None:
            return None
        write_gradient(released, self.step.parameters)
        rate = self.rates.before_update(index)
        self._moving = True
        try:
            self._move()
        finally:
            self._moving = False
        self.rates.after_update()
        self.step = self.step.after(released)
        self.releases.done += 1
        self._moved += 1
        if self.asks_again or self.finished or self.done % self._checkpoint_steps == 0:
            refuse_dead(self.step.parameters, update=index)
        return Step(
            index=index,
            steps=self.releases.last,
            learning_rate=rate,
            plan=self.plan,
            verdict=self.verdict,
            charges=self.releases.charges,
        )

    def hold_optimizer(self) -> Callable[[], None]:
        """Refuse the steps of its class. Returns what gives the optimizer its own step back."""
        hook = self.optimizer.register_step_pre_hook(self._refuse_other_steps)

        def let_go() -> None:
            hook.remove()
            self.optimizer.step = self._move  # type: ignore[method-assign]

        return let_go

    def _refuse_other_steps(self, *_: object) -> None:
        """A step that came past the gate, as by ``SGD.step(optimizer)``: its gradients are no released ones."""
        if not self._moving:
            raise ConfigError(
                "a step of the optimizer's class: it would move the weights by gradients that are not released; call "
                "optimizer.step(), or iterate `private`."
            )

    def count_probe(self, said: Mapping[str, float]) -> None:
        """Go on to the next update after one whose sum answered a probe: the weights stay where they are.

        Args:
            said: the answer in numbers, for the log; released or public.
        """
        self.releases.done += 1
        self.run.log({"step": self.done, **said})
        self.checkpoint_if_due()

    @contextmanager
    def model_randomness(self) -> Iterator[None]:
        """Dropout and augmentation as a function of (key, step); the caller's generators are put back afterwards."""
        with seeded(self.run.torch_seed(self.done), devices=self.step.devices):
            yield

    def checkpoint_if_due(self) -> None:
        """Save when the interval has passed, except after the last update."""
        if self.done % self._checkpoint_steps == 0 and not self.finished:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint now, atomically."""
        scheduler, rule = self.rates.scheduler, self.step.clipping
        return checkpoints.save(
            self.run.checkpoint_dir,
            checkpoints.Checkpoint(
                step=self.done,
                microbatch=self.step.microbatch.size,
                model=checkpoints.model_tensors(self.step.model),
                optimizer=self.optimizer.state_dict(),
                scheduler=scheduler.state_dict() if scheduler is not None else None,
                ledger_head=self.run.ledger.head,
                rates=self.rates.state(),
                clip_bound=rule.clip_bound if rule.following is not None else None,
                seconds=self.earlier_seconds + monotonic() - self._began,
            ),
        )

    def finish(self) -> None:
        """Save the model, end the run, and certify it. A second time does nothing."""
        if not self.run.ledger.finished:
            self.releases.check_hold()
            if self._conclude is not None:
                self._conclude(self.run, self.step.model)
            self.run.finish(self.step.model)


def begin(
    run: Run,
    step: ClippedStep,
    optimizer: torch.optim.Optimizer,
    rates: RateControl,
    examples: Examples,
    *,
    checkpoint_steps: int,
    conclude: Conclusion | None = None,
) -> Updates:
    """Put a run where its checkpoint left it, or at its start; decide whether the key may still be used."""
    run.take()
    found = checkpoints.load(run.checkpoint_dir) if run.resumed else None
    if found is not None:
        checkpoints.restore(found, model=step.model, optimizer=optimizer, rates=rates)
        step.microbatch.restore(found.microbatch)
    environment = describe_environment(
        model=step.model,
        loss=step.loss,
        optimizer=optimizer,
        rates=rates,
        clipping=step.clipping,
        examples=examples,
    )
    run.adopt(environment, stage=Stage.TRAINING)
    done = found.step if found is not None else 0
    if found is not None and found.clip_bound is not None:
        step = replace(step, clipping=replace(step.clipping, clip_bound=found.clip_bound))
    updates = Updates(
        run=run,
        step=step,
        optimizer=optimizer,
        rates=rates,
        done=done,
        checkpoint_steps=checkpoint_steps,
        conclude=conclude,
        earlier_seconds=found.seconds if found is not None else 0.0,
    )
    step.microbatch.on_halving = updates.save
    if found is None:
        # Without this, a crash before the first checkpoint would replay step 0 from other initial weights.
        updates.save()
    else:
        run.rewind_log(done)
    return updates
