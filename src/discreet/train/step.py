"""One logical batch: microbatches -> clipped sum -> released gradient -> ``p.grad``."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from discreet.core.axes import Layout
from discreet.core.clipping import BELOW, ClippedSum, Clipping
from discreet.core.forms import wide_dtype
from discreet.core.gradient import LossFunction, clipped_gradient, zero_sum
from discreet.core.noise import Released
from discreet.core.replay import Replay, is_out_of_memory
from discreet.core.seeded import cuda_indices
from discreet.errors import ConfigError
from discreet.train.recheck import ask_again
from discreet.train.stillness import Moving, Watch

_Made = TypeVar("_Made")


def whole_batch(batch_size: int) -> int:
    """More examples than a Poisson batch of this expected size ever has, but once in a hundred million."""
    return batch_size + 6 * math.isqrt(batch_size) + 16


class Microbatch:
    """How many examples go through the model at once. It changes memory and speed, and the result by
    rounding alone: what is taken off each share for that is ``(256 + size) 2^-23`` of it.

    Args:
        size: the largest microbatch, as long as memory lasts.
        batch: examples that a batch hardly ever passes; None: ``size`` of them.

    Attributes:
        size: the largest microbatch.
        at_most: the largest that there is in this run, also once memory ran out; what one example may move is told by
            it, and must not be told by what fitted.
        on_halving: called after the size was halved, before the batch is begun again; a checkpoint then holds the size
            with which a replay must split.
    """

    def __init__(self, size: int, *, batch: int | None = None) -> None:
        if size < 1:
            raise ConfigError(f"microbatch={size}: must be at least 1; leave it None for a default.")
        self.size, self._batch = size, batch
        self.at_most = min(size, batch or size)
        self.on_halving: Callable[[], object] = _nothing

    def restore(self, size: int) -> None:
        """Go on with the microbatches of an earlier process, which may be larger than what is asked for now."""
        self.size = size
        self.at_most = max(self.at_most, min(size, self._batch or size))

    def halve(self, *, realised: int) -> None:
        """Use microbatches of at most half of what did not fit: of the size, or of a smaller realised batch."""
        self.size = max(1, min(self.size, realised) // 2)
        self.on_halving()

    def split(self, indices: np.ndarray) -> list[np.ndarray]:
        """The batch in order, in pieces of at most this size."""
        return [indices[start : start + self.size] for start in range(0, len(indices), self.size)]


@dataclass(frozen=True)
class ClippedStep:
    """What turns indices into a clipped sum: everything but the indices is fixed for the run.

    Attributes:
        watch: sees that a forward writes nothing but what it may; None: it may write whatever it likes.
        made_up: a batch without an example in it, by which an update moves the buffers that every forward moves.
        replay: microbatches are recorded once and replayed.
    """

    model: nn.Module
    loss: LossFunction
    fetch: Callable[[np.ndarray], Any]
    parameters: Mapping[str, nn.Parameter]
    clipping: Clipping
    layout: Layout | None
    microbatch: Microbatch
    watch: Watch | None
    made_up: Any = None
    replay: Replay | None = None

    def clipped_sum(self, indices: np.ndarray) -> ClippedSum:
        """The clipped sum over these examples, microbatch by microbatch; zeros when there are none.

        When a microbatch does not fit into memory, all of the batch is done again in halves: no example is dropped,
        none is counted twice, and the bits of the sum are a function of the batch and of the microbatch size alone.
        """
        forget_gradients(self.parameters)
        if self.watch is None:
            return self.fitted(lambda: self._attempt(indices, None), realised=len(indices))
        moving = self.watch.moving(self.forward_made_up)
        with self.watch.still():
            total = self.fitted(lambda: self._attempt(indices, moving), realised=len(indices))
            moving.move()
        return total

    def ask_again(self, indices: np.ndarray, *, update: int) -> None:
        """Ask the first microbatch of a batch what the self-check asked a few examples; raises `CheckFailed`."""
        asked = replace(self, microbatch=Microbatch(self.microbatch.size))  # autograd alone needs more memory

        def ask() -> None:
            first, fetch = indices[: asked.microbatch.size], self.fetch
            ask_again(self.model, self.loss, fetch, first, layout=self.layout, update=update, devices=self.devices)

        with gradients_kept(self.model):
            asked.fitted(ask, realised=len(indices))

    @property
    def devices(self) -> list[int]:
        """Indices of the CUDA devices that the model is on."""
        return cuda_indices(p.device for p in self.parameters.values())

    def forward_made_up(self) -> None:
        """A forward that no example takes part in; what every forward moves moves."""
        self.loss(self.model, self.made_up)

    def fitted(self, attempt: Callable[[], _Made], *, realised: int) -> _Made:
        """What ``attempt`` makes of a whole batch; done again in half the microbatch for as long as memory runs out."""
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or min(self.microbatch.size, realised) <= 1:
                    raise
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.microbatch.halve(realised=realised)

    def after(self, released: Released) -> ClippedStep:
        """The next step: a bound that follows a quantile moves by the released count; all else stays.

        Args:
            released: the release of this step's sum over the expected batch.
        """
        if self.clipping.following is None:
            return self
        return replace(self, clipping=self.clipping.followed(float(released.tensors[BELOW])))

    def _attempt(self, indices: np.ndarray, moving: Moving | None) -> ClippedSum:
        total = None
        for part in self.microbatch.split(indices):
            if moving is not None:
                moving.put_back()
            batch = self.fetch(part)
            if self.replay is None:
                share = clipped_gradient(
                    self.model,
                    self.loss,
                    batch,
                    clipping=self.clipping,
                    layout=self.layout,
                    examples=len(part),
                    at_most=self.microbatch.at_most,
                )
            else:
                share = self.replay.clipped_gradient(batch, examples=len(part), at_most=self.microbatch.at_most)
            if total is None:
                total = share
            else:
                total += share
        return zero_sum(self.parameters, self.clipping) if total is None else total


def _nothing() -> None:
    """Until a run is there to save."""


def forget_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Free the gradients of the last update: the clipped sum of the next one takes their place in memory."""
    for parameter in parameters.values():
        parameter.grad = None


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put back what stood in ``p.grad``: a loss with a backward of its own would leave raw gradients there."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def gradient_memory(total: ClippedSum, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Where the released gradients may go: the sums' own memory, or new memory where a sum of several is float64."""
    return {
        name: value if value.dtype is wide_dtype(parameters[name]) else torch.empty_like(value, dtype=torch.float32)
        for name, value in total.tensors.items()
        if name in parameters
    }


