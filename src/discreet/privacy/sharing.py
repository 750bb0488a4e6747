"""Several Gaussian queries on one random batch are one event: what noise it has, and how one event is shared out.

An example that is in the batch is in it for every query. So the queries add up before the sampling amplifies them, and
composing each as if it had a batch of its own claims too little (arXiv:1812.06210, section 3): a claimed epsilon of 8
can be 16 in truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from discreet.errors import ConfigError


def joint_noise(noise_multipliers: Sequence[float]) -> float:
    """The noise multiplier of one event that holds all these queries: ``(sum sigma_i^-2)^(-1/2)``.

    Raises:
        ConfigError: there is none, or one of them has no noise.
    """
    if not noise_multipliers or not all(0 < sigma < math.inf for sigma in noise_multipliers):
        raise ConfigError(f"noise multipliers {list(noise_multipliers)}: must be finite and above 0, at least one.")
    return math.fsum(sigma**-2 for sigma in noise_multipliers) ** -0.5


def scalar_noise(noise_multiplier: float, *, scalars: int, gamma: float) -> float:
    """Noise of each of n unit-sensitivity scalars that share an event with a gradient at ``gamma * noise_multiplier``.

    ``sigma sqrt(n / (1 - gamma^-2))``: together they have exactly ``noise_multiplier``, so that a step with probes is
    the same event as one without.

    Raises:
        ConfigError: gamma leaves nothing for the scalars, or there are none.
    """
    if not 1 < gamma < math.inf or scalars < 1:
        raise ConfigError(f"gamma={gamma}, scalars={scalars}: must be above 1 and at least 1; the usual gamma is 1.01.")
    return noise_multiplier * math.sqrt(scalars / (1.0 - gamma**-2))
