from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from discreet.errors import ConfigError
from discreet.train.auto_lr import AutoLR, GradientNoise, LearningRate, LinearDecay, RateControl, decay
from discreet.train.tolerance import PRIOR, Question
from train import toys

TOO_NOISY = GradientNoise(multiplier=100.0, batch_size=10, sensitivity=1.0)
"""Nothing is probed: the rate is the prior's."""
NOISE = GradientNoise(multiplier=1.0, batch_size=200, sensitivity=1.0)


def _adam(lr: float = 0.3) -> torch.optim.Adam:
    return torch.optim.Adam(toys.model().parameters(), lr=lr)


def _sgd(momentum: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(toys.model().parameters(), lr=7.0, momentum=momentum)


def _control(
    optimizer: torch.optim.Optimizer, rate: LearningRate = "auto", *, noise: GradientNoise = TOO_NOISY, steps: int = 10
) -> RateControl:
    return RateControl(optimizer, rate, steps=steps, noise=noise)


def test_linear_decay_reaches_zero_only_after_the_end() -> None:
    decay = LinearDecay(peak=0.4, steps=4)
    assert [decay.at(step) for step in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_auto_is_the_same_whatever_the_optimizer_was_made_with() -> None:
    rates = set()
    for lr in (1e-4, 1.0, 0.0):
        optimizer = _adam(lr)
        rates.add(_control(optimizer).before_update(0))
        assert optimizer.param_groups[0]["lr"] in rates
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(PRIOR, rel=0.06)


def test_a_rate_is_a_movement_over_the_response_to_noise() -> None:
    """Descent under noise of 10 a weight, and with momentum: the same movement, other rates."""
    plain, heavy = _control(_sgd()).before_update(0), _control(_sgd(0.9)).before_update(0)
    assert plain == pytest.approx(PRIOR / TOO_NOISY.std, rel=0.06)
    assert plain / heavy == pytest.approx(10, rel=0.06)


def test_the_knob_multiplies() -> None:
    once, twice = (_control(_adam(), AutoLR(lr_scale=scale)).before_update(0) for scale in (1.0, 2.0))
    assert twice == 2 * once


def test_groups_keep_their_ratios() -> None:
    first, second = toys.model().parameters(), toys.model().parameters()
    optimizer = torch.optim.Adam([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.3}])
    control = _control(optimizer)
    for step in (0, 5):
        control.before_update(step)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])
        control.after_update()


def test_the_rate_falls_to_zero_over_the_whole_run() -> None:
    control = _control(_adam())
    rates = [control.before_update(step) for step in range(10)]
    assert [rate / rates[0] for rate in rates] == pytest.approx([math.sqrt(1 - step / 10) for step in range(10)])


def test_the_decay_has_less_noise_for_what_it_moves_than_a_line() -> None:
    """Root of the sum of squares over the sum, times the root of their number: constant 1, this 1.06, a line 1.15."""

    def noise(rates: list[float]) -> float:
        return math.sqrt(len(rates) * sum(rate**2 for rate in rates)) / sum(rates)

    steps = 10_000
    assert noise([decay(step, steps) for step in range(steps)]) == pytest.approx(math.sqrt(9 / 8), rel=1e-3)
    assert noise([1 - step / steps for step in range(steps)]) == pytest.approx(math.sqrt(4 / 3), rel=1e-3)


def test_a_torch_scheduler_multiplies_the_rate() -> None:
    """Also one that multiplies what it finds in the group: it finds its own rates there."""
    optimizer = _adam(5.0)
    control = _control(optimizer, AutoLR(scheduler=StepLR(optimizer, step_size=2, gamma=0.1)))
    rates = []
    for step in range(5):
        rates.append(control.before_update(step))
        optimizer.step()
        control.after_update()
    assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert rates[0] == pytest.approx(PRIOR, rel=0.06)


def test_a_scheduler_with_warm_up_starts_from_its_own_factor() -> None:
    optimizer = _adam(5.0)
    control = _control(optimizer, AutoLR(scheduler=LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))))
    assert control.before_update(0) == pytest.approx(PRIOR / 4, rel=0.06)


def test_a_second_writer_of_the_rate_is_refused() -> None:
    optimizer = _adam()
    control = _control(optimizer)
    control.before_update(0)
    control.refuse_others()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ConfigError, match="also writes lr"):
        control.refuse_others()


