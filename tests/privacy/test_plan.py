"""Plan: exact JSON, strict reading, and a promise that is checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.errors import BudgetExceeded, ConfigError
from discreet.privacy import accounting
from discreet.privacy.accounting import Accountant, Gaussian, Relation, SampledGaussian, Selection
from discreet.privacy.plan import CURVE_POINTS, Calibration, Plan, Search, default_delta
from discreet.privacy.repetitions import Repetitions, Stopping


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.solve(
        examples=60_000,
        batch_size=2_000,
        steps=500,
        epsilon=3,
        before=(Gaussian(9.0, 2), Selection(1e-7)),
        notes=("public note",),
    )


def test_solved_plan_keeps_its_promise(plan):
    assert 0.999 * 3 <= plan.spent() <= 3
    assert plan.spent() == accounting.epsilon(plan.queries(), delta=plan.delta)
    assert plan.sample_rate == 2_000 / 60_000
    assert plan.delta == default_delta(60_000) == 60_000**-1.1
    assert plan.queries(7) == (*plan.before, SampledGaussian(plan.sample_rate, plan.noise_multiplier, 7))
    plan.check()


def test_json_round_trip_is_exact(plan, tmp_path):
    record = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert Plan.from_json(record) == plan
    assert Plan.from_json(record).fingerprint() == plan.fingerprint()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert not list(tmp_path.glob("*.tmp"))


@settings(max_examples=100)
@given(
    sigma=st.floats(min_value=1e-300, max_value=1e300),
    epsilon=st.floats(min_value=1e-300, max_value=1e300),
    delta=st.floats(min_value=1e-300, max_value=0.999),
    examples=st.integers(min_value=1, max_value=2**40),
    steps=st.integers(min_value=1, max_value=10**9),
    relation=st.sampled_from(Relation),
    accountant=st.sampled_from(Accountant),
    notes=st.lists(st.text(max_size=5), max_size=2),
)
def test_any_plan_survives_json(sigma, epsilon, delta, examples, steps, relation, accountant, notes):
    plan = Plan(
        examples=examples,
        batch_size=1,
        steps=steps,
        noise_multiplier=sigma,
        epsilon=epsilon,
        delta=delta,
        relation=relation,
        accountant=accountant,
        notes=tuple(notes),
        versions={},
    )
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()


def test_integers_for_floats_make_the_same_plan():
    first = Plan(examples=10, batch_size=2, steps=3, noise_multiplier=1, epsilon=2, delta=0.01, versions={})
    second = Plan(examples=10, batch_size=2, steps=3, noise_multiplier=1.0, epsilon=2.0, delta=0.01, versions={})
    assert first.fingerprint() == second.fingerprint() == Plan.from_json(first.to_json()).fingerprint()


def test_every_field_changes_the_fingerprint(plan):
    changes = {
        "examples": 60_001,
        "batch_size": 2_001,
        "steps": 501,
        "noise_multiplier": math.nextafter(plan.noise_multiplier, 0),
        "epsilon": math.nextafter(3.0, 0),
        "delta": math.nextafter(plan.delta, 0),
        "relation": Relation.REPLACE_ONE,
        "accountant": Accountant.RDP,
        "clipping": {"kind": "abadi", "clip_bound": 1.0},
        "before": (),
        "search": Search(Repetitions(Stopping.LOGARITHMIC, 10)),
        "calibration": Calibration(examples=500, share=0.1, noise_multiplier=9.0, queries=8, bound=4.0),
        "notes": (),
        "versions": {},
    }
    assert set(changes) == {item.name for item in dataclasses.fields(Plan)}
    prints = {dataclasses.replace(plan, **{name: value}).fingerprint() for name, value in changes.items()}
    assert len(prints | {plan.fingerprint()}) == len(changes) + 1


def test_no_noise_is_the_string_inf():
    plan = Plan.solve(examples=100, batch_size=10, steps=5, epsilon=math.inf)
    assert plan.noise_multiplier == 0.0
    assert plan.to_json()["epsilon"] == "inf"
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.spent() == math.inf
    assert plan.spent(0) == 0.0
    plan.check()


def test_plan_from_noise_promises_what_it_spends():
    plan = Plan.solve(examples=1_000, batch_size=50, steps=100, noise_multiplier=2.0)
    assert plan.epsilon == plan.spent() > 0
    plan.check()
    assert Plan.solve(examples=1_000, batch_size=50, steps=100, noise_multiplier=0).epsilon == math.inf


@pytest.mark.parametrize("arguments", [{}, {"epsilon": 1.0, "noise_multiplier": 1.0}])
def test_exactly_one_of_epsilon_and_noise(arguments):
    with pytest.raises(ConfigError, match="exactly one"):
        Plan.solve(examples=100, batch_size=10, steps=5, **arguments)


def test_weakened_plan_is_refused(plan):
    weakened = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 0.98)
    with pytest.raises(BudgetExceeded, match=r"above the target 3\.0"):
        weakened.check()


def test_missing_unknown_and_ill_typed_fields_are_named(plan):
    good = plan.to_json()
    for name in good:
        with pytest.raises(ConfigError, match=f"'{name}' is missing"):
            Plan.from_json({key: value for key, value in good.items() if key != name})
        with pytest.raises(ConfigError, match=name):
            Plan.from_json(good | {name: None})
    with pytest.raises(ConfigError, match="'seed' is unknown"):
        Plan.from_json(good | {"seed": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": 1.0}, "'examples'"),
        ({"batch_size": True}, "'batch_size'"),
        ({"steps": "5"}, "'steps'"),
        ({"steps": 0}, "steps=0"),
        ({"epsilon": "infinity"}, "'epsilon'"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"epsilon": math.inf}, "'epsilon'"),
        ({"epsilon": "inf"}, "no noise means epsilon=inf"),
        ({"noise_multiplier": 0.0}, "no noise means epsilon=inf"),
        ({"noise_multiplier": math.nan}, "'noise_multiplier'"),
        ({"delta": 0}, r"delta=0\.0"),
        ({"delta": 1.0}, r"delta=1\.0"),
        ({"relation": "swap"}, "'relation'"),
        ({"accountant": "moments"}, "'accountant'"),
        ({"clipping": {"kind": []}}, "'clipping'"),
        ({"before": {}}, "'before'"),
        ({"before": [{"type": "laplace"}]}, "laplace"),
        ({"notes": [1]}, "'notes'"),
        ({"versions": {"python": 3}}, "'versions'"),
        ({"format": 2}, "format 2"),
    ],
)
def test_strict_reading(plan, changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(plan.to_json() | changes)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": 1, "a": 2}', '{"epsilon": NaN}', "\x00"])
def test_unreadable_files_are_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="plan"):
        Plan.load(path)
    with pytest.raises(ConfigError, match=r"missing\.json"):
        Plan.load(tmp_path / "missing.json")


def test_curve_rises_to_what_is_spent(plan):
    curve = plan.curve(8)
    assert curve[0] == (0, plan.spent(0))
    assert curve[-1] == (500, plan.spent())
    assert all(low[0] < high[0] and low[1] < high[1] for low, high in itertools.pairwise(curve))


def test_cheap_bound_is_a_close_upper_bound(plan):
    bounds = [plan.spent_at_most(steps) for steps in range(plan.steps + 1)]
    assert bounds[0] == plan.spent(0)
    assert bounds[-1] == plan.spent()
    assert all(low <= high for low, high in itertools.pairwise(bounds))
    assert len(set(bounds)) <= CURVE_POINTS + 1
    for steps in range(0, 501, 25):
        assert plan.spent(steps) <= bounds[steps] <= plan.spent(steps) + 2 * plan.spent() / CURVE_POINTS


def test_default_delta_needs_examples():
    with pytest.raises(ConfigError, match="examples=1"):
        default_delta(1)


def test_plans_can_be_hashed_and_frozen(plan):
    assert hash(plan) == hash(dataclasses.replace(plan))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.steps = 1


def test_versions_name_what_the_guarantee_rests_on(plan):
    assert {"python", "discreet", "torch", "dp-accounting"} <= set(plan.versions)
