"""What the bits of a step depend on beyond (key, plan): compared on resume, kept in the private half."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import re
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.core.precision import precision_now
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
    """One line per thing that may change the value of a step's sum. Equal records: a replay under the same key is the
    same.

    The data are hashed whole, and so is the code of this package. Code of others is named by its versions and by the
    source of the model's class and the loss, with the numbers and words that the loss is bound to; what those call is
    trusted to be unchanged.
    """
    device = next(model.parameters()).device
    state = model.state_dict()
    shapes = [f"{name}:{tuple(value.shape)}:{value.dtype}" for name, value in state.items()]
    sources = sorted({source_of(type(module)) for module in model.modules()})
    modes = "".join("t" if module.training else "e" for module in model.modules())
    # Other buffers are part of the checkpoint.
    fixed = [f"{name}:{_values(value)}" for name, value in model.named_buffers() if name not in state]
    return {
        "data": examples.fingerprint(),
        "model": digest(without_addresses(repr(model)), modes, *shapes, *fixed, *sources),
        "loss": digest(source_of(loss)),
        "optimizer": type(optimizer).__qualname__,
        "learning rate": rates.describe(),
        "clipping": repr(clipping),
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()),
        "precision": " ".join(map(str, (*precision_now(), torch.backends.cudnn.benchmark))),
        "torch": str(torch.__version__),
        "discreet": _own_code(),
    }


def describe_data(fingerprint: str) -> dict[str, str]:
    """The same for the private statistics: they are a function of the data, of this package's code and of the key."""
    return {"data": fingerprint, "discreet": _own_code(("core", "app/data"))}


@functools.cache
def _own_code(folders: tuple[str, ...] = ("core", "privacy", "train")) -> str:
    """Hash of every source file of this package that a step runs through."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(file for folder in folders for kind in ("*.py", "*.c") for file in (root / folder).rglob(kind))
    return digest(*(f"{file.relative_to(root)}\n{file.read_text(encoding='utf-8')}" for file in files))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's whole state, names and values, in hex."""
    return digest(*(f"{name}:{value.dtype}:{_values(value)}" for name, value in model.state_dict().items()))


def _values(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def digest(*parts: str) -> str:
    """SHA-256 of lines of text, in hex."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def without_addresses(text: str) -> str:
    """What Python writes of functions and objects, without where they lie: that is another place in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def source_of(thing: object) -> str:
    """Source text when there is some, else that of its class, else a stable name; and the plain values that it is bound
    to: numbers, words and tuples of them, in a partial, in a closure and as defaults. Objects may change as they run.
    """
    if isinstance(thing, functools.partial):
        return "\n".join((source_of(thing.func), _plain(thing.args), _plain(tuple(thing.keywords.items()))))
    bound: tuple[object, ...] = ()
    if isinstance(thing, types.FunctionType):
        cells = tuple(_content(cell) for cell in thing.__closure__ or ())
        bound = (cells, thing.__defaults__, tuple((thing.__kwdefaults__ or {}).items()))
    return f"{_text_of(thing)}\n{_plain(bound)}"


def _text_of(thing: object) -> str:
    for known in (thing, type(thing)):
        try:
            return inspect.getsource(known)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return type(thing).__qualname__


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _plain(value: object) -> str:
    """The same text in every process; of what is no number, word or tuple, the name of its type."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(_plain(item) for item in value)})"
    return type(value).__qualname__
