"""Figures of the page: rounding to the safe side, intervals, what an epsilon means."""

from __future__ import annotations

import math

import pytest

from discreet.app.report.evidence import _encoding, _rule
from discreet.app.report.meaning import certainty, found_members
from discreet.app.report.text import duration, percent, plain, scientific, storage, upward, wilson
from discreet.train.tempered import tempered_clipping


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
    assert plain(None) == plain(math.nan) == "unknown"
    assert [storage(count) for count in (2**19, 3 * 2**29)] == ["0.5\u00a0MiB", "1.5\u00a0GiB"]
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


def test_the_groups_of_a_clipping_rule_are_figures_and_not_floats():
    """The page of every run of 20,000 rows or more said 49.99999999999999."""
    rule = tempered_clipping(60_000).describe()
    assert "49.99999999999999" in str(rule["style"])
    assert _rule(rule) == [
        "kind: abadi",
        "style: groups",
        "<bdi>temperature.log</bdi>: bound 30, noise × 50",
        "<bdi>temperature.floor</bdi>: bound 2, noise × 3.333",
        "all else: bound 6, noise × 1",
        "clip bound: 30.66",
    ]


@pytest.mark.parametrize(
    "style",
    [
        *("flat", "groups:a,b", "groups:a=1@2,b", "groups:a=1e@2,=1@1", "groups:a=--@1,=1@1", "layers:a=1@1,=1@1"),
        "groups:" + "a=1@1," * 300 + "=1@1",
        "groups:<b>=1@1@1,=1@1",
    ],
)
def test_a_style_of_another_form_stays_a_short_escaped_text(style):
    lines = _rule({"style": style, "clip_bound": 1.0})
    assert len(lines) == 2
    assert lines[0].startswith(f"style: {style[:4]}")
    assert "<b>" not in lines[0]
    assert len(lines[0]) < 200


@pytest.mark.parametrize("style", ["groups:<i>x=1@1,=1@1", "groups:a=1e999@1,=1@1", "groups:a=0@0,=0@1e-999"])
@pytest.mark.parametrize("bound", [1.0, math.inf, 1e300])
def test_odd_numbers_in_a_style_break_no_page(style, bound):
    lines = _rule({"style": style, "clip_bound": bound})
    assert len(lines) == 4
    assert "<i>" not in " ".join(lines)
