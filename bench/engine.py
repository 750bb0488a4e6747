"""What privacy costs: one private update over one ordinary update, as a ratio, measured in one run.

    python bench/engine.py [--models mlp cnn gpt] [--rounds 15] [--threads 1] [--out bench/out/engine.json]

Each contestant is a process of its own, holding the same model, batch and optimizer; the parent lets them take one
step each in turn, and takes medians. The private step includes clipping, the draw of the noise and the optimizer. Peak
memory is that of the process (resident set). Ratios travel between machines; the times beside them do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import discreet
from discreet.core.gradient import trainable, zero_sum
from discreet.train.step import write_gradient

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Step = Callable[[], None]


class TinyGPT(nn.Module):
    """A decoder with tied embeddings and learned positions; one loss per sequence."""

    def __init__(
        self, *, vocabulary: int = 2048, width: int = 128, depth: int = 2, heads: int = 4, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "mix": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.heads = nn.LayerNorm(width), heads

    def forward(self, ids_BT: Tensor) -> Tensor:
        batch, length = ids_BT.shape
        hidden = self.tokens(ids_BT) + self.places(torch.arange(length))
        for block in self.blocks:
            parts = block["mix"](block["norm1"](hidden)).reshape(batch, length, 3, self.heads, -1)
            mixed = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
            hidden = hidden + block["out"](mixed.transpose(1, 2).reshape(batch, length, -1))
            hidden = hidden + block["down"](F.gelu(block["up"](block["norm2"](hidden))))
        return self.norm(hidden) @ self.tokens.weight.t()


def classifier_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy per example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over the tokens of each sequence."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def _mlp() -> tuple[nn.Module, Batch, Loss]:
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return model, (torch.randn(256, 512), torch.randint(10, (256,))), classifier_loss


def _cnn() -> tuple[nn.Module, Batch, Loss]:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.GroupNorm(8, 128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return model, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))), classifier_loss


def _gpt() -> tuple[nn.Module, Batch, Loss]:
    ids = torch.randint(2048, (16, 65))
    return TinyGPT(), (ids[:, :-1].clone(), ids[:, 1:].clone()), sequence_loss


MODELS = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}


def ordinary(model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer) -> Step:
    """Updates without privacy and without any hook."""

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()

    return step


def private(model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer) -> Step:
    """Updates with clipping, noise and the same optimizer; the self-check comes before, once, as in training."""
    layout = discreet.check(model, loss, (batch[0][:4], batch[1][:4])).layout
    clipping, source = discreet.Clipping.automatic(), discreet.NoiseSource.system()
    parameters = trainable(model)

    def step() -> None:
        total = discreet.clipped_gradient(model, loss, batch, clipping=clipping, layout=layout)
        released = discreet.release(total, noise_multiplier=1.0, source=source)
        write_gradient(released, parameters, batch_size=len(batch[0]))
        optimizer.step()

    return step


def noise(model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer) -> Step:
    """The draw and addition of the noise alone: the part of a private update that no clipping can save."""
    total = zero_sum(trainable(model), discreet.Clipping.automatic())
    source = discreet.NoiseSource.system()

    def step() -> None:
        discreet.release(total, noise_multiplier=1.0, source=source)

    return step


CONTESTANTS = {"ordinary": ordinary, "private": private, "noise": noise}


def _contestant(pipe: Connection, *, model_name: str, kind: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, batch, loss = MODELS[model_name]()
    step = CONTESTANTS[kind](model, batch, loss, torch.optim.Adam(model.parameters(), lr=1e-4))
    while pipe.recv():
        started = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - started)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(model_name: str, *, rounds: int, threads: int) -> dict[str, float]:
    """Medians of all contestants, step by step in turn, after three rounds of warming up."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for kind in CONTESTANTS:
        pipes[kind], theirs = context.Pipe()
        options = {"model_name": model_name, "kind": kind, "threads": threads}
        processes.append(context.Process(target=_contestant, args=(theirs,), kwargs=options))
        processes[-1].start()
    seconds: dict[str, list[float]] = {kind: [] for kind in CONTESTANTS}
    for _ in range(rounds + 3):
        for kind, pipe in pipes.items():
            pipe.send(True)
            seconds[kind].append(pipe.recv())
    memory = {}
    for kind, pipe in pipes.items():
        pipe.send(False)
        memory[kind] = pipe.recv()
    for process in processes:
        process.join()
    middle = {kind: statistics.median(times[3:]) for kind, times in seconds.items()}
    return {
        "ordinary_ms": 1e3 * middle["ordinary"],
        "private_ms": 1e3 * middle["private"],
        "time_ratio": middle["private"] / middle["ordinary"],
        "memory_ratio": memory["private"] / memory["ordinary"],
        "noise_ms": 1e3 * middle["noise"],
        "noise_share_of_surplus": middle["noise"] / (middle["private"] - middle["ordinary"]),
    }


def main() -> None:
    """Measure, write JSON, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/out/engine.json"))
    options = parser.parse_args()
    results = {name: measure(name, rounds=options.rounds, threads=options.threads) for name in options.models}
    record = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads, "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    header = f"{'model':8} {'ordinary ms':>12} {'private ms':>12} {'time':>7} {'memory':>7}"
    print(f"{header} {'noise ms':>9} {'of surplus':>11}")
    for name, row in results.items():
        figures = f"{row['ordinary_ms']:12.2f} {row['private_ms']:12.2f}"
        noise_figures = f"{row['noise_ms']:9.2f} {row['noise_share_of_surplus']:11.0%}"
        print(f"{name:8} {figures} {row['time_ratio']:6.2f}x {row['memory_ratio']:6.2f}x {noise_figures}")


if __name__ == "__main__":
    main()
