"""What a run may draw and release: each update is charged before its batch is drawn, and its sum is released once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from discreet.core.clipping import ClippedSum
from discreet.core.gradient import trainable
from discreet.core.noise import Released, release
from discreet.core.world import world_size
from discreet.errors import BudgetExceeded, ConfigError, LedgerError
from discreet.train.horizon import Charges, replaced_because, steps_charged, steps_released, updates_allowed
from discreet.train.run import Run, Stage
from discreet.train.run_directory import LEDGER
from discreet.train.step import gradient_memory, refuse_unmoved, refuse_unreleased

RESERVE_STEPS = 16
"""Steps charged to the ledger at once: one fsync for all of them. A crash over-counts by at most this many."""

_log = logging.getLogger("discreet")


class Releases:
    """The charges, batches and noise of a run under its key in force.

    **Guarantees.** A step's charge is durable before its batch is drawn, and a sum is released at most once, as the
    update that it was drawn for. Noise is drawn at position = step index under the run's key; a step that is repeated
    with another sum gets another key and another charge.

    Attributes:
        run: directory, key and ledger.
        done: updates that the run has behind it; counted by whoever made something of the release.
        last: updates in the whole run; below ``plan.steps`` when a change of key wasted some of the budget.
        charges: what was charged under earlier keys, or by an earlier process.

    Args:
        run: the attribute.
        done: where to start.
        model: its trainable parameters must stay those that are covered.
        parameters: covered by each clipped sum.
        optimizer: moves the model; it must hold no gradient that is not released.

    Raises:
        BudgetExceeded: no update is left.
        LedgerError: a sum was released that the ledger does not charge.
    """

    def __init__(
        self,
        run: Run,
        *,
        done: int,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.run = run
        self.done = done
        self._model, self._parameters, self._optimizer = model, parameters, optimizer
        self._process = os.getpid()
        self._releasing = threading.Lock()
        self._adopt_key()
        self._trust_sums()

    def __reduce__(self) -> str:
        """Refuse every copy: two of them would put the same noise on two sums."""
        raise ConfigError(
            "a private run cannot be copied or pickled: its noise would be used twice; start another run."
        )

    @property
    def finished(self) -> bool:
        """Whether no update is left."""
        return self.done >= self.last

    def draw(self) -> np.ndarray:
        """The Poisson batch of the next update, after its charge is durable; indices, shape (realised batch,).

        Raises:
            BudgetExceeded: no update is left, or the charge would pass the budget. Nothing was drawn.
            ConfigError: the run was let go of, or the model is no longer the one that it began with.
        """
        if self.finished:
            raise BudgetExceeded(
                f"update {self.done}: the budget ends after {self.last} updates; make a new plan to go on."
            )
        self.check_hold()
        self._check_parameters()
        if self.done >= self._reserved:
            count = min(RESERVE_STEPS, self.last - self.done)
            self._sums.sync()
            self.run.ledger.reserve_steps(first=self.done, count=count)
            self._reserved = self.done + count
        return self.run.plan.sampling.draw(key=self.run.sampling_key, step=self.done)

    def release_sum(self, total: ClippedSum, *, index: int) -> Released | None:
        """Release the one sum of an update, over the expected batch; be it a gradient or the answer to a probe.

        Args:
            total: the bounded sum of one batch.
            index: the update that the batch was drawn for.

        Returns:
            None when this step was released before with another sum: nothing is released, the run has a new key, and
            the update is to be drawn again.

        Raises:
            ConfigError: the batch was drawn for another update, the optimizer holds a gradient that is not released, or
                another thread is here.
        """
        if not self._releasing.acquire(blocking=False):
            raise ConfigError(
                "two threads in one update: noise is drawn for one sum; let one of them train, or, after an interrupt, "
                "close the run and resume it."
            )
        try:
            return self._release_sum(total, index=index)
        finally:
            self._releasing.release()

    def _release_sum(self, total: ClippedSum, *, index: int) -> Released | None:
        self.check_hold()
        self._check_parameters()
        if index != self.done or index >= self._reserved:
            raise ConfigError(
                f"a batch drawn for update {index}, at update {self.done}: each batch is released once; iterate either "
                "`private` or `private.loader`, and only once at a time."
            )
        if not self._sums.admits(index, total):
            self._renew_key("the sum of a repeated step")
            return None
        self._source.seek(index)
        return release(
            total,
            noise_multiplier=self.run.plan.noise_multiplier,
            source=self._source,
            divisor=self.run.plan.batch_size,
            into=gradient_memory(total, self._parameters),
        )

    def check_hold(self) -> None:
        """Refuse to go on with a run that another process may be continuing, or that others take part in."""
        if world_size() > 1:
            raise ConfigError(
                f"{world_size()} ranks, since the run began: each would train on the same examples with noise of its "
                "own; train in one process, or set up the group after the run."
            )
        if self.run.closed:
            what = "has ended; start a new one" if self.run.ledger.finished else "was closed; resume it (resume=True)"
            raise ConfigError(f"{self.run.path}: the run {what}.")
        if os.getpid() != self._process:
            raise ConfigError(
                "the run was begun by another process (fork): its noise would be used twice; begin it there."
            )

    def _check_parameters(self) -> None:
        """Refuse a model or an optimizer that is no longer covered by the clipped sum."""
        if {id(p) for p in trainable(self._model).values()} != {id(p) for p in self._parameters.values()}:
            raise ConfigError(
                "the model's trainable parameters changed since make_private: freezing, unfreezing or replacing "
                "layers needs a new run; undo it."
            )
        refuse_unmoved(self._optimizer, self._parameters)
        refuse_unreleased(self._optimizer, self._parameters)

    def _adopt_key(self) -> None:
        """Take noise, journal and horizon from the run's key in force."""
        # First: after an interrupt, what is charged under an earlier key must not count for this one.
        self._reserved = self.done
        self._source = self.run.noise("gradient")
        self._sums = self.run.sums()
        self.charges = Charges.of(self.run.ledger, done=self.done)
        self.last = updates_allowed(self.run.ledger, done=self.done)
        if self.last >= self.run.plan.steps:
            return
        if self.last <= self.done == 0:
            raise BudgetExceeded(
                f"0 of {self.run.plan.steps} updates left: all were charged under keys that had to be replaced "
                f"({replaced_because(self.run.ledger)}); start a new run."
            )
        _log.warning(
            "discreet: the run ends after %d of %d updates: the others were charged under a key that had to be "
            "replaced (changed since the run began: %s)",
            self.last,
            self.run.plan.steps,
            replaced_because(self.run.ledger),
        )

    def _trust_sums(self) -> None:
        """Keep the key only where the journal holds all that was released under it, and the ledger charged all that.

        Raises:
            LedgerError: a sum was released that the ledger does not charge.
        """
        known, ledger = self._sums.steps, self.run.ledger
        uncharged = known - steps_charged(ledger)
        if uncharged:
            raise LedgerError(
                f"{LEDGER}: lacks update {min(uncharged)}, whose sum was released; records were cut off, restore it."
            )
        if not self._sums.whole:
            if self.run.charged(Stage.TRAINING):
                self._renew_key("the journal of sums is missing")
            self._sums.restart()
        elif not steps_released(ledger) <= known:
            self._renew_key("the journal of sums lacks updates")

    def _renew_key(self, why: str) -> None:
        self.run.renew_key([why])
        self._adopt_key()
        self._sums.restart()
