"""Plans side by side: what they promise, what they cost, and that a bound is kept."""

from __future__ import annotations

import json
import math

import pytest

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy.accounting import Gaussian, Selection
from discreet.privacy.compute import Machine
from discreet.privacy.explaining import what_if
from discreet.privacy.gdp import gdp_mu
from discreet.privacy.options import Kind, Mode
from discreet.privacy.plan import Plan
from discreet.privacy.planner import knee_batch
from discreet.privacy.planner import plan as choose
from discreet.privacy.planning import plan

ADULT = {"examples": 32_561, "epsilon": 3.0}
MACHINE = Machine(seconds_per_example=1e-4, seconds_per_microbatch=1e-3, seconds_per_step=5e-3, parameters=7_106)


def test_three_plans_of_one_promise():
    proposal = plan(**ADULT, usual_steps=300)
    assert [option.kind for option in proposal.options] == [Kind.CHEAP, Kind.KNEE, Kind.MAXIMAL]
    assert proposal.recommended.kind is Kind.KNEE
    assert proposal.mode is Mode.FREE
    for option in proposal.options:
        assert 0.999 * 3.0 <= option.plan.spent() <= 3.0
        assert option.epochs == option.plan.batch_size * option.plan.steps / 32_561
    batches = [option.plan.batch_size for option in proposal.options]
    overheads = [option.overhead for option in proposal.options]
    assert batches == sorted(batches)
    assert overheads == sorted(overheads, reverse=True)


@pytest.mark.parametrize("kind", [Kind.CHEAP, Kind.KNEE, Kind.MAXIMAL])
def test_overheads_are_what_the_names_say_where_the_closed_form_is_exact(kind):
    """Many steps at a small rate: the limit is tight, and the accountant's r is the closed form's to a few percent."""
    proposal = plan(examples=1_281_167, epsilon=8.0, delta=7e-7, steps=18_000, samples=10**11)
    option = next(option for option in proposal.options if option.kind is kind)
    wanted = {Kind.CHEAP: 1.5, Kind.KNEE: 1.05, Kind.MAXIMAL: 1.02}[kind]
    assert option.overhead == pytest.approx(wanted, rel=0.025)


def test_the_recommended_plan_is_the_one_that_training_makes():
    for bound in ({}, {"usual_steps": 300}):
        proposal, made = plan(**ADULT, **bound), choose(**ADULT, **bound)
        assert proposal.plan == made


def test_distances_signal_and_cumulative_noise_by_hand():
    proposal = plan(**ADULT, machine=MACHINE, steps=400, batch_size=1_000, samples=10**9)
    option = proposal.recommended
    assert option.kind is Kind.GIVEN
    nu = option.plan.noise_multiplier / 1_000
    assert option.signal == pytest.approx(1 / (nu * math.sqrt(7_106)))
    assert option.cumulative == pytest.approx(nu / 20)
    assert option.knee_share == pytest.approx(1_000 / knee_batch(examples=32_561, mu=proposal.mu, steps=400))
    assert option.wall_share == pytest.approx(
        1_000 / knee_batch(examples=32_561, mu=proposal.mu, steps=400, overhead=2.0)
    )


def test_cumulative_noise_is_r_e_over_mu_b():
    """`lr nu sqrt(S) = lr r E / (mu B)` at lr = 1 / S, with r over the closed form's floor sqrt(S) / (N mu)."""
    option = plan(examples=1_281_167, epsilon=8.0, delta=7e-7, steps=18_000, samples=10**11).recommended
    mu = gdp_mu(8.0, delta=7e-7)
    epochs, size = option.epochs, option.plan.batch_size
    assert option.cumulative * 18_000 == pytest.approx(option.overhead * epochs / (mu * size), rel=0.01)


def test_published_signals():
    """WRN-16-4 on CIFAR-10, B 4,096, S 2,500: noise over signal is 1.20 at sigma 3 (arXiv:2210.03403), and 1.05 at the
    2.58 that the tighter accountant needs for epsilon 8.
    """
    machine = Machine(seconds_per_example=1.0, parameters=2_750_000)
    option = plan(
        examples=50_000, epsilon=8.0, delta=1e-5, steps=2_500, batch_size=4_096, samples=10**9, machine=machine
    ).recommended
    assert option.signal is not None
    assert 1 / option.signal == pytest.approx(1.05, abs=0.02)


@pytest.mark.parametrize("samples", [3_000, 50_000, 400_000, 10_000_000])
def test_a_bound_on_samples_is_kept_and_used(samples):
    proposal = plan(**ADULT, samples=samples, usual_steps=300)
    chosen = proposal.recommended
    assert proposal.mode is Mode.BOUNDED
    assert chosen.fits
    assert chosen.plan.batch_size * chosen.plan.steps <= samples
    if chosen.kind is Kind.BALANCED:
        assert chosen.plan.batch_size * chosen.plan.steps >= samples - chosen.plan.steps
        assert not next(option for option in proposal.options if option.kind is Kind.KNEE).fits


