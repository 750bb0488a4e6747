"""Noise sources: a keyed counter-mode generator (AES-256-CTR) and the normal draws made from it.

Every stream is a function of (key, label): the same key and label give the same bits on every machine, and two labels
never share a block of keystream. Draws are float64 and each is the normalised sum of two independent Box-Muller draws,
so that neither the 24-bit grid and the 5.77 sigma cut of float32 samplers, nor the single-draw support attacked in
arXiv:2112.05307, applies.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from discreet.errors import ConfigError, DiscreetError

KEY_BYTES = 32
_CHUNK = 1 << 18


class NoiseSource:
    """A keyed stream of standard normal draws that hands out each position once.

    Make one with `system` (a fresh key from the operating system: the default), `keyed` (a run that must be able to
    replay a step bit by bit) or `insecure_seed` (tests only; everything drawn from it is stamped NOT PRIVATE).

    **Guarantees.** Draws are a function of (key, position, name) alone. Within one source a position is claimed at most
    once, so the same noise is never added to two sums.
    """

    def __init__(self, key: bytes, *, position: int, private: bool) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"noise key of {len(key)} bytes: must be {KEY_BYTES}; use NoiseSource.system().")
        self._key = key
        self._position = position
        self.private = private

    @classmethod
    def system(cls) -> NoiseSource:
        """A fresh 256-bit key from the operating system."""
        return cls(secrets.token_bytes(KEY_BYTES), position=0, private=True)

    @classmethod
    def keyed(cls, key: bytes, *, position: int = 0, private: bool = True) -> NoiseSource:
        """A source over a stored key, from ``position`` on; ``private=False`` when the key is no secret (tests)."""
        return cls(key, position=position, private=private)

    @classmethod
    def insecure_seed(cls, seed: int) -> NoiseSource:
        """A reproducible source for tests. Whoever knows the seed can subtract the noise: NOT PRIVATE."""
        return cls(seed_key(seed), position=0, private=False)

    @property
    def position(self) -> int:
        """The position that the next release will claim."""
        return self._position

    def claim(self) -> int:
        """Take the next position; each is handed out once."""
        claimed = self._position
        self._position += 1
        return claimed

    def seek(self, position: int) -> None:
        """Skip forward to ``position``. Going back would draw the same noise twice, and is refused."""
        if position < self._position:
            raise DiscreetError(
                f"noise position {position}: {self._position - 1} is already used; noise never repeats within a source."
            )
        self._position = position

    def normal(self, count: int, *, position: int, name: str) -> Tensor:
        """``count`` independent N(0, 1) draws, float64, shape (count,), a function of (key, position, name)."""
        stream = _keystream(self._key, f"noise|{position}|{name}")
        draws = np.empty(count, dtype=np.float64)
        for start in range(0, count, _CHUNK):
            block = draws[start : start + _CHUNK]
            block[:] = _standard_normal(stream, len(block))
        return torch.from_numpy(draws)


def seed_key(seed: int) -> bytes:
    """The 256-bit key that stands for a test seed. NOT PRIVATE."""
    return hashlib.sha256(f"discreet insecure seed {seed}".encode()).digest()


def subkey(key: bytes, label: str) -> bytes:
    """A 256-bit key for one purpose, derived from ``key`` by HMAC-SHA256; labels never collide."""
    return hmac.new(key, label.encode(), hashlib.sha256).digest()


def _keystream(key: bytes, label: str) -> _Keystream:
    return _Keystream(subkey(key, label))


class _Keystream:
    """AES-256-CTR keystream under a key used for this stream alone (so the counter starts at zero)."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """``count`` float64 uniforms on (0, 1], multiples of 2**-53."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")
        return ((words >> 11) + 1).astype(np.float64) * 2.0**-53


def _standard_normal(stream: _Keystream, count: int) -> np.ndarray:
    """Box-Muller pairs; each output adds the cosine half of one pair to the sine half of another.

    ``R cos`` and ``R sin`` of one pair are independent, and pair k lends its halves to outputs k and k + 1 only, so all
    outputs are independent N(0, 1): (N + N') / sqrt(2).
    """
    pairs = count + 1
    uniforms = torch.from_numpy(stream.uniform(2 * pairs))
    radius = uniforms[:pairs].log_().mul_(-2.0).sqrt_()
    angle = uniforms[pairs:].mul_(2.0 * math.pi)
    cosine_half = torch.cos(angle).mul_(radius)
    sine_half = torch.sin(angle).mul_(radius)
    return (cosine_half[1:] + sine_half[:-1]).mul_(math.sqrt(0.5)).numpy()
