"""The compute-capped choice, against a law whose optimum is found by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.insight.curves import measure_curves
from discreet.insight.proxy_table import (
    CappedChoice,
    Curves,
    LossSurface,
    choose_under_compute,
    isotonic,
    monotone,
    rolling_mean,
)
from discreet.insight.simulated_run import Candidate, Origin, Proxy
from discreet.privacy.accounting import Accountant
from discreet.privacy.gdp import gdp_mu, seed_noise_multiplier
from discreet.privacy.plan import Plan, default_delta
from discreet.train.trial import Recipe
from insight.test_simulation import _accuracy, _build
from train import toys

STEPS = tuple(round(2 ** (3 + k / 4)) for k in range(29))  # 8 to 1,024
RATIOS = tuple(2.0**k for k in range(-12, -1))


def _law(steps: float, ratio: float, *, floor: float = 0.05) -> float:
    """A loss that falls with steps and rises with noise: the shape that arXiv:2501.18914 fits."""
    return floor + 0.8 / steps**0.5 + 2.0 * ratio**0.8


def _curves(*, floor: float = 0.05, cost: float = 1.0, noise: float = 0.0) -> Curves:
    generator = np.random.default_rng(0)
    table = [[_law(t, v, floor=floor) + noise * generator.standard_normal() for t in STEPS] for v in RATIOS]
    return Curves(steps_T=STEPS, ratios_V=RATIOS, loss_VT=tuple(map(tuple, table)), cost=cost)


def _choose(
    tables: dict[str, Curves] | None = None, *, examples: int = 50_000, epsilon: float = 2.0, compute: float = 1e6
) -> CappedChoice:
    return choose_under_compute(
        tables or {"m": _curves()}, examples=examples, epsilon=epsilon, compute=compute, accountant=Accountant.RDP
    )


def test_isotonic_pools_violators():
    assert isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert isotonic(np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 2.0, 2.0]
    rising = np.array([0.0, 0.5, 0.5, 2.0])
    assert np.array_equal(isotonic(rising), rising)


def test_isotonic_is_the_least_squares_fit():
    generator = np.random.default_rng(1)
    values = generator.standard_normal(6)
    fit = isotonic(values)
    best = ((fit - values) ** 2).sum()
    for _ in range(2000):
        other = np.sort(fit + 0.3 * generator.standard_normal(6))
        assert ((other - values) ** 2).sum() >= best - 1e-12


def test_a_noisy_table_becomes_monotone_and_stays_near_the_law():
    noisy = np.asarray(_curves(noise=0.02).loss_VT)
    table = monotone(rolling_mean(noisy))
    assert (np.diff(table, axis=1) <= 1e-12).all()
    assert (np.diff(table, axis=0) >= -1e-12).all()
    law = np.asarray(_curves().loss_VT)
    assert np.abs(table - law)[:, 3:].mean() < 0.5 * np.abs(noisy - law)[:, 3:].mean()


def test_a_monotone_table_is_left_alone():
    law = np.asarray(_curves().loss_VT)
    assert np.allclose(monotone(law), law, atol=1e-15)


def test_the_surface_interpolates_and_continues_the_law():
    surface = LossSurface(_curves())
    for steps, ratio in [(100, 2**-7), (700, 2**-4), (1024, 2**-10)]:
        assert surface.at(steps=steps, ratio=ratio) == pytest.approx(_law(steps, ratio), rel=0.02)
    assert surface.at(steps=4096, ratio=2**-10) == pytest.approx(_law(4096, 2**-10), rel=0.03)


@pytest.mark.parametrize("log_ratio", [-7.3, -4.5, -2.5])
def test_between_the_ratios_the_error_is_that_of_a_line(log_ratio):
    """A line over one octave of a function with second derivative f'' is off by at most ``ln(2)^2 / 8 max f''``."""
    ratio = 2**log_ratio
    bend = 0.8**2 * 2.0 * 2 ** (0.8 * math.ceil(log_ratio))
    assert (
        0
        <= LossSurface(_curves()).at(steps=512, ratio=ratio) - _law(512, ratio) * 0.99
        <= (math.log(2) ** 2 / 8 * bend + 0.03 * _law(512, ratio))
    )


def test_outside_the_table_there_is_no_answer_but_less_noise_counts_as_the_least():
    surface = LossSurface(_curves())
    assert math.isinf(surface.at(steps=4097, ratio=2**-5))
    assert math.isinf(surface.at(steps=7, ratio=2**-5))
    assert math.isinf(surface.at(steps=100, ratio=0.6))
    assert surface.at(steps=100, ratio=1e-9) == surface.at(steps=100, ratio=2**-12)


def test_the_choice_is_that_of_brute_force_on_the_law():
    examples, compute, epsilon = 50_000, 400_000.0, 2.0
    choice = _choose(examples=examples, epsilon=epsilon, compute=compute)
    mu = gdp_mu(epsilon, delta=default_delta(examples))

    def loss(batch: int, steps: int) -> float:
        return _law(steps, seed_noise_multiplier(batch / examples, steps=steps, mu=mu) / batch)

    best = min(
        loss(batch, steps)
        for steps in range(8, 4097, 8)
        for batch in (math.floor(compute / steps * share) for share in (1.0, 0.5, 0.25))
        if 1 <= batch <= examples
    )
    for setting in (choice.best, choice.recommended):
        assert setting.compute <= compute
        assert loss(setting.batch_size, setting.steps) <= 1.02 * best
    assert choice.recommended.compute <= choice.best.compute
    assert any(setting.batch_size == choice.best.batch_size for setting in choice.band)


def test_the_noise_of_what_is_chosen_is_the_accountants():
    choice = choose_under_compute({"m": _curves()}, examples=50_000, epsilon=2.0, compute=400_000.0)
    for setting in (choice.best, choice.recommended):
        plan = Plan.solve(examples=50_000, batch_size=setting.batch_size, steps=setting.steps, epsilon=2.0)
        assert setting.noise_multiplier == plan.noise_multiplier


def test_a_better_model_is_taken_when_it_is_not_too_dear():
    better = {"small": _curves(), "large": _curves(floor=0.03, cost=1.5)}
    dear = {"small": _curves(), "large": _curves(floor=0.03, cost=500.0)}
    assert _choose(better).best.model == "large"
    assert _choose(dear).best.model == "small"


def test_more_compute_never_gives_a_larger_loss():
    losses = [_choose(compute=compute).best.loss for compute in (5e4, 4e5, 3.2e6)]
    assert losses == sorted(losses, reverse=True)


def test_what_fits_nowhere_is_said():
    with pytest.raises(ConfigError, match="allow more compute"):
        _choose(compute=4.0)


@pytest.mark.parametrize(
    "change",
    [
        {"cost": 0.0},
        {"ratios_V": (0.0, *RATIOS[1:])},
        {"steps_T": STEPS[::-1]},
        {"loss_VT": ((1.0,) * len(STEPS),) * 3},
        {"loss_VT": ((math.nan,) * len(STEPS),) * len(RATIOS)},
    ],
)
def test_curves_that_are_none_are_refused(change):
    whole = _curves()
    fields = {"steps_T": whole.steps_T, "ratios_V": whole.ratios_V, "loss_VT": whole.loss_VT, "cost": whole.cost}
    with pytest.raises(ConfigError):
        Curves(**{**fields, **change})


def test_curves_are_measured_on_public_data():
    clipping = Clipping.abadi(1.0).describe()
    plan = Plan.solve(examples=1000, batch_size=64, steps=60, noise_multiplier=1.0, clipping=clipping)
    candidate = Candidate("toy", plan, Recipe(0.05, decay=False), _build, toys.loss)
    proxy = Proxy(toys.data(), _accuracy, Origin.PUBLIC, "toys")
    recipes = [Recipe(0.05, decay=False), Recipe(1e-6, decay=False)]
    curves = measure_curves(candidate, proxy, ratios=(0.001, 0.5), recipes=recipes, cost=1.0, batch=32)
    assert curves.steps_T[0] == 8
    assert curves.steps_T[-1] == 60
    quiet, loud = curves.loss_VT
    assert quiet[-1] < quiet[0]
    assert quiet[-1] < 0.15 < loud[-1]
    with pytest.raises(ConfigError, match="decay"):
        measure_curves(candidate, proxy, ratios=(0.001, 0.5), recipes=[Recipe(0.05)], cost=1.0)
    hidden = Proxy(toys.data(), _accuracy, Origin.PRIVATE, "toys")
    with pytest.raises(ConfigError, match="unaccounted"):
        measure_curves(candidate, hidden, ratios=(0.001, 0.5), recipes=recipes, cost=1.0)
