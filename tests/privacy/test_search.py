"""The root search: few evaluations, never above the target, and honest when there is no root."""

from __future__ import annotations

import math

import pytest

from discreet.privacy.search import WINDOW, largest_within, solve_decreasing


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


def test_the_smallest_x_is_the_answer_when_it_is_enough():
    calls = []

    def function(x):
        calls.append(x)
        return 1 / x

    root = solve_decreasing(function, target=300.0, guess=lambda _: 1.0, guess_value=lambda x: 1 / x, smallest=0.01)
    assert root is not None
    assert root.x == 0.01
    assert min(calls) == 0.01
    assert solve_decreasing(function, target=50.0, guess=lambda _: 1e-9, guess_value=function, smallest=0.01).x > 0.01


def _largest(function, target, *, guess, limit, window=1.0):
    found = largest_within(function, target=target, guess=guess, limit=limit, window=window)
    answer = max((n for n in range(1, limit + 1) if function(n) <= target), default=None)
    return found, answer


@pytest.mark.parametrize("guess", [-3, 1, 40, 999, 10**9])
@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 17.2, 31.6, 900.0])
@pytest.mark.parametrize(
    "function",
    [lambda n: float(n), lambda n: math.sqrt(n), lambda n: n // 7 + 0.3, lambda n: math.inf if n > 6 else 0.1 * n],
)
def test_the_largest_whole_number_is_found(function, target, guess):
    found, answer = _largest(function, target, guess=guess, limit=1_000)
    if answer is None:
        assert found is None
    else:
        assert found.n == answer
        assert found.value == function(answer)
        assert found.at_limit == (answer == 1_000)
        assert found.evaluations <= 40


def test_a_window_saves_evaluations_and_keeps_the_target():
    exact = largest_within(lambda n: math.sqrt(n), target=700.0, guess=3, limit=10**7, window=1.0)
    near = largest_within(lambda n: math.sqrt(n), target=700.0, guess=3, limit=10**7)
    assert exact.n == 490_000
    assert WINDOW * 700 <= near.value <= 700
    assert near.evaluations <= 6


def test_a_floor_above_the_target_ends_at_the_largest_x():
    calls = []

    def function(x):
        calls.append(x)
        return 2.0 + 1 / x

    root = solve_decreasing(function, target=1.0, guess=lambda _: 1.0, guess_value=lambda x: 1 / x, largest=1e12)
    assert root is None
    assert max(calls) == 1e12
    assert len(calls) <= 20
