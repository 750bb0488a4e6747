"""The certificate: what a finished run may claim, derived from its plan and its ledger, and re-derived by anyone.

Nothing here sees data or model. `write_certificate` is a function of two public files, so that `verify` can write the
same certificate again and name whatever differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.accounting import Accountant, HeldOut, Query, Relation, query_to_json
from discreet.privacy.accounting import epsilon as compose_epsilon
from discreet.privacy.files import file_digest, write_atomically
from discreet.privacy.ledger import Ledger, LedgerView
from discreet.privacy.plan import Plan
from discreet.privacy.records import Fields, parse_json

FORMAT = 1
LEDGER_NAME = "ledger.jsonl"
PLAN_NAME = "release/plan.json"
CERTIFICATE_NAME = "release/certificate.json"
MODEL_NAME = "release/model.safetensors"
TEMPERATURE_NAME = "release/temperature.json"
TEMPERATURE_NOTE = "temperature"
REPORT_KIND = "calibration_report"
"""Kind of the clipping record of a plan whose one step is a calibration report, and no update of a model."""
NOT_PRIVATE_STAMP = "NOT PRIVATE"
UNFINISHED = "NOT FINISHED, what is reserved so far"
EPSILON_TOLERANCE = 1e-6
"""Relative difference allowed between two derivations of epsilon: other versions of the numerical packages."""
_EPSILONS = ("epsilon", "epsilon_calibration", "epsilon_training")

NOT_COVERED = (
    "Evaluation on a test set: its examples are outside the guarantee, unless they are also training examples.",
    "Choices made outside this run, such as hyper-parameters or models compared on the same data.",
    "The number of training examples and of those that a public hash sets apart, and the expected batch size, all "
    "treated as public.",
    "The schema and other facts given as public: column types, bounds, categories, class names.",
    "Side channels (timing, memory, power), and whoever can read the process or the private half of the run directory.",
    "Persons with several examples: the unit is one example, and k examples of one person are protected k times less.",
    "Several releases from the same data: each run's epsilon adds to the others.",
    "Conclusions about a person that hold without the person's example, such as correlations in the population.",
    "The code that was trained: a model or loss that mixes examples in ways the self-check did not meet.",
    "A ledger kept by a dishonest owner: whoever can rewrite every file can also rewrite this one.",
)
"""What the guarantee does not say. Every certificate carries the whole list."""

_RELATIONS = {
    Relation.ADD_REMOVE: "neighbours differ by adding or removing one example",
    Relation.REPLACE_ONE: "neighbours differ by replacing one example by another",
}
_ACCOUNTANTS = {
    Accountant.PLD: "privacy loss distributions, connect-the-dots discretisation (dp-accounting); an upper bound",
    Accountant.RDP: "Renyi differential privacy, converted as in arXiv:1905.09982 (dp-accounting); an upper bound",
}


@dataclass(frozen=True)
class Verification:
    """What `verify` found to hold.

    Attributes:
        epsilon, delta: re-derived from the ledger. private: False for seeded test runs and runs without noise.
        steps: distinct (key, step) pairs charged. records: number of ledger records. head: hash of the last one.
        examples, batch_size, noise_multiplier: of the plan. target_epsilon: what the plan allowed.
        plan_fingerprint: SHA-256 of the plan. finished: the ledger was closed for good.
        statement: the claim in one sentence.
        temperature: what the model's logits are to be divided by, released with it; None when none was fitted.
    """

    epsilon: float
    delta: float
    private: bool
    steps: int
    records: int
    head: str
    examples: int
    batch_size: int
    noise_multiplier: float
    target_epsilon: float
    plan_fingerprint: str
    finished: bool
    statement: str
    temperature: float | None = None


def write_certificate(run_dir: Path | str) -> Path:
    """Derive ``release/certificate.json`` from ``release/plan.json`` and ``ledger.jsonl``. Call it after
    `Ledger.finish`.

    Returns:
        The path of the certificate.

    Raises:
        LedgerError: the ledger is damaged, has an unfinished line, or belongs to another plan.
    """
    run_dir = Path(run_dir)
    plan, ledger = _read_run(run_dir)
    path = run_dir / CERTIFICATE_NAME
    text = json.dumps(certificate(plan, ledger), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise LedgerError(
            f"{path}: cannot be written ({error.strerror}); free some space and write it again."
        ) from None
    return path


def verify(run_dir: Path | str) -> Verification:
    """Re-derive the certificate of a run from its ledger and plan, and compare, without the data.

    **Guarantees.** Raises unless every ledger line is intact and in order, the ledger is the one the certificate was
    written for (same head, same number of records), the plan is the ledger's, the composition of all reservations gives
    the certified epsilon, no field of the certificate differs from its derivation, and the model, if it is there, is
    the one that was released. Figures, curves and the report page are not bound to it. A run that has not ended has no
    certificate yet: what is reserved so far follows from its ledger and plan, and the statement says that it is
    unfinished.

    Raises:
        LedgerError: names the file, and the line or field, that is wrong.
    """
    run_dir = Path(run_dir)
    plan, ledger = _read_run(run_dir)
    under_way = not ledger.finished and not (run_dir / CERTIFICATE_NAME).exists()
    if under_way:
        _check_nothing_ended(run_dir)
    else:
        _check_certificate(_read_certificate(run_dir / CERTIFICATE_NAME), certificate(plan, ledger))
        _check_model(run_dir / MODEL_NAME, ledger)
        _check_temperature(run_dir / TEMPERATURE_NAME, ledger)
    if not ledger.within_budget():
        raise LedgerError(
            f"{LEDGER_NAME}: spends epsilon {ledger.epsilon():.6g}, above the plan's {plan.epsilon}; do not release."
        )
    return Verification(
        epsilon=ledger.epsilon(),
        delta=plan.delta,
        private=_is_private(plan, ledger),
        steps=ledger.steps_reserved,
        records=len(ledger.records),
        head=ledger.head,
        examples=plan.examples,
        batch_size=plan.batch_size,
        noise_multiplier=plan.noise_multiplier,
        target_epsilon=plan.epsilon,
        plan_fingerprint=plan.fingerprint(),
        finished=ledger.finished,
        statement=f"{UNFINISHED}: {_statement(plan, ledger)}" if under_way else _statement(plan, ledger),
        temperature=temperature_of(ledger),
    )


def _check_nothing_ended(run_dir: Path) -> None:
    """A run under way has released no model: otherwise the end of its ledger, or its certificate, is missing."""
    if (run_dir / MODEL_NAME).exists():
        raise LedgerError(
            f"{LEDGER_NAME}: has no end although {MODEL_NAME} is released: records were cut off, or the end was "
            "interrupted; resume the run once, which finishes it, or distrust it."
        )


def _check_model(path: Path, ledger: LedgerView) -> None:
    """A released model must be the one that the ledger ended with; a certificate may travel without it."""
    expected = _model_digest(ledger)
    if expected is not None and path.exists() and file_digest(path) != expected:
        raise LedgerError(f"{MODEL_NAME}: is not the model that the ledger ended with; restore it, or distrust it.")


def temperature_of(ledger: LedgerView) -> float | None:
    """The temperature that was released under the ledger's newest key; None when there is none.

    Raises:
        LedgerError: the record of it holds no temperature.
    """
    noted = [record for record in ledger.records if record.kind == "note" and record.body["note"] == TEMPERATURE_NOTE]
    if not noted:
        return None
    facts = noted[-1].body["facts"]
    value = facts.get("temperature") if isinstance(facts, Mapping) and facts.get("key_id") == ledger.key_id else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise LedgerError(f"{LEDGER_NAME}: notes a temperature that is none; restore it, or distrust it.")
    return float(value)


def _check_temperature(path: Path, ledger: LedgerView) -> None:
    """A released temperature must be the one in the ledger, and there must be none where the ledger has none."""
    if not path.exists():
        return
    try:
        record = parse_json(path.read_text(encoding="ascii"), where=TEMPERATURE_NAME)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise LedgerError(f"{TEMPERATURE_NAME}: cannot be read ({error}); restore it, or distrust it.") from None
    found = record.get("temperature") if isinstance(record, Mapping) else None
    if found != temperature_of(ledger):
        raise LedgerError(f"{TEMPERATURE_NAME}: is not the temperature in the ledger; restore it, or distrust it.")


def _model_digest(ledger: LedgerView) -> object:
    """SHA-256 of the released model, from the ledger's last record; None when it names none."""
    last = ledger.records[-1]
    facts = last.body["facts"] if last.kind == "close" else {}
    return facts.get("model_sha256") if isinstance(facts, Mapping) else None


