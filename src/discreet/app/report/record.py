"""Reading a release folder, with suspicion: sizes, types and links are checked before anything is believed.

Only the files below `release/` are opened, and only the keys named here are read: what is not known to be released or
public cannot reach the page.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discreet.errors import DataError

MAX_BYTES = 64 << 20
METRIC_KEYS = (
    "epsilon",
    "learning_rate",
    "loss_level",
    "probe_displacement",
    "probe_noise",
    "probe_rate",
    "probe_rise",
    "seconds",
    "test_accuracy",
    "test_nll",
)


class Stamp(enum.Enum):
    """What the page says about the run before anything else."""

    PRIVATE = "private"
    NOT_PRIVATE = "not private"
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Metric:
    """One line of ``metrics.jsonl``: a step, and what was released or public after it."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """Everything that the page is made from.

    Attributes:
        name: name of the run folder.
        plan: ``plan.json``.
        certificate, result, check, schema, calibration, temperature: the files of these names; empty when absent.
        metrics: the lines of ``metrics.jsonl``, in the order written; empty when absent.
    """

    name: str
    plan: Mapping[str, Any]
    certificate: Mapping[str, Any]
    result: Mapping[str, Any]
    check: Mapping[str, Any]
    schema: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    temperature: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stamp(self) -> Stamp:
        """PRIVATE only when the certificate says so and nothing contradicts it."""
        if any(source.get("private") is False for source in (self.plan, self.certificate, self.result)):
            return Stamp.NOT_PRIVATE
        if any(number(source, "noise_multiplier") == 0 for source in (self.plan, self.certificate, self.result)):
            return Stamp.NOT_PRIVATE
        if self.certificate.get("private") is True and not self.contradictions:
            return Stamp.PRIVATE
        return Stamp.UNVERIFIED

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Names of figures that differ between the certificate and the result or the plan, by more than rounding."""
        pairs = [("epsilon", self.result), ("delta", self.result), ("delta", self.plan)]
        found = {key for key, other in pairs if _differ(number(self.certificate, key), number(other, key))}
        return tuple(sorted(found))

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon that certificate or result states; None when neither does."""
        stated = [number(source, "epsilon") for source in (self.certificate, self.result)]
        return max((value for value in stated if value is not None), default=None)

    @property
    def delta(self) -> float | None:
        """Delta of the certificate, else of the result, else of the plan."""
        stated = (number(source, "delta") for source in (self.certificate, self.result, self.plan))
        return next((value for value in stated if value is not None), None)


def number(record: Mapping[str, Any], key: str) -> float | None:
    """The number under ``key``; the words inf and infinity are numbers too; anything else is None."""
    value = record.get(key)
    if isinstance(value, str) and value.lower() in {"inf", "infinity"}:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under ``key``, else an empty one."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def records(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of the list under ``key``; other entries are left out."""
    value = record.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def word(record: Mapping[str, Any], key: str, *, part: str = "name") -> str:
    """The string under ``key``, or the string ``part`` of the object there; empty when there is neither."""
    value = record.get(key)
    found = value.get(part) if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def texts(record: Mapping[str, Any], key: str) -> list[str]:
    """The strings of the list under ``key``; other entries are left out."""
    value = record.get(key)
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def read_run(run_dir: Path) -> RunRecord:
    """Read ``run_dir/release``.

    Raises:
        DataError: there is no ``plan.json``, or a file is damaged, too large, a link, or not what its name says.
    """
    release = run_dir / "release"
    plan = _read_object(release / "plan.json")
    if not plan:
        raise DataError(f"{release / 'plan.json'}: missing or empty; a run has this file, give the folder of a run.")
    certificate = _read_object(release / "certificate.json")
    if certificate and not texts(certificate, "not_covered"):
        raise DataError(
            f"{release / 'certificate.json'}: 'not_covered' must list what the guarantee leaves open; write it anew."
        )
    return RunRecord(
        name=run_dir.resolve().name,
        plan=plan,
        certificate=certificate,
        result=_read_object(release / "result.json"),
        check=_read_object(release / "check.json"),
        schema=_read_object(release / "schema.json"),
        metrics=tuple(_read_metrics(release / "metrics.jsonl")),
        calibration=_read_object(release / "calibration.json"),
        temperature=_read_object(release / "temperature.json"),
    )


def _read_text(path: Path) -> str:
    if path.is_symlink():
        raise DataError(f"{path}: is a link; a release folder holds plain files, copy the file here.")
    if not path.exists():
        return ""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, at most {MAX_BYTES} are read; restore the file.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; restore the file from the run.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a readable file.") from error


def _read_object(path: Path) -> Mapping[str, Any]:
    text = _read_text(path)
    if not text and not path.exists():
        return {}
    value = _parse(text, where=f"{path}")
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold one JSON object; restore the file from the run.")
    return value


def _read_metrics(path: Path) -> list[Metric]:
    lines = _read_text(path).split("\n")
    torn = lines.pop()  # a crash may leave a last line without its end; it was never part of the record
    del torn
    metrics = []
    for count, line in enumerate(lines, start=1):
        where = f"{path}: line {count}"
        value = _parse(line, where=where)
        if not isinstance(value, dict):
            raise DataError(f"{where}: must hold one JSON object; restore the file from the run.")
        step = value.get("step")
        if step is None:
            continue
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise DataError(f"{where}: 'step' must be a whole number of at least 0; restore the file from the run.")
        known = {key: number(value, key) for key in METRIC_KEYS}
        metrics.append(Metric(step=step, values={key: found for key, found in known.items() if found is not None}))
    return metrics


def _parse(text: str, *, where: str) -> Any:
    def no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise DataError(f"{where}: a key stands there twice; restore the file from the run.")
        return found

    try:
        return json.loads(text, object_pairs_hook=no_repeats)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON at line {error.lineno}, column {error.colno}; restore the file from the run."
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply; restore the file from the run.") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: holds a number that is too long; restore the file from the run.") from error


def _differ(first: float | None, second: float | None) -> bool:
    if first is None or second is None or first == second:
        return False
    return not math.isclose(first, second, rel_tol=1e-3)
