"""What make_private and its loops refuse: before anything is released, and mostly before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from discreet.core.clipping import Clipping
from discreet.errors import CheckFailed, ConfigError, LedgerError, UnsupportedUse
from discreet.train import releases
from discreet.train.make_private import make_private
from discreet.train.run import Run
from train import toys
from train.short_run import short_run


def test_batch_coupling(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Linear(8, 2)
    )
    with pytest.raises(CheckFailed, match="isolation"):
        short_run(tmp_path / "run", model=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    assert not (tmp_path / "run").exists()


def test_mean_loss(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckFailed, IndexError)):
        short_run(tmp_path / "run", loss=lambda model, batch: toys.loss(model, batch).mean())
    assert not (tmp_path / "run").exists()


def test_optimizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.weight: is trainable but the optimizer does not hold it"):
        short_run(tmp_path / "run", optimizer=torch.optim.SGD(toys.model().parameters(), lr=0.1))


def test_foreign_parameter_in_the_optimizer(tmp_path: Path) -> None:
    network = toys.model()
    extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="not in the model"):
        short_run(tmp_path / "run", model=network, optimizer=torch.optim.SGD([*network.parameters(), extra], lr=0.1))


def test_noise_on_what_no_rule_bounds(tmp_path: Path) -> None:
    """It was charged for the first updates, and failed at the first release."""
    with pytest.raises(ConfigError, match="without a bound"):
        short_run(tmp_path / "run", clipping=Clipping.none())
    assert not (tmp_path / "run").exists()


def test_a_seed_beside_a_run_that_has_its_key(tmp_path: Path) -> None:
    """It was passed over: a run that was to be a reproducible test was a private one."""
    first = short_run(tmp_path / "first")
    first.close()
    with Run.create(tmp_path / "run", plan=first.plan) as run:
        for given in ({"seed": 3}, {"seed": None, "resume": True}):
            with pytest.raises(ConfigError, match="beside a Run"):
                short_run(run, noise_multiplier=None, batch_size=None, steps=None, **given)


def test_ranks_that_meet_after_a_run_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums were added up, of the same examples: one moved what was released by a share for each rank."""
    private = short_run(tmp_path / "run")
    updates = iter(private)
    next(updates)
    monkeypatch.setattr(releases, "world_size", lambda: 2)
    charged = private.epsilon()
    with pytest.raises(ConfigError, match="2 ranks"):
        next(updates)
    assert (private.done, private.epsilon()) == (1, charged)
    private.close()


