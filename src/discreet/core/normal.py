"""Standard normal draws from random words, in basic arithmetic alone: the same bits on every machine.

Box-Muller: of two uniform numbers the first gives a radius, ``sqrt(-2 log(2 - x))``, and the second an angle.
Logarithm, sine and cosine are polynomials (those of FreeBSD's msun, below one unit in the last place). So a draw is
made of additions, multiplications, divisions and square roots, which IEEE 754 defines to the last bit, and of nothing
whose result differs between processors, compilers or libraries.

`_normal.c` holds the same operations in the same order, compiled to vector code, and a keystream. Where it could not be
built, numpy does them, about five times slower and bit by bit the same.

Shape legend: W = random words, an even number; N = draws, W or W - 1.
"""

from __future__ import annotations

import math

import numpy as np

try:
    from discreet.core import _normal as _compiled
except ImportError:
    _compiled = None

_ONE = np.float64(1.0).view(np.uint64)
_HALF_ROOT = np.uint64(0x3FE6A09E667F3BCD)
_WHOLE = np.float64(2.0**52).view(np.uint64)
_TURN = 1.5 * 2.0**52
_LOG = (
    *(1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01),
    *(2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01),
)
_SINE = (
    *(1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06),
    *(-1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01),
)
_COSINE = (
    *(-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07),
    *(2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02),
)


def fill(words_W: np.ndarray, draws_N: np.ndarray) -> None:
    """Make draws of uniform 64-bit words, of which 52 bits are used each.

    The first half of the words gives radii and the second half angles; the first half of the draws are sines, and the
    second cosines.

    Args:
        words_W: uint64.
        draws_N: float64, written.
    """
    if _compiled is not None:
        _compiled.fill(words_W, draws_N)
        return
    draws_N[:] = _drawn(words_W, len(draws_N))


def add(words_W: np.ndarray, value_N: np.ndarray, target_N: np.ndarray, *, scale: float, share: float) -> None:
    """``target = value * share + draw * scale``, in float64 and rounded once.

    Args:
        words_W: uint64.
        value_N: float32.
        target_N: float32, written; may be ``value_N`` itself.
        scale: what to multiply the draws by.
        share: what to multiply the values by.
    """
    if _compiled is not None:
        _compiled.add(words_W, value_N, target_N, scale, share)
        return
    noise_N = np.multiply(_drawn(words_W, len(target_N)), scale)
    target_N[:] = np.add(np.multiply(value_N, share, dtype=np.float64), noise_N, out=noise_N)


def add_keyed(
    key: bytes, start: int, value_N: np.ndarray, target_N: np.ndarray, *, piece: int, scale: float, share: float
) -> bool:
    """As `add`, piece by piece, with words ``start`` and following of the AES-256-CTR keystream of a key.

    Args:
        key: 32 bytes, for this stream alone: its counter begins at zero.
        start: the first word, an even number.
        value_N, target_N, scale, share: as in `add`.
        piece: how many draws share their words, an even number; the last ones may be fewer.

    Returns:
        Whether it was done: only compiled code on a processor with AES instructions makes its own keystream.
    """
    if _compiled is None or not _compiled.has_cipher():
        return False
    _compiled.add_keyed(key, start, piece, value_N, target_N, scale, share)
    return True


def uniform(words: np.ndarray) -> np.ndarray:
    """Words as numbers on the 2^52 steps of [1, 2)."""
    return (words >> np.uint64(12) | _ONE).view(np.float64)


def _drawn(words_W: np.ndarray, count: int) -> np.ndarray:
    """The reference for `_normal.c`: every line there has its line here."""
    pairs = len(words_W) // 2
    assert pairs == (count + 1) // 2
    radius = np.sqrt(_squared_radius(uniform(words_W[:pairs])))
    sine, cosine = _on_circle(uniform(words_W[pairs:]))
    return np.concatenate([radius * sine, radius * cosine])[:count]


def _squared_radius(x: np.ndarray) -> np.ndarray:
    """``-2 log(2 - x)``: 2 - [1, 2) is (0, 1], whose logarithm is finite."""
    u = 2.0 - x
    bits = u.view(np.uint64)
    exponent = (bits - _HALF_ROOT + _ONE) >> np.uint64(52)
    f = (bits - (exponent << np.uint64(52)) + _ONE).view(np.float64) - 1.0
    e = (exponent | _WHOLE).view(np.float64) - (2.0**52 + 1023)
    s = f / (f + 2.0)
    r = _polynomial(s * s, _LOG) * (s * s)
    h = f * f * 0.5
    log = e * 6.93147180369123816490e-01 - ((h - ((h + r) * s + e * 1.90821492927058770002e-10)) - f)
    return log * -2.0


def _on_circle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of the angle ``x - 3/2`` in turns, by quadrants."""
    quarters = (x - 1.5) * 4.0
    rounded = quarters + _TURN
    quadrant = rounded.view(np.uint64)
    a = (quarters - (rounded - _TURN)) * (math.pi / 2)
    z = a * a
    along = _polynomial(z, _SINE) * z * a + a
    across = _polynomial(z, _COSINE) * z * z - z * 0.5 + 1.0
    turned = (quadrant & np.uint64(1)).astype(bool)
    sine, cosine = np.where(turned, across, along), np.where(turned, along, across)
    flipped = quadrant + np.uint64(1)
    return _negated(sine, quadrant), _negated(cosine, flipped)


def _negated(value: np.ndarray, quadrant: np.ndarray) -> np.ndarray:
    return (value.view(np.uint64) ^ ((quadrant & np.uint64(2)) << np.uint64(62))).view(np.float64)


def _polynomial(z: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Horner's rule, from the highest power down."""
    first, *rest = coefficients
    total = z * first
    for index, coefficient in enumerate(rest):
        total = total + coefficient if index == 0 else total * z + coefficient
    return total
