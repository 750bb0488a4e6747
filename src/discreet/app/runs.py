"""What `discreet train` and `discreet tune` do alike with a run directory: resume it as it was begun, and report it;
what they say of a weak promise before the budget is spent, and of a run that was interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from discreet.app.results import RESULT, WHOLE
from discreet.core.clipping import Clipping
from discreet.errors import ConfigError, DiscreetError
from discreet.privacy.accounting import Query
from discreet.privacy.certificate import CERTIFICATE_NAME
from discreet.privacy.explaining import large_epsilon
from discreet.privacy.files import file_digest
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from discreet.train.run import Run
from discreet.train.run_directory import LEDGER
from discreet.train.setup import check_same

AskedAndPlanned = dict[str, tuple[object, object]]
"""Name of an option -> (what is asked for now, what the plan of the run says)."""


def asked_and_planned(
    plan: Plan,
    *,
    examples: int,
    epsilon: float,
    delta: float,
    batch_size: int | None,
    steps: int | None,
    clipping: Clipping | None,
    before: tuple[Query, ...],
) -> AskedAndPlanned:
    """What may not differ when a run, of whichever kind, goes on."""
    return {
        "examples": (examples, plan.examples),
        "--epsilon": (epsilon, plan.epsilon),
        "--delta": (delta, plan.delta),
        "--batch-size": (batch_size, plan.batch_size),
        "--steps": (steps, plan.steps),
        "--clipping": (None if clipping is None else clipping.describe(), dict(plan.clipping)),
        "private statistics": (before, plan.before),
    }


def resume_run(path: Path | None, *, seed: int | None, asked: Callable[[Plan], AskedAndPlanned]) -> Run:
    """Continue the run in ``--out``; options that contradict its plan are refused and not ignored."""
    if path is None:
        raise ConfigError("--resume without --out: name the run directory to continue.")
    run = Run.resume(path, seed=seed)
    try:
        check_same(asked(run.plan))
    except ConfigError:
        run.close()
        raise
    return run


def has_ended(path: Path) -> bool:
    """Whether a directory holds a run whose ledger is closed for good."""
    try:
        return (path / LEDGER).is_file() and Ledger.read(path / LEDGER).finished
    except DiscreetError:
        return False


def refuse_ended(path: Path | None) -> None:
    """A run that has ended cannot be continued, so nobody may be sent to ``--resume`` for it.

    Raises:
        ConfigError: the directory of a new run holds such a run.
    """
    if path is not None and has_ended(path):
        name = shlex.quote(str(path))
        raise ConfigError(
            f"{path}: holds a run that has ended, and cannot be continued; name another directory (--out); see "
            f"`discreet verify {name}` and `discreet report {name}`."
        )


def what_next(path: Path) -> str:
    """What an interrupted command left in its run directory, and what to do about it."""
    name = shlex.quote(str(path))
    again = f"repeat the command with --resume --out {name}"
    if not (path / LEDGER).exists():
        return "nothing was charged yet; repeat the command."
    if not has_ended(path):
        return f"nothing is lost up to the last checkpoint: {again}."
    page = f"`discreet report {name}` writes the page"
    if not (path / CERTIFICATE_NAME).exists():
        return f"the run has ended, but for its certificate: {again} once, which writes it; then {page}."
    lost = "" if (path / "release" / RESULT).exists() else ", without the last figures on test rows, which are lost"
    return f"{WHOLE}; {page}{lost}."


def weak_promises(plan: Plan) -> tuple[str, ...]:
    """Sentences about a delta at which publishing one row at random would keep the promise, and a large epsilon."""
    found = [f"Warning: {sentence}" for sentence in large_epsilon(plan.epsilon)]
    if plan.delta * plan.examples > 1:
        found.append(
            f"Warning: delta {plan.delta:g} is above 1 / examples, {1 / plan.examples:.2g}; such a promise says little."
        )
    return tuple(found)


def warn_of_weak_promises(plan: Plan) -> None:
    """Say them on stderr. To be called before the first charge, when they can still be heeded."""
    for sentence in weak_promises(plan):
        print(f"discreet: {sentence}", file=sys.stderr, flush=True)


def same_content(path: Path, other: Path) -> bool:
    """Whether two paths lead to the same place, or to files of the same bytes."""
    if path.resolve() == other.resolve():
        return True
    return path.is_file() and other.is_file() and file_digest(path) == file_digest(other)


def sizes(plan: Plan) -> dict[str, float | int]:
    """The public numbers of a plan, as every finished run reports them."""
    return {
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "examples": plan.examples,
    }