def write_gradient(released: Released, parameters: Mapping[str, nn.Parameter]) -> None:
    """Set ``p.grad`` of every trainable parameter to the released mean: the sum over the expected batch, a constant."""
    if released.tensors.keys() - {BELOW} != parameters.keys():
        raise ConfigError(
            "the released sum and the model have different parameters; do not freeze or unfreeze mid-run."
        )
    gradients = {name: released.tensors[name] for name in parameters}
    # One pass for all parameters of half precision: a launch for each takes an accelerator longer than the numbers.
    narrow = [name for name, parameter in parameters.items() if gradients[name].dtype != parameter.dtype]
    if narrow:
        casts = [torch.empty_like(gradients[name], dtype=parameters[name].dtype) for name in narrow]
        torch._foreach_copy_(casts, [gradients[name] for name in narrow])
        gradients.update(zip(narrow, casts, strict=True))
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]


def refuse_dead(parameters: Mapping[str, nn.Parameter], *, update: int) -> None:
    """Refuse weights from which nothing is learned any more. They follow from what was released: asking costs nothing.

    Raises:
        ConfigError: one is not finite; every later update would be noise alone.
    """
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ConfigError(
                f"{name}: not finite after update {update}, so that each later one would be noise: the rate is too "
                f"high, or the optimizer's state does not fit into {parameter.dtype} (Adam's squares vanish in "
                "float16); pass a smaller learning_rate, or train in float32 or bfloat16. finish() certifies what was "
                "spent."
            )


def refuse_unmoved(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that would leave a parameter where it is, whose share of each update is charged all the same.

    Raises:
        ConfigError: one of ``parameters`` is in none of its groups (never was, or was taken out).
    """
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in moved]
    if missing:
        raise ConfigError(
            f"{missing[0]}: is trainable but the optimizer does not hold it; add it, or set requires_grad=False before "
            "a run begins."
        )


def refuse_unreleased(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that would move a parameter by a gradient that no release wrote.

    Raises:
        ConfigError: a parameter outside ``parameters`` (frozen, or added later) holds a gradient.
    """
    covered = {id(parameter) for parameter in parameters.values()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in covered and parameter.grad is not None:
                raise ConfigError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} whose gradient is not "
                    "released: it is frozen or no part of the model; set its grad to None, or leave it out of the "
                    "optimizer."
                )
