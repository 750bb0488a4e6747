from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from discreet.errors import ConfigError
from discreet.privacy.accounting import Gaussian
from discreet.privacy.plan import Plan
from discreet.privacy.verification import verify
from discreet.train import run as run_module
from discreet.train import run_directory
from discreet.train.horizon import updates_allowed
from discreet.train.run import Run, Stage
from train import toys


def _plan(**changes: object) -> Plan:
    return Plan.solve(**({"examples": 100, "batch_size": 10, "steps": 20, "epsilon": 3.0} | changes))


def _draws(run: Run, purpose: str = "gradient") -> torch.Tensor:
    return run.noise(purpose).normal(8, position=0, name="w")


def test_keys_are_secret_and_fresh(tmp_path: Path) -> None:
    first, second = Run.create(tmp_path / "a", plan=_plan()), Run.create(tmp_path / "b", plan=_plan())
    assert first.private
    assert not torch.equal(_draws(first), _draws(second))
    assert first.sampling_key != second.sampling_key
    key = (tmp_path / "a" / "private" / "key").read_bytes()
    for path in [*(tmp_path / "a" / "release").iterdir(), tmp_path / "a" / "ledger.jsonl"]:
        assert key not in path.read_bytes()
        assert key.hex() not in path.read_text()


def test_streams_of_one_key_differ_and_repeat(tmp_path: Path) -> None:
    with Run.create(tmp_path, plan=_plan()) as run:
        kept = {purpose: _draws(run, purpose) for purpose in ("gradient", "preprocessing")}
        seeds = [run.torch_seed(step) for step in range(50)]
    assert not torch.equal(kept["gradient"], kept["preprocessing"])
    assert len(set(seeds)) == 50
    with Run.resume(tmp_path) as again:
        assert all(torch.equal(_draws(again, purpose), draws) for purpose, draws in kept.items())
        assert [again.torch_seed(step) for step in range(50)] == seeds


def test_a_seed_is_never_private(tmp_path: Path) -> None:
    with Run.create(tmp_path, plan=_plan(), seed=1) as run:
        assert not run.private
        assert not run.noise("gradient").private
    with pytest.raises(ConfigError, match="seed=None"):
        Run.resume(tmp_path)
    with pytest.raises(ConfigError, match="seed=2"):
        Run.resume(tmp_path, seed=2)
    Run.resume(tmp_path, seed=1).close()


def test_an_equal_environment_keeps_the_key_and_another_does_not(tmp_path: Path) -> None:
    with Run.create(tmp_path, plan=_plan()) as run:
        run.adopt({"data": "a"}, stage=Stage.TRAINING)
        before = _draws(run)
    with Run.resume(tmp_path) as run:
        run.adopt({"data": "a"}, stage=Stage.TRAINING)
        assert torch.equal(_draws(run), before)
        run.ledger.reserve_steps(first=0, count=8)
        assert updates_allowed(run.ledger, done=5) == 20
        run.adopt({"data": "b"}, stage=Stage.TRAINING)
        assert not torch.equal(_draws(run), before)
        assert updates_allowed(run.ledger, done=5) == 20 - (8 - 5)
    with Run.resume(tmp_path) as run:
        assert updates_allowed(run.ledger, done=5) == 17


