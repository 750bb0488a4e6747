"""The program: thin commands over the library, with the same words.

Exit codes: 0 done; 1 the run failed; 2 the arguments or the input are wrong; 3 the privacy budget would be exceeded;
4 done, but for the page or the figures of a run, which could not be written.
Errors are one line on stderr: value, rule, remedy. With ``--json``, stdout holds one object and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from discreet.app import commands
from discreet.app.account import add_arguments as add_account_arguments
from discreet.app.models import ModelKind
from discreet.app.runs import has_ended, what_next
from discreet.core.clipping import Clipping
from discreet.core.style import Style
from discreet.errors import BudgetExceeded, ConfigError, DiscreetError, LedgerError, NotWritten
from discreet.privacy.repetitions import Stopping
from discreet.train.run_directory import new_run_dir

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_BUDGET, EXIT_NOT_WRITTEN = 0, 1, 2, 3, 4
_RESUMABLE = ("train", "tune", "demo")
"""The commands that keep what they have done in a run directory."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _settle_streams()
    options = None
    try:
        with _termination_is_interruption():
            options = parser().parse_args(argv)
            if options.command in _RESUMABLE and options.out is None and not options.resume:
                # Named here, so that it can be named again when the command is interrupted.
                options.out = new_run_dir()
            commands.COMMANDS[options.command](options)
            sys.stdout.flush()
    except BudgetExceeded as error:
        return _fail(error, EXIT_BUDGET)
    except LedgerError as error:
        return _fail(error, EXIT_FAILED)
    except NotWritten as error:
        return _fail(error, EXIT_NOT_WRITTEN)
    except DiscreetError as error:
        return _fail(error, EXIT_WRONG_INPUT)
    except BrokenPipeError:
        # What is still buffered has no reader either; the interpreter would complain about it at its exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        kept = options is not None and options.command in _RESUMABLE
        remedy = "the run directory holds all of it" if kept else "repeat the command for the rest"
        return _fail(f"the output was closed before it was whole; {remedy}.", EXIT_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(
            f"{where}{error.strerror or error}; check the disk and the permissions, then use --resume.", EXIT_FAILED
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    except Exception as error:  # noqa: BLE001
        # The edge of the program: what torch raises may quote an example ("Target 7 is out of bounds").
        return _fail(_without_values(error), EXIT_FAILED)
    return EXIT_DONE


def _settle_streams() -> None:
    """A missing stream swallows what is written, and a narrow encoding does not end a run."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _termination_is_interruption() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does. Signals can be handled in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(options: argparse.Namespace | None) -> int:
    """Say what to do next; a run that had ended lacks its page at most."""
    out = options.out if options is not None and options.command in _RESUMABLE else None
    if out is None:
        return _fail("interrupted; repeat the command.", EXIT_FAILED)
    return _fail(f"interrupted; {what_next(out)}", EXIT_NOT_WRITTEN if has_ended(out) else EXIT_FAILED)


def _without_values(error: Exception) -> str:
    """The kind and the place of an unexpected error, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "discreet" in Path(frame.filename).parts] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown place"
    return (
        f"{type(error).__name__} at {place}: an unexpected failure, its message withheld as it may quote an example; "
        "report it; --resume goes on from the last checkpoint."
    )


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="discreet", description="Train models on private data with differential privacy.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"discreet {metadata.version('discreet')}")
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    train = _command(verbs, "train", "train a model on a private file or folder")
    _add_data(train)
    _add_training(train)
    train.add_argument(
        "--public-test", action="store_true", help="the rows of --test are public: their figures need no stamp"
    )
    plan = _command(verbs, "plan", "batch, steps and noise for a data file or a number of examples, and what they cost")
    _add_data(plan, required=False)
    _add_planning(plan)
    _add_simulation(plan)
    tune = _command(verbs, "tune", "search models and learning rates on private data, and pay for the search")
    _add_data(tune)
    _add_tuning(tune)
    check = _command(verbs, "check", "check model and loss for the shape of a data file, reading no private value")
    _add_data(check)
    _add_model(check)
    check.add_argument(
        "--convergence", action="store_true", help="compare clipping rules: tangent kernel, spectra, slope of the loss"
    )
    check.add_argument("--html", type=Path, metavar="FILE", help="with --convergence: write a page with pictures")
    account = _command(verbs, "account", "of epsilon, delta, noise, steps and batch size, the one that is left out")
    add_account_arguments(account)
    for name, text in (
        ("verify", "re-derive epsilon and delta of a run from its ledger"),
        ("report", "write report.html"),
    ):
        _command(verbs, name, text).add_argument("run", type=Path, metavar="RUN", help="a run directory")
    predict = _command(verbs, "predict", "apply the model of a run to a file of rows")
    _add_prediction(predict)
    calibrate = _command(verbs, "calibrate", "how far the probabilities of any model, or of a run, can be believed")
    _add_calibration(calibrate)
    demo = _command(verbs, "demo", "train on scikit-learn's digits")
    _add_training(demo)
    return top


def _command(verbs: argparse._SubParsersAction[_Parser], name: str, text: str) -> _Parser:
    command = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return command


def _add_data(command: _Parser, *, required: bool = True) -> None:
    command.add_argument(
        "data",
        type=Path,
        nargs=None if required else "?",
        metavar="DATA",
        help="CSV, TSV, Parquet or text file; folder of IDX files or images",
    )
    command.add_argument("--target", metavar="NAME", help="the label column")
    command.add_argument(
        "--test", type=Path, metavar="DATA", help="held-out data; default: one row in five, by a public hash"
    )
    command.add_argument("--columns", type=_names, metavar="A,B,C", help="column names of a file without a header")
    command.add_argument(
        "--schema", type=Path, metavar="FILE", help="TOML file with public types, bounds and categories"
    )
    command.add_argument("--classes", type=_classes, metavar="N|A,B", help="public number or list of classes")
    command.add_argument("--text-column", metavar="NAME", help="the column that holds the text")
    command.add_argument("--image-size", type=_size, metavar="HxW", help="resize the images of a folder to this size")


def _add_model(command: _Parser) -> None:
    kinds = [kind.value for kind in ModelKind]
    command.add_argument("--model", choices=kinds, default=ModelKind.AUTO.value, help="default: by kind of data")


def _add_training(command: _Parser) -> None:
    command.add_argument("--epsilon", type=float, help="privacy budget; inf trains without noise and clipping")
    command.add_argument("--delta", type=float, help="default: 1 / examples^1.1")
    command.add_argument("--plan", type=Path, metavar="FILE", help="a plan of `discreet plan`, followed exactly")
    command.add_argument("--compute", metavar="TIME", help="90s, 5m, 2h: what training may take, measured first")
    _add_model(command)
    command.add_argument("--batch-size", type=int, metavar="B", help="expected batch; default: the planner's")
    command.add_argument(
        "--steps", type=int, metavar="S", help="updates; fewer get a larger batch, so no run gets cheaper"
    )
    command.add_argument("--learning-rate", metavar="R", help='"auto": sets itself; or the peak of a linear decay')
    command.add_argument(
        "--clipping",
        type=_clipping,
        metavar="RULE",
        help='"auto" (default: abadi, and a temperature in the same query), "automatic[:GAMMA]", "abadi:R", '
        '"psac[:R]", "normalized", "quantile[:Q]", "global:R" (experimental); "@per_layer", "@groups:A,B": in groups',
    )
    command.add_argument(
        "--private-temperature",
        action="store_true",
        help="set some training rows apart, by a public hash, for a private temperature",
    )
    command.add_argument(
        "--public-temperature", type=Path, metavar="DATA", help="PUBLIC rows of the same form for an exact temperature"
    )
    command.add_argument(
        "--microbatch", type=int, metavar="M", help="examples at a time; changes the result by rounding alone"
    )
    command.add_argument("--out", type=Path, metavar="RUN", help="run directory; default: a new one below runs/")
    command.add_argument("--resume", action="store_true", help="continue the run in --out")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--seed", type=int, metavar="N", help="test mode: reproducible and NOT PRIVATE")


def _add_prediction(command: _Parser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="directory of a run that has ended")
    command.add_argument("data", type=Path, metavar="FILE", help="CSV, TSV, Parquet or text file; IDX file of images")
    command.add_argument("--columns", type=_names, metavar="A,B,C", help="column names of a file without a header")
    command.add_argument(
        "--schema", type=Path, metavar="FILE", help="TOML file with header, delimiter and columns of FILE"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="CSV file to write; default: standard output")


def _add_calibration(command: _Parser) -> None:
    command.add_argument(
        "data", type=Path, metavar="PREDICTIONS", help="CSV, TSV, Parquet or npz of predictions and labels; or a run"
    )
    command.add_argument("--label", metavar="NAME", help="the label column; default: label, target or y")
    command.add_argument("--group", metavar="NAME", help="a column of groups, each with a report of its own")
    command.add_argument(
        "--columns", type=_names, metavar="A,B,C", help="the columns of the classes, in order; default: all others"
    )
    command.add_argument(
        "--logits", action="store_true", help="the numbers are logits; default: told from them, but not with --epsilon"
    )
    command.add_argument("--probabilities", action="store_true", help="the numbers are probabilities")
    command.add_argument("--public", action="store_true", help="the rows are public; else figures are NON-PRIVATE")
    command.add_argument("--epsilon", type=float, help="report within this budget, with noise and a ledger")
    command.add_argument("--delta", type=float, help="default: 1 / rows^1.1")
    command.add_argument(
        "--out", type=Path, metavar="RUN", help="directory of that ledger; default: a new one below runs/"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")


def _add_planning(command: _Parser) -> None:
    command.add_argument("--examples", type=int, metavar="N", help="instead of DATA: its number of rows")
    command.add_argument("--epsilon", type=float, required=True, help="privacy budget")
    command.add_argument("--delta", type=float, help="default: 1 / examples^1.1")
    _add_model(command)
    command.add_argument("--compute", metavar="TIME", help="90s, 5m, 2h: what training may take")
    command.add_argument("--samples", type=int, metavar="M", help="examples that training may process in all")
    command.add_argument("--money", type=float, metavar="X", help="what training may cost, with --price-per-hour")
    command.add_argument("--price-per-hour", type=float, metavar="P", help="of the machine; plans then show their cost")
    command.add_argument("--epochs", type=float, metavar="E", help="passes over the data, the same in every plan")
    command.add_argument("--steps", type=int, metavar="S", help="updates; default: the planner's")
    command.add_argument("--batch-size", type=int, metavar="B", help="expected batch; default: the planner's")
    command.add_argument("--clipping", type=_clipping, metavar="RULE", help="as for train")
    command.add_argument(
        "--throughput", type=float, metavar="R", help="examples a second of private training; default: measured on DATA"
    )
    command.add_argument("--parameters", type=int, metavar="D", help="trainable numbers of the model, without DATA")
    command.add_argument("--choose", metavar="KIND", help="which plan --out saves; default: the recommended one")
    command.add_argument("--out", type=Path, metavar="FILE", help="save the chosen plan for `discreet train --plan`")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    command.add_argument("--simulation", type=Path, metavar="FILE", help="simulated runs, to be drawn on the page")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _add_simulation(command: _Parser) -> None:
    command.add_argument(
        "--simulate", type=Path, metavar="DATA", help="compare settings at constant TAN on this PUBLIC data"
    )
    command.add_argument("--learning-rates", type=_numbers, metavar="A,B,C", help="to compare; default: around 0.02")
    command.add_argument("--models", type=_kinds, metavar="A,B", help="to compare; default: that of --model")
    command.add_argument("--simulate-steps", type=_counts, metavar="A,B", help="numbers of steps to compare")
    command.add_argument("--seeds", type=int, default=3, help="runs per setting, at least 3")
    command.add_argument(
        "--unaccounted-search", action="store_true", help="allow --simulate on the private data; NON-PRIVATE"
    )


def _add_tuning(command: _Parser) -> None:
    command.add_argument("--epsilon", type=float, required=True, help="of the whole search, however many runs it makes")
    command.add_argument("--delta", type=float, help="default: 1 / examples^1.1")
    command.add_argument("--learning-rates", type=_numbers, required=True, metavar="A,B,C", help="to choose among")
    command.add_argument("--models", type=_kinds, metavar="A,B", help="to choose among; default: by kind of data")
    command.add_argument("--runs", type=float, default=10.0, metavar="M", help="expected number of runs (default 10)")
    stoppings = [stopping.value for stopping in Stopping if stopping is not Stopping.POISSON]
    command.add_argument("--stopping", choices=stoppings, default=Stopping.LOGARITHMIC.value)
    command.add_argument(
        "--score-data", type=Path, metavar="DATA", help="PUBLIC data to compare runs on; default: noisy, on DATA"
    )
    command.add_argument("--batch-size", type=int, metavar="B", help="expected batch; default: the planner's")
    command.add_argument("--steps", type=int, metavar="S", help="updates of each run")
    command.add_argument("--clipping", type=_clipping, metavar="RULE", help="as for train")
    command.add_argument("--out", type=Path, metavar="RUN", help="run directory; default: a new one below runs/")
    command.add_argument("--resume", action="store_true", help="continue the search in --out")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--seed", type=int, metavar="N", help="test mode: reproducible and NOT PRIVATE")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write a,b,c")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(name) for name in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers; write 0.01,0.02") from None


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers; write 200,800") from None


def _kinds(text: str) -> tuple[ModelKind, ...]:
    known = {kind.value: kind for kind in ModelKind}
    unknown = [name for name in _names(text) if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no model; write some of {','.join(known)}")
    return tuple(known[name] for name in _names(text))


def _classes(text: str) -> int | tuple[str, ...]:
    return int(text) if text.isdigit() else _names(text)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HxW, e.g. 32x32")
    return int(height), int(width)


_SOFTENED = {"automatic": Clipping.automatic, "psac": Clipping.psac, "quantile": Clipping.quantile}
_BOUNDED = {"abadi": Clipping.abadi, "global": Clipping.global_}


def _clipping(text: str) -> Clipping | None:
    """A rule in words; None for "auto", which leaves it to what is publicly known."""
    if text == "auto":
        return None
    how, grouped, groups = text.partition("@")
    rule, bounded, number = how.partition(":")
    try:
        style = Style.parse(groups) if grouped else Style.flat()
        if rule == "normalized" and not bounded:
            return Clipping.normalized(style=style)
        if rule in _SOFTENED:
            return _SOFTENED[rule](*([float(number)] if bounded else []), style=style)
        if rule in _BOUNDED:
            return _BOUNDED[rule](float(number), style=style)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).removesuffix('.')}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the bound must be a number above 0; write abadi:1.0") from error
    raise argparse.ArgumentTypeError(
        f'{text!r} is no rule; write "auto", "automatic", "abadi:R", "psac", "normalized", "quantile:Q" or "global:R", '
        'with "@per_layer" if so'
    )


def _fail(error: DiscreetError | str, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"discreet: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
