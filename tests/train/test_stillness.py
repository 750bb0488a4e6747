"""A buffer that follows only some examples is refused before anything of their batch is released."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from discreet.errors import ConfigError, UnsupportedUse
from discreet.train.checkpoint import saved_state
from discreet.train.contest import Choice, PrivateScore
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from discreet.train.probing import find_rate
from discreet.train.stillness import Allowed
from discreet.train.trial import Recipe
from discreet.train.tune import tune
from train import toys

FAR = 50.0
"""One of the 120 rows holds it; each batch has nine tenths of the rows, so that it misses 12 of them once in 10^12."""


def _in_place(model: nn.Module, seen: Tensor) -> None:
    model.largest.copy_(seen)


def _past_autograd(model: nn.Module, seen: Tensor) -> None:
    model.largest.data.copy_(seen)


def _other_memory(model: nn.Module, seen: Tensor) -> None:
    model.largest.data = seen


def _through_numpy(model: nn.Module, seen: Tensor) -> None:
    model.largest.numpy().fill(float(seen))


def _exchanged(model: nn.Module, seen: Tensor) -> None:
    model.largest = seen


def _grown(model: nn.Module, seen: Tensor) -> None:
    model.largest = torch.stack([model.largest, seen])


def _removed(model: nn.Module, seen: Tensor) -> None:
    if "largest" in model._buffers:
        del model.largest


def _added(model: nn.Module, seen: Tensor) -> None:
    if "extra" not in model._buffers:
        model.register_buffer("extra", seen)


def _reordered(model: nn.Module, seen: Tensor) -> None:
    model.order.data.copy_(model.order.flip(0).clone())


def _large(model: nn.Module, seen: Tensor) -> None:
    model.wide.data.mul_(seen)


def _frozen(model: nn.Module, seen: Tensor) -> None:
    with torch.no_grad():
        model.frozen.copy_(seen)


def _frozen_past_autograd(model: nn.Module, seen: Tensor) -> None:
    model.frozen.data.copy_(seen)


def _trained_past_autograd(model: nn.Module, seen: Tensor) -> None:
    model.layer.bias.data.fill_(float(seen))


WRITES = {
    "in place": (_in_place, "largest"),
    "past autograd": (_past_autograd, "largest"),
    "other memory": (_other_memory, "largest"),
    "through numpy": (_through_numpy, "largest"),
    "exchanged": (_exchanged, "largest"),
    "grown": (_grown, "largest"),
    "removed": (_removed, "largest"),
    "added": (_added, "extra"),
    "reordered": (_reordered, "order"),
    "a large one": (_large, "wide"),
    "frozen": (_frozen, "frozen"),
    "frozen, past autograd": (_frozen_past_autograd, "frozen"),
    "trained, past autograd": (_trained_past_autograd, "layer.bias"),
}
"""How a forward may write, and what it writes."""


class _Largest(nn.Module):
    """Divides by the largest number so far, as an observer of ranges does that was set on public data."""

    def __init__(self, how: str, *, evaluating: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.write, self.evaluating = WRITES[how][0], evaluating
        self.register_buffer("largest", torch.tensor(10.0))
        self.register_buffer("order", torch.arange(4.0))
        self.register_buffer("wide", torch.ones(100, 200).t())
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.frozen = nn.Parameter(torch.tensor(10.0), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        if len(rows) > len(self.table):
            self.table = torch.zeros(len(rows))
        seen = rows.detach().abs().max()
        if seen > 10.0 and self.evaluating is not self.training:
            self.write(self, seen)
        return self.layer(rows / 10.0)


def _data(*, far: bool) -> TensorDataset:
    features, targets = toys.data().tensors
    if far:
        features[100, 0] = FAR
    return TensorDataset(features, targets)


def _private(
    run_dir: Path,
    *,
    how: str = "in place",
    far: bool = True,
    network: nn.Module | None = None,
    learning_rate: float | str = 0.01,
    batch_size: int = 108,
    microbatch: int = 20,
    steps: int = 12,
    seed: int | None = None,
) -> Private:
    network = network if network is not None else _Largest(how)
    moved = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return make_private(
        network,
        torch.optim.Adam(moved),
        _data(far=far),
        loss=toys.loss,
        noise_multiplier=1.0,
        batch_size=batch_size,
        steps=steps,
        learning_rate=learning_rate,
        microbatch=microbatch,
        run_dir=run_dir,
        seed=seed,
    )


@pytest.mark.parametrize("how", WRITES)
def test_what_one_example_writes_ends_the_run_before_a_release(tmp_path: Path, how: str) -> None:
    """Before, the largest number of all private rows stood in the released model, exactly."""
    private = _private(tmp_path / "run", how=how)
    with pytest.raises(UnsupportedUse, match=f"{WRITES[how][1]}: a forward wrote it"):
        for _ in private:
            pass
    assert not (tmp_path / "run" / "release" / "model.safetensors").exists()
    private.close()


def test_an_unchanged_loop_is_watched_as_well(tmp_path: Path) -> None:
    private = _private(tmp_path / "run", how="in place")
    with pytest.raises(UnsupportedUse, match="largest: a forward wrote it"):
        _unchanged(private)
    private.close()


def test_a_probe_of_the_learning_rate_is_watched_as_well(tmp_path: Path) -> None:
    """It puts weights and buffers back itself, but not what it does not know of."""
    private = _private(tmp_path / "run", how="frozen, past autograd", learning_rate="auto", steps=200)
    with pytest.raises(UnsupportedUse, match="frozen: a forward wrote it"):
        find_rate(private._updates)
    private.close()


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_search_is_watched_as_well(tmp_path: Path, evaluating: bool) -> None:
    """Its runs, and its scores, which all private rows go through."""
    with pytest.raises(UnsupportedUse, match="largest: a forward wrote it"):
        tune(
            [Choice("only", lambda: _Largest("past autograd", evaluating=evaluating), Recipe(0.01))],
            _data(far=True),
            loss=toys.loss,
            score=PrivateScore(lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float()),
            epsilon=3.0,
            batch_size=108,
            steps=12,
            run_dir=tmp_path / "run",
        )


def test_counters_and_tables_of_sizes_are_no_statistics(tmp_path: Path) -> None:
    private = _private(tmp_path / "run", far=False)
    assert private.check_report.allowed == Allowed(moving=("calls",), tables=("table",))
    for _ in private:
        pass
    assert float(private.model.largest) == 10.0


class _Counting(nn.Module):
    """A layer that is turned up with the number of forwards, and takes the sign of a far example for its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = toys.model()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("twice", torch.ones(()))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        self.twice = self.twice * 2
        if rows.detach().abs().max() > 10.0:
            self.calls.data.fill_(-1000.0)
        return self.layer(rows) * (1 + self.twice / 4096)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("loop", ["steps", "microbatches"])
