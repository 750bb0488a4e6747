"""The one place where it is decided whether a kernel is used: by device, dtype, shape and what is installed.

Never by data. What kernels replace is PyTorch's own arithmetic in `discreet.core.outer` and `windows`, and
draws that a processor would make and send. Triton is imported when it is first used, so `import discreet` needs none.

Shape legend: B = examples, K = groups, S = positions, I = inputs, O = outputs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from discreet.core.kernels import processor, scales
from discreet.core.kernels.processor import Spread
from discreet.core.kernels.results import HARMLESS, GramProducts, Squares
from discreet.core.route import ACCELERATOR, CPU, KERNELS, PANELS, PANELS_OF_WINDOWS, TENSOR_CORES, Prices

_STORED = (torch.float32, torch.float16, torch.bfloat16)
_RUN = 16
"""Positions of one example below which most of a tensor core's step would be spent on nothing."""


def suit(*operands: Tensor) -> bool:
    """Whether norms of these operands are taken by the kernels; decided from device, dtype and shape alone."""
    if _on_accelerator(operands[0]) and all(map(_on_accelerator, operands)):
        return _found() and all(value.dtype in _stored(value.device) and value.numel() for value in operands)
    return processor.suit(*operands) and operands[0].shape[2] <= processor.MOST_POSITIONS


def suit_windows(input: Tensor, grad: Tensor) -> bool:
    """Whether the windows of an image are multiplied by a kernel, and need not be unfolded."""
    return not _on_accelerator(input) and processor.suit(input, grad)


def suit_positions(rows: int) -> bool:
    """Whether that kernel makes a Gram matrix of so many rows."""
    return rows <= processor.MOST_POSITIONS


def suit_sums(*operands: Tensor) -> bool:
    """Whether gradients are added up by the kernels: bfloat16, which would first be copied to float32, in long runs."""
    return all(value.dtype is torch.bfloat16 and value.shape[2] >= _RUN for value in operands) and suit(*operands)


def prices(*operands: Tensor, suited: bool | None = None) -> Prices:
    """What the routes to a norm cost where these operands are.

    Args:
        suited: whether they `suit` kernels, where that is known.
    """
    if not (suit(*operands) if suited is None else suited):
        return plain_prices(*operands)
    if not _on_accelerator(operands[0]):
        return PANELS
    return TENSOR_CORES if suit_sums(*operands) else KERNELS


def plain_prices(*operands: Tensor) -> Prices:
    """The same without kernels."""
    return ACCELERATOR if any(_on_accelerator(value) for value in operands) else CPU


def window_prices(input: Tensor, *, suited: bool, positions: int, pixels: int) -> Prices:
    """The same for the windows of an image."""
    if not suited or not suit_positions(positions):
        return plain_prices(input)
    return PANELS if suit_positions(pixels) else PANELS_OF_WINDOWS


def draw(*values: Tensor) -> bool:
    """Whether noise is drawn by the kernel, where the sums are."""
    return _found() and all(_on_accelerator(value) and _stored(value.device) for value in values)


def add_noise(
    values: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    keys: Mapping[str, tuple[bytes, ...]],
    scales: Mapping[str, float],
    share: float,
) -> None:
    """``target = value * share + draw * scale``, each with the draws of its own keys."""
    from discreet.core.kernels import noise

    stretches = [
        noise.Stretch(value.reshape(-1), targets[name].view(-1), keys[name], scales[name])
        for name, value in values.items()
    ]
    noise.add(stretches, share=share)


def digests(values: Sequence[Tensor], key: bytes) -> Tensor:
    """Keyed sums of each piece of tensors of an accelerator, by which they are told from others, (P, 2)."""
    from discreet.core.kernels import digest

    return digest.digests(values, key)


