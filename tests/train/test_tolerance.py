"""The search for how much noise the weights bear: it finds it from any start, and does not move on noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from discreet.core.probe import OCTAVES
from discreet.train.tolerance import (
    CAP,
    MOST,
    PER_UPDATE,
    PRIOR,
    USUAL_UPDATES,
    Asked,
    Question,
    ToleranceSearch,
)


def _shares(level: float) -> list[float]:
    """All examples in the octave of this loss."""
    place = math.floor(math.log2(level))
    return [1.0 if octave == place else 0.0 for octave in OCTAVES]


def _searched(
    curve: Callable[[float], float], *, noise: float, prior: float = PRIOR, updates: int = 300, seed: int = 0
) -> ToleranceSearch:
    """A search in a world where a displacement d raises the loss to ``1 + curve(d)`` of its level, 1.5."""
    rng = random.Random(seed)
    search = ToleranceSearch(noise=noise, updates=updates, prior=prior)
    while (question := search.question()) is not None:
        if question.asked is Asked.LEVEL:
            search.observe_level([share + rng.gauss(0, noise) for share in _shares(1.5)])
        else:
            rise = min(curve(question.displacement), CAP) * 1.5
            search.observe_rise(question, rise + rng.gauss(0, noise * question.bound))
    return search


def _power(tolerance: float, *, steepness: float) -> Callable[[float], float]:
    return lambda displacement: min((displacement / tolerance) ** steepness, 1e6)


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.035])
@pytest.mark.parametrize("prior", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("steepness", [2.0, 3.0])
def test_the_tolerance_is_found_whatever_the_prior(noise, prior, steepness):
    """0.035 is digits at epsilon 1. Within a factor of 1.6 in ten seeds, over four orders of magnitude of the prior."""
    for seed in range(10):
        search = _searched(_power(0.3, steepness=steepness), noise=noise, prior=prior, seed=seed)
        verdict = search.verdict()
        assert verdict.accepted
        assert verdict.tolerance is not None
        assert abs(math.log(verdict.tolerance / 0.3)) < math.log(1.6)
        assert search.asked <= MOST


def test_the_rate_follows_from_the_tolerance_and_the_number_of_updates():
    for updates in (300, 1200):
        verdict = _searched(_power(0.3, steepness=2.5), noise=0.0, updates=updates).verdict()
        assert verdict.tolerance is not None
        assert verdict.movement == pytest.approx(
            verdict.tolerance * PER_UPDATE * math.sqrt(USUAL_UPDATES / updates), rel=1e-12
        )


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.06])
def test_on_noise_alone_the_rate_holds(noise):
    """E6: a loss that no displacement moves, 200 searches: the rate stays within a factor of two in all of them."""
    factors = [_searched(lambda _: 0.0, noise=noise, seed=seed).verdict().movement / PRIOR for seed in range(200)]
    assert all(0.5 <= factor <= 2 for factor in factors)


def test_a_loss_that_only_falls_holds_the_rate():
    verdict = _searched(lambda displacement: -min(0.9, displacement), noise=0.01).verdict()
    assert not verdict.accepted
    assert verdict.movement == PRIOR
    assert "no displacement raised the loss" in verdict.reason


def test_a_loss_that_is_lost_everywhere_shrinks_the_rate():
    verdict = _searched(lambda _: CAP, noise=0.01).verdict()
    assert verdict.accepted
    assert verdict.movement < PRIOR / 100


@pytest.mark.parametrize(("noise", "updates", "words"), [(0.2, 300, "too large for the batch"), (0.01, 50, "too few")])
def test_where_probes_would_say_nothing_none_is_made(noise, updates, words):
    search = ToleranceSearch(noise=noise, updates=updates)
    assert search.question() is None
    assert words in search.verdict().reason
    assert search.verdict().movement == PRIOR


def test_no_level_no_search():
    search = ToleranceSearch(noise=0.01, updates=300)
    assert search.question() == Question(Asked.LEVEL)
    search.observe_level([0.0] * len(OCTAVES))
    assert search.question() is None
    assert "no level" in search.verdict().reason


def test_the_level_is_the_mean_of_the_octaves_that_stand_out():
    search = ToleranceSearch(noise=0.01, updates=300)
    shares = [0.0] * len(OCTAVES)
    shares[OCTAVES.index(0)], shares[OCTAVES.index(2)], shares[0] = 0.5, 0.5, 0.02
    search.observe_level(shares)
    assert search.level == pytest.approx(0.5 * 1.5 + 0.5 * 6.0)


def test_the_bound_of_a_rise_does_not_collapse():
    """E5, F7: it is set once from released counts, and never from clipped losses: for Exp(1) losses in [1, 16]."""
    rng = random.Random(2)
    counts = [0.0] * len(OCTAVES)
    for _ in range(10_000):
        counts[OCTAVES.index(max(OCTAVES[0], math.floor(math.log2(rng.expovariate(1)))))] += 1e-4
    search = ToleranceSearch(noise=0.001, updates=300)
    search.observe_level(counts)
    assert search.level == pytest.approx(1.0, rel=0.15)
    bounds = set()
    while (question := search.question()) is not None:
        bounds.add(question.bound)
        search.observe_rise(question, 0.0)
    assert len(bounds) == 1
    assert bounds.pop() == pytest.approx(CAP, rel=0.15)


def test_the_noise_of_an_answer_is_known():
    search = ToleranceSearch(noise=0.01, updates=300, level=2.0, asked=1)
    answer = search.observe_rise(Question(Asked.RISE, displacement=0.1, bound=16.0), 3.0)
    assert (answer.rise, answer.noise) == (1.5, pytest.approx(0.08))
