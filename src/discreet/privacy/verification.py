"""Verification: the certificate of a run derived again from its ledger and plan, and whatever differs is named.

Nothing here sees data, or the private half of a run directory: whoever was given the rest can do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from discreet.errors import ConfigError, LedgerError
from discreet.privacy.certificate import (
    CERTIFICATE_NAME,
    LEDGER_NAME,
    MODEL_NAME,
    PLAN_NAME,
    TEMPERATURE_NAME,
    certificate,
    is_private,
    model_digest,
    read_run,
    statement_of,
    temperature_facts,
    temperature_of,
)
from discreet.privacy.files import file_digest
from discreet.privacy.ledger import LedgerView
from discreet.privacy.records import Fields, json_number, parse_json

UNFINISHED = "NOT FINISHED, what is reserved so far"
CERTIFIED = "the one that was certified"
NOT_COMPARED = f"not compared: there is no {MODEL_NAME}"
NO_MODEL = "none was released"
EPSILON_TOLERANCE = 1e-6
"""Relative difference allowed between two derivations of epsilon: other versions of the numerical packages."""
_EPSILONS = ("epsilon", "epsilon_calibration", "epsilon_training")


@dataclass(frozen=True)
class Verification:
    """What `verify` found to hold.

    Attributes:
        epsilon, delta: re-derived from the ledger. private: False for seeded test runs and runs without noise.
        steps: distinct (key, step) pairs charged. records: number of ledger records. head: hash of the last one.
        examples, batch_size, noise_multiplier: of the plan. target_epsilon: what the plan allowed.
        plan_fingerprint: SHA-256 of the plan. finished: the ledger was closed for good.
        statement: the claim in one sentence.
        model: whether the released model was compared, in words.
        temperature: what the model's logits are to be divided by, released with it; None when none was fitted.
        unchecked: names of what else lies in ``release/``: nothing in the ledger says what it must hold.
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
    model: str
    temperature: float | None = None
    unchecked: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """JSON values, as `discreet verify` prints them; infinity, which JSON does not have, is a word."""
        record: dict[str, object] = {
            "epsilon": json_number(self.epsilon),
            "delta": self.delta,
            "private": self.private,
            "steps": self.steps,
            "examples": self.examples,
            "batch_size": self.batch_size,
            "noise_multiplier": self.noise_multiplier,
            "ledger_records": self.records,
            "ledger_head": self.head,
            "finished": self.finished,
            "model": self.model,
            "statement": self.statement,
            "unchecked": list(self.unchecked),
        }
        if self.temperature is not None:
            record["temperature"] = self.temperature
        return record


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
    plan, ledger = read_run(run_dir)
    model = NO_MODEL
    under_way = not ledger.finished and not (run_dir / CERTIFICATE_NAME).exists()
    if under_way:
        _check_nothing_ended(run_dir)
    else:
        _check_certificate(_read_certificate(run_dir / CERTIFICATE_NAME), certificate(plan, ledger))
        model = _check_model(run_dir / MODEL_NAME, ledger)
        _check_temperature(run_dir / TEMPERATURE_NAME, ledger)
    if not ledger.within_budget():
        raise LedgerError(
            f"{LEDGER_NAME}: spends epsilon {ledger.epsilon():.6g}, above the plan's {plan.epsilon}; do not release."
        )
    return Verification(
        epsilon=ledger.epsilon(),
        delta=plan.delta,
        private=is_private(plan, ledger),
        steps=ledger.steps_reserved,
        records=len(ledger.records),
        head=ledger.head,
        examples=plan.examples,
        batch_size=plan.batch_size,
        noise_multiplier=plan.noise_multiplier,
        target_epsilon=plan.epsilon,
        plan_fingerprint=plan.fingerprint(),
        finished=ledger.finished,
        statement=f"{UNFINISHED}: {statement_of(plan, ledger)}" if under_way else statement_of(plan, ledger),
        model=model,
        temperature=temperature_of(ledger),
        unchecked=_unchecked(run_dir, under_way=under_way),
    )


def _unchecked(run_dir: Path, *, under_way: bool) -> tuple[str, ...]:
    checked = {PLAN_NAME} if under_way else {PLAN_NAME, CERTIFICATE_NAME, MODEL_NAME, TEMPERATURE_NAME}
    release = (run_dir / PLAN_NAME).parent
    return tuple(sorted(path.name for path in release.iterdir() if f"{release.name}/{path.name}" not in checked))


def _check_nothing_ended(run_dir: Path) -> None:
    """A run under way has released no model: otherwise the end of its ledger, or its certificate, is missing."""
    if (run_dir / MODEL_NAME).exists():
        raise LedgerError(
            f"{LEDGER_NAME}: has no end although {MODEL_NAME} is released: records were cut off, or the end was "
            "interrupted; ask the owner to resume the run once, which finishes it, or distrust it."
        )


def _check_model(path: Path, ledger: LedgerView) -> str:
    """A released model must be the one that the ledger ended with; a certificate may travel without it.

    Returns:
        What was found, in words: that nothing was compared must be seen.
    """
    expected = model_digest(ledger)
    if expected is None:
        return NO_MODEL
    if not path.exists():
        return NOT_COMPARED
    if not path.is_file() or file_digest(path) != expected:
        raise LedgerError(f"{MODEL_NAME}: is not the model that the ledger ended with; restore it, or distrust it.")
    return CERTIFIED


def _check_temperature(path: Path, ledger: LedgerView) -> None:
    """A released temperature must be as the ledger notes it, and there must be none where the ledger has none."""
    if not path.exists():
        return
    try:
        record = parse_json(path.read_text(encoding="ascii"), where=TEMPERATURE_NAME)
    except OSError as error:
        raise LedgerError(f"{TEMPERATURE_NAME}: cannot be read ({error.strerror}); check its permissions.") from None
    except (UnicodeDecodeError, ConfigError):
        raise LedgerError(f"{TEMPERATURE_NAME}: is not valid JSON; restore it, or distrust it.") from None
    if record != temperature_facts(ledger):
        raise LedgerError(f"{TEMPERATURE_NAME}: is not the temperature in the ledger; restore it, or distrust it.")


def _check_certificate(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    _compare_ledger(found, expected)
    for name in sorted(expected):
        if not _agree(found[name], expected[name], name=name):
            raise LedgerError(
                f"{CERTIFICATE_NAME}: field {name!r} does not follow from ledger and plan; restore it, or distrust it."
            )


def _read_certificate(path: Path) -> dict[str, object]:
    try:
        record = parse_json(path.read_text(encoding="ascii"), where=CERTIFICATE_NAME)
    except FileNotFoundError:
        raise LedgerError(
            f"{CERTIFICATE_NAME}: is missing although the run has ended; ask its owner for it, who writes it again by "
            "repeating the command of the run with --resume and --out RUN."
        ) from None
    except OSError as error:
        raise LedgerError(f"{CERTIFICATE_NAME}: cannot be read ({error.strerror}); check its permissions.") from None
    except (UnicodeDecodeError, ConfigError):
        raise LedgerError(f"{CERTIFICATE_NAME}: is not valid JSON; restore it, or distrust it.") from None
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
