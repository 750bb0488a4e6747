"""Accounting against published values, exact one-step formulas, optimistic bounds, and its own limits."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import optimize, stats

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy import proposal, referee
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    Relation,
    SampledGaussian,
    Selection,
    delta,
    epsilon,
    solve_noise,
    solve_noise_multiplier,
)
from discreet.privacy.gdp import gdp_mu, seed_noise_multiplier
from discreet.privacy.proposal import EXTENDED, fourier_margin
from discreet.privacy.queries import SMALLEST_NOISE, summarise

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


def _one_step_delta(rate, sigma, at, *, relation):
    """Exact hockey-stick divergence of one step, from the two densities and the point where their ratio is e^eps."""

    def mixture_tail(x, centre):
        return (1 - rate) * stats.norm.sf(x, scale=sigma) + rate * stats.norm.sf(x, loc=centre, scale=sigma)

    def log_density(x, centre):
        parts = stats.norm.logpdf(x, scale=sigma), stats.norm.logpdf(x, loc=centre, scale=sigma)
        return np.logaddexp(math.log1p(-rate) + parts[0], math.log(rate) + parts[1])

    other = -1.0 if relation is Relation.REPLACE_ONE else 0.0

    def divergence(upper, lower, side):
        def excess(x):
            return log_density(side * x, upper) - log_density(side * x, lower) - at

        ends = -60 * sigma - 60, 60 * sigma + 60
        if excess(ends[1]) <= 0:
            return 0.0
        crossing = optimize.brentq(excess, *ends, xtol=1e-14)
        tails = [mixture_tail(crossing, side * centre) for centre in (upper, lower)]
        return tails[0] - math.exp(at) * tails[1]

    if relation is Relation.REPLACE_ONE:
        return divergence(1.0, other, 1)
    return max(divergence(1.0, 0.0, 1), divergence(0.0, 1.0, -1))


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("at", [0.05, 0.5, 2.0])
def test_one_step_is_exact(relation, rate, sigma, at):
    exact = _one_step_delta(rate, sigma, at, relation=relation)
    bound = delta([SampledGaussian(rate, sigma, 1)], epsilon=at, relation=relation)
    assert bound >= exact - 1e-14
    assert bound <= exact + 1e-5
    if exact > 1e-8:
        assert epsilon([SampledGaussian(rate, sigma, 1)], delta=exact, relation=relation) >= at - 1e-9


GRID = list(itertools.product([1e-4, 0.004, 0.05, 0.5], [0.5, 0.8, 1.5, 20.0], [1, 30, 3_000], [1e-8, 1e-5]))


@pytest.mark.parametrize("rate", [1e-4, 0.004, 0.05, 0.5])
def test_never_below_an_optimistic_bound_and_close_to_it(rate):
    """F13: privacy buckets rounded down are a lower bound by another algorithm."""
    for _, sigma, steps, at in (point for point in GRID if point[0] == rate):
        upper = epsilon([SampledGaussian(rate, sigma, steps)], delta=at)
        assert math.isfinite(upper)
        assert upper >= 0
        grid = max(5e-4, upper / 10_000)
        losses = dp_pld.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            value_discretization_interval=grid,
            sampling_prob=rate,
            use_connect_dots=False,
        )
        if steps <= 30:  # each step rounds down by up to one cell, so for more steps the bound says nothing
            lower = losses.self_compose(steps, tail_mass_truncation=0).get_epsilon_for_delta(at)
            assert lower - 1e-9 <= upper <= lower + max(0.01, 0.01 * upper) + steps * grid, (rate, sigma, steps, at)
        assert upper <= epsilon([SampledGaussian(rate, sigma, steps)], delta=at, accountant=Accountant.RDP) + 0.01


def test_monotone_in_every_argument():
    base = {"rate": 0.02, "sigma": 1.2, "steps": 500, "at": 1e-6}

    def at(**changes):
        values = base | changes
        return epsilon([SampledGaussian(values["rate"], values["sigma"], values["steps"])], delta=values["at"])

    for name, values in (
        ("rate", [0.001, 0.01, 0.02, 0.1, 0.6, 1.0]),
        ("steps", [1, 2, 10, 499, 500, 501, 5_000]),
        ("sigma", [20.0, 5.0, 1.2, 1.19, 0.7, 0.4]),
        ("at", [1e-2, 1e-4, 1e-6, 1e-9]),
    ):
        found = [at(**{name: value}) for value in values]
        assert all(low < high for low, high in itertools.pairwise(found)), (name, found)


def test_every_single_step_costs_something():
    values = [epsilon([SampledGaussian(0.05, 2.0, steps)], delta=1e-5) for steps in range(1, 60)]
    assert all(low < high for low, high in itertools.pairwise(values))


def test_limits():
    assert epsilon([], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(0.1, 1.0, 0), Gaussian(1.0, 0)], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(0.1, 0.0, 1)], delta=1e-5) == math.inf
    assert epsilon([Gaussian(0.0)], delta=1e-5) == math.inf
    assert epsilon([SampledGaussian(0.1, 0.0, 0)], delta=1e-5) == 0.0
    assert epsilon([Gaussian(1e9)], delta=1e-5) == 0.0
    assert epsilon([SampledGaussian(1e-6, 0.02, 1)], delta=1e-5) == 0.0
    assert delta([Gaussian(0.0)], epsilon=3.0) == 1.0
    assert delta([], epsilon=3.0) == 0.0
    assert delta([Gaussian(1.0)], epsilon=math.inf) == 0.0
    assert 0 < delta([SampledGaussian(0.1, 0.3, 100)], epsilon=0.0) <= 1.0


@pytest.mark.parametrize("accountant", list(Accountant))
def test_full_batches_are_unsampled_gaussians(accountant):
    sampled = epsilon([SampledGaussian(1.0, 5.0, 40)], delta=1e-5, accountant=accountant)
    assert sampled == epsilon([Gaussian(5.0, 40)], delta=1e-5, accountant=accountant)
    assert sampled == pytest.approx(
        epsilon([Gaussian(5.0 / math.sqrt(40))], delta=1e-5, accountant=accountant), rel=1e-9
    )


def test_gaussian_is_the_classical_closed_form():
    assert epsilon([Gaussian(1.0)], delta=1e-5) == pytest.approx(4.3771, abs=1e-3)
    assert delta([Gaussian(1.0)], epsilon=epsilon([Gaussian(1.0)], delta=1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_order_and_splitting_give_the_same_bits():
    whole = [Gaussian(7.0), SampledGaussian(0.03, 1.3, 200), SampledGaussian(0.1, 4.0, 10), Gaussian(9.0, 2)]
    split = [
        SampledGaussian(0.1, 4.0, 4),
        Gaussian(9.0),
        SampledGaussian(0.03, 1.3, 150),
        Gaussian(9.0),
        SampledGaussian(0.1, 4.0, 6),
        Gaussian(7.0),
        SampledGaussian(0.03, 1.3, 50),
    ]
    assert epsilon(whole, delta=1e-5) == epsilon(split, delta=1e-5)


def test_adding_queries_costs():
    steps = SampledGaussian(0.03, 1.3, 500)
    alone = epsilon([steps], delta=1e-5)
    both = epsilon([steps, Gaussian(6.0)], delta=1e-5)
    assert alone < both < alone + epsilon([Gaussian(6.0)], delta=1e-5)


def test_selection_takes_from_delta():
    steps = SampledGaussian(0.03, 1.3, 500)
    assert epsilon([steps, Selection(4e-6)], delta=1e-5) == epsilon([steps], delta=1e-5 - 4e-6)
    assert epsilon([Selection(4e-6)], delta=1e-5) == 0.0
    assert epsilon([Selection(4e-6), Selection(7e-6)], delta=1e-5) == math.inf
    assert delta([Selection(4e-6)], epsilon=1.0) == 4e-6
    replaced = epsilon([steps, Selection(4e-6)], delta=1e-5, relation=Relation.REPLACE_ONE)
    assert replaced == epsilon([steps], delta=1e-5 - 8e-6, relation=Relation.REPLACE_ONE)


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_replace_one_doubles_the_sensitivity(sigma):
    replaced = epsilon([Gaussian(sigma)], delta=1e-5, relation=Relation.REPLACE_ONE)
    assert replaced == pytest.approx(epsilon([Gaussian(sigma / 2)], delta=1e-5), rel=1e-9)
    sampled = [SampledGaussian(0.05, sigma, 300)]
    assert epsilon(sampled, delta=1e-5, relation=Relation.REPLACE_ONE) > epsilon(sampled, delta=1e-5)


def test_refusals_name_value_rule_and_remedy():
    steps = [SampledGaussian(0.1, 1.0, 10)]
    for wrong in (0.0, 1.0, -1e-9, 5.0, math.nan):
        with pytest.raises(ConfigError, match=r"delta=.*above 0 and below 1.*default"):
            epsilon(steps, delta=wrong)
    with pytest.raises(ConfigError, match=r"10000000 steps.*resolve.*larger delta"):
        epsilon([SampledGaussian(1e-4, 1.0, 10_000_000)], delta=1e-13)
    with pytest.raises(ConfigError, match="epsilon=-1"):
        delta(steps, epsilon=-1.0)
    with pytest.raises(ConfigError, match="query of type str"):
        epsilon(["gaussian"], delta=1e-5)


def test_absl_is_quiet_during_a_call_and_audible_after_it(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        epsilon([SampledGaussian(1e-4, 50.0, 1)], delta=1e-5, accountant=Accountant.RDP)
        assert not caplog.records
        logging.getLogger("absl").warning("audible")
    assert [record.message for record in caplog.records] == ["audible"]
    assert logging.getLogger("absl").level == logging.NOTSET or logging.getLogger("absl").isEnabledFor(logging.WARNING)


SOLVER_GRID = [
    (rate, steps, target, at)
    for rate, steps in ((2e-4, 3_000), (0.004, 1_000), (0.05, 1_000), (0.18, 400), (0.7, 50), (1.0, 100))
    for target in (0.1, 0.7, 3.0, 8.0, 40.0)
    for at in (1e-7, 1e-4)
]


@pytest.mark.parametrize(("rate", "steps", "target", "at"), SOLVER_GRID)
def test_solved_noise_is_never_above_and_close(rate, steps, target, at):
    """F14, and that half a percent less noise would be too little."""
    solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=at)
    spent = epsilon([SampledGaussian(rate, solution.noise_multiplier, steps)], delta=at)
    assert spent == solution.epsilon
    assert 0.999 * target <= spent <= target
    assert epsilon([SampledGaussian(rate, 0.995 * solution.noise_multiplier, steps)], delta=at) > target


def test_solved_noise_takes_one_composition():
    counts = [solve_noise(sample_rate=q, steps=s, epsilon=e, delta=d).evaluations for q, s, e, d in SOLVER_GRID]
    assert np.mean(counts) <= 1.1
    assert max(counts) <= 3


def test_solver_on_random_targets():
    generator = np.random.default_rng(5)
    for _ in range(25):
        rate, steps = float(10 ** generator.uniform(-3.5, 0)), int(10 ** generator.uniform(0, 3.5))
        target, at = float(10 ** generator.uniform(-1, 2)), float(10 ** generator.uniform(-9, -2.5))
        solution = solve_noise(sample_rate=rate, steps=steps, epsilon=target, delta=at)
        assert 0.999 * target <= solution.epsilon <= target, (rate, steps, target, at)
        assert solution.evaluations <= 3, (rate, steps, target, at)


@pytest.mark.parametrize("relation", list(Relation))
def test_solver_leaves_room_for_earlier_queries(relation):
    before = [Gaussian(6.0, 2), Selection(1e-6)]
    alone = solve_noise_multiplier(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, relation=relation)
    sigma = solve_noise_multiplier(
        sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, before=before, relation=relation
    )
    assert sigma > alone
    assert 2.997 <= epsilon([*before, SampledGaussian(0.03, sigma, 800)], delta=1e-5, relation=relation) <= 3.0


def test_solver_by_rdp():
    solution = solve_noise(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5, accountant=Accountant.RDP)
    assert 2.997 <= solution.epsilon <= 3.0
    assert solution.noise_multiplier > solve_noise_multiplier(sample_rate=0.03, steps=800, epsilon=3.0, delta=1e-5)


def test_the_least_noise_that_counts_is_enough():
    """Where the target is not reached with any noise, the answer is the smallest noise multiplier, not a search."""
    solution = solve_noise(sample_rate=1e-6, steps=10, epsilon=1.0, delta=1e-4)
    assert solution.noise_multiplier == SMALLEST_NOISE
    assert solution.evaluations == 1
    assert solution.epsilon == 0.0
    assert solve_noise(sample_rate=0.5, steps=1, epsilon=1e5, delta=1e-4).noise_multiplier == SMALLEST_NOISE
    assert epsilon([SampledGaussian(0.5, 0.999 * SMALLEST_NOISE, 1)], delta=1e-4) == math.inf


def test_nothing_left_for_training():
    with pytest.raises(BudgetExceeded, match=r"epsilon=1.0.*already spend.*raise epsilon"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=1.0, delta=1e-5, before=[Gaussian(2.0)])
    with pytest.raises(BudgetExceeded, match="already spend inf"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=1.0, delta=1e-5, before=[Selection(2e-5)])


def test_almost_nothing_left_for_training():
    used = epsilon([Gaussian(8.0)], delta=1e-5)
    solution = solve_noise(sample_rate=0.03, steps=800, epsilon=used * 1.0005, delta=1e-5, before=[Gaussian(8.0)])
    assert used < solution.epsilon <= used * 1.0005


@pytest.mark.parametrize("factor", [1 + 1e-4, 1 + 1e-7, 1 + 1e-10])
@pytest.mark.parametrize("before", [[Gaussian(8.0)], [Gaussian(30.0, 3), SampledGaussian(0.01, 2.0, 100)]])
def test_next_to_nothing_left_is_solved_or_refused(before, factor):
    used = epsilon(before, delta=1e-5)
    try:
        solution = solve_noise(sample_rate=0.03, steps=800, epsilon=used * factor, delta=1e-5, before=before)
    except ConfigError as error:
        assert "no noise multiplier reaches it in 800 steps" in str(error)  # noqa: PT017
    else:
        assert solution.epsilon <= used * factor
        assert solution.evaluations <= 60


@pytest.mark.parametrize("at", [1e-300, 1e-20])
def test_a_delta_that_is_not_resolved_is_refused_before_any_search(at):
    with pytest.raises(ConfigError, match=r"over 800 steps: below .*resolve"):
        solve_noise(sample_rate=0.03, steps=800, epsilon=3.0, delta=at)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"epsilon": 1e-9}, "epsilon=1e-09: must be from 1e-06"),
        ({"epsilon": 1e9}, "epsilon=1000000000.0: must be from 1e-06"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"delta": 0.0}, "delta=0.0"),
    ],
)
def test_solver_refuses(changes, message):
    arguments = {"sample_rate": 0.03, "steps": 100, "epsilon": 3.0, "delta": 1e-5} | changes
    with pytest.raises(ConfigError, match=message):
        solve_noise(**arguments)
