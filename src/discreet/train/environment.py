"""What the bits of a step depend on beyond (key, plan): compared on resume, kept in the private half."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
from pathlib import Path

import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.train.auto_lr import RateControl
from discreet.train.examples import Examples


def describe_environment(
    *,
    model: nn.Module,
    loss: LossFunction,
    optimizer: torch.optim.Optimizer,
    rates: RateControl,
    clipping: Clipping,
    examples: Examples,
) -> dict[str, str]:
    """One line per thing that may change the value of a step's sum. Equal records: a replay under the same key is the same.

    The data are hashed whole, and so is the code of this package. Code of others is named by its versions and by the source
    of the model's class and the loss; what those call is trusted to be unchanged.
    """
    device = next(model.parameters()).device
    shapes = [f"{name}:{tuple(value.shape)}:{value.dtype}" for name, value in model.state_dict().items()]
    return {
        "data": examples.fingerprint(),
        "model": _digest(repr(model), *shapes, _source(type(model))),
        "loss": _digest(_source(loss)),
        "optimizer": type(optimizer).__qualname__,
        "learning rate": rates.describe(),
        "clipping": repr(clipping),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "discreet": _own_code(),
    }


@functools.cache
def _own_code() -> str:
    """Hash of every source file of this package that a step runs through."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(file for folder in ("core", "privacy", "train") for file in (root / folder).rglob("*.py"))
    return _digest(*(f"{file.relative_to(root)}\n{file.read_text(encoding='utf-8')}" for file in files))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source(thing: object) -> str:
    """Source text when there is some; a stable name otherwise."""
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return type(thing).__qualname__
