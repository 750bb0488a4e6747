"""One table of a result file: points of accuracy, and gaps to the best that a grid can find by looking."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def mean(rows: Rows, task: str, epsilon: float, contestant: str) -> float | None:
    """Mean accuracy over seeds, in points; None when there is none."""
    found = [
        100 * row["accuracy"]
        for row in rows
        if (row["task"], row["epsilon"], row["contestant"]) == (task, epsilon, contestant)
    ]
    return statistics.fmean(found) if found else None


def oracle(rows: Rows, task: str, epsilon: float) -> tuple[str, float] | None:
    """The best setting of the grid by its mean over seeds, chosen on the test rows; None without a grid.

    Settings with fewer seeds than others are out: they were left behind (`bench.auto_lr.pruning`).
    """
    counts = Counter(
        row["contestant"]
        for row in rows
        if (row["task"], row["epsilon"]) == (task, epsilon) and row["contestant"].startswith("grid:")
    )
    most = max(counts.values(), default=0)
    found = [
        (setting, value)
        for setting, count in counts.items()
        if count == most and (value := mean(rows, task, epsilon, setting)) is not None
    ]
    return max(found, key=lambda pair: (pair[1], pair[0])) if found else None


def gap(rows: Rows, task: str, epsilon: float, contestant: str = "auto") -> float | None:
    """Points that a contestant stays behind the oracle; negative when it is ahead."""
    best, own = oracle(rows, task, epsilon), mean(rows, task, epsilon, contestant)
    return None if best is None or own is None else best[1] - own


def spread(rows: Rows, task: str, epsilon: float) -> float | None:
    """Points between the best and the worst start of the search."""
    starts = {row["contestant"] for row in rows if row["contestant"].startswith("auto-from-")}
    found = [value for start in starts if (value := mean(rows, task, epsilon, start)) is not None]
    return max(found) - min(found) if len(found) > 1 else None


COLUMNS = ("auto", "auto-sgdm", "fixed", "fixed-root", "prodigy", "dadapt", "search")


def render(rows: Rows) -> str:
    """The table as text, one line per task and epsilon, then means over tasks."""
    cells = sorted({(row["task"], row["epsilon"]) for row in rows})
    lines = [f"{'task':14}{'eps':>5}{'oracle':>8}  {'setting':24}" + "".join(f"{name:>11}" for name in COLUMNS)]
    lines[0] += f"{'gap':>7}{'starts':>8}{'rate':>8}{'seeds':>7}"
    for task, epsilon in cells:
        best = oracle(rows, task, epsilon)
        shown = f"{task:14}{epsilon:5g}" + (f"{best[1]:8.2f}  {best[0][5:]:24}" if best else f"{'-':>8}  {'-':24}")
        shown += "".join(_number(mean(rows, task, epsilon, name), width=11) for name in COLUMNS)
        shown += _number(gap(rows, task, epsilon), width=7) + _number(spread(rows, task, epsilon), width=8)
        own = [r for r in rows if (r["task"], r["epsilon"], r["contestant"]) == (task, epsilon, "auto")]
        shown += f"{statistics.fmean(r['rate'] for r in own):8.4f}" if own else f"{'-':>8}"
        lines.append(shown + f"{len(own):7d}")
    for epsilon in sorted({epsilon for _, epsilon in cells}):
        gaps = {
            name: [g for task, e in cells if e == epsilon and (g := gap(rows, task, e, name)) is not None]
            for name in COLUMNS
        }
        told = ", ".join(f"{name} {statistics.fmean(found):+.2f}" for name, found in gaps.items() if found)
        if told:
            lines.append(f"mean gap to the oracle at epsilon {epsilon:g}, over {len(gaps['auto'])} tasks: {told}")
    seconds = sum(row["cpu_seconds"] for row in rows)
    lines.append(f"{len(rows)} runs, {seconds / 60:.0f} CPU minutes")
    return "\n".join(lines)


def _number(value: float | None, *, width: int) -> str:
    return f"{value:{width}.2f}" if value is not None else f"{'-':>{width}}"
