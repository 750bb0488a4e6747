"""Noise sources: a keyed counter-mode generator (AES-256-CTR; ChaCha20 on an accelerator) and normal draws made of it.

Every stream is a function of (key, label): the same key and label give the same keystream on every machine, and two
labels never share a block of it. The stream is seekable, so that the pieces of a large tensor are drawn on all cores.
Draws are float64: neither the 24-bit grid nor the 5.77 sigma cut of float32 samplers applies.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from discreet.core import chacha, normal
from discreet.core.kernels import dispatch
from discreet.errors import ConfigError, DiscreetError

KEY_BYTES = 32
PIECE = 1 << 16
"""Draws made at once: few enough for a core's cache, enough to make little of the calls around them."""
_BLOCK_BYTES = 16


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
        self._claiming = threading.Lock()
        self._process = os.getpid()
        self.private = private

    def __reduce__(self) -> str:
        """Refuse every copy: two of them would put the same noise on two sums."""
        raise ConfigError(
            "a noise source cannot be copied or pickled: its noise would be used twice; make another one, or begin a "
            "keyed one at a position that no other uses."
        )

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
        """Take the next position; each is handed out once.

        Raises:
            ConfigError: this process is a fork of the one that made the source, which goes on with the same positions.
        """
        if os.getpid() != self._process:
            raise ConfigError(
                "a noise source of another process (fork): its noise would be used twice; make a new one."
            )
        with self._claiming:
            claimed = self._position
            self._position += 1
        return claimed

    def seek(self, position: int) -> None:
        """Skip forward to ``position``. Going back would draw the same noise twice, and is refused."""
        if position < self._position:
            raise DiscreetError(
                f"noise position {position}: {self._position - 1} is already used, and noise never repeats within a "
                "source; if an update was interrupted, close the run and resume it."
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
        key = self._stream_key(position=position, name=name, start=start, layer=layer)
        draws = scratch.draws[:count]
        normal.fill(_keystream(scratch, key, start, _words_of(count)), draws)
        return draws

    def add(
        self,
        value: np.ndarray,
        target: np.ndarray,
        scratch: Scratch,
        *,
        position: int,
        name: str,
        start: int,
        scale: float,
        share: float,
    ) -> None:
        """``target = value * share + draw * scale`` with the draws of `normal`, from ``start`` on; rounded once.

        Args:
            value, target: float32, of one size; they may be the same.
            scratch: this worker's memory.
            position, name, start: as in `normal`.
            scale, share: public constants.
        """
        key = self._stream_key(position=position, name=name, start=start, layer=0)
        if normal.add_keyed(key, start, value, target, piece=PIECE, scale=scale, share=share):
            return
        for at in range(0, len(target), PIECE):
            some = slice(at, at + PIECE)
            words = _keystream(scratch, key, start + at, _words_of(len(target[some])))
            normal.add(words, value[some], target[some], scale=scale, share=share)

    def add_on_device(
        self,
        values: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        *,
        position: int,
        scales: Mapping[str, float],
        share: float,
    ) -> None:
        """``target = value * share + draw * scale`` for tensors that are not the processor's; rounded once.

        The draws are those of `chacha.piece`, whether a kernel makes them there, or the processor makes them and they
        are sent. Results that stay float64 get the normalised sum of two draws.

        Args:
            values, targets: name -> contiguous, float32 or float64, of one size and on one device; may be the same.
            position: a claimed position of this source.
            scales: name -> public constant.
            share: public constant.
        """
        keys = {name: self._device_keys(position, name, target.dtype) for name, target in targets.items()}
        if dispatch.draw(*values.values()):
            dispatch.add_noise(values, targets, keys=keys, scales=scales, share=share)
            return
        for name, value in values.items():
            value_N, target_N = value.reshape(-1), targets[name].view(-1)
            for start in range(0, value.numel(), PIECE):
                pieces = range(start // chacha.PIECE, -(-min(start + PIECE, value.numel()) // chacha.PIECE))
                draws = [_normalised([chacha.piece(key, number) for key in keys[name]]) for number in pieces]
                some = slice(start, start + PIECE)
                noise = torch.from_numpy(np.concatenate(draws) * scales[name])[: len(value_N[some])]
                target_N[some] = (value_N[some].cpu().double() * share + noise).to(target_N.dtype)

    def _device_keys(self, position: int, name: str, dtype: torch.dtype) -> tuple[bytes, ...]:
        layers = (0, 1) if dtype is torch.float64 else (0,)
        return tuple(subkey(self._key, f"noise of a device|{layer}|{position}|{name}") for layer in layers)

    def _stream_key(self, *, position: int, name: str, start: int, layer: int) -> bytes:
        """The key of the stream of (position, name, layer); ``start`` is where in it a piece begins."""
        assert start % PIECE == 0
        return subkey(self._key, f"noise|{layer}|{position}|{name}")


def _normalised(draws: list[np.ndarray]) -> np.ndarray:
    """One draw as it is; of two independent ones their sum, which is again a draw."""
    first, *others = draws
    return (others[0] + first) * math.sqrt(0.5) if others else first


def seed_key(seed: int) -> bytes:
    """The 256-bit key that stands for a test seed. NOT PRIVATE."""
    return hashlib.sha256(f"discreet insecure seed {seed}".encode()).digest()


def subkey(key: bytes, label: str) -> bytes:
    """A 256-bit key for one purpose, derived from ``key`` by HMAC-SHA256; labels never collide."""
    return hmac.digest(key, label.encode(), "sha256")


class Scratch:
    """Memory for one piece, so that thousands of them are drawn without a page fault each."""

    def __init__(self) -> None:
        self.zeros = bytes(8 * PIECE)
        self.stream = bytearray(8 * PIECE + _BLOCK_BYTES - 1)
        self.words = np.frombuffer(self.stream, dtype=np.uint64, count=PIECE)
        self.draws = np.empty(PIECE)


def _words_of(draws: int) -> int:
    """How many words so many draws take: two for each pair."""
    return (draws + 1) // 2 * 2


def _keystream(scratch: Scratch, key: bytes, start: int, count: int) -> np.ndarray:
    """Words ``start`` to ``start + count`` of the AES-256-CTR keystream.

    The key serves this stream alone, so its counter begins at zero; ``start`` is even (two words a block).
    """
    counter = (start * 8 // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    encryptor.update_into(memoryview(scratch.zeros)[: 8 * count], scratch.stream)
    words = scratch.words[:count]
    if sys.byteorder == "big":
        words.byteswap(inplace=True)
    return words
