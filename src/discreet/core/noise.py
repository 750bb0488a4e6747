"""release(): the one place where noise is added, and the only maker of `Released`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from discreet.core.clipping import ClippedSum
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError


@dataclass(frozen=True)
class Released:
    """Tensors that carry their noise: safe to log, plot, save and compute with.

    Attributes:
        tensors: name -> noisy sum, same shape and dtype as in the clipped sum.
        noise_std: standard deviation of the noise in every entry, ``noise_multiplier * sensitivity``.
        private: False when there was no noise, or when the noise came from a test seed.
    """

    tensors: Mapping[str, Tensor]
    noise_std: float
    private: bool


def release(total: ClippedSum, *, noise_multiplier: float, source: NoiseSource) -> Released:
    """Add Gaussian noise of standard deviation ``noise_multiplier * total.sensitivity`` to every entry.

    **Guarantees.** One Gaussian query of noise multiplier sigma on the stacked vector of all tensors (Dwork & Roth,
    Theorem A.1; composed by the accountant). Every entry of every tensor gets noise, also of parameters that the batch
    did not touch and of an empty batch. Sum and noise meet in float64 and are rounded once.

    Args:
        total: the bounded sum.
        noise_multiplier: sigma >= 0. Zero releases the bare sum and marks it not private.
        source: the keyed stream; this call claims one position of it.

    Raises:
        ConfigError: sigma is negative or not finite, or noise is asked for on an unbounded sum.
    """
    if not (0 <= noise_multiplier < math.inf):
        raise ConfigError(f"noise_multiplier={noise_multiplier}: must be finite and >= 0; solve it with Plan.solve().")
    position = source.claim()
    if noise_multiplier == 0:
        return Released(tensors=dict(total.tensors), noise_std=0.0, private=False)
    if not math.isfinite(total.sensitivity):
        raise ConfigError("an unclipped sum has no finite sensitivity: no noise protects it; use Clipping.automatic().")
    noise_std = noise_multiplier * total.sensitivity
    tensors = {
        name: _add_noise(value, source.normal(value.numel(), position=position, name=name), noise_std)
        for name, value in total.tensors.items()
    }
    return Released(tensors=tensors, noise_std=noise_std, private=source.private)


def _add_noise(value: Tensor, standard_normal: Tensor, noise_std: float) -> Tensor:
    noise = standard_normal.to(value.device).mul_(noise_std).reshape(value.shape)
    return noise.add_(value.to(torch.float64)).to(value.dtype)
