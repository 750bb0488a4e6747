"""``python -m bench.auto_lr``: what a learning rate that sets itself is worth, against a grid that may look.

    python -m bench.auto_lr --data DATA --tasks toy digits adult --epsilons 1 3 8 --seeds 3

Rows are written one by one, and those that are there are not run again: stop it and start it as you like. ``--table``
prints what is there. Prodigy and D-Adaptation need the packages
prodigyopt and dadaptation; without them they are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.auto_lr import contestants
from bench.auto_lr.table import render
from bench.auto_lr.tasks import TASKS, load

RESULTS = Path(__file__).resolve().parents[1] / "results" / "auto-lr.json"
NEEDS = {"prodigy": "prodigyopt", "dadapt": "dadaptation"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.auto_lr", description="learning rates, on private gradients")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with adult, mnist, sms_spam, ...")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["toy", "digits"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", help="by the beginning of their names; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    rows = read(options.out)
    if not options.table:
        _run_missing(options, rows)
    print(render(rows))
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none when there is no file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _run_missing(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    known = {(row["task"], row["epsilon"], row["seed"], row["contestant"]) for row in rows}
    chosen = [
        name
        for name in contestants.names()
        if options.contestants is None or any(name.startswith(begin) for begin in options.contestants)
    ]
    for name in options.tasks:
        task = load(name, options.data)
        for seed in range(options.seeds):
            for epsilon in options.epsilons:
                for contestant in chosen:
                    if (name, epsilon, seed, contestant) in known or not _installed(contestant):
                        continue
                    started = time.process_time()
                    result = contestants.run(contestant, task, epsilon, seed=seed)
                    key = {"task": name, "epsilon": epsilon, "seed": seed, "contestant": contestant}
                    spent = {"cpu_seconds": round(time.process_time() - started, 2)}
                    rows.append({**key, **dataclasses.asdict(result), **spent})
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"rows": rows}, indent=0) + "\n")
                    print(f"{name} {epsilon:g} {seed} {contestant}: {result.accuracy:.4f}", file=sys.stderr)


def _installed(contestant: str) -> bool:
    package = NEEDS.get(contestant)
    return package is None or importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
