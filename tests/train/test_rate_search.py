"""Two searches for the tolerance: when they ask, which of them rules, and what a checkpoint keeps."""

from __future__ import annotations

import math

import pytest

from discreet.core.probe import OCTAVES
from discreet.train.rate_search import AGAIN, SECOND_SHARE, RateSearch
from discreet.train.tolerance import (
    CAP,
    LEAST_LEARNED,
    PRIOR,
    SHARE,
    USUAL_UPDATES,
    Asked,
    Question,
    ToleranceSearch,
    per_update,
)

UPDATES = 300
DUE = UPDATES // AGAIN


def _shares(level: float) -> list[float]:
    return [1.0 if octave == math.floor(math.log2(level)) else 0.0 for octave in OCTAVES]


def _answer(search: RateSearch, done: int, *, level: float, tolerance: float) -> int:
    """Answer all that is asked when so many updates are made, without noise; returns how often it was."""
    asked = 0
    while (question := search.question(done)) is not None:
        asked += 1
        if question.asked is Asked.LEVEL:
            search.observe_level(_shares(level))
        else:
            unit = question.bound / CAP
            search.observe_rise(question, unit * min((question.displacement / tolerance) ** 2.5, CAP))
    return asked


def _search(*, updates: int = UPDATES, prior: float = PRIOR) -> RateSearch:
    return RateSearch(noise=0.001, updates=updates, prior=prior)


def test_it_asks_at_the_start_and_once_more():
    search = _search()
    assert _answer(search, 0, level=3.0, tolerance=0.3) >= 2
    assert all(search.question(done) is None for done in range(5, DUE))
    assert _answer(search, DUE, level=1.5, tolerance=0.1) >= 2
    assert all(search.question(done) is None for done in range(DUE, UPDATES))


@pytest.mark.parametrize(("first", "second", "rules"), [(0.3, 0.1, 0.1), (0.1, 0.3, 0.1)])
def test_the_smaller_tolerance_rules(first, second, rules):
    search = _search()
    _answer(search, 0, level=3.0, tolerance=first)
    _answer(search, DUE, level=1.5, tolerance=second)
    verdict = search.verdict()
    assert verdict.tolerance == pytest.approx(rules, rel=0.15)
    assert verdict.movement == pytest.approx(verdict.tolerance * per_update(UPDATES))
    assert f"by {search.asked} probes" in verdict.reason


def test_until_it_has_asked_again_the_rate_is_no_larger_than_usual():
    """A fresh network that saturates bears anything; one that is fine-tuned may bear less than is usual."""
    for updates in (300, 1200):
        search = _search(updates=updates)
        _answer(search, 0, level=3.0, tolerance=2.0)
        assert search.verdict().movement == pytest.approx(PRIOR * math.sqrt(USUAL_UPDATES / updates))
    search = _search()
    _answer(search, 0, level=3.0, tolerance=0.02)
    assert search.verdict().movement == pytest.approx(0.02 * per_update(UPDATES), rel=0.15)


@pytest.mark.parametrize("prior", [1e-4, 1.0])
def test_where_it_begins_does_not_matter(prior):
    search = _search(prior=prior)
    _answer(search, 0, level=3.0, tolerance=0.3)
    assert search.verdict().movement == pytest.approx(PRIOR, rel=0.1)
    _answer(search, DUE, level=1.5, tolerance=0.2)
    assert search.verdict().movement == pytest.approx(0.2 * per_update(UPDATES), rel=0.2)


@pytest.mark.parametrize("tolerance", [0.6, 0.05])
def test_with_few_updates_it_asks_once_and_is_no_larger_than_usual(tolerance):
    search = _search(updates=120)
    _answer(search, 0, level=3.0, tolerance=tolerance)
    assert search.question(60) is None
    usual = PRIOR * math.sqrt(USUAL_UPDATES / 120)
    assert search.verdict().movement == pytest.approx(min(usual, tolerance * per_update(120)), rel=0.15)


def test_nothing_is_asked_again_where_nothing_was_told():
    search = _search()
    search.question(0)
    search.observe_level([0.0] * len(OCTAVES))
    assert all(search.question(done) is None for done in range(UPDATES))
    assert search.verdict().movement == PRIOR


