"""The benchmark of the engine runs, and writes what it says. Its figures are not looked at: they are the machine's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from bench.engine.__main__ import main, row, table
from bench.engine.arena import Figures, Refusal, Setting, baseline_first, measure
from bench.engine.contestants import BASELINE, BASELINE_OF, CONTESTANTS
from bench.engine.stopwatch import MemoryMeter
from bench.engine.workloads import Sizes

TINY = Setting(sizes=Sizes.TINY, device="cpu", dtype=torch.float32, threads=1, rounds=1)


def test_the_record_holds_every_contestant_of_every_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1048576")
    out = tmp_path / "deep" / "engine.json"
    command = f"--sizes tiny --models mlp --contestants private --rounds 1 --threads 1 --out {out}"
    main(command.split())
    record = json.loads(out.read_text())
    assert record["sizes"] == "tiny"
    assert record["rounds"] == record["threads"] == 1
    assert record["heap"] == {"MALLOC_TRIM_THRESHOLD_": "1048576"}
    assert list(record["results"]) == ["mlp"]
    rows = record["results"]["mlp"]
    assert list(rows) == ["ordinary", "private"]
    for figures in rows.values():
        ratios = {"time_ratio", "time_ratio_quartiles", "memory_ratio", "tensors_ratio"}
        assert set(figures) == {"milliseconds", "memory_mib", "tensors_mib", "phases", "turns", *ratios}
        assert len(figures["turns"]) == 1
        assert all(took > 0 for took in figures["phases"].values())
    assert list(rows["private"]["phases"]) == ["clipped gradient", "release", "write", "optimizer"]
    assert rows["ordinary"]["time_ratio"] == rows["ordinary"]["memory_ratio"] == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:]] == [["mlp", kind] for kind in rows]


def test_a_contestant_that_cannot_run_says_why_and_the_others_go_on():
    outcomes = measure("mlp", contestants=["ordinary", "nobody"], setting=TINY)
    assert isinstance(outcomes["ordinary"], Figures)
    assert outcomes["nobody"] == Refusal("KeyError: 'nobody'")


def test_a_refusal_is_a_line_of_the_table():
    figures = Figures(milliseconds=2.0, memory_mib=3.0, tensors_mib=1.0, phases={"forward": 2.0}, turns=(2.0,))
    rows = {kind: row(outcome, baseline=figures) for kind, outcome in {"a": figures, "b": Refusal("why")}.items()}
    assert rows["b"] == {"refused": "why"}
    lines = table({"model": rows}).splitlines()
    assert "1.00x" in lines[1]
    assert lines[2].endswith("refused: why")


def test_without_a_baseline_there_are_no_ratios():
    figures = Figures(milliseconds=2.0, memory_mib=3.0, tensors_mib=1.0, phases={"forward": 2.0}, turns=(2.0,))
    alone = row(figures, baseline=Refusal("why"))
    assert "time_ratio" not in alone
    assert "x " not in table({"model": {"a": alone}}).splitlines()[1]


def test_ratios_are_taken_turn_by_turn():
    """A machine that is half as fast for a while is so for everyone."""
    rest = {"memory_mib": 3.0, "tensors_mib": 1.0, "phases": {"forward": 2.0}}
    baseline = Figures(milliseconds=2.0, turns=(1.0, 1.0, 2.0, 4.0, 4.0), **rest)
    slower = Figures(milliseconds=2.0, turns=(1.5, 1.4, 3.0, 6.0, 8.0), **rest)
    found = row(slower, baseline=baseline)
    assert found["time_ratio"] == 1.5
    assert found["time_ratio_quartiles"] == [1.5, 1.5]
    assert "1.50x  1.50 to 1.50" in table({"model": {"a": found}})


def test_the_floor_is_an_ordinary_update_with_noise_and_norms():
    outcomes = measure("mlp", contestants=["ordinary", "floor"], setting=TINY)
    assert isinstance(outcomes["floor"], Figures), outcomes
    assert list(outcomes["floor"].phases) == ["norms", "forward and backward", "release", "optimizer"]


@pytest.mark.parametrize("together", [1, 2, 3, 9])
def test_every_group_has_the_baseline_and_no_contestant_is_lost(together):
    groups = baseline_first(list(CONTESTANTS), together=together)
    assert all(group[0] == BASELINE and len(group) <= max(2, together) + 1 for group in groups)
    assert all(BASELINE_OF.get(kind, BASELINE) in group for group in groups for kind in group)
    assert {kind for group in groups for kind in group} == set(CONTESTANTS)


def test_only_known_models_are_measured(capsys):
    with pytest.raises(SystemExit):
        main(["--sizes", "tiny", "--models", "nothing"])
    assert "sizes tiny has mlp" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mlp", "vit", "lstm", "gpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_workload_has_one_loss_per_example(name, dtype):
    work = Sizes.TINY.workloads[name]().to(device=torch.device("cpu"), dtype=dtype)
    losses = work.loss(work.model, work.batch)
    assert losses.shape == (len(work.batch[0]),)
    assert losses.dtype is dtype


@pytest.mark.parametrize("name", ["cnn", "resnet18gn", "wrn16-4gn", "vit", "gpt"])
def test_a_named_model_has_the_parameters_that_its_name_promises(name):
    counts = {"cnn": 26_010, "resnet18gn": 11_173_962, "wrn16-4gn": 2_750_000, "vit": 2_690_000, "gpt": 20_870_000}
    found = sum(parameter.numel() for parameter in Sizes.SMALL.workloads[name]().model.parameters())
    assert found == pytest.approx(counts[name], rel=0.01)


def test_every_model_of_the_real_sizes_can_be_built_without_memory():
    with torch.device("meta"):
        for name in ("vit-l16", "resnet50gn"):
            work = Sizes.REAL.workloads[name]()
            size = {"vit-l16": 303_000_000, "resnet50gn": 25_557_032}[name]
            assert sum(parameter.numel() for parameter in work.model.parameters()) == pytest.approx(size, rel=0.01)


BUILD = """
import json, torch
from bench.engine.workloads import Sizes
with torch.device("meta"):
    built = {name: make() for name, make in Sizes.REAL.workloads.items()}
