"""Accounting against published tables and models, and the rounding that their long runs meet."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld

from discreet.privacy import proposal, referee
from discreet.privacy.accounting import (
    Accountant,
    Relation,
    SampledGaussian,
    delta,
    epsilon,
    solve_noise,
)
from discreet.privacy.gdp import gdp_mu, seed_noise_multiplier
from discreet.privacy.proposal import EXTENDED, fourier_margin
from discreet.privacy.summary import summarise

VAULT_RATE = 518e3 / (13e12 / 1024)


PUBLISHED = [  # name, q, sigma, steps, delta, RDP, PLD; to the digits printed
    ("De ImageNet", 16384 / 1_271_167, 2.5, 71_589, 8e-7, "8.000", "7.51"),
    ("De ImageNet, all of it", 16384 / 1_281_167, 2.5, 71_589, 8e-7, "7.93", "7.44"),
    ("TAN table 4, 32768", 1 / 39, 2.5, 18_000, 8e-7, "8.003", "7.51"),
    ("TAN table 4, 32768, all of it", 32768 / 1_281_167, 2.5, 18_000, 8e-7, "7.98", "7.49"),
    ("TAN table 4, 16384", 1 / 78, 2.5, 72_000, 8e-7, "7.977", "7.49"),
    ("TAN table 4, 16384, all of it", 16384 / 1_281_167, 2.5, 72_000, 8e-7, "7.95", "7.47"),
    ("TAN table 6, half of it", 2 * 16384 / 1_271_167, 2.5, 71_589, 16e-7, "17.99", "16.94"),
    ("TAN table 5, 25K", 4096 / 25_000, 3.0, 2_500, 1 / 25_000, "15.8", "14.4"),
    ("TAN table 5, 40K", 4096 / 40_000, 3.0, 2_500, 1 / 40_000, "8.9", "8.2"),
    ("TAN table 5, 50K", 4096 / 50_000, 3.0, 2_500, 1e-5, "7.10", "6.58"),
    ("De CIFAR-10", 4096 / 50_000, 10.0, 875, 1e-5, "0.988", "0.903"),
    ("De CIFAR-100", 16384 / 50_000, 21.1, 250, 1e-5, "0.998", "0.912"),
    ("DP-RandP", 4096 / 50_000, 9.3, 875, 1e-5, "1.07", "0.978"),
    ("DP-RandP, full batch", 1.0, 38.0, 100, 1e-5, "1.07", "0.980"),
]


def _printed(value, text):
    """Whether ``value`` is the number printed: half a unit of its last digit, and a little for the grid."""
    return value == pytest.approx(float(text), abs=0.52 * 10.0 ** -len(text.partition(".")[2]) + 5e-4)


@pytest.mark.parametrize(("name", "rate", "sigma", "steps", "at", "rdp", "pld"), PUBLISHED)
def test_published_points(name, rate, sigma, steps, at, rdp, pld):
    queries = [SampledGaussian(rate, sigma, steps)]
    by_rdp = epsilon(queries, delta=at, accountant=Accountant.RDP)
    by_pld = epsilon(queries, delta=at)
    assert _printed(by_rdp, rdp), (name, by_rdp)
    assert _printed(by_pld, pld), (name, by_pld)
    assert by_pld < by_rdp


def test_published_point_of_five_thousand_examples():
    by_rdp = epsilon([SampledGaussian(0.8192, 3.0, 2_500)], delta=1 / 5_000, accountant=Accountant.RDP)
    assert _printed(by_rdp, "156.2")


CONSTANT_ETA = {  # (eta, sigma) -> epsilon by RDP and by PLD; S = 10^4, delta = 1e-5, q = eta sigma sqrt(2 / S)
    (0.13, 0.5): ("6.1", "4.9"),
    (0.13, 0.7): ("2.31", "1.61"),
    (0.13, 1.0): ("1.15", ".94"),
    (0.13, 2.0): (".79", ".73"),
    (0.13, 8.0): (".73", ".68"),
    (0.27, 0.7): ("3.93", "3.35"),
    (0.27, 1.5): ("1.86", "1.71"),
    (0.55, 0.5): ("18.2", "16.2"),
    (0.55, 1.0): ("5.03", "4.63"),
    (0.55, 4.0): ("3.63", "3.36"),
    (0.95, 0.7): ("14.6", "13.3"),
    (0.95, 3.0): ("6.93", "6.43"),
    (1.6, 0.3): ("229", "203"),
    (1.6, 1.0): ("17.9", "16.6"),
    (1.6, 8.0): ("12.6", "11.7"),
}


@pytest.mark.parametrize(("eta", "sigma"), CONSTANT_ETA)
def test_published_table_at_constant_signal_to_noise(eta, sigma):
    """The privacy wall: the same eta = q sqrt(S / 2) / sigma costs the same down to sigma 2, and surges below.

    The table's PLD column was taken on a grid of 1e-3, which is up to 3 % too large at small epsilon.
    """
    rate = eta * sigma * math.sqrt(2 / 10_000)
    queries = [SampledGaussian(rate, sigma, 10_000)]
    rdp, pld = CONSTANT_ETA[eta, sigma]
    assert _printed(epsilon(queries, delta=1e-5, accountant=Accountant.RDP), rdp)
    step = dp_pld.from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=1e-3)
    coarse = step.self_compose(10_000).get_epsilon_for_delta(1e-5)
    assert _printed(coarse, pld)
    assert 0.97 * coarse <= epsilon(queries, delta=1e-5) <= 1.0005 * coarse


RUNS = {  # examples, steps, epsilon, delta
    "CIFAR 8": (50_000, 2_500, 8.0, 1e-5),
    "CIFAR 1": (50_000, 875, 1.0, 1e-5),
    "ImageNet 18k": (1_281_167, 18_000, 8.0, 8e-7),
    "ImageNet 72k": (1_281_167, 72_000, 8.0, 8e-7),
}
NOISE = {  # batch -> sigma for each of the runs
    512: (0.671, 1.376, 0.429, 0.468),
    1_024: (0.906, 2.42, 0.475, 0.532),
    4_096: (2.58, 9.13, 0.646, 0.848),
    8_192: (4.99, 18.2, 0.856, 1.32),
    16_384: (9.88, 36.3, 1.33, 2.37),
    32_768: (19.7, 72.5, 2.38, 4.58),
}


@pytest.mark.parametrize("batch", NOISE)
@pytest.mark.parametrize("run", RUNS)
def test_published_noise_and_its_seed(run, batch):
    """Solved noise to the three digits printed; the closed form below it by what is printed: 1 % from sigma 2 on."""
    examples, steps, target, at = RUNS[run]
    expected = NOISE[batch][list(RUNS).index(run)]
    solution = solve_noise(sample_rate=batch / examples, steps=steps, epsilon=target, delta=at)
    assert solution.noise_multiplier == pytest.approx(expected, rel=0.005)
    assert solution.evaluations == 1
    seed = seed_noise_multiplier(batch / examples, steps=steps, mu=gdp_mu(target, delta=at))
    error = seed / solution.noise_multiplier - 1
    if target == 1.0:
        lowest = -0.025 if expected > 2 else -0.06
    else:
        lowest = -0.01 if expected >= 2 else -0.016 if expected >= 1.3 else -0.055 if expected >= 0.64 else -0.115
    assert lowest <= error < 0


def test_vaultgemma_where_rdp_is_twice_too_large():
    queries = [SampledGaussian(VAULT_RATE, 0.614, 100_000)]
    assert epsilon(queries, delta=1.1e-10, accountant=Accountant.RDP) == pytest.approx(3.23, abs=0.01)
    # 1.7104 on ever finer grids. Without 80-bit numbers a quarter of this tiny delta is given up for the rounding of
    # 100,000-fold products.
    assert 1.7104 <= epsilon(queries, delta=1.1e-10) <= (1.715 if EXTENDED else 1.82)


def test_the_closed_form_of_tan_is_ten_times_too_small_there():
    """Eq. 4, arXiv:2210.03403, which is why nothing here uses it: 0.14 for a true 1.71."""
    eta = VAULT_RATE * math.sqrt(100_000 / 2) / 0.614
    assert eta**2 + 2 * eta * math.sqrt(math.log(1 / 1.1e-10)) == pytest.approx(0.14, abs=0.005)


@pytest.mark.skipif(not EXTENDED, reason="this machine has no 80-bit numbers")
@pytest.mark.parametrize(("rate", "sigma", "steps"), [(4e-5, 0.614, 100_000), (0.01, 2.0, 20_000), (0.2, 15.0, 5_000)])
def test_float64_and_80_bits_agree_within_the_margin(rate, sigma, steps):
    total = summarise([SampledGaussian(rate, sigma, steps)])
    plain, extended = (referee._compose(total, Relation.ADD_REMOVE, extended=flag) for flag in (False, True))
    at = epsilon([SampledGaussian(rate, sigma, steps)], delta=1e-9)
    for share in (0.5, 0.8, 1.0, 1.1):
        difference = plain.get_delta_for_epsilon(share * at) - extended.get_delta_for_epsilon(share * at)
        assert abs(difference) <= fourier_margin(total)
    assert fourier_margin(total, extended=True) < 0.1 * fourier_margin(total)


def test_without_80_bits_the_margin_is_paid(monkeypatch):
    queries = [SampledGaussian(VAULT_RATE, 0.614, 100_000)]
    with_extended = epsilon(queries, delta=1.1e-10)
    for module in (proposal, referee):
        monkeypatch.setattr(module, "EXTENDED", False)
    referee.epsilon_of.cache_clear()
    assert with_extended < epsilon(queries, delta=1.1e-10) <= 1.82
    assert delta(queries, epsilon=1.75) > 2.5e-11
    referee.epsilon_of.cache_clear()