@pytest.mark.parametrize("compute", ["2s", "30s", "1h"])
def test_a_bound_on_time_is_kept(compute):
    proposal = plan(**ADULT, compute=compute, machine=MACHINE)
    assert proposal.recommended.seconds is not None
    assert proposal.recommended.seconds <= {"2s": 2, "30s": 30, "1h": 3600}[compute]


def test_money_is_time():
    by_money = plan(**ADULT, money=0.01, price_per_hour=3.6, machine=MACHINE)
    by_time = plan(**ADULT, compute="10s", machine=MACHINE)
    assert by_money.plan.batch_size == by_time.plan.batch_size
    assert by_money.recommended.cost is not None
    assert by_money.recommended.cost <= 0.01
    assert by_time.recommended.cost is None


@pytest.mark.parametrize("epochs", [0.5, 3.0, 20.0])
def test_fixed_passes_are_the_same_in_every_plan(epochs):
    proposal = plan(**ADULT, epochs=epochs)
    assert proposal.mode is Mode.EPOCHS
    assert [option.kind for option in proposal.options] == [Kind.SMALL, Kind.BALANCED, Kind.KNEE, Kind.LARGE]
    for option in proposal.options:
        assert option.epochs == pytest.approx(epochs, rel=0.06)
        assert option.fits
    noise = {option.kind: option.cumulative for option in proposal.options}
    assert noise[Kind.LARGE] <= noise[Kind.KNEE] <= noise[Kind.SMALL]
    if epochs > 10:
        assert noise[Kind.LARGE] < noise[Kind.KNEE] < noise[Kind.SMALL]


def test_earlier_queries_are_in_every_plan():
    before = (Gaussian(8.0), Selection(1e-7))
    for option in plan(**ADULT, before=before).options:
        assert option.plan.before == before
        assert option.plan.spent() <= 3.0


def test_more_data_or_epsilon_buy_what_compute_cannot():
    proposal = plan(**ADULT, usual_steps=300)
    found = {item.change: item.factor for item in what_if(proposal.plan, mu=proposal.mu)}
    assert found["twice the compute, as batch"] > 0.95
    assert found["twice the examples"] < 0.6
    assert found["epsilon halved"] > 1.7
    assert found["twice the examples, the same noise"] == pytest.approx(0.46, abs=0.03)


def test_every_number_has_its_reason():
    for option in plan(**ADULT, machine=MACHINE, samples=100_000).options:
        assert set(option.reasons) == {"plan", "batch_size", "steps", "noise_multiplier", "delta", "microbatch"}
        assert all(reason.endswith(".") for reason in option.reasons.values())


def test_warnings_name_what_is_wrong():
    tight = plan(**ADULT, samples=3_000)
    assert any("Beyond the wall" in warning for warning in tight.warnings)
    loud = Machine(seconds_per_example=1e-4, parameters=10**9)
    assert any("as long as the clipped mean" in warning for warning in plan(**ADULT, machine=loud).warnings)
    assert not any("wall" in warning for warning in plan(**ADULT).warnings)


def test_json_holds_plans_that_can_be_read_back():
    record = json.loads(json.dumps(plan(**ADULT, machine=MACHINE).to_json(), allow_nan=False))
    plans = [Plan.from_json(option["plan"]) for option in record["options"]]
    assert plans[1] == plan(**ADULT).plan
    assert record["recommended"] == "knee"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, ConfigError, "epsilon=0.0"),
        ({"epsilon": math.nan}, ConfigError, "epsilon=nan"),
        ({"epsilon": math.inf}, ConfigError, "no noise to weigh"),
        ({"delta": 1 / 32_561}, ConfigError, "below 1 / examples"),
        ({"delta": math.nan}, ConfigError, "delta=nan"),
        ({"batch_size": 32_562}, ConfigError, "32561 examples"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"samples": 0}, ConfigError, "samples=0"),
        ({"samples": 79}, ConfigError, "10 steps of 8 need 80"),
        ({"samples": 1_000, "epochs": 1}, ConfigError, "one way only"),
        ({"epochs": math.nan}, ConfigError, "epochs=nan"),
        ({"epochs": 1e-4}, ConfigError, "10 steps of 8"),
        ({"compute": "5m"}, ConfigError, "discreet.measure"),
        ({"compute": "1ms", "machine": MACHINE}, ConfigError, "90s, 5m"),
        ({"compute": "0.01s", "machine": MACHINE}, ConfigError, "allows"),
        ({"money": 1.0, "machine": MACHINE}, ConfigError, "price_per_hour"),
        ({"money": 1.0, "price_per_hour": 0.0, "machine": MACHINE}, ConfigError, "price_per_hour=0.0"),
        ({"samples": 1_000, "batch_size": 100, "steps": 11}, ConfigError, "more than 1,000 examples"),
        ({"before": (Gaussian(0.1),)}, BudgetExceeded, "already spend"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        plan(**(ADULT | arguments))
    assert "\n" not in str(raised.value)
