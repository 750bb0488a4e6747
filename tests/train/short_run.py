"""Runs of twelve updates in test mode, any part of which a test may change."""

from __future__ import annotations

from pathlib import Path

import torch

from discreet.train.loop import Private
from discreet.train.make_private import make_private
from train import toys


def short_run(run_dir: Path, **changes: object) -> Private:
    """``changes`` replace arguments of `make_private`; ``dtype`` is that of the usual model."""
    network = changes.pop("model", None) or toys.model(changes.pop("dtype", torch.float32))
    optimizer = changes.pop("optimizer", None) or torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    given = {
        "loss": toys.loss,
        "noise_multiplier": 1.0,
        "batch_size": 20,
        "steps": 12,
        "learning_rate": None,
        "run_dir": run_dir,
        "seed": 7,
    } | changes
    dataset = given.pop("dataset", None) or toys.data()
    return make_private(network, optimizer, dataset, **given)


def run_and_optimizer(run_dir: Path, **changes: object) -> tuple[Private, torch.optim.Optimizer]:
    """With the optimizer, which a loop of the user's own steps itself; ``network`` replaces the usual model."""
    network = changes.pop("network", None) or toys.model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    return short_run(run_dir, model=network, optimizer=optimizer, **changes), optimizer
