"""The loader of an unchanged training loop: one microbatch at a time, guarded from the moment it is given out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from discreet.core.book import Book
from discreet.core.clipping import ClippedSum
from discreet.core.gradient import backward, settle, trainable
from discreet.core.meeting import guard
from discreet.errors import ConfigError
from discreet.train.probing import find_rate
from discreet.train.recheck import HandedOut
from discreet.train.step import gradients_kept
from discreet.train.stillness import Moving
from discreet.train.updates import Updates

_log = logging.getLogger("discreet")


class MicrobatchLoader:
    """Iterates over the microbatches of all updates that are left.

    Between giving a microbatch out and `settle`, the model is guarded: every use of a parameter is booked. An empty
    Poisson batch gives out one example with weight zero, so the loop body runs and noise is still released.

    Attributes:
        index: the update that the batch was drawn for.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._book: Book | None = None
        self._guarded = ExitStack()
        self._total: ClippedSum | None = None
        self._weight = 1.0
        self._moving: Moving | None = None
        self._handed_out: HandedOut | None = None
        self._is_first = self._is_last = False
        self._turn = 0
        self.index = 0

    def __iter__(self) -> Iterator[Any]:
        """The batches, as the data set collates them; when the last update is made, the run is finished."""
        updates = self._updates
        if updates.step.replay is not None:
            raise ConfigError("replay=True with private.loader: the forward of your loop is Python; iterate `private`.")
        self._turn = turn = self._turn + 1
        if updates.finished:
            _log.warning(
                "discreet: all %d updates are made: private.loader gives out the whole run once, and has no epochs",
                updates.releases.last,
            )
        while not updates.finished:
            find_rate(updates)
            if updates.finished:
                break
            indices = updates.releases.draw()
            self.index = updates.done
            self._weight = 1.0 if len(indices) else 0.0
            self._total, self._moving = updates.empty_sum(), self._begun()
            parts = updates.step.microbatch.split(indices) or [np.zeros(1, dtype=np.int64)]
            with updates.model_randomness():
                for position, part in enumerate(parts):
                    if turn != self._turn:
                        raise ConfigError(
                            "private.loader is iterated twice at a time: a microbatch would be counted twice; go on "
                            "with the iterator that was made last."
                        )
                    self._is_first, self._is_last = position == 0, position == len(parts) - 1
                    yield from self._give(part)
            if self._total is not None:
                raise ConfigError(
                    "optimizer.step() was not called after the batch: call it once for each that the loader gives, and "
                    "drop gradient accumulation of your own: the microbatches of an update add up by themselves."
                )
            updates.checkpoint_if_due()
        updates.finish()

    def settle(self, losses_B: Tensor) -> None:
        """Backward, clip and add the microbatch that was given out last.

        Raises:
            ConfigError: there is none, or the losses are not one per example.
            CheckFailed: they are not those of the loss that was checked, or depend on other examples.
        """
        if self._book is None or self._total is None:
            raise ConfigError("private.backward() without a batch: iterate private.loader, and call it once per batch.")
        book, self._book = self._book, None
        handed_out, self._handed_out = self._handed_out, None
        with self._guarded:
            backward(book, losses_B * self._weight)
        if self._moving is not None and self._is_last:
            self._moving.move()
        share = settle(book, self._updates.step.clipping)
        if handed_out is not None:
            self._total = None  # nothing to step with, if this fails; and its memory is needed
            with self._updates.asking():
                with gradients_kept(self._updates.step.model):
                    handed_out.require_same(losses_B.detach(), share, partial(self._as_checked, examples=book.examples))
                self._updates.step.ask_again(handed_out.indices, update=self.index)
            self._total = self._updates.empty_sum()
        # The stand-in for an empty batch is no example: its zeros are not added, and it is not counted.
        if self._weight and self._is_first:
            self._total = share
        elif self._weight:
            self._total += share

    def take(self) -> ClippedSum | None:
        """The sum over the whole batch, once; None while microbatches of it are still to come.

        Raises:
            ConfigError: ``optimizer.step()`` has nothing to do: no batch, or no backward.
        """
        if self._total is None or self._book is not None:
            raise ConfigError(
                "optimizer.step() without a clipped gradient: iterate private.loader and call private.backward(losses) "
                "first, or iterate `private` itself, which steps on its own; a run that has ended moves nothing: make "
                "another optimizer to go on without privacy."
            )
        if not self._is_last:
            return None
        total, self._total = self._total, None
        return total

    def _begun(self) -> Moving | None:
        step = self._updates.step
        return step.watch.moving(step.forward_made_up) if step.watch is not None else None

    def _open(self, batch: Any, *, examples: int) -> Book:
        step = self._updates.step
        return Book(
            trainable(step.model),
            examples=examples,
            layout=step.layout,
            clipping=step.clipping,
            at_most=step.microbatch.at_most,
            batch=batch,
        )

    def _as_checked(self, batch: Any, *, examples: int) -> tuple[Tensor, ClippedSum]:
        """Losses and clipped sum of a microbatch by the loss that was checked."""
        step = self._updates.step
        book = self._open(batch, examples=examples)
        with guard(book):
            losses_B = step.loss(step.model, batch)
            backward(book, losses_B * self._weight)
        return losses_B.detach().clone(), settle(book, step.clipping)

    def _give(self, part: np.ndarray) -> Iterator[Any]:
        step = self._updates.step
        batch = step.fetch(part)
        book = self._open(batch, examples=len(part))
        with ExitStack() as stack:
            if self._moving is not None:
                self._moving.put_back()
            if step.watch is not None:
                stack.enter_context(step.watch.still())
            stack.enter_context(guard(book))
            self._book, self._guarded = book, stack
            if self._is_first and self._updates.asks_again:
                self._handed_out = HandedOut.now(step.model, batch, indices=part, devices=step.devices)
            try:
                yield batch
                skipped = self._book is not None
            finally:
                # Also when the loop is left: without the guard, a late backward would be booked nowhere.
                self._book = None
        if skipped:
            raise ConfigError("a batch of private.loader was skipped; call private.backward(losses) once for each.")
