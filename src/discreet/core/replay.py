"""The clipped sum of a microbatch, recorded once on an accelerator and replayed: Python is asked once, not every step.

A CUDA graph holds every launch of forward, backward, norms, factors and sums. Nothing in them asks the data. Whether a
norm is in doubt is written to the host's memory as soon as all norms are there, so that the host goes on while sums are
made; then the microbatch is done again as it is written. Sizes are rounded up, so that Poisson batches need few
recordings; a row that stands in for an example has a factor of 0.

What Python decided while it was recorded holds for every replay: a forward that draws random numbers in Python, counts
its calls or changes a constant is not for this. Parameters and buffers that were exchanged, frozen or thawed, modes of
modules and precision are compared at each call, and recorded anew.

Shape legend: B = examples of the microbatch, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import LossFunction, batch_size_of, clipped_gradient, settled, trainable
from discreet.core.recording import Recording
from discreet.core.uses import zeros_like_sums
from discreet.errors import ConfigError, DiscreetError, UnsupportedUse

_STEPS, _MOST = 16, 32
"""Sizes are rounded up to this share of the largest; recordings that are kept."""

_UNKNOWN = 2


@dataclass(frozen=True)
class _Recorded:
    """One recording, and the memory that it reads and writes.

    Attributes:
        batch: its input; rows from ``examples`` on stand in for none.
        takes_part_B: which rows are examples.
        answer: (1,), of the host: 0 or 1 for a norm in doubt, once that is known.
        total: its result.
    """

    replay: Callable[[], None]
    batch: Any
    takes_part_B: Tensor
    answer: Tensor
    total: ClippedSum

    def run(self, batch: Any, examples: int) -> bool:
        """Put these examples in the place of those that were recorded, and replay; whether all norms are sure."""
        for place, leaf in zip(tree_flatten(self.batch)[0], tree_flatten(batch)[0], strict=True):
            if isinstance(leaf, Tensor):
                _fill(place, leaf, examples)
        self.takes_part_B[:examples] = True
        self.takes_part_B[examples:] = False
        self.answer.fill_(_UNKNOWN)
        self.replay()
        answer = self.answer.numpy()
        while answer[0] == _UNKNOWN:
            if torch.cuda.current_stream().query() and answer[0] == _UNKNOWN:  # raises what made the accelerator stop
                return False
        return bool(answer[0] == 0)


class Recorder:
    """CUDA graphs, which share the memory of what they make on the way."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, once: Callable[[], ClippedSum]) -> tuple[Callable[[], None], ClippedSum]:
        """Run it to compile and allocate what is made once, and again to record it; the recording and its result."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            once()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            total = once()
        return graph.replay, total


def records(device: torch.device) -> bool:
    """Whether what runs on a device can be recorded."""
    return device.type == "cuda"


class Replay:
    """`clipped_gradient` of one model, recorded for each size of batch that it meets.

    **Guarantees.** Those of `clipped_gradient`. The sums are the same but for rounding: a library may take other
    kernels for another number of rows, or while it is recorded.

    Args:
        model, loss, clipping, layout: as `clipped_gradient` takes them; the layout is verified.

    Raises:
        ConfigError: the parameters are on no CUDA device, or the clip bound follows a quantile, which a recording does
            not.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, *, clipping: Clipping, layout: Layout) -> None:
        devices = {parameter.device for parameter in trainable(model).values()}
        if len(devices) != 1 or not records(next(iter(devices))):
            raise ConfigError(
                f"replay=True on {', '.join(sorted(map(str, devices)))}: needs all parameters on one CUDA device; move "
                "the model there, or leave it out."
            )
        if clipping.following is not None:
            raise ConfigError(
                "replay=True with a bound that follows a quantile: pass a constant bound, or leave it out."
            )
        self._model, self._loss, self._clipping, self._layout = model, loss, clipping, layout
        self._recorded: dict[object, _Recorded] = {}
        self._sums: dict[str, Tensor] = {}
        self._state: tuple[object, ...] = ()
        self._recorder: Recorder | None = None

    def clipped_gradient(self, batch: Any, *, examples: int | None = None, at_most: int | None = None) -> ClippedSum:
        """The clipped sum of a microbatch, in memory of its own: the next replay writes over the recording's.

        Args:
            batch: as `clipped_gradient` takes it.
            examples: how many there are, when it cannot be read off the batch.
            at_most: the largest microbatch of this run, by which sizes are rounded.

        Raises:
            UnsupportedUse: the model cannot be recorded.
        """
        size = examples if examples is not None else batch_size_of(batch)
        if size > 0:
            recorded = self._recording_for(batch, size, max(size, at_most or size))
            if recorded is not None and recorded.run(batch, size):
                names, values = zip(*recorded.total.tensors.items(), strict=True)
                copies = dict(zip(names, torch._foreach_mul(values, 1.0), strict=True))
                return replace(recorded.total, tensors=copies)
        return clipped_gradient(
            self._model, self._loss, batch, clipping=self._clipping, layout=self._layout, examples=size
        )

    def _recording_for(self, batch: Any, size: int, at_most: int) -> _Recorded | None:
        state = _state_of(self._model)
        if state != self._state:
            self._forget()
            self._state = state
        step = -(-at_most // _STEPS)
        rounded = min(at_most, -(-size // step) * step)
        key = (rounded, _form_of(batch, size))
        if key not in self._recorded and len(self._recorded) < _MOST:
            self._recorded[key] = self._record(batch, size, rounded)
        return self._recorded.get(key)

    def _forget(self) -> None:
        self._recorded.clear()
        self._sums.clear()
        self._recorder = None

    def _record(self, batch: Any, size: int, rounded: int) -> _Recorded:
        parameters = trainable(self._model)
        device = next(iter(parameters.values())).device
        own = tree_map(lambda leaf: _room_for(leaf, size, rounded) if isinstance(leaf, Tensor) else leaf, batch)
        takes_part_B = torch.arange(rounded, device=device) < size
        answer = torch.empty(1, dtype=torch.int8, pin_memory=device.type == "cuda")

        def once() -> ClippedSum:
            recording = Recording(takes_part_B, answer)
            book = Book(parameters, examples=rounded, layout=self._layout, clipping=self._clipping, recording=recording)
            total = settled(book, self._model, self._loss, own, self._clipping)
            # All recordings write where the first one did: sums of their own would be a model's size for each.
            torch._foreach_copy_([self._sums[name] for name in total.tensors], list(total.tensors.values()))
            return replace(total, tensors=dict(self._sums))

        if self._recorder is None:
            self._recorder = Recorder()
            self._sums.update(zeros_like_sums(parameters))
        try:
            again, total = self._recorder.record(once)
        except RuntimeError as error:
            self._forget()
            # A recording that is broken off ends with an error of its own.
            for first in (error, error.__context__):
                if isinstance(first, (DiscreetError, torch.OutOfMemoryError)):
                    raise first from None
            raise UnsupportedUse(
                f"replay=True: the model cannot be recorded ({str(error).splitlines()[0]}); its forward must not ask "
                "for the value of a tensor (.item(), if tensor:, a mask as an index); leave replay out."
            ) from error
        return _Recorded(again, own, takes_part_B, answer, total)


def _room_for(leaf: Tensor, size: int, rounded: int) -> Tensor:
    if leaf.dim() == 0 or leaf.shape[0] != size:
        return leaf.clone()
    room = leaf.new_empty(rounded, *leaf.shape[1:])
    _fill(room, leaf, size)
    return room


def _fill(place: Tensor, leaf: Tensor, examples: int) -> None:
    """Copy a leaf of a batch; rows beyond its examples are its first example again."""
    if leaf.dim() == 0 or leaf.shape[0] != examples:
        place.copy_(leaf)
        return
    place[:examples].copy_(leaf)
    if len(place) > examples:
        place[examples:] = leaf[0]


def _form_of(batch: Any, size: int) -> object:
    """What must be equal for two batches to be run by one recording: structure, shapes of rows, all but tensors."""
    leaves, structure = tree_flatten(batch)
    kinds = (
        (tuple(leaf.shape[1:] if leaf.dim() and leaf.shape[0] == size else (-1, *leaf.shape)), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    )
    return str(structure), tuple(kinds)


def _state_of(model: nn.Module) -> tuple[object, ...]:
    """What a recording depends on beside the batch: where parameters and buffers lie, modes, precision."""
    held = (*model.named_parameters(), *model.named_buffers())
    return (
        tuple((name, value.data_ptr(), value.shape, value.dtype, value.requires_grad) for name, value in held),
        tuple(module.training for module in model.modules()),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.get_float32_matmul_precision()),
        torch.are_deterministic_algorithms_enabled(),
    )
