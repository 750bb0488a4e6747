"""The certificate: a function of plan and ledger, and every way of tampering with a run is detected and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import pytest

from discreet.errors import LedgerError
from discreet.privacy.accounting import Accountant, Gaussian, Relation, SampledGaussian, epsilon
from discreet.privacy.certificate import (
    MODEL_NAME,
    NOT_COVERED,
    NOT_PRIVATE_STAMP,
    TEMPERATURE_NAME,
    certificate,
    rounded_up,
    write_certificate,
)
from discreet.privacy.chain import Record
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from discreet.privacy.verification import verify

PLAN_FILE, LEDGER_FILE, CERTIFICATE_FILE = "release/plan.json", "ledger.jsonl", "release/certificate.json"


def _run(folder, *, plan=None, steps=30, test_mode=False, finish=True):
    """A run directory as training leaves it."""
    plan = plan or Plan.solve(examples=500, batch_size=50, steps=30, epsilon=2.0, before=(Gaussian(12.0),))
    (folder / "release").mkdir(parents=True)
    plan.save(folder / PLAN_FILE)
    ledger = Ledger.create(
        folder / LEDGER_FILE, plan=plan, key_id="key-1", test_mode=test_mode, facts={"device": "cpu"}
    )
    for index, query in enumerate(plan.before):
        ledger.reserve_query(f"query {index}", query)
    for first in range(0, steps, 10):
        ledger.reserve_steps(first=first, count=10)
    if finish:
        ledger.finish()
    ledger.close()
    write_certificate(folder)
    return folder, plan


@pytest.fixture
def run(tmp_path):
    return _run(tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.998641, "2.99865"),
        (2.99864, "2.99864"),
        (0.1, "0.1"),
        (8.000000001, "8.00001"),
        (1.2345671e-9, "1.23457e-09"),
    ],
)
def test_a_claim_is_rounded_up_in_its_last_digit(value, shown):
    assert rounded_up(value) == shown


def test_verification_of_an_honest_run(run):
    folder, plan = run
    found = verify(folder)
    assert found.epsilon == plan.spent() == epsilon(plan.queries(), delta=plan.delta)
    assert found.delta == plan.delta
    assert found.private
    assert found.finished
    assert (found.steps, found.records) == (30, 6)
    assert found.head == Ledger.read(folder / LEDGER_FILE).head
    assert found.plan_fingerprint == plan.fingerprint()
    assert found.statement.startswith("(1.99")
    assert NOT_PRIVATE_STAMP not in found.statement


def test_certificate_is_a_function_of_plan_and_ledger(run):
    folder, plan = run
    before = (folder / CERTIFICATE_FILE).read_bytes()
    write_certificate(folder)
    assert (folder / CERTIFICATE_FILE).read_bytes() == before
    assert json.loads(before) == certificate(plan, Ledger.read(folder / LEDGER_FILE))


def test_certificate_says_what_a_reader_needs(run):
    folder, plan = run
    record = json.loads((folder / CERTIFICATE_FILE).read_text())
    assert record["private"] is True
    assert record["stamp"] == ""
    assert record["epsilon"] <= record["epsilon_target"] == 2.0
    assert record["relation"]["name"] == "add_remove"
    assert record["accountant"]["name"] == "pld"
    assert record["mechanism"]["noise_multiplier"] == plan.noise_multiplier
    assert record["mechanism"]["clipping"]["clip_bound"] == 1.0
    assert record["sampling"] == record["sampling"] | {"examples": 500, "batch_size": 50, "sample_rate": 0.1}
    assert record["steps"] == {"planned": 30, "charged": 30}
    assert {"type": "gaussian", "noise_multiplier": 12.0, "count": 1} in record["queries"]
    assert "one example" in record["unit"]
    assert record["versions"] == plan.versions
    assert len(record["not_covered"]) == len(NOT_COVERED) >= 8
    covered = " ".join(record["not_covered"]).lower()
    for word in ("test set", "hyper-parameter", "number of training examples", "schema", "timing"):
        assert word in covered


def test_stated_epsilon_is_not_rounded_in_its_own_favour(run):
    folder, plan = run
    stated = float(verify(folder).statement[1:].split(",")[0])
    assert plan.spent() <= stated <= plan.spent() * (1 + 1e-5)


def test_seeded_run_is_stamped_everywhere(tmp_path):
    folder, _ = _run(tmp_path / "run", test_mode=True)
    record = json.loads((folder / CERTIFICATE_FILE).read_text())
    found = verify(folder)
    assert not found.private
    assert record["private"] is False
    assert NOT_PRIVATE_STAMP in found.statement
    assert record["stamp"] == NOT_PRIVATE_STAMP
    assert NOT_PRIVATE_STAMP in record["noise"]["source"]


def test_run_without_noise_is_stamped(tmp_path):
    folder, _ = _run(tmp_path / "run", plan=Plan.solve(examples=500, batch_size=50, steps=30, epsilon=math.inf))
    record = json.loads((folder / CERTIFICATE_FILE).read_text())
    found = verify(folder)
    assert not found.private
    assert found.epsilon == math.inf
    assert record["private"] is False
    assert record["epsilon"] == record["epsilon_target"] == "inf"
    assert record["stamp"] == NOT_PRIVATE_STAMP
    assert NOT_PRIVATE_STAMP in found.statement


def test_run_that_stopped_early_certifies_what_it_spent(tmp_path):
    folder, plan = _run(tmp_path / "run", steps=10, finish=False)
    found = verify(folder)
    assert found.epsilon == plan.spent(10) < plan.spent()
    assert not found.finished


@pytest.mark.parametrize(
    ("relation", "accountant"),
    [
        (Relation.REPLACE_ONE, Accountant.PLD),
        (Relation.ADD_REMOVE, Accountant.RDP),
    ],
)
def test_other_relations_and_accountants_are_named_and_used(tmp_path, relation, accountant):
    plan = Plan.solve(examples=500, batch_size=50, steps=30, epsilon=2.0, relation=relation, accountant=accountant)
    folder, _ = _run(tmp_path / "run", plan=plan)
    record = json.loads((folder / CERTIFICATE_FILE).read_text())
    assert record["relation"]["name"] == relation.value
    assert record["accountant"]["name"] == accountant.value
    expected = epsilon(
        [SampledGaussian(0.1, plan.noise_multiplier, 30)], delta=plan.delta, relation=relation, accountant=accountant
    )
    assert verify(folder).epsilon == expected


def _with_model(folder, *, temperature=None):
    """A run that released a model of these bytes, and perhaps a temperature."""
    _run(folder, finish=False)
    (folder / MODEL_NAME).write_bytes(b"weights")
    with Ledger.resume(folder / LEDGER_FILE, key_id="key-1") as ledger:
        if temperature is not None:
            ledger.note("temperature", {**temperature, "key_id": "key-1"})
            (folder / TEMPERATURE_NAME).write_text(json.dumps(temperature))
        ledger.finish({"model_sha256": hashlib.sha256(b"weights").hexdigest()})
    write_certificate(folder)


def test_it_is_said_whether_the_model_was_compared(tmp_path, run):
    """A model under another name, or none at all, gave the same answer as the one that was certified."""
    assert verify(run[0]).to_json()["model"] == "none was released"
    _with_model(tmp_path / "with")
    model = tmp_path / "with" / MODEL_NAME
    assert verify(tmp_path / "with").to_json()["model"] == "the one that was certified"
    model.write_bytes(b"weights of another")
    with pytest.raises(LedgerError, match="is not the model that the ledger ended with"):
        verify(tmp_path / "with")
    model.unlink()
    assert verify(tmp_path / "with").to_json()["model"] == "not compared: there is no release/model.safetensors"
    model.mkdir()
    with pytest.raises(LedgerError, match="is not the model that the ledger ended with"):
        verify(tmp_path / "with")


def test_every_edited_field_of_a_temperature_is_seen(tmp_path):
    facts = {"temperature": 1.5, "noise_std": 0.1, "private": True, "examples_are": "public", "sampling_std": None}
    _with_model(tmp_path / "run", temperature=facts)
    file = tmp_path / "run" / TEMPERATURE_NAME
    assert verify(tmp_path / "run").temperature == 1.5
    for name, value in facts.items():
        file.write_text(json.dumps(facts | {name: _other(value)}))
        with pytest.raises(LedgerError, match="is not the temperature in the ledger"):
            verify(tmp_path / "run")
        file.write_text(json.dumps({key: facts[key] for key in facts if key != name}))
        with pytest.raises(LedgerError, match="is not the temperature in the ledger"):
            verify(tmp_path / "run")


def test_every_changed_ledger_line_is_named(run):
    folder, _ = run
    lines = (folder / LEDGER_FILE).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        changed = (
            line.replace(b'":', b'" :', 1) if b'"count":10' not in line else line.replace(b'"count":10', b'"count":1')
        )
        (folder / LEDGER_FILE).write_bytes(b"".join([*lines[: number - 1], changed, *lines[number:]]))
        with pytest.raises(LedgerError, match=rf"ledger line {number}\b"):
            verify(folder)


def test_shortened_and_lengthened_ledgers_are_seen(run):
    folder, _ = run
    path = folder / LEDGER_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        with pytest.raises(
            LedgerError, match=rf"has {count} records, the certificate was written for 6; records were cut off"
        ):
            verify(folder)
    path.write_bytes(b"".join(lines[:5]))
    with Ledger.resume(path, key_id="key-1") as ledger:
        ledger.note("one")
    with pytest.raises(LedgerError, match="has 7 records"):
        verify(folder)


def test_rewritten_ledger_of_the_same_length_is_seen(run):
    """Somebody makes a whole new ledger, with fewer steps and a valid chain: its head is not the certified one."""
    folder, plan = run
    path = folder / LEDGER_FILE
    path.unlink()
    ledger = Ledger.create(path, plan=plan, key_id="key-1", test_mode=False, facts={"device": "cpu"})
    ledger.reserve_query("query 0", Gaussian(12.0))
    for first in (0, 1, 2):
        ledger.reserve_steps(first=first, count=1)
    ledger.finish()
    with pytest.raises(LedgerError, match=r"certificate\.json: field '(epsilon|ledger)' does not follow"):
        verify(folder)


def test_unfinished_line_is_seen(run):
    folder, _ = run
    with open(folder / LEDGER_FILE, "ab") as file:
        file.write(b'{"body"')
    for check in (verify, write_certificate):
        with pytest.raises(LedgerError, match="line 7 is unfinished"):
            check(folder)


def _other(value):
    """Some other value of the same JSON type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 0.99
    if isinstance(value, str):
        return value + "x"
    return value[:-1] if isinstance(value, list) else {}