def test_a_scheduler_made_beside_auto_is_refused_at_once() -> None:
    optimizer = _adam()
    StepLR(optimizer, step_size=2)
    with pytest.raises(ConfigError, match="a scheduler was made for it"):
        _control(optimizer)


def test_without_noise_only_scale_free_optimizers_have_a_rate() -> None:
    for noise in (GradientNoise(0.0, 10, 1.0), GradientNoise(0.0, 10, math.inf)):
        assert _control(_adam(), noise=noise).before_update(0) == pytest.approx(PRIOR, rel=0.06)
        with pytest.raises(ConfigError, match="SGD and no noise"):
            _control(_sgd(), noise=noise)


def test_noise_of_several_sizes_needs_an_optimizer_to_which_sizes_are_nothing() -> None:
    """Descent moved the temperature of a model by its own, larger noise: seven runs of twelve ended at chance."""
    uneven = GradientNoise(1.0, 200, 1.0, even=False)
    assert _control(_adam(), noise=uneven).before_update(0) == pytest.approx(
        _control(_adam(), noise=NOISE).before_update(0), rel=0.01
    )
    with pytest.raises(ConfigError, match="SGD and noise of several sizes"):
        _control(_sgd(), noise=uneven)
    assert RateControl(_sgd(), 0.1, steps=10, noise=uneven).before_update(0) == 0.1


def test_auto_outside_a_private_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="outside a private run"):
        RateControl(_adam(), "auto", steps=10)


def test_none_leaves_the_rate_alone() -> None:
    optimizer = _adam(0.3)
    control = RateControl(optimizer, None, steps=10)
    assert [control.before_update(step) for step in (0, 5)] == [0.3, 0.3]
    assert (control.question(0), control.verdict, control.state()) == (None, None, None)


def test_a_scheduler_rules_and_is_stepped_once_per_update() -> None:
    optimizer = _adam(1.0)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.1)
    control = RateControl(optimizer, scheduler, steps=10)
    rates = []
    for step in range(5):
        rates.append(control.before_update(step))
        optimizer.step()
        control.after_update()
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_what_rules_is_told_apart() -> None:
    rules: list[LearningRate] = [None, "auto", AutoLR(lr_scale=2.0), 0.1, 0.2]
    described = {_control(_adam(), rule).describe() for rule in rules}
    optimizer = _adam()
    scheduler = StepLR(optimizer, step_size=2)
    described |= {_control(optimizer, rule).describe() for rule in (scheduler, AutoLR(scheduler=scheduler))}
    assert len(described) == 7


def test_the_state_of_a_search_comes_back() -> None:
    control = _control(_adam(), noise=NOISE, steps=400)
    _answer(control, [1.0, 0.2])
    again = _control(_adam(), noise=NOISE, steps=400)
    again.restore(control.state())
    assert again.question(0) == control.question(0)
    assert again.verdict == control.verdict


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="another learning rate"):
        _control(_adam()).restore(None)


def test_the_state_of_an_older_search_is_refused_in_words() -> None:
    """The search that was asked once kept one level and its answers, and no second search."""
    control = _control(_adam(), noise=NOISE, steps=400)
    _answer(control, [1.0, 0.2])
    state = control.state()
    assert state is not None
    older = {**state["first"], "scheduled": state["scheduled"]}
    nested = {**state, "first": {"level": 1.0, "answers": []}}
    wrong = {**state, "first": {**state["first"], "answers": [[0.1, 0.2]]}}
    for record in (older, nested, wrong):
        with pytest.raises(ConfigError, match=r"fields .*scheduled.* does not read them; resume with the version"):
            _control(_adam(), noise=NOISE, steps=400).restore(record)


def _answer(control: RateControl, rises: list[float]) -> None:
    question = control.question(0)
    assert isinstance(question, Question)
    assert control.search is not None
    control.observe(question, [1.0 if place == 20 else 0.0 for place in range(40)])
    for rise in rises:
        question = control.question(0)
        assert isinstance(question, Question)
        said = control.observe(question, [rise])
        assert said["probe_displacement"] == question.displacement


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        RateControl(_adam(), rate, steps=3)
    with pytest.raises(ConfigError, match="lr_scale"):
        AutoLR(lr_scale=rate)


def test_scheduler_of_another_optimizer() -> None:
    scheduler = StepLR(_adam(), step_size=2)
    for rule in (scheduler, AutoLR(scheduler=scheduler)):
        with pytest.raises(ConfigError, match="another optimizer"):
            _control(_adam(), rule)