def gram_norm2(inputs_BKSI: Sequence[Tensor], grads_BKSO: Sequence[Tensor], *, harmless: float = HARMLESS) -> Tensor:
    """`discreet.core.outer.gram_norm2` by a kernel, of operands as they are stored; (B,), float64.

    Subnormal entries, which a tensor core may take for zero, are less than the squares that are looked for there.
    """
    if not _on_accelerator(inputs_BKSI[0]):
        operands = ([Spread(value) for value in values] for values in (inputs_BKSI, grads_BKSO))
        return processor.gram_norm2(*operands, harmless=harmless)
    from discreet.core.kernels import rounding

    found = gram_products(inputs_BKSI, grads_BKSO)
    inputs, outputs = (sum(value.shape[3] for value in values) for values in (inputs_BKSI, grads_BKSO))
    return rounding.gram_norm2(found, inputs=inputs, outputs=outputs, harmless=harmless)


def gram_products(inputs_BKSI: Sequence[Tensor], grads_BKSO: Sequence[Tensor]) -> GramProducts:
    """``<input input^T, grad grad^T>`` per example; several operands stand for all their pairs."""
    from discreet.core.kernels import gram

    return gram.gram_products(inputs_BKSI, grads_BKSO)


def product_squares(input_BKSI: Tensor, grad_BKSO: Tensor) -> Squares:
    """``|grad^T input|^2`` per example."""
    from discreet.core.kernels import direct

    return direct.product_squares(input_BKSI, grad_BKSO)


def rounded_direct(
    found: Squares, input_BKS: Tensor, grad_BKS: Tensor, *, inputs: int, outputs: int, harmless: float = HARMLESS
) -> Tensor:
    """What `product_squares` found, with the bound on its rounding added; (B,), float64."""
    from discreet.core.kernels import rounding

    return rounding.direct_norm2(found, input_BKS, grad_BKS, inputs=inputs, outputs=outputs, harmless=harmless)


def products(input_BKSI: Tensor, grad_BKSO: Tensor) -> Tensor:
    """``grad^T input`` per example, (B, K, O, I), float32."""
    from discreet.core.kernels import direct

    return direct.products(input_BKSI, grad_BKSO)


def weighted_sum(input_BKSI: Tensor, grad_BKSO: Tensor, factor_B: Tensor) -> Tensor:
    """``sum_b factor_b grad_b^T input_b``, (K, O, I), float32, of bfloat16 operands."""
    from discreet.core.kernels import sums

    return sums.weighted_sum(input_BKSI, grad_BKSO, factor_B)


def suit_scales(*operands: Tensor, positions: int) -> bool:
    """Whether gradients of the scale and the shift of a normalisation are taken by a kernel."""
    if all(map(_on_accelerator, operands)):
        return suit(*operands)
    return positions > 1 and scales.suit(*operands)  # of one there is nothing to add up


def scale_grads(input_NSD: Tensor, grad_NSD: Tensor, mean_NS: Tensor, rstd_NS: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_s grad (input - mean) rstd`` and ``sum_s grad``, (N, D), float32."""
    if not _on_accelerator(input_NSD):
        return scales.scale_grads(input_NSD, grad_NSD, mean_NS, rstd_NS)
    from discreet.core.kernels import affine

    return affine.scale_grads(input_NSD, grad_NSD, mean_NS, rstd_NS)


def _on_accelerator(value: Tensor) -> bool:
    return value.is_cuda


@functools.cache
def _stored(device: torch.device) -> tuple[torch.dtype, ...]:
    """What operands may be there; nothing where Triton has no compiler that was ever tried, or runs its interpreter.

    Cards before 8.0 have no tensor cores for bfloat16: a kernel takes two minutes to compile.
    """
    if device.type != "cuda":
        return _STORED
    if torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":  # which reads no device's memory
        return ()
    capability = torch.cuda.get_device_capability(device)
    return _STORED if capability >= (8, 0) else _STORED[:2] if capability >= (7, 5) else ()


@functools.cache
def _found() -> bool:
    """Whether there is a Triton that compiles the kernels: 3.3, which torch 2.7 brings, does not."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (3, 4)
