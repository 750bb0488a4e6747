"""A loop of the user's own over `private.loader` has the losses that were checked, or ends before it moves a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discreet.errors import CheckFailed, ConfigError
from discreet.train.loop import Private
from train import toys
from train.short_run import run_and_optimizer, short_run

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _plain(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(network(rows), targets, reduction="none")


def _mixed(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return _plain(network, 0.9 * rows + 0.1 * rows.roll(1, 0), targets)


def _averaged(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return _plain(network, rows, targets) / len(rows)


def _standardised(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return _plain(network, (rows - rows.mean(0)) / rows.std(0), targets)


def _balanced(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    losses_B = _plain(network, rows, targets)
    return losses_B + 0.01 * losses_B.mean()


def _weighted(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    """Every Jacobian entry between two examples is zero, and yet each depends on all labels."""
    return _plain(network, rows, targets) / targets.float().mean()


def _balanced_slightly(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    """A mixture of experts has a load-balancing loss of about 1 over the batch, times a thousandth."""
    logits = network(rows)
    shares = F.one_hot(logits.argmax(1), 2).float().mean(0)
    return F.cross_entropy(logits, targets, reduction="none") + 1e-3 * (shares * logits.softmax(1).mean(0)).sum()


def _loop(private: Private, optimizer: torch.optim.Optimizer, losses: Losses) -> None:
    for rows, targets in private.loader:
        private.backward(losses(private.model, rows, targets))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("losses", [_mixed, _averaged, _standardised, _balanced, _weighted, _balanced_slightly])
def test_a_loop_that_couples_what_it_is_given(tmp_path: Path, losses: Losses) -> None:
    private, optimizer = run_and_optimizer(tmp_path)
    before = toys.weights(private.model)
    with pytest.raises(CheckFailed, match="losses of this loop are not those of loss="):
        _loop(private, optimizer, losses)
    with pytest.raises(ConfigError, match="without a clipped gradient"):
        optimizer.step()
    assert torch.equal(toys.weights(private.model), before)


def _hooked(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    logits = network(rows)
    logits.register_hook(lambda gradient: gradient / gradient.norm())
    return F.cross_entropy(logits, targets, reduction="none")


def _straight_through(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    losses_B = _plain(network, rows, targets)
    term_B = losses_B * losses_B.mean()
    return losses_B + term_B - term_B.detach()


@pytest.mark.parametrize("losses", [_hooked, _straight_through])
def test_a_loop_that_couples_gradients_alone(tmp_path: Path, losses: Losses) -> None:
    private, optimizer = run_and_optimizer(tmp_path)
    with pytest.raises(CheckFailed, match="their gradients are not"):
        _loop(private, optimizer, losses)


def test_updates_are_counted_from_where_a_process_begins(tmp_path: Path) -> None:
    """Probes of the learning rate come first, and took all early questions; what resumes may be other code."""
    given = {"steps": 200, "learning_rate": "auto"}
    private, optimizer = run_and_optimizer(tmp_path, **given)
    with pytest.raises(CheckFailed, match="losses of this loop"):
        _loop(private, optimizer, _mixed)
    assert private.done == 5
    private.close()
    private, optimizer = run_and_optimizer(tmp_path, **given, resume=True)
    with pytest.raises(CheckFailed, match="losses of this loop"):
        _loop(private, optimizer, _averaged)
    assert private.done == 5


def test_a_scaled_loss(tmp_path: Path) -> None:
    private, optimizer = run_and_optimizer(tmp_path)
    with pytest.raises(CheckFailed, match="GradScaler"):
        _loop(private, optimizer, lambda *given: 1024 * _plain(*given))


@pytest.mark.parametrize("microbatch", [7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_with_the_losses_that_were_checked(tmp_path: Path, dtype: torch.dtype, microbatch: int) -> None:
    """Dropout draws the same masks again, and the loop's own random numbers are what they were."""
    drawn = []
    for name in ("loop", "steps"):
        network, data = toys.model(dtype, dropout=0.4), toys.data(dtype)
        private, optimizer = run_and_optimizer(tmp_path / name, network=network, dataset=data, microbatch=microbatch)
        if name == "loop":
            _loop(private, optimizer, _plain)
        else:
            for _ in private:
                pass
        drawn.append(toys.weights(network))
    assert torch.equal(*drawn)


