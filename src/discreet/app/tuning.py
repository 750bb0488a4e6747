"""`discreet tune`: data -> plan, shown -> ledger -> private statistics -> a secret number of runs -> the best one."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from discreet.app import models
from discreet.app.calibrating import with_advice
from discreet.app.data import Examples, Prepared, Preprocessing, Source
from discreet.app.evaluation import Evaluation, calibration_of, evaluate
from discreet.app.options import DataOptions, open_data, pick_device
from discreet.app.progress import SECONDS_BETWEEN_LINES
from discreet.app.results import CALIBRATION, RESULT, Written, write_results
from discreet.app.runs import (
    AskedAndPlanned,
    asked_and_planned,
    refuse_ended,
    resume_run,
    same_content,
    sizes,
    warn_of_weak_promises,
    weak_promises,
)
from discreet.app.temperature import trained_statement
from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.insight.origin import Origin
from discreet.privacy.accounting import Query
from discreet.privacy.plan import Plan, default_delta
from discreet.privacy.repetitions import Stopping
from discreet.privacy.tuning import USUAL_RUNS, one_run, plan_search
from discreet.privacy.verification import Verification, verify
from discreet.train.contest import Choice, PrivateScore, PublicScore
from discreet.train.environment import describe_data
from discreet.train.run import PREPROCESSING, Run, Stage
from discreet.train.run_directory import new_run_dir
from discreet.train.setup import clipping_of
from discreet.train.tempered import is_tempered, reason, tempered_clipping
from discreet.train.trial import Recipe
from discreet.train.tune import Tuned, tune

_LONG = 0.95


@dataclass(frozen=True)
class TuneOptions:
    """What a user may say about a search; None leaves it open. See `discreet.train.tune.tune`.

    Attributes:
        rates, kinds: the declared grid; kinds None: the usual model for the data.
        score_data: public data to compare runs on; None: the private training rows, with noise.
    """

    epsilon: float
    rates: tuple[float, ...]
    kinds: tuple[models.ModelKind, ...] | None = None
    delta: float | None = None
    runs: float = USUAL_RUNS
    stopping: Stopping = Stopping.LOGARITHMIC
    score_data: Path | None = None
    batch_size: int | None = None
    steps: int | None = None
    clipping: Clipping | None = None
    out: Path | None = None
    resume: bool = False
    device: str = "auto"
    seed: int | None = None


@dataclass(frozen=True)
class TuneOutcome:
    """What a finished search amounts to. Released or public, all of it; ``test`` is about the held-out examples."""

    tuned: Tuned
    verified: Verification
    written: Written
    model: dict[str, object]
    rate: float
    test: Evaluation | None
    statements: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The object that ``--json`` prints, and ``result.json``. How long it took is not in it: time tells K."""
        return {
            "run_dir": str(self.tuned.run_dir),
            "report": None if self.written.page is None else str(self.written.page),
            "epsilon": self.verified.epsilon,
            **sizes(self.tuned.plan),
            "private": self.verified.private,
            "chosen": self.tuned.choice,
            "learning_rate": self.rate,
            "score": self.tuned.score if math.isfinite(self.tuned.score) else None,
            "model": self.model,
            "test": self.test.to_json() if self.test is not None else None,
            "statements": list(self.statements),
        }

    def text(self) -> str:
        """What the command prints."""
        plan = self.tuned.plan
        facts: dict[str, object] = {
            "epsilon, of the whole search": f"{self.verified.epsilon:.6g}",
            "delta": f"{plan.delta:.6g}",
            "chosen": self.tuned.choice,
            "its score": f"{self.tuned.score:.4f}",
        }
        if self.test is not None:
            facts["test accuracy"] = f"{self.test.accuracy:.4f}, {self.test.stamp}"
            facts["  always the commonest class"] = f"{self.test.constant_accuracy:.4f}, {self.test.stamp}"
            if self.test.unlisted:
                facts["test rows of no listed class, counted as wrong"] = self.test.unlisted
        facts |= {"run": self.tuned.run_dir, "report": self.written.page or "not written"}
        width = max(len(name) for name in facts)
        lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items()]
        stamp = [] if self.verified.private else ["NOT PRIVATE: tuned in test mode.\n"]
        return "\n".join([*stamp, *lines, "", *self.statements])


