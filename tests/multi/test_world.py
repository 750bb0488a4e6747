"""Two processes over gloo: the sum over ranks is the sum, counts included, and its sensitivity is that of one share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from discreet.core.clipping import BELOW, ClippedSum, Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.core.style import Style
from discreet.core.world import world_size, world_sum

WORKER = """
import sys, torch, torch.distributed as dist
from discreet.core.gradient import clipped_gradient, zero_sum
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.core.world import world_size, world_sum
from test_world import RULES

rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{kind}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
model[2].to(torch.float32 if kind == "mixed" else torch.float64)
x = torch.randn(9, 5, dtype=torch.float64)
loss = lambda m, b: m[2](m[1](m[0](b)).to(m[2].weight.dtype)).square().sum(1).double()
mine = x[:6] if rank == 0 else x[6:]
clipping = RULES[kind]
total = clipped_gradient(model, loss, mine, clipping=clipping)
if kind.startswith("empty") and rank == 1:
    total = zero_sum(dict(model.named_parameters()), clipping)
before = {name: value.clone() for name, value in total.tensors.items()}
summed = world_sum(total)
assert world_size() == 2
wanted = clipping.divide(dict(model.named_parameters()))
assert summed.sensitivity == total.sensitivity == wanted.sensitivity
assert dict(summed.noise_weights) == dict(total.noise_weights) == dict(wanted.noise_weights)
assert all(torch.equal(total.tensors[name], before[name]) for name in before)
released = release(summed, noise_multiplier=2.0, source=NoiseSource.keyed(bytes(range(32))))
torch.save({"summed": dict(summed.tensors), "released": dict(released.tensors)}, f"{folder}/{kind}-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""

RULES = {
    "plain": Clipping.abadi(0.3),
    "mixed": Clipping.abadi(0.3),
    "empty": Clipping.abadi(0.3),
    "weights": Clipping.abadi(0.3, style=Style.groups("0", bounds=(1, 2), noise_weights=(5, 1))),
    "quantile": Clipping.quantile(0.5, clip_bound=3.0, style=Style.groups("0", noise_weights=(5, 1))),
    "empty-quantile": Clipping.quantile(0.5, clip_bound=3.0),
}
"""The rule of each kind; the workers import it from here."""


def _run(folder: Path, kind: str) -> list[dict[str, dict[str, torch.Tensor]]]:
    here = Path(__file__).resolve().parent
    places = f"{here.parents[1] / 'src'}:{here}"
    command = [sys.executable, "-c", WORKER]
    environment = {
        "PYTHONPATH": places,
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
    }
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

    return clipped_gradient(model, loss, x[:6] if kind.startswith("empty") else x, clipping=RULES[kind])


@pytest.mark.multi
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
@pytest.mark.parametrize("kind", ["plain", "mixed", "empty", "weights", "quantile", "empty-quantile"])
def test_two_processes_give_the_sum_of_one(tmp_path, kind):
    ranks = _run(tmp_path, kind)
    wanted = _alone(kind)
    # The noise of one process, under its own weights: added once, and not once per rank.
    released = release(wanted, noise_multiplier=2.0, source=NoiseSource.keyed(bytes(range(32))))
    tolerance = 1e-6 if kind == "mixed" else 1e-12
    assert set(ranks[0]["summed"]) == set(wanted.tensors)
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(ranks[0]["summed"][name], value.double(), rtol=tolerance, atol=tolerance)
        if kind != "mixed":  # whose head is summed in float32 by one process, and so gets other draws
            torch.testing.assert_close(ranks[0]["released"][name], released.tensors[name], rtol=1e-5, atol=1e-5)
        for half in ("summed", "released"):  # the same bits on every rank
            assert torch.equal(ranks[0][half][name], ranks[1][half][name])
    assert (BELOW in wanted.tensors) == ("quantile" in kind)
    if BELOW in wanted.tensors:
        # Some of the norms are within the bound and some are not, and every rank follows to one and the same bound.
        counted = float(wanted.tensors[BELOW]) + (6 if kind.startswith("empty") else 9) / 2
        assert 0 < counted < (6 if kind.startswith("empty") else 9)
        bounds = {RULES[kind].followed(float(rank["released"][BELOW]) / 9).clip_bound for rank in ranks}
        assert len(bounds) == 1


def test_one_process_is_the_identity():
    total = ClippedSum({"w": torch.ones(3)}, sensitivity=2.0)
    assert world_size() == 1
    assert world_sum(total) is total
