"""How far a contestant stays behind the best of a grid: paired over seeds, with its error, and without luck.

Batches, noise and first weights are those of the seed, for every contestant. So differences are taken within a seed,
and their scatter over seeds is the error. The *oracle* is one setting for each task and epsilon, by its mean over its
seeds on the test rows: nobody may choose so, and part of its lead is the luck of the best of up to 28. A setting chosen
with one seed and scored with the others is rid of that.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[dict[str, Any]]
Cell = Mapping[str, Mapping[int, float]]
"""Contestant -> seed -> points of accuracy, in one task at one epsilon."""


@dataclass(frozen=True)
class Gap:
    """Points behind, negative when ahead, and the standard error over seeds; None with one seed."""

    points: float
    error: float | None
    seeds: int


def cells(rows: Rows) -> dict[tuple[str, float], Cell]:
    """Rows by task and epsilon."""
    found: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["task"], row["epsilon"]][row["contestant"]][row["seed"]] = 100 * row["accuracy"]
    return {key: dict(cell) for key, cell in found.items()}


def mean(cell: Cell, contestant: str) -> float | None:
    """Over all its seeds; None when it was not run."""
    return statistics.fmean(cell[contestant].values()) if contestant in cell else None


def finalists(cell: Cell) -> list[str]:
    """The settings of the grid that have the most seeds: others were left behind (`bench.auto_lr.pruning`)."""
    settings = sorted(name for name in cell if name.startswith("grid:"))
    most = max((len(cell[name]) for name in settings), default=0)
    return [name for name in settings if len(cell[name]) == most]


def oracle(cell: Cell) -> str | None:
    """The best setting of the grid by its mean over seeds, chosen on the test rows; None without a grid."""
    return max(finalists(cell), key=lambda name: (statistics.fmean(cell[name].values()), name), default=None)


def gap(cell: Cell, contestant: str = "auto", *, to: str | None = None) -> Gap | None:
    """Behind the oracle, or another contestant, over the seeds that both have; None when there are none."""
    best = oracle(cell) if to is None else to
    if best is None or best not in cell or contestant not in cell:
        return None
    both = sorted(cell[best].keys() & cell[contestant].keys())
    return _of([cell[best][seed] - cell[contestant][seed] for seed in both])


def gap_without_luck(cell: Cell, contestant: str = "auto") -> Gap | None:
    """Behind the setting that is best with one seed, scored with the others: each seed chooses in turn.

    Settings that are level with a seed share its choice. Those that are chosen from were picked out with the first seed
    (`bench.auto_lr.pruning`), which leaves the oracle a little of its luck where that seed scores.

    Returns:
        None with fewer than two seeds in common.
    """
    settings = finalists(cell)
    if not settings or contestant not in cell:
        return None
    common = sorted(cell[contestant].keys() & set.intersection(*(set(cell[name]) for name in settings)))
    if len(common) < 2:
        return None
    behind = []
    for scored in common:
        chosen = [statistics.fmean(_score(cell, settings, by=by, on=scored)) for by in common if by != scored]
        behind.append(statistics.fmean(chosen) - cell[contestant][scored])
    return _of(behind)


def over_tasks(gaps: Sequence[Gap]) -> Gap | None:
    """The mean over tasks; its error, from theirs, where every task has one."""
    if not gaps:
        return None
    errors = [gap.error for gap in gaps if gap.error is not None]
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(gaps) if len(errors) == len(gaps) else None
    return Gap(statistics.fmean(gap.points for gap in gaps), error, min(gap.seeds for gap in gaps))


def _score(cell: Cell, settings: Sequence[str], *, by: int, on: int) -> list[float]:
    best = max(cell[name][by] for name in settings)
    return [cell[name][on] for name in settings if cell[name][by] == best]


def _of(differences: Sequence[float]) -> Gap | None:
    if not differences:
        return None
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Gap(statistics.fmean(differences), error, count)