def test_every_edited_certificate_field_is_named(run):
    folder, _ = run
    path = folder / CERTIFICATE_FILE
    good = json.loads(path.read_text())
    for name, value in good.items():
        if name == "preprocessing_planned":
            assert value
        path.write_text(json.dumps(good | {name: _other(value)}))
        with pytest.raises(LedgerError, match=rf"certificate\.json: .*('{name}'|'finished' is missing)"):
            verify(folder)
        path.write_text(json.dumps({key: item for key, item in good.items() if key != name}))
        with pytest.raises(LedgerError, match=f"'{name}' is missing"):
            verify(folder)
    path.write_text(json.dumps(good | {"approved": True}))
    with pytest.raises(LedgerError, match="'approved' is unknown"):
        verify(folder)


def test_epsilon_may_differ_by_rounding_only(run):
    folder, _ = run
    path = folder / CERTIFICATE_FILE
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"epsilon": good["epsilon"] * (1 - 1e-9)}))
    verify(folder)
    for wrong in (good["epsilon"] * (1 - 1e-5), "inf", True, None):
        path.write_text(json.dumps(good | {"epsilon": wrong}))
        with pytest.raises(LedgerError, match="'epsilon'"):
            verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epsilon": NaN}', '{"a": 1, "a": 1}', "\u00e9"])