class _Wrapper(torch.optim.Optimizer):
    """As found in many repositories: it has all that it is asked for, but not what torch sets up."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure: object = None) -> None:
        self.inner.step()


def test_an_optimizer_whose_steps_cannot_be_watched(tmp_path: Path) -> None:
    """It failed in the middle, with an AttributeError, when the run had been begun."""
    network = toys.model()
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    for other in (_Wrapper(inner), [inner, inner], None):
        with pytest.raises(ConfigError, match=r"must be one torch\.optim\.Optimizer"):
            make_private(network, other, toys.data(), loss=toys.loss, epsilon=3.0, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    private = make_private(
        network, inner, toys.data(), loss=toys.loss, noise_multiplier=1.0, batch_size=20, steps=2,
        learning_rate=None, run_dir=tmp_path / "run",
    )  # fmt: skip
    wrapper = _Wrapper(inner)
    for batch in private.loader:
        private.backward(toys.loss(network, batch))
        wrapper.step()
    assert private.done == 2


@pytest.mark.parametrize("rate", ["auto", 0.1])
def test_groups_of_parameters_that_come_later(tmp_path: Path, rate: float | str) -> None:
    """The error gave the same rate twice, and spoke of a scheduler."""
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters())
    private = short_run(tmp_path, model=network, optimizer=optimizer, learning_rate=rate)
    steps = iter(private)
    next(steps)
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()]})
    with pytest.raises(ConfigError, match="2 groups of parameters, and 1 when"):
        next(steps)


def test_closure(tmp_path: Path) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    short_run(tmp_path, model=network, optimizer=optimizer)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: None)


def test_step_without_a_batch(tmp_path: Path) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    private = short_run(tmp_path, model=network, optimizer=optimizer)
    toys.loss(network, toys.data()[:5]).mean().backward()
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()
    with pytest.raises(ConfigError, match="without a batch"):
        private.backward(torch.zeros(3))


def test_a_skipped_microbatch(tmp_path: Path) -> None:
    private = short_run(tmp_path, microbatch=4)
    batches = iter(private.loader)
    next(batches)
    with pytest.raises(ConfigError, match="was skipped"):
        next(batches)


@pytest.mark.parametrize("change", ["requires_grad_", "requires_grad", "data", "half"])
def test_a_model_that_is_changed_between_a_batch_and_its_backward(tmp_path: Path, change: str) -> None:
    """The error said to freeze the parameter, which is what the loop had tried."""
    network = toys.model()
    private = toys.private_run(tmp_path, network=network, epsilon=3.0, learning_rate=None)
    weight = network[0].weight
    changes = {
        "requires_grad_": lambda: weight.requires_grad_(False),
        "requires_grad": lambda: setattr(weight, "requires_grad", False),
        "data": lambda: setattr(weight, "data", weight.detach().clone()),
        "half": network.half,
    }
    for _ in private.loader:
        with pytest.raises(UnsupportedUse, match=r"0\.weight.*change parameters after its update") as refused:
            changes[change]()
        assert "getset_descriptor" not in str(refused.value)
        break
    private.close()


def test_two_iterators_at_a_time(tmp_path: Path) -> None:
    """Both give out parts of one batch: the second part was counted twice, and moved the sum by twice its bound."""
    network = toys.model()
    private = short_run(tmp_path, model=network, microbatch=4)

    def settle(batches) -> None:
        private.backward(toys.loss(network, next(batches)))

    first = iter(private.loader)
    settle(first)
    second = iter(private.loader)
    settle(second)
    settle(second)
    with pytest.raises(ConfigError, match="iterated twice at a time"):
        settle(first)


def test_a_step_of_the_class_past_the_gate(tmp_path: Path) -> None:
    model = toys.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = short_run(tmp_path / "run", model=model, optimizer=optimizer)
    before = toys.weights(model)
    for _ in range(2):
        toys.loss(model, toys.data()[:4]).mean().backward()
        with pytest.raises(ConfigError, match=r"not released; call optimizer\.step\(\)"):
            torch.optim.SGD.step(optimizer)
        assert torch.equal(toys.weights(model), before)
        next(iter(private))
        assert not torch.equal(toys.weights(model), before)
        before = toys.weights(model)


def test_a_batch_without_step(tmp_path: Path) -> None:
    private = short_run(tmp_path, microbatch=64)
    batches = iter(private.loader)
    private.backward(toys.loss(private.model, next(batches)))
    with pytest.raises(ConfigError, match=r"step\(\) was not called"):
        next(batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": None}, "exactly one"),
        ({"epsilon": 1.0}, "exactly one"),
        ({"batch_size": 121}, "at most the 120 examples"),
        ({"steps": 0}, "steps=0"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"learning_rate": "fast"}, '"fast"'),
        ({"learning_rate": -1.0}, "-1.0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0"),
        ({"noise_multiplier": -1.0}, "-1.0"),
        ({"noise_multiplier": None, "epsilon": -3.0}, "-3.0"),
        ({"delta": 2.0}, "2.0"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_arguments(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        short_run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_iterable_dataset(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigError, match="map-style"):
        short_run(tmp_path / "run", dataset=Stream())


def test_empty_dataset(tmp_path: Path) -> None:
    class Nothing(Dataset):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ConfigError, match="empty"):
        make_private(
            toys.model(),
            torch.optim.SGD(toys.model().parameters()),
            Nothing(),
            loss=toys.loss,
            epsilon=1.0,
            run_dir=tmp_path,
        )


def test_second_run_in_a_directory(tmp_path: Path) -> None:
    short_run(tmp_path).close()
    with pytest.raises(ConfigError, match="holds a run already"):
        short_run(tmp_path)


def test_second_process_on_a_run(tmp_path: Path) -> None:
    private = short_run(tmp_path)
    with pytest.raises(LedgerError):
        short_run(tmp_path, resume=True)
    private.close()


def test_clipping_that_is_not_the_plans(tmp_path: Path) -> None:
    short_run(tmp_path).close()
    with pytest.raises(ConfigError, match="clipping"):
        short_run(tmp_path, resume=True, clipping=Clipping.abadi(3.0))


@pytest.mark.parametrize(
    ("name", "other"), [("epsilon", 5.0), ("delta", 1e-3), ("noise_multiplier", 2.0), ("batch_size", 13), ("steps", 99)]
)
def test_what_is_not_in_the_plan_of_a_resumed_run(tmp_path: Path, name: str, other: float) -> None:
    """It was ignored: whoever asked for another epsilon went on with the old one, and was not told."""
    short_run(tmp_path).close()
    with pytest.raises(ConfigError, match=f"{name}: {other} now, .* in the plan of this run"):
        short_run(tmp_path, resume=True, **{name: other})
    short_run(tmp_path, resume=True).close()


def test_another_plan_than_that_of_a_resumed_run(tmp_path: Path) -> None:
    rest = {"noise_multiplier": None, "batch_size": None, "steps": None}
    plan = short_run(tmp_path / "other", noise_multiplier=2.0).plan
    private = short_run(tmp_path / "run")
    private.close()
    with pytest.raises(ConfigError, match=r"plan: .* in the plan of this run"):
        short_run(tmp_path / "run", resume=True, plan=plan, **rest)
    short_run(tmp_path / "run", resume=True, plan=private.plan, **rest).close()


def test_a_scheduler_that_the_loop_steps_as_well(tmp_path: Path) -> None:
    """Passed as learning_rate it is stepped once per update; a call left in the loop would let it run twice as fast."""
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    private = short_run(tmp_path, model=network, optimizer=optimizer, learning_rate=scheduler)
    next(iter(private))
    before = toys.weights(network)
    scheduler.step()
    with pytest.raises(ConfigError, match=r"StepLR.step\(\) was called in the loop"):
        next(iter(private))
    assert torch.equal(toys.weights(network), before)


def test_a_rate_that_the_loop_writes_beside_a_number(tmp_path: Path) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    private = short_run(tmp_path, model=network, optimizer=optimizer, learning_rate=0.1)
    next(iter(private))
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(ConfigError, match="a scheduler or the loop also writes lr"):
        next(iter(private))


def test_an_optimizer_that_needs_a_closure(tmp_path: Path) -> None:
    network = toys.model()
    with pytest.raises(ConfigError, match="LBFGS: its step needs a closure"):
        short_run(tmp_path / "run", model=network, optimizer=torch.optim.LBFGS(network.parameters()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SparseAdam(p), lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True)],
    ids=["sparse", "differentiable"],
)
def test_an_optimizer_that_cannot_take_what_is_released(tmp_path: Path, make) -> None:
    network = toys.model()
    with pytest.raises(ConfigError, match="must take the dense gradients that are released"):
        short_run(tmp_path / "run", model=network, optimizer=make(list(network.parameters())))
    assert not (tmp_path / "run").exists()


def test_a_parameter_that_is_taken_out_of_the_optimizer(tmp_path: Path) -> None:
    """Each update was charged for it, and none moved it."""
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    private = short_run(tmp_path, model=network, optimizer=optimizer)
    first = next(iter(private)).index
    taken = optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(ConfigError, match=r"0\.weight: is trainable but the optimizer does not hold it"):
        next(iter(private))
    optimizer.param_groups[0]["params"].insert(0, taken)
    assert next(iter(private)).index == first + 1  # none was lost


def test_a_scheduler_that_needs_a_metric(tmp_path: Path) -> None:
    network = toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ConfigError, match="needs a metric"):
        short_run(tmp_path / "run", model=network, optimizer=optimizer, learning_rate=scheduler)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler(tmp_path: Path, fused: bool) -> None:
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters(), fused=fused)
    private = short_run(tmp_path, model=network, optimizer=optimizer, microbatch=64)
    scaler = torch.amp.GradScaler("cpu")
    before = toys.weights(network)
    batches = iter(private.loader)
    scaler.scale(torch.ones(()))
    private.backward(toys.loss(network, next(batches)))
    with pytest.raises(ConfigError, match=r"a GradScaler: released gradients carry no loss scale"):
        scaler.step(optimizer)
    assert torch.equal(toys.weights(network), before)
