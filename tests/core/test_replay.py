"""A clipped sum that is recorded and replayed is the one that `clipped_gradient` makes.

Without a GPU a stand-in runs the recorded function again, on the same memory; what CUDA graphs do is not tested.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contracts.products import needs_card, needs_two_cards
from discreet.core import replay
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.replay import Replay
from discreet.core.style import Style
from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.check import check
from oracles import relative_gap
from train import toys
from train.short_run import short_run

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RECORDER = replay.Recorder


class Again:
    """Runs what was recorded once more, into the memory of the first time."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        Again.made += 1

    def record(self, once: Callable[[], ClippedSum]) -> tuple[Callable[[], None], ClippedSum]:
        once()
        return once, once()


@pytest.fixture(autouse=True)
def _recorder(monkeypatch):
    Again.made = 0
    if not ON_GPU:
        monkeypatch.setattr(replay, "Recorder", Again)
        monkeypatch.setattr(replay, "records", lambda device: True)


class Words(nn.Module):
    """A small model with a table, attention-free mixing, a norm and a head that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.mix, self.norm = nn.Embedding(20, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.drop = nn.Dropout(0.0)
        self.scale = torch.ones(8, device=DEVICE)
        self.scales = {"mix": 1.0}

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.mix(self.table(ids_BT)) * self.scales["mix"]) * self.scale
        return self.norm(self.drop(mixed)) @ self.table.weight.T


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, wanted = model(batch["ids"]), batch["wanted"]
    return F.cross_entropy(logits.mT, wanted, reduction="none").mean(1) * batch["weight"]


def _batch(examples: int, *, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (examples, length), generator=generator).to(DEVICE)
    return {"ids": ids, "wanted": ids.flip(1).contiguous(), "weight": torch.ones(examples, device=DEVICE)}


def _rows(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: value[:count] for name, value in batch.items()}


def _made(clipping: Clipping = Clipping.automatic()) -> tuple[nn.Module, Replay, Callable[..., ClippedSum]]:  # noqa: B008
    model = Words().to(DEVICE)
    layout = check(model, _loss, _batch(4), clipping=clipping).layout
    made = Replay(model, _loss, clipping=clipping, layout=layout)
    return model, made, lambda batch: clipped_gradient(model, _loss, batch, clipping=clipping, layout=layout)


def _same(found: ClippedSum, wanted: ClippedSum) -> None:
    assert found.sensitivity == wanted.sensitivity
    assert found.noise_weights == wanted.noise_weights
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(found.tensors[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", [Style.flat(), Style.per_layer(), Style.per_parameter()], ids=str)
def test_replays_of_any_size_are_the_sums_of_clipped_gradient(style):
    model, made, wanted = _made(Clipping.abadi(0.3, style=style))
    batch = _batch(40)
    for count in (40, 17, 40, 18, 3, 1, 40):
        _same(made.clipped_gradient(_rows(batch, count), at_most=40), wanted(_rows(batch, count)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)  # as an optimizer does: in place
    assert len(made._recorded) == 3  # 40, 18 and 3: sizes are rounded up to steps of 3
    assert made.clipped_gradient(_rows(batch, 0)).tensors.keys() == wanted(_rows(batch, 3)).tensors.keys()


def test_a_sum_keeps_its_numbers_when_the_next_one_is_replayed():
    _, made, wanted = _made()
    first = made.clipped_gradient(_batch(8))
    second = made.clipped_gradient(_batch(8, seed=1))
    _same(first, wanted(_batch(8)))
    _same(second, wanted(_batch(8, seed=1)))


def test_where_a_norm_is_not_finite_it_is_done_as_written(monkeypatch):
    _, made, wanted = _made()
    made.clipped_gradient(_batch(8))
    asked: list[int] = []
    plain = Replay._sum

    def noted(self: Replay, *given: object) -> ClippedSum:
        asked.extend([1] if given[-1].answer is None else [])
        return plain(self, *given)

    monkeypatch.setattr(Replay, "_sum", noted)
    batch = _batch(8)
    for value in (float("nan"), float("inf"), 1e30):
        batch["weight"][2] = value
        found = made.clipped_gradient(batch)
        assert all(torch.isfinite(each).all() for each in found.tensors.values())
        _same(found, wanted(batch))
    assert len(asked) >= 2
    before = len(asked)
    _same(made.clipped_gradient(_rows(_batch(8, seed=2), 5), at_most=8), wanted(_rows(_batch(8, seed=2), 5)))
    assert len(asked) == before  # nothing of the example before is left in the rows that stand in


def test_what_stands_in_for_an_example_adds_nothing():
    """Rows beyond the examples are an example again, whose factor is 0: the sum is that of the examples, to the bit."""
    _, made, _ = _made()
    batch = _batch(40)
    one = made.clipped_gradient(_rows(batch, 37), at_most=40)
    assert next(iter(made._recorded.values())).batch["ids"].shape[0] == 39
    other = _batch(40)
    other["ids"][0], other["wanted"][0] = other["ids"][0].flip(0), other["wanted"][0].flip(0)
    moved = made.clipped_gradient(_rows(other, 37), at_most=40)
    square = sum((one.tensors[name] - moved.tensors[name]).square().sum() for name in one.tensors)
    assert 0 < float(square) ** 0.5 <= 2 * one.sensitivity  # one example's share came and went, not three


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.mix.weight, "data", model.mix.weight.detach().clone()),
        lambda model: model.drop.eval(),
        lambda model: setattr(model, "mix", copy.deepcopy(model.mix)),
        lambda model: setattr(model.drop, "p", 1.0),
        lambda model: model.mix.register_forward_hook(lambda module, args, output: output * 0.1),
        lambda model: setattr(model, "scale", torch.full((8,), 0.1, device=DEVICE)),
        lambda model: model.scales.__setitem__("mix", 0.1),
    ],
    ids=["memory", "mode", "exchanged", "a number", "a hook", "a tensor", "an entry of a table"],
)
def test_another_state_of_the_model_is_recorded_anew(change):
    model, made, wanted = _made()
    made.clipped_gradient(_batch(8))
    before = next(iter(made._recorded.values()))
    change(model)
    _same(made.clipped_gradient(_batch(8)), wanted(_batch(8)))
    assert len(made._recorded) == 1
    assert next(iter(made._recorded.values())) is not before


@pytest.mark.parametrize("setting", ["cuda.matmul", "cudnn.conv"])
def test_another_precision_is_recorded_anew(setting):
    """Set as PyTorch advises since 2.9, it cannot be read by the older functions any more: they raise."""
    library, operation = setting.split(".")
    told = getattr(getattr(torch.backends, library), operation)
    _, made, wanted = _made()
    made.clipped_gradient(_batch(8))
    before, kept = next(iter(made._recorded.values())), told.fp32_precision
    try:
        told.fp32_precision = "ieee" if kept == "tf32" else "tf32"
        for _ in range(2):
            found, exact = made.clipped_gradient(_batch(8)), wanted(_batch(8))
            assert relative_gap(found.tensors, exact.tensors) < 1e-2
        assert len(made._recorded) == 1
        assert next(iter(made._recorded.values())) is not before
    finally:
        told.fp32_precision = kept


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


@needs_card
def test_a_replay_draws_the_masks_that_a_step_as_written_draws():
    """Dropout in a graph takes its numbers from where the generator stands, and moves it on by as many."""
    model, made, wanted = _made()
    model.drop.p = 0.5
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append([made.clipped_gradient(_batch(8)) for _ in range(2)])
        torch.manual_seed(seed)
        for each in found[-1]:
            _same(each, wanted(_batch(8)))
    assert len(made._recorded) == 1
    assert relative_gap(found[0][0].tensors, found[0][1].tensors) > 0.01
    assert relative_gap(found[0][0].tensors, found[1][0].tensors) > 0.01
    _same(found[2][1], found[0][1])


@needs_card
@pytest.mark.parametrize("place", ["cuda:0", pytest.param("cuda:1", marks=needs_two_cards)])
def test_what_is_recorded_is_replayed_and_not_done_as_written(place, monkeypatch):
    """On whichever card, and while another is current: only recordings call Python."""
    calls = []

    def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return _loss(model, batch)

    model, clipping = Words(), Clipping.automatic()
    model.scale = model.scale.to(place)
    model.to(place)
    batches = [{name: value.to(place) for name, value in _batch(8, seed=seed).items()} for seed in range(4)]
    layout = check(model, counted, {name: value[:4] for name, value in batches[0].items()}, clipping=clipping).layout
    made = Replay(model, counted, clipping=clipping, layout=layout)
    stream = torch.cuda.current_stream()
    made.clipped_gradient(batches[0])
    calls.clear()
    sums = [made.clipped_gradient(batch) for batch in batches]
    assert not calls
    assert torch.cuda.current_device() == 0
    assert torch.cuda.current_stream() == stream
    for batch, found in zip(batches, sums, strict=True):
        _same(found, clipped_gradient(model, counted, batch, clipping=clipping, layout=layout))


def test_a_use_that_the_check_did_not_see_is_refused_as_without_a_recording():
    model, made, wanted = _made()
    made.clipped_gradient(_batch(8))
    model.mix.bias.requires_grad_(False)
    for run in (wanted, made.clipped_gradient):
        with pytest.raises(UnsupportedUse, match=r"linear on mix\.weight: the self-check never saw this use"):
            run(_batch(8))


def test_other_shapes_are_recorded_beside_and_too_many_are_not(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    _, made, wanted = _made()
    for length in (6, 5, 4, 3, 2, 6):
        batch = _batch(8, length=length)
        _same(made.clipped_gradient(batch), wanted(batch))
    assert len(made._recorded) == 3
    memory = {each.total.tensors["mix.weight"].data_ptr() for each in made._recorded.values()}
    assert len(memory) == 1


def test_what_is_no_tensor_of_the_batch_is_part_of_the_recording():
    model = Words().to(DEVICE)
    seen: list[float] = []

    def loss(model: nn.Module, batch: tuple[dict[str, torch.Tensor], float]) -> torch.Tensor:
        seen.append(batch[1])
        return _loss(model, batch[0]) * batch[1]

    clipping = Clipping.abadi(1.0)
    layout = check(model, loss, (_batch(4), 1.0), clipping=clipping).layout
    made = Replay(model, loss, clipping=clipping, layout=layout)
    for scale in (1.0, 1e-3, 1.0):
        batch = (_batch(8), scale)
        _same(
            made.clipped_gradient(batch, examples=8),
            clipped_gradient(model, loss, batch, clipping=clipping, layout=layout, examples=8),
        )
    assert len(made._recorded) == 2


def test_what_is_not_for_recording_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="follows a quantile"):
        _made(Clipping.quantile(0.5, clip_bound=1.0))
    monkeypatch.setattr(replay, "records", lambda device: False)
    with pytest.raises(ConfigError, match=r"replay=True on c.*one CUDA device"):
        _made()
    with pytest.raises(ConfigError, match="one CUDA device"):
        short_run(tmp_path / "run", replay=True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_asks_for_a_value_is_refused_by_name(monkeypatch):
    _, made, _ = _made()
    monkeypatch.setattr(replay.Recorder, "record", lambda self, once: _fail(RuntimeError("not while capturing\nmore")))
    with pytest.raises(UnsupportedUse, match=r"cannot be recorded \(not while capturing\)"):
        made.clipped_gradient(_batch(8))


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
    _, made, wanted = _made()
    made.clipped_gradient(_batch(8))
    plain = replay.Recorder.record
    monkeypatch.setattr(replay.Recorder, "record", record)
    with pytest.raises(raised) as caught:
        made.clipped_gradient(_batch(9))
    assert replay.is_out_of_memory(caught.value)
    assert not made._recorded
    monkeypatch.setattr(replay.Recorder, "record", plain)
    _same(made.clipped_gradient(_batch(8)), wanted(_batch(8)))


def _fail(error: BaseException) -> None:
    raise error


def test_a_run_that_is_replayed_ends_with_the_weights_of_one_that_is_not(tmp_path):
    ends = []
    for name, given in (("plain", {}), ("replayed", {"replay": True}), ("parts", {"replay": True, "microbatch": 8})):
        model = toys.model().to(DEVICE)
        for _ in short_run(tmp_path / name, model=model, **given):
            pass
        ends.append(toys.weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-4, atol=1e-5)
    assert ON_GPU or Again.made == 2


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


def _slopes(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(batch[0]).squeeze(1) * batch[1]


def _aligned(count: int, *, last: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples whose gradients point one way, but for the last one."""
    signs = torch.ones(count, device=DEVICE)
    signs[-1] = last
    return torch.full((count, 4), 10.0, device=DEVICE), signs


