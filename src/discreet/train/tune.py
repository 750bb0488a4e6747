"""tune(): search settings on private data, and pay for it. A random number of runs, of which the best is released.

Whoever compares k trainings and keeps the best has made k queries. If the number of runs is itself random, from the
right distribution and independent of the data, and nothing of the others is ever shown, all of it costs little more
than one run (Papernot & Steinke, arXiv:2110.03620). So in this order:

    plan      noise such that all runs, scores and the choice keep one epsilon together; shown before anything begins
    charge    the whole search is one entry of the ledger, written and synced first
    K         number of runs, from the run's secret key, after the charge
    runs      each draws its setting uniformly and with replacement, trains, and is scored
    release   the best model, its setting and its score. K and the other runs are destroyed

A killed search goes on from its last whole run. It cannot draw K again: K, settings, batches and noise are functions of
the key, and another key is another search with another charge, which the budget refuses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, subkey
from discreet.core.score import SCORES, ScoreFunction, is_isolated, summed_scores
from discreet.errors import CheckFailed, ConfigError, LedgerError
from discreet.privacy.plan import Plan
from discreet.privacy.repetitions import Stopping
from discreet.privacy.sampling import PoissonSampling
from discreet.privacy.tuning import USUAL_RUNS, plan_search
from discreet.train.auto_lr import RateControl
from discreet.train.check import CheckReport
from discreet.train.environment import describe_environment
from discreet.train.examples import Examples
from discreet.train.loop import Data, new_run_dir, self_check
from discreet.train.run import SEARCH, Run
from discreet.train.search_state import SearchState
from discreet.train.setup import check_examples, clipping_of
from discreet.train.trial import MICROBATCH, Recipe, Schedule, run_trial

QUERY = "search"
"""Name of the one entry in the ledger."""


@dataclass(frozen=True)
class Choice:
    """One setting among which a search chooses.

    Attributes:
        name: unique, and public: that of the best is released.
        build: a model with fresh weights from torch's global generator, which is seeded before the call.
        recipe: optimiser and learning rate.
    """

    name: str
    build: Callable[[], nn.Module]
    recipe: Recipe


@dataclass(frozen=True)
class PublicScore:
    """Score a model on data outside the guarantee: costs nothing.

    Attributes:
        score: model -> any number, larger is better; it must not read a private example.
    """

    score: Callable[[nn.Module], float]


@dataclass(frozen=True)
class PrivateScore:
    """Score a model by its mean over the private examples, with noise; charged with the run.

    Attributes:
        score: per-example scores in [0, 1], shape (B,), e.g. right answers; each a function of its own example.
    """

    score: ScoreFunction


@dataclass(frozen=True)
class Tuned:
    """What `tune` returns. Released or public, all of it."""

    model: nn.Module
    choice: str
    score: float
    plan: Plan
    epsilon: float
    run_dir: Path


def tune(
    choices: Sequence[Choice],
    dataset: Data,
    *,
    loss: LossFunction,
    score: PublicScore | PrivateScore,
    epsilon: float | None = None,
    delta: float | None = None,
    runs: float = USUAL_RUNS,
    stopping: Stopping = Stopping.LOGARITHMIC,
    batch_size: int | None = None,
    steps: int | None = None,
    clipping: Clipping | None = None,
    plan: Plan | None = None,
    run_dir: str | Path | Run | None = None,
    resume: bool = False,
    seed: int | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tuned:
    """Train under several settings, a secret random number of times, and release the best model alone.

    **Guarantees.** Everything under ``run_dir/release`` and everything returned is together (epsilon, delta)-DP with
    respect to adding or removing one example of ``dataset``, the choice of setting included, provided that the number
    of runs stays unknown: ``on_step`` is not told any number, and nobody outside should time the search. The charge is
    in the ledger before the first run, and is the same however many there are.

    Args:
        choices: a declared grid; each run draws one uniformly, so it may be drawn twice, or never.
        dataset, loss: as in `make_private`.
        score: how runs are compared.
        epsilon, delta: of the whole search. runs: how many are expected. stopping: distribution of their number.
        batch_size, steps: of each run; None: the planner's. clipping: automatic by default.
        plan: of `plan_search`, instead of all of these.
        run_dir, resume, seed: as in `make_private`. A resumed search keeps its plan.
        on_plan: told the plan, and so what will be spent, before anything is written or read of the data.
        on_step: called at every step of every run, so that somebody can be shown that it goes on.

    Raises:
        ConfigError: contradictory arguments, or a search that something changed under since it began.
        CheckFailed: a choice could not be trained privately, or a score is not that of one example alone.
        BudgetExceeded: the plan does not keep its epsilon.
    """
    _check_choices(choices)
    examples = Examples(dataset)
    with ExitStack() as stack:
        run = _existing(run_dir, resume=resume, seed=seed)
        if run is not None:
            stack.enter_context(run)
            the_plan = run.plan
        elif plan is not None:
            the_plan = plan
        else:
            the_plan = _new_plan(
                examples.count,
                epsilon=epsilon,
                delta=delta,
                runs=runs,
                stopping=stopping,
                private_score=isinstance(score, PrivateScore),
                batch_size=batch_size,
                steps=steps,
                clipping=clipping,
            )
        _check_plan(the_plan, score=score, clipping=clipping, examples=examples.count)
        if on_plan is not None:
            on_plan(the_plan)
        field = _Field(choices, examples, loss=loss, score=score, plan=the_plan)
        if run is None:
            where = Path(run_dir) if isinstance(run_dir, (str, Path)) else new_run_dir()
            run = stack.enter_context(Run.create(where, plan=the_plan, seed=seed))
        state = _begin(run, field)
        _search(run, field, state, on_step=on_step)
        return _conclude(run, field, state)


def _begin(run: Run, field: _Field) -> SearchState:
    """Record what the runs depend on, then charge; on resume compare, and refuse what changed.

    Data that changed between two runs would make the best of them the answer to no single question.
    """
    state = SearchState.load(run.path / SEARCH)
    charged = any(record.kind == "query" and record.body["name"] == QUERY for record in run.ledger.records)
    if state is None:
        if charged:
            raise LedgerError(
                f"{run.path / SEARCH}: is missing although the search is charged; restore it, or start a new search."
            )
        state = SearchState.create(run.path / SEARCH, environment=field.environment)
    changed = sorted(
        name
        for name in {*state.environment, *field.environment}
        if state.environment.get(name) != field.environment.get(name)
    )
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: changed since the search began; restore it, or start a new search, which spends "
            "its own epsilon."
        )
    run.ledger.reserve_query(QUERY, run.plan.queries()[-1])
    return state


def _search(run: Run, field: _Field, state: SearchState, *, on_step: Callable[[], None] | None) -> None:
    """Make the runs that are left. Whoever is best so far is all that stays of them."""
    assert run.plan.search is not None
    in_all = run.plan.search.repetitions.runs(_uniform(run.key_for("number of runs")))
    while state.done < in_all:
        index = state.done
        choice = int(_uniform(run.key_for(f"choice|{index}")) * len(field.choices))
        model, score = field.run(choice, key=run.key_for(f"run|{index}"), private=run.private, on_step=on_step)
        state.keep(run=index, choice=choice, score=score, model=model)


def _conclude(run: Run, field: _Field, state: SearchState) -> Tuned:
    assert state.best is not None
    assert run.plan.search is not None
    chosen = field.choices[state.best.choice]
    model = field.model(state.best.choice, key=run.key_for(f"run|{state.best.run}"))
    model.load_state_dict(state.tensors())
    score = state.best.score
    run.write(
        "tuning.json",
        {
            "choices": [choice.name for choice in field.choices],
            "chosen": chosen.name,
            "score": score if math.isfinite(score) else None,
            "score_noise_std": field.score_noise_std,
            "search": run.plan.to_json()["search"],
        },
    )
    run.write("check.json", field.reports[state.best.choice].to_json())
    run.finish(model)
    return Tuned(
        model=model, choice=chosen.name, score=score, plan=run.plan, epsilon=run.ledger.epsilon(), run_dir=run.path
    )


class _Field:
    """Everything that a run is made of but its key: settings, data, score. Made before anything is charged.

    Attributes:
        choices: the settings. reports: their self-checks.
        environment: what the runs depend on, for comparison on resume.
        score_noise_std: of a released score; None when scores are public.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        examples: Examples,
        *,
        loss: LossFunction,
        score: PublicScore | PrivateScore,
        plan: Plan,
    ) -> None:
        assert plan.search is not None
        self.choices = tuple(choices)
        self._examples, self._loss, self._score, self._plan = examples, loss, score, plan
        self._clipping = clipping_of(plan)
        noise = plan.search.score_noise
        self.score_noise_std = None if noise is None else noise / plan.examples
        # Any key will do here: these models are looked at and thrown away.
        models = [self.model(index, key=bytes(32)) for index in range(len(self.choices))]
        self.reports = [self._checked(model) for model in models]
        self.environment = self._describe(models)

    def model(self, choice: int, *, key: bytes) -> nn.Module:
        """A fresh model of a choice."""
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(subkey(key, "initial weights")[:8], "little") >> 1)
            return self.choices[choice].build()

    def run(
        self, choice: int, *, key: bytes, private: bool, on_step: Callable[[], None] | None
    ) -> tuple[nn.Module, float]:
        """Train and score one setting under one key."""
        model = self.model(choice, key=key)
        run_trial(
            model,
            self._examples,
            loss=self._loss,
            schedule=Schedule(
                sampling=PoissonSampling(examples=self._plan.examples, batch_size=self._plan.batch_size),
                noise_multiplier=self._plan.noise_multiplier,
                steps=self._plan.steps,
            ),
            recipe=self.choices[choice].recipe,
            clipping=self._clipping,
            layout=self.reports[choice].layout,
            key=key,
            private=private,
            on_step=None if on_step is None else lambda _step: on_step(),
        )
        score = self._scored(model, key=key, private=private)
        # NaN compares with nothing: such a run can only be kept when there is no other.
        return model, score if not math.isnan(score) else -math.inf

    def _scored(self, model: nn.Module, *, key: bytes, private: bool) -> float:
        if isinstance(self._score, PublicScore):
            with torch.no_grad():
                return float(self._score.score(model))
        assert self._plan.search is not None
        assert self._plan.search.score_noise is not None
        device = next(model.parameters()).device
        parts = [
            np.arange(start, min(start + MICROBATCH, self._examples.count))
            for start in range(0, self._examples.count, MICROBATCH)
        ]
        total = summed_scores(
            model,
            self._score.score,
            ((self._examples.fetch(part, device=device), len(part)) for part in parts),
        )
        released = release(
            total,
            noise_multiplier=self._plan.search.score_noise,
            source=NoiseSource.keyed(subkey(key, "score noise"), private=private),
            divisor=self._examples.count,
        )
        return float(released.tensors[SCORES])

    def _checked(self, model: nn.Module) -> CheckReport:
        device = next(model.parameters()).device
        report = self_check(model, self._loss, self._examples, self._clipping, device)
        if isinstance(self._score, PrivateScore):
            few = np.arange(min(4, self._examples.count))
            batch = self._examples.fetch(few, device=device)
            singles = [self._examples.fetch(few[at : at + 1], device=device) for at in few]
            if not is_isolated(model, self._score.score, batch, singles):
                raise CheckFailed(
                    "score: an example's score depends on other examples of its batch; score each one by itself."
                )
        return report

    def _describe(self, models: Sequence[nn.Module]) -> dict[str, str]:
        first = models[0]
        optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
        known = describe_environment(
            model=first,
            loss=self._loss,
            optimizer=optimizer,
            rates=RateControl(optimizer, None, steps=1),
            clipping=self._clipping,
            examples=self._examples,
        )
        settings = "\n".join(
            f"{choice.name}|{choice.recipe!r}|{model!r}" for choice, model in zip(self.choices, models, strict=True)
        )
        return {**known, "choices": hashlib.sha256(settings.encode()).hexdigest()}


