"""A search is charged once and ahead, goes on after a crash without another draw, and leaves only its best run."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from discreet.core.clipping import Clipping
from discreet.errors import BudgetExceeded, CheckFailed, ConfigError, LedgerError
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan, Search
from discreet.privacy.repetitions import Repetitions, Stopping
from discreet.privacy.tuning import plan_search
from discreet.privacy.verification import verify
from discreet.train.contest import Choice, PrivateScore, PublicScore
from discreet.train.make_private import make_private
from discreet.train.run import Run
from discreet.train.run_directory import KEY, SEARCH
from discreet.train.search_state import SearchState
from discreet.train.tempered import Tempered, tempered_clipping, tempered_cross_entropy
from discreet.train.trial import Recipe
from discreet.train.tune import Tuned, tune
from train import toys

STEPS = 6
EPSILON = 3.0


def _right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def _accuracy(model: nn.Module) -> float:
    features, targets = toys.data(examples=300).tensors
    return float((model(features).argmax(1) == targets).float().mean())


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


CHOICES = tuple(Choice(name=f"rate {rate}", build=_build, recipe=Recipe(rate)) for rate in (0.001, 0.01, 0.1))


def _plan(*, runs: float = 4, private_score: bool = True) -> Plan:
    return plan_search(
        examples=toys.EXAMPLES, epsilon=EPSILON, runs=runs, private_score=private_score, batch_size=30, steps=STEPS
    )


def _tune(where: Path, *, score=None, plan: Plan | None = None, seed: int | None = 5, **options) -> Tuned:
    score = score if score is not None else PublicScore(_accuracy)
    if plan is None and not options.get("resume"):
        plan = _plan(private_score=isinstance(score, PrivateScore))
    return tune(CHOICES, toys.data(), loss=toys.loss, score=score, plan=plan, run_dir=where, seed=seed, **options)


class _Killed(Exception):
    """Stands for the death of the process."""


def _dies_after(steps: int):
    left = [steps]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _Killed

    return step


def test_the_whole_search_is_charged_before_its_first_step(tmp_path):
    seen: list[tuple[int, float]] = []

    def look() -> None:
        view = Ledger.read(tmp_path / "run" / "ledger.jsonl")
        seen.append((len(view.records), view.epsilon()))

    tuned = _tune(tmp_path / "run", score=PrivateScore(_right), seed=None, on_step=look)
    assert len(set(seen)) == 1
    assert seen[0] == (2, tuned.plan.spent())
    assert 0.999 * EPSILON <= tuned.epsilon <= EPSILON
    assert tuned.epsilon == tuned.plan.spent() == verify(tmp_path / "run").epsilon
    assert verify(tmp_path / "run").private


def test_the_price_is_told_before_anything_is_written(tmp_path):
    told: list[float] = []

    def tell(plan: Plan) -> None:
        assert not (tmp_path / "run").exists()
        told.append(plan.spent())

    tuned = _tune(tmp_path / "run", on_plan=tell)
    assert told == [tuned.epsilon]


def test_the_best_of_all_runs_is_released_and_its_score_is_its_own(tmp_path):
    scores: list[float] = []
    score = PublicScore(lambda model: scores.append(_accuracy(model)) or scores[-1])
    tuned = _tune(tmp_path / "run", score=score, plan=_plan(runs=12, private_score=False))
    trained = scores[len(CHOICES) :]  # each choice's untrained model is scored first, before anything is charged
    assert len(trained) > 1
    assert tuned.score == max(trained) == _accuracy(tuned.model)


def test_nothing_of_the_other_runs_is_left(tmp_path):
    _tune(tmp_path / "run", plan=_plan(runs=12, private_score=False))
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    release = ("certificate.json", "check.json", "model.safetensors", "plan.json", "tuning.json")
    assert files == {"ledger.jsonl", *(f"release/{name}" for name in release)}
    record = json.loads((tmp_path / "run" / "release" / "tuning.json").read_text())
    assert set(record) == {"choices", "chosen", "score", "score_noise_std", "search"}


def test_the_files_say_the_same_whether_there_were_few_runs_or_many(tmp_path):
    """Sizes and fields are those of the plan: the number of runs shows nowhere."""
    sizes = []
    for seed in (1, 2, 3):
        run_dir = tmp_path / str(seed)
        _tune(run_dir, seed=seed)
        view = Ledger.read(run_dir / "ledger.jsonl")
        sizes.append((len(view.records), [record.kind for record in view.records], view.epsilon()))
    assert sizes[0] == sizes[1] == sizes[2]


def _runs_of(run_dir: Path, **options) -> tuple[Tuned, int]:
    count = [0]

    def score(model: nn.Module) -> float:
        count[0] += 1
        return _accuracy(model)

    return _tune(run_dir, score=PublicScore(score), **options), count[0]


@pytest.mark.parametrize("deaths", [(0,), (3,), (STEPS + 1,), (STEPS + 2, 1), (2 * STEPS + 3,)])
def test_a_killed_search_goes_on_to_the_same_end_at_the_same_price(tmp_path, deaths):
    plan = _plan(runs=6, private_score=False)
    whole, _ = _runs_of(tmp_path / "whole", plan=plan, seed=9)
    for number, steps in enumerate(deaths):
        again = {"resume": True} if number else {"plan": plan}
        with pytest.raises(_Killed):
            _tune(tmp_path / "run", seed=9, on_step=_dies_after(steps), **again)
        assert Ledger.read(tmp_path / "run" / "ledger.jsonl").epsilon() == plan.spent()
    tuned = _tune(tmp_path / "run", seed=9, resume=True)
    assert (tuned.choice, tuned.score, tuned.epsilon) == (whole.choice, whole.score, whole.epsilon)
    assert torch.equal(toys.weights(tuned.model), toys.weights(whole.model))
    assert verify(tmp_path / "run").epsilon == plan.spent()


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {source!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from train import test_tune
left = [{steps}]
def step():
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
test_tune._tune(Path({where!r}), seed=9, plan=test_tune._plan(runs=6, private_score=False), on_step=step)
"""


