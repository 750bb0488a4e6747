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
the key, and another key is another search with another charge, which the budget refuses. So a run that raises, for
want of memory or by an error in the user's code, ends the search where it stands, and raises again when it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.errors import ConfigError, LedgerError
from discreet.privacy.plan import Plan
from discreet.privacy.repetitions import Stopping
from discreet.privacy.tuning import USUAL_RUNS, plan_search
from discreet.train.contest import Choice, Contest, PrivateScore, PublicScore
from discreet.train.examples import Data, Examples
from discreet.train.run import Run
from discreet.train.run_directory import SEARCH, new_run_dir
from discreet.train.search_state import SearchState
from discreet.train.setup import check_examples, check_same, existing_run, rule_for
from discreet.train.trial import fresh_model

QUERY = "search"
"""Name of the one entry in the ledger."""


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
    runs: float | None = None,
    stopping: Stopping | None = None,
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
        epsilon, delta: of the whole search. runs: how many are expected; None: 10. stopping: distribution of their
            number; None: logarithmic.
        batch_size, steps: of each run; None: the planner's.
        clipping: None: automatic, or for `Tempered` models the rule that keeps their probabilities right.
        plan: of `plan_search`, instead of all of these.
        run_dir, resume, seed: as in `make_private`. A resumed search keeps its plan, and is refused other numbers.
        on_plan: told the plan, and so what will be spent, before anything is written or read of the data.
        on_step: called at every step of every run, so that somebody can be shown that it goes on.

    Raises:
        ConfigError: contradictory arguments, a choice or a score that does not work, or a search that something changed
            under since it began.
        CheckFailed: a choice could not be trained privately, or a score is not that of one example alone.
        BudgetExceeded: the plan does not keep its epsilon.
    """
    _check_choices(choices)
    examples = Examples(dataset)
    asked = {
        "epsilon": epsilon,
        "delta": delta,
        "runs": runs,
        "stopping": stopping,
        "batch_size": batch_size,
        "steps": steps,
    }
    with ExitStack() as stack:
        run = existing_run(run_dir, resume=resume, seed=seed)
        if run is not None:
            stack.enter_context(run)
            the_plan = run.plan
            _check_search(the_plan)
            check_same(_asked_and_planned(asked, the_plan))
            if plan is not None:
                check_same({"plan": (plan.fingerprint(), the_plan.fingerprint())})
        elif plan is not None:
            _refuse_both(asked)
            the_plan = plan
        elif epsilon is None:
            raise ConfigError("epsilon=None without a plan: pass the epsilon of the whole search, e.g. epsilon=3.")
        else:
            the_plan = plan_search(
                examples=examples.count,
                epsilon=epsilon,
                delta=delta,
                runs=USUAL_RUNS if runs is None else runs,
                stopping=Stopping.LOGARITHMIC if stopping is None else stopping,
                private_score=isinstance(score, PrivateScore),
                batch_size=batch_size,
                steps=steps,
                clipping=_rule(choices, clipping, epsilon=epsilon, examples=examples.count).describe(),
            )
        _check_plan(the_plan, score=score, clipping=clipping, examples=examples.count)
        if on_plan is not None:
            on_plan(the_plan)
        contest = Contest(choices, examples, loss=loss, score=score, plan=the_plan)
        if run is None:
            where = Path(run_dir) if isinstance(run_dir, (str, Path)) else new_run_dir()
            run = stack.enter_context(Run.create(where, plan=the_plan, seed=seed))
        state = _begin(run, contest)
        _search(run, contest, state, on_step=on_step)
        return _conclude(run, contest, state)


def _rule(choices: Sequence[Choice], clipping: Clipping | None, *, epsilon: float, examples: int) -> Clipping:
    """What was asked for, or what the first choice needs; a choice that needs another one is refused by its check."""
    if clipping is not None:
        return clipping
    first = fresh_model(choices[0].build, key=bytes(32))
    return rule_for(first, None, epsilon=epsilon, examples=examples) or Clipping.automatic()


def _begin(run: Run, contest: Contest) -> SearchState:
    """Record what the runs depend on, then charge; on resume compare, and refuse what changed.

    Data that changed between two runs would make the best of them the answer to no single question.
    """
    state = SearchState.load(run.path / SEARCH, key=run.key_for("state"))
    charged = any(record.kind == "query" and record.body["name"] == QUERY for record in run.ledger.records)
    if state is None:
        if charged:
            raise LedgerError(
                f"{run.path / SEARCH}: is missing although the search is charged; restore it, or start a new search."
            )
        state = SearchState.create(run.path / SEARCH, key=run.key_for("state"), environment=contest.environment)
    changed = sorted(
        name
        for name in {*state.environment, *contest.environment}
        if state.environment.get(name) != contest.environment.get(name)
    )
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: changed since the search began; restore it, or start a new search, which spends "
            "its own epsilon."
        )
    run.ledger.reserve_query(QUERY, run.plan.queries()[-1])
    return state


def _search(run: Run, contest: Contest, state: SearchState, *, on_step: Callable[[], None] | None) -> None:
    """Make the runs that are left. Whoever is best so far is all that stays of them."""
    assert run.plan.search is not None
    in_all = run.plan.search.repetitions.runs(_uniform(run.key_for("number of runs")))
    while state.done < in_all:
        index = state.done
        choice = int(_uniform(run.key_for(f"choice|{index}")) * len(contest.choices))
        model, score = contest.run(choice, key=run.key_for(f"run|{index}"), private=run.private, on_step=on_step)
        state.keep(run=index, choice=choice, score=score, model=model)


def _conclude(run: Run, contest: Contest, state: SearchState) -> Tuned:
    assert state.best is not None
    assert run.plan.search is not None
    chosen = contest.choices[state.best.choice]
    model = contest.model(state.best.choice, key=run.key_for(f"run|{state.best.run}"))
    model.load_state_dict(state.tensors())
    score = state.best.score
    run.write(
        "tuning.json",
        {
            "choices": [choice.name for choice in contest.choices],
            "chosen": chosen.name,
            "score": score if math.isfinite(score) else None,
            "score_noise_std": contest.score_noise_std,
            "search": run.plan.to_json()["search"],
        },
    )
    run.write("check.json", contest.reports[state.best.choice].released())
    run.finish(model)
    return Tuned(
        model=model, choice=chosen.name, score=score, plan=run.plan, epsilon=run.ledger.epsilon(), run_dir=run.path
    )


def _uniform(key: bytes) -> float:
    """53 bits of a key as a number in [0, 1)."""
    return (int.from_bytes(key[:8], "little") >> 11) * 2.0**-53


def _check_choices(choices: Sequence[Choice]) -> None:
    names = [choice.name for choice in choices]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"choices {names}: needs at least one, each with its own name.")


def _asked_and_planned(asked: Mapping[str, object], plan: Plan) -> dict[str, tuple[object, object]]:
    assert plan.search is not None
    search = {"runs": plan.search.repetitions.mean, "stopping": plan.search.repetitions.stopping}
    planned = {name: search[name] if name in search else getattr(plan, name) for name in asked}
    return {name: (value, planned[name]) for name, value in asked.items()}


def _refuse_both(asked: Mapping[str, object]) -> None:
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(f"{name}={value} with a plan: the plan says it already; pass one of the two.")


def _check_search(plan: Plan) -> None:
    if plan.search is None:
        raise ConfigError("the plan is of a single run: a search needs its own; make it with plan_search().")


def _check_plan(plan: Plan, *, score: PublicScore | PrivateScore, clipping: Clipping | None, examples: int) -> None:
    _check_search(plan)
    assert plan.search is not None
    if plan.search.repetitions.stopping is Stopping.POISSON:
        raise ConfigError("the plan's stopping is poisson: it may make no run at all; make it with plan_search().")
    if (plan.search.score_noise is None) != isinstance(score, PublicScore):
        kind = "public" if plan.search.score_noise is None else "private"
        raise ConfigError(
            f"score {type(score).__name__}: the plan charges for a {kind} one; make a plan for this score."
        )
    check_examples(plan, clipping=clipping, examples=examples)
