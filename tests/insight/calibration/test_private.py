"""The private temperature: what it charges, what it finds, and how well its own uncertainty is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.insight.calibration import (
    Predictions,
    PrivateRows,
    PublicRows,
    fit_public_temperature,
    fit_temperature,
)
from discreet.insight.calibration.bins import equal_width
from discreet.insight.calibration.private import (
    BOUND,
    COLDEST,
    HOTTEST,
    QUERIES,
    check_support,
    fit_private_temperature,
    question_noise,
)
from discreet.privacy.accounting import Gaussian, Relation, epsilon
from insight.calibration.recipe import descended, drawn, logits_of

DELTA = 1e-5
SEEDS = 30


def rows(seed: int, *, noise: float, charged: list | None = None) -> PrivateRows:
    return PrivateRows(
        noise_multiplier=noise,
        source=NoiseSource.insecure_seed(seed),
        charge=(charged if charged is not None else []).append,
    )


@pytest.fixture(scope="module")
def recipe():
    """Recipe A of the literature's smallest case: a linear softmax over Gaussian classes, clipped far too low."""
    weights = descended(clip_bound=0.03)
    features, target = drawn(20_000, seed=77)
    return weights, Predictions.from_logits(logits_of(weights, features), target)


@pytest.fixture(scope="module")
def fits(recipe):
    """30 private temperatures at epsilon 1 from 2,000 fresh examples each."""
    weights, _ = recipe
    noise = question_noise(epsilon=1.0, delta=DELTA)
    found = []
    for seed in range(SEEDS):
        features, target = drawn(2000, seed=1000 + seed)
        found.append(fit_private_temperature(logits_of(weights, features), target, rows=rows(seed, noise=noise)))
    return found


def test_the_model_is_too_sure_by_ten_points(recipe):
    _, predictions = recipe
    table = equal_width(predictions)
    assert table.ece > 0.08
    assert fit_public_temperature(predictions).value == pytest.approx(1.93, abs=0.1)


def test_an_error_of_ten_points_falls_below_three_in_29_of_30_seeds(recipe, fits):
    _, predictions = recipe
    after = [equal_width(predictions.at_temperature(fit.value)).ece for fit in fits]
    assert sum(ece < 0.03 for ece in after) >= 29
    assert np.mean(after) < 0.015


def test_the_test_above_would_see_a_bound_that_is_too_low(recipe):
    """Slopes clipped at a quarter of the bound leave half of the error: the negative control."""
    weights, predictions = recipe
    noise = question_noise(epsilon=1.0, delta=DELTA)
    low = PrivateRows(noise_multiplier=noise, source=NoiseSource.insecure_seed(0), charge=[].append, bound=BOUND / 4)
    features, target = drawn(2000, seed=1000)
    found = fit_private_temperature(logits_of(weights, features), target, rows=low)
    assert equal_width(predictions.at_temperature(found.value)).ece > 0.03


def test_the_uncertainty_is_the_spread(recipe, fits):
    """Errors over stated deviations have a variance of about 1: between the 0.1 % points of chi squared over 30, with
    room for the 2 % that clipping moves T; half or twice the deviation would be told apart."""
    _, predictions = recipe
    truth = fit_public_temperature(predictions).value
    scores = [(fit.value - truth) / fit.std for fit in fits]
    square = float(np.sum(np.square(scores)))
    low, high = stats.chi2.ppf([0.001, 0.999], SEEDS)
    assert low < square < high
    assert not low < 4 * square < high
    assert not low < square / 4 < high


def test_the_noise_is_most_of_it_on_one_set_of_rows(recipe):
    """The same rows under 30 noises spread as `noise_std` says."""
    weights, _ = recipe
    features, target = drawn(2000, seed=1000)
    noise = question_noise(epsilon=1.0, delta=DELTA)
    found = [
        fit_private_temperature(logits_of(weights, features), target, rows=rows(seed, noise=noise))
        for seed in range(SEEDS)
    ]
    spread = np.std([fit.value for fit in found], ddof=1)
    low, high = np.sqrt(stats.chi2.ppf([0.0005, 0.9995], SEEDS - 1) / (SEEDS - 1))
    assert low < spread / np.mean([fit.noise_std for fit in found]) < high


def test_a_model_that_is_not_sure_enough_is_mended_too():
    weights = descended(clip_bound=30.0)
    features, target = drawn(20_000, seed=77)
    predictions = Predictions.from_logits(logits_of(weights, features), target)
    assert equal_width(predictions).ece > 0.15
    noise = question_noise(epsilon=1.0, delta=DELTA)
    features, target = drawn(2000, seed=1000)
    found = fit_private_temperature(logits_of(weights, features), target, rows=rows(0, noise=noise))
    assert found.value < 0.6
    assert equal_width(predictions.at_temperature(found.value)).ece < 0.03