def test_unreadable_certificates_are_named(run, text):
    folder, _ = run
    (folder / CERTIFICATE_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(LedgerError, match=r"certificate\.json"):
        verify(folder)


def test_missing_files_are_named(run):
    folder, _ = run
    for name in (CERTIFICATE_FILE, PLAN_FILE, LEDGER_FILE):
        (folder / name).unlink()
        with pytest.raises(LedgerError, match=name.split("/")[-1].replace(".", r"\.")):
            verify(folder)


def test_every_edited_plan_field_is_named(run):
    folder, plan = run
    changes = {
        "examples": 501,
        "batch_size": 51,
        "steps": 29,
        "noise_multiplier": plan.noise_multiplier * 2,
        "epsilon": 2.5,
        "delta": plan.delta * 2,
        "relation": Relation.REPLACE_ONE,
        "accountant": Accountant.RDP,
        "clipping": {"kind": "abadi"},
        "before": (),
        "notes": ("x",),
        "versions": {},
    }
    for name, value in changes.items():
        dataclasses.replace(plan, **{name: value}).save(folder / PLAN_FILE)
        with pytest.raises(LedgerError, match=rf"plan\.json: field '{name}' differs"):
            verify(folder)


def test_plan_and_ledger_weakened_together_are_seen(tmp_path):
    """A forged pair whose noise does not keep the plan's epsilon has a valid chain and certificate, and is refused."""
    folder, plan = _run(tmp_path / "run")
    weak = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 2)
    forged = tmp_path / "forged"
    (forged / "release").mkdir(parents=True)
    weak.save(forged / PLAN_FILE)
    opening = json.loads((folder / LEDGER_FILE).read_text().splitlines()[0])["body"]
    first = Record.after(
        None, kind="open", body=opening | {"plan": weak.to_json(), "plan_fingerprint": weak.fingerprint()}
    )
    body = {"key_id": "key-1", "first": 0, "count": 30, "sample_rate": 0.1, "noise_multiplier": weak.noise_multiplier}
    second = Record.after(first, kind="steps", body=body)
    (forged / LEDGER_FILE).write_bytes(first.line() + second.line())
    write_certificate(forged)
    with pytest.raises(LedgerError, match=r"above the plan's 2\.0"):
        verify(forged)


