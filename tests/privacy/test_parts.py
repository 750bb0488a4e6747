"""Examples that were set apart: of their queries and all others the larger epsilon counts, and no ledger forgets it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from scipy import stats

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.accounting import (
    Accountant,
    Gaussian,
    HeldOut,
    Relation,
    Repeated,
    SampledGaussian,
    Selection,
    delta,
    epsilon,
    query_from_json,
    query_to_json,
)
from discreet.privacy.certificate import TEMPERATURE_NOTE, temperature_of, write_certificate
from discreet.privacy.ledger import Ledger, key_id
from discreet.privacy.plan import Calibration, Plan
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.spending import is_part_of
from discreet.privacy.verification import verify

STEPS = SampledGaussian(0.05, 1.2, 100)
APART = HeldOut("calibration", 10.0, 8)
DELTA = 1e-5


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("apart", [HeldOut("a", 30.0), HeldOut("a", 1.0), HeldOut("a", 4.0, 8)])
def test_the_larger_of_part_and_rest_counts(accountant, apart):
    rest = epsilon([STEPS], delta=DELTA, accountant=accountant)
    alone = epsilon([Gaussian(apart.noise_multiplier, apart.count)], delta=DELTA, accountant=accountant)
    both = epsilon([STEPS, apart], delta=DELTA, accountant=accountant)
    assert both == pytest.approx(max(rest, alone), rel=1e-12)
    assert both < epsilon([STEPS, Gaussian(apart.noise_multiplier, apart.count)], delta=DELTA, accountant=accountant)


def test_queries_of_one_part_compose_and_parts_do_not():
    one = HeldOut("a", 5.0, 4)
    assert epsilon([one, one], delta=DELTA) == pytest.approx(epsilon([HeldOut("a", 5.0, 8)], delta=DELTA))
    assert epsilon([one, one], delta=DELTA) > epsilon([one], delta=DELTA)
    assert epsilon([one, HeldOut("b", 5.0, 4)], delta=DELTA) == epsilon([one], delta=DELTA)


def test_a_replaced_example_may_leave_one_part_for_another():
    """Removed here and added there: two Gaussian queries, of mu 1 / s and 1 / t, are one of sqrt(1 / s^2 + 1 / t^2)."""
    rest, part = Gaussian(2.0), HeldOut("a", 2.0)
    replaced = epsilon([rest, part], delta=DELTA, relation=Relation.REPLACE_ONE)
    inside = epsilon([rest], delta=DELTA, relation=Relation.REPLACE_ONE)
    crossing = epsilon([rest, Gaussian(2.0)], delta=DELTA)
    # Equal noise: staying inside moves a sum by 2, crossing moves two sums by 1 each, which is less.
    assert crossing < inside
    assert replaced == pytest.approx(inside, rel=1e-12)
    # Steps on small batches, where a replacement costs little more than a removal: crossing costs the most.
    steps, part = SampledGaussian(0.02, 1.0, 200), HeldOut("a", 1.0 / 0.6)
    sides = [
        epsilon([steps], delta=DELTA, relation=Relation.REPLACE_ONE),
        epsilon([Gaussian(1.0 / 0.6)], delta=DELTA, relation=Relation.REPLACE_ONE),
        epsilon([steps, Gaussian(1.0 / 0.6)], delta=DELTA),
    ]
    assert epsilon([steps, part], delta=DELTA, relation=Relation.REPLACE_ONE) == pytest.approx(max(sides), rel=1e-9)


def test_two_parts_can_be_crossed_too():
    parts = [HeldOut("a", 3.0), HeldOut("b", 3.0)]
    crossing = epsilon([Gaussian(3.0), Gaussian(3.0)], delta=DELTA)
    inside = epsilon([Gaussian(3.0)], delta=DELTA, relation=Relation.REPLACE_ONE)
    found = epsilon(parts, delta=DELTA, relation=Relation.REPLACE_ONE)
    assert found == pytest.approx(max(crossing, inside), rel=1e-12)


def test_delta_is_that_of_the_worse_side():
    found = delta([Gaussian(1.0), HeldOut("a", 0.8)], epsilon=1.0)
    mu = 1 / 0.8
    exact = stats.norm.cdf(mu / 2 - 1 / mu) - math.e * stats.norm.cdf(-mu / 2 - 1 / mu)
    assert found == pytest.approx(exact, rel=1e-6)


def test_edges():
    assert epsilon([HeldOut("a", 0.0)], delta=DELTA) == math.inf
    assert epsilon([HeldOut("a", 0.001)], delta=DELTA) == math.inf
    assert epsilon([HeldOut("a", 1.0, 0)], delta=DELTA) == 0
    assert epsilon([STEPS, HeldOut("a", 1.0, 0)], delta=DELTA) == epsilon([STEPS], delta=DELTA)
    with pytest.raises(ConfigError, match="part"):
        HeldOut("", 1.0)
    with pytest.raises(ConfigError, match="must be a Gaussian one"):
        Repeated((HeldOut("a", 1.0),), Repetitions(Stopping.LOGARITHMIC, 3))
    # A part does not use up the delta of names that were told of the rest, and the other way round.
    told = epsilon([Gaussian(3.0), Selection(5e-6), HeldOut("a", 30.0)], delta=DELTA)
    assert told == pytest.approx(epsilon([Gaussian(3.0), Selection(5e-6)], delta=DELTA), rel=1e-12)


def test_the_record_of_a_part_is_read_back():
    assert query_from_json(query_to_json(APART)) == APART
    for broken in ({"part": 3}, {"part": ""}, {"part": None}):
        with pytest.raises(ConfigError, match="part"):
            query_from_json(query_to_json(APART) | broken)
    with pytest.raises(ConfigError, match="fields"):
        query_from_json({name: value for name, value in query_to_json(APART).items() if name != "part"})


def _plan(**changes):
    calibration = Calibration(examples=500, share=0.1, noise_multiplier=12.0, queries=8, bound=4.0)
    plan = Plan.solve(examples=4000, batch_size=200, steps=20, epsilon=3.0, delta=1e-5)
    return dataclasses.replace(plan, **{"calibration": calibration, **changes})


def test_a_plan_with_a_part_is_read_back_and_keeps_its_epsilon():
    plan = _plan()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.check()
    bare = dataclasses.replace(plan, calibration=None)
    assert plan.spent() == bare.spent()
    assert "calibration" not in bare.to_json()
    assert plan.queries(19) == bare.queries(19)
    assert plan.queries()[-1] == plan.calibration.query()
    dear = dataclasses.replace(plan.calibration, noise_multiplier=1.0)
    assert dataclasses.replace(plan, calibration=dear).spent() > 3.0
    assert is_part_of(plan.queries(), plan)
    assert not is_part_of((*plan.queries(), plan.calibration.query()), plan)
    assert not is_part_of(plan.queries(), bare)


@pytest.mark.parametrize(
    "broken", [{"share": 0.0}, {"share": 1.5}, {"examples": -1}, {"bound": 0.0}, {"noise_multiplier": "x"}, {"more": 1}]
)
def test_a_broken_part_is_refused(broken):
    record = _plan().to_json()
    record["calibration"] = record["calibration"] | broken
    with pytest.raises(ConfigError, match="calibration"):
        Plan.from_json(record)


@pytest.fixture
def finished(tmp_path):
    """A finished run without a model, with a temperature in its ledger and its release."""
    plan = _plan()
    (tmp_path / "release").mkdir()
    plan.save(tmp_path / "release" / "plan.json")
    name = key_id(bytes(32))
    with Ledger.create(tmp_path / "ledger.jsonl", plan=plan, key_id=name, test_mode=False) as ledger:
        ledger.reserve_steps(first=0, count=20)
        assert ledger.reserve_query("calibration", plan.calibration.query())
        assert not ledger.reserve_query("calibration", plan.calibration.query())
        ledger.note(TEMPERATURE_NOTE, {"temperature": 1.75, "key_id": name})
        ledger.finish()
    (tmp_path / "release" / "temperature.json").write_text(json.dumps({"temperature": 1.75}))
    write_certificate(tmp_path)
    return tmp_path


def test_verify_re_derives_the_larger_epsilon_and_says_so(finished):
    found = verify(finished)
    plan = _plan()
    assert found.epsilon == plan.spent() <= 3.0
    assert found.temperature == 1.75
    assert "500 further examples" in found.statement
    assert "parallel composition" in found.statement
    record = json.loads((finished / "release" / "certificate.json").read_text())
    assert record["epsilon"] == pytest.approx(max(record["epsilon_training"], record["epsilon_calibration"]))
    assert record["epsilon_calibration"] == pytest.approx(epsilon([_apart_of(plan)], delta=plan.delta))
    assert record["calibration"]["charged"] is True


def _apart_of(plan):
    return Gaussian(plan.calibration.noise_multiplier, plan.calibration.queries)


@pytest.mark.parametrize("text", ['{"temperature": 1.5}', "{}", "[1.75]", "nonsense", '{"temperature": "1.75"}'])
def test_another_temperature_is_distrusted(finished, text):
    (finished / "release" / "temperature.json").write_text(text)
    with pytest.raises(LedgerError, match=r"temperature\.json"):
        verify(finished)


def test_a_certificate_that_understates_a_part_is_distrusted(finished):
    path = finished / "release" / "certificate.json"
    record = json.loads(path.read_text())
    for name, value in (("epsilon_calibration", 0.1), ("epsilon_training", 0.1), ("calibration", {})):
        path.write_text(json.dumps(record | {name: value}))
        with pytest.raises(LedgerError, match=name):
            verify(finished)


def test_a_temperature_of_an_earlier_key_does_not_count(tmp_path):
    plan = _plan()
    first, second = key_id(bytes(32)), key_id(bytes([1]) * 32)
    with Ledger.create(tmp_path / "ledger.jsonl", plan=plan, key_id=first, test_mode=False) as ledger:
        ledger.reserve_query("calibration", plan.calibration.query())
        ledger.note(TEMPERATURE_NOTE, {"temperature": 1.75, "key_id": first})
    with Ledger.resume(tmp_path / "ledger.jsonl", key_id=second) as ledger:
        assert temperature_of(ledger) is None
        # Under another key the same questions are others, and are charged again.
        spent = ledger.epsilon()
        ledger.reserve_query("calibration", plan.calibration.query())
        assert ledger.epsilon() > spent
