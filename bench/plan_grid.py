"""Is the recommended plan any good? It, and a grid of batch sizes and steps, at the same epsilon and the same compute.

    python -m bench.plan_grid --data DIR [--sets digits adult sms fashion mnist banking] [--out FILE]

For each data set and each bound on the examples processed, every cell of the grid spends the whole bound: B =
bound / S. The recommended plan comes from `discreet.plan` with that bound alone. All runs are in test mode, with the
same seeds for every cell; the model, the rate and the data are those of `discreet train`. The best cell is the best of
several noisy means, so it flatters itself by about a standard error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from discreet.app import models
from discreet.app.data import Prepared, Preprocessing, Source, digits, open_source
from discreet.app.evaluation import evaluate
from discreet.core.rng import NoiseSource
from discreet.privacy.accounting import Query
from discreet.privacy.plan import Plan, default_delta
from discreet.privacy.planning import plan as propose
from discreet.train.make_private import make_private

ADULT_COLUMNS = (
    "age,workclass,fnlwgt,education,education_num,marital_status,occupation,relationship,race,sex,capital_gain,"
    "capital_loss,hours_per_week,native_country,income"
)
STEPS = (50, 100, 200, 400, 800)


@dataclass(frozen=True)
class Workload:
    """One data set at one epsilon, with the bounds to try: examples processed in all."""

    name: str
    epsilon: float
    bounds: tuple[int, ...]
    seeds: int


WORKLOADS = (
    Workload("digits", epsilon=3.0, bounds=(20_000, 77_000), seeds=3),
    Workload("adult", epsilon=3.0, bounds=(100_000, 880_000), seeds=2),
    Workload("sms", epsilon=8.0, bounds=(20_000, 100_000), seeds=2),
    Workload("fashion", epsilon=3.0, bounds=(100_000,), seeds=1),
    Workload("mnist", epsilon=3.0, bounds=(100_000,), seeds=1),
    Workload("banking", epsilon=8.0, bounds=(20_000, 100_000), seeds=2),
)
"""The planner's one fitted constant was chosen on the first four; nobody had looked at the last two."""


@dataclass(frozen=True)
class Cell:
    """What one (B, S) came to: accuracies on held-out data, one for each seed."""

    batch_size: int
    steps: int
    noise_multiplier: float
    accuracies: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.fmean(self.accuracies)


def open_workload(name: str, folder: Path) -> Source | None:
    """The source of a data set; None for the bundled digits."""
    if name == "digits":
        return None
    path, target, test, columns = {
        "adult": ("adult/adult.data", "income", "adult/adult.test", tuple(ADULT_COLUMNS.split(","))),
        "sms": ("sms_spam/SMSSpamCollection", "label", None, ("label", "text")),
        "fashion": ("fashion_mnist", None, None, None),
        "mnist": ("mnist", None, None, None),
        "banking": ("banking77/train.csv", "category", "banking77/test.csv", None),
    }[name]
    return open_source(
        folder / path,
        target=target,
        test=None if test is None else folder / test,
        columns=columns,
        schema=None,
        classes=None,
        text_column=None,
        image_size=None,
        text_units=models.text_units(models.ModelKind.AUTO),
    )