def _under_way(folder):
    folder, plan = _run(folder, steps=20, finish=False)
    (folder / CERTIFICATE_FILE).unlink()
    return folder, plan


def test_a_run_under_way_is_verified_from_plan_and_ledger(tmp_path):
    folder, plan = _under_way(tmp_path / "run")
    found = verify(folder)
    assert not found.finished
    assert found.epsilon == plan.spent(20)
    assert found.steps == 20
    assert found.statement.startswith("NOT FINISHED")


def test_a_run_under_way_is_verified_strictly(tmp_path):
    folder, _ = _under_way(tmp_path / "run")
    content = (folder / LEDGER_FILE).read_text()
    (folder / LEDGER_FILE).write_text(content.replace('"count":10', '"count":9', 1))
    with pytest.raises(LedgerError, match="ledger line 3"):
        verify(folder)


def test_a_finished_run_does_not_pass_for_one_under_way(run):
    """Whoever cuts the end off the ledger and removes the certificate still has the model to explain."""
    folder, _ = run
    (folder / "release" / "model.safetensors").write_bytes(b"")
    (folder / CERTIFICATE_FILE).unlink()
    with pytest.raises(LedgerError, match="is missing although the run has ended; ask its owner for it"):
        verify(folder)
    lines = (folder / LEDGER_FILE).read_text().splitlines(keepends=True)
    (folder / LEDGER_FILE).write_text("".join(lines[:-2]))
    with pytest.raises(LedgerError, match="records were cut off"):
        verify(folder)


@pytest.mark.parametrize("garbage", [b"garbage\n", b"\xff"], ids=["text", "bytes"])
@pytest.mark.parametrize("name", [PLAN_FILE, CERTIFICATE_FILE])
def test_a_damaged_file_has_one_name_and_one_remedy(run, name, garbage):
    folder, _ = run
    (folder / name).write_bytes(garbage)
    with pytest.raises(LedgerError) as refusal:
        verify(folder)
    told = str(refusal.value)
    assert told.count("json:") == 1
    assert told.startswith(f"{name}: ")
    assert told.count("restore") == 1


def test_a_missing_plan_is_one_sentence(run):
    folder, _ = run
    (folder / PLAN_FILE).unlink()
    with pytest.raises(LedgerError) as refusal:
        verify(folder)
    assert str(refusal.value) == f"{PLAN_FILE}: is missing; ask the owner of the run for it."


def test_what_is_not_checked_is_named(run, tmp_path):
    folder, _ = run
    assert verify(folder).unchecked == ()
    for name in ("report.html", "result.json"):
        (folder / "release" / name).write_text("{}")
    assert verify(folder).to_json()["unchecked"] == ["report.html", "result.json"]
    # Nothing compares a temperature before the end.
    open_folder, _ = _under_way(tmp_path / "open")
    (open_folder / "release" / "temperature.json").write_text("{}")
    assert verify(open_folder).unchecked == ("temperature.json",)