def tune_file(data: DataOptions, options: TuneOptions) -> TuneOutcome:
    """Search on a file or folder. Everything is read, validated and announced before anything is written."""
    device = pick_device(options.device)
    if not options.resume:
        refuse_ended(options.out)
    kinds = options.kinds or (models.ModelKind.AUTO,)
    source = open_data(data, kind=kinds[0])
    kinds = tuple(dict.fromkeys(models.kind_for(kind, source.kind) for kind in kinds))
    _check_grid(options, kinds)
    judge = _judge(data, options, kinds[0], source)
    delta = default_delta(source.examples) if options.delta is None else options.delta
    preprocessing = Preprocessing.share(epsilon=options.epsilon, delta=delta)
    before = source.queries(preprocessing)
    with _open_run(options, kinds, source, delta=delta, before=before) as run:
        described = describe_data(source.fingerprint())
        changed = run.changed(described, stage=Stage.DATA)
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: changed since the search began; restore it, or start a new search, which "
                "spends its own epsilon."
            )
        run.adopt(described, stage=Stage.DATA)
        for position, query in enumerate(before):
            run.reserve_query(f"preprocessing {position}", query)
        prepared = source.prepare(noise_source=run.noise(PREPROCESSING), preprocessing=preprocessing)
        scoring = None if judge is None else _scoring_rows(judge, prepared, run, preprocessing)
        settings = _settings(prepared, kinds, options.rates, tempered=is_tempered(clipping_of(run.plan)))
        choices = [
            Choice(name=name, build=lambda spec=spec: models.build(spec).to(device), recipe=Recipe(rate))
            for name, (spec, rate) in settings.items()
        ]
        run.write("schema.json", prepared.record)
        tuned = tune(
            choices,
            prepared.train,
            loss=models.loss,
            score=PrivateScore(right_answers) if judge is None else _public_score(judge, scoring),
            run_dir=run,
            on_step=Heartbeat().beat,
        )
    spec, rate = settings[tuned.choice]
    return _conclude(tuned, prepared, spec, rate=rate, public=scoring is not None, origin=data.test_origin)


