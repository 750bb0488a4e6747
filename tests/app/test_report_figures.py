"""Figures of the page: rounding to the safe side, intervals, what an epsilon means."""

from __future__ import annotations

import math

import pytest

from discreet.app.report.evidence import _encoding
from discreet.app.report.meaning import certainty, found_members
from discreet.app.report.text import duration, percent, plain, scientific, upward, wilson


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.9981, "2.999"), (3.0, "3.000"), (0.0, "0.000"), (1e-9, "0.001"), (math.inf, "∞"), (None, "unknown")],
)
def test_epsilon_is_rounded_up(value, shown):
    assert upward(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0801e-5, "1.09 × 10⁻⁵"), (1e-7, "1.00 × 10⁻⁷"), (9.999e-6, "1.00 × 10⁻⁵"), (0.0, "0"), (None, "unknown")],
)
def test_delta_is_rounded_up(value, shown):
    assert scientific(value) == shown


def test_plain_figures():
    assert plain(32561.0) == "32\u202f561"
    assert plain(0.5) == "0.5"
    assert plain(None) == "unknown"
    assert percent(0.8493) == "84.9\u202f%"
    assert [duration(value).replace("\u00a0", " ") for value in (4.21, 200, 7500, None)] == [
        *("4.2 s", "3 min 20 s", "2 h 05 min", "unknown")
    ]


def test_wilson_interval_against_the_published_example():
    low, high = wilson(0.0, count=10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson(0.81, count=263)
    assert (low, high) == pytest.approx((0.7583, 0.8529), abs=2e-3)


def test_certainty_follows_the_odds():
    assert certainty(0.0, delta=0.0, prior=0.3) == pytest.approx(0.3)
    assert certainty(math.log(3), delta=0.0, prior=0.5) == pytest.approx(0.75)
    assert certainty(math.inf, delta=0.0, prior=0.5) == 1.0
    assert certainty(5000.0, delta=0.1, prior=0.5) == 1.0


def test_found_members_is_the_optimal_test_of_randomised_response():
    # Randomised response at epsilon = ln 3 keeps the truth with probability 3/4: at 25 % false alarms it finds 75 %.
    assert found_members(math.log(3), delta=0.0, false_alarms=0.25) == pytest.approx(0.75)
    assert found_members(0.0, delta=0.0, false_alarms=0.01) == pytest.approx(0.01)
    assert found_members(1e4, delta=0.0, false_alarms=0.01) == pytest.approx(1.0)
    assert found_members(math.inf, delta=0.0, false_alarms=0.01) == 1.0


@pytest.mark.parametrize(("values", "said"), [(["0"], "category, 1 name"), (["0", "1"], "category, 2 names")])
def test_one_name_is_no_names(values: list[str], said: str) -> None:
    assert _encoding({"encodings": [{"as": "category", "values": values}]}) == said
