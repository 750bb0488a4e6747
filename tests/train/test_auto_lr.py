from __future__ import annotations

import pytest
import torch

from discreet.errors import ConfigError
from discreet.train.auto_lr import DEFAULT_ADAM_RATE, LinearDecay, RateControl
from train import toys


def _adam(lr: float = 0.3) -> torch.optim.Adam:
    return torch.optim.Adam(toys.model().parameters(), lr=lr)


def test_linear_decay_reaches_zero_only_after_the_end() -> None:
    decay = LinearDecay(peak=0.4, steps=4)
    assert [decay.at(step) for step in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_auto_is_the_default_rate_whatever_the_optimizer_was_made_with() -> None:
    for lr in (1e-4, 1.0):
        optimizer = _adam(lr)
        assert RateControl(optimizer, "auto", steps=10).before_update(0) == DEFAULT_ADAM_RATE
        assert optimizer.param_groups[0]["lr"] == DEFAULT_ADAM_RATE


def test_none_leaves_the_rate_alone() -> None:
    optimizer = _adam(0.3)
    control = RateControl(optimizer, None, steps=10)
    assert [control.before_update(step) for step in (0, 5)] == [0.3, 0.3]


def test_a_scheduler_rules_and_is_stepped_once_per_update() -> None:
    optimizer = _adam(1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    control = RateControl(optimizer, scheduler, steps=10)
    rates = []
    for step in range(5):
        rates.append(control.before_update(step))
        optimizer.step()
        control.after_update()
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_what_rules_is_told_apart() -> None:
    optimizer = _adam()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    described = {RateControl(optimizer, rate, steps=9).describe() for rate in (None, "auto", 0.1, 0.2, scheduler)}
    assert len(described) == 5


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        RateControl(_adam(), rate, steps=3)


def test_scheduler_of_another_optimizer() -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(_adam(), step_size=2)
    with pytest.raises(ConfigError, match="another optimizer"):
        RateControl(_adam(), scheduler, steps=3)
