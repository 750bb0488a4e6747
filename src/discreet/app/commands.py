"""What each command of the program does, and how it prints it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from discreet.app.account import answer
from discreet.app.calibrating import CalibrateOptions, calibrate, short_facts
from discreet.app.data import PublicCalibration, SetApart
from discreet.app.evaluation import Evaluation
from discreet.app.models import ModelKind
from discreet.app.options import DataOptions, TrainOptions
from discreet.app.outcome import Outcome
from discreet.app.planning import PlanOptions, plan_data
from discreet.app.predicting import PredictOptions, predict
from discreet.app.predictions import Scale
from discreet.app.report import write_report
from discreet.app.selfcheck import check_data
from discreet.app.simulating import SimulationOptions, simulate_plan
from discreet.app.training import train_digits, train_file
from discreet.app.tuning import TuneOptions, tune_file
from discreet.errors import ConfigError
from discreet.insight.origin import Origin
from discreet.privacy.certificate import LEDGER_NAME, rounded_up
from discreet.privacy.plan import Plan
from discreet.privacy.records import json_number
from discreet.privacy.repetitions import Stopping
from discreet.privacy.verification import verify
from discreet.train.auto_lr import AutoLR
from discreet.train.setup import clipping_of

DEMO_EPSILON = 3.0


def train(options: argparse.Namespace) -> None:
    """`discreet train`."""
    data = dataclasses.replace(_data(options), calibration=_temperature(options), test_origin=_test_origin(options))
    _say(train_file(data, _training(options)), as_json=options.json)


def demo(options: argparse.Namespace) -> None:
    """`discreet demo`."""
    if options.public_temperature is not None:
        raise ConfigError("--public-temperature with demo: the digits have no other public rows; leave it out.")
    calibration = SetApart() if options.private_temperature else None
    _say(train_digits(_training(options), calibration=calibration), as_json=options.json)


def check(options: argparse.Namespace) -> None:
    """`discreet check`; a failed check is an error."""
    if options.html is not None and not options.convergence:
        raise ConfigError("--html without --convergence: the self-check has no pictures; add --convergence.")
    if options.convergence:
        from discreet.app.convergence import check_convergence, write_page

        found = check_convergence(_data(options), kind=ModelKind(options.model))
        if options.html is not None:
            write_page(found, options.html)
        if options.json:
            _print_json(found.to_json())
        else:
            print(found.table())
        return
    report = check_data(_data(options), kind=ModelKind(options.model))
    if options.json:
        _print_json(report.to_json())
    else:
        print(report.table())
    report.raise_if_failed()


def plan(options: argparse.Namespace) -> None:
    """`discreet plan`."""
    private = _data(options) if options.data is not None else None
    request = _simulation(options)
    planned = plan_data(private, _planning(options))
    simulated = None
    if request is not None:
        proxy = dataclasses.replace(_data(options), path=request.data, test=None)
        simulated = simulate_plan(planned, private, proxy, request, device=options.device)
    if options.json:
        extra = {} if simulated is None else {"simulation": simulated.to_json()}
        _print_json({**planned.to_json(), **extra})
        return
    print(planned.text())
    if simulated is not None:
        print(f"\n{simulated.text()}")


def tune(options: argparse.Namespace) -> None:
    """`discreet tune`."""
    _check_numbers(options)
    request = TuneOptions(
        epsilon=options.epsilon,
        delta=options.delta,
        rates=options.learning_rates,
        kinds=options.models,
        runs=options.runs,
        stopping=Stopping(options.stopping),
        score_data=options.score_data,
        batch_size=options.batch_size,
        steps=options.steps,
        clipping=options.clipping,
        out=options.out,
        resume=options.resume,
        device=options.device,
        seed=options.seed,
    )
    tuned = tune_file(_data(options), request)
    _print_json(tuned.to_json()) if options.json else print(tuned.text())
    tuned.written.raise_if_missing()


def account(options: argparse.Namespace) -> None:
    """`discreet account`."""
    found = answer(options)
    if options.json:
        _print_json({**found.facts, "curve": found.curve} if found.curve else found.facts)
        return
    _print_table({name: value for name, value in found.facts.items() if name != "attack"})
    if found.curve:
        print("\nfalse alarms  members found, at most")
        for rate, power in found.curve:
            print(f"{rate:<12g}  {power:.6g}")
    print("\n" + "\n".join(found.words))


def verify_run(options: argparse.Namespace) -> None:
    """`discreet verify`."""
    found = verify(_run_dir(options.run))
    record = found.to_json()
    if options.json:
        _print_json(record)
        return
    del record["statement"], record["unchecked"]
    _print_table(record | {"epsilon": rounded_up(found.epsilon)})
    print(f"\n{found.statement}")
    if found.unchecked:
        # Whoever made the folder chose the names: a line of the terminal must not come from one.
        names = ", ".join(name if name.isprintable() else ascii(name) for name in found.unchecked)
        print(f"\nNot checked, as the ledger does not bind it: {names} in release/.")


def calibrate_predictions(options: argparse.Namespace) -> None:
    """`discreet calibrate`."""
    scales = {options.logits: Scale.LOGITS, options.probabilities: Scale.PROBABILITIES}
    if options.logits and options.probabilities:
        raise ConfigError("--logits with --probabilities: the numbers are one of them; leave one out.")
    found = calibrate(
        CalibrateOptions(
            data=options.data,
            label=options.label,
            group=options.group,
            columns=options.columns,
            scale=scales.get(True, Scale.AUTO),
            origin=Origin.PUBLIC if options.public else Origin.PRIVATE,
            epsilon=options.epsilon,
            delta=options.delta,
            out=options.out,
            html=options.html,
        )
    )
    _print_json(found.record) if options.json else print(found.text())


def predict_rows(options: argparse.Namespace) -> None:
    """`discreet predict`."""
    if options.json and options.out is None:
        raise ConfigError("--json without --out: standard output holds the predictions then; name a file with --out.")
    found = predict(
        PredictOptions(
            run=_run_dir(options.run),
            data=options.data,
            columns=options.columns,
            schema=options.schema,
            out=options.out,
        )
    )
    for note in found.notes():
        print(f"discreet: {note}", file=sys.stderr, flush=True)
    if options.out is None:
        sys.stdout.writelines(found.blocks())
        return
    found.write(options.out)
    _print_json(found.to_json()) if options.json else print(options.out)


def report(options: argparse.Namespace) -> None:
    """`discreet report`."""
    path = write_report(_run_dir(options.run))
    _print_json({"report": str(path)}) if options.json else print(path)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": train,
    "plan": plan,
    "tune": tune,
    "check": check,
    "account": account,
    "verify": verify_run,
    "report": report,
    "predict": predict_rows,
    "calibrate": calibrate_predictions,
    "demo": demo,
}


def _data(options: argparse.Namespace) -> DataOptions:
    return DataOptions(
        path=options.data,
        target=options.target,
        test=options.test,
        columns=options.columns,
        schema=options.schema,
        classes=options.classes,
        text_column=options.text_column,
        image_size=options.image_size,
    )


def _training(options: argparse.Namespace) -> TrainOptions:
    _check_numbers(options)
    if options.microbatch is not None and options.microbatch < 1:
        raise ConfigError(f"--microbatch {options.microbatch}: must be at least 1; leave it out for the default.")
    asked = TrainOptions(
        epsilon=DEMO_EPSILON if options.epsilon is None else options.epsilon,
        delta=options.delta,
        model=ModelKind(options.model),
        batch_size=options.batch_size,
        steps=options.steps,
        compute=options.compute,
        learning_rate=_learning_rate(options.learning_rate),
        clipping=options.clipping,
        microbatch=options.microbatch,
        out=options.out,
        resume=options.resume,
        device=options.device,
        seed=options.seed,
    )
    if options.plan is not None:
        return _planned(asked, options)
    if options.epsilon is None and options.command != "demo":
        raise ConfigError("--epsilon: is missing; say how much may be revealed, e.g. --epsilon 3, or pass a --plan.")
    if options.compute is not None and options.batch_size is not None and options.steps is not None:
        raise ConfigError("--compute with --batch-size and --steps: leaves nothing to choose; leave one of them out.")
    return asked


def _temperature(options: argparse.Namespace) -> SetApart | PublicCalibration | None:
    if options.private_temperature and options.public_temperature is not None:
        raise ConfigError("--private-temperature with --public-temperature: one of them is enough; leave one out.")
    if options.public_temperature is not None:
        return PublicCalibration(options.public_temperature)
    return SetApart() if options.private_temperature else None


def _test_origin(options: argparse.Namespace) -> Origin:
    if options.public_test and options.test is None:
        raise ConfigError("--public-test without --test: rows of the private file are not public; name a file.")
    return Origin.PUBLIC if options.public_test else Origin.PRIVATE


def _planned(asked: TrainOptions, options: argparse.Namespace) -> TrainOptions:
    """Training by a saved plan, which nothing on the command line may contradict."""
    for name in ("epsilon", "delta", "batch_size", "steps", "clipping", "compute"):
        value = getattr(options, name)
        if value is not None:
            shown = name.replace("_", "-")
            raise ConfigError(f"--{shown} with --plan: the plan says it already; leave it out, or make another plan.")
    plan = Plan.load(options.plan)
    plan.check()
    return dataclasses.replace(
        asked,
        epsilon=plan.epsilon,
        delta=plan.delta,
        batch_size=plan.batch_size,
        steps=plan.steps,
        clipping=clipping_of(plan),
        plan=plan,
    )


def _planning(options: argparse.Namespace) -> PlanOptions:
    _check_numbers(options)
    return PlanOptions(
        epsilon=options.epsilon,
        delta=options.delta,
        examples=options.examples,
        model=ModelKind(options.model),
        compute=options.compute,
        samples=options.samples,
        money=options.money,
        price_per_hour=options.price_per_hour,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        clipping=options.clipping,
        throughput=options.throughput,
        parameters=options.parameters,
        choose=options.choose,
        out=options.out,
        html=options.html,
        simulation=options.simulation,
        device=options.device,
    )


def _simulation(options: argparse.Namespace) -> SimulationOptions | None:
    if options.simulate is None:
        for name in ("learning_rates", "models", "simulate_steps"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} without --simulate: name public data to simulate on.")
        if options.unaccounted_search:
            raise ConfigError("--unaccounted-search without --simulate: there is no search; leave it out.")
        return None
    if options.simulation is not None:
        raise ConfigError("--simulate with --simulation: the page shows one of them; leave out the older runs.")
    return SimulationOptions(
        data=options.simulate,
        rates=options.learning_rates,
        kinds=options.models if options.models is not None else (ModelKind(options.model),),
        steps=options.simulate_steps,
        seeds=options.seeds,
        unaccounted=options.unaccounted_search,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    if options.epsilon is not None and not options.epsilon > 0:
        raise ConfigError(f"--epsilon {options.epsilon}: must be above 0; the usual range is 1 to 8.")
    if options.delta is not None and not 0 < options.delta < 1:
        raise ConfigError(f"--delta {options.delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")


def _learning_rate(text: str | None) -> float | AutoLR | None:
    if text is None:
        return None
    if text == "auto":
        return AutoLR()
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigError(f'--learning-rate {text}: must be "auto" or a number above 0; leave it out for the default.')
    return rate


def _run_dir(path: Path) -> Path:
    if path.is_file():
        above = [folder for folder in path.resolve().parents[:2] if (folder / LEDGER_NAME).is_file()]
        remedy = f"pass its run directory, {above[0]}" if above else "pass the run directory that it belongs to"
        raise ConfigError(f"{path}: is a file and no run directory; {remedy}.")
    if not path.is_dir():
        raise ConfigError(f"{path}: is no run directory; pass the directory that `discreet train` printed.")
    return path


def _say(outcome: Outcome, *, as_json: bool) -> None:
    """Print what a run amounts to; then what could not be written of it, if there is something, is an error."""
    _print_json(outcome.to_json()) if as_json else _print_outcome(outcome)
    outcome.written.raise_if_missing()


def _print_outcome(outcome: Outcome) -> None:
    facts: dict[str, object] = {
        "epsilon": json_number(outcome.epsilon),
        "delta": outcome.plan.delta,
        "examples": outcome.plan.examples,
        "batch size": outcome.plan.batch_size,
        "steps": outcome.updates,
        "noise multiplier": outcome.plan.noise_multiplier,
    }
    if outcome.test is not None:
        facts |= _test_facts(outcome.test)
        if outcome.calibration is not None:
            facts |= {f"  {name}": value for name, value in short_facts(outcome.calibration).items()}
        if outcome.untempered is not None:
            facts["test ece before the temperature"] = outcome.untempered.ece
    if outcome.temperature is not None:
        facts["temperature"] = outcome.temperature
    facts |= {
        "seconds": round(outcome.seconds, 1),
        "run": outcome.run_dir,
        "report": outcome.written.page or "not written",
    }
    if not outcome.private:
        print("NOT PRIVATE: trained in test mode or without noise.\n")
    _print_table(facts)
    if outcome.statements:
        print("\n" + "\n".join(outcome.statements))


def _test_facts(test: Evaluation) -> dict[str, object]:
    stamp = f", {test.stamp}" if test.stamp else ""
    unlisted = {"test rows of no listed class, counted as wrong": test.unlisted} if test.unlisted else {}
    over = f", over the {test.listed} rows of a listed class" if test.unlisted else ""
    return {
        "test accuracy": test.accuracy,
        f"  always the commonest class{stamp}": test.constant_accuracy,
        "test examples": test.examples,
        **unlisted,
        f"test nll{over}": test.nll,
        f"test ece{over}": test.ece,
        **({"test stamp": test.stamp} if test.stamp else {}),
    }


def _print_table(facts: Mapping[str, object]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' ').ljust(width)}  {shown}")


def _print_json(record: Mapping[str, object]) -> None:
    print(json.dumps(record, allow_nan=False, sort_keys=True))
