"""What each clipping rule does to probabilities: accuracy, negative log-likelihood and calibration error at epsilon 3.

    python -m bench.calibration --data /path/to/data [--seeds 3] [--sets adult,mnist,fashion_mnist] [--out FILE]

Adult with private statistics, and 12,000 images of MNIST and of Fashion-MNIST (a public draw) with a fifth of all
labels replaced by a random one, in training and in test. The model is the program's MLP with 64 units, trained as the
program does: DP-Adam at .02 with linear decay, 300 steps, the planner's batch and noise. "auto" is its default;
"auto, private T" is the default with --private-temperature: a part of the training rows is set apart by their hash, and
the temperature that they answer for privately divides the logits. Both parts keep epsilon 3, and so does the whole.
Every run is one line of the JSON file; a second call makes only the runs that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bench.plan_grid import ADULT_COLUMNS
from discreet.app import models
from discreet.app.data import Examples as Rows
from discreet.app.data import ImageInput, Prepared, Preprocessing, SetApart, open_source
from discreet.app.data.images import read_idx
from discreet.app.evaluation import evaluate, logits_of
from discreet.core.clipping import Clipping
from discreet.core.rng import NoiseSource, subkey
from discreet.insight.calibration import PrivateRows, fit_temperature
from discreet.privacy.accounting import Query
from discreet.privacy.files import write_atomically
from discreet.privacy.plan import Plan, default_delta
from discreet.privacy.planner import plan as make_plan
from discreet.train.check import check
from discreet.train.examples import Examples
from discreet.train.tempered import is_tempered, tempered_clipping
from discreet.train.trial import Recipe, Schedule, fresh_model, run_trial

EPSILON, IMAGES, LABEL_NOISE, CLASSES = 3.0, 12_000, 0.2, 10
AUTO = "auto"
PRIVATE_T = "auto, private T"
SMALL_R = "abadi .1"
RULES: Mapping[str, Callable[[int], Clipping]] = {
    AUTO: tempered_clipping,
    PRIVATE_T: tempered_clipping,
    SMALL_R: lambda _: Clipping.abadi(0.1),
    "abadi 1": lambda _: Clipping.abadi(1.0),
    "abadi 3": lambda _: Clipping.abadi(3.0),
    "abadi 10": lambda _: Clipping.abadi(10.0),
    "abadi 30": lambda _: Clipping.abadi(30.0),
    "automatic": lambda _: Clipping.automatic(),
    "psac .1": lambda _: Clipping.psac(0.1),
    "quantile .9": lambda _: Clipping.quantile(0.9, clip_bound=3.0),
}


@dataclass(frozen=True)
class Workload:
    """Data, and what was asked of them before training; ``apart`` answers for a private temperature alone."""

    train: Rows
    test: Rows
    apart: Rows | None
    input: object
    classes: int
    before: tuple[Query, ...]

    @property
    def delta(self) -> float:
        """Of all training rows, those that were set apart included."""
        return default_delta(len(self.train) + (0 if self.apart is None else len(self.apart)))

    def plan(self) -> Plan:
        """The program's plan for this data."""
        return make_plan(
            examples=len(self.train),
            epsilon=EPSILON,
            delta=self.delta,
            usual_steps=models.defaults(models.ModelKind.MLP).steps,
            before=self.before,
        )


def open_workload(name: str, folder: Path, *, seed: int, apart: bool) -> Workload:
    """One data set; the private statistics of Adult are drawn anew for each seed, from a test key.

    Args:
        apart: whether a part of the training rows is set apart for a private temperature.
    """
    part = SetApart() if apart else None
    return _adult(folder, seed, part) if name == "adult" else _images(folder / name, part)


