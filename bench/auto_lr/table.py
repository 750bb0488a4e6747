"""One table of a result file: points of accuracy, and gaps to the best that a grid can find by looking."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from bench.auto_lr.gaps import Cell, Gap, Rows, cells, gap, gap_without_luck, mean, oracle, over_tasks

COLUMNS = ("auto", "auto-sgdm", "fixed", "fixed-root", "prodigy", "dadapt", "search")
TITLES = ("task", "epsilon", "best of the grid", "sets itself", "gap", "without luck", "with momentum", "0.02, linear")
FOREIGN = ("0.02, root", "Prodigy", "D-Adaptation", "grid, search paid", "seeds")
AGAINST = {
    "fixed": "0.02, linear",
    "fixed-root": "0.02, root",
    "prodigy": "Prodigy",
    "dadapt": "D-Adaptation",
    "search": "the grid, its search paid",
}


def spread(cell: Cell) -> float | None:
    """Points between the best and the worst start of the search."""
    found = [value for start in cell if start.startswith("auto-from-") and (value := mean(cell, start)) is not None]
    return max(found) - min(found) if len(found) > 1 else None


def markdown(rows: Rows, names: Mapping[str, str]) -> str:
    """The tables of docs/learning-rate.md: cells, gaps and rivals; ``names``: task -> its name there, in their order.

    Seeds are those of what sets itself, of the grid's best, and of the paid search, where they differ.
    """
    known = sorted(cells(rows).items())
    by = {(told, epsilon): cell for task, told in names.items() for (of, epsilon), cell in known if of == task}
    lines = [*_rule((*TITLES, *FOREIGN)), *(_line(_cells_of(cell, *at)) for at, cell in by.items())]
    return "\n".join([*lines, "", *_gaps(by), "", *_rivals(by)])


def _cells_of(cell: Cell, told: str, epsilon: float) -> list[str]:
    best = oracle(cell)
    of_best = None if best is None else mean(cell, best)
    setting = "" if best is None else best.removeprefix("grid:").replace(":", " ").replace("sgdm", "momentum")
    found = {name: mean(cell, name) for name in COLUMNS}
    counts = [len(cell.get(name, ())) for name in ("auto", best or "", "search")]
    return [
        told,
        f"{epsilon:g}",
        "—" if of_best is None else f"{of_best:.1f} ({setting})",
        _point(found["auto"]),
        _with_error(gap(cell)),
        _with_error(gap_without_luck(cell)),
        *(_point(found[name]) for name in COLUMNS[1:]),
        "/".join(str(count) for count in counts) if len(set(counts)) > 1 else str(counts[0]),
    ]


def _gaps(by: Mapping[tuple[str, float], Cell]) -> list[str]:
    """Mean gaps to the oracle by epsilon, of what sets itself with either optimizer."""
    lines = _rule(("epsilon", "optimizer", "tasks", "mean gap", "without luck", "worst cell", "worst without luck"))
    for epsilon in sorted({epsilon for _, epsilon in by}):
        for name, told in (("auto", "DP-Adam"), ("auto-sgdm", "momentum")):
            tasks = {task: cell for (task, at), cell in by.items() if at == epsilon}
            lucky = {task: found for task, cell in tasks.items() if (found := gap(cell, name)) is not None}
            fair = {task: found for task, cell in tasks.items() if (found := gap_without_luck(cell, name)) is not None}
            means = (_with_error(over_tasks(list(found.values()))) for found in (lucky, fair))
            lines.append(_line([f"{epsilon:g}", told, str(len(lucky)), *means, _worst(lucky), _worst(fair)]))
    return lines


def _worst(gaps: Mapping[str, Gap]) -> str:
    task = max(gaps, key=lambda task: gaps[task].points, default=None)
    return "—" if task is None else f"{_with_error(gaps[task])} ({task})"


def _rivals(by: Mapping[tuple[str, float], Cell]) -> list[str]:
    """How far others are behind what sets itself, by epsilon, and where they are ahead of it."""
    lines = _rule(("epsilon", "against", "cells", "mean lead", "behind in", "where it is ahead"))
    for epsilon in sorted({epsilon for _, epsilon in by}):
        for name, told in AGAINST.items():
            tasks = {task: cell for (task, at), cell in by.items() if at == epsilon}
            leads = {task: found for task, cell in tasks.items() if (found := gap(cell, name, to="auto")) is not None}
            ahead = "; ".join(f"{task} {_with_error(lead)}" for task, lead in leads.items() if lead.points < 0)
            behind = sum(lead.points > 0 for lead in leads.values())
            means = _with_error(over_tasks(list(leads.values())))
            lines.append(_line([f"{epsilon:g}", told, str(len(leads)), means, f"{behind}", ahead or "nowhere"]))
    return lines


def _rule(titles: tuple[str, ...]) -> list[str]:
    return [_line(list(titles)), "|" + "---|" * len(titles)]


def _line(found: list[str]) -> str:
    return "| " + " | ".join(found) + " |"


def _point(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}"


def _with_error(found: Gap | None) -> str:
    if found is None:
        return "—"
    return f"{found.points:+.2f}" + ("" if found.error is None else f" ± {found.error:.2f}")


def render(rows: Rows) -> str:
    """The table as text, one line per task and epsilon, then means over tasks."""
    by = cells(rows)
    lines = [f"{'task':14}{'eps':>5}{'oracle':>8}  {'setting':24}" + "".join(f"{name:>11}" for name in COLUMNS)]
    lines[0] += f"{'gap':>7}{'starts':>8}{'rate':>8}{'seeds':>7}"
    for (task, epsilon), cell in sorted(by.items()):
        best, behind = oracle(cell), gap(cell)
        shown = f"{task:14}{epsilon:5g}" + (
            f"{'-':>8}  {'-':24}" if best is None else f"{mean(cell, best):8.2f}  {best.removeprefix('grid:'):24}"
        )
        shown += "".join(_number(mean(cell, name), width=11) for name in COLUMNS)
        shown += _number(None if behind is None else behind.points, width=7) + _number(spread(cell), width=8)
        own = (task, epsilon, "auto")
        rates = [row["rate"] for row in rows if (row["task"], row["epsilon"], row["contestant"]) == own]
        shown += f"{statistics.fmean(rates):8.4f}" if rates else f"{'-':>8}"
        lines.append(shown + f"{len(rates):7d}")
    for epsilon in sorted({epsilon for _, epsilon in by}):
        tasks = [cell for (_, at), cell in by.items() if at == epsilon]
        gaps = {name: [found for cell in tasks if (found := gap(cell, name)) is not None] for name in COLUMNS}
        told = ", ".join(f"{name} {_with_error(over_tasks(found))}" for name, found in gaps.items() if found)
        if told:
            lines.append(f"mean gap to the oracle at epsilon {epsilon:g}, over {len(gaps['auto'])} tasks: {told}")
    seconds = sum(row["cpu_seconds"] for row in rows)
    lines.append(f"{len(rows)} runs, {seconds / 60:.0f} CPU minutes")
    return "\n".join(lines)


def _number(value: float | None, *, width: int) -> str:
    return f"{value:{width}.2f}" if value is not None else f"{'-':>{width}}"
