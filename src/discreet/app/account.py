"""`discreet account`: of epsilon, delta, noise, steps and batch size, the one that is left out.

discreet account --examples 60000 --batch-size 4096 --steps 800 --delta 1e-5 --epsilon 3      (gives the noise)
discreet account --queries runs/adult --epsilon 2                                             (gives delta)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from discreet.errors import ConfigError
from discreet.privacy.accounting import (
    Accountant,
    Query,
    Relation,
    SampledGaussian,
    TruncatedGaussian,
    query_from_json,
    solve_step_noise,
)
from discreet.privacy.accounting import (
    delta as compose_delta,
)
from discreet.privacy.accounting import (
    epsilon as compose_epsilon,
)
from discreet.privacy.answers import Budget, Step, largest_batch, most_steps
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import default_delta
from discreet.privacy.records import json_number, parse_json
from discreet.privacy.sampling import PoissonSampling
from discreet.privacy.search import Largest
from discreet.privacy.tradeoff import in_words, tradeoff

RATES = (0.001, 0.01, 0.1)
LARGEST_QUERY_FILE = 64 * 2**20
LEDGER_NAME = "ledger.jsonl"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `discreet account`."""
    command.add_argument("--examples", type=int, metavar="N")
    command.add_argument("--batch-size", type=int, metavar="B", help="expected batch; left out: the largest allowed")
    command.add_argument("--steps", type=int, metavar="S", help="left out: the most that are allowed")
    command.add_argument("--delta", type=float, metavar="D", help="default: 1 / examples^1.1; left out: see below")
    command.add_argument("--noise-multiplier", type=float, metavar="SIGMA", help="left out: the least that is needed")
    command.add_argument("--epsilon", type=float, metavar="E", help="left out: what is spent")
    command.add_argument(
        "--largest-batch", type=int, metavar="L", help="batches are Poisson samples cut to at most L examples"
    )
    command.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help="a run directory, its ledger, or a JSON list of queries: asked about, or spent before the steps above",
    )
    relations = [relation.value for relation in Relation]
    command.add_argument("--relation", choices=relations, help="when data sets are neighbours (default add_remove)")
    accountants = [accountant.value for accountant in Accountant]
    command.add_argument("--accountant", choices=accountants, help="default pld; rdp is looser")
    command.add_argument("--curve", action="store_true", help="the whole trade-off curve of the best attack")
    command.epilog = (
        "Exactly one of batch size, steps, noise multiplier and epsilon is left out, and is the answer; "
        "with all four given, delta is the answer. With --queries alone, epsilon is, or delta for a given epsilon."
    )


