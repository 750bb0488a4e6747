"""Attempts to make a search cost more than its ledger says: killed, edited, swapped, shared, contradicted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from discreet.core.clipping import Clipping
from discreet.errors import BudgetExceeded, CheckFailed, ConfigError, DiscreetError, LedgerError
from discreet.privacy.certificate import verify
from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from discreet.privacy.repetitions import Stopping
from discreet.privacy.tuning import plan_search
from discreet.train import search_state
from discreet.train.contest import Choice, PrivateScore, PublicScore
from discreet.train.run import KEY, MODEL, SEARCH, Run
from discreet.train.search_state import SearchState
from discreet.train.trial import Recipe
from discreet.train.tune import Tuned, tune
from train import toys

STEPS = 2
SEED = 9


def _accuracy(model: nn.Module) -> float:
    features, targets = toys.data(examples=200).tensors
    return float((model(features).argmax(1) == targets).float().mean())


def _right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


CHOICES = tuple(Choice(name=f"rate {rate}", build=_build, recipe=Recipe(rate)) for rate in (0.01, 0.1))


def _plan(*, epsilon: float = 3.0, private_score: bool = False, many: bool = False) -> Plan:
    """Seed 9 makes at least three runs of it. ``many``: so does every seed, but for one in 300."""
    return plan_search(
        examples=toys.EXAMPLES,
        epsilon=epsilon,
        runs=1000 if many else 6,
        stopping=Stopping.GEOMETRIC if many else Stopping.LOGARITHMIC,
        private_score=private_score,
        batch_size=30,
        steps=STEPS,
    )


def _tune(where: Path, **changes: Any) -> Tuned:
    usual = {"choices": CHOICES, "loss": toys.loss, "score": PublicScore(_accuracy), "seed": SEED}
    if not changes.get("resume") and "epsilon" not in changes:
        usual["plan"] = _plan(private_score=isinstance(changes.get("score"), PrivateScore))
    named = {**usual, **changes}
    return tune(named.pop("choices"), toys.data(), run_dir=where, **named)


class _Killed(Exception):
    """Stands for the death of the process."""


def _begun(where: Path, *, runs: int = 1, **changes: Any) -> None:
    """A search that died in the run after so many whole ones."""
    left = [runs * STEPS]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _Killed

    with pytest.raises(_Killed):
        _tune(where, on_step=step, **changes)


def _charges(where: Path) -> list[str]:
    return [record.body["name"] for record in Ledger.read(where / "ledger.jsonl").records if record.kind == "query"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return _tune(tmp_path_factory.mktemp("undisturbed") / "run")


# Killed


@contextmanager
def _dying(call: int, *, after: bool) -> Iterator[None]:
    """Die before or after the given call of anything that makes a change durable, or takes something away."""
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == call and not after:
                raise _Killed
            try:
                return original(*args, **named)
            finally:
                if done == call:
                    raise _Killed

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def _dies(where: Path, *, call: int, after: bool, resume: bool) -> bool:
    try:
        with _dying(call, after=after):
            _tune(where, resume=resume)
    except _Killed:
        return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_a_death_at_any_write_costs_one_search_and_changes_nothing(tmp_path, undisturbed, after):
    """Before and after every fsync, rename and removal, from the first byte of the run to its certificate."""
    deaths = 0
    while _dies(tmp_path / str(deaths), call=deaths + 1, after=after, resume=False):
        where = tmp_path / str(deaths)
        deaths += 1
        begun = (where / "ledger.jsonl").exists()
        if begun and not any((where / KEY).read_bytes() if (where / KEY).exists() else b""):
            with pytest.raises(ConfigError, match="has ended"):
                _tune(where, resume=True)
        else:
            found = _tune(where, resume=begun)
            assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
            assert (found.choice, found.score) == (undisturbed.choice, undisturbed.score)
        assert _charges(where) == ["search"]
        assert verify(where).epsilon == undisturbed.epsilon
        assert verify(where).finished
        assert not (where / SEARCH).exists()
    assert deaths > 30


def test_a_death_in_a_resumed_search_costs_nothing_either(tmp_path, undisturbed):
    where = tmp_path / "run"
    _begun(where)
    for call in (1, 2, 3, 4, 5):
        assert _dies(where, call=call, after=True, resume=True)
    found = _tune(where, resume=True)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
    assert _charges(where) == ["search"]


def test_two_processes_cannot_search_in_one_directory(tmp_path, undisturbed):
    refused = []

    def second() -> None:
        for resume in (True, False):
            with pytest.raises(DiscreetError) as caught:
                _tune(tmp_path / "run", resume=resume)
            refused.append(str(caught.value))

    found = _tune(tmp_path / "run", on_step=second)
    assert any("another process is writing it" in message for message in refused)
    assert any("holds a run already" in message for message in refused)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))


def test_copies_of_a_search_release_the_same_bits(tmp_path, undisturbed):
    """Whoever copies a run half-way and finishes both has learnt nothing twice."""
    _begun(tmp_path / "run", runs=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        found = _tune(tmp_path / name, resume=True)
        assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))


def test_a_state_of_an_earlier_moment_leads_to_the_same_end(tmp_path, undisturbed):
    _begun(tmp_path / "run", runs=1)
    shutil.copytree(tmp_path / "run" / SEARCH, tmp_path / "earlier")
    _begun(tmp_path / "run", runs=2, resume=True)
    shutil.rmtree(tmp_path / "run" / SEARCH)
    shutil.copytree(tmp_path / "earlier", tmp_path / "run" / SEARCH)
    assert torch.equal(toys.weights(_tune(tmp_path / "run", resume=True).model), toys.weights(undisturbed.model))


# Edited


EDITS = {
    "fewer runs left": ("done", 4),
    "all runs again": ("done", 0),
    "a run before the first": ("done", -3),
    "a better score": ("score", (0.99).hex()),
    "a worse score": ("score", (0.01).hex()),
    "a score that beats all": ("score", "inf"),
    "a score that nothing beats": ("score", "nan"),
    "another choice": ("choice", 7),
    "another run": ("run", 3),
    "no best": ("best", None),
    "other data": ("environment", {"data": "0" * 64}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_refused(tmp_path, edit):
    _begun(tmp_path / "run")
    path = tmp_path / "run" / SEARCH / "state.json"
    sealed = json.loads(path.read_text())
    name, value = EDITS[edit]
    record = sealed["record"]
    place = record if name in record else record["best"]
    assert place[name] != value
    place[name] = value
    path.write_text(json.dumps(sealed))
    with pytest.raises(LedgerError, match="was changed, or belongs to another search"):
        _tune(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"record": {}, "seal": 3}', '{"record": {"done": NaN}, "seal": ""}']
)
def test_a_state_that_is_none_is_refused(tmp_path, content):
    _begun(tmp_path / "run")
    (tmp_path / "run" / SEARCH / "state.json").write_text(content)
    with pytest.raises(LedgerError, match=r"state\.json"):
        _tune(tmp_path / "run", resume=True)


def test_what_an_earlier_search_left_is_not_taken_for_runs_of_this_one(tmp_path):
    """The best of a search with hardly any noise must not come out under the certificate of one with much."""
    level = PublicScore(lambda _model: 0.5)  # nothing beats what is there
    _begun(tmp_path / "run", plan=_plan(epsilon=1000.0, many=True), seed=None, score=level)
    kept = SearchState.load(tmp_path / "run" / SEARCH, key=_state_key(tmp_path / "run"))
    assert kept is not None
    loud = kept.tensors()
    (tmp_path / "run" / "ledger.jsonl").unlink()
    released = _tune(tmp_path / "run", plan=_plan(epsilon=0.5), seed=None, score=level).model.state_dict()
    assert any(not torch.equal(released[name], value) for name, value in loud.items())


def _state_key(where: Path) -> bytes:
    with Run.resume(where) as run:
        return run.key_for("state")


def test_the_state_of_another_search_is_refused(tmp_path):
    for name, epsilon in (("loud", 1000.0), ("quiet", 0.5)):
        _begun(tmp_path / name, plan=_plan(epsilon=epsilon, many=True), seed=None)
    shutil.rmtree(tmp_path / "quiet" / SEARCH)
    shutil.copytree(tmp_path / "loud" / SEARCH, tmp_path / "quiet" / SEARCH)
    with pytest.raises(LedgerError, match="belongs to another search"):
        _tune(tmp_path / "quiet", resume=True, seed=None)


def test_a_released_model_whose_ledger_is_gone_is_not_certified_again(tmp_path):
    _tune(tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="left of another run"):
        _tune(tmp_path / "run")
    assert (tmp_path / "run" / MODEL).exists()


# Changed


@pytest.mark.parametrize(
    "score",
    [
        PublicScore(lambda model: -_accuracy(model)),
        PublicScore(_accuracy, data="another file"),
    ],
)
def test_a_search_does_not_go_on_under_another_score(tmp_path, score):
    _begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="score: changed since the search began"):
        _tune(tmp_path / "run", score=score, resume=True)


def test_a_search_does_not_go_on_under_another_private_score(tmp_path):
    _begun(tmp_path / "run", score=PrivateScore(_right))

    def first_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).argmax(1) == 0).float()

    with pytest.raises(ConfigError, match="score: changed since the search began"):
        _tune(tmp_path / "run", score=PrivateScore(first_class), resume=True)


def test_a_search_does_not_go_on_from_other_starting_weights(tmp_path):
    """The same architecture, of which the model's description shows nothing."""

    def warm() -> nn.Module:
        model = _build()
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        return model

    _begun(tmp_path / "run")
    choices = (CHOICES[0], dataclasses.replace(CHOICES[1], build=warm))
    with pytest.raises(ConfigError, match="choices: changed since the search began"):
        _tune(tmp_path / "run", choices=choices, resume=True)