def run(workload: Workload, rule: Clipping, *, seed: int) -> dict[str, float]:
    """Train once, and look at the test rows."""
    plan, tempered = workload.plan(), is_tempered(rule)
    spec = models.specify(models.ModelKind.MLP, input_spec=workload.input, classes=workload.classes, tempered=tempered)
    key = hashlib.sha256(f"calibration benchmark {seed}".encode()).digest()
    model, examples = fresh_model(lambda: models.build(spec), key=key), Examples(workload.train)
    few = workload.train.batch(torch.arange(4))
    report = check(model, models.loss, few, clipping=rule, examples=4)
    report.raise_if_failed()
    run_trial(
        model,
        examples,
        loss=models.loss,
        schedule=Schedule(plan.sampling, plan.noise_multiplier, plan.steps),
        recipe=Recipe(models.defaults(models.ModelKind.MLP).learning_rate),
        clipping=rule,
        layout=report.layout,
        key=key,
        private=False,
    )
    return _figures(model, workload.test, temperature=_private_temperature(model, workload, key))


def _private_temperature(model: nn.Module, workload: Workload, key: bytes) -> float:
    """What the rows that were set apart say within the whole epsilon; 1 where there are none."""
    if workload.apart is None:
        return 1.0
    source = NoiseSource.keyed(subkey(key, "private temperature"), private=False)
    rows = PrivateRows.within(EPSILON, delta=workload.delta, source=source, charge=lambda _query: None)
    return fit_temperature(logits_of(model, workload.apart), workload.apart.targets, rows=rows).value


def _figures(model: nn.Module, test: Rows, *, temperature: float) -> dict[str, float]:
    found = evaluate(model, test, temperature=temperature)
    assert found is not None
    return {name: value for name, value in dataclasses.asdict(found).items() if name in {"accuracy", "nll", "ece"}}


def _adult(folder: Path, seed: int, part: SetApart | None) -> Workload:
    source = open_source(
        folder / "adult" / "adult.data",
        target="income",
        test=folder / "adult" / "adult.test",
        columns=tuple(ADULT_COLUMNS.split(",")),
        schema=None,
        classes=None,
        text_column=None,
        image_size=None,
        text_units=models.text_units(models.ModelKind.MLP),
        calibration=part,
    )
    share = Preprocessing.share(
        epsilon=EPSILON, delta=default_delta(source.examples + (source.calibration_examples or 0))
    )
    key = hashlib.sha256(f"calibration statistics {seed}".encode()).digest()
    prepared: Prepared = source.prepare(noise_source=NoiseSource.keyed(key, private=False), preprocessing=share)
    assert prepared.test is not None
    return Workload(
        prepared.train,
        prepared.test,
        prepared.calibration,
        prepared.input,
        len(prepared.classes),
        before=source.queries(share),
    )


def _images(folder: Path, part: SetApart | None) -> Workload:
    train, train_targets, test, test_targets = (
        torch.from_numpy(read_idx(next(folder.glob(f"{part}*"))))
        for part in ("train-images", "train-labels", "t10k-images", "t10k-labels")
    )
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=generator)[:IMAGES]
    size = ImageInput(channels=1, height=train.shape[-2], width=train.shape[-1])
    kept, apart = _split(
        Rows(train[chosen].reshape(-1, 1, *train.shape[-2:]), _spoilt(train_targets[chosen].long(), generator)), part
    )
    return Workload(
        kept,
        Rows(test.reshape(-1, 1, *test.shape[-2:]), _spoilt(test_targets.long(), generator)),
        apart,
        size,
        CLASSES,
        before=(),
    )


def _split(rows: Rows, part: SetApart | None) -> tuple[Rows, Rows | None]:
    """Training rows, and those that the part holds, by the hash of pixels and label."""
    if part is None:
        return rows, None
    part = part.of(len(rows))
    fields = zip(rows.features, rows.targets.tolist(), strict=True)
    held_N = torch.tensor([part.holds((image.numpy().tobytes(), bytes([label]))) for image, label in fields])
    return Rows(rows.features[~held_N], rows.targets[~held_N]), Rows(rows.features[held_N], rows.targets[held_N])


