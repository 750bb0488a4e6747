"""A calibration report of private rows with a ledger and a certificate of its own: one query, charged ahead."""

from __future__ import annotations

from pathlib import Path

from discreet.app.predictions import Loaded
from discreet.insight.calibration import BudgetedReport, budgeted_report
from discreet.privacy.certificate import REPORT_KIND
from discreet.privacy.plan import Plan
from discreet.train.run import Run
from discreet.train.run_directory import new_run_dir

_PURPOSE = "calibration report"


def charged_report(loaded: Loaded, *, epsilon: float, delta: float, out: Path | None) -> tuple[BudgetedReport, Path]:
    """Plan, charge, ask, certify.

    The one query is written as a plan of one step on all rows: ``batch_size = examples``, so nothing is sampled.

    Args:
        loaded: private predictions; their number is public.
        epsilon, delta: of the whole report. out: a directory that holds no run yet; None: a new one below ``runs/``.
    """
    examples = len(loaded.target_N)
    plan = Plan.solve(
        examples=examples,
        batch_size=examples,
        steps=1,
        epsilon=epsilon,
        delta=delta,
        clipping={"kind": REPORT_KIND, "style": "one row, one bin"},
    )
    # Log-probabilities may be -inf where a file says 0: a row-by-row change, so that such a row keeps its order.
    scores_NK = loaded.scores_NK.clamp(min=-1e4)
    with Run.create(out if out is not None else new_run_dir(), plan=plan) as run:
        found = budgeted_report(
            scores_NK,
            loaded.target_N,
            examples=examples,
            noise_multiplier=plan.noise_multiplier,
            source=run.noise(_PURPOSE),
            charge=lambda _query: run.ledger.reserve_steps(first=0, count=1),
            relation=plan.relation,
        )
        run.write("calibration.json", found.to_json())
        run.finish(None)
        return found, run.path
