"""`discreet plan --simulate`: compare models, learning rates and steps at a small share of the compute, on public data.

The data to simulate on are read with the same options as the private ones. Their statistics are computed without
noise: they are public. When they are the private data themselves, nothing runs without ``--unaccounted-search``, and
then every line, file and plan says NON-PRIVATE.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from discreet.app import models
from discreet.app.data import Prepared, Preprocessing
from discreet.app.evaluation import evaluate
from discreet.app.options import DataOptions, open_data, pick_device
from discreet.app.plan_page import read_simulation, write_page
from discreet.app.planning import Planned
from discreet.app.progress import Progress
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError, DataError
from discreet.insight.origin import Origin
from discreet.insight.simulated_run import Candidate, Proxy
from discreet.insight.simulation import Simulation, simulate
from discreet.privacy.files import write_atomically
from discreet.privacy.plan import Plan
from discreet.train.setup import clipping_of
from discreet.train.tempered import is_tempered
from discreet.train.trial import Recipe

USUAL_RATES = (0.005, 0.01, 0.02, 0.04)
"""Around the default of 0.02."""


@dataclass(frozen=True)
class SimulationOptions:
    """What to compare, and on what.

    Attributes:
        data: public data of the same kind as the private ones.
        rates, kinds, steps: the declared grid; None: `USUAL_RATES`, the plan's model, the plan's steps.
        seeds: runs per setting.
        unaccounted: simulate even if the data are the private ones.
    """

    data: Path
    rates: tuple[float, ...] | None = None
    kinds: tuple[models.ModelKind, ...] | None = None
    steps: tuple[int, ...] | None = None
    seeds: int = 3
    unaccounted: bool = False


@dataclass(frozen=True)
class Simulated:
    """A simulation, and the plan and settings that it chose."""

    simulation: Simulation
    plan: Plan
    model: models.ModelKind
    rate: float
    out: Path | None

    def to_json(self) -> dict[str, object]:
        """What ``--json`` adds to the plan."""
        return {
            **self.simulation.to_json(),
            "model": self.model.value,
            "learning_rate": self.rate,
            "plan": self.plan.to_json(),
            "out": str(self.out) if self.out is not None else None,
        }

    def text(self) -> str:
        """What the command prints: the ranking, what the best one is expected to reach, and what to mind."""
        found, fit = self.simulation, self.simulation.fit
        width = max(len(standing.candidate) for standing in found.ranking)
        batches = sorted({trial.batch for trial in found.trials})
        stamp = [f"{found.stamp}\n"] if found.stamp else []
        return "\n".join(
            [
                *stamp,
                f"Simulated on {found.data} at batches of {_and(batches)}, {found.saved:.0f} times cheaper:",
                *(f"  {s.candidate.ljust(width)}  {s.mean:.4f} +- {s.sd:.4f}" for s in found.ranking),
                f"Best: {found.chosen}. At the real batch of {fit.at_batch:,} one run should reach {fit.expected:.4f}, "
                f"with {100 * fit.confidence:.0f} % confidence {fit.low:.4f} to {fit.high:.4f}",
                f"({100 * fit.per_doubling:+.2f} points per doubling; law {fit.law.value}"
                f"{', interval of both laws' if fit.both else ''}; {fit.doublings:.1f} doublings beyond the "
                f"{fit.evidence:.1f} that were simulated). A figure about {found.data}, not about your data.",
                *found.warnings(),
                f"next  train with --model {self.model.value} --learning-rate {self.rate:g}",
                *([f"simulation  {self.out}"] if self.out is not None else []),
            ]
        )


def simulate_plan(
    planned: Planned, private: DataOptions | None, data: DataOptions, options: SimulationOptions, *, device: str
) -> Simulated:
    """Compare the grid, write file and page, and save the plan again with a note of how its settings were chosen.

    Args:
        planned: what `discreet plan` proposes. private: the data that it is for, where there are some.
        data: the data to simulate on.

    Raises:
        ConfigError: an argument is outside its range, or the data are private and ``unaccounted`` was not asked for.
        DataError: the data cannot be read, or hold no test rows to score on.
    """
    kind = options.kinds[0] if options.kinds else models.ModelKind.AUTO
    source = open_data(data, kind=kind)
    origin = Origin.PUBLIC
    if private is not None and _same_data(private, data, kind=kind, fingerprint=source.fingerprint()):
        origin = Origin.PRIVATE
    if origin is Origin.PRIVATE and not options.unaccounted:
        raise ConfigError(
            f"--simulate {options.data}: is the private data; each trial would cost a full epsilon and none is "
            "charged: name public data, use `discreet tune`, or add --unaccounted-search, which stamps all NON-PRIVATE."
        )
    public = Preprocessing(noise_multiplier=0.0, delta=0.0)
    prepared = source.prepare(noise_source=NoiseSource.insecure_seed(0), preprocessing=public)
    kinds = [models.resolve(each, prepared.input) for each in options.kinds or (models.ModelKind.AUTO,)]
    grid = _grid(planned.chosen.plan, prepared, kinds, options, device=device)
    with Progress(steps=1, unit="step") as progress:
        found = simulate(
            [candidate for candidate, _, _ in grid],
            _proxy(prepared, name=options.data.name, origin=origin),
            seeds=options.seeds,
            unaccounted=options.unaccounted,
            on_progress=lambda done, total: progress.show(done, of=total),
        )
    candidate, model, rate = next(entry for entry in grid if entry[0].name == found.chosen)
    plan = dataclasses.replace(candidate.plan, notes=(*candidate.plan.notes, found.note()))
    if planned.out is not None:
        plan.save(planned.out)
    out = _beside(planned.out or planned.html)
    result = Simulated(simulation=found, plan=plan, model=model, rate=rate, out=out)
    if out is not None:
        write_atomically(out, json.dumps(found.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n")
    if out is not None and planned.html is not None:
        write_page(planned.proposal, planned.html, simulation=read_simulation(out))
    return result


def _grid(
    plan: Plan, prepared: Prepared, kinds: Sequence[models.ModelKind], options: SimulationOptions, *, device: str
) -> list[tuple[Candidate, models.ModelKind, float]]:
    """Models x rates x steps, each with its plan and the rate to train with."""
    rates = options.rates or USUAL_RATES
    if any(not 0 < rate < math.inf for rate in rates):
        raise ConfigError(f"--learning-rates {rates}: must be finite numbers above 0; e.g. 0.01,0.02,0.04.")
    place = pick_device(device)
    found = []
    for steps in options.steps or (plan.steps,):
        its_plan = with_steps(plan, steps)
        for kind in dict.fromkeys(kinds):
            spec = models.specify(
                kind, input_spec=prepared.input, classes=len(prepared.classes), tempered=is_tempered(clipping_of(plan))
            )
            for rate in dict.fromkeys(rates):
                recipe = Recipe(rate).for_steps(steps, instead_of=plan.steps)
                ending = "" if options.steps is None else f", {steps} steps"
                candidate = Candidate(
                    name=f"{kind.value} at {recipe.learning_rate:.3g}{ending}",
                    plan=its_plan,
                    recipe=recipe,
                    build=lambda spec=spec: models.build(spec).to(place),
                    loss=models.loss,
                )
                found.append((candidate, kind, recipe.learning_rate))
    return found


def with_steps(plan: Plan, steps: int) -> Plan:
    """The plan of the same budget with another number of steps, at constant TAN: ``B ~ 1 / sqrt(S)``, at most N."""
    if steps == plan.steps:
        return plan
    if steps < 1:
        raise ConfigError(f"--simulate-steps {steps}: must be at least 1; e.g. 100,400.")
    batch = min(plan.examples, max(1, round(plan.batch_size * math.sqrt(plan.steps / steps))))
    return Plan.solve(
        examples=plan.examples,
        batch_size=batch,
        steps=steps,
        epsilon=plan.epsilon,
        delta=plan.delta,
        relation=plan.relation,
        accountant=plan.accountant,
        clipping=plan.clipping,
        before=plan.before,
        notes=plan.notes,
    )


def _proxy(prepared: Prepared, *, name: str, origin: Origin) -> Proxy:
    test = prepared.test
    if test is None or not len(test):
        raise DataError(f"{name}: has no test rows to score on; give it a test part.")

    def accuracy(model: nn.Module) -> float:
        found = evaluate(model, test)
        assert found is not None
        return found.accuracy

    return Proxy(data=prepared.train, score=accuracy, origin=origin, name=name)


def _same_data(private: DataOptions, data: DataOptions, *, kind: models.ModelKind, fingerprint: str) -> bool:
    """Whether two sets of options lead to the same rows: by path, or by content under another name."""
    if private.path.resolve() == data.path.resolve():
        return True
    return open_data(private, kind=kind).fingerprint() == fingerprint


def _beside(plan: Path | None) -> Path | None:
    """Where the simulation is written: beside the plan, or beside its page."""
    return None if plan is None else plan.with_name(f"{plan.stem}.simulation.json")


def _and(batches: Sequence[int]) -> str:
    return " and ".join(f"{batch:,}" for batch in batches)