def right_answers(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """1 for each example whose most probable class is the right one, else 0; shape (B,)."""
    features, targets = batch
    return (model(features).argmax(1) == targets).float()


def announce(plan: Plan) -> None:
    """Say on stderr what will be spent, before it is: the same whatever happens, and however often it is resumed."""
    assert plan.search is not None
    repetitions = plan.search.repetitions
    scored = "on public data" if plan.search.score_noise is None else "on the training rows, with noise"
    lines = [
        f"discreet: this search spends epsilon {plan.spent():.4g} at delta {plan.delta:.3g} in all, now and once, "
        "however many runs it makes.",
        f"  about {repetitions.mean:g} runs are expected, {repetitions.runs(_LONG)} or fewer with probability "
        f"{_LONG:g}; each has {plan.steps} steps of {plan.batch_size} examples at noise {plan.noise_multiplier:.4g}, "
        f"scored {scored}.",
        f"  one of these runs alone would spend {one_run(plan):.4g}. Killed, it goes on with --resume, at no cost.",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


class Heartbeat:
    """Shows that a search goes on, and no number of runs or steps: their number is part of what must stay unknown."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = self._started

    def beat(self) -> None:
        """One more step, of whatever run."""
        now = time.monotonic()
        if now - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        print(f"tuning, {now - self._started:.0f} s so far; how far it is stays secret", file=sys.stderr, flush=True)


def _check_grid(options: TuneOptions, kinds: tuple[models.ModelKind, ...]) -> None:
    if any(not 0 < rate < math.inf for rate in options.rates):
        raise ConfigError(f"--learning-rates {options.rates}: must be finite numbers above 0; e.g. 0.01,0.02,0.04.")
    if len({models.text_units(kind) for kind in kinds}) > 1:
        raise ConfigError("--models: a transformer reads text in another way than the others; tune them apart.")


def _judge(data: DataOptions, options: TuneOptions, kind: models.ModelKind, source: Source) -> Source | None:
    """The data again, with the public rows to score on in the place of the test rows."""
    if options.score_data is None:
        return None
    places = [place for place in (data.path, data.test) if place is not None]
    if any(same_content(options.score_data, place) for place in places):
        raise ConfigError(
            f"--score-data {options.score_data}: is the private or the test data; name public data, or leave it out."
        )
    judge = open_data(dataclasses.replace(data, test=options.score_data), kind=kind)
    if judge.statistics != source.statistics:
        raise ConfigError("--score-data: with these rows other columns would be counted; give a --schema for both.")
    if judge.examples != source.examples:
        raise ConfigError(
            f"--score-data without --test: {judge.examples} training rows with it and {source.examples} without; give "
            "the test rows by --test too, so that the training rows are the same."
        )
    return judge


def _scoring_rows(judge: Source, prepared: Prepared, run: Run, preprocessing: Preprocessing) -> Examples | None:
    """The public rows, encoded by the same released statistics: the same rows under the same noise, charged once."""
    found = judge.prepare(noise_source=run.noise(PREPROCESSING), preprocessing=preprocessing)
    if found.record != prepared.record:
        raise ConfigError(
            "--score-data: with these rows the training rows are read in another way; give a --schema for both."
        )
    return found.test


def _public_score(judge: Source, rows: Examples | None) -> PublicScore:
    return PublicScore(lambda model: _share(model, rows), data=judge.fingerprint())


def _settings(
    prepared: Prepared, kinds: tuple[models.ModelKind, ...], rates: tuple[float, ...], *, tempered: bool
) -> dict[str, tuple[models.ModelSpec, float]]:
    return {
        f"{kind.value} at {rate:g}": (
            models.specify(kind, input_spec=prepared.input, classes=len(prepared.classes), tempered=tempered),
            rate,
        )
        for kind in kinds
        for rate in dict.fromkeys(rates)
    }


def _share(model: nn.Module, rows: Examples | None) -> float:
    found = None if rows is None else evaluate(model, rows)
    if found is None:
        raise ConfigError("--score-data: has no rows; name public data with some.")
    return found.accuracy


def _open_run(
    options: TuneOptions,
    kinds: tuple[models.ModelKind, ...],
    source: Source,
    *,
    delta: float,
    before: tuple[Query, ...],
) -> Run:
    if options.resume:

        def asked(plan: Plan) -> AskedAndPlanned:
            """What may not differ in a search."""
            return {
                **_searched(plan, options),
                **asked_and_planned(
                    plan,
                    examples=source.examples,
                    epsilon=options.epsilon,
                    delta=delta,
                    batch_size=options.batch_size,
                    steps=options.steps,
                    clipping=options.clipping,
                    before=before,
                ),
            }

        run = resume_run(options.out, seed=options.seed, asked=asked)
        announce(run.plan)
        return run
    rule = options.clipping if options.clipping is not None else tempered_clipping(source.examples)
    plan = plan_search(
        examples=source.examples,
        epsilon=options.epsilon,
        delta=delta,
        runs=options.runs,
        stopping=options.stopping,
        private_score=options.score_data is None,
        batch_size=options.batch_size,
        steps=options.steps if options.steps is not None else models.defaults(kinds[0]).steps,
        clipping=rule.describe(),
        before=before,
        notes=() if options.clipping is not None else (reason(rule, source.examples),),
    )
    announce(plan)
    warn_of_weak_promises(plan)
    return Run.create(options.out if options.out is not None else new_run_dir(), plan=plan, seed=options.seed)


def _searched(plan: Plan, options: TuneOptions) -> AskedAndPlanned:
    if plan.search is None:
        raise ConfigError(f"{options.out}: holds a training run and no search; continue it with `discreet train`.")
    return {
        "--runs": (options.runs, plan.search.repetitions.mean),
        "--stopping": (options.stopping, plan.search.repetitions.stopping),
        "--score-data": (options.score_data is None, plan.search.score_noise is not None),
    }


def _conclude(
    tuned: Tuned, prepared: Prepared, spec: models.ModelSpec, *, rate: float, public: bool, origin: Origin
) -> TuneOutcome:
    score = "public data" if public else "the training rows, with noise"
    outcome = TuneOutcome(
        tuned=tuned,
        verified=verify(tuned.run_dir),
        written=Written(tuned.run_dir),
        model={**spec.to_json(), "parameters": sum(p.numel() for p in tuned.model.parameters())},
        rate=rate,
        test=evaluate(tuned.model, prepared.test) if prepared.test is not None else None,
        statements=(
            *prepared.statements,
            *trained_statement(tuned.model),
            f"The learning rate and the model were chosen by a search that is part of epsilon, scored on {score}.",
            *weak_promises(tuned.plan),
        ),
    )
    records = {RESULT: outcome.to_json()}
    calibration = None if prepared.test is None else calibration_of(tuned.model, prepared.test, origin=origin)
    if calibration is not None:
        records[CALIBRATION] = with_advice(calibration, test=outcome.test, clipping=clipping_of(tuned.plan))
    return dataclasses.replace(outcome, written=write_results(tuned.run_dir, records))
