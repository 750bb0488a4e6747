"""How far an optimizer is moved by noise: a rehearsal on noise alone, before training, on nobody's data.

Rates of different optimizers are different units. What they have in common is where a long series of noisy gradients
takes the weights: with momentum 0.9 ten times as far as without, with Adam as far as the rate says whatever the noise
is. So a movement of the weights is turned into a rate by the optimizer's own response.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import zero_sum
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError
from discreet.train.step import write_gradient

_SEED = 20_777
_WEIGHTS = 1_024
_UPDATES = 200
_RATE = 1e-3
_NOT_REHEARSED = ("params", "param_names", "capturable", "foreach", "fused")
"""What a group holds beyond its options: its parameters, and how updates are computed, which changes none."""


def response(optimizer: torch.optim.Optimizer, *, noise_std: float) -> float:
    """Root mean square movement of a weight, per root of an update and unit of rate, under noise of this size.

    ``sqrt(mean (w_K - w_0)^2 / K) / rate`` after K = 200 updates by released sums of no example: 1 for Adam, the noise
    itself for plain descent, ten times it with momentum 0.9. The options are those of the first group.

    Args:
        optimizer: looked at and left alone. noise_std: of each entry of the released gradient, above 0.

    Raises:
        ConfigError: another optimizer of this class cannot be made from its options, or it does not move.
    """
    weights = {"w": nn.Parameter(torch.zeros(_WEIGHTS, device="cpu"))}
    options = {key: value for key, value in optimizer.param_groups[0].items() if key not in _NOT_REHEARSED}
    name, remedy = type(optimizer).__name__, "pass a number, a scheduler, or None for the optimizer's own rate"
    try:
        rehearsed = type(optimizer)([{**options, "params": [weights["w"]], "lr": _RATE}])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f'learning_rate="auto" with {name}: cannot be rehearsed ({error}); {remedy}.') from None
    nothing, source = zero_sum(weights, Clipping.abadi(1.0)), NoiseSource.insecure_seed(_SEED)
    for _ in range(_UPDATES):
        write_gradient(release(nothing, noise_multiplier=noise_std, source=source), weights)
        rehearsed.step()
    moved = math.sqrt(float(weights["w"].detach().double().square().mean()) / _UPDATES) / _RATE
    if not 0 < moved < math.inf:
        raise ConfigError(f'learning_rate="auto" with {name}: noise moves it by {moved}; {remedy}.')
    return moved


def is_scale_free(optimizer: torch.optim.Optimizer, *, noise_std: float) -> bool:
    """Whether gradients of ten times the size move the weights as far, as with Adam: within a tenth."""
    return response(optimizer, noise_std=10 * noise_std) < 1.1 * response(optimizer, noise_std=noise_std)
