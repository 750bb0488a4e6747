"""The certificate: what a finished run may claim, derived from its plan and its ledger, and re-derived by anyone.

Nothing here sees data or model. `write_certificate` is a function of two public files, so that `verify` can write the
same certificate again and name whatever differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context
from pathlib import Path

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.accounting import Accountant, HeldOut, Query, Relation, query_to_json
from discreet.privacy.accounting import epsilon as compose_epsilon
from discreet.privacy.files import write_atomically
from discreet.privacy.ledger import Ledger, LedgerView
from discreet.privacy.plan import Plan
from discreet.privacy.records import json_number, parse_json

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


def write_certificate(run_dir: Path | str) -> Path:
    """Derive ``release/certificate.json`` from ``release/plan.json`` and ``ledger.jsonl``. Call it after
    `Ledger.finish`.

    Returns:
        The path of the certificate.

    Raises:
        LedgerError: the ledger is damaged, has an unfinished line, or belongs to another plan.
    """
    run_dir = Path(run_dir)
    plan, ledger = read_run(run_dir)
    path = run_dir / CERTIFICATE_NAME
    text = json.dumps(certificate(plan, ledger), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise LedgerError(
            f"{path}: cannot be written ({error.strerror}); free some space, then resume the run once (--resume), "
            "which writes it."
        ) from None
    return path


def temperature_facts(ledger: LedgerView) -> dict[str, object] | None:
    """What ``release/temperature.json`` holds: the ledger's last note of a temperature, without the key's name.

    None when none was released under the ledger's newest key.
    """
    noted = [record for record in ledger.records if record.kind == "note" and record.body["note"] == TEMPERATURE_NOTE]
    facts = noted[-1].body["facts"] if noted else None
    if not isinstance(facts, Mapping) or facts.get("key_id") != ledger.key_id:
        return None
    return {name: value for name, value in facts.items() if name != "key_id"}


def temperature_of(ledger: LedgerView) -> float | None:
    """The temperature that was released under the ledger's newest key; None when there is none.

    Raises:
        LedgerError: the record of it holds no temperature.
    """
    value = (temperature_facts(ledger) or {}).get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise LedgerError(f"{LEDGER_NAME}: notes a temperature that is none; restore it, or distrust it.")
    return float(value)


def model_digest(ledger: LedgerView) -> object:
    """SHA-256 of the released model, from the ledger's last record; None when it names none."""
    last = ledger.records[-1]
    facts = last.body["facts"] if last.kind == "close" else {}
    return facts.get("model_sha256") if isinstance(facts, Mapping) else None


def certificate(plan: Plan, ledger: LedgerView) -> dict[str, object]:
    """The certificate as JSON values: every field that a reader needs to judge the claim."""
    return {
        **_search_record(plan),
        **_parts_record(plan, ledger),
        "format": FORMAT,
        "stamp": "" if is_private(plan, ledger) else NOT_PRIVATE_STAMP,
        "private": is_private(plan, ledger),
        "statement": statement_of(plan, ledger),
        "epsilon": json_number(ledger.epsilon()),
        "epsilon_target": json_number(plan.epsilon),
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
        "model_sha256": model_digest(ledger),
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
        "epsilon_calibration": json_number(_composed(plan, apart)),
        "epsilon_training": json_number(_composed(plan, rest)),
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


def statement_of(plan: Plan, ledger: LedgerView) -> str:
    """The claim in one sentence."""
    if math.isinf(ledger.epsilon()):
        return (
            f"{NOT_PRIVATE_STAMP}: trained without noise on {plan.examples} examples; the model may reveal any of them."
        )
    claim = (
        f"({rounded_up(ledger.epsilon())}, {plan.delta:.6g})-differentially private for {plan.examples} examples, "
        f"where {_RELATIONS[plan.relation]}; {_mechanism(plan, ledger)}."
    )
    return (
        f"{NOT_PRIVATE_STAMP}: the noise came from a test seed. With secret noise it would be {claim}"
        if ledger.test_mode
        else claim
    )


def rounded_up(value: float) -> str:
    """Six significant digits, the least that are not below the value: a claim is not rounded in its own favour."""
    shown = f"{value:.6g}"
    if float(shown) < value:
        shown = f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal(value)):.6g}"
    return shown


def _noise_source(ledger: LedgerView) -> str:
    if ledger.test_mode:
        return f"{NOT_PRIVATE_STAMP}: a test seed; whoever knows it can subtract the noise"
    return "AES-256 in counter mode under a 256-bit key from the operating system"


def _is_report(plan: Plan) -> bool:
    return plan.clipping.get("kind") == REPORT_KIND


def is_private(plan: Plan, ledger: LedgerView) -> bool:
    """Whether there is a guarantee: no seed, noise, and a finite epsilon."""
    return not ledger.test_mode and plan.noise_multiplier > 0 and math.isfinite(ledger.epsilon())


def read_run(run_dir: Path) -> tuple[Plan, LedgerView]:
    """The plan and the ledger of a run, which must belong together.

    Raises:
        LedgerError: one is missing, damaged or unfinished, or they do not.
    """
    if not (run_dir / LEDGER_NAME).exists():
        raise LedgerError(f"{run_dir}: holds no {LEDGER_NAME}; pass the run directory, the folder above release/.")
    ledger = Ledger.read(run_dir / LEDGER_NAME)
    if ledger.torn:
        raise LedgerError(
            f"{LEDGER_NAME}: line {len(ledger.records) + 1} is unfinished; ask the owner to resume the run once, which "
            "sets it aside."
        )
    plan = _read_plan(run_dir / PLAN_NAME)
    if plan.fingerprint() != ledger.plan.fingerprint():
        raise LedgerError(
            f"{PLAN_NAME}: field {_first_difference(plan, ledger.plan)!r} differs from the ledger's plan; restore it."
        )
    return plan, ledger


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(parse_json(path.read_text(encoding="utf-8"), where=PLAN_NAME))
    except FileNotFoundError:
        raise LedgerError(f"{PLAN_NAME}: is missing; ask the owner of the run for it.") from None
    except OSError as error:
        raise LedgerError(f"{PLAN_NAME}: cannot be read ({error.strerror}); check its permissions.") from None
    except UnicodeDecodeError:
        raise LedgerError(f"{PLAN_NAME}: not valid JSON; restore the file from a copy.") from None
    except ConfigError as error:
        raise LedgerError(str(error)) from None


def _first_difference(plan: Plan, other: Plan) -> str:
    here, there = plan.to_json(), other.to_json()
    return next(name for name in sorted(here) if here[name] != there[name])
