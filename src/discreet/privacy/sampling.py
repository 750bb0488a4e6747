"""Poisson sampling: each example is in each batch with probability q = B / N, independently of everything else.

A batch is a function of (key, step): the 256-bit key is secret (amplification by sampling holds only while nobody
knows who was drawn), and a step that is replayed after a crash meets the same batch. The bits are SHAKE-256 output
under a key derived by HMAC-SHA256, and the transformation from bits to gaps is ours, so that no release of a numerical
package changes a stream.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass

import numpy as np

from discreet.errors import ConfigError

KEY_BYTES = 32
LARGEST_EXAMPLES = 2**40


@dataclass(frozen=True)
class PoissonSampling:
    """Batches of a public expected size B from N examples.

    **Guarantees.** ``rate`` is exactly the float64 quotient ``batch_size / examples``, the number that the accountant
    gets. The probability with which `draw` includes an example differs from it by less than 1e-9 relatively for rates
    of 1e-7 and above: uniforms have a grid of 2^-63, and float64 logarithms a relative error of 2^-52.

    Attributes:
        examples: N, public, 1 to 2^40.
        batch_size: B, the expected size of a batch, 1 to N.
    """

    examples: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, value in (("examples", self.examples), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be an integer of at least 1; pass a count of examples.")
        if self.examples > LARGEST_EXAMPLES:
            raise ConfigError(f"examples={self.examples}: must be at most 2^40; split the data set.")
        if self.batch_size > self.examples:
            raise ConfigError(
                f"batch_size={self.batch_size}: must be at most the {self.examples} examples; lower batch_size."
            )

    @property
    def rate(self) -> float:
        """q = B / N."""
        return self.batch_size / self.examples

    def draw(self, *, key: bytes, step: int) -> np.ndarray:
        """The batch of one step.

        The gaps between included examples are geometric, ``P(gap >= k) = (1 - q)^k``, drawn by inversion
        ``floor(-ln(1 - U) / -ln(1 - q))``; so time and memory are O(B) and not O(N).

        Args:
            key: 32 secret bytes, used for sampling only.
            step: which batch, >= 0.

        Returns:
            Indices, int64, strictly increasing, in [0, N); may be empty. Shape (realised batch,).

        Raises:
            ConfigError: the key has another length, or the step is negative.
        """
        if len(key) != KEY_BYTES:
            raise ConfigError(
                f"sampling key of {len(key)} bytes: must be {KEY_BYTES}; derive it with subkey(key, 'batch')."
            )
        if step < 0:
            raise ConfigError(f"step={step}: must be at least 0; steps count from 0.")
        if self.batch_size == self.examples:
            return np.arange(self.examples, dtype=np.int64)
        stream_key = hmac.new(key, f"discreet batch|{step}".encode(), hashlib.sha256).digest()
        gaps = self.batch_size + 6 * math.isqrt(self.batch_size) + 16
        while True:
            positions = np.cumsum(self._gaps(stream_key, gaps) + 1) - 1
            if positions[-1] >= self.examples:
                return positions[: np.searchsorted(positions, self.examples)]
            gaps *= 2

    def _gaps(self, stream_key: bytes, count: int) -> np.ndarray:
        """The first ``count`` gaps of a stream, int64. A longer call repeats the shorter one's gaps and goes on."""
        words = np.frombuffer(hashlib.shake_256(stream_key).digest(8 * count), dtype="<u8")
        uniform = np.minimum(((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-63, 1.0 - 2.0**-53)
        gaps = np.floor(np.log1p(-uniform) / math.log1p(-self.rate))
        # Any gap of N or more ends the batch; the cap keeps the running sum far from the end of int64.
        return np.minimum(gaps, float(self.examples)).astype(np.int64)
