"""Queries that share a batch are one event. What it costs to forget that."""

from __future__ import annotations

import math

import pytest

from discreet.errors import ConfigError
from discreet.privacy.accounting import SampledGaussian, epsilon
from discreet.privacy.sharing import joint_noise, scalar_noise

N, B, STEPS, DELTA, EVERY = 50_000, 1000, 250, 1e-5, 5


def _spent(*parts: tuple[float, int]) -> float:
    return epsilon([SampledGaussian(B / N, sigma, count) for sigma, count in parts], delta=DELTA)


@pytest.mark.parametrize("gamma", [1.001, 1.01, 1.1])
@pytest.mark.parametrize("scalars", [1, 2, 3, 17])
def test_gradient_and_scalars_together_are_one_plain_step(gamma, scalars):
    """E2, fix A: the accountant sees the same step with probes and without."""
    each = scalar_noise(0.596, scalars=scalars, gamma=gamma)
    assert joint_noise([gamma * 0.596, *[each] * scalars]) == pytest.approx(0.596, rel=1e-12)


def test_published_factors():
    """12.3, 5.68 and 4.16 sigma for three scalars."""
    factors = [scalar_noise(1.0, scalars=3, gamma=gamma) for gamma in (1.01, 1.05, 1.10)]
    assert factors == pytest.approx([12.3, 5.68, 4.16], rel=0.01)


def test_epsilon_with_shared_probes_is_that_without():
    gamma = 1.01
    joint = joint_noise([gamma * 0.596, *[scalar_noise(0.596, scalars=3, gamma=gamma)] * 3])
    assert _spent((joint, STEPS // EVERY), (0.596, STEPS - STEPS // EVERY)) == pytest.approx(
        _spent((0.596, STEPS)), abs=1e-6
    )


def test_a_shared_batch_composed_as_if_it_were_independent_claims_half_of_the_truth():
    """F1: claimed 8, really 16.6 (N 50,000, B 1,000, T 250, gamma 1.01, losses at 0.87 on the gradient's own batch)."""
    gradient, loss = 1.01 * 0.596, 0.87
    probes = STEPS // EVERY
    claimed = _spent((gradient, STEPS), (loss, 3 * probes))
    true = _spent((joint_noise([gradient, loss, loss, loss]), probes), (gradient, STEPS - probes))
    assert claimed == pytest.approx(8.0, rel=0.03)
    assert true == pytest.approx(16.6, rel=0.03)


@pytest.mark.parametrize("noise", [[], [0.0], [1.0, math.inf], [1.0, -1.0]])
def test_an_event_without_noise_is_refused(noise):
    with pytest.raises(ConfigError, match="noise multipliers"):
        joint_noise(noise)


@pytest.mark.parametrize(("gamma", "scalars"), [(1.0, 3), (0.9, 3), (1.01, 0), (math.inf, 1)])
def test_nothing_left_for_the_scalars_is_refused(gamma, scalars):
    with pytest.raises(ConfigError, match="gamma"):
        scalar_noise(1.0, scalars=scalars, gamma=gamma)
