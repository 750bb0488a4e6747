"""`discreet train` and `discreet demo` in order: data -> plan -> ledger -> private statistics -> model -> release."""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from discreet.app import models
from discreet.app.calibrating import with_advice
from discreet.app.data import (
    Prepared,
    Preprocessing,
    PublicCalibration,
    SetApart,
    digits,
)
from discreet.app.evaluation import calibration_of, evaluate
from discreet.app.options import DataOptions, TrainOptions, open_data, pick_device, rule_asked, stand_in
from discreet.app.outcome import Outcome
from discreet.app.progress import Progress
from discreet.app.results import CALIBRATION, RESULT, Written, write_results
from discreet.app.runs import (
    AskedAndPlanned,
    asked_and_planned,
    refuse_ended,
    resume_run,
    same_content,
    warn_of_weak_promises,
    weak_promises,
)
from discreet.app.stand_ins import measure_spec
from discreet.app.temperature import conclusion, plan_calibration, planned, statement, trained_statement
from discreet.errors import ConfigError
from discreet.insight.origin import Origin
from discreet.privacy.accounting import Query, query_to_json
from discreet.privacy.compute import parse_time
from discreet.privacy.plan import Calibration, Plan, default_delta
from discreet.privacy.planner import plan as make_plan
from discreet.privacy.planning import bound_of
from discreet.privacy.verification import verify
from discreet.train.environment import describe_data
from discreet.train.horizon import replaced_because
from discreet.train.loop import Private
from discreet.train.make_private import make_private
from discreet.train.run import PREPROCESSING, Run, Stage
from discreet.train.run_directory import new_run_dir
from discreet.train.setup import check_plan, clipping_of
from discreet.train.tempered import is_tempered, reason

EVALUATIONS = 10
"""How often the held-out examples are looked at during training, for the curve in the report; see `evaluations`."""
_EVALUATION_SHARE = 0.05
_FORWARD = 1 / 3
"""What evaluating an example costs, of what an update on it does."""


def train_file(data: DataOptions, options: TrainOptions) -> Outcome:
    """Train on a file or folder. Everything is read and validated before anything is written."""
    started = time.monotonic()
    device = pick_device(options.device)
    if not options.resume:
        refuse_ended(options.out)
    _refuse_private_as_public(data)
    source = open_data(data, kind=options.model)
    private = isinstance(data.calibration, SetApart)
    rows = source.examples + ((source.calibration_examples or 0) if private else 0)
    delta = default_delta(rows) if options.delta is None else options.delta
    calibration = planned(source, private=private, epsilon=options.epsilon, delta=delta)
    preprocessing = Preprocessing.share(epsilon=options.epsilon, delta=delta)
    before = source.queries(preprocessing)
    kind = models.kind_for(options.model, source.kind)
    spec = stand_in(source, kind=kind, clipping=rule_asked(options, source.examples))
    _refuse_unknown_groups(options, spec)
    with _open_run(
        options,
        spec,
        device=device,
        examples=source.examples,
        delta=delta,
        before=before,
        calibration=calibration,
    ) as run:
        run.adopt(describe_data(source.fingerprint()), stage=Stage.DATA)
        for position, query in enumerate(before):
            run.reserve_query(f"preprocessing {position}", query)
        prepared = source.prepare(noise_source=run.noise(PREPROCESSING), preprocessing=preprocessing)
        return _train(prepared, run, options, kind, device=device, started=started, origin=data.test_origin)


def _refuse_private_as_public(data: DataOptions) -> None:
    """The private file cannot be the public one: exact figures of it would be released as if they cost nothing."""
    named = {
        "--public-temperature": data.calibration.path if isinstance(data.calibration, PublicCalibration) else None,
        "--public-test": data.test if data.test_origin is Origin.PUBLIC else None,
    }
    for option, place in named.items():
        if place is not None and same_content(place, data.path):
            raise ConfigError(f"{option}: {place} is the private data itself; name public rows, or leave it out.")


