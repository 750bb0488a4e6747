"""The clipped sum of a microbatch, recorded once on an accelerator and replayed: Python is asked once, not every step.

A CUDA graph holds every launch of forward, backward, norms, factors and sums. Nothing in them asks the data. Whether a
norm is in doubt is written to the host's memory as soon as all norms are there, so that the host goes on while sums are
made; then the microbatch is done again as it is written. Sizes are rounded up, so that Poisson batches need few
recordings; a row that stands in for an example has a factor of 0.

What Python decided while it was recorded holds for every replay: a forward that draws random numbers in Python, counts
its calls or changes a constant is not for this. What the modules hold is compared at each call, and recorded anew where
something else changed it: parameters, buffers, other tensors, numbers and words, hooks; so are modes and precision.

Shape legend: B = examples of the microbatch, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from discreet.core.axes import Layout
from discreet.core.book import Book
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import LossFunction, batch_size_of, settled, trainable, zero_sum
from discreet.core.layout import carries
from discreet.core.precision import precision_now
from discreet.core.recording import Recording
from discreet.core.uses import identity_of, zeros_like_sums
from discreet.errors import ConfigError, DiscreetError, UnsupportedUse

_STEPS, _MOST = 16, 32
"""Sizes are rounded up to this share of the largest; recordings that are kept."""

_UNKNOWN = 2

_WORDS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""What is told by how it is written. Of an array, or of an object that holds tensors, that is only the first and last
numbers."""
_NO_ROOM = ("out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
"""What errors say of memory where they are of no class of their own: of the driver, of cuBLAS and cuDNN, of a CPU."""
_FEW, _DEPTH = 64, 8
"""Entries of a list or a table that a module holds, up to which each is compared; and lists in lists."""


@dataclass(frozen=True)
class _Form:
    """What a batch is like.

    Attributes:
        structure: how its leaves lie in tuples, lists and tables.
        rows: which leaves have one row for each example.
        size, at_most: how many examples there are, and the most that there are in any microbatch.
    """

    structure: TreeSpec
    rows: tuple[bool, ...]
    size: int
    at_most: int

    @property
    def rounded(self) -> int:
        """B."""
        step = -(-self.at_most // _STEPS)
        return min(self.at_most, -(-self.size // step) * step)

    def key(self, leaves: list[Any]) -> object:
        """What is equal for two batches that one recording runs, but for the structure, of which this is the text."""
        return self.rounded, self.at_most, str(self.structure), tuple(map(_form_of, leaves, self.rows))


@dataclass(frozen=True)
class _Recorded:
    """One recording, and the memory that it reads and writes.

    Attributes:
        batch: its input; rows from ``examples`` on stand in for none.
        form: of it.
        takes_part_B: which rows are examples.
        answer: (1,), of the host: 0 or 1 for a norm in doubt, once that is known.
        total: its result.
    """

    replay: Callable[[], None]
    batch: Any
    form: _Form
    takes_part_B: Tensor
    answer: Tensor
    total: ClippedSum

    def start(self, batch: Any, examples: int) -> None:
        """Put these examples in the place of those that were recorded, and replay."""
        leaves = zip(tree_flatten(self.batch)[0], tree_flatten(batch)[0], self.form.rows, strict=True)
        for place, leaf, by_row in leaves:
            if isinstance(leaf, Tensor):
                _fill(place, leaf, by_row=by_row)
        self.takes_part_B[:examples] = True
        self.takes_part_B[examples:] = False
        self.answer.fill_(_UNKNOWN)
        self.replay()

    def is_sure(self) -> bool:
        """Whether all norms are sure; waits for them, and not for the sums. Raises what made the accelerator stop."""
        answer = self.answer.numpy()
        while answer[0] == _UNKNOWN:
            if torch.cuda.current_stream(self.takes_part_B.device).query() and answer[0] == _UNKNOWN:
                return False
        return bool(answer[0] == 0)


class Recorder:
    """CUDA graphs of one device, which share the memory of what they make on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, once: Callable[[], ClippedSum]) -> tuple[Callable[[], None], ClippedSum]:
        """Run it to compile and allocate what is made once, and again to record it; the recording and its result.

        What dropout draws meanwhile is drawn again by the replay: a step is the same whether it is recorded or not.
        """
        with torch.cuda.device(self._device):  # PyTorch's own stream for recordings is on the device that had the first
            here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._beside.wait_stream(here)
            with torch.cuda.stream(self._beside):  # left as it was also where a recording is broken off
                with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
                    once()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._beside):
                    total = once()
            here.wait_stream(self._beside)
        return graph.replay, total


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in said for words in _NO_ROOM)


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
        self._held: list[object] = []
        self._shared: dict[str, set[int]] = {}
        self._recorder: Recorder | None = None

    def clipped_gradient(self, batch: Any, *, examples: int | None = None, at_most: int | None = None) -> ClippedSum:
        """The clipped sum of a microbatch, in memory of its own: the next replay writes over the recording's.

        Args:
            batch: as `clipped_gradient` takes it.
            examples: how many there are, when it cannot be read off the batch.
            at_most: the largest microbatch of this run, by which sizes are rounded, and as `clipped_gradient` takes it.

        Raises:
            UnsupportedUse: the model cannot be recorded, or the batch holds what a recording cannot be given.
        """
        size = examples if examples is not None else batch_size_of(batch)
        at_most = max(size, at_most or size)
        if size == 0:
            return zero_sum(trainable(self._model), self._clipping)
        leaves, structure = tree_flatten(batch)
        self._check_leaves(leaves)
        form = _Form(structure, self._rows(leaves, structure, size), size, at_most)
        recorded = self._known(leaves, form)
        if recorded is not None:
            recorded.start(batch, size)
            # Looked for while the accelerator is at work. What the recording reads is held, whatever the model has now.
            if _state_of(self._model) != self._state:
                recorded.is_sure()
                self._forget()
                recorded = None
        if recorded is None:
            recorded = self._record(leaves, form)
            if recorded is None:
                return self._sum(batch, size, at_most, None)
            recorded.start(batch, size)
        if not recorded.is_sure():
            # As many rows as were recorded: an example with a norm in doubt must not change what others are.
            recording = Recording(recorded.takes_part_B, None)
            total = self._sum(recorded.batch, len(recorded.takes_part_B), at_most, recording)
            self._state = _state_of(self._model)
            return total
        names, values = zip(*recorded.total.tensors.items(), strict=True)
        copies = dict(zip(names, torch._foreach_mul(values, 1.0), strict=True))
        return replace(recorded.total, tensors=copies)

    def _sum(self, batch: Any, examples: int, at_most: int, recording: Recording | None) -> ClippedSum:
        book = Book(
            trainable(self._model),
            examples=examples,
            layout=self._layout,
            clipping=self._clipping,
            recording=recording,
            at_most=at_most,
            batch=batch,
        )
        return settled(book, self._model, self._loss, batch, self._clipping)

    def _known(self, leaves: list[Any], form: _Form) -> _Recorded | None:
        known = self._recorded.get(form.key(leaves))
        return known if known is not None and known.form.structure == form.structure else None

    def _record(self, leaves: list[Any], form: _Form) -> _Recorded | None:
        """The recording of a batch like this, or None where there are too many."""
        if self._recorded and _state_of(self._model) != self._state:
            self._forget()
        key = form.key(leaves)
        if key not in self._recorded and len(self._recorded) >= _MOST:
            return None
        own = [_room_for(leaf, form.rounded, by_row=by_row) for leaf, by_row in zip(leaves, form.rows, strict=True)]
        self._recorded[key] = made = self._recording_of(tree_unflatten(own, form.structure), form)
        self._state = _state_of(self._model, self._held)
        return made

    def _rows(self, leaves: list[Any], structure: TreeSpec, size: int) -> tuple[bool, ...]:
        """Which leaves have a row for each example; one that had another number of rows once may have B by chance."""
        other = {at for at, leaf in enumerate(leaves) if not carries(leaf, size)}
        shared = self._shared.setdefault(str(structure), other)
        if not other <= shared:
            shared |= other
            self._forget()
        return tuple(at not in shared for at in range(len(leaves)))

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _check_leaves(self, leaves: list[Any]) -> None:
        device = self._device
        for leaf in leaves:
            dense = type(leaf) is Tensor and leaf.layout is torch.strided and leaf.device == device
            if type(leaf) in _WORDS or (dense and not leaf.requires_grad):
                continue
            where = f" on {leaf.device}, requires_grad={leaf.requires_grad}" if isinstance(leaf, Tensor) else ""
            raise UnsupportedUse(
                f"replay=True: the batch holds a {type(leaf).__name__}{where}; must be dense tensors on {device} "
                "without a graph, numbers and words: let collate_fn give those, or leave replay out."
            )

    def _forget(self) -> None:
        for place in {self._device, *(each.takes_part_B.device for each in self._recorded.values())}:
            if place.type == "cuda":
                torch.cuda.synchronize(place)  # one of them may be at work
        self._recorded.clear()
        self._sums.clear()
        self._held.clear()
        self._recorder = None

    def _recording_of(self, own: Any, form: _Form) -> _Recorded:
        parameters, device = trainable(self._model), self._device
        takes_part_B = torch.arange(form.rounded, device=device) < form.size
        answer = torch.empty(1, dtype=torch.int8, device="cpu", pin_memory=device.type == "cuda")

        def once() -> ClippedSum:
            total = self._sum(own, form.rounded, form.at_most, Recording(takes_part_B, answer))
            # All recordings write where the first one did: sums of their own would be a model's size for each.
            torch._foreach_copy_([self._sums[name] for name in total.tensors], list(total.tensors.values()))
            return replace(total, tensors=dict(self._sums))

        if self._recorder is None:
            self._recorder = Recorder(device)
            self._sums.update(zeros_like_sums(parameters))
        try:
            again, total = self._recorder.record(once)
        except RuntimeError as error:
            self._forget()
            # A recording that is broken off ends with an error of its own.
            for first in (error, error.__context__):
                if isinstance(first, DiscreetError) or is_out_of_memory(first):
                    raise first from None
            raise UnsupportedUse(
                f"replay=True: the model cannot be recorded ({str(error).splitlines()[0]}); its forward must not ask "
                "for the value of a tensor (.item(), if tensor:, a mask as an index); leave replay out."
            ) from error
        return _Recorded(again, own, form, takes_part_B, answer, total)


def _room_for(leaf: Any, rounded: int, *, by_row: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    room = leaf.new_empty(rounded, *leaf.shape[1:]) if by_row else torch.empty_like(leaf)
    _fill(room, leaf, by_row=by_row)
    return room


def _fill(place: Tensor, leaf: Tensor, *, by_row: bool) -> None:
    """Copy a leaf of a batch; rows beyond its examples are its first example again."""
    if not by_row:
        place.copy_(leaf)
        return
    place[: len(leaf)].copy_(leaf)
    if len(place) > len(leaf):
        place[len(leaf) :] = leaf[0]


def _form_of(leaf: Any, by_row: bool) -> object:
    """What must be equal for two leaves to be run by one recording: shapes of rows, dtypes, what is no tensor."""
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    return by_row, tuple(leaf.shape[1:] if by_row else leaf.shape), leaf.dtype


def _state_of(model: nn.Module, held: list[object] | None = None) -> tuple[object, ...]:
    """What a recording depends on beside the batch: what the modules hold, and where it lies; precision.

    Args:
        held: gets what is told by where it lies, so that nothing else comes to lie there as long as that is compared;
            a recording reads tensors that a forward made once, and may make anew for another batch.
    """
    values = (*model.named_parameters(), *model.named_buffers())
    return (
        tuple((name, _said(value, held), value.requires_grad) for name, value in values),
        tuple((id(module), _attributes(module, held)) for module in model.modules()),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), precision_now()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _attributes(module: nn.Module, held: list[object] | None) -> tuple[object, ...]:
    named = ("_parameters", "_buffers", "_modules")
    return tuple((name, _said(value, held)) for name, value in vars(module).items() if name not in named)


def _said(value: Any, held: list[object] | None, depth: int = 0) -> object:
    if type(value) in _WORDS:
        return type(value), value if value == value else None  # NaN is not itself
    if isinstance(value, Tensor) and value.layout is torch.strided and type(value.data) is Tensor:
        if held is not None:
            held.append(value.detach())
        return identity_of(value)
    if isinstance(value, (list, tuple, dict)) and len(value) <= _FEW and depth < _DEPTH:
        entries = value.items() if isinstance(value, dict) else value
        return type(value), tuple(_said(entry, held, depth + 1) for entry in entries)
    if held is not None:
        held.append(value)
    return id(value)
