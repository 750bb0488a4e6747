"""Queries as data: limits, JSON round trips, and strict reading."""

from __future__ import annotations

import json
import math

import pytest

from discreet.errors import ConfigError
from discreet.privacy.queries import Gaussian, SampledGaussian, Selection, query_from_json, query_to_json
from discreet.privacy.summary import summarise

ALL = [
    SampledGaussian(sample_rate=0.1 + 0.2, noise_multiplier=1 / 3, count=7),
    SampledGaussian(sample_rate=1.0, noise_multiplier=0.0, count=0),
    Gaussian(noise_multiplier=12.5, count=3),
    Gaussian(noise_multiplier=5),
    Selection(delta=1e-7),
]


@pytest.mark.parametrize("query", ALL)
def test_json_round_trip_is_exact(query):
    assert query_from_json(json.loads(json.dumps(query_to_json(query)))) == query


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("gaussian", "must be an object"),
        ({}, "query type None"),
        ({"type": "laplace"}, "query type 'laplace'"),
        ({"type": ["gaussian"]}, "query type"),
        ({"type": "gaussian", "noise_multiplier": 1.0}, "query fields"),
        ({"type": "gaussian", "noise_multiplier": 1.0, "count": 1, "more": 2}, "query fields"),
        ({"type": "gaussian", "noise_multiplier": "1", "count": 1}, "noise_multiplier='1'"),
        ({"type": "gaussian", "noise_multiplier": True, "count": 1}, "noise_multiplier=True"),
        ({"type": "gaussian", "noise_multiplier": 1.0, "count": 1.0}, "count=1.0"),
        ({"type": "gaussian", "noise_multiplier": 1.0, "count": True}, "count=True"),
        ({"type": "gaussian", "noise_multiplier": -1.0, "count": 1}, "noise_multiplier=-1.0"),
        ({"type": "sampled_gaussian", "sample_rate": 0, "noise_multiplier": 1.0, "count": 1}, "sample_rate=0"),
        ({"type": "selection", "delta": 1.0}, "delta=1.0"),
    ],
)
def test_strict_reading(record, message):
    with pytest.raises(ConfigError, match=message):
        query_from_json(record)


@pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan])
def test_noise_multiplier_limits(sigma):
    with pytest.raises(ConfigError, match="noise_multiplier"):
        Gaussian(sigma)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        SampledGaussian(0.1, sigma, 1)


@pytest.mark.parametrize("count", [-1, 1.0, True, "3"])
def test_count_limits(count):
    with pytest.raises(ConfigError, match="count"):
        Gaussian(1.0, count)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan])
def test_rate_limits(rate):
    with pytest.raises(ConfigError, match="sample_rate"):
        SampledGaussian(rate, 1.0, 1)


def test_summary_merges_and_forgets_order():
    first = summarise(
        [Gaussian(2.0), SampledGaussian(0.1, 1.0, 3), SampledGaussian(1.0, 2.0, 3), SampledGaussian(0.1, 1.0, 2)]
    )
    second = summarise([SampledGaussian(0.1, 1.0, 5), Gaussian(2.0, 4)])
    assert first == second
    assert first.sampled == (SampledGaussian(0.1, 1.0, 5),)
    assert first.gaussian_mu == 1.0
    assert not first.empty
    assert summarise([Gaussian(0.0, 0)]).empty
    assert summarise([Gaussian(0.0)]).noiseless