def train_digits(options: TrainOptions, *, calibration: SetApart | None = None) -> Outcome:
    """Train on scikit-learn's bundled digits."""
    started = time.monotonic()
    device = pick_device(options.device)
    if not options.resume:
        refuse_ended(options.out)
    prepared = digits(calibration)
    examples = len(prepared.train)
    apart = 0 if prepared.calibration is None else len(prepared.calibration)
    delta = default_delta(examples + apart) if options.delta is None else options.delta
    asked = None if not apart else plan_calibration(examples, apart=apart, epsilon=options.epsilon, delta=delta)
    kind = models.resolve(options.model, prepared.input)
    tempered = is_tempered(rule_asked(options, examples))
    spec = models.specify(kind, input_spec=prepared.input, classes=len(prepared.classes), tempered=tempered)
    _refuse_unknown_groups(options, spec)
    with _open_run(options, spec, device=device, examples=examples, delta=delta, before=(), calibration=asked) as run:
        return _train(prepared, run, options, kind, device=device, started=started, origin=Origin.PUBLIC)


def _refuse_unknown_groups(options: TrainOptions, spec: models.ModelSpec) -> None:
    """A misspelt group must not cost the statistics; parameters have the same names whatever their sizes."""
    if options.clipping is None:
        return
    with torch.device("meta"):
        options.clipping.style.split(name for name, _ in models.build(spec).named_parameters())


def _open_run(
    options: TrainOptions,
    spec: models.ModelSpec,
    *,
    device: torch.device,
    examples: int,
    delta: float,
    before: tuple[Query, ...],
    calibration: Calibration | None,
) -> Run:
    """Resume the run, or plan and create one."""
    if options.resume:

        def asked(plan: Plan) -> AskedAndPlanned:
            """What may not differ in a single run."""
            given = None if options.plan is None else options.plan.fingerprint()
            return {
                "--plan": (given, plan.fingerprint()),
                "--private-temperature": (calibration or "none", plan.calibration or "none"),
                **asked_and_planned(
                    plan,
                    examples=examples,
                    epsilon=options.epsilon,
                    delta=delta,
                    batch_size=options.batch_size,
                    steps=options.steps,
                    clipping=options.clipping,
                    before=before,
                ),
            }

        return resume_run(options.out, seed=options.seed, asked=asked)
    plan = options.plan
    if plan is None:
        plan = _new_plan(options, spec, device=device, examples=examples, delta=delta, before=before)
        plan = dataclasses.replace(plan, calibration=calibration)
    else:
        refuse_other_data(plan, examples=examples, before=before)
        if plan.calibration != calibration:
            raise ConfigError(
                "--plan: and --private-temperature do not agree on the examples that are set apart; leave out "
                "--plan, or use the same data and options as the run that the plan is of."
            )
    warn_of_weak_promises(plan)
    return Run.create(options.out if options.out is not None else new_run_dir(), plan=plan, seed=options.seed)


def _new_plan(
    options: TrainOptions,
    spec: models.ModelSpec,
    *,
    device: torch.device,
    examples: int,
    delta: float,
    before: tuple[Query, ...],
) -> Plan:
    """The planner's choice for what was left open, within ``--compute`` if there is one."""
    clipping, bound = rule_asked(options, examples), None
    chosen = options.clipping is None and is_tempered(clipping)
    why = (reason(clipping, examples),) if chosen else ()
    if options.compute is not None:
        parse_time(options.compute)
        machine = measure_spec(spec, device=device, clipping=clipping)
        bound = bound_of(examples, compute=options.compute, machine=machine)[1]
    return make_plan(
        examples=examples,
        epsilon=options.epsilon,
        delta=delta,
        batch_size=options.batch_size,
        steps=options.steps,
        bound=bound,
        usual_steps=models.defaults(spec.kind).steps,
        before=before,
        clipping=clipping.describe(),
        notes=(*(() if bound is None else (f"compute: {bound.said}",)), *why),
    )


def refuse_other_data(plan: Plan, *, examples: int, before: tuple[Query, ...]) -> None:
    """Refuse data that a plan was not made for: another number of rows, or other private statistics.

    Raises:
        ConfigError: names what differs.
    """
    check_plan(plan, clipping=None, examples=examples)
    if plan.before != before:
        raise ConfigError(
            f"--plan: charges {_named(plan.before)} before training, and this data needs {_named(before)}; make the "
            "plan from the file itself, with `discreet plan DATA` and the same schema."
        )


def _named(queries: tuple[Query, ...]) -> str:
    return ", ".join(str(query_to_json(query)) for query in queries) if queries else "no private statistics"


