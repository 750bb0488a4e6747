"""Draws are a function of their words, to the last bit: compiled, in numpy, and as they are defined."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from discreet.core import normal, rng

COUNTS = (1, 2, 3, 7, 255, 256, 257, 511, 512, 513, 1025, rng.PIECE - 1, rng.PIECE)
needs_compiled = pytest.mark.skipif(normal._compiled is None, reason="the compiled module was not built here")


@pytest.fixture(params=["compiled", "numpy"])
def either(request, monkeypatch) -> str:
    """Both implementations, in turn."""
    if request.param == "numpy":
        monkeypatch.setattr(normal, "_compiled", None)
    elif normal._compiled is None:
        pytest.skip("the compiled module was not built here")
    return request.param


def _words(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=(count + 1) // 2 * 2, dtype=np.uint64)


def _made(words: np.ndarray, count: int) -> np.ndarray:
    draws = np.full(count, np.nan)
    normal.fill(words, draws)
    return draws


@needs_compiled
@pytest.mark.parametrize("count", COUNTS)
def test_compiled_draws_have_the_bits_of_those_of_numpy(count):
    words = _words(count)
    assert np.array_equal(_made(words, count), normal._drawn(words, count))


def test_draws_are_box_muller_to_the_last_digits(either):
    """Against long doubles, whose logarithm and sine are right to 64 bits."""
    words = _words(20_000)
    draws = _made(words, 20_000).astype(np.longdouble)
    first, second = normal.uniform(words).astype(np.longdouble).reshape(2, -1)
    radius, turns = np.sqrt(-2 * np.log(2 - first)), second - np.longdouble(1.5)
    angle = 2 * np.longdouble("3.14159265358979323846264338327950288") * turns
    wanted = np.concatenate([radius * np.sin(angle), radius * np.cos(angle)])
    assert np.abs(draws - wanted).max() < 4e-15
    middle = np.abs(wanted) > 1e-3
    assert (np.abs(draws - wanted)[middle] / np.abs(wanted)[middle]).max() < 1e-12


@pytest.mark.parametrize(
    ("radius", "angle", "wanted"),
    [
        (0, 1 << 63, (0.0, 0.0)),  # the radius of the uniform 1: nothing
        (2**64 - 1, 1 << 63, (0.0, 8.490424416849509)),  # the largest radius, at angle 0
        (2**64 - 1, (1 << 63) + (1 << 62), (8.490424416849509, 0.0)),  # a quarter turn on
        (2**64 - 1, 1 << 62, (-8.490424416849509, 0.0)),  # a quarter turn back
        (2**64 - 1, 0, (0.0, -8.490424416849509)),  # half a turn
    ],
)
def test_the_ends_of_the_words_give_finite_draws(either, radius, angle, wanted):
    draws = _made(np.array([radius, angle], dtype=np.uint64), 2)
    np.testing.assert_allclose(draws, wanted, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 511, 1000])
def test_values_and_draws_meet_in_float64_and_are_rounded_once(either, count):
    words, value = _words(count), np.random.default_rng(1).normal(size=count).astype(np.float32)
    wanted = (value.astype(np.float64) * 0.01 + normal._drawn(words, count) * 0.3).astype(np.float32)
    target = np.zeros_like(value)
    normal.add(words, value, target, scale=0.3, share=0.01)
    assert np.array_equal(target, wanted)
    normal.add(words, value, value, scale=0.3, share=0.01)
    assert np.array_equal(value, wanted)


@needs_compiled
@pytest.mark.parametrize("count", [*COUNTS, rng.PIECE + 1, 3 * rng.PIECE + 5])
@pytest.mark.parametrize("start", [0, rng.PIECE, (1 << 33) * rng.PIECE])
def test_the_compiled_keystream_is_that_of_aes(count, start):
    """Against OpenSSL's, over counters of more than 32 bits too."""
    if not normal._compiled.has_cipher():
        pytest.skip("this processor has no AES instructions")
    key = hashlib.sha256(f"{count} {start}".encode()).digest()
    value = np.random.default_rng(1).normal(size=count).astype(np.float32)
    target, wanted, scratch = np.zeros_like(value), np.zeros_like(value), rng.Scratch()
    assert normal.add_keyed(key, start, value, target, piece=rng.PIECE, scale=0.3, share=0.01)
    for at in range(0, count, rng.PIECE):
        some = slice(at, at + rng.PIECE)
        words = rng._keystream(scratch, key, start + at, rng._words_of(len(value[some])))
        normal.add(words, value[some], wanted[some], scale=0.3, share=0.01)
    assert np.array_equal(target, wanted)


@needs_compiled
def test_memory_that_does_not_fit_is_refused():
    words, value, target = _words(10), np.zeros(10, np.float32), np.zeros(10, np.float32)
    for wrong in (
        lambda: normal.fill(words[:8], np.zeros(10)),
        lambda: normal.fill(words.astype(np.uint32), np.zeros(10)),
        lambda: normal.add(words, value[:9], target, scale=1.0, share=1.0),
        lambda: normal.add(words, value, target.astype(np.float64), scale=1.0, share=1.0),
        lambda: normal.add_keyed(bytes(16), 0, value, target, piece=rng.PIECE, scale=1.0, share=1.0),
        lambda: normal.add_keyed(bytes(32), 1, value, target, piece=rng.PIECE, scale=1.0, share=1.0),
        lambda: normal.add_keyed(bytes(32), 0, value, target, piece=0, scale=1.0, share=1.0),
    ):
        with pytest.raises((ValueError, BufferError)):
            wrong()
    assert not target.any()
