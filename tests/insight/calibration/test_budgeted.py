"""The report within a budget: unbiased where it can be, and honest about the bias of noisy absolute values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.insight.calibration import Predictions, budgeted_report, calibration_report
from discreet.insight.calibration.budgeted import NLL_BOUND, noise_share, report_noise
from discreet.privacy.accounting import Gaussian, Relation, epsilon
from insight.calibration.recipe import descended, drawn, logits_of

DELTA = 1e-5


def asked(logits, target, *, seed=0, noise=4.0, charged=None, relation=Relation.ADD_REMOVE, bins=15):
    return budgeted_report(
        logits,
        target,
        examples=len(target),
        noise_multiplier=noise,
        source=NoiseSource.insecure_seed(seed),
        charge=(charged if charged is not None else []).append,
        relation=relation,
        bins=bins,
    )


@pytest.fixture(scope="module")
def model():
    features, target = drawn(4000, seed=3)
    return logits_of(descended(clip_bound=0.03), features), target


def test_figures_are_the_exact_ones_plus_noise_of_the_stated_size(model):
    """60 noises: means within five standard errors of the exact figures, deviations within 35 % of the stated ones
    (five standard errors of a deviation from 60 draws are 46 %; a missing factor of 2 is told apart)."""
    logits, target = model
    exact = calibration_report(Predictions.from_logits(logits, target))
    cut = float(torch.nn.functional.cross_entropy(logits, target, reduction="none").clamp(max=NLL_BOUND).mean())
    truth = {"accuracy": exact.accuracy, "brier": exact.brier, "nll": cut, "gap": exact.gap}
    found = [asked(logits, target, seed=seed) for seed in range(60)]
    for name, value in truth.items():
        seen = [getattr(report, name) for report in found]
        std = found[0].stds[name]
        assert abs(np.mean(seen) - value) < 5 * std / math.sqrt(60)
        assert np.std(seen) == pytest.approx(std, rel=0.35)
    counts = np.array([report.count_M for report in found]).mean(0)
    np.testing.assert_allclose(counts, exact.bins.count_M, atol=5 * found[0].count_std / math.sqrt(60))


@pytest.mark.parametrize("examples", [2000, 10_000])
@pytest.mark.parametrize("noise", [2.0, 5.0])
def test_the_bias_of_a_noisy_error_is_the_formula(examples, noise):
    """A perfectly calibrated model: ``sum |S + N| / n`` has mean ``sum sqrt(2 (v + s^2) / pi) / n`` (its floor), and
    noise alone ``M s sqrt(2 / pi) / n``; both within 10 % of the mean of 60, whose standard error is below 2.5 %."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(examples, 4)) * 2)
    cumulated = logits.softmax(1).numpy().cumsum(1)
    errors, floors = [], []
    for seed in range(60):
        label = (cumulated < np.random.default_rng(seed).random((examples, 1))).sum(1).clip(max=3)
        report = asked(logits, torch.from_numpy(label), seed=seed, noise=noise)
        errors.append(report.ece)
        floors.append(report.ece_floor)
    assert np.mean(floors) == pytest.approx(np.mean(errors), rel=0.1)
    draws = generator.normal(size=(4000, 15)) * report.gap_std
    alone = np.abs(draws).sum(1).mean() / examples
    assert noise_share(report.gap_std, examples=examples, bins=15) == pytest.approx(alone, rel=0.02)
    assert report.ece_noise == noise_share(report.gap_std, examples=examples, bins=15)
    # The negative control: without the noise's part the floor is far too low at the larger noise and the smaller N.
    if noise == 5.0 and examples == 2000:
        assert (
            np.mean(floors)
            > 1.5 * calibration_report(Predictions.from_logits(logits, torch.from_numpy(label))).ece_floor.mean
        )


def test_a_wrong_model_is_told_from_a_right_one_within_epsilon_one(model):
    logits, target = model
    noise = report_noise(epsilon=1.0, delta=DELTA)
    assert asked(logits, target, noise=noise).notable
    assert not asked(logits / 1.93, target, noise=noise).notable


def test_one_query_is_charged_ahead_and_costs_what_was_asked():
    charged = []
    noise = report_noise(epsilon=1.0, delta=DELTA)
    found = asked(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64), noise=noise, charged=charged)
    assert charged == [Gaussian(noise)]
    assert 0.999 <= epsilon(charged, delta=DELTA) <= 1.0
    assert not found.private


def test_replace_one_uses_its_own_sensitivity():
    """sqrt(5.5) and not twice sqrt(2): at the noise that the accountant wants, a sixth less of it."""
    rows = torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64)
    doubled = 2 * asked(*rows, noise=1.0).gap_std
    noise = report_noise(epsilon=1.0, delta=DELTA, relation=Relation.REPLACE_ONE)
    assert noise == pytest.approx(2 * report_noise(epsilon=1.0, delta=DELTA), rel=2e-3)
    replaced = asked(*rows, noise=2.0, relation=Relation.REPLACE_ONE).gap_std
    assert replaced == pytest.approx(math.sqrt(5.5))
    assert replaced < doubled


@pytest.mark.parametrize("label", [0, -100, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_whatever_the_rows_hold_there_is_a_report(value, label):
    found = asked(torch.full((50, 3), value, dtype=torch.float64), torch.full((50,), label))
    json.dumps(found.to_json(), allow_nan=False)


def test_no_example_is_refused_because_n_is_public():
    with pytest.raises(ConfigError, match="examples=0"):
        asked(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
