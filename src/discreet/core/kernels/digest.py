"""Keyed digests of tensors where they lie: a processor would be sent all of them to hash a gigabyte a second.

A program reads one piece of a tensor, and writes two sums ``sum_i key_i word_i`` modulo 2^64, with keys that are a
function of a secret and of the place: of two tensors that differ, both sums of a piece are equal with a probability of
about 2^-64 (multilinear hashing, Lemire and Kaser 2014, arXiv:1202.4961, section 2).

Shape legend: P = pieces of all tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from discreet.core.kernels.operands import on_device_of

_PIECE = 8192
_WORDS = tl.constexpr(_PIECE)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


def digests(values: Sequence[Tensor], key: bytes) -> Tensor:
    """Two sums of each piece of these tensors, (P, 2), int64, in one launch.

    Args:
        values: contiguous, float32 or float64, on one device.
        key: 16 secret bytes.
    """
    rows, pieces = [], 0
    for value in values:
        words = value.numel() * value.element_size() // 4
        rows.append(struct.pack("<QQQ", value.data_ptr(), words, pieces))
        pieces += -(-words // _PIECE)
    # Keys and sizes are no arguments of the program, which would be compiled anew for some of them.
    table = torch.from_numpy(np.frombuffer(b"".join(rows) + key, dtype="<i8").copy())
    like = values[0]
    if like.is_cuda:
        table = table.pin_memory().to(like.device, non_blocking=True)
    out = torch.empty(pieces, 2, dtype=torch.int64, device=like.device)
    with on_device_of(like):
        _digest_kernel[(pieces,)](table, out, len(values), num_warps=4)
    return out


@triton.jit
def _digest_kernel(table, out, tensors):
    piece = tl.program_id(0)
    mine, after = 0, tensors
    while after - mine > 1:
        middle = (mine + after) // 2
        if tl.load(table + middle * 3 + 2) <= piece:
            mine = middle
        else:
            after = middle
    words = tl.load(table + mine * 3).to(tl.pointer_type(tl.int32))
    count = tl.load(table + mine * 3 + 1)
    first = (piece - tl.load(table + mine * 3 + 2)) * _WORDS
    lane = tl.arange(0, _WORDS)
    word = tl.load(words + first + lane, mask=first + lane < count, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    place = piece.to(tl.uint64) * _WORDS + lane.to(tl.uint64)
    for half in tl.static_range(2):
        seed = tl.load(table + tensors * 3 + half).to(tl.uint64, bitcast=True)
        # SplitMix64 (Steele, Lea and Flood 2014) of the place, from a secret beginning.
        mixed = seed + (place + 1) * _GOLDEN
        mixed = (mixed ^ (mixed >> 30)) * _FIRST
        mixed = (mixed ^ (mixed >> 27)) * _SECOND
        mixed = mixed ^ (mixed >> 31)
        tl.store(out + piece * 2 + half, tl.sum(word * mixed, axis=0).to(tl.int64, bitcast=True))
