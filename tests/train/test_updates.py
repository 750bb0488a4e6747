"""No sum of a run is released without its own charge, nor twice: what an attacker would try while it trains."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

import discreet
from discreet.errors import ConfigError
from discreet.privacy.verification import CERTIFIED
from discreet.train import releases
from train import toys
from train.charged_run import charged_run, fresh_model


def test_a_batch_is_released_once_and_as_the_update_it_was_drawn_for(tmp_path: Path) -> None:
    """At the edge of a block of reservations, the second release would have had no charge."""
    network = toys.model()
    optimizer = torch.optim.Adam(network.parameters())
    private = charged_run(tmp_path, model=network, optimizer=lambda *_args, **_named: optimizer)
    steps = iter(private)
    for _ in range(releases.RESERVE_STEPS - 1):
        next(steps)
    batches = iter(private.loader)
    private.backward(toys.loss(network, next(batches)))
    next(steps)
    with pytest.raises(ConfigError, match="drawn for update 15, at update 16"):
        optimizer.step()
    assert private.done == private.run.ledger.steps_reserved == releases.RESERVE_STEPS


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_run_cannot_be_copied(tmp_path: Path, duplicate: Callable[[object], object]) -> None:
    private = charged_run(tmp_path)
    for thing in (private._updates, private._updates.releases, private.run):
        with pytest.raises(ConfigError, match="cannot be copied"):
            duplicate(thing)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(private)


def test_one_run_trains_one_model(tmp_path: Path, reused: Callable[[], list[int]]) -> None:
    """The second would go on under a key of its own, and the first find its steps charged by the second."""
    first = charged_run(tmp_path)
    steps = iter(first)
    for _ in range(11):
        next(steps)
    with pytest.raises(ConfigError, match="this run is trained already"):
        charged_run(first.run, model=fresh_model())
    assert next(steps).index == 11
    first.close()
    assert reused() == []


def test_a_second_thread_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding the position of an update and taking it, the other one would move it on."""
    private = charged_run(tmp_path)
    made, total = private._updates.releases, private._updates.clipped_sum()
    original, refused = releases.release, []

    def other() -> None:
        try:
            made.release_sum(total, index=0)
        except ConfigError as error:
            refused.append(str(error))

    def meanwhile(*given: object, **named: object) -> object:
        monkeypatch.setattr(releases, "release", original)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return original(*given, **named)

    monkeypatch.setattr(releases, "release", meanwhile)
    assert made.release_sum(total, index=0) is not None
    assert [text.startswith("two threads in one update") for text in refused] == [True]
    assert made._source.position == 1
    private.close()


def test_a_fork_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = charged_run(tmp_path)
    next(iter(private))
    child = os.getpid() + 1
    monkeypatch.setattr(releases.os, "getpid", lambda: child)
    with pytest.raises(ConfigError, match="fork"):
        next(iter(private))


def test_a_closed_run_takes_no_step(tmp_path: Path) -> None:
    private = charged_run(tmp_path)
    steps = iter(private)
    next(steps)
    private.close()
    with pytest.raises(ConfigError, match="was closed; resume it"):
        next(steps)


def test_a_with_statement_lets_go_of_a_run_that_failed(tmp_path: Path) -> None:
    """Its variable was out of reach, its lock was not: only a new process could resume it."""
    with pytest.raises(ZeroDivisionError), charged_run(tmp_path) as private:
        next(iter(private)).index / 0
    resumed = charged_run(tmp_path, resume=True)
    assert sum(1 for _ in resumed) > 0
    with pytest.raises(ConfigError, match="has ended"):
        resumed._updates.releases.check_hold()


def test_a_run_that_is_finished_early_certifies_what_it_spent(tmp_path: Path) -> None:
    private = charged_run(tmp_path)
    made = 0
    for _ in private:
        made += 1
        if made == 20:
            break
    private.finish()
    found = discreet.verify(tmp_path)
    assert found.finished
    assert made <= found.steps < private.plan.steps
    assert found.epsilon == private.epsilon() < private.plan.epsilon
    assert found.model == CERTIFIED
    saved = load_file(tmp_path / "release" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in private.model.state_dict().items())
    with pytest.raises(ConfigError, match="has ended"):
        next(iter(private))
    with pytest.raises(ConfigError, match="this run has ended"):
        charged_run(tmp_path, resume=True)


def test_weights_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    """Adam in float16, whose squares vanish: all of the budget went, and a model of NaN was released and certified."""
    private = charged_run(
        tmp_path,
        model=toys.model(torch.float16),
        dataset=toys.data(torch.float16),
        loss=lambda model, batch: toys.loss(model, batch).float(),
    )
    with pytest.raises(ConfigError, match=r"not finite after update [0-7],.*bfloat16"):
        list(private)
    assert 0 < private.done < private.steps
    private.finish()
    assert discreet.verify(tmp_path).finished


def test_parameters_that_are_parts_of_one_memory_are_saved(tmp_path: Path) -> None:
    """As flattened ones are, and those of an LSTM on CUDA: the run was refused when all was done, at its end."""
    network = toys.model()
    network.append(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    network[4][1].weight = network[4][0].weight
    flat = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, network.parameters())
    list(charged_run(tmp_path, model=network, steps=2))
    again = toys.model().append(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    again[4][1].weight = again[4][0].weight
    load_model(again, tmp_path / "release" / "model.safetensors")
    assert torch.equal(toys.weights(again), toys.weights(network))
    assert len(load_file(tmp_path / "release" / "model.safetensors")) == 6


def test_iterating_a_finished_run_does_nothing(tmp_path: Path) -> None:
    private = charged_run(tmp_path, steps=3)
    assert len(list(private)) == 3
    assert list(private) == []
    assert list(private.loader) == []


@pytest.mark.parametrize("change", ["freeze", "replace", "add"])
def test_another_model_in_mid_run_is_refused(tmp_path: Path, change: str) -> None:
    network = toys.model()
    private = charged_run(tmp_path, model=network)
    steps = iter(private)
    next(steps)
    if change == "freeze":
        network[0].weight.requires_grad_(False)
    elif change == "replace":
        network[3] = nn.Linear(8, 2)
    else:
        network.append(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="trainable parameters changed"):
        next(steps)


def test_a_gradient_that_was_not_released_moves_nothing(tmp_path: Path) -> None:
    network = toys.model()
    network[0].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    with pytest.raises(ConfigError, match="not released"):
        charged_run(tmp_path / "a", model=network)
    assert not (tmp_path / "a").exists()
    network[0].weight.grad = None
    private = charged_run(tmp_path / "b", model=network)
    steps = iter(private)
    next(steps)
    extra = nn.Parameter(torch.zeros(3))
    extra.grad = torch.ones(3)
    private._updates.optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ConfigError, match="not released"):
        next(steps)


def test_a_late_backward_after_leaving_the_loop_is_refused(tmp_path: Path) -> None:
    network = toys.model()
    private = charged_run(tmp_path, model=network)
    for batch in private.loader:
        left = batch
        break
    with pytest.raises(ConfigError, match="without a batch"):
        private.backward(toys.loss(network, left))
    assert all(parameter.grad is None for parameter in network.parameters())
