"""Constant TAN on real data: one table of what a simulation at 1/64 of the compute is worth.

    python -m bench.planner [--data digits fashion_mnist] [--experiments] [--control] [--threads 1]

For each data set: accuracy over a 64-fold range of batches, agreement of the ranking at B / 64 with that at B, whether
the accuracy foretold for the chosen candidate holds, compute saved. ``--experiments`` adds E4 to E7 of the planner's
specification on digits; ``--control`` measures the sampling noise of small batches with and without privacy, instead of
the table, on each of ``--data``. Seeded throughout; parts that are not measured now are kept from the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.planner import constant_tan, digits, sampling_noise
from bench.planner.proxies import SETTINGS


def main(arguments: list[str] | None = None) -> None:
    """Measure, write JSON after each part, print the tables."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        **_earlier(options.out),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": options.threads,
    }
    record.setdefault("constant_tan", {})
    for name in options.data if options.control else ():
        known = record["constant_tan"].get(name)
        chosen = None if known is None else known["ranking"]["chosen"]
        controls = record.setdefault("sampling_noise", {})
        controls[name] = sampling_noise.measure(SETTINGS[name], chosen=chosen, say=_say)
        _write(options.out, record)
    for name in () if options.control else options.data:
        started = time.monotonic()
        record["constant_tan"][name] = constant_tan.measure(SETTINGS[name], say=_say)
        record["constant_tan"][name]["seconds"] = time.monotonic() - started
        _write(options.out, record)
    if options.experiments:
        record["experiments"] = digits.measure(seeds=options.seeds, say=_say)
        _write(options.out, record)
    print(constant_tan.table(record["constant_tan"]))
    if "sampling_noise" in record:
        print(sampling_noise.table(record["sampling_noise"]))
    if "experiments" in record:
        print(digits.table(record["experiments"]))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", choices=list(SETTINGS), default=["digits", "fashion_mnist"])
    parser.add_argument("--experiments", action="store_true", help="E4 to E7 on digits")
    parser.add_argument("--control", action="store_true", help="sampling noise, with and without privacy")
    parser.add_argument("--seeds", type=int, default=3, help="of the experiments")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/out/planner.json"))
    return parser.parse_args(arguments)


def _earlier(path: Path) -> dict[str, Any]:
    """Parts that an earlier call measured: a long benchmark is made in pieces."""
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
