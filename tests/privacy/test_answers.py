"""Steps and batch sizes that a budget allows: never above, the largest there is, and limits that are said."""

from __future__ import annotations

import dataclasses
import math

import pytest

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy import answers
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    SampledGaussian,
    Selection,
    TruncatedGaussian,
    epsilon,
)
from discreet.privacy.answers import Budget, largest_batch, most_steps
from discreet.privacy.proposal import most_countable_steps

STEP = SampledGaussian(4096 / 50_000, 3.0, 1)


def _with(step, **changes):
    return dataclasses.replace(step, **changes)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("target", [2.0, 8.0])
def test_most_steps_is_never_above_and_close(relation, accountant, target):
    budget = Budget(target, 1e-5, relation=relation, accountant=accountant)
    found = most_steps(STEP, budget)
    assert found.value == budget.spent(_with(STEP, count=found.n)) <= target
    assert found.value >= 0.999 * target or budget.spent(_with(STEP, count=found.n + 1)) > target
    assert not found.at_limit
    assert found.evaluations <= 12


@pytest.mark.parametrize("accountant", list(Accountant))
def test_few_steps_are_the_very_largest_number(accountant):
    budget = Budget(3.0, 1e-5, accountant=accountant)
    step = SampledGaussian(0.3, 2.0, 1)
    found = most_steps(step, budget)
    assert 1 <= found.n < 40
    assert budget.spent(_with(step, count=found.n)) <= 3.0 < budget.spent(_with(step, count=found.n + 1))


@pytest.mark.parametrize("relation", list(Relation))
def test_largest_batch_is_never_above_and_close(relation):
    budget = Budget(3.0, 1e-5, relation=relation)
    step = SampledGaussian(1.0, 2.0, 400)
    found = largest_batch(step, budget, examples=30_000)
    assert found.value == budget.spent(_with(step, sample_rate=found.n / 30_000)) <= 3.0
    assert found.value >= 0.999 * 3.0
    assert found.evaluations <= 6


def test_answers_agree_with_each_other():
    steps = most_steps(STEP, Budget(6.0, 1e-5)).n
    target = epsilon([_with(STEP, count=steps)], delta=1e-5)
    batch = largest_batch(_with(STEP, count=steps), Budget(target * 1.0001, 1e-5), examples=50_000)
    assert batch.n == pytest.approx(4096, rel=2e-3)


def test_truncated_batches_and_earlier_queries_leave_less():
    alone = most_steps(STEP, Budget(6.0, 1e-5)).n
    after = most_steps(STEP, Budget(6.0, 1e-5, before=(Gaussian(4.0), Selection(1e-6)))).n
    cut = most_steps(TruncatedGaussian(50_000, 4096 / 50_000, 4160, 3.0, 1), Budget(6.0, 1e-5)).n
    assert 1 < after < alone
    assert 1 < cut < alone


def test_more_of_everything_allows_more_steps():
    base = most_steps(SampledGaussian(0.02, 1.5, 1), Budget(3.0, 1e-6)).n
    assert most_steps(SampledGaussian(0.02, 1.5, 1), Budget(3.3, 1e-6)).n > base
    assert most_steps(SampledGaussian(0.02, 1.5, 1), Budget(3.0, 3e-6)).n > base
    assert most_steps(SampledGaussian(0.02, 1.6, 1), Budget(3.0, 1e-6)).n > base
    assert most_steps(SampledGaussian(0.018, 1.5, 1), Budget(3.0, 1e-6)).n > base


def test_limits_are_said(monkeypatch):
    everything = largest_batch(SampledGaussian(0.1, 500.0, 3), Budget(3.0, 1e-5), examples=1_000)
    assert everything.at_limit
    assert everything.n == 1_000
    monkeypatch.setattr(answers, "MOST_STEPS", 2_000)
    far = most_steps(SampledGaussian(0.01, 500.0, 1), Budget(3.0, 1e-5))
    assert far.at_limit
    assert far.n == 2_000
    assert 0 == most_countable_steps(1e-15) < most_countable_steps(1e-9) < most_countable_steps(1e-6)


def test_one_is_too_many():
    with pytest.raises(BudgetExceeded, match=r"one step already spends.*raise epsilon or the noise"):
        most_steps(SampledGaussian(0.9, 0.3, 1), Budget(0.5, 1e-5))
    with pytest.raises(BudgetExceeded, match=r"one example already spends"):
        largest_batch(SampledGaussian(0.1, 0.02, 1_000), Budget(0.1, 1e-5), examples=100)
    with pytest.raises(BudgetExceeded, match=r"queries before already spend"):
        most_steps(STEP, Budget(1.0, 1e-5, before=(Gaussian(1.0),)))
    with pytest.raises(BudgetExceeded, match=r"noise_multiplier=0.0: counts as no noise"):
        most_steps(SampledGaussian(0.1, 0.0, 1), Budget(1.0, 1e-5))


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
def test_targets_outside_of_the_range(target):
    with pytest.raises(ConfigError, match=r"epsilon=.*must be from 1e-06 to 1e\+06"):
        Budget(target, 1e-5)


def test_other_bad_input():
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta="):
            Budget(1.0, delta)
    for examples in (0, True, 2.0):
        with pytest.raises(ConfigError, match="examples="):
            largest_batch(STEP, Budget(1.0, 1e-5), examples=examples)
