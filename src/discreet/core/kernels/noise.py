"""``value * share + draw * scale``, with the draws of `discreet.core.chacha`, bit by bit, made where they are added.

A program makes one piece of the stream in registers: its blocks of ChaCha20, their normal draws (those of
`discreet.core.normal`, line by line), and the sum, rounded once. Nothing is kept but the result.

Shape legend: N = entries of one tensor.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.chacha import LANES, LARGEST, PIECE
from discreet.core.kernels.operands import on_device_of
from discreet.errors import ConfigError

_LANES = tl.constexpr(LANES)
_PIECE = tl.constexpr(PIECE)
_ROW = tl.constexpr(13)
"""Words of a tensor's row: addresses of value and target, entries, first piece, scale, and two keys."""
_ONE = tl.constexpr(0x3FF0000000000000)
_HALF_ROOT = tl.constexpr(0x3FE6A09E667F3BCD)
_WHOLE = tl.constexpr(0x4330000000000000)
_TURN = tl.constexpr(1.5 * 2.0**52)


@dataclass(frozen=True)
class Stretch:
    """One tensor, and the noise that it gets.

    Attributes:
        value, target: (N,), contiguous, float32 or float64, on one device; they may be the same.
        keys: of one stream of draws, or of two, whose normalised sum is added.
        scale: what to multiply draws by.
    """

    value: Tensor
    target: Tensor
    keys: tuple[bytes, ...]
    scale: float

    @property
    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype, int]:
        """What must be equal for two of them to be done by one launch."""
        return self.value.device, self.value.dtype, self.target.dtype, len(self.keys)


def add(stretches: Sequence[Stretch], *, share: float) -> None:
    """``target = value * share + draw * scale`` in float64, rounded once: one launch for all tensors of a kind."""
    kinds: dict[object, list[Stretch]] = defaultdict(list)
    for stretch in stretches:
        if stretch.value.numel() > LARGEST:
            raise ConfigError(
                f"a tensor of {stretch.value.numel()} numbers: noise is drawn for {LARGEST} at most; split it."
            )
        if stretch.value.numel():
            kinds[stretch.kind].append(stretch)
    for alike in kinds.values():
        _launch(alike, share=share)


