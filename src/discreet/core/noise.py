"""release(): the one place where noise is added, and the only maker of `Released`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from discreet.core.clipping import ClippedSum
from discreet.core.rng import PIECE, NoiseSource, Scratch
from discreet.core.team import for_each
from discreet.errors import ConfigError


@dataclass(frozen=True)
class Released:
    """Tensors that carry their noise: safe to log, plot, save and compute with.

    Attributes:
        tensors: name -> noisy sum over ``divisor``, same shape and dtype as in the clipped sum, or as where it went.
        noise_std: standard deviation of the noise in every entry of a tensor whose noise weight is 1.
        private: False when there was no noise, or when the noise came from a test seed.
    """

    tensors: Mapping[str, Tensor]
    noise_std: float
    private: bool


def release(
    total: ClippedSum,
    *,
    noise_multiplier: float,
    source: NoiseSource,
    divisor: float = 1.0,
    into: Mapping[str, Tensor] | None = None,
) -> Released:
    """Add Gaussian noise of standard deviation ``noise_multiplier * total.sensitivity`` to every entry, and divide.

    A tensor with a noise weight g gets noise of g times that.

    **Guarantees.** One Gaussian query of noise multiplier sigma on the stacked vector of all tensors, each over its
    noise weight (Dwork & Roth, Theorem A.1; composed by the accountant); scaling back is post-processing. Every entry
    of every tensor gets noise, also of parameters that the batch did not touch and of an empty batch. Sum and noise
    meet in float64 and are rounded once. Where the result stays float64, the noise is the normalised sum of two
    independent draws: the low bits of a single Box-Muller draw could be told from any other number (arXiv:2112.05307);
    rounding to float32 removes them.

    Args:
        total: the bounded sum.
        noise_multiplier: sigma >= 0. Zero releases the bare sum and marks it not private.
        source: the keyed stream; this call claims one position of it.
        divisor: a public constant, such as the expected batch, that the noisy sum is divided by.
        into: where to write: name -> tensor of the sum's shape and device, in its dtype or in float32. Others get new
            memory.

    Raises:
        ConfigError: sigma is negative or not finite, noise is asked for on an unbounded sum, or a noise weight is none.
    """
    if not (0 <= noise_multiplier < math.inf):
        raise ConfigError(f"noise_multiplier={noise_multiplier}: must be finite and >= 0; solve it with Plan.solve().")
    if not (0 < divisor < math.inf):
        raise ConfigError(f"divisor={divisor}: must be finite and above 0; pass the expected batch size.")
    if noise_multiplier and not math.isfinite(total.sensitivity):
        raise ConfigError("an unclipped sum has no finite sensitivity: no noise protects it; use Clipping.automatic().")
    if not total.sensitivity > 0:
        raise ConfigError(f"sensitivity {total.sensitivity}: must be above 0, or the noise would be none.")
    if not all(0 < weight < math.inf for weight in total.noise_weights.values()):
        raise ConfigError(f"noise weights {dict(total.noise_weights)}: must be finite and above 0.")
    position = source.claim()
    targets = {name: _target(value, (into or {}).get(name)) for name, value in total.tensors.items()}
    if noise_multiplier == 0:
        for name, value in total.tensors.items():
            torch.div(value, divisor, out=targets[name])
        return Released(tensors=targets, noise_std=0.0, private=False)
    noise_std = noise_multiplier * total.sensitivity
    scales = {name: noise_std * total.noise_weights.get(name, 1.0) / divisor for name in total.tensors}
    how = {"position": position, "scales": scales, "share": 1.0 / divisor}
    away = {name: value for name, value in total.tensors.items() if not _on_host(value)}
    if away:
        source.add_on_device(away, {name: targets[name] for name in away}, **how)
    here = {name: value for name, value in total.tensors.items() if name not in away}
    shares = _shares(here, targets, threads=torch.get_num_threads())
    for_each(partial(_add_noise, source=source, **how), shares)
    return Released(tensors=targets, noise_std=noise_std / divisor, private=source.private)


@dataclass(frozen=True)
class _Stretch:
    """Entries of one tensor from ``start`` on, in one row; ``start`` is a multiple of `PIECE`.

    numpy's, not torch's: inside a worker each of torch's operations would call up another team of threads.
    """

    name: str
    value: np.ndarray
    target: np.ndarray
    start: int


_KEY = 1 << 12
"""Draws that are made in the time that a tensor's own key takes."""


def _shares(values: Mapping[str, Tensor], targets: Mapping[str, Tensor], *, threads: int) -> list[list[_Stretch]]:
    """All entries of all tensors, cut at multiples of `PIECE` into about equal shares, one a thread where that pays."""
    sizes = {name: value.numel() for name, value in values.items()}
    count = max(1, min(threads, sum(sizes.values()) // PIECE))
    total, taken = sum(sizes.values()) + _KEY * len(sizes), 0
    shares: list[list[_Stretch]] = [[] for _ in range(count)]
    for name, size in sizes.items():
        value, target, start = values[name].numpy().reshape(-1), targets[name].numpy().reshape(-1), 0
        while start < size:
            number = taken * count // total
            pieces = -(-((number + 1) * total // count - taken) // PIECE)  # that this share still wants
            stop = size if number == count - 1 else min(size, start + max(1, pieces) * PIECE)
            shares[number].append(_Stretch(name, value[start:stop], target[start:stop], start))
            taken, start = taken + stop - start, stop
        taken += _KEY
    return shares


def _target(value: Tensor, offered: Tensor | None) -> Tensor:
    if (
        offered is not None
        and (offered.shape, offered.device) == (value.shape, value.device)
        and offered.dtype in (value.dtype, torch.float32)
        and offered.is_contiguous()
    ):
        return offered.detach()
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _add_noise(
    stretches: list[_Stretch], *, source: NoiseSource, position: int, scales: Mapping[str, float], share: float
) -> None:
    """``target = value * share + draw * scale``, in one worker's memory."""
    with source.scratch() as scratch:
        for stretch in stretches:
            scale = scales[stretch.name]
            if stretch.value.dtype == stretch.target.dtype == np.float32:
                where = {"position": position, "name": stretch.name, "start": stretch.start}
                source.add(stretch.value, stretch.target, scratch, **where, scale=scale, share=share)
            else:
                _add_by_pieces(stretch, scratch, source=source, position=position, scale=scale, share=share)


def _add_by_pieces(
    stretch: _Stretch, scratch: Scratch, *, source: NoiseSource, position: int, scale: float, share: float
) -> None:
    """The same for float64 sums. Results that stay float64 get the normalised sum of two draws."""
    for start in range(0, len(stretch.value), PIECE):
        value, target = stretch.value[start : start + PIECE], stretch.target[start : start + PIECE]
        where = {"position": position, "name": stretch.name, "start": stretch.start + start}
        noise = source.piece(len(value), scratch, **where)
        if target.dtype == np.float64:
            first = noise.copy()
            noise = source.piece(len(value), scratch, **where, layer=1)
            np.multiply(np.add(noise, first, out=noise), math.sqrt(0.5), out=noise)
        np.multiply(noise, scale, out=noise)
        np.add(noise, np.multiply(value, share), out=target, casting="same_kind")


def _on_host(value: Tensor) -> bool:
    return value.is_cpu