models = {name: list(work.model.parameters()) for name, work in built.items()}
assert all(parameter.is_meta for parameters in models.values() for parameter in parameters)
print(json.dumps({name: sum(parameter.numel() for parameter in parameters) for name, parameters in models.items()}))
"""
"""In a process of its own, as a contestant is: importing transformers there hides torchvision from all that follows."""


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_real_workloads_have_the_sizes_of_their_names(repository):
    """Built without memory, on the meta device: what an accelerator would be given."""
    environment = os.environ | {"PYTHONPATH": f"{repository / 'src'}:{repository}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert run.returncode == 0, run.stderr
    found = {name: count / 1e6 for name, count in json.loads(run.stdout).items()}
    assert list(found) == list(Sizes.REAL.workloads)
    known = {"gpt2-small-128": 124, "gpt2-medium-1024": 355, "roberta-large": 355, "vit-l16": 303, "llama-1b": 1236}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=0.01)


def test_the_memory_of_tensors_is_what_they_hold_and_no_more():
    held = torch.zeros(1 << 20)  # 4 MiB

    def step():
        first = torch.zeros(2 << 20)
        del first
        second, third = torch.zeros(1 << 20), torch.zeros(1 << 20)
        held.add_(second).add_(third)
        step.kept = torch.zeros(1 << 19)  # replaces the one of the last step

    meter = MemoryMeter(torch.device("cpu"), tensors_mib=4.0)
    before = meter.tensors_mib(lambda: None)
    assert meter.tensors_mib(step) - before == pytest.approx(8 + 2 + 2, abs=0.1)


@pytest.mark.slow
def test_a_compiled_contestant_has_figures_too():
    """Its process holds tensors without memory, which the compiler traced with."""
    outcomes = measure("mlp", contestants=["ordinary", "ordinary_compiled", "private_compiled"], setting=TINY)
    assert all(isinstance(outcome, Figures) and outcome.tensors_mib > 0 for outcome in outcomes.values()), outcomes