def _train(
    prepared: Prepared,
    run: Run,
    options: TrainOptions,
    kind: models.ModelKind,
    *,
    device: torch.device,
    started: float,
    origin: Origin,
) -> Outcome:
    tempered = is_tempered(clipping_of(run.plan))
    spec = models.specify(kind, input_spec=prepared.input, classes=len(prepared.classes), tempered=tempered)
    with torch.random.fork_rng():
        torch.manual_seed(run.initial_seed)
        model = models.build(spec).to(device)
    rate = options.learning_rate if options.learning_rate is not None else models.defaults(kind).learning_rate
    private = make_private(
        model,
        torch.optim.Adam(model.parameters()),
        prepared.train,
        loss=models.loss,
        learning_rate=rate,
        microbatch=options.microbatch,
        run_dir=run,
        conclude=conclusion(prepared.calibration),
    )
    run.write("schema.json", prepared.record)
    _iterate(private, prepared, origin=origin)
    return _conclude(
        private, prepared, spec, seconds=private.earlier_seconds + time.monotonic() - started, origin=origin
    )


def _iterate(private: Private, prepared: Prepared, *, origin: Origin) -> None:
    """Run the updates; log what is released or public, and figures on held-out examples now and then."""
    held_out = 0 if prepared.test is None else len(prepared.test)
    interval = max(1, private.steps // evaluations(private.plan, held_out=held_out))
    with Progress(steps=private.steps, done=private.done) as progress:
        for step in private:
            done = step.index + 1
            progress.show(done, epsilon=lambda step=step: step.epsilon)
            if done % interval and done < private.steps:
                continue
            record: dict[str, float | int | str] = {"step": done, "learning_rate": step.learning_rate}
            if math.isfinite(step.epsilon):
                record["epsilon"] = step.epsilon
            evaluation = evaluate(private.model, prepared.test, origin=origin) if prepared.test is not None else None
            if evaluation is not None:
                record["test_accuracy"] = evaluation.accuracy
                record["test_stamp"] = evaluation.stamp
                if evaluation.nll is not None:
                    record["test_nll"] = evaluation.nll
            private.run.log(record)


def evaluations(plan: Plan, *, held_out: int) -> int:
    """How many evaluations on the way take at most a twentieth of the training: from 1 to `EVALUATIONS`.

    A function of public sizes: a bound on time must not be spent on figures, and no clock decides what is logged.
    """
    affordable = _EVALUATION_SHARE * plan.batch_size * plan.steps / (_FORWARD * max(1, held_out))
    return max(1, min(EVALUATIONS, math.floor(affordable)))


def _conclude(
    private: Private, prepared: Prepared, spec: models.ModelSpec, *, seconds: float, origin: Origin
) -> Outcome:
    verified = verify(private.run_dir)
    model, held_out = private.model, prepared.test
    divisor = 1.0 if verified.temperature is None else verified.temperature
    test = None if held_out is None else evaluate(model, held_out, temperature=divisor, origin=origin)
    calibration = None if held_out is None else calibration_of(model, held_out, origin=origin, temperature=divisor)
    outcome = Outcome(
        run_dir=private.run_dir,
        written=Written(private.run_dir),
        epsilon=verified.epsilon,
        seconds=seconds,
        plan=private.plan,
        updates=private.done,
        private=verified.private,
        model={**spec.to_json(), "parameters": sum(p.numel() for p in model.parameters())},
        test=test,
        statements=(
            *prepared.statements,
            *trained_statement(model),
            *statement(private.plan, private.run.ledger),
            *_rate_found(private),
            *_cut_short(private),
            *weak_promises(private.plan),
        ),
        calibration=calibration,
        temperature=verified.temperature,
        untempered=evaluate(model, held_out) if held_out is not None and verified.temperature is not None else None,
    )
    records = {RESULT: outcome.to_json()}
    if calibration is not None:
        records[CALIBRATION] = with_advice(
            calibration, test=test, clipping=clipping_of(private.plan), fitted=verified.temperature is not None
        )
    return dataclasses.replace(outcome, written=write_results(private.run_dir, records))


def _rate_found(private: Private) -> tuple[str, ...]:
    """The sentence about a learning rate that set itself."""
    verdict = private.verdict
    if verdict is None:
        return ()
    known = "" if verdict.tolerance is None else f"; the weights bear noise of {verdict.tolerance:.3g} each"
    return (f"The learning rate set itself, inside the budget ({verdict.reason}{known}).",)


def _cut_short(private: Private) -> tuple[str, ...]:
    """The sentence about updates that the budget no longer allowed."""
    if private.done >= private.plan.steps:
        return ()
    return (
        f"The run made {private.done} of the {private.plan.steps} planned updates: the others were charged under a key "
        "that had to be replaced, because something had changed when the run was resumed: "
        f"{replaced_because(private.run.ledger)}.",
    )
