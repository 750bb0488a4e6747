"""Two processes over gloo: the sum over ranks is the sum, and its sensitivity is that of one share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from discreet.core.clipping import ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.world import world_size, world_sum

WORKER = """
import sys, torch, torch.distributed as dist
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient, zero_sum
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.core.world import world_size, world_sum

rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{kind}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
model[2].to(torch.float32 if kind == "mixed" else torch.float64)
x = torch.randn(9, 5, dtype=torch.float64)
loss = lambda m, b: m[2](m[1](m[0](b)).to(m[2].weight.dtype)).square().sum(1).double()
mine = x[:6] if rank == 0 else x[6:]
clipping = Clipping.abadi(0.3)
total = clipped_gradient(model, loss, mine, clipping=clipping)
if kind == "empty" and rank == 1:
    total = zero_sum(dict(model.named_parameters()), clipping)
before = {name: value.clone() for name, value in total.tensors.items()}
summed = world_sum(total)
assert world_size() == 2
assert summed.sensitivity == total.sensitivity == 0.3
assert all(torch.equal(total.tensors[name], before[name]) for name in before)
released = release(summed, noise_multiplier=2.0, source=NoiseSource.keyed(bytes(range(32))))
torch.save({"summed": dict(summed.tensors), "released": dict(released.tensors)}, f"{folder}/{kind}-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def _run(folder: Path, kind: str) -> list[dict[str, dict[str, torch.Tensor]]]:
    source = Path(__file__).resolve().parents[2] / "src"
    command = [sys.executable, "-c", WORKER]
    environment = {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), kind], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]


def _alone(kind: str) -> ClippedSum:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    model[2].to(torch.float32 if kind == "mixed" else torch.float64)
    x = torch.randn(9, 5, dtype=torch.float64)

    def loss(m, b):
        return m[2](m[1](m[0](b)).to(m[2].weight.dtype)).square().sum(1).double()

    return clipped_gradient(model, loss, x[:6] if kind == "empty" else x, clipping=Clipping.abadi(0.3))


@pytest.mark.multi
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
@pytest.mark.parametrize("kind", ["plain", "mixed", "empty"])
def test_two_processes_give_the_sum_of_one(tmp_path, kind):
    ranks = _run(tmp_path, kind)
    wanted = _alone(kind).tensors
    tolerance = 1e-6 if kind == "mixed" else 1e-12
    for name, value in wanted.items():
        torch.testing.assert_close(ranks[0]["summed"][name], value.double(), rtol=tolerance, atol=tolerance)
        for half in ("summed", "released"):  # the same bits on every rank: noise is added once, and not once per rank
            assert torch.equal(ranks[0][half][name], ranks[1][half][name])


def test_one_process_is_the_identity():
    total = ClippedSum({"w": torch.ones(3)}, sensitivity=2.0)
    assert world_size() == 1
    assert world_sum(total) is total