def test_a_counter_tells_nothing_of_how_many_examples_were_drawn(tmp_path: Path, loop: str, far: bool) -> None:
    """It counted microbatches: sum of ceil(realised / microbatch). Now it counts updates, and no example writes it."""
    weights = []
    for microbatch in (11, 1000):
        private = _private(tmp_path / f"{microbatch}", far=far, network=_Counting(), microbatch=microbatch, seed=3)
        if loop == "steps":
            for _ in private:
                pass
        else:
            _unchanged(private)
        assert float(private.model.calls) == 12
        assert float(private.model.twice) == 2.0**12
        weights.append(toys.weights(private.model))
    torch.testing.assert_close(*weights)


def _unchanged(private: Private) -> None:
    for features, targets in private.loader:
        private.backward(nn.functional.cross_entropy(private.model(features), targets, reduction="none"))
        private._updates.optimizer.step()


@pytest.mark.parametrize("loop", ["steps", "microbatches"])
def test_empty_batches_move_a_counter_as_well(tmp_path: Path, loop: str) -> None:
    private = _private(tmp_path / "run", far=False, network=_Counting(), batch_size=1, seed=3)
    sizes = [len(private.plan.sampling.draw(key=private._updates.run.sampling_key, step=step)) for step in range(12)]
    if loop == "steps":
        for _ in private:
            pass
    else:
        _unchanged(private)
    assert 0 in sizes
    assert float(private.model.calls) == 12


def test_a_batch_that_is_begun_again_moves_a_counter_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = _private(tmp_path / "run", far=False, network=_Counting(), microbatch=64)
    honest, calls = private._updates.step.fetch, []

    def short_of_memory(indices):
        calls.append(len(indices))
        if len(calls) == 2:
            raise MemoryError
        return honest(indices)

    object.__setattr__(private._updates.step, "fetch", short_of_memory)
    for _ in private:
        pass
    assert private._updates.step.microbatch.size < 64
    assert float(private.model.calls) == 12


class _Extremes(nn.Module):
    """Keeps the largest entry that it saw in a plain attribute, which is saved in one of two ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.largest, self.way = nn.Linear(6, 2), torch.zeros(1), way
        if way == "hook":
            self.register_state_dict_post_hook(lambda module, state, *_: state.update(largest=module.largest))

    def forward(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.detach().amax().reshape(1))
        return self.layer(x)


class _ExtremesAsExtraState(_Extremes):
    def get_extra_state(self) -> Tensor:
        return self.largest


@pytest.mark.parametrize("model", [_Extremes("hook"), _ExtremesAsExtraState("extra state")], ids=lambda m: m.way)
def test_state_that_nobody_watches_is_not_saved(tmp_path: Path, model: nn.Module) -> None:
    """The largest number of all private rows stood in the released model."""
    with pytest.raises(ConfigError, match="neither a parameter nor a buffer"):
        _private(tmp_path / "run", network=model)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_parameters_and_buffers_may_be_saved_under_other_names() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].register_buffer("scale", torch.ones(1))
    model.register_state_dict_post_hook(lambda module, state, *_: state.update(last=state.pop("2.weight")))
    assert "last" in saved_state(model)
