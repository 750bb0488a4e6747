"""``python -m bench.auto_lr``: what a learning rate that sets itself is worth, against a grid that may look.

    python -m bench.auto_lr --data DATA --tasks toy digits adult --epsilons 1 3 8 --seeds 3
    python -m bench.auto_lr --data DATA --small --out bench/results/auto-lr-small.json

Rows are written one by one, and those that are there are not run again: stop it and start it as you like. Seeds are
outermost, and searches last, so that the table is of use at any time. ``--table`` prints what is there. Prodigy and
D-Adaptation need the packages prodigyopt and dadaptation; without them they are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.auto_lr import contestants, pruning
from bench.auto_lr.table import markdown, render
from bench.auto_lr.tasks import NAMES, SMALL, TASKS, Task, load

RESULTS = Path(__file__).resolve().parents[1] / "results" / "auto-lr.json"
NEEDS = {"prodigy": "prodigyopt", "dadapt": "dadaptation"}
Cell = tuple[str, float, int, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.auto_lr", description="learning rates, on private gradients")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with adult, mnist, sms_spam, ...")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), help="default: toy and digits; all when small")
    parser.add_argument("--small", action="store_true", help="cut every task to what one core does in a minute or less")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", help="auto, grid, grid:sgdm, ...; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="run nothing, and print the table of the documentation")
    options = parser.parse_args(arguments)
    if options.tasks is None:
        options.tasks = list(SMALL) if options.small else ["toy", "digits"]
    rows = read(options.out)
    if options.markdown:
        print(markdown(rows, NAMES))
        return 0
    if not options.table:
        _run_missing(options, rows)
    print(render(rows))
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none when there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write them beside the file, and put it in its place: a stop never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    lines = ",\n".join(json.dumps(row) for row in rows)
    beside.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    os.replace(beside, path)


def order(options: argparse.Namespace) -> Iterator[Cell]:
    """(task, epsilon, seed, contestant) in the order in which they are run."""
    single = [name for name in contestants.names() if not name.startswith(("grid:", "search"))]
    for seed in range(options.seeds):
        for names in (single, list(pruning.outward())):
            for task in options.tasks:
                for epsilon in options.epsilons:
                    yield from ((task, epsilon, seed, name) for name in names)
    for seed in range(options.seeds):
        for task in options.tasks:
            yield from ((task, epsilon, seed, "search") for epsilon in options.epsilons)


def _run_missing(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    known = {(row["task"], row["epsilon"], row["seed"], row["contestant"]): row for row in rows}
    tasks: dict[str, Task] = {}
    chosen = options.contestants or [""]
    for cell in order(options):
        name, epsilon, seed, contestant = cell
        if cell in known or not _is_chosen(contestant, chosen) or not _installed(contestant):
            continue
        if contestant.startswith("grid:") and not pruning.is_worth_a_run(
            contestant, _first(known, task=name, epsilon=epsilon), seed=seed
        ):
            continue
        twin = known.get((name, epsilon, seed, contestants.TWINS.get(contestant, "")))
        if twin is None and name not in tasks:
            tasks[name] = load(name, options.data, small=options.small)
        row = {**twin, "contestant": contestant, "cpu_seconds": 0.0} if twin else _run(tasks[name], cell)
        rows.append(row)
        known[cell] = row
        write(options.out, rows)
        print(f"{name} {epsilon:g} {seed} {contestant}: {row['accuracy']:.4f}", file=sys.stderr)


def _run(task: Task, cell: Cell) -> dict[str, Any]:
    name, epsilon, seed, contestant = cell
    started = time.process_time()
    result = contestants.run(contestant, task, epsilon, seed=seed)
    key = {"task": name, "epsilon": epsilon, "seed": seed, "contestant": contestant}
    return {**key, **dataclasses.asdict(result), "cpu_seconds": round(time.process_time() - started, 2)}


def _first(known: dict[Cell, dict[str, Any]], *, task: str, epsilon: float) -> dict[str, float]:
    """Setting of the grid -> accuracy with the first seed, in one task at one epsilon."""
    return {
        contestant: row["accuracy"]
        for (of, at, seed, contestant), row in known.items()
        if (of, at, seed) == (task, epsilon, 0) and contestant.startswith("grid:")
    }


def _is_chosen(contestant: str, chosen: Sequence[str]) -> bool:
    """By its whole name, or by a beginning of it that ends at a colon; "" is all."""
    return any(name in ("", contestant) or contestant.startswith(name + ":") for name in chosen)


def _installed(contestant: str) -> bool:
    package = NEEDS.get(contestant)
    return package is None or importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
