"""A clipped sum that is recorded and replayed is the one that `clipped_gradient` makes.

Without a GPU a stand-in runs the recorded function again, on the same memory; what CUDA graphs do is not tested.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from contracts.products import needs_card, needs_two_cards
from core.recorded import DEVICE, ON_GPU, Again, Words, drawn, expect_same, first_rows, prepared, words_loss
from discreet.core import replay
from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.replay import Replay
from discreet.core.style import Style
from discreet.train.check import check
from oracles import relative_gap
from train import toys
from train.short_run import short_run

pytestmark = pytest.mark.usefixtures("recorder")


@pytest.mark.parametrize("style", [Style.flat(), Style.per_layer(), Style.per_parameter()], ids=str)
def test_replays_of_any_size_are_the_sums_of_clipped_gradient(style):
    model, made, wanted = prepared(Clipping.abadi(0.3, style=style))
    batch = drawn(40)
    for count in (40, 17, 40, 18, 3, 1, 40):
        expect_same(made.clipped_gradient(first_rows(batch, count), at_most=40), wanted(first_rows(batch, count)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)  # as an optimizer does: in place
    assert len(made._recorded) == 3  # 40, 18 and 3: sizes are rounded up to steps of 3
    assert made.clipped_gradient(first_rows(batch, 0)).tensors.keys() == wanted(first_rows(batch, 3)).tensors.keys()


def test_a_sum_keeps_its_numbers_when_the_next_one_is_replayed():
    _, made, wanted = prepared()
    first = made.clipped_gradient(drawn(8))
    second = made.clipped_gradient(drawn(8, seed=1))
    expect_same(first, wanted(drawn(8)))
    expect_same(second, wanted(drawn(8, seed=1)))


def test_a_norm_in_doubt_is_taken_as_written(monkeypatch):
    _, made, wanted = prepared()
    made.clipped_gradient(drawn(8))
    asked: list[int] = []
    plain = Replay._sum

    def noted(self: Replay, *given: object) -> ClippedSum:
        asked.extend([1] if given[-1].answer is None else [])
        return plain(self, *given)

    monkeypatch.setattr(Replay, "_sum", noted)
    batch = drawn(8)
    for value in (float("nan"), float("inf"), 1e30):
        batch["weight"][2] = value
        found = made.clipped_gradient(batch)
        assert all(torch.isfinite(each).all() for each in found.tensors.values())
        expect_same(found, wanted(batch))
    assert len(asked) >= 2
    before = len(asked)
    expect_same(
        made.clipped_gradient(first_rows(drawn(8, seed=2), 5), at_most=8), wanted(first_rows(drawn(8, seed=2), 5))
    )
    assert len(asked) == before  # nothing of the example before is left in the rows that stand in


def test_what_stands_in_for_an_example_adds_nothing():
    """Rows beyond the examples are an example again, whose factor is 0: the sum is that of the examples, to the bit."""
    _, made, _ = prepared()
    batch = drawn(40)
    one = made.clipped_gradient(first_rows(batch, 37), at_most=40)
    assert next(iter(made._recorded.values())).batch["ids"].shape[0] == 39
    other = drawn(40)
    other["ids"][0], other["wanted"][0] = other["ids"][0].flip(0), other["wanted"][0].flip(0)
    moved = made.clipped_gradient(first_rows(other, 37), at_most=40)
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
    model, made, wanted = prepared()
    made.clipped_gradient(drawn(8))
    before = next(iter(made._recorded.values()))
    change(model)
    expect_same(made.clipped_gradient(drawn(8)), wanted(drawn(8)))
    assert len(made._recorded) == 1
    assert next(iter(made._recorded.values())) is not before


@pytest.mark.parametrize("setting", ["cuda.matmul", "cudnn.conv"])
def test_another_precision_is_recorded_anew(setting):
    """Set as PyTorch advises since 2.9, it cannot be read by the older functions any more: they raise."""
    library, operation = setting.split(".")
    told = getattr(getattr(torch.backends, library), operation)
    _, made, wanted = prepared()
    made.clipped_gradient(drawn(8))
    before, kept = next(iter(made._recorded.values())), told.fp32_precision
    try:
        told.fp32_precision = "ieee" if kept == "tf32" else "tf32"
        for _ in range(2):
            found, exact = made.clipped_gradient(drawn(8)), wanted(drawn(8))
            assert relative_gap(found.tensors, exact.tensors) < 1e-2
        assert len(made._recorded) == 1
        assert next(iter(made._recorded.values())) is not before
    finally:
        told.fp32_precision = kept


@needs_card
def test_a_replay_draws_the_masks_that_a_step_as_written_draws():
    """Dropout in a graph takes its numbers from where the generator stands, and moves it on by as many."""
    model, made, wanted = prepared()
    model.drop.p = 0.5
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append([made.clipped_gradient(drawn(8)) for _ in range(2)])
        torch.manual_seed(seed)
        for each in found[-1]:
            expect_same(each, wanted(drawn(8)))
    assert len(made._recorded) == 1
    assert relative_gap(found[0][0].tensors, found[0][1].tensors) > 0.01
    assert relative_gap(found[0][0].tensors, found[1][0].tensors) > 0.01
    expect_same(found[2][1], found[0][1])


@needs_card
@pytest.mark.parametrize("place", ["cuda:0", pytest.param("cuda:1", marks=needs_two_cards)])
def test_what_is_recorded_is_replayed_and_not_done_as_written(place, monkeypatch):
    """On whichever card, and while another is current: only recordings call Python."""
    calls = []

    def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return words_loss(model, batch)

    model, clipping = Words(), Clipping.automatic()
    model.scale = model.scale.to(place)
    model.to(place)
    batches = [{name: value.to(place) for name, value in drawn(8, seed=seed).items()} for seed in range(4)]
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
        expect_same(found, clipped_gradient(model, counted, batch, clipping=clipping, layout=layout))


def test_other_shapes_are_recorded_beside_and_too_many_are_not(monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    _, made, wanted = prepared()
    for length in (6, 5, 4, 3, 2, 6):
        batch = drawn(8, length=length)
        expect_same(made.clipped_gradient(batch), wanted(batch))
    assert len(made._recorded) == 3
    memory = {each.total.tensors["mix.weight"].data_ptr() for each in made._recorded.values()}
    assert len(memory) == 1


def test_what_is_no_tensor_of_the_batch_is_part_of_the_recording():
    model = Words().to(DEVICE)
    seen: list[float] = []

    def loss(model: nn.Module, batch: tuple[dict[str, torch.Tensor], float]) -> torch.Tensor:
        seen.append(batch[1])
        return words_loss(model, batch[0]) * batch[1]

    clipping = Clipping.abadi(1.0)
    layout = check(model, loss, (drawn(4), 1.0), clipping=clipping).layout
    made = Replay(model, loss, clipping=clipping, layout=layout)
    for scale in (1.0, 1e-3, 1.0):
        batch = (drawn(8), scale)
        expect_same(
            made.clipped_gradient(batch, examples=8),
            clipped_gradient(model, loss, batch, clipping=clipping, layout=layout, examples=8),
        )
    assert len(made._recorded) == 2


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