def test_a_process_that_is_killed_outright_costs_nothing_more(tmp_path, repository):
    whole = _tune(tmp_path / "whole", seed=9, plan=_plan(runs=6, private_score=False))
    paths = {"tests": str(repository / "tests"), "source": str(repository / "src")}
    script = KILLED.format(steps=2 * STEPS + 1, where=str(tmp_path / "run"), **paths)
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    tuned = _tune(tmp_path / "run", seed=9, resume=True)
    assert (tuned.choice, tuned.score, tuned.epsilon) == (whole.choice, whole.score, whole.epsilon)
    assert verify(tmp_path / "run").epsilon == whole.epsilon


def test_a_death_between_weights_and_state_repeats_that_run(tmp_path, monkeypatch):
    whole = _tune(tmp_path / "whole", seed=9)
    write = SearchState._write
    calls = [0]

    def once(self: SearchState) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise _Killed
        write(self)

    monkeypatch.setattr(SearchState, "_write", once)
    with pytest.raises(_Killed):
        _tune(tmp_path / "run", seed=9)
    tuned = _tune(tmp_path / "run", seed=9, resume=True)
    assert (tuned.choice, tuned.score) == (whole.choice, whole.score)


def _begun(where: Path, *, seed: int | None = 9, steps: int = STEPS + 1) -> None:
    """A search that died in its second run; seed 9 makes at least three."""
    with pytest.raises(_Killed):
        _tune(where, seed=seed, plan=_plan(runs=6, private_score=False), on_step=_dies_after(steps))


def test_the_number_of_runs_is_drawn_once(tmp_path):
    """Without the state of a search that is charged, nobody knows which runs were made: it ends there."""
    _begun(tmp_path / "run")
    for file in (tmp_path / "run" / SEARCH).iterdir():
        file.unlink()
    with pytest.raises(LedgerError, match="is missing although the search is charged"):
        _tune(tmp_path / "run", seed=9, resume=True)


def test_without_the_key_there_is_no_second_draw(tmp_path):
    _begun(tmp_path / "run")
    (tmp_path / "run" / KEY).unlink()
    with pytest.raises(ConfigError, match="key is missing"):
        _tune(tmp_path / "run", seed=9, resume=True)


