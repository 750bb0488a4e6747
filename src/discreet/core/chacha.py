"""ChaCha20, and the draws that are made of it: the noise of accelerators, which have no instructions for AES.

Additions, rotations and exclusive ors of 32-bit words are all that it takes, so a kernel draws noise where the sums are
(`discreet.core.kernels.noise`). This is what that kernel must equal, bit by bit, and what is used where there is none.

A stream has a key of its own, so its nonce and counter begin at zero. It is drawn in pieces of `PIECE`: a piece is
`LANES` blocks of the cipher, each of eight 64-bit words, and a draw's place in it is (word, lane). The first four words
of a block are radii and the others angles; the first four draws of a lane are sines, and the others cosines.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from discreet.core import normal
from discreet.errors import ConfigError

LANES = 256
"""Blocks of a piece."""
PIECE = 8 * LANES
"""Draws of a piece: as many as words."""
LARGEST = 2**32 // LANES * PIECE
"""Draws of one stream: the counter of RFC 8439 has 32 bits."""
_BLOCK_BYTES = 64
_ZEROS = bytes(LANES * _BLOCK_BYTES)


def piece(key: bytes, number: int) -> np.ndarray:
    """The draws of one piece of the stream of a key.

    Args:
        key: 32 bytes, for this stream alone.
        number: which piece, from zero.

    Returns:
        float64, shape (PIECE,).
    """
    words_LW = _blocks(key, number * LANES).reshape(LANES, 8)
    draws = np.empty(PIECE)
    normal.fill(np.ascontiguousarray(words_LW.T).reshape(-1), draws)
    return draws


def _blocks(key: bytes, first: int) -> np.ndarray:
    """The words of `LANES` blocks, from block ``first`` on (RFC 8439, section 2.3), uint64, shape (8 LANES,)."""
    if first + LANES > 2**32:
        raise ConfigError(
            f"piece {first // LANES} of a stream of noise: a tensor has at most {LARGEST} numbers; split it."
        )
    cipher = Cipher(algorithms.ChaCha20(key, first.to_bytes(4, "little") + bytes(12)), mode=None)
    return np.frombuffer(cipher.encryptor().update(_ZEROS), dtype="<u8").astype(np.uint64)