def test_any_scale_of_logits_has_the_same_fit(recipe):
    weights, _ = recipe
    features, target = drawn(2000, seed=1000)
    logits = logits_of(weights, features)
    one = fit_private_temperature(logits, target, rows=rows(0, noise=1.0))
    other = fit_private_temperature(3 * logits, target, rows=rows(0, noise=1.0))
    assert other.value == pytest.approx(3 * one.value, rel=0.05)


def test_without_noise_it_is_the_public_one_but_for_clipping(recipe):
    weights, _ = recipe
    features, target = drawn(4000, seed=5)
    logits = logits_of(weights, features)
    found = fit_private_temperature(logits, target, rows=rows(0, noise=0.0))
    assert found.value == pytest.approx(fit_public_temperature(Predictions.from_logits(logits, target)).value, rel=0.05)
    assert not found.private
    assert found.noise_std == 0


def test_everything_is_charged_once_and_before_the_first_question():
    order = []

    class Watched(NoiseSource):
        def claim(self) -> int:
            order.append("noise")
            return super().claim()

    source = Watched(bytes(32), position=0, private=True)
    asked = PrivateRows.within(1.0, delta=DELTA, source=source, charge=order.append)
    fit_temperature(torch.randn(300, 3), torch.randint(0, 3, (300,)), rows=asked)
    assert order == [Gaussian(asked.noise_multiplier, QUERIES), *["noise"] * QUERIES]
    assert 0.999 <= epsilon([order[0]], delta=DELTA) <= 1.0


def test_a_charge_that_is_refused_leaves_the_rows_alone():
    def refuse(query) -> None:
        raise ConfigError("no budget")

    asked = PrivateRows(noise_multiplier=1.0, source=NoiseSource.insecure_seed(0), charge=refuse)
    with pytest.raises(ConfigError, match="no budget"):
        fit_temperature(torch.randn(300, 3), torch.randint(0, 3, (300,)), rows=asked)
    assert asked.source.position == 0


def test_replace_one_takes_twice_the_noise():
    one = question_noise(epsilon=1.0, delta=DELTA)
    assert question_noise(epsilon=1.0, delta=DELTA, relation=Relation.REPLACE_ONE) == pytest.approx(2 * one, rel=2e-3)


@pytest.mark.parametrize(
    "strange",
    [
        torch.full((300, 2), math.nan),
        torch.full((300, 2), math.inf),
        torch.tensor([[1e300, -1e300]] * 300, dtype=torch.float64),
        torch.zeros(300, 2),
        torch.zeros(0, 2),
    ],
)
@pytest.mark.parametrize("label", [0, 1, -100, 9])
def test_whatever_the_rows_hold_there_is_an_answer(strange, label):
    """An error that depends on a private row would be a release of its own."""
    target = torch.full((len(strange),), label)
    found = fit_temperature(strange, target, rows=rows(0, noise=10.0))
    assert COLDEST * 0.9 <= found.value <= HOTTEST * 1.1
    found.to_json()


def test_an_empty_part_says_that_it_knows_nothing():
    """Of 40 noises over no row, hardly any claims to know T to a fifth."""
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    found = [fit_temperature(*empty, rows=rows(seed, noise=10.0)) for seed in range(40)]
    assert sum(fit.std < 0.2 * fit.value for fit in found) <= 4


@pytest.mark.parametrize(("examples", "epsilon_"), [(2000, 0.2), (499, 1.0), (199, 8.0), (0, math.inf)])
def test_what_the_data_cannot_support_is_refused(examples, epsilon_):
    with pytest.raises(ConfigError, match=f"from {examples} examples"):
        check_support(examples, epsilon=epsilon_)


def test_what_the_data_can_support_is_not():
    for examples, epsilon_ in ((500, 1.0), (200, 3.0), (2000, math.inf)):
        check_support(examples, epsilon=epsilon_)


def test_public_rows_have_the_exact_temperature():
    logits, target = torch.randn(300, 3, dtype=torch.float64), torch.randint(0, 3, (300,))
    found = fit_temperature(logits, target, rows=PublicRows())
    assert found == fit_public_temperature(Predictions.from_logits(logits, target))
    with pytest.raises(TypeError, match="rows"):
        fit_temperature(logits, target)


def test_answers_far_from_the_root_do_not_bend_the_line():
    """Under a floor of a fifth, sure answers and wrong ones lie on no line: with all within .7, T was 2 % off."""
    generator = torch.Generator().manual_seed(3)
    sure = 8.0 * F.one_hot(torch.randint(10, (4000,), generator=generator), 10).double()
    chances = 0.8 * torch.softmax(sure + torch.randn(4000, 10, generator=generator), 1) + 0.02
    label = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    exact = fit_public_temperature(Predictions.from_logits(chances.log(), label)).value
    found = fit_private_temperature(chances.log(), label, rows=rows(0, noise=0.0))
    assert found.value == pytest.approx(exact, rel=0.01)
    assert exact == pytest.approx(1.0, abs=0.05)
