"""What `discreet train` and `discreet tune` do alike with a run directory: resume it as it was begun, and report it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.privacy.accounting import Query
from discreet.privacy.files import file_digest
from discreet.privacy.plan import Plan
from discreet.train.run import Run
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