def test_another_key_is_another_search_and_the_budget_refuses_it(tmp_path):
    _begun(tmp_path / "run", seed=None, steps=2)
    with Run.resume(tmp_path / "run") as run:
        run.renew_key(["a test"])
        with pytest.raises(BudgetExceeded):
            run.ledger.reserve_query("search", run.plan.queries()[-1])


@pytest.mark.parametrize("what", ["data", "choices", "loss"])
def test_a_search_does_not_go_on_when_something_changed(tmp_path, what):
    _begun(tmp_path / "run")
    data, choices, loss = toys.data(), CHOICES, toys.loss
    if what == "data":
        data.tensors[0][7, 2] += 1
    elif what == "choices":
        choices = (*CHOICES[:2], dataclasses.replace(CHOICES[2], recipe=Recipe(0.2)))
    else:

        def loss(network, batch):
            return 2 * toys.loss(network, batch)

    with pytest.raises(ConfigError, match=f"{what}: changed since the search began"):
        tune(choices, data, loss=loss, score=PublicScore(_accuracy), run_dir=tmp_path / "run", resume=True, seed=9)
    # Undone, it goes on.
    assert _tune(tmp_path / "run", seed=9, resume=True).epsilon <= EPSILON


def test_a_damaged_best_run_is_not_released(tmp_path):
    _begun(tmp_path / "run")
    weights = next((tmp_path / "run" / SEARCH).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(LedgerError, match="is not what was kept"):
        _tune(tmp_path / "run", seed=9, resume=True)


def test_private_files_are_for_the_owner_alone(tmp_path):
    _begun(tmp_path / "run")
    for path in [tmp_path / "run" / SEARCH, *(tmp_path / "run" / SEARCH).iterdir()]:
        assert path.stat().st_mode & 0o077 == 0


def test_a_private_score_has_noise_and_is_charged(tmp_path):
    tuned = _tune(tmp_path / "run", score=PrivateScore(_right), seed=3)
    features, targets = toys.data().tensors
    true = float((tuned.model(features).argmax(1) == targets).float().mean())
    assert tuned.plan.search is not None
    assert tuned.plan.search.score_noise is not None
    noise = tuned.plan.search.score_noise / toys.EXAMPLES
    assert tuned.score != true
    # The best of several is pushed up; 8 standard deviations allow for it.
    assert abs(tuned.score - true) < 8 * noise
    cheaper = dataclasses.replace(tuned.plan, search=dataclasses.replace(tuned.plan.search, score_noise=None))
    assert cheaper.spent() < tuned.plan.spent()


def test_a_score_that_mixes_examples_is_refused(tmp_path):
    def relative(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])[:, 0]
        return (logits - logits.mean()).sigmoid()

    with pytest.raises(CheckFailed, match="depends on other examples"):
        _tune(tmp_path / "run", score=PrivateScore(relative))
    assert not (tmp_path / "run").exists()