def _launch(stretches: Sequence[Stretch], *, share: float) -> None:
    like, pieces, rows = stretches[0], 0, []
    for each in stretches:
        count = each.value.numel()
        addresses = struct.pack("<QQqqd", each.value.data_ptr(), each.target.data_ptr(), count, pieces, each.scale)
        rows.append(addresses + each.keys[0] + each.keys[-1])
        pieces += -(-count // PIECE)
    # Keys and scales are no arguments of the program, which would be compiled anew for some of them.
    table = torch.from_numpy(np.frombuffer(b"".join(rows) + struct.pack("<d", share), dtype="<i8").copy())
    device = like.value.device
    if like.value.is_cuda:
        table = table.pin_memory().to(device, non_blocking=True)
    with on_device_of(like.value):
        _add_kernel[(pieces,)](
            *(table, table[5:].view(torch.int32), table.view(torch.float64), len(stretches)),
            FROM=_DTYPES[like.value.dtype],
            TO=_DTYPES[like.target.dtype],
            TWICE=len(like.keys) > 1,
            num_warps=4,
            enable_fp_fusion=False,
        )


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _add_kernel(
    table, keys, scales, tensors, FROM: tl.constexpr, TO: tl.constexpr, TWICE: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(0)
    mine, after = 0, tensors
    while after - mine > 1:
        middle = (mine + after) // 2
        if tl.load(table + middle * _ROW + 3) <= piece:
            mine = middle
        else:
            after = middle
    row = table + mine * _ROW
    value = tl.load(row).to(tl.pointer_type(FROM))
    target = tl.load(row + 1).to(tl.pointer_type(TO))
    count = tl.load(row + 2)
    first = piece - tl.load(row + 3)
    times = tl.load(scales + mine * _ROW + 4)
    share = tl.load(scales + tensors * _ROW)
    key = keys + mine * 2 * _ROW
    lane = tl.arange(0, _LANES)
    counter = (first * _LANES + lane).to(tl.uint32)
    d0, d1, d2, d3, d4, d5, d6, d7 = _draws(key, counter)
    if TWICE:
        e0, e1, e2, e3, e4, e5, e6, e7 = _draws(key + 8, counter)
        d0, d1, d2, d3 = _halves(d0, e0), _halves(d1, e1), _halves(d2, e2), _halves(d3, e3)
        d4, d5, d6, d7 = _halves(d4, e4), _halves(d5, e5), _halves(d6, e6), _halves(d7, e7)
    at = first * _PIECE + lane
    _store(value, target, at, d0, times, share, count)
    _store(value, target, at + _LANES, d1, times, share, count)
    _store(value, target, at + 2 * _LANES, d2, times, share, count)
    _store(value, target, at + 3 * _LANES, d3, times, share, count)
    _store(value, target, at + 4 * _LANES, d4, times, share, count)
    _store(value, target, at + 5 * _LANES, d5, times, share, count)
    _store(value, target, at + 6 * _LANES, d6, times, share, count)
    _store(value, target, at + 7 * _LANES, d7, times, share, count)


@triton.jit
def _store(value, target, at, draw, times, share, count):
    inside = at < count
    here = tl.load(value + at, mask=inside, other=0.0).to(tl.float64)
    total = here * share + draw * times
    tl.store(target + at, total.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _halves(one, two):
    return (two + one) * 0.7071067811865476


@triton.jit
def _draws(key, counter):
    """Eight draws of each block: sines, then cosines."""
    r0, r1, r2, r3, a0, a1, a2, a3 = _words(key, counter)
    s0, c0 = _pair(r0, a0)
    s1, c1 = _pair(r1, a1)
    s2, c2 = _pair(r2, a2)
    s3, c3 = _pair(r3, a3)
    return s0, s1, s2, s3, c0, c1, c2, c3


@triton.jit
def _words(key, counter):
    """ChaCha20 (RFC 8439, section 2.3) with a nonce of zero: eight 64-bit words of each block."""
    zero = counter * 0
    k0, k1 = zero + _key(key, 0), zero + _key(key, 1)
    k2, k3 = zero + _key(key, 2), zero + _key(key, 3)
    k4, k5 = zero + _key(key, 4), zero + _key(key, 5)
    k6, k7 = zero + _key(key, 6), zero + _key(key, 7)
    x0, x1, x2, x3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = counter, zero, zero, zero
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    w0 = _joined(x0 + 0x61707865, x1 + 0x3320646E)
    w1 = _joined(x2 + 0x79622D32, x3 + 0x6B206574)
    w2, w3 = _joined(x4 + k0, x5 + k1), _joined(x6 + k2, x7 + k3)
    w4, w5 = _joined(x8 + k4, x9 + k5), _joined(x10 + k6, x11 + k7)
    w6, w7 = _joined(x12 + counter, x13), _joined(x14, x15)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _key(key, word: tl.constexpr):
    return tl.load(key + word).to(tl.uint32, bitcast=True)


@triton.jit
def _quarter(a, b, c, d):
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _rotated(word, BITS: tl.constexpr):
    return (word << BITS) | (word >> (32 - BITS))


@triton.jit
def _joined(low, high):
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _uniform(word):
    return ((word >> 12) | _ONE).to(tl.float64, bitcast=True)


@triton.jit
def _pair(radius_word, angle_word):
    radius = tl.sqrt(_squared_radius(_uniform(radius_word)))
    sine, cosine = _on_circle(_uniform(angle_word))
    return radius * sine, radius * cosine


@triton.jit
def _squared_radius(x):
    u = 2.0 - x
    bits = u.to(tl.uint64, bitcast=True)
    exponent = (bits - _HALF_ROOT + _ONE) >> 52
    f = (bits - (exponent << 52) + _ONE).to(tl.float64, bitcast=True) - 1.0
    e = (exponent | _WHOLE).to(tl.float64, bitcast=True) - 4503599627371519.0
    s = f / (f + 2.0)
    z = s * s
    p = z * 1.479819860511658591e-01 + 1.531383769920937332e-01
    p = p * z + 1.818357216161805012e-01
    p = p * z + 2.222219843214978396e-01
    p = p * z + 2.857142874366239149e-01
    p = p * z + 3.999999999940941908e-01
    p = p * z + 6.666666666666735130e-01
    r = p * z
    h = f * f * 0.5
    log = e * 6.93147180369123816490e-01 - ((h - ((h + r) * s + e * 1.90821492927058770002e-10)) - f)
    return log * -2.0


@triton.jit
def _on_circle(x):
    quarters = (x - 1.5) * 4.0
    rounded = quarters + _TURN
    quadrant = rounded.to(tl.uint64, bitcast=True)
    a = (quarters - (rounded - _TURN)) * 1.5707963267948966
    z = a * a
    p = z * 1.58969099521155010221e-10 + -2.50507602534068634195e-08
    p = p * z + 2.75573137070700676789e-06
    p = p * z + -1.98412698298579493134e-04
    p = p * z + 8.33333333332248946124e-03
    p = p * z + -1.66666666666666324348e-01
    along = p * z * a + a
    q = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    q = q * z + -2.75573143513906633035e-07
    q = q * z + 2.48015872894767294178e-05
    q = q * z + -1.38888888888741095749e-03
    q = q * z + 4.16666666666666019037e-02
    across = q * z * z - z * 0.5 + 1.0
    turned = (quadrant & 1) != 0
    sine = tl.where(turned, across, along)
    cosine = tl.where(turned, along, across)
    return _negated(sine, quadrant), _negated(cosine, quadrant + 1)


@triton.jit
def _negated(value, quadrant):
    return (value.to(tl.uint64, bitcast=True) ^ ((quadrant & 2) << 62)).to(tl.float64, bitcast=True)
