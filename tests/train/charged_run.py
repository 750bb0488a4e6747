"""A run of forty updates that a ledger charges, with a checkpoint after each ten; a test may change any part of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from discreet.train.loop import Private
from discreet.train.make_private import make_private
from train import toys

STEPS, EVERY = 40, 10


def charged_run(run_dir: Path, *, resume: bool = False, **changes: object) -> Private:
    """``changes`` replace arguments of `make_private`; ``optimizer`` is what makes one."""
    network = changes.pop("model", None) or toys.model(dropout=0.3)
    optimizer = changes.pop("optimizer", torch.optim.Adam)(network.parameters(), lr=0.05)
    given = {
        "loss": toys.loss,
        "epsilon": 4.0,
        "batch_size": 20,
        "steps": STEPS,
        "learning_rate": 0.05,
        "run_dir": run_dir,
        "resume": resume,
        "checkpoint_steps": EVERY,
    } | changes
    return make_private(network, optimizer, given.pop("dataset", None) or toys.data(), **given)


def fresh_model() -> nn.Module:
    """The usual model, with other weights at every call."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
