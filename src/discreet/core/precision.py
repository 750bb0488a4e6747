"""Norms and clipped sums are computed in the precision of their tensors, whatever the training around them runs in.

Autocast would round a Gram matrix to bfloat16, and TF32 keeps 10 bits of each factor: either can make a norm too small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_PER_BACKEND = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of float32 tensors in float32 inside, on every device."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_ieee_products())
        yield


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    if not _PER_BACKEND:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    kept = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, kept, strict=True):
            setting.fp32_precision = precision
