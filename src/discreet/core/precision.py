"""Norms and clipped sums are computed in the precision of their tensors, whatever the training around them runs in.

Autocast would round a Gram matrix to bfloat16, and TF32, which cuDNN takes for convolutions unless it is told not to,
keeps 10 bits of each factor: either can make a norm too small, or a sum larger than its norms say.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from discreet.errors import ConfigError

_PER_BACKEND = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)

NARROW = (torch.bfloat16, torch.float16)
NARROW_GAP = 5e-2
"""How far two ways to one number may be apart where something is computed in half precision."""
ROUNDING_GAP = 1e-3
"""And where nothing is: kernels change with the size of a batch, and with the examples that a router sends together."""
_LEAST = 1e-5
"""Below it, losses are rounding of their logits."""
_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu")


class _Watch(TorchDispatchMode):
    """Notices results in half precision."""

    narrow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.narrow |= any(isinstance(leaf, Tensor) and leaf.dtype in NARROW for leaf in tree_leaves(result))
        return result


def computes_narrowly(run: Callable[[], object]) -> bool:
    """Whether anything is computed in half precision meanwhile: parameters of that kind, or autocast."""
    with _Watch() as watch:
        run()
    return watch.narrow


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are float32."""
    return copy.deepcopy(model).float()


def widened(batch: Any) -> Any:
    """A batch whose tensors of half precision are float32."""
    return tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in NARROW else leaf, batch)


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Products and convolutions of float32 tensors in float32 inside, on every device."""
    return contextlib.nullcontext() if _is_full() else _made_full()


def _is_full() -> bool:
    """Whether they are so already. CUDA's settings, of which cuDNN's rounds by default, count from its first use on."""
    settings = _settings()
    if any(map(torch.is_autocast_enabled, _AUTOCAST)) or not settings:
        return False
    used = settings if torch.cuda.is_initialized() else settings[_OF_CUDA:]
    return {setting.fp32_precision for setting in used} <= {"ieee", "none"}  # none was set: float32


@contextlib.contextmanager
def _made_full() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(ieee_products(told=False))
        yield


@contextlib.contextmanager
def ieee_products(*, told: bool = True) -> Iterator[None]:
    """The same where autocast stays: what a check compares must not differ by how a kernel rounds.

    TF32 rounds otherwise for another number of examples, by a thousandth.

    Args:
        told: by PyTorch's older settings too: a forward that reads them, or holds them (``cudnn.flags``), is refused by
            PyTorch where newer ones contradict them.
    """
    settings, back = _settings(), []
    kept = [setting.fp32_precision for setting in settings]
    try:
        for get, put, exact in _OLDER if told or not settings else ():
            with contextlib.suppress(RuntimeError):  # the caller's own contradict each other already
                back.append((put, get()))
                put(exact)
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for put, value in back:
            put(value)
        for setting, precision in zip(settings, kept, strict=True):
            setting.fp32_precision = precision


def refuse_forced_tf32(device: torch.device) -> None:
    """Raise `ConfigError` where the environment rounds every product, whatever settings say."""
    if device.type == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise ConfigError(
            "NVIDIA_TF32_OVERRIDE=1: CUDA's libraries keep 10 bits of each factor, whatever they are asked for, so "
            "that a norm can be too small; unset it before Python starts."
        )


def precision_now() -> tuple[object, ...]:
    """How products and convolutions of float32 tensors are taken now: equal where nothing was set otherwise."""
    said = (setting.fp32_precision for setting in _settings())
    plain = tuple("ieee" if precision == "none" else precision for precision in said)  # none was set: float32
    return plain or tuple(get() for get, _, _ in _OLDER)


def _settings() -> tuple[Any, ...]:
    """One for each library and operation; none before PyTorch 2.9."""
    if not _PER_BACKEND:
        return ()
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)


_OF_CUDA = 3
"""So many of the settings, the first, are CUDA's."""


_OLDER: tuple[tuple[Callable[[], Any], Callable[[Any], object], object], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False),
)
"""The older settings: how each is read and written, and what it is for float32."""


def is_close(
    found: Tensor, expected: Tensor, tolerance: float, *, noise: float = 0.0, above: float | None = None
) -> bool:
    """Equal within the tolerance, relative to the largest, and noise; NaN and infinity must be in the same places.

    Args:
        found, expected: what is compared.
        tolerance: how far they may be apart.
        noise: what is allowed besides.
        above: how far ``found`` may be above, where that is not the tolerance.
    """
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return False
    if not bool(finite.any()):
        return True
    scale = expected[finite].abs().max().clamp(min=1e-12)
    gap = found[finite] - expected[finite]
    most = max(tolerance, above or 0.0)
    return bool(((gap >= -tolerance * scale - noise) & (gap <= most * scale + noise)).all())


def each_close(found: Tensor, expected: Tensor, tolerance: float, *, least: float = _LEAST) -> bool:
    """Equal within the tolerance, each relative to itself or the median: one that is huge must not hide the others."""
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)) or not finite.any():
        return torch.equal(finite, torch.isfinite(found))
    size, gap = expected[finite].abs(), (found[finite] - expected[finite]).abs()
    return bool((gap <= tolerance * size.clamp(min=size.median()) + least).all())
