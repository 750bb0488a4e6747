"""Attempts to make a search cost more than its ledger says: killed, edited, swapped, shared, contradicted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from discreet.errors import ConfigError, DiscreetError, LedgerError
from discreet.privacy.verification import verify
from discreet.train import search_state
from discreet.train.contest import PublicScore
from discreet.train.run import Run
from discreet.train.run_directory import KEY, MODEL, SEARCH
from discreet.train.search_state import SearchState
from train import toys
from train.attacked import Stopped, begun_search, charges_of, planned, searched

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
                raise Stopped
            try:
                return original(*args, **named)
            finally:
                if done == call:
                    raise Stopped

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def _dies(where: Path, *, call: int, after: bool, resume: bool) -> bool:
    try:
        with _dying(call, after=after):
            searched(where, resume=resume)
    except Stopped:
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
                searched(where, resume=True)
        else:
            found = searched(where, resume=begun)
            assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
            assert (found.choice, found.score) == (undisturbed.choice, undisturbed.score)
        assert charges_of(where) == ["search"]
        assert verify(where).epsilon == undisturbed.epsilon
        assert verify(where).finished
        assert not (where / SEARCH).exists()
    assert deaths > 30


def test_a_death_in_a_resumed_search_costs_nothing_either(tmp_path, undisturbed):
    where = tmp_path / "run"
    begun_search(where)
    for call in (1, 2, 3, 4, 5):
        assert _dies(where, call=call, after=True, resume=True)
    found = searched(where, resume=True)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
    assert charges_of(where) == ["search"]


def test_two_processes_cannot_search_in_one_directory(tmp_path, undisturbed):
    refused = []

    def second() -> None:
        for resume in (True, False):
            with pytest.raises(DiscreetError) as caught:
                searched(tmp_path / "run", resume=resume)
            refused.append(str(caught.value))

    found = searched(tmp_path / "run", on_step=second)
    assert any("another process is writing it" in message for message in refused)
    assert any("holds a run already" in message for message in refused)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))


def test_copies_of_a_search_release_the_same_bits(tmp_path, undisturbed):
    """Whoever copies a run half-way and finishes both has learnt nothing twice."""
    begun_search(tmp_path / "run", runs=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        found = searched(tmp_path / name, resume=True)
        assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))


def test_a_state_of_an_earlier_moment_leads_to_the_same_end(tmp_path, undisturbed):
    begun_search(tmp_path / "run", runs=1)
    shutil.copytree(tmp_path / "run" / SEARCH, tmp_path / "earlier")
    begun_search(tmp_path / "run", runs=2, resume=True)
    shutil.rmtree(tmp_path / "run" / SEARCH)
    shutil.copytree(tmp_path / "earlier", tmp_path / "run" / SEARCH)
    assert torch.equal(toys.weights(searched(tmp_path / "run", resume=True).model), toys.weights(undisturbed.model))


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
    begun_search(tmp_path / "run")
    path = tmp_path / "run" / SEARCH / "state.json"
    sealed = json.loads(path.read_text())
    name, value = EDITS[edit]
    record = sealed["record"]
    place = record if name in record else record["best"]
    assert place[name] != value
    place[name] = value
    path.write_text(json.dumps(sealed))
    with pytest.raises(LedgerError, match="was changed, or belongs to another search"):
        searched(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"record": {}, "seal": 3}', '{"record": {"done": NaN}, "seal": ""}']
)
def test_a_state_that_is_none_is_refused(tmp_path, content):
    begun_search(tmp_path / "run")
    (tmp_path / "run" / SEARCH / "state.json").write_text(content)
    with pytest.raises(LedgerError, match=r"state\.json"):
        searched(tmp_path / "run", resume=True)


def test_what_an_earlier_search_left_is_not_taken_for_runs_of_this_one(tmp_path):
    """The best of a search with hardly any noise must not come out under the certificate of one with much."""
    level = PublicScore(lambda _model: 0.5)  # nothing beats what is there
    begun_search(tmp_path / "run", plan=planned(epsilon=1000.0, many=True), seed=None, score=level)
    kept = SearchState.load(tmp_path / "run" / SEARCH, key=_state_key(tmp_path / "run"))
    assert kept is not None
    loud = kept.tensors()
    (tmp_path / "run" / "ledger.jsonl").unlink()
    released = searched(tmp_path / "run", plan=planned(epsilon=0.5), seed=None, score=level).model.state_dict()
    assert any(not torch.equal(released[name], value) for name, value in loud.items())


def _state_key(where: Path) -> bytes:
    with Run.resume(where) as run:
        return run.key_for("state")


def test_the_state_of_another_search_is_refused(tmp_path):
    for name, epsilon in (("loud", 1000.0), ("quiet", 0.5)):
        begun_search(tmp_path / name, plan=planned(epsilon=epsilon, many=True), seed=None)
    shutil.rmtree(tmp_path / "quiet" / SEARCH)
    shutil.copytree(tmp_path / "loud" / SEARCH, tmp_path / "quiet" / SEARCH)
    with pytest.raises(LedgerError, match="belongs to another search"):
        searched(tmp_path / "quiet", resume=True, seed=None)


def test_a_released_model_whose_ledger_is_gone_is_not_certified_again(tmp_path):
    searched(tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="left of another run"):
        searched(tmp_path / "run")
    assert (tmp_path / "run" / MODEL).exists()


def test_a_full_disk_is_an_oserror_and_the_search_goes_on_afterwards(tmp_path, undisturbed, monkeypatch):
    """safetensors has an error of its own for it, which no caller would take for a full disk."""

    def full(_tensors: Any, name: Path) -> None:
        Path(name).write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(search_state, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            searched(tmp_path / "run")
    found = searched(tmp_path / "run", resume=True)
    assert torch.equal(toys.weights(found.model), toys.weights(undisturbed.model))
    assert charges_of(tmp_path / "run") == ["search"]
