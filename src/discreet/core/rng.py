"""Noise sources: a keyed counter-mode generator (AES-256-CTR) and the normal draws made from it.

Every stream is a function of (key, label): the same key and label give the same keystream on every machine, and two
labels never share a block of it. The stream is seekable, so that the pieces of a large tensor are drawn on all cores.
Draws are float64: neither the 24-bit grid nor the 5.77 sigma cut of float32 samplers applies.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import secrets
import sys
from collections.abc import Iterator

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from discreet.errors import ConfigError, DiscreetError

KEY_BYTES = 32
PIECE = 1 << 16
"""Draws made at once: few enough for a core's cache, enough to make little of the calls around them."""
_BLOCK_BYTES = 16
_ONE = np.float64(1.0).view(np.uint64)


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
        self._spare: list[Scratch] = []
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

    def normal(self, count: int, *, position: int, name: str, start: int = 0, layer: int = 0) -> Tensor:
        """Draws ``start`` to ``start + count`` of the stream of (key, position, name, layer), float64, shape (count,).

        Args:
            count: how many.
            position: a claimed position of this source.
            name: the tensor that they are for.
            start: a multiple of `PIECE`: where in the stream to begin.
            layer: number of an independent stream with the same position and name.
        """
        draws = np.empty(count, dtype=np.float64)
        with self.scratch() as scratch:
            for at in range(0, count, PIECE):
                size = min(PIECE, count - at)
                draws[at : at + size] = self.piece(
                    size, scratch, position=position, name=name, start=start + at, layer=layer
                )
        return torch.from_numpy(draws)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """Memory for one worker, kept for the next release; any number of workers may ask at once."""
        try:
            mine = self._spare.pop()
        except IndexError:
            mine = Scratch()
        try:
            yield mine
        finally:
            self._spare.append(mine)

    def piece(
        self, count: int, scratch: Scratch, *, position: int, name: str, start: int = 0, layer: int = 0
    ) -> np.ndarray:
        """At most `PIECE` draws of the same stream, in the scratch memory: valid until that is used again."""
        assert count <= PIECE
        assert start % PIECE == 0
        key = subkey(self._key, f"noise|{layer}|{position}|{name}")
        return _standard_normal(scratch, key, start, count)


def seed_key(seed: int) -> bytes:
    """The 256-bit key that stands for a test seed. NOT PRIVATE."""
    return hashlib.sha256(f"discreet insecure seed {seed}".encode()).digest()


def subkey(key: bytes, label: str) -> bytes:
    """A 256-bit key for one purpose, derived from ``key`` by HMAC-SHA256; labels never collide."""
    return hmac.new(key, label.encode(), hashlib.sha256).digest()


class Scratch:
    """Memory for one piece, so that thousands of them are drawn without a page fault each."""

    def __init__(self) -> None:
        self.zeros = bytes(8 * PIECE)
        self.stream = bytearray(8 * PIECE + _BLOCK_BYTES - 1)
        self.words = np.frombuffer(self.stream, dtype=np.uint64, count=PIECE)
        self.uniform = self.words.view(np.float64)
        self.diameter, self.scaled = np.empty(PIECE // 2), np.empty(PIECE // 2)
        self.draws = np.empty(PIECE)


def _standard_normal(scratch: Scratch, key: bytes, start: int, count: int) -> np.ndarray:
    """Draws ``start`` to ``start + count`` by Box-Muller pairs: sines first, then cosines.

    With t the tangent of half the angle, ``sin = 2 t / (1 + t^2)`` and ``cos = 2 / (1 + t^2) - 1``: one tangent costs a
    fifth of a sine and a cosine.
    """
    pairs = (count + 1) // 2
    uniform = _uniform(scratch, key, start, 2 * pairs)
    diameter, scaled = scratch.diameter[:pairs], scratch.scaled[:pairs]
    np.subtract(2.0, uniform[:pairs], out=diameter)  # 2 - [1, 2) is (0, 1]: its logarithm is finite
    np.multiply(np.log(diameter, out=diameter), -8.0, out=diameter)
    np.sqrt(diameter, out=diameter)
    tangent = np.subtract(uniform[pairs:], 1.5, out=uniform[pairs:])
    np.tan(np.multiply(tangent, math.pi, out=tangent), out=tangent)
    np.add(np.multiply(tangent, tangent, out=scaled), 1.0, out=scaled)
    np.divide(diameter, scaled, out=scaled)
    np.multiply(scaled, tangent, out=scratch.draws[:pairs])
    np.subtract(scaled, np.multiply(diameter, 0.5, out=diameter), out=scratch.draws[pairs : 2 * pairs])
    return scratch.draws[:count]


def _uniform(scratch: Scratch, key: bytes, start: int, count: int) -> np.ndarray:
    """Words ``start`` to ``start + count`` of the AES-256-CTR keystream as uniforms on the 2^52 steps of [1, 2).

    The key serves this stream alone, so its counter begins at zero; ``start`` is even (two words a block).
    """
    counter = (start * 8 // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    encryptor.update_into(memoryview(scratch.zeros)[: 8 * count], scratch.stream)
    words = scratch.words[:count]
    if sys.byteorder == "big":
        words.byteswap(inplace=True)
    np.bitwise_or(np.right_shift(words, 12, out=words), _ONE, out=words)
    return scratch.uniform[:count]
