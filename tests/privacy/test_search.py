"""The root search: few evaluations, never above the target, and honest when there is no root."""

from __future__ import annotations

import math

import pytest

from discreet.privacy.search import WINDOW, solve_decreasing


def _solve(function, target, *, guess, model):
    calls = []

    def counted(x):
        calls.append(x)
        return function(x)

    root = solve_decreasing(counted, target=target, guess=guess, guess_value=model)
    return root, calls


@pytest.mark.parametrize("power", [0.3, 1.0, 2.7])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("target", [1e-2, 1.0, 300.0])
def test_power_laws_are_solved_from_a_wrong_model(power, scale, target):
    root, calls = _solve(lambda x: scale * x**-power, target, guess=lambda value: 1 / value, model=lambda x: 1 / x)
    assert root is not None
    assert WINDOW * target <= root.value <= target
    assert root.value == scale * root.x**-power
    assert root.evaluations == len(calls) <= 25


def test_exact_model_needs_one_evaluation():
    root, calls = _solve(lambda x: 3 / x, 1.5, guess=lambda value: 3 / value, model=lambda x: 3 / x)
    assert root is not None
    assert len(calls) == 1


def test_jump_over_the_target_returns_the_side_that_is_not_above():
    root, _ = _solve(lambda x: 2.0 if x < 1 else 0.5, 1.0, guess=lambda _: 0.7, model=lambda x: 1 / x)
    assert root is not None
    assert root.value == 0.5
    assert 1 <= root.x < 1.001


def test_infinite_values_are_walked_away_from():
    root, _ = _solve(lambda x: math.inf if x < 5 else 10 / x, 1.0, guess=lambda _: 0.1, model=lambda x: math.inf)
    assert root is not None
    assert WINDOW <= root.value <= 1.0


def test_floor_above_the_target_is_none():
    root, calls = _solve(lambda x: 2.0 + 1 / x, 1.0, guess=lambda value: 1 / value, model=lambda x: 1 / x)
    assert root is None
    assert len(calls) <= 60
