"""The temperature of a run: planned and charged with it, fitted after its last update, stored beside its weights."""

from __future__ import annotations

import hashlib
import math

from torch import Tensor, nn

from discreet.app.data import Examples, Source, usual_share
from discreet.app.data.source import IGNORED
from discreet.app.evaluation import logits_of
from discreet.errors import BudgetExceeded, ConfigError, DataError
from discreet.insight.calibration import Predictions, fit_public_temperature
from discreet.insight.calibration.private import (
    BOUND,
    QUERIES,
    PrivateRows,
    check_support,
    fit_private_temperature,
    held_out_charge,
    question_noise,
)
from discreet.privacy.certificate import TEMPERATURE_NOTE, temperature_facts, temperature_of
from discreet.privacy.ledger import LedgerView
from discreet.privacy.plan import CALIBRATION_PART, Calibration, Plan
from discreet.train.run import Run
from discreet.train.tempered import Tempered
from discreet.train.updates import Conclusion

FILE = "temperature.json"


def plan_calibration(rows: int, *, apart: int, epsilon: float, delta: float) -> Calibration:
    """The plan of a private temperature: as much epsilon as the rest of the run may spend, since no example is in both.

    Args:
        rows: training examples that stay. apart: examples that were set apart. Both are public.
        epsilon, delta: of the run.

    Raises:
        ConfigError: the part is too small for a temperature at this epsilon.
    """
    check_support(apart, epsilon=epsilon)
    noise = 0.0 if math.isinf(epsilon) else question_noise(epsilon=epsilon, delta=delta)
    return Calibration(
        examples=apart, share=usual_share(rows + apart), noise_multiplier=noise, queries=QUERIES, bound=BOUND
    )


def planned(source: Source, *, private: bool, epsilon: float, delta: float) -> Calibration | None:
    """The same for a data source; None where no private temperature is asked for."""
    if not private or source.calibration_examples is None:
        return None
    return plan_calibration(source.examples, apart=source.calibration_examples, epsilon=epsilon, delta=delta)


def conclusion(examples: Examples | None) -> Conclusion | None:
    """What to do with a run after its last update: fit the temperature, note it in the ledger, and write its file."""
    if examples is None:
        return None

    def fit(run: Run, model: nn.Module) -> None:
        # Noted under this key already: a crash came before the end of the run, and nothing is asked twice.
        if temperature_of(run.ledger) is None:
            record = _fit(run, logits_of(model, examples), examples.targets)
            if record is None:
                # One of an earlier key is that of another model, and no certificate would agree with it.
                (run.release_dir / FILE).unlink(missing_ok=True)
                return
            run.ledger.note(TEMPERATURE_NOTE, {**record, "key_id": run.ledger.key_id})
        run.write(FILE, noted(run.ledger))

    return fit


def _fit(run: Run, logits_NK: Tensor, target_N: Tensor) -> dict[str, object] | None:
    """The record of a fitted temperature; None where none could be paid for or told."""
    asked = run.plan.calibration
    if asked is None:
        return _fit_public(logits_NK, target_N)
    rows = PrivateRows(
        noise_multiplier=asked.noise_multiplier,
        # Noise is bound to the question: if anything differs after a crash, so does all of it.
        source=run.noise(f"temperature|{_digest(logits_NK, target_N)}"),
        # Of the ledger itself: `Run.reserve_query` is for statistics, whose noise outlives a change of key.
        charge=lambda query: run.ledger.reserve_query(CALIBRATION_PART, held_out_charge(query)),
        queries=asked.queries,
        bound=asked.bound,
    )
    try:
        found = fit_private_temperature(logits_NK, target_N, rows=rows, examples=asked.examples)
    except BudgetExceeded:
        # Charged under an earlier key already. The model keeps its promise without a temperature.
        return None
    return {**found.to_json(), "examples_are": "private, set apart by a public hash"}


def _fit_public(logits_NK: Tensor, target_N: Tensor) -> dict[str, object]:
    known_N = target_N != IGNORED
    try:
        found = fit_public_temperature(Predictions.from_logits(logits_NK[known_N], target_N[known_N]))
    except DataError as error:
        raise ConfigError(f"--public-temperature: {error}") from None
    return {
        "temperature": found.value,
        "noise_std": 0.0,
        "sampling_std": found.std if math.isfinite(found.std) else None,
        "examples": found.examples,
        "at_bound": found.at_bound,
        "examples_are": "public",
    }


def noted(ledger: LedgerView) -> dict[str, object]:
    """What the file of the temperature holds."""
    facts = temperature_facts(ledger)
    assert facts is not None
    return facts


def statement(plan: Plan, ledger: LedgerView) -> tuple[str, ...]:
    """The sentence about the temperature, with its uncertainty; nothing when none was asked for."""
    asked = plan.calibration
    if temperature_of(ledger) is None:
        if asked is None:
            return ()
        return (
            "There is no temperature: its examples were charged under a key that had to be replaced, and the budget "
            "does not allow to ask them twice.",
        )
    facts = noted(ledger)
    value = float(str(facts["temperature"]))
    parts = [facts[name] for name in ("noise_std", "sampling_std")]
    known = [float(part) for part in parts if isinstance(part, (int, float))]
    doubt = f"{value:.4g} +- {math.hypot(*known):.2g}" if len(known) == len(parts) else f"{value:.4g} +- unknown"
    use = f"Divide the model's logits by the temperature {doubt} (release/temperature.json); test figures do."
    if asked is None:
        return (f"{use} It was fitted on {facts['examples']} public rows.",)
    apart = f"{asked.examples} rows that a public hash had set apart, and nothing else touched"
    if facts["private"] is not True:
        return (f"{use} It was fitted on {apart}, NOT PRIVATELY: without noise, or with that of a test seed.",)
    return (
        f"{use} It was fitted privately on {apart}; of their epsilon and that of training the larger counts "
        "(parallel composition).",
    )


def trained_statement(model: nn.Module) -> tuple[str, ...]:
    """The sentence about a temperature and a floor that were trained with the model."""
    if not isinstance(model, Tempered):
        return ()
    found = model.temperature
    return (
        f"A temperature ({found.value:.3g}) and a floor ({100 * found.share:.2g} % of each answer is spread over all "
        "classes) were trained with the model in the same query, and are part of it: what it gives is logits already.",
    )


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