@dataclass(frozen=True)
class Account:
    """The answer, as facts to print and sentences to read."""

    facts: Mapping[str, object]
    curve: tuple[tuple[float, float], ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Given:
    """What the options say; None is left out. ``before`` are the queries of the file."""

    examples: int | None
    batch_size: int | None
    steps: int | None
    noise_multiplier: float | None
    epsilon: float | None
    delta: float | None
    largest_batch: int | None
    relation: Relation
    accountant: Accountant
    before: tuple[Query, ...]

    @classmethod
    def read(cls, options: argparse.Namespace) -> _Given:
        delta, relation, accountant = options.delta, options.relation, options.accountant
        before: tuple[Query, ...] = ()
        if options.queries is not None:
            before, recorded = _read_queries(options.queries)
            relation = relation or recorded.get("relation")
            accountant = accountant or recorded.get("accountant")
            alone = options.steps is None and options.batch_size is None and options.noise_multiplier is None
            if delta is None and not (alone and options.epsilon is not None):
                delta = recorded.get("delta")
        if options.examples is not None and options.examples < 1:
            raise ConfigError(f"--examples {options.examples}: must be at least 1; pass the number of examples.")
        if delta is not None and not 0 < delta < 1:
            raise ConfigError(f"--delta {delta}: must be above 0 and below 1; the default is 1 / examples^1.1.")
        if delta is not None and options.examples is not None and delta * options.examples >= 1:
            raise ConfigError(
                f"--delta {delta}: must be below 1 / examples = {1 / options.examples:.3g}, at which publishing one "
                "random example would pass; leave it out for 1 / examples^1.1."
            )
        if options.epsilon is not None and not options.epsilon > 0:
            raise ConfigError(f"--epsilon {options.epsilon}: must be above 0; the usual range is 1 to 8.")
        return cls(
            examples=options.examples,
            batch_size=options.batch_size,
            steps=options.steps,
            noise_multiplier=options.noise_multiplier,
            epsilon=options.epsilon,
            delta=delta,
            largest_batch=options.largest_batch,
            relation=Relation(relation or Relation.ADD_REMOVE.value),
            accountant=Accountant(accountant or Accountant.PLD.value),
            before=before,
        )

    def missing(self) -> str:
        """The name of the one number that is left out.

        Raises:
            ConfigError: none is, or more than one.
        """
        names = ("batch_size", "steps", "noise_multiplier", "epsilon")
        absent = [name for name in names if getattr(self, name) is None]
        if not absent and self.delta is None:
            return "delta"
        if len(absent) != 1:
            left_out = ", ".join("--" + name.replace("_", "-") for name in absent) or "none"
            raise ConfigError(
                f"left out: {left_out}; must be exactly one of --batch-size, --steps, --noise-multiplier and "
                "--epsilon, or --delta with all four given; it is the answer."
            )
        return absent[0]

    def known_delta(self) -> float:
        """Delta as given, or the default."""
        if self.delta is not None:
            return self.delta
        if self.examples is None:
            raise ConfigError(
                "--delta is missing: it has a default for a number of --examples only; pass --delta 1e-6."
            )
        return default_delta(self.examples)

    def step(self) -> Step:
        """One kind of step, with 1 in the place of what is left out."""
        if self.examples is None:
            raise ConfigError("--examples is missing: the sample rate is batch size / examples; pass --examples N.")
        rate = PoissonSampling(examples=self.examples, batch_size=_or(self.batch_size, 1)).rate
        steps, sigma = _or(self.steps, 1), 1.0 if self.noise_multiplier is None else self.noise_multiplier
        if steps < 1:
            raise ConfigError(f"--steps {steps}: must be at least 1; pass the number of updates.")
        if self.largest_batch is None:
            return SampledGaussian(rate, sigma, steps)
        return TruncatedGaussian(self.examples, rate, self.largest_batch, sigma, steps)

    def spent(self, queries: tuple[Query, ...], delta: float) -> float:
        return compose_epsilon(queries, delta=delta, relation=self.relation, accountant=self.accountant)


def answer(options: argparse.Namespace) -> Account:
    """What `discreet account` was asked.

    Raises:
        ConfigError: the question has no answer, or more than one.
        BudgetExceeded: the target is passed before the first step.
    """
    given = _Given.read(options)
    sizes = (given.examples, given.batch_size, given.steps, given.noise_multiplier, given.largest_batch)
    if options.queries is not None and sizes[1:] == (None,) * 4:
        asked, queries, facts = _about_queries(given)
    else:
        asked, queries, facts = _about_steps(given)
    facts |= {"relation": given.relation.value, "accountant": given.accountant.value, "answer": asked}
    curve = tradeoff(queries, relation=given.relation, accountant=given.accountant)
    delta = facts["delta"]
    assert isinstance(delta, float)
    facts |= {
        "mu": json_number(curve.mu_equivalent(delta=delta)),
        "advantage": curve.advantage(),
        "attack": {f"{rate:g}": curve.power(rate) for rate in RATES},
    }
    return Account(
        facts=facts,
        curve=curve.curve() if options.curve else (),
        words=in_words(curve, relation=given.relation),
    )


def _about_queries(given: _Given) -> tuple[str, tuple[Query, ...], dict[str, object]]:
    if given.epsilon is not None and given.delta is None:
        delta = compose_delta(given.before, epsilon=given.epsilon, relation=given.relation, accountant=given.accountant)
        return "delta", given.before, {"epsilon": json_number(given.epsilon), "delta": delta}
    if given.epsilon is not None:
        raise ConfigError("left out: none; must be one of --epsilon and --delta for --queries; it is the answer.")
    delta = given.known_delta()
    return "epsilon", given.before, {"epsilon": json_number(given.spent(given.before, delta)), "delta": delta}


def _about_steps(given: _Given) -> tuple[str, tuple[Query, ...], dict[str, object]]:
    asked, step, found = given.missing(), given.step(), None
    if asked == "delta":
        queries = (*given.before, step)
        assert given.epsilon is not None
        delta = compose_delta(queries, epsilon=given.epsilon, relation=given.relation, accountant=given.accountant)
        return asked, queries, _facts(given, step, epsilon=given.epsilon, delta=delta)
    delta = given.known_delta()
    if asked == "noise_multiplier":
        step = dataclasses.replace(step, noise_multiplier=_least_noise(given, step, delta))
    elif asked != "epsilon":
        step, found = _most(given, step, delta, asked=asked)
    queries = (*given.before, step)
    facts = _facts(given, step, epsilon=given.spent(queries, delta), delta=delta)
    if found is not None:
        facts["at_limit"] = found.at_limit
    return asked, queries, facts


def _least_noise(given: _Given, step: Step, delta: float) -> float:
    assert given.epsilon is not None
    if math.isinf(given.epsilon):
        return 0.0
    return solve_step_noise(
        step,
        epsilon=given.epsilon,
        delta=delta,
        before=given.before,
        relation=given.relation,
        accountant=given.accountant,
    ).noise_multiplier


def _most(given: _Given, step: Step, delta: float, *, asked: str) -> tuple[Step, Largest]:
    assert given.epsilon is not None
    assert given.examples is not None
    budget = Budget(given.epsilon, delta, given.before, given.relation, given.accountant)
    if asked == "steps":
        found = most_steps(step, budget)
        return dataclasses.replace(step, count=found.n), found
    found = largest_batch(step, budget, examples=given.examples)
    return dataclasses.replace(step, sample_rate=found.n / given.examples), found


def _facts(given: _Given, step: Step, *, epsilon: float, delta: float) -> dict[str, object]:
    assert given.examples is not None
    return {
        "epsilon": json_number(epsilon),
        "delta": delta,
        "noise_multiplier": float(step.noise_multiplier),
        "sample_rate": step.sample_rate,
        "batch_size": round(step.sample_rate * given.examples),
        "steps": step.count,
        "examples": given.examples,
    }


def _read_queries(path: Path) -> tuple[tuple[Query, ...], dict[str, object]]:
    """Queries of a ledger or of a JSON list, and what the ledger's plan says about delta, relation and accountant."""
    path = path / LEDGER_NAME if path.is_dir() else path
    if path.suffix == ".jsonl":
        ledger = Ledger.read(path)
        plan = ledger.plan
        recorded = {"delta": plan.delta, "relation": plan.relation.value, "accountant": plan.accountant.value}
        return ledger.queries(), recorded
    try:
        if path.stat().st_size > LARGEST_QUERY_FILE:
            raise ConfigError(f"{path}: must be at most {LARGEST_QUERY_FILE >> 20} MiB; merge equal queries by count.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); pass a run, a ledger or a JSON list.") from None
    records = parse_json(text, where=str(path))
    if not isinstance(records, list):
        raise ConfigError(f"{path}: must be a JSON list of queries, not {type(records).__name__}; see docs/recipes.md.")
    return tuple(query_from_json(record) for record in records), {}


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