def test_a_model_that_mixes_examples_is_refused(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    bad = [*CHOICES, Choice(name="norm", build=build, recipe=Recipe(0.1))]
    with pytest.raises(CheckFailed):
        tune(bad, toys.data(), loss=toys.loss, score=PublicScore(_accuracy), epsilon=3.0, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [(math.nan, 0.25, 0.5), (0.5, math.nan, 0.25), (math.nan,)])
def test_a_run_that_scores_nan_wins_only_when_there_is_no_other(tmp_path, order):
    given: list[float] = []
    untrained = iter(range(len(CHOICES)))

    def answer(_model: nn.Module) -> float:
        if next(untrained, None) is not None:
            return 1.0
        given.append(order[len(given) % len(order)])
        return given[-1]

    tuned = _tune(tmp_path / "run", score=PublicScore(answer), plan=_plan(runs=12, private_score=False), seed=9)
    assert len(given) >= 3
    assert tuned.score == max((value for value in given if not math.isnan(value)), default=-math.inf)


def test_a_seeded_search_says_that_it_is_not_private(tmp_path):
    _tune(tmp_path / "run", seed=5)
    found = verify(tmp_path / "run")
    assert not found.private
    assert found.statement.startswith("NOT PRIVATE")


def test_the_plan_of_a_search_survives_json_and_refuses_to_be_edited():
    plan = _plan()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    record = plan.to_json()
    record["noise_multiplier"] = 2 * plan.noise_multiplier
    with pytest.raises(ConfigError, match="contradicts"):
        Plan.from_json(record)
    for broken in (None, {"type": "gaussian", "noise_multiplier": 1.0, "count": 1}):
        with pytest.raises(ConfigError):
            Plan.from_json({**plan.to_json(), "search": broken})


def test_a_search_releases_once_and_costs_all_or_nothing():
    plan = _plan()
    assert plan.spent(0) == 0
    assert plan.spent(1) == plan.spent() == plan.spent_at_most(1)


def test_the_plan_of_a_search_is_no_plan_of_a_run(tmp_path):
    model = _build()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigError, match="plan is that of a search"):
        make_private(model, optimizer, toys.data(), loss=toys.loss, plan=_plan(), run_dir=tmp_path / "run")
    single = Plan.solve(examples=toys.EXAMPLES, batch_size=30, steps=STEPS, epsilon=3.0)
    with pytest.raises(ConfigError, match="of a single run"):
        _tune(tmp_path / "run", plan=single)


def test_a_search_that_may_make_no_run_is_refused(tmp_path):
    plan = _plan(private_score=False)
    never = dataclasses.replace(plan, search=Search(Repetitions(Stopping.POISSON, 4)), noise_multiplier=50.0)
    with pytest.raises(ConfigError, match="no run at all"):
        _tune(tmp_path / "run", plan=never)


def test_the_plan_and_the_score_must_agree(tmp_path):
    with pytest.raises(ConfigError, match="charges for a private one"):
        _tune(tmp_path / "run", plan=_plan(private_score=True))
    with pytest.raises(ConfigError, match="charges for a public one"):
        _tune(tmp_path / "run", score=PrivateScore(_right), plan=_plan(private_score=False))


@pytest.mark.parametrize("choices", [(), (CHOICES[0], CHOICES[0])])
def test_choices_need_names_of_their_own(choices, tmp_path):
    with pytest.raises(ConfigError, match="own name"):
        tune(choices, toys.data(), loss=toys.loss, score=PublicScore(_accuracy), epsilon=3.0, run_dir=tmp_path / "run")


def test_arguments_that_say_too_little_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="epsilon=None"):
        tune(CHOICES, toys.data(), loss=toys.loss, score=PublicScore(_accuracy), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="without run_dir"):
        tune(CHOICES, toys.data(), loss=toys.loss, score=PublicScore(_accuracy), epsilon=3.0, resume=True)


def _tempered_build() -> nn.Module:
    return Tempered(_build())


def _tempered_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return tempered_cross_entropy(model, *batch) if isinstance(model, Tempered) else toys.loss(model, batch)


def test_tempered_models_get_the_rule_that_they_need_and_are_refused_another(tmp_path):
    tempered = Choice(name="tempered", build=_tempered_build, recipe=Recipe(0.01))
    asked = {"loss": _tempered_loss, "score": PublicScore(_accuracy), "seed": 5, "batch_size": 30, "steps": 3}
    tuned = tune((tempered,), toys.data(), epsilon=EPSILON, runs=2, run_dir=tmp_path / "run", **asked)
    assert dict(tuned.plan.clipping) == tempered_clipping(toys.EXAMPLES).describe()
    assert isinstance(tuned.model, Tempered)
    for choices, options in (((tempered, CHOICES[0]), {}), ((tempered,), {"clipping": Clipping.automatic()})):
        with pytest.raises(ConfigError, match="empered"):
            tune(choices, toys.data(), epsilon=EPSILON, runs=2, run_dir=tmp_path / "other", **asked, **options)
    assert not (tmp_path / "other").exists()


def test_a_clipping_other_than_the_plans_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="clipping"):
        _tune(tmp_path / "run", clipping=Clipping.abadi(1.0))