@pytest.mark.parametrize(("last", "most"), [(-1.0, 1.0), (float("nan"), 1e-3)], ids=["opposed", "not finite"])
def test_one_example_more_than_a_size_is_rounded_to_moves_the_sum_by_its_own_share(last, most):
    """What is taken off for rounding must not follow the size that a microbatch is rounded up to: all would move."""
    model, clipping = nn.Linear(4, 1, bias=False).to(DEVICE), Clipping.abadi(1.0)
    layout = check(model, _slopes, _aligned(4, last=1.0), clipping=clipping).layout
    made = Replay(model, _slopes, clipping=clipping, layout=layout)
    with_it, signs = _aligned(3841, last=last)
    one = made.clipped_gradient((with_it[:-1], signs[:-1]), examples=3840, at_most=4096)
    other = made.clipped_gradient((with_it, signs), examples=3841, at_most=4096)
    assert sorted(key[0] for key in made._recorded) == [3840, 4096]
    assert float((one.tensors["weight"].double() - other.tensors["weight"].double()).norm()) <= most


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
    _, made, _ = _made()
    batch = _batch(8)
    batch["weight"].requires_grad_()
    with pytest.raises(UnsupportedUse, match="requires_grad=True; must be dense tensors"):
        made.clipped_gradient(batch)


