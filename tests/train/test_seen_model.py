"""What is trained is what the self-check saw: modes, hooks and forwards of all modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from discreet.errors import ConfigError
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from train import toys


class _CoupledInTraining(nn.Module):
    """Subtracts the mean of its batch, and only while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b((h - h.mean(0) if self.training else h).tanh())


def _private(where: Path, model: nn.Module) -> Private:
    return make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), toys.data(), loss=toys.loss, noise_multiplier=1.0,
        batch_size=20, steps=3, learning_rate=None, run_dir=where / "run",
    )  # fmt: skip


def test_a_mode_that_the_check_did_not_see_is_refused(tmp_path: Path) -> None:
    """Pretrained models come in evaluation mode, and loops begin with model.train()."""
    model = _CoupledInTraining().eval()
    private = _private(tmp_path, model)
    model.train()
    before = toys.weights(model)
    with pytest.raises(ConfigError, match="not in the mode"):
        next(iter(private))
    assert torch.equal(toys.weights(model), before)


def test_a_probe_in_another_mode_is_refused(tmp_path: Path) -> None:
    model = _CoupledInTraining().eval()
    private = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), toys.data(), loss=toys.loss, noise_multiplier=1.0,
        batch_size=20, steps=40, learning_rate="auto", run_dir=tmp_path / "run",
    )  # fmt: skip
    model.train()
    with pytest.raises(ConfigError, match="not in the mode"):
        next(iter(private))


def _coupled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output - output.mean(0)


def _patched(model: nn.Module) -> None:
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) - plain(x).mean(0)


LATER: dict[str, Callable[[nn.Module], object]] = {
    "a forward hook": lambda model: model[0].register_forward_hook(_coupled),
    "a hook before the forward": lambda model: model[0].register_forward_pre_hook(lambda _, x: (x[0] - x[0].mean(0),)),
    "a backward hook": lambda model: model[3].register_full_backward_hook(lambda _, grads, __: (grads[0].flip(0),)),
    "a hook before the backward": lambda model: model[3].register_full_backward_pre_hook(
        lambda _, grads: (grads[0].flip(0),)
    ),
    "a forward of its own": _patched,
    "another module": lambda model: model.__setitem__(1, nn.Softmax(0)),
}


@pytest.mark.parametrize("name", list(LATER))
def test_what_the_check_did_not_see_in_a_module_is_refused(tmp_path: Path, name: str) -> None:
    model = toys.model()
    private = _private(tmp_path, model)
    steps = iter(private)
    next(steps)
    LATER[name](model)
    before = toys.weights(model)
    with pytest.raises(ConfigError, match="self-check saw"):
        next(steps)
    assert torch.equal(toys.weights(model), before)


def test_an_evaluation_in_the_middle_of_a_loop_is_no_other_mode(tmp_path: Path) -> None:
    """The mode counts where the examples go through the model."""
    model = toys.model(dropout=0.2)
    private = _private(tmp_path, model)
    optimizer = private._updates.optimizer
    for batch in private.loader:
        model.train()
        private.backward(toys.loss(model, batch))
        optimizer.step()
        model.eval()
    assert private.done == 3


def test_an_evaluation_mode_that_is_left_on_is_refused(tmp_path: Path) -> None:
    model = toys.model(dropout=0.2)
    private = _private(tmp_path, model)
    optimizer = private._updates.optimizer
    batches = iter(private.loader)
    private.backward(toys.loss(model, next(batches)))
    optimizer.step()
    model.eval()
    losses = toys.loss(model, next(batches))
    with pytest.raises(ConfigError, match="the model and 4 more: not in the mode"):
        private.backward(losses)
    assert private.done == 1


def test_hooks_that_were_there_stay(tmp_path: Path) -> None:
    model, seen = toys.model(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert len(list(_private(tmp_path, model))) == 3
    assert seen


def test_a_hook_within_one_forward_is_of_the_forward(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toys.model()

        def forward(self, x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            handle = self.net[0].register_forward_hook(lambda _, __, output: kept.append(output))
            y = self.net(x)
            handle.remove()
            return y + kept[0][:, :2]

    assert len(list(_private(tmp_path, Inside()))) == 3
