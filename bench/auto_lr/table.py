"""One table of a result file: points of accuracy, and gaps to the best that a grid can find by looking."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def seeds(rows: Rows, task: str, epsilon: float, contestant: str) -> frozenset[int]:
    """Seeds with which a contestant was run."""
    cell = (task, epsilon, contestant)
    return frozenset(row["seed"] for row in rows if (row["task"], row["epsilon"], row["contestant"]) == cell)


def mean(
    rows: Rows, task: str, epsilon: float, contestant: str, *, among: frozenset[int] | None = None
) -> float | None:
    """Mean accuracy over seeds, all or those ``among`` these, in points; None when there is none."""
    found = [
        100 * row["accuracy"]
        for row in rows
        if (row["task"], row["epsilon"], row["contestant"]) == (task, epsilon, contestant)
        and (among is None or row["seed"] in among)
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
    """Points that a contestant stays behind the oracle; negative when it is ahead.

    Over the seeds that both were run with: batches, noise and first weights are those of the seed, and move both.
    """
    best = oracle(rows, task, epsilon)
    if best is None:
        return None
    both = seeds(rows, task, epsilon, best[0]) & seeds(rows, task, epsilon, contestant)
    ceiling, own = (mean(rows, task, epsilon, name, among=both) for name in (best[0], contestant))
    return None if ceiling is None or own is None else ceiling - own


def spread(rows: Rows, task: str, epsilon: float) -> float | None:
    """Points between the best and the worst start of the search."""
    starts = {row["contestant"] for row in rows if row["contestant"].startswith("auto-from-")}
    found = [value for start in starts if (value := mean(rows, task, epsilon, start)) is not None]
    return max(found) - min(found) if len(found) > 1 else None


COLUMNS = ("auto", "auto-sgdm", "fixed", "fixed-root", "prodigy", "dadapt", "search")


TITLES = ("task", "epsilon", "best of the grid", "sets itself", "gap", "with momentum", "0.02, linear", "0.02, root")
FOREIGN = ("Prodigy", "D-Adaptation", "grid, search paid", "seeds")


def markdown(rows: Rows, names: Mapping[str, str]) -> str:
    """The table of docs/learning-rate.md: tasks in the order of ``names`` (task -> its name there).

    Seeds are those of what sets itself, of the grid's best, and of the paid search, where they differ.
    """
    titles = (*TITLES, *FOREIGN)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for task, told in names.items():
        for epsilon in sorted({row["epsilon"] for row in rows if row["task"] == task}):
            best, behind = oracle(rows, task, epsilon), gap(rows, task, epsilon)
            found = {name: mean(rows, task, epsilon, name) for name in COLUMNS}
            counts = [
                len(seeds(rows, task, epsilon, name)) for name in ("auto", "" if best is None else best[0], "search")
            ]
            cells = [
                told,
                f"{epsilon:g}",
                "—" if best is None else f"{best[1]:.1f} ({best[0][5:].replace(':', ' ').replace('sgdm', 'momentum')})",
                _point(found["auto"]),
                "—" if behind is None else f"{behind:+.1f}",
                *(_point(found[name]) for name in COLUMNS[1:]),
                "/".join(str(count) for count in counts) if len(set(counts)) > 1 else str(counts[0]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _point(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


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