def _check_certificate(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    _compare_ledger(found, expected)
    for name in sorted(expected):
        if not _agree(found[name], expected[name], name=name):
            raise LedgerError(
                f"{CERTIFICATE_NAME}: field {name!r} does not follow from ledger and plan; restore it, or distrust it."
            )


def certificate(plan: Plan, ledger: LedgerView) -> dict[str, object]:
    """The certificate as JSON values: every field that a reader needs to judge the claim."""
    return {
        **_search_record(plan),
        **_parts_record(plan, ledger),
        "format": FORMAT,
        "stamp": "" if _is_private(plan, ledger) else NOT_PRIVATE_STAMP,
        "private": _is_private(plan, ledger),
        "statement": _statement(plan, ledger),
        "epsilon": _json_number(ledger.epsilon()),
        "epsilon_target": _json_number(plan.epsilon),
        "delta": plan.delta,
        "unit": "one example (one row, image or text)",
        "relation": {"name": plan.relation.value, "meaning": _RELATIONS[plan.relation]},
        "accountant": {
            "name": plan.accountant.value,
            "meaning": _ACCOUNTANTS[plan.accountant],
            "assumes": "every batch is an independent Poisson sample whose members stay secret",
        },
        "mechanism": {
            "name": "Gaussian noise on the sums of a calibration report, once"
            if _is_report(plan)
            else "Gaussian noise on the sum of clipped per-example gradients, at every step",
            "noise_multiplier": plan.noise_multiplier,
            "clipping": dict(plan.clipping),
            "divides_by": "the number of examples, a public constant"
            if _is_report(plan)
            else "the expected batch size, a public constant",
        },
        "sampling": {
            "name": "poisson",
            "examples": plan.examples,
            "batch_size": plan.batch_size,
            "sample_rate": plan.sample_rate,
            "randomness": "a function of a secret 256-bit key and the step",
        },
        "noise": {
            "source": _noise_source(ledger),
            "draws": "float64, each the normalised sum of two Box-Muller draws; added in float64 and rounded once",
        },
        "steps": {"planned": plan.steps, "charged": ledger.steps_reserved},
        "queries": [query_to_json(query) for query in ledger.queries()],
        "preprocessing_planned": [query_to_json(query) for query in plan.before],
        "key_ids": list(ledger.key_ids),
        "facts": dict(ledger.facts),
        "not_covered": list(NOT_COVERED),
        "ledger": {"head": ledger.head, "records": len(ledger.records), "finished": ledger.finished},
        "plan_fingerprint": plan.fingerprint(),
        "model_sha256": _model_digest(ledger),
        "versions": dict(plan.versions),
    }


def _search_record(plan: Plan) -> dict[str, object]:
    """What a search adds to the certificate; nothing for a single run."""
    if plan.search is None:
        return {}
    repetitions, noise = plan.search.repetitions, plan.search.score_noise
    return {
        "search": {
            "name": "a secret random number of runs, the best of which is released alone (arXiv:2110.03620)",
            "stopping": repetitions.stopping.value,
            "mean_runs": repetitions.mean,
            "score": "on data outside the guarantee" if noise is None else f"with noise multiplier {noise:.6g}",
            "assumes": "neither the number of runs nor anything of the other runs becomes known",
        }
    }


def _parts_record(plan: Plan, ledger: LedgerView) -> dict[str, object]:
    """What a calibration part adds to the certificate: its size, its own epsilon, and what came of it."""
    if plan.calibration is None:
        return {}
    apart = [query for query in ledger.queries() if isinstance(query, HeldOut)]
    rest = [query for query in ledger.queries() if not isinstance(query, HeldOut)]
    return {
        "calibration": {
            "examples": plan.calibration.examples,
            "share": plan.calibration.share,
            "chosen_by": "a public hash of each example alone; no other query touches them",
            "composition": "parallel: of the calibration part and the rest, the larger epsilon counts",
            "charged": bool(apart),
            "temperature": temperature_of(ledger),
        },
        "epsilon_calibration": _json_number(_composed(plan, apart)),
        "epsilon_training": _json_number(_composed(plan, rest)),
    }


def _composed(plan: Plan, queries: Sequence[Query]) -> float:
    return compose_epsilon(queries, delta=plan.delta, relation=plan.relation, accountant=plan.accountant)


def _mechanism(plan: Plan, ledger: LedgerView) -> str:
    """What was done, as the claim says it."""
    if _is_report(plan):
        return f"one calibration report by a Gaussian query of noise multiplier {plan.noise_multiplier:.6g} on all"
    step = f"noise multiplier {plan.noise_multiplier:.6g} on Poisson batches of expected size {plan.batch_size}"
    if plan.search is None:
        steps = f"{ledger.steps_reserved} steps of {step}, all checkpoints and logged metrics included"
        return steps + _apart(plan, ledger)
    repetitions = plan.search.repetitions
    return (
        f"the best of a secret random number of runs ({repetitions.stopping.value}, {repetitions.mean:g} expected), "
        f"each of {plan.steps} steps of {step}; the choice is included, and the other runs stay unknown"
    )


def _apart(plan: Plan, ledger: LedgerView) -> str:
    """What was done with the examples that were set apart."""
    if plan.calibration is None or not any(isinstance(query, HeldOut) for query in ledger.queries()):
        return ""
    return (
        f", and a temperature from {plan.calibration.examples} further examples that a public hash had set apart and "
        "no other query touched, under the same promise (parallel composition)"
    )


def _statement(plan: Plan, ledger: LedgerView) -> str:
    if math.isinf(ledger.epsilon()):
        return (
            f"{NOT_PRIVATE_STAMP}: trained without noise on {plan.examples} examples; the model may reveal any of them."
        )
    claim = (
        f"({_rounded_up(ledger.epsilon())}, {plan.delta:.6g})-differentially private for {plan.examples} examples, "
        f"where {_RELATIONS[plan.relation]}; {_mechanism(plan, ledger)}."
    )
    return (
        f"{NOT_PRIVATE_STAMP}: the noise came from a test seed. With secret noise it would be {claim}"
        if ledger.test_mode
        else claim
    )


def _rounded_up(value: float) -> str:
    """Six significant digits, never below the value: a claim is not rounded in its own favour."""
    shown = f"{value:.6g}"
    return shown if float(shown) >= value else f"{value * (1 + 1e-5):.6g}"


def _noise_source(ledger: LedgerView) -> str:
    if ledger.test_mode:
        return f"{NOT_PRIVATE_STAMP}: a test seed; whoever knows it can subtract the noise"
    return "AES-256 in counter mode under a 256-bit key from the operating system"


def _is_report(plan: Plan) -> bool:
    return plan.clipping.get("kind") == REPORT_KIND


def _is_private(plan: Plan, ledger: LedgerView) -> bool:
    return not ledger.test_mode and plan.noise_multiplier > 0 and math.isfinite(ledger.epsilon())


def _json_number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _read_run(run_dir: Path) -> tuple[Plan, LedgerView]:
    if not (run_dir / LEDGER_NAME).exists():
        raise LedgerError(f"{run_dir}: holds no {LEDGER_NAME}; pass the run directory, the folder above release/.")
    ledger = Ledger.read(run_dir / LEDGER_NAME)
    if ledger.torn:
        raise LedgerError(
            f"{LEDGER_NAME}: line {len(ledger.records) + 1} is unfinished; resume the run once, which sets it aside."
        )
    try:
        plan = Plan.load(run_dir / PLAN_NAME)
    except ConfigError as error:
        raise LedgerError(f"{PLAN_NAME}: {error}") from None
    if plan.fingerprint() != ledger.plan.fingerprint():
        raise LedgerError(
            f"{PLAN_NAME}: field {_first_difference(plan, ledger.plan)!r} differs from the ledger's plan; restore it."
        )
    return plan, ledger


def _first_difference(plan: Plan, other: Plan) -> str:
    here, there = plan.to_json(), other.to_json()
    return next(name for name in sorted(here) if here[name] != there[name])


def _read_certificate(path: Path) -> dict[str, object]:
    try:
        record = parse_json(path.read_text(encoding="ascii"), where=CERTIFICATE_NAME)
    except OSError as error:
        raise LedgerError(
            f"{CERTIFICATE_NAME}: cannot be read ({error.strerror}); resume the run once, which writes it again."
        ) from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise LedgerError(f"{CERTIFICATE_NAME}: cannot be read ({error}); restore it, or distrust it.") from None
    if not isinstance(record, dict):
        raise LedgerError(f"{CERTIFICATE_NAME}: must be a JSON object; restore it, or distrust it.")
    return record


def _compare_ledger(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Names, fields, and the ledger's length first: a shorter ledger explains every other difference."""
    try:
        Fields(found, where=CERTIFICATE_NAME, names=expected)
        claimed = Fields(found["ledger"], where=CERTIFICATE_NAME, names=("head", "records", "finished"))
        records = claimed.integer("records")
    except ConfigError as error:
        raise LedgerError(str(error)) from None
    present = Fields(expected["ledger"], where=LEDGER_NAME, names=("head", "records", "finished")).integer("records")
    if records != present:
        what = "records were cut off" if present < records else "records were added, or the certificate is old"
        raise LedgerError(f"{LEDGER_NAME}: has {present} records, the certificate was written for {records}; {what}.")


def _agree(found: object, expected: object, *, name: str) -> bool:
    if name in _EPSILONS and isinstance(expected, float):
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return number and abs(found - expected) <= EPSILON_TOLERANCE * expected
    return found == expected and type(found) is type(expected)