class Laboratory:
    """Trains cells of one workload; data are prepared once for each seed."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        self._source = open_workload(workload.name, folder)
        self.examples = len(digits().train) if self._source is None else self._source.examples
        self.delta = default_delta(self.examples)
        self._share = Preprocessing.share(epsilon=workload.epsilon, delta=self.delta)
        self._prepared: dict[int, Prepared] = {}

    @property
    def before(self) -> tuple[Query, ...]:
        """What the private statistics cost."""
        return () if self._source is None else self._source.queries(self._share)

    def recommended(self, bound: int) -> Plan:
        """The planner's answer, from public numbers alone."""
        proposal = propose(
            examples=self.examples,
            epsilon=self.workload.epsilon,
            delta=self.delta,
            samples=bound,
            usual_steps=models.defaults(models.ModelKind.MLP).steps,
            before=self.before,
        )
        return proposal.plan

    def solve(self, *, batch_size: int, steps: int) -> Plan:
        """The plan of one cell."""
        return Plan.solve(
            examples=self.examples,
            batch_size=batch_size,
            steps=steps,
            epsilon=self.workload.epsilon,
            delta=self.delta,
            before=self.before,
        )

    def train(self, plan: Plan) -> Cell:
        """Train once for each seed."""
        started = time.perf_counter()
        accuracies = tuple(self._accuracy(plan, seed) for seed in range(self.workload.seeds))
        return Cell(
            batch_size=plan.batch_size,
            steps=plan.steps,
            noise_multiplier=plan.noise_multiplier,
            accuracies=accuracies,
            seconds=(time.perf_counter() - started) / self.workload.seeds,
        )

    def _accuracy(self, plan: Plan, seed: int) -> float:
        data = self._data(seed)
        spec = models.specify(models.ModelKind.AUTO, input_spec=data.input, classes=len(data.classes))
        torch.manual_seed(seed)
        model = models.build(spec)
        rate = models.defaults(spec.kind).learning_rate
        with tempfile.TemporaryDirectory() as folder:
            private = make_private(
                model,
                torch.optim.Adam(model.parameters(), lr=rate),
                data.train,
                loss=models.loss,
                plan=plan,
                learning_rate=rate,
                run_dir=Path(folder) / "run",
                seed=seed,
            )
            for _ in private:
                pass
        assert data.test is not None
        found = evaluate(model, data.test)
        assert found is not None
        return found.accuracy

    def _data(self, seed: int) -> Prepared:
        if seed not in self._prepared:
            self._prepared[seed] = (
                digits()
                if self._source is None
                else self._source.prepare(noise_source=NoiseSource.insecure_seed(seed), preprocessing=self._share)
            )
        return self._prepared[seed]


def compare(laboratory: Laboratory, bound: int, *, known: Sequence[Cell] = ()) -> dict[str, object]:
    """The recommended plan and the grid at one bound; ``known``: the grid, if it was trained before."""
    chosen = laboratory.train(laboratory.recommended(bound))
    cells = list(known)
    for steps in () if known else STEPS:
        batch = bound // steps
        if 8 <= batch <= laboratory.examples:
            cells.append(laboratory.train(laboratory.solve(batch_size=batch, steps=steps)))
            print(f"  S {steps:5}  B {batch:6}  {100 * cells[-1].mean:.2f}", flush=True)
    best = max(cells, key=lambda cell: cell.mean)
    return {
        "data": laboratory.workload.name,
        "examples": laboratory.examples,
        "epsilon": laboratory.workload.epsilon,
        "bound": bound,
        "seeds": laboratory.workload.seeds,
        "recommended": asdict(chosen),
        "grid": [asdict(cell) for cell in cells],
        "best": asdict(best),
        "points_behind_the_best": 100 * (best.mean - chosen.mean),
    }


def table(results: Sequence[dict[str, object]]) -> str:
    """The comparison as a table."""
    lines = [
        "| data, epsilon | examples | recommended B x S | accuracy | best cell | accuracy | worst cell | behind |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        grid = [Cell(**cell) for cell in result["grid"]]
        chosen, best = Cell(**result["recommended"]), Cell(**result["best"])
        worst = min(grid, key=lambda cell: cell.mean)
        lines.append(
            f"| {result['data']}, {result['epsilon']:g} | {result['bound']:,} | {chosen.batch_size} x {chosen.steps} | "
            f"{100 * chosen.mean:.2f} | {best.batch_size} x {best.steps} | {100 * best.mean:.2f} | "
            f"{100 * worst.mean:.2f} | {result['points_behind_the_best']:+.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with adult/, sms_spam/, mnist/, ...")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, help="runs of each cell; default: 1 to 3")
    parser.add_argument("--grid", type=Path, help="figures of an earlier run: its grids are kept, not trained again")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    known = {} if options.grid is None else _grids(options.grid)
    results = []
    for workload in WORKLOADS:
        if workload.name not in options.sets:
            continue
        if options.seeds is not None:
            workload = Workload(**{**asdict(workload), "seeds": options.seeds})
        laboratory = Laboratory(workload, options.data)
        for bound in workload.bounds:
            print(f"{workload.name}, {bound:,} examples", flush=True)
            results.append(compare(laboratory, bound, known=known.get((workload.name, bound, workload.seeds), ())))
            if options.out is not None:
                _write(options.out, results, seconds=time.perf_counter() - started)
    print(table(results))


def _grids(path: Path) -> dict[tuple[str, int, int], list[Cell]]:
    """(data, bound, seeds) -> cells: no cell depends on what the planner would have chosen."""
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(r["data"], r["bound"], r["seeds"]): [Cell(**cell) for cell in r["grid"]] for r in found}


def _write(path: Path, results: Sequence[dict[str, object]], *, seconds: float) -> None:
    record = {
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