@pytest.mark.parametrize(("counts", "most", "recorders"), [((6, 7, 7, 8), 64, 1), ((7, 6, 7), 16, 2)], ids=str)
def test_a_constant_of_the_batch_may_have_as_many_rows_as_there_are_examples(counts, most, recorders):
    """Weights of classes are no rows of examples, at whatever size: sizes at which they differ tell so.

    Where they tell it late, all recordings go, and with them the memory that they shared: PyTorch has given it up.
    """
    model, clipping = nn.Linear(4, 3).to(DEVICE), Clipping.abadi(1.0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return model(batch[0]).square().sum(1) / batch[1].sum()

    x, weight = torch.randn(20, 4).to(DEVICE), torch.arange(1.0, 8.0).to(DEVICE)
    layout = check(model, loss, (x[:4], weight), clipping=clipping, examples=4).layout
    made = Replay(model, loss, clipping=clipping, layout=layout)
    for count in counts:
        found = made.clipped_gradient((x[:count], weight), examples=count, at_most=most)
        wanted = clipped_gradient(model, loss, (x[:count], weight), clipping=clipping, layout=layout, examples=count)
        for name, value in wanted.tensors.items():
            torch.testing.assert_close(found.tensors[name], value, rtol=1e-4, atol=1e-6)
    assert ON_GPU or Again.made == recorders


def test_what_a_forward_keeps_for_itself_outlives_its_recording():
    """A table that grows with the length is made anew; a recording for shorter ones still reads the former."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.kept = nn.Linear(4, 4), torch.zeros(0, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.kept) < x.shape[1]:
                self.kept = torch.ones(x.shape[1], 4, device=x.device)
            return self.inner(x * self.kept[: x.shape[1]])

    model, clipping = Growing().to(DEVICE), Clipping.abadi(1.0)

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum((1, 2))

    layout = check(model, loss, torch.randn(4, 2, 4).to(DEVICE), clipping=clipping).layout
    made = Replay(model, loss, clipping=clipping, layout=layout)
    made.clipped_gradient(torch.randn(8, 3, 4).to(DEVICE))
    place = model.kept.data_ptr()
    made.clipped_gradient(torch.randn(8, 5, 4).to(DEVICE))
    assert model.kept.data_ptr() != place
    assert any(isinstance(each, torch.Tensor) and each.data_ptr() == place for each in made._held)
    assert len(made._recorded) == 2