def test_preprocessing_is_charged_again_under_a_new_key(tmp_path: Path) -> None:
    query = Gaussian(noise_multiplier=30.0)
    with Run.create(tmp_path, plan=_plan(before=(query,))) as run:
        run.adopt({"data": "a"}, stage=Stage.DATA)
        run.reserve_query("counts", query)
        run.reserve_query("counts", query)
        assert run.ledger.queries().count(query) == 1
        run.adopt({"data": "b"}, stage=Stage.DATA)
        run.reserve_query("counts", query)
        assert sum(item.count for item in run.ledger.queries() if isinstance(item, Gaussian)) == 2


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    with Run.create(tmp_path, plan=_plan()) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "epsilon": 0.1 * step})
        with (run.release_dir / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 4, "eps')
        run.rewind_log(2)
        lines = (run.release_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_lost_key_is_told_from_an_ended_run(tmp_path: Path) -> None:
    Run.create(tmp_path, plan=_plan()).close()
    (tmp_path / "private" / "key").unlink()
    with pytest.raises(ConfigError, match="key is missing"):
        Run.resume(tmp_path)


def test_the_end_destroys_the_key(tmp_path: Path) -> None:
    run = Run.create(tmp_path, plan=_plan())
    run.finish(toys.model())
    assert not (tmp_path / "private" / "key").exists()
    with pytest.raises(ConfigError, match="has ended"):
        Run.resume(tmp_path)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Run.create(tmp_path / "file" / "run", plan=_plan())


def test_an_end_interrupted_while_the_key_is_overwritten(tmp_path: Path) -> None:
    run = Run.create(tmp_path, plan=_plan())
    run.finish(toys.model())
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "release" / "certificate.json").unlink()
    (tmp_path / "private" / "key").write_bytes(bytes(32))
    with pytest.raises(ConfigError, match="has ended"):
        Run.resume(tmp_path)
    assert not (tmp_path / "private" / "key").exists()
    assert verify(tmp_path).finished


def test_the_end_leaves_no_secret_and_a_readable_model(tmp_path: Path) -> None:
    run = Run.create(tmp_path, plan=_plan())
    run.adopt({"data": "a"}, stage=Stage.TRAINING)
    run.sums().restart()
    run.finish(toys.model())
    assert list((tmp_path / "private").iterdir()) == []
    assert (tmp_path / "release" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_change_of_training_keeps_the_private_statistics(tmp_path: Path) -> None:
    """Otherwise every later resume would draw and charge them again, and encode the data anew."""
    query = Gaussian(noise_multiplier=30.0)
    with Run.create(tmp_path, plan=_plan(before=(query,))) as run:
        run.adopt({"data": "a"}, stage=Stage.DATA)
        run.reserve_query("counts", query)
        drawn = _draws(run, "preprocessing")
        run.adopt({"rate": "1"}, stage=Stage.TRAINING)
        gradient = _draws(run)
    for rate in ("2", "2", "3"):
        with Run.resume(tmp_path) as run:
            run.adopt({"data": "a"}, stage=Stage.DATA)
            run.reserve_query("counts", query)
            assert torch.equal(_draws(run, "preprocessing"), drawn)
            run.adopt({"rate": rate}, stage=Stage.TRAINING)
            assert not torch.equal(_draws(run), gradient)
            assert run.ledger.queries().count(query) == 1
    assert len(run.ledger.key_ids) == 3
    with Run.resume(tmp_path) as run:
        run.adopt({"data": "b"}, stage=Stage.DATA)
        run.reserve_query("counts", query)
        assert not torch.equal(_draws(run, "preprocessing"), drawn)
        assert sum(item.count for item in run.ledger.queries() if isinstance(item, Gaussian)) == 2


@pytest.mark.parametrize("left", ["metrics.jsonl", "schema.json", "temperature.json", "certificate.json"])
def test_what_another_run_released_is_not_taken_over(tmp_path: Path, left: str) -> None:
    """Its ledger was deleted to start anew: the new one charges nothing of what lies there."""
    Run.create(tmp_path, plan=_plan()).close()
    (tmp_path / "release" / left).write_text("{}")
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match=f"{left}: is left of another run"):
        Run.create(tmp_path, plan=_plan())


def test_a_start_that_was_broken_off_is_made_again(tmp_path: Path) -> None:
    Run.create(tmp_path, plan=_plan()).close()
    (tmp_path / "ledger.jsonl").unlink()
    (tmp_path / "private" / "checkpoint" / "step-00000050").mkdir(parents=True)
    with Run.create(tmp_path, plan=_plan(steps=30)) as run:
        run.finish(None)
    assert verify(tmp_path).finished
    assert not (tmp_path / "private" / "checkpoint").exists()


def test_of_two_that_start_in_one_directory_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would put its own key and plan in the place of the first one's, which could then not be certified."""
    original = run_module.replace_secret

    def meanwhile(path: Path, content: bytes) -> None:
        with pytest.raises(ConfigError, match="another process is starting a run here"):
            Run.create(tmp_path, plan=_plan(epsilon=8.0))
        original(path, content)

    monkeypatch.setattr(run_module, "replace_secret", meanwhile)
    with Run.create(tmp_path, plan=_plan()) as run:
        run.finish(None)
    assert verify(tmp_path).target_epsilon == 3.0


def test_a_private_half_made_by_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o755)
    Run.create(tmp_path, plan=_plan()).close()
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0


def test_a_full_disk_at_the_end_keeps_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    run = Run.create(tmp_path, plan=_plan())
    monkeypatch.setattr(run_directory, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        run.finish(toys.model())
    run.close()
    Run.resume(tmp_path).close()