def test_a_loop_that_takes_things_out_of_its_batch(tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return _plain(network, batch["rows"], batch["labels"])

    private, optimizer = run_and_optimizer(tmp_path, dataset=toys.Dicts(), loss=loss)
    for batch in private.loader:
        labels = batch.pop("labels")
        private.backward(_plain(private.model, batch.pop("rows"), labels))
        optimizer.step()
    assert private.done == 12


def test_a_loop_that_writes_into_its_batch(tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _plain(network, batch[0] - 0.5, batch[1])

    private, optimizer = run_and_optimizer(tmp_path, loss=loss)
    _loop(private, optimizer, lambda network, rows, targets: _plain(network, rows.sub_(0.5), targets))
    assert private.done == 12


@pytest.mark.parametrize("losses", [_plain, _averaged])
def test_a_compiled_loop_with_dropout(tmp_path: Path, losses: Losses) -> None:
    """Guarded once more, the same code runs, and draws the same masks."""
    network = toys.model(dropout=0.4)
    compiled = torch.compile(network, backend="aot_eager")
    private, optimizer = run_and_optimizer(
        tmp_path, network=network, loss=lambda _, batch: toys.loss(compiled, batch), steps=3
    )
    if losses is _averaged:
        with pytest.raises(CheckFailed, match="losses of this loop are not those of loss="):
            _loop(private, optimizer, lambda _, *given: losses(compiled, *given))
        return
    _loop(private, optimizer, lambda _, *given: losses(compiled, *given))
    assert private.done == 3


def test_a_loop_that_draws_before_its_losses(tmp_path: Path) -> None:
    private, optimizer = run_and_optimizer(tmp_path, network=toys.model(dropout=0.4))

    def losses(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            network(rows)
        return _plain(network, rows, targets)

    with pytest.raises(CheckFailed, match=r"another forward with dropout.* do that after private.backward"):
        _loop(private, optimizer, losses)


def test_what_was_refused_and_mended_goes_on_where_it_was(tmp_path: Path) -> None:
    """All updates since the last checkpoint were lost, of which there is one in 50."""

    def later(network: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
        return (_plain if private.done < 6 else _averaged)(network, rows, targets)

    private, optimizer = run_and_optimizer(tmp_path)
    with pytest.raises(CheckFailed, match=r"^update 7: .*with resume=True. Updates 4 to 6 were not asked"):
        _loop(private, optimizer, later)
    charged, before = private.run.ledger.steps_reserved, toys.weights(private.model)
    private.close()
    private, optimizer = run_and_optimizer(tmp_path, resume=True)
    assert private.done == 7
    assert torch.equal(toys.weights(private.model), before)
    _loop(private, optimizer, _plain)
    assert private.run.ledger.steps_reserved == charged


class _Forces(nn.Module):
    """Asks autograd for the gradient of its input within the forward, as models of molecules do."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = toys.model().requires_grad_(False), nn.Linear(6, 2)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows.detach().requires_grad_()
        (forces,) = torch.autograd.grad(self.frozen(rows).sum(), rows)
        return self.head(forces + rows.detach())


@pytest.mark.parametrize("loop", ["steps", "microbatches"])
def test_a_forward_that_asks_for_gradients(tmp_path: Path, loop: str) -> None:
    network = _Forces()
    optimizer = torch.optim.SGD(network.head.parameters(), lr=0.5)
    private = short_run(tmp_path, model=network, optimizer=optimizer)
    if loop == "microbatches":
        _loop(private, optimizer, _plain)
    else:
        for _ in private:
            pass
    assert private.done == 12