def _uniform(key: bytes) -> float:
    """53 bits of a key as a number in [0, 1)."""
    return (int.from_bytes(key[:8], "little") >> 11) * 2.0**-53


def _existing(run_dir: str | Path | Run | None, *, resume: bool, seed: int | None) -> Run | None:
    if isinstance(run_dir, Run):
        return run_dir
    if not resume:
        return None
    if run_dir is None:
        raise ConfigError("resume=True without run_dir: name the run directory to continue.")
    return Run.resume(Path(run_dir), seed=seed)


def _new_plan(
    examples: int,
    *,
    epsilon: float | None,
    delta: float | None,
    runs: float,
    stopping: Stopping,
    private_score: bool,
    batch_size: int | None,
    steps: int | None,
    clipping: Clipping | None,
) -> Plan:
    if epsilon is None:
        raise ConfigError("epsilon=None without a plan: pass the epsilon of the whole search, e.g. epsilon=3.")
    return plan_search(
        examples=examples,
        epsilon=epsilon,
        delta=delta,
        runs=runs,
        stopping=stopping,
        private_score=private_score,
        batch_size=batch_size,
        steps=steps,
        clipping=(clipping if clipping is not None else Clipping.automatic()).describe(),
    )


def _check_choices(choices: Sequence[Choice]) -> None:
    names = [choice.name for choice in choices]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"choices {names}: needs at least one, each with its own name.")


def _check_plan(plan: Plan, *, score: PublicScore | PrivateScore, clipping: Clipping | None, examples: int) -> None:
    if plan.search is None:
        raise ConfigError("the plan is of a single run: a search needs its own; make it with plan_search().")
    if plan.search.repetitions.stopping is Stopping.POISSON:
        raise ConfigError("the plan's stopping is poisson: it may make no run at all; make it with plan_search().")
    if (plan.search.score_noise is None) != isinstance(score, PublicScore):
        kind = "public" if plan.search.score_noise is None else "private"
        raise ConfigError(
            f"score {type(score).__name__}: the plan charges for a {kind} one; make a plan for this score."
        )
    check_examples(plan, clipping=clipping, examples=examples)
