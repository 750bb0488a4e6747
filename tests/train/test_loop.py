"""Training from outside: degenerate identities, the unchanged loop, the hard stop, and what must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import discreet
from discreet.core.clipping import Clipping
from discreet.errors import BudgetExceeded, ConfigError
from discreet.train import updates
from discreet.train.loop import Private
from discreet.train.make_private import train
from discreet.train.run import Run
from discreet.train.setup import clipping_of
from train import toys
from train.short_run import short_run


def _finish(private: Private) -> torch.Tensor:
    for _ in private:
        pass
    return toys.weights(private.model)


def test_without_noise_and_clipping_it_is_sgd(tmp_path: Path) -> None:
    """sigma = 0 and R = infinity: the same weights as a plain loop over the same batches."""
    network = toys.model(torch.float64)
    private = short_run(
        tmp_path, model=network, dataset=toys.data(torch.float64), epsilon=math.inf, noise_multiplier=None, steps=6
    )
    plain = toys.model(torch.float64)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    key = private.run.sampling_key
    _finish(private)
    dataset = toys.data(torch.float64)
    for step in range(6):
        indices = private.plan.sampling.draw(key=key, step=step)
        optimizer.zero_grad()
        (toys.loss(plain, dataset[indices]).sum() / 20).backward()
        optimizer.step()
    torch.testing.assert_close(toys.weights(network), toys.weights(plain), rtol=1e-12, atol=1e-12)
    certificate = json.loads((tmp_path / "release" / "certificate.json").read_text())
    assert certificate["private"] is False


@pytest.mark.parametrize("microbatch", [1, 3, 64])
def test_microbatch_never_changes_the_run(tmp_path: Path, microbatch: int) -> None:
    runs = [
        _finish(short_run(tmp_path / str(size), dtype=torch.float64, dataset=toys.data(torch.float64), microbatch=size))
        for size in (microbatch, 20)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("style", [discreet.Style.per_layer(), discreet.Style.groups("0")])
def test_a_run_keeps_its_clipping_style(tmp_path: Path, style: discreet.Style) -> None:
    """Another style is another run of the same sensitivity; the plan records it, and a resumed run takes it up."""
    clipping = Clipping.automatic(style=style)
    grouped = _finish(short_run(tmp_path / "a", clipping=clipping))
    assert not torch.equal(grouped, _finish(short_run(tmp_path / "b")))
    split = _finish(short_run(tmp_path / "c", clipping=clipping, microbatch=7))
    torch.testing.assert_close(split, grouped, rtol=1e-4, atol=1e-5)
    plan = discreet.Plan.load(tmp_path / "a" / "release" / "plan.json")
    assert plan.clipping["style"] == style.describe()
    assert clipping_of(plan) == clipping
    assert discreet.verify(tmp_path / "a").epsilon == discreet.verify(tmp_path / "b").epsilon
    halfway = short_run(tmp_path / "d", clipping=clipping, checkpoint_steps=4)
    steps = iter(halfway)
    for _ in range(6):
        next(steps)
    halfway.close()
    assert torch.equal(grouped, _finish(short_run(tmp_path / "d", resume=True, checkpoint_steps=4)))


def test_unchanged_loop_equals_the_iterator(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_iterator = _finish(short_run(tmp_path / "a", microbatch=8))
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    private = short_run(tmp_path / "b", model=network, optimizer=optimizer, microbatch=8)
    microbatches = 0
    for features, targets in private.loader:
        microbatches += 1
        private.backward(F.cross_entropy(network(features), targets, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()
    assert microbatches > 12
    assert private.done == 12
    with caplog.at_level("WARNING", logger="discreet"):
        assert list(private.loader) == []
    assert "has no epochs" in caplog.text
    assert torch.equal(toys.weights(network), by_iterator)
    assert discreet.verify(tmp_path / "b").steps == 12


@pytest.mark.parametrize("style", ["iterator", "loader"])
def test_empty_batches_are_noised_and_counted(tmp_path: Path, style: str) -> None:
    """Expected batch 1 of 120: more than a third of the batches are empty, and each must still move every weight."""
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    private = short_run(tmp_path, model=network, optimizer=optimizer, batch_size=1, steps=40)
    sizes = [len(private.plan.sampling.draw(key=private.run.sampling_key, step=step)) for step in range(40)]
    assert sizes.count(0) >= 5
    before = toys.weights(network)
    moved = []
    if style == "iterator":
        for _ in private:
            moved.append(bool((toys.weights(network) != before).all()))
            before = toys.weights(network)
    else:
        for batch in private.loader:
            private.backward(toys.loss(network, batch))
            optimizer.step()
            moved.append(bool((toys.weights(network) != before).all()))
            before = toys.weights(network)
    assert moved == [True] * 40
    assert discreet.verify(tmp_path).steps == 40


def test_steps_show_public_values(tmp_path: Path) -> None:
    network = toys.model()
    private = short_run(
        tmp_path,
        model=network,
        optimizer=torch.optim.Adam(network.parameters()),
        learning_rate=0.2,
        epsilon=2.0,
        noise_multiplier=None,
        seed=None,
    )
    steps = list(private)
    assert [step.index for step in steps] == list(range(12))
    assert [step.learning_rate for step in steps] == pytest.approx([0.2 * (1 - k / 12) for k in range(12)])
    epsilons = [step.epsilon for step in steps]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] <= 2.0
    assert epsilons[-1] == private.plan.spent()
    assert "differentially private" in private.report()


def test_ledger_is_never_below_the_steps_taken(tmp_path: Path) -> None:
    private = short_run(tmp_path, steps=40)
    for step in private:
        if step.index < 39:
            assert private.run.ledger.steps_reserved >= step.index + 1
    assert discreet.verify(tmp_path).steps == 40


def test_the_conclusion_comes_once_after_the_last_update_while_the_ledger_is_open(tmp_path: Path) -> None:
    seen = []

    def conclude(run: Run, model: nn.Module) -> None:
        weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
        seen.append((run.ledger.steps_reserved, run.ledger.finished, weights))
        run.ledger.note("seen")

    private = short_run(tmp_path / "run", conclude=conclude)
    weights = _finish(private)
    assert len(seen) == 1
    assert seen[0][:2] == (private.steps, False)
    assert torch.equal(seen[0][2], weights)
    assert [record.body["note"] for record in private.run.ledger.records if record.kind == "note"] == ["seen"]
    assert private.run.ledger.finished


def test_no_step_beyond_the_plan(tmp_path: Path) -> None:
    private = short_run(tmp_path, steps=3)
    _finish(private)
    with pytest.raises(BudgetExceeded, match="ends after 3"):
        private._updates.releases.draw()


def test_train_is_one_call(tmp_path: Path) -> None:
    result = train(toys.model(), toys.data(), loss=toys.loss, epsilon=4.0, batch_size=30, steps=10, run_dir=tmp_path)
    assert result.epsilon <= 4.0
    assert result.run_dir == tmp_path
    found = discreet.verify(tmp_path)
    assert found.private
    assert found.epsilon == result.epsilon
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == [
        "certificate.json",
        "check.json",
        "model.safetensors",
        "plan.json",
    ]
    assert not (tmp_path / "private" / "key").exists()


def test_dataloader_gives_its_dataset_and_collate(tmp_path: Path) -> None:
    def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    loader = DataLoader(toys.data(), batch_size=3, shuffle=True, collate_fn=collate)
    by_loader = _finish(short_run(tmp_path / "a", dataset=loader))
    assert torch.equal(by_loader, _finish(short_run(tmp_path / "b")))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_and_scheduler(tmp_path: Path, make: type[torch.optim.Optimizer]) -> None:
    network = toys.model()
    optimizer = make(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    private = short_run(tmp_path, model=network, optimizer=optimizer, learning_rate=scheduler)
    rates = [step.learning_rate for step in private]
    assert rates[0] == 0.1
    assert rates[-1] < 0.01


def test_an_optimizer_goes_from_one_run_to_the_next(tmp_path: Path) -> None:
    """As when the cell of a notebook is run again: the second run called the gate of the first, after its charge."""
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    first = short_run(tmp_path / "a", model=network, optimizer=optimizer, checkpoint_steps=4)
    for _, _step in zip(range(6), first, strict=False):
        pass
    with pytest.raises(ConfigError, match=r"Adam: is in private training in .*close\(\) that run first"):
        short_run(tmp_path / "b", model=network, optimizer=optimizer)
    first.close()
    resumed = short_run(tmp_path / "a", model=network, optimizer=optimizer, resume=True)
    assert [step.index for step in resumed] == list(range(4, 12))
    assert [step.index for step in short_run(tmp_path / "b", model=network, optimizer=optimizer)] == list(range(12))


def test_a_set_up_that_fails_leaves_the_optimizer_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(updates.Updates, "save", _full)
        with pytest.raises(OSError, match="full"):
            short_run(tmp_path / "a", model=network, optimizer=optimizer)
    assert len(list(short_run(tmp_path / "b", model=network, optimizer=optimizer))) == 12


def _full(_updates: object) -> None:
    raise OSError("full")


def test_a_scheduler_that_is_made_afterwards(tmp_path: Path) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.8)
    private = short_run(tmp_path, model=network, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    for _ in private:
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.8e-3)


def test_ratios_between_groups_are_kept(tmp_path: Path) -> None:
    network = toys.model()
    groups = [{"params": network[0].parameters(), "lr": 0.1}, {"params": network[3].parameters(), "lr": 0.02}]
    private = short_run(tmp_path, model=network, optimizer=torch.optim.SGD(groups), learning_rate=1.0, steps=4)
    for step in private:
        first, second = (group["lr"] for group in private._updates.optimizer.param_groups)
        assert second == pytest.approx(first / 5)
        assert first == step.learning_rate


def test_a_nan_row_changes_nothing_beyond_its_share(tmp_path: Path) -> None:
    features, targets = (tensor.clone() for tensor in toys.data().tensors)
    features[17] = math.nan
    features[40] = math.inf
    features[63] = 1e38
    assert torch.isfinite(_finish(short_run(tmp_path, dataset=TensorDataset(features, targets)))).all()


@pytest.mark.parametrize("rate", [None, "auto"])
def test_tensors_of_our_own_are_where_they_have_to_be_whatever_the_default_is(rate: object, tmp_path: Path) -> None:
    """``torch.set_default_device("cuda")`` put those of the self-check beside a generator, or a loss, of the host."""
    ends = []
    for name, place in (("host", "cpu"), ("elsewhere", "meta")):
        model, data = toys.model(dropout=0.1), toys.data()
        with torch.device(place):
            _finish(short_run(tmp_path / name, model=model, dataset=data, learning_rate=rate, steps=40))
        ends.append(toys.weights(model))
    assert torch.equal(*ends)


def test_dropout_is_a_function_of_the_key_and_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = _finish(short_run(tmp_path / "a", model=toys.model(dropout=0.5)))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, _finish(short_run(tmp_path / "b", model=toys.model(dropout=0.5))))
    assert not torch.equal(first, _finish(short_run(tmp_path / "c", model=toys.model(dropout=0.1))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 1e20])
def test_no_single_row_decides_whether_training_starts(tmp_path: Path, value: float) -> None:
    """The self-check sees the first rows: one of them must not be able to fail it."""
    features, targets = (tensor.clone() for tensor in toys.data().tensors)
    features[1] = value
    assert torch.isfinite(_finish(short_run(tmp_path, dataset=TensorDataset(features, targets)))).all()
