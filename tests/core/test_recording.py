"""What may be recorded, on which device that is done, and what is left when a recording breaks off."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from core.recorded import DEVICE, drawn, expect_same, prepared
from discreet.core import replay
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.replay import Replay
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from train import toys
from train.short_run import short_run

pytestmark = pytest.mark.usefixtures("recorder")

RECORDER = replay.Recorder
"""The one for CUDA, which is stood in for within a test."""


class _Streams:
    """Stands for what is there of ``torch.cuda`` when something is recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, breaks: bool) -> None:
        self.device, self.stream, self.seen = 0, "default", []
        self._breaks = breaks
        for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream", "current_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "device", lambda device: self.for_a_while("device", device.index))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.for_a_while("stream", stream))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext(self.seen.append(devices)))

    @contextlib.contextmanager
    def for_a_while(self, name: str, value: object) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)

    @contextlib.contextmanager
    def graph(self, graph: object, *, pool: object, stream: object) -> Iterator[None]:
        self.stream = stream  # a recording that is broken off leaves it so
        yield
        if self._breaks:
            raise RuntimeError("operation failed due to a previous error during capture")

    def Stream(self, device: torch.device) -> object:
        return types.SimpleNamespace(device=device, wait_stream=lambda other: None)

    def CUDAGraph(self) -> object:
        return types.SimpleNamespace(replay=lambda: None)

    def graph_pool_handle(self) -> object:
        return (0, 1)

    def current_stream(self) -> object:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def current_device(self) -> int:
        return self.device


@pytest.mark.parametrize("breaks", [False, True])
def test_it_is_recorded_on_the_device_of_the_model(breaks, monkeypatch):
    """PyTorch records on the device that is current: what runs on another is done at once, and the graph is empty."""
    device, once = torch.device("cuda", 1), lambda: (cuda.device, cuda.stream)
    cuda = _Streams(monkeypatch, breaks=breaks)
    with contextlib.ExitStack() as stack:
        if breaks:
            stack.enter_context(pytest.raises(RuntimeError, match="previous error"))
        _, (where, stream) = RECORDER(device).record(once)
        assert (where, stream.device) == (1, device)
    assert cuda.seen == [[1]]
    assert (cuda.device, cuda.stream) == (0, "default")


def test_a_use_that_the_check_did_not_see_is_refused_as_without_a_recording():
    model, made, wanted = prepared()
    made.clipped_gradient(drawn(8))
    model.mix.bias.requires_grad_(False)
    for run in (wanted, made.clipped_gradient):
        with pytest.raises(UnsupportedUse, match=r"linear on mix\.weight: the self-check never saw this use"):
            run(drawn(8))


def test_what_is_not_for_recording_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="follows a quantile"):
        prepared(Clipping.quantile(0.5, clip_bound=1.0))
    monkeypatch.setattr(replay, "records", lambda device: False)
    with pytest.raises(ConfigError, match=r"replay=True on c.*one CUDA device"):
        prepared()
    with pytest.raises(ConfigError, match="one CUDA device"):
        short_run(tmp_path / "run", replay=True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_asks_for_a_value_is_refused_by_name(monkeypatch):
    _, made, _ = prepared()
    monkeypatch.setattr(replay.Recorder, "record", lambda self, once: _fail(RuntimeError("not while capturing\nmore")))
    with pytest.raises(UnsupportedUse, match=r"cannot be recorded \(not while capturing\)"):
        made.clipped_gradient(drawn(8))


def _broken_off(self, once: Callable[[], ClippedSum]) -> None:
    try:
        raise torch.OutOfMemoryError("no room")
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("record", "raised"),
    [
        (lambda self, once: _fail(torch.OutOfMemoryError("no room")), torch.OutOfMemoryError),
        (lambda self, once: _fail(RuntimeError("CUDA error: out of memory")), RuntimeError),  # for the graph itself
        (_broken_off, torch.OutOfMemoryError),
    ],
)
def test_when_memory_runs_out_nothing_recorded_is_kept(record, raised, monkeypatch):
    _, made, wanted = prepared()
    made.clipped_gradient(drawn(8))
    plain = replay.Recorder.record
    monkeypatch.setattr(replay.Recorder, "record", record)
    with pytest.raises(raised) as caught:
        made.clipped_gradient(drawn(9))
    assert replay.is_out_of_memory(caught.value)
    assert not made._recorded
    monkeypatch.setattr(replay.Recorder, "record", plain)
    expect_same(made.clipped_gradient(drawn(8)), wanted(drawn(8)))


def _fail(error: BaseException) -> None:
    raise error


def test_the_loader_of_a_loop_is_not_for_a_recording(tmp_path):
    private = short_run(tmp_path / "run", model=toys.model().to(DEVICE), replay=True)
    with pytest.raises(ConfigError, match="iterate `private`"):
        next(iter(private.loader))


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toys.model()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


def test_a_buffer_that_every_forward_moves_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="replay=True with calls"):
        short_run(tmp_path / "run", model=Counting().to(DEVICE), replay=True)


class Packed:
    """A batch of a class of its own, which tells its first and last numbers only."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return f"Packed({self.x})"


@pytest.mark.parametrize("wrap", [Packed, lambda x: x.cpu().numpy()], ids=["object", "array"])
def test_a_batch_that_hides_its_numbers_is_refused(wrap):
    """Its words are those of another batch: that one, which was recorded, would be summed again in its place."""
    model, clipping = nn.Linear(4, 1).to(DEVICE), Clipping.abadi(1.0)

    def loss(model: nn.Module, batch: list[object]) -> torch.Tensor:
        hidden = batch[1].x if isinstance(batch[1], Packed) else torch.from_numpy(batch[1]).to(DEVICE)
        return model(batch[0]).squeeze(1) * hidden[: len(batch[0])]

    x = torch.ones(600, 4, device=DEVICE)
    layout = check(model, loss, [x[:4], wrap(torch.ones(2000))], clipping=clipping, examples=4).layout
    made = Replay(model, loss, clipping=clipping, layout=layout)
    for seed in range(2):
        weight = torch.ones(2000)
        weight[100:1900] = torch.randn(1800, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(UnsupportedUse, match="replay=True: the batch holds a"):
            made.clipped_gradient([x, wrap(weight.to(DEVICE))], examples=600)


def test_a_leaf_with_a_graph_is_refused():
    _, made, _ = prepared()
    batch = drawn(8)
    batch["weight"].requires_grad_()
    with pytest.raises(UnsupportedUse, match="requires_grad=True; must be dense tensors"):
        made.clipped_gradient(batch)
