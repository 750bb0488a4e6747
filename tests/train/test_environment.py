from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.train.auto_lr import RateControl
from discreet.train.environment import describe_environment
from discreet.train.examples import Examples
from train import toys


def _describe(**changes: object) -> dict[str, str]:
    model = changes.pop("model", None) or toys.model()
    optimizer = changes.pop("optimizer", torch.optim.Adam)(model.parameters())
    given = {
        "loss": toys.loss,
        "rates": RateControl(optimizer, changes.pop("rate", 0.1), steps=10),
        "clipping": Clipping.automatic(),
        "examples": Examples(toys.data()),
    } | changes
    return describe_environment(model=model, optimizer=optimizer, **given)


def _other_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 2 * toys.loss(model, batch)


def test_same_set_up_same_record() -> None:
    assert _describe() == _describe()


def test_each_thing_that_changes_a_sum_changes_one_line() -> None:
    base = _describe()
    wide = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    cases = {
        "data": _describe(examples=Examples(toys.data(examples=119))),
        "model": _describe(model=wide),
        "loss": _describe(loss=_other_loss),
        "optimizer": _describe(optimizer=torch.optim.SGD),
        "learning rate": _describe(rate=0.2),
        "clipping": _describe(clipping=Clipping.abadi(1.0)),
    }
    for name, changed in cases.items():
        assert [key for key in base if base[key] != changed[key]] == [name]


def test_tf32_is_another_sum_and_is_named() -> None:
    base, kept = _describe(), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        changed = _describe()
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept
    assert [key for key in base if base[key] != changed[key]] == ["precision"]
    assert _describe() == base


def test_float32_that_is_asked_for_is_what_it_was() -> None:
    base, kept = _describe(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        assert _describe() == base
    finally:
        torch.set_float32_matmul_precision(kept)


def _scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda model, batch: factor * toys.loss(model, batch)


def _with_default(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], factor: float = 1.0) -> torch.Tensor:
    return factor * toys.loss(model, batch)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_scaled(1.0), _scaled(2.0)),
        (functools.partial(_with_default, factor=1.0), functools.partial(_with_default, factor=2.0)),
        (functools.partial(_scaled(1.0)), functools.partial(_scaled(2.0))),
        (functools.partial(toys.loss), functools.partial(_with_default)),
    ],
)
def test_a_number_that_a_loss_is_bound_to_is_part_of_it(one: LossFunction, other: LossFunction) -> None:
    assert _describe(loss=one) == _describe(loss=one)
    assert _describe(loss=one)["loss"] != _describe(loss=other)["loss"]


def test_what_a_loss_is_bound_to_is_told_by_its_type_alone() -> None:
    """An address would be another one in every process, and cost a key."""
    weights = [torch.ones(2), torch.zeros(3)]
    losses = [lambda model, batch, held=held: toys.loss(model, batch) + 0 * held.sum() for held in weights]
    assert _describe(loss=losses[0]) == _describe(loss=losses[1])


class _Bound(nn.Module):
    """Says which function it calls, as many layers do: where that lies changes from process to process."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.function = toys.model(), function

    def extra_repr(self) -> str:
        return f"function={self.function}"

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(rows))


def test_where_a_function_lies_is_no_part_of_a_model() -> None:
    """A run that was resumed took another key, and lost the updates that were charged ahead."""

    def made(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def scaled(value: torch.Tensor) -> torch.Tensor:
            return value * number

        return scaled

    one, other = made(2.0), made(2.0)
    assert repr(one) != repr(other)
    assert _describe(model=_Bound(one)) == _describe(model=_Bound(other))


def test_threads_are_part_of_it() -> None:
    base = _describe()
    torch.set_num_threads(2)
    try:
        assert _describe()["threads"] != base["threads"]
    finally:
        torch.set_num_threads(1)
