"""An optimizer's response to noise, against what is known of it."""

from __future__ import annotations

import pytest
import torch

from discreet.errors import ConfigError
from discreet.train.response import is_scale_free, response
from train import toys


def _of(kind: type[torch.optim.Optimizer], **options: object) -> torch.optim.Optimizer:
    return kind(toys.model().parameters(), **options)


# 200 updates of 1,024 weights: the estimate has a standard error of 2 %; the ends of the series cost momentum some.
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (_of(torch.optim.SGD, lr=3.0), 0.01),
        (_of(torch.optim.SGD, lr=3.0, momentum=0.9), 0.1),
        (_of(torch.optim.SGD, lr=3.0, momentum=0.9, nesterov=True), 0.1),
        (_of(torch.optim.SGD, lr=3.0, momentum=0.5, dampening=0.5), 0.01),
        (_of(torch.optim.Adam, lr=3.0), 1.0),
        (_of(torch.optim.AdamW, lr=3.0), 1.0),
        (_of(torch.optim.NAdam, lr=3.0), 1.0),
    ],
)
def test_noise_moves_an_optimizer_as_far_as_theory_says(optimizer, expected):
    assert response(optimizer, noise_std=0.01) == pytest.approx(expected, rel=0.06)


def test_adam_is_scale_free_and_descent_is_not():
    assert is_scale_free(_of(torch.optim.Adam), noise_std=0.01)
    assert not is_scale_free(_of(torch.optim.SGD, lr=1.0, momentum=0.9), noise_std=0.01)


def test_the_rehearsal_leaves_the_optimizer_alone():
    optimizer = _of(torch.optim.Adam, lr=0.5)
    response(optimizer, noise_std=0.1)
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(parameter.grad is None for parameter in optimizer.param_groups[0]["params"])


def test_named_parameters_and_ways_of_computing_are_left_out():
    named = torch.optim.Adam(toys.model().named_parameters(), foreach=True)
    assert response(named, noise_std=0.01) == response(_of(torch.optim.Adam), noise_std=0.01)


class _Unmakeable(torch.optim.SGD):
    def __init__(self, parameters: object, secret: int) -> None:
        super().__init__(parameters, lr=1.0)
        self.secret = secret


def test_an_optimizer_that_cannot_be_made_again_is_refused_by_name():
    with pytest.raises(ConfigError, match="_Unmakeable"):
        response(_Unmakeable(toys.model().parameters(), 3), noise_std=0.1)
