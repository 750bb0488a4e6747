"""`discreet plan`: a proposal for a data file or for a number of examples, as text, as JSON, and as a saved plan.

Of the data, the number of rows and the public shape are used; the statistics that training would have to compute
privately are charged in the plan, and not computed.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from discreet.app import models
from discreet.app.data import Preprocessing
from discreet.app.options import DataOptions, open_data, pick_device, stand_in
from discreet.app.plan_page import read_simulation, write_page
from discreet.app.plan_page.rows import in_terminal, known_rows, reasons
from discreet.app.report.text import scientific
from discreet.app.stand_ins import measure_spec
from discreet.core.clipping import Clipping
from discreet.errors import ConfigError
from discreet.privacy.accounting import Query
from discreet.privacy.compute import Machine, parse_time
from discreet.privacy.options import Option, Proposal
from discreet.privacy.planning import checked_delta
from discreet.privacy.planning import plan as propose
from discreet.train.tempered import tempered_clipping


@dataclass(frozen=True)
class PlanOptions:
    """What a user may say about a plan; None leaves it open. See `discreet.privacy.planning.propose`."""

    epsilon: float
    delta: float | None = None
    examples: int | None = None
    model: models.ModelKind = models.ModelKind.AUTO
    compute: str | None = None
    samples: int | None = None
    money: float | None = None
    price_per_hour: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    clipping: Clipping | None = None
    throughput: float | None = None
    parameters: int | None = None
    choose: str | None = None
    out: Path | None = None
    html: Path | None = None
    simulation: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Planned:
    """A proposal, the plan chosen from it, and where it was written."""

    proposal: Proposal
    chosen: Option
    data: DataOptions | None
    out: Path | None
    html: Path | None
    model: models.ModelKind = models.ModelKind.AUTO

    def to_json(self) -> dict[str, object]:
        """The object that ``--json`` prints."""
        record = self.proposal.to_json()
        return record | {
            "chosen": self.chosen.kind.value,
            "out": str(self.out) if self.out is not None else None,
            "html": str(self.html) if self.html is not None else None,
        }

    def text(self) -> str:
        """What the command prints: the plans side by side, the reasons of the chosen one, and what comes next."""
        plan = self.proposal.plan
        chosen = self.chosen
        blocks = [
            f"{plan.examples:,} examples, epsilon {plan.epsilon:g}, "
            f"delta {in_terminal(scientific(plan.delta))}; "
            f"{self.proposal.mode.value}: {self.proposal.bound.said}",
            _side_by_side(self.proposal.options, chosen=chosen),
            "\n".join([f"Why {chosen.kind.value}: {chosen.reasons['plan']}", *_why(chosen)]),
            "\n".join(["What would change the noise:", *_changes(self.proposal)]),
            "\n".join(self.proposal.warnings),
            self._next(),
        ]
        return "\n\n".join(block for block in blocks if block)

    def _next(self) -> str:
        written = [f"plan  {self.out}"] if self.out is not None else []
        written += [f"page  {self.html}"] if self.html is not None else []
        if self.out is not None and self.data is not None:
            written.append(f"next  {_train_command(self.data, model=self.model, plan=self.out)}")
        return "\n".join(written)


def plan_data(data: DataOptions | None, options: PlanOptions) -> Planned:
    """Propose plans, save the chosen one, and write the page.

    Raises:
        ConfigError: neither or both of data and a number of examples, or an argument is outside its range.
    """
    if options.simulation is not None and options.html is None:
        raise ConfigError("--simulation without --html: it is drawn on the page; name the page, e.g. --html plan.html.")
    for place in (options.out, options.html):
        if place is not None:
            _check_place(place)
    simulation = read_simulation(options.simulation) if options.simulation is not None else None
    if data is not None:
        proposal = _for_data(data, options)
    else:
        proposal = _for_numbers(options)
    chosen = _choose(proposal, options.choose)
    if options.out is not None:
        _save(chosen, options.out)
    if options.html is not None:
        write_page(proposal, options.html, simulation=simulation)
    return Planned(
        proposal=proposal,
        chosen=chosen,
        data=data,
        out=options.out,
        html=options.html,
        model=options.model,
    )


def _for_data(data: DataOptions, options: PlanOptions) -> Proposal:
    if options.examples is not None or options.parameters is not None:
        raise ConfigError("--examples or --parameters with DATA: the file says them; leave them out.")
    if options.compute is not None:
        parse_time(options.compute)
    source = open_data(data, kind=options.model)
    delta = checked_delta(options.delta, examples=source.examples)
    kind = models.kind_for(options.model, source.kind)
    clipping = _rule(options, source.examples)
    spec = stand_in(source, kind=kind, clipping=clipping)
    _check_epsilon(options.epsilon)
    if options.throughput is not None:
        machine = Machine.told(options.throughput)
    else:
        machine = measure_spec(spec, device=pick_device(options.device), clipping=clipping)
    return _propose(
        options,
        clipping,
        examples=source.examples,
        delta=delta,
        before=source.queries(Preprocessing.share(epsilon=options.epsilon, delta=delta)),
        machine=machine,
        usual_steps=models.defaults(kind).steps,
    )


def _for_numbers(options: PlanOptions) -> Proposal:
    if options.examples is None:
        raise ConfigError("discreet plan: needs DATA or --examples N; name the file, or say how many rows it has.")
    machine = None if options.throughput is None else Machine.told(options.throughput)
    if options.parameters is not None:
        if options.parameters < 1:
            raise ConfigError(f"--parameters {options.parameters}: must be at least 1; leave it out if unknown.")
        if machine is None:
            raise ConfigError("--parameters without --throughput: belongs to a machine; tell how fast it is, too.")
        machine = dataclasses.replace(machine, parameters=options.parameters)
    clipping = _rule(options, options.examples)
    return _propose(
        options, clipping, examples=options.examples, delta=options.delta, before=(), machine=machine, usual_steps=None
    )


def _rule(options: PlanOptions, examples: int) -> Clipping:
    return options.clipping if options.clipping is not None else tempered_clipping(examples)


def _propose(
    options: PlanOptions,
    clipping: Clipping,
    *,
    examples: int,
    delta: float | None,
    before: tuple[Query, ...],
    machine: Machine | None,
    usual_steps: int | None,
) -> Proposal:
    return propose(
        examples=examples,
        epsilon=options.epsilon,
        delta=delta,
        compute=options.compute,
        samples=options.samples,
        money=options.money,
        price_per_hour=options.price_per_hour,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        machine=machine,
        usual_steps=usual_steps,
        clipping=clipping.describe(),
        before=before,
    )


def _train_command(data: DataOptions, *, model: models.ModelKind, plan: Path) -> str:
    """The command that trains by a plan, on the same data read in the same way."""
    classes = data.classes
    said: dict[str, object] = {
        "--target": data.target,
        "--test": data.test,
        "--columns": None if data.columns is None else ",".join(data.columns),
        "--schema": data.schema,
        "--classes": ",".join(classes) if isinstance(classes, tuple) else classes,
        "--text-column": data.text_column,
        "--image-size": None if data.image_size is None else "x".join(map(str, data.image_size)),
        "--model": None if model is models.ModelKind.AUTO else model.value,
        "--plan": plan,
    }
    words = ["discreet", "train", str(data.path)]
    for option, value in said.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


def _choose(proposal: Proposal, name: str | None) -> Option:
    if name is None:
        return proposal.recommended
    by_name = {option.kind.value: option for option in proposal.options}
    if name not in by_name:
        raise ConfigError(f'--choose "{name}": is none of the plans {", ".join(by_name)}; leave it out for the best.')
    return by_name[name]


def _check_place(path: Path) -> None:
    """Before anything is measured or drawn."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: cannot be written ({path.parent} is no directory); make it, or name another.")


def _save(chosen: Option, path: Path) -> None:
    try:
        chosen.plan.save(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name a file that can.") from None


def _side_by_side(options: tuple[Option, ...], *, chosen: Option) -> str:
    rows = [["", *(option.kind.value + (" *" if option is chosen else "") for option in options)]]
    rows += [[row.label, *map(in_terminal, cells)] for row, cells in known_rows(options)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _why(chosen: Option) -> list[str]:
    return [f"  {row.label} {in_terminal(row.figure(chosen))}: {reason}" for row, reason in reasons(chosen)]


def _changes(proposal: Proposal) -> list[str]:
    width = max(len(item.change) for item in proposal.what_if)
    return [f"  {item.change.ljust(width)}  {item.effect}" for item in proposal.what_if]


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < float("inf"):
        raise ConfigError(f"--epsilon {epsilon}: must be finite and above 0 to be planned; the usual range is 1 to 8.")