CONTRADICTIONS = {
    "epsilon": {"epsilon": 30.0},
    "delta": {"delta": 1e-3},
    "runs": {"runs": 100},
    "stopping": {"stopping": Stopping.GEOMETRIC},
    "batch_size": {"batch_size": 60},
    "steps": {"steps": 1},
    "clipping": {"clipping": Clipping.abadi(3.0)},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_resumed_search_is_not_told_other_numbers(tmp_path, name):
    _begun(tmp_path / "run")
    with pytest.raises(ConfigError, match=name):
        _tune(tmp_path / "run", resume=True, **CONTRADICTIONS[name])
    plan = _plan()
    assert plan.search is not None
    same = {"epsilon": 3.0, "delta": plan.delta, "runs": 6, "batch_size": 30, "steps": STEPS, "plan": plan}
    assert _tune(tmp_path / "run", resume=True, stopping=Stopping.LOGARITHMIC, **same).epsilon <= 3.0


@pytest.mark.parametrize("name", [name for name in CONTRADICTIONS if name != "clipping"])
def test_a_plan_and_its_numbers_are_not_given_both(tmp_path, name):
    with pytest.raises(ConfigError, match="with a plan"):
        _tune(tmp_path / "run", plan=_plan(), **CONTRADICTIONS[name])
    assert not (tmp_path / "run").exists()


def test_another_seed_is_another_search(tmp_path):
    _begun(tmp_path / "run")
    for seed in (SEED + 1, None):
        with pytest.raises(ConfigError, match="not what the run"):
            _tune(tmp_path / "run", resume=True, seed=seed)


def test_an_edited_plan_does_not_stretch_the_budget(tmp_path):
    """The ledger holds the plan; the file beside it is a copy, and verify compares the two."""
    _begun(tmp_path / "run")
    path = tmp_path / "run" / "release" / "plan.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "epsilon": 300.0}))
    with pytest.raises(LedgerError, match=r"plan\.json: field 'epsilon' differs"):
        verify(tmp_path / "run")
    assert _resumed_epsilon(tmp_path / "run") == 3.0


def _resumed_epsilon(where: Path) -> float:
    with Run.resume(where, seed=SEED) as run:
        with pytest.raises(BudgetExceeded):
            run.ledger.reserve_query("another search", run.plan.queries()[-1])
        return run.plan.epsilon


# Shared, failing, infinite


_ONE_MODEL = _build()


@pytest.mark.parametrize(
    "builds",
    [
        (lambda: _ONE_MODEL, _build),
        (_build, lambda: nn.Sequential(*_ONE_MODEL), lambda: nn.Sequential(*_ONE_MODEL)),
    ],
)
def test_runs_do_not_share_a_model(tmp_path, builds):
    """Each run would train what the one before has trained: many times the steps that are charged."""
    choices = [Choice(name=str(index), build=build, recipe=Recipe(0.1)) for index, build in enumerate(builds)]
    with pytest.raises(ConfigError, match="shares trainable weights"):
        _tune(tmp_path / "run", choices=choices)
    assert not (tmp_path / "run").exists()


def test_a_frozen_part_may_be_shared(tmp_path):
    backbone = nn.Linear(6, 4)
    backbone.requires_grad_(False)
    choices = [
        Choice(name=str(rate), build=lambda: nn.Sequential(backbone, nn.Linear(4, 2)), recipe=Recipe(rate))
        for rate in (0.01, 0.1)
    ]
    before = backbone.weight.clone()
    _tune(tmp_path / "run", choices=choices)
    assert torch.equal(backbone.weight, before)


def test_weights_that_no_seed_decides_are_refused(tmp_path):
    generator = torch.Generator()

    def build() -> nn.Module:
        model = _build()
        nn.init.normal_(model[0].weight, generator=generator)
        return model

    with pytest.raises(ConfigError, match="different weights"):
        _tune(tmp_path / "run", choices=[Choice(name="loose", build=build, recipe=Recipe(0.1))])
    assert not (tmp_path / "run").exists()


class _Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights_are_kept_and_released(tmp_path):
    found = _tune(tmp_path / "run", choices=[Choice(name="tied", build=_Tied, recipe=Recipe(0.1))])
    assert torch.equal(found.model.first.weight, found.model.second.weight)
    assert verify(tmp_path / "run").finished


@pytest.mark.parametrize(
    ("answer", "error"),
    [(lambda _: "good", ConfigError), (lambda _: None, ConfigError), (lambda _: torch.ones(3), ConfigError)],
)
def test_a_score_that_is_no_number_costs_nothing(tmp_path, answer, error):
    with pytest.raises(error, match="is no number"):
        _tune(tmp_path / "run", score=PublicScore(answer))
    assert not (tmp_path / "run").exists()


def test_a_score_that_fails_costs_nothing(tmp_path):
    def fails(_model: nn.Module) -> float:
        raise FileNotFoundError("the public rows")

    with pytest.raises(FileNotFoundError):
        _tune(tmp_path / "run", score=PublicScore(fails))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_score_survives_a_crash_and_the_report(tmp_path, value):
    """The first run wins by it, or loses to every other, before and after the crash alike."""
    scores = iter([0.0] * len(CHOICES) + [value] + [0.5] * 100)
    score = PublicScore(lambda _model: next(scores))
    _begun(tmp_path / "run", score=score)
    scores = iter([0.0] * len(CHOICES) + [0.5] * 100)
    found = _tune(tmp_path / "run", score=score, resume=True)
    assert found.score == (math.inf if value == math.inf else 0.5)
    record = json.loads((tmp_path / "run" / "release" / "tuning.json").read_text())
    assert record["score"] == (None if value == math.inf else 0.5)


def test_a_run_that_raises_stays_charged_and_raises_again(tmp_path):
    """Nothing is skipped: a run left out would be a choice that the guarantee does not know."""
    answers = [0]

    def fails(_model: nn.Module) -> float:
        answers[0] += 1
        if answers[0] > len(CHOICES) + 1:
            raise MemoryError
        return 0.5

    for resume in (False, True, True):
        answers[0] = 1 if resume else 0
        with pytest.raises(MemoryError):
            _tune(tmp_path / "run", score=PublicScore(fails), resume=resume)
        assert _charges(tmp_path / "run") == ["search"]
    assert not (tmp_path / "run" / MODEL).exists()


class _Remembers(nn.Module):
    """Keeps the mean of what it has seen in a buffer, which is saved with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _build()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.copy_(x.mean(0))
        return self.inner(x)


def test_a_model_that_remembers_its_inputs_is_not_released(tmp_path):
    with pytest.raises(CheckFailed):
        _tune(tmp_path / "run", choices=[Choice(name="remembers", build=_Remembers, recipe=Recipe(0.1))])


def test_a_full_disk_is_an_oserror_and_the_search_goes_on_afterwards(tmp_path, undisturbed, monkeypatch):
    """safetensors has an error of its own for it, which no caller would take for a full disk."""

    def full(_tensors: Any, name: Path) -> None:
        Path(name).write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(search_state, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            _tune(tmp_path / "run")
    found = _tune(tmp_path / "run", resume=True)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
    assert _charges(tmp_path / "run") == ["search"]
