"""What privacy costs: one private update over one ordinary update, as ratios of time and memory measured in one run.

    python -m bench.engine [--models mlp gpt] [--contestants noise private] [--rounds 9] [--threads 2]
    python -m bench.engine --sizes real --device cuda --dtype bfloat16
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 python -m bench.engine    # time without page faults (glibc)

A step of a private contestant includes clipping, the draw of the noise and the optimizer. Ratios are those of this
machine: norms, noise and Python do not become faster where products do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.engine.arena import Figures, Outcome, Refusal, Setting, baseline_first, measure
from bench.engine.contestants import BASELINE, BASELINE_OF, CONTESTANTS
from bench.engine.workloads import Sizes

_COMPILED = ("ordinary_compiled", "private_compiled")
_REPLAYED = ("replayed", "blocks_replayed")
_HEAP = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Settings of the C library's heap: whether freed memory is handed back, and faulted in when it is needed again."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    """Measure, write JSON, print one table."""
    options = _parse(arguments)
    setting = Setting(
        sizes=options.sizes,
        device=options.device,
        dtype=_DTYPES[options.dtype],
        threads=options.threads,
        rounds=options.rounds,
    )
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in options.models:
        results[model] = {}
        for group in baseline_first(options.contestants, together=options.together):
            outcomes = measure(model, contestants=group, setting=setting)
            rows = {
                kind: row(outcome, baseline=outcomes[BASELINE_OF.get(kind, BASELINE)])
                for kind, outcome in outcomes.items()
            }
            results[model] = {**rows, **results[model]}
        results[model] = {kind: results[model][kind] for kind in CONTESTANTS if kind in results[model]}
        _write(options.out, setting=setting, results=results)
    print(table(results))


def row(outcome: Outcome, *, baseline: Outcome) -> dict[str, Any]:
    """One contestant's figures, and their ratios to those of the baseline of the same group."""
    if isinstance(outcome, Refusal):
        return {"refused": outcome.reason}
    figures = dataclasses.asdict(outcome)
    if isinstance(baseline, Figures):
        ratios = [ours / theirs for ours, theirs in zip(outcome.turns, baseline.turns, strict=True)]
        figures["time_ratio"] = statistics.median(ratios)
        figures["time_ratio_quartiles"] = _quartiles(ratios)
        figures["memory_ratio"] = outcome.memory_mib / baseline.memory_mib
        figures["tensors_ratio"] = outcome.tensors_mib / baseline.tensors_mib
    return figures


def _quartiles(ratios: list[float]) -> list[float]:
    """Half of the turns lie between these two."""
    if len(ratios) < 2:
        return [ratios[0], ratios[0]]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [low, high]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All figures as aligned text, one line per model and contestant."""
    columns = f"{'ms':>9} {'time':>7} {'half of all':>13} {'MiB':>8} {'memory':>7} {'tensors':>7}"
    lines = [f"{'model':16} {'contestant':16} {columns}  where the time goes (ms)"]
    for model, rows in results.items():
        for kind, figures in rows.items():
            name = f"{model:16} {kind:16}"
            if "refused" in figures:
                lines.append(f"{name} refused: {figures['refused']}")
                continue
            keys = ("time_ratio", "memory_ratio", "tensors_ratio")
            ratios = [f"{figures[key]:6.2f}x" if key in figures else 7 * " " for key in keys]
            phases = ", ".join(f"{phase} {took:.1f}" for phase, took in figures["phases"].items())
            low, high = figures.get("time_ratio_quartiles", (0.0, 0.0))
            spread = f"{low:.2f} to {high:.2f}" if "time_ratio" in figures else ""
            time, size = f"{figures['milliseconds']:9.1f} {ratios[0]}", f"{figures['memory_mib']:8.0f}"
            measured = f"{time} {spread:>13} {size} {ratios[1]} {ratios[2]}"
            lines.append(f"{name} {measured}  {phases}")
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=Sizes, choices=list(Sizes), default=Sizes.SMALL, metavar="small|real|tiny")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all of these sizes")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: all but compiled ones")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    parser.add_argument("--together", type=int, default=len(CONTESTANTS), help="contestants in memory at once")
    parser.add_argument("--out", type=Path, default=Path("bench/out/engine.json"))
    options = parser.parse_args(arguments)
    unasked = _COMPILED if options.device == "cuda" else _COMPILED + _REPLAYED
    options.contestants = options.contestants or [kind for kind in CONTESTANTS if kind not in unasked]
    known = list(options.sizes.workloads)
    options.models = options.models or known
    unknown = [name for name in options.models if name not in known]
    if unknown:
        parser.error(f"--models {' '.join(unknown)}: sizes {options.sizes.value} has {', '.join(known)}.")
    return options


def _write(path: Path, *, setting: Setting, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if setting.device == "cuda" else platform.machine(),
        "sizes": setting.sizes.value,
        "dtype": str(setting.dtype),
        "threads": setting.threads,
        "rounds": setting.rounds,
        "heap": {name: os.environ[name] for name in _HEAP if name in os.environ},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{', '.join(results)}: written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
