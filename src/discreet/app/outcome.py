"""What a run of `discreet train` leaves: paths, the plan that was followed, figures on rows that it did not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from discreet.app.evaluation import Evaluation
from discreet.app.results import Written
from discreet.app.runs import sizes
from discreet.insight.calibration import CalibrationReport
from discreet.privacy.plan import Plan
from discreet.privacy.records import json_number


@dataclass(frozen=True)
class Outcome:
    """What a finished run amounts to. Released or public, all of it; ``test`` is about the held-out examples.

    ``written`` says what became of the page and of the figures on disk. ``seconds`` is over all processes that a
    resumed run took: the last one whole, earlier ones as far as their updates count.
    """

    run_dir: Path
    written: Written
    epsilon: float
    seconds: float
    plan: Plan
    updates: int
    private: bool
    model: dict[str, object]
    test: Evaluation | None
    statements: tuple[str, ...]
    calibration: CalibrationReport | None = None
    temperature: float | None = None
    untempered: Evaluation | None = None

    def to_json(self) -> dict[str, object]:
        """The object that ``--json`` prints, and ``result.json``."""
        return {
            "run_dir": str(self.run_dir),
            "report": None if self.written.page is None else str(self.written.page),
            "epsilon": json_number(self.epsilon),
            **sizes(self.plan),
            "steps": self.updates,
            # No finer: how long an update takes follows from how many examples were drawn.
            "seconds": round(self.seconds, 1),
            "private": self.private,
            "model": self.model,
            "temperature": self.temperature,
            "test": _test_record(self.test, self.calibration, self.untempered),
            "statements": list(self.statements),
        }


def _test_record(
    test: Evaluation | None, calibration: CalibrationReport | None, untempered: Evaluation | None
) -> dict[str, object] | None:
    """The test figures with the single numbers of the calibration report, and the figures before the temperature.

    The report knows only rows of a listed class, and so another accuracy: it has another name here.
    """
    if test is None:
        return None
    record: dict[str, object] = dict(test.to_json())
    if calibration is not None:
        whole = calibration.to_json()
        record |= {
            name: value
            for name, value in whole.items()
            if isinstance(value, float | int) and name not in ("examples", "accuracy")
        }
        record["listed_accuracy"] = calibration.accuracy
        record["stamp"] = calibration.stamp
    if untempered is not None:
        record["before_temperature"] = {"nll": untempered.nll, "ece": untempered.ece}
    return record
