"""How often a search runs, drawn and planned: the distribution of its runs, and the noise that they need."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from discreet.core.rng import subkey
from discreet.errors import ConfigError
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.tuning import plan_search
from discreet.train.tune import _uniform


def _p_value(draw) -> float:
    """Chi-square test of 3,000 numbers of runs against the logarithmic distribution of mean 4."""
    repetitions = Repetitions(Stopping.LOGARITHMIC, 4)
    counts = Counter(min(draw(repetitions, key), 9) for key in range(3000))
    expected = repetitions.pmf(np.arange(1, 9))
    expected = np.append(expected, 1 - expected.sum()) * 3000
    return float(stats.chisquare([counts[k] for k in range(1, 10)], expected).pvalue)


def _key(number: int) -> bytes:
    return number.to_bytes(4, "little").ljust(32, b"\x01")


def test_the_number_of_runs_follows_its_distribution():
    # The keys are fixed, so this cannot flicker; on random ones it would fail once in 1,000 times.
    assert _p_value(lambda reps, n: reps.runs(_uniform(subkey(_key(n), "search|number of runs")))) > 1e-3


def test_a_number_of_runs_that_is_cut_short_is_told_from_it():
    assert _p_value(lambda reps, n: min(6, reps.runs(_uniform(subkey(_key(n), "search|number of runs"))))) < 1e-6


def test_choices_are_drawn_evenly():
    drawn = Counter(int(_uniform(subkey(_key(n), "search|choice|0")) * 3) for n in range(3000))
    assert stats.chisquare([drawn[k] for k in range(3)]).pvalue > 1e-3


@pytest.mark.parametrize("runs", [1, 3, 10, 100])
@pytest.mark.parametrize("private_score", [True, False])
def test_the_noise_is_solved_for_the_whole_search(runs, private_score):
    plan = plan_search(examples=20_000, epsilon=2.0, runs=runs, private_score=private_score)
    assert 0.999 * 2.0 <= plan.spent() <= 2.0
    plan.check()


def test_more_expected_runs_need_more_noise():
    noises = [
        plan_search(examples=20_000, epsilon=2.0, runs=runs, batch_size=1000, steps=400).noise_multiplier
        for runs in (2, 5, 10, 30, 100)
    ]
    assert noises == sorted(noises)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": math.inf}, "finite"),
        ({"epsilon": 0.0}, "above 0"),
        ({"runs": 0.5}, "runs"),
        ({"runs": math.nan}, "runs"),
        ({"stopping": Stopping.POISSON}, "poisson"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        plan_search(**{"examples": 20_000, "epsilon": 2.0, **options})