def _spoilt(targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A fifth of the labels, replaced by any of the ten."""
    wrong = torch.rand(len(targets), generator=generator) < LABEL_NOISE
    return torch.where(wrong, torch.randint(CLASSES, (len(targets),), generator=generator), targets)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Means over the seeds that are there, a line for each data set and rule; and what the default is held to."""
    lines = [f"{'data':14s} {'rule':15s} {'seeds':>5s} {'accuracy':>9s} {'NLL':>7s} {'ECE':>7s}"]
    for name in dict.fromkeys(str(row["data"]) for row in rows):
        means = _means(rows, name)
        for rule, (count, accuracy, nll, ece) in means.items():
            lines.append(f"{name:14s} {rule:15s} {count:5d} {accuracy:9.4f} {nll:7.4f} {ece:7.4f}")
        if AUTO in means and set(means) - {AUTO, PRIVATE_T}:
            lines.append(verdict(name, means))
    return "\n".join(lines)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The same means as one table for the documentation: accuracy, NLL, ECE for each data set; the best are bold."""
    names = list(dict.fromkeys(str(row["data"]) for row in rows))
    means = {name: _means(rows, name) for name in names}
    lines = [
        "| rule | " + " | ".join(f"{name}: accuracy | NLL | ECE" for name in names) + " |",
        "|---|" + "---|---|---|" * len(names),
    ]
    for rule in RULES:
        cells = [rule]
        for name in names:
            figures = means[name].get(rule, (0, math.nan, math.nan, math.nan))[1:]
            best = [pick(found[at] for found in means[name].values()) for at, pick in ((1, max), (2, min), (3, min))]
            cells += [
                "" if math.isnan(value) else (f"**{value:.3f}**" if value == top else f"{value:.3f}").replace("0.", ".")
                for value, top in zip(figures, best, strict=True)
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(name: str, means: Mapping[str, tuple[int, float, float, float]]) -> str:
    """The default against the best of the single rules, and against Abadi at a small bound."""
    others = {rule: found for rule, found in means.items() if rule not in (AUTO, PRIVATE_T)}
    best = min(found[2] for found in others.values())
    _, accuracy, nll, ece = means[AUTO]
    lost = max(found[1] for found in others.values()) - accuracy
    said = f"{name}: default loses {100 * lost:.2f} points of accuracy to the best rule, NLL {_excess(nll, best)}"
    if PRIVATE_T in means:
        said += f" ({_excess(means[PRIVATE_T][2], best)} with a private temperature)"
    if SMALL_R in others:
        said += f", ECE {ece / others[SMALL_R][3]:.2f} of that of {SMALL_R}"
    return said


def _excess(nll: float, best: float) -> str:
    return f"{100 * (nll / best - 1.0):+.1f} %"


def _means(rows: Sequence[Mapping[str, object]], name: str) -> dict[str, tuple[int, float, float, float]]:
    found = {}
    for rule in RULES:
        mine = [row for row in rows if row["data"] == name and row["rule"] == rule]
        if mine:
            figures = (statistics.fmean(float(str(row[key])) for row in mine) for key in ("accuracy", "nll", "ece"))
            found[rule] = (len(mine), *figures)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with adult, mnist and fashion_mnist")
    parser.add_argument("--sets", default="adult,mnist,fashion_mnist")
    parser.add_argument("--rules", default=";".join(RULES), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/calibration.json"))
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation instead")
    options = parser.parse_args(arguments)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    known = {(row["data"], row["rule"], row["seed"]) for row in rows}
    for seed, name in itertools.product(range(options.seeds), options.sets.split(",")):
        todo = [rule for rule in options.rules.split(";") if (name, rule, seed) not in known]
        workloads: dict[bool, Workload] = {}
        for rule in todo:
            apart = rule == PRIVATE_T
            if apart not in workloads:
                workloads[apart] = open_workload(name, options.data, seed=seed, apart=apart)
            workload = workloads[apart]
            found = run(workload, RULES[rule](len(workload.train)), seed=seed)
            rows.append({"data": name, "rule": rule, "seed": seed, **found})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.out, json.dumps({"epsilon": EPSILON, "rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)
    print(markdown(rows) if options.markdown else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
