"""What a run publishes beside the weights is the same whichever examples were drawn, and how many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train import toys

KEYED = {"key_ids", "head", "model_sha256"}
"""What names the key, the ledger or the weights: digests, which differ between any two runs."""


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _published(run_dir: Path, *, seed: int, microbatch: int) -> tuple[dict[str, Any], list[int]]:
    private = toys.private_run(
        run_dir, epsilon=3.0, batch_size=6, steps=20, learning_rate=0.01, microbatch=microbatch, seed=seed
    )
    key = private._updates.run.sampling_key
    sizes = [len(private.plan.sampling.draw(key=key, step=step)) for step in range(20)]
    for step in private:
        private.run.log({"step": step.index, "learning_rate": step.learning_rate, "epsilon": step.epsilon})
    release = run_dir / "release"
    records = {path.name: json.loads(path.read_text()) for path in release.glob("*.json")}
    records["metrics"] = (release / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    records["ledger"] = [(line["kind"], sorted(line["body"])) for line in lines]
    records["files"] = sorted(path.name for path in release.iterdir())
    return records, sizes


@pytest.mark.parametrize("microbatch", [2, 100])
def test_no_published_record_depends_on_which_examples_were_drawn(tmp_path: Path, microbatch: int) -> None:
    """Two runs that differ in their key alone: every batch has another size, and everything public is equal."""
    first, sizes = _published(tmp_path / "first", seed=1, microbatch=microbatch)
    second, other = _published(tmp_path / "second", seed=2, microbatch=microbatch)
    assert sum(sizes) != sum(other)
    assert {"plan.json", "check.json", "certificate.json"} <= first.keys()
    for name in first:
        assert _without(first[name], KEYED) == _without(second[name], KEYED), name
    text = json.dumps(first)
    assert "microbatch" not in text


def test_a_number_of_examples_that_was_drawn_would_be_seen(tmp_path: Path) -> None:
    """Negative control: the records differ where one of them says how many examples there were."""
    (first, sizes), (second, other) = (_published(tmp_path / f"{seed}", seed=seed, microbatch=9) for seed in (1, 2))
    first["plan.json"]["drawn"], second["plan.json"]["drawn"] = sum(sizes), sum(other)
    assert _without(first["plan.json"], KEYED) != _without(second["plan.json"], KEYED)
