"""Private: a model in private training, to be iterated, or trained by an unchanged loop."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discreet.errors import ConfigError
from discreet.privacy.verification import verify
from discreet.train.check import CheckReport
from discreet.train.microbatches import MicrobatchLoader
from discreet.train.probing import find_rate
from discreet.train.run import Run
from discreet.train.tolerance import Verdict
from discreet.train.updates import Step, Updates


class Private:
    """A model in private training. Iterate it, or use `loader` and `backward` in an unchanged loop; not both.

    In a ``with`` statement the run is let go of at the end, whatever happens inside, so that it can be resumed.

    Attributes:
        model: trained in place.
        plan: every number that determines the guarantee.
        check_report: the self-check that preceded the first update.
        loader: microbatches for an unchanged loop.
    """

    def __init__(
        self, updates: Updates, *, model: nn.Module, optimizer: torch.optim.Optimizer, check_report: CheckReport
    ) -> None:
        self.model = model
        self.plan = updates.plan
        self.check_report = check_report
        self.loader = MicrobatchLoader(updates)
        self._updates = updates
        self._run = updates.run
        self._gate(optimizer)

    @property
    def run(self) -> Run:
        """The run directory and its ledger."""
        return self._run

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        return self._run.path

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self._updates.done

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self._updates.releases.last

    @property
    def earlier_seconds(self) -> float:
        """What earlier processes took for the updates from which a resumed run goes on; 0 in the first process."""
        return self._updates.earlier_seconds

    @property
    def verdict(self) -> Verdict | None:
        """Where an automatic learning rate comes from, in released numbers; None when the rate was given."""
        return self._updates.verdict

    def epsilon(self) -> float:
        """What the ledger says is spent: reservations included, so never less than the truth."""
        return self._run.ledger.epsilon()

    def report(self) -> str:
        """The guarantee in plain words, verified against the ledger. For a finished run."""
        return verify(self._run.path).statement

    def __enter__(self) -> Private:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Step]:
        """One private update per iteration, until the plan's last; then the run is finished."""
        updates = self._updates
        while not updates.finished:
            find_rate(updates)
            if updates.finished:
                break
            index = updates.done
            step = updates.update(updates.clipped_sum(), index=index)
            if step is not None:
                yield step
                updates.checkpoint_if_due()
        updates.finish()

    def backward(self, losses: Tensor) -> None:
        """Clip and add the microbatch that `loader` gave out: the place of ``loss.backward()`` in an unchanged loop.

        Args:
            losses: one per example of that microbatch, shape (B,): those of the ``loss`` that was checked.

        Raises:
            CheckFailed: they are others (asked at updates 0, 1, 3, 7, ... of a process).
        """
        self.loader.settle(losses)

    def save(self) -> Path:
        """Write a checkpoint now, atomically; a later `make_private(..., resume=True)` goes on from it."""
        return self._updates.save()

    def finish(self) -> None:
        """End the run before the plan's last update: the model is saved, the key destroyed, what was spent certified.

        A run that is iterated to its end has finished by itself.

        **Guarantees.** Updates are charged in blocks, so the certificate may count a few more than were made, and none
        less. When to stop must follow from public or released figures: the guarantee does not cover a look at private
        ones.
        """
        self._updates.finish()

    def close(self) -> None:
        """Let go of the run without finishing it; it can be resumed."""
        self._run.close()

    def _gate(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace ``optimizer.step`` of this one object: only released gradients may move the weights.

        No hook: a pre-hook could not hold back the step of an unfinished batch. `update_wrapper` keeps the mark by
        which torch schedulers know that a step was taken; one that is made later looks for a method.
        """

        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> None:
            if closure is not None:
                raise ConfigError(
                    "optimizer.step(closure): it would evaluate private examples again; call step() alone."
                )
            if getattr(optimizer, "grad_scale", None) is not None:
                raise ConfigError(
                    "a GradScaler: released gradients carry no loss scale; train in bfloat16 or float32 without one."
                )
            total = self.loader.take()
            if total is not None:
                self._updates.update(total, index=self.loader.index)

        let_go = self._updates.hold_optimizer()

        def ungate() -> None:
            if not self._run.closed:
                raise ConfigError(
                    f"{type(optimizer).__name__}: is in private training in {self.run_dir} already; finish() or "
                    "close() that run first, or make another optimizer."
                )
            let_go()

        functools.update_wrapper(step, optimizer.step)
        step.ungate = ungate  # type: ignore[attr-defined]
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer._opt_called = True  # type: ignore[attr-defined]
        # Otherwise a GradScaler fails before it comes here, with an assertion that names no remedy.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