def test_a_second_search_that_is_told_nothing_leaves_the_cautious_rate():
    search = _search()
    _answer(search, 0, level=3.0, tolerance=2.0)
    assert search.question(DUE) is not None
    search.observe_level([0.0] * len(OCTAVES))
    assert search.question(DUE) is None
    assert search.verdict().movement == pytest.approx(PRIOR)
    assert "asked again: held" in search.verdict().reason


def test_the_second_search_begins_where_the_cautious_rate_is():
    """However far the first loss let the weights go: a network whose loss levels off bears anything at the start."""
    search = _search()
    while (question := search.question(0)) is not None:
        if question.asked is Asked.LEVEL:
            search.observe_level(_shares(3.0))
        else:
            search.observe_rise(question, question.bound / CAP * 0.7 * min(1.0, question.displacement / 1000))
    first = search.first.verdict()
    assert first.tolerance is not None
    assert first.tolerance > 100
    assert search.question(DUE) == Question(Asked.LEVEL)
    search.observe_level(_shares(3.0))
    question = search.question(DUE)
    assert question is not None
    assert question.displacement == pytest.approx(PRIOR / per_update(UPDATES), rel=0.3)
    _answer(search, DUE, level=3.0, tolerance=0.2)
    assert search.verdict().movement == pytest.approx(0.2 * per_update(UPDATES), rel=0.2)


@pytest.mark.parametrize(("tolerance", "most"), [(0.13, 150 // SECOND_SHARE), (1e-9, 150 // SHARE)])
def test_answers_that_leave_it_open_are_asked_further(tolerance, most):
    """Up to one update in 25, and not 50: here every displacement that is tried is beyond what the weights bear."""
    search = _search(updates=150)
    _answer(search, 0, level=3.0, tolerance=0.4)
    assert _answer(search, 18, level=1.5, tolerance=tolerance) == most


@pytest.mark.parametrize(("displacements", "lowered"), [((300.0, 100.0), False), ((0.01, 0.003), True)])
def test_answers_that_leave_it_open_may_lower_a_rate_and_not_raise_it(displacements, lowered):
    """All lost: at displacements that say nothing on those that are usual, and at some that are far below."""
    search = _search(updates=150)
    _answer(search, 0, level=3.0, tolerance=2.0)
    search.question(18)
    search.observe_level(_shares(1.5))
    for displacement in displacements:
        search.observe_rise(Question(Asked.RISE, displacement=displacement, bound=CAP * 1.5), CAP * 1.5)
    safe = PRIOR * math.sqrt(USUAL_UPDATES / 150)
    movement = search.verdict().movement
    assert safe * 1e-3 < movement < safe / 20 if lowered else movement == pytest.approx(safe)
    assert "octaves open" in search.verdict().reason


@pytest.mark.parametrize(
    ("before", "level", "unit"), [(None, 1.5, 1.5), (6.0, 1.5, 1.5), (2.0, 1.5, 0.5), (1.0, 1.5, LEAST_LEARNED * 1.5)]
)
def test_the_rise_that_is_asked_for_is_what_was_learned(before, level, unit):
    """No more than the level, which is what the first search asks for, and no less than a tenth of it."""
    search = ToleranceSearch(noise=0.01, updates=UPDATES, before=before, level=level, asked=1)
    assert search.unit == pytest.approx(unit)
    question = search.question()
    assert question is not None
    assert question.bound == pytest.approx(CAP * unit)
    answer = search.observe_rise(question, unit)
    assert (answer.rise, answer.noise) == (pytest.approx(1.0), pytest.approx(0.01 * CAP))


@pytest.mark.parametrize("begun", [False, True])
def test_a_state_comes_back(begun):
    search = _search()
    _answer(search, 0, level=3.0, tolerance=0.3)
    if begun:
        assert search.question(DUE) is not None
        search.observe_level(_shares(1.5))
    again = _search()
    again.restore(search.state())
    assert again.state() == search.state()
    assert again.verdict() == search.verdict()
    assert again.question(DUE) == search.question(DUE)
    assert (again.level, again.asked) == (search.level, search.asked)
