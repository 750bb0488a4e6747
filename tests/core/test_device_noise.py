"""Noise where the sums are: the cipher is ChaCha20, and a kernel adds the very bits that its definition does.

Without a GPU the kernel runs in Triton's interpreter (``TRITON_INTERPRET=1``, set in tests/conftest.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contracts.products import needs_triton
from discreet.core import chacha, noise
from discreet.core.clipping import ClippedSum
from discreet.core.kernels import dispatch
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = (1, 2, 2047, 2048, 2049, 7000)
KINDS = ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float32))


@pytest.mark.parametrize(
    ("key", "first", "hexadecimal"),
    [  # RFC 8439, appendix A.1, test vectors 1, 2 and 4
        (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(32), 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (bytes([0, 0xFF, *[0] * 30]), 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
    ],
)
def test_the_keystream_is_that_of_rfc_8439(key, first, hexadecimal):
    assert chacha._blocks(key, first)[:4].astype("<u8").tobytes().hex() == hexadecimal


def test_a_tensor_beyond_the_counter_is_not_drawn():
    with pytest.raises(ConfigError, match="split it"):
        chacha.piece(bytes(32), 2**32 // chacha.LANES)


@needs_triton
def test_the_kernel_does_not_draw_it_either():
    huge = torch.empty(1, device="meta").expand(chacha.LARGEST + 1)
    with pytest.raises(ConfigError, match="split it"):
        dispatch.add_noise({"w": huge}, {"w": huge}, keys={"w": (bytes(32),)}, scales={"w": 1.0}, share=1.0)


def _sums(kind: tuple[torch.dtype, torch.dtype]) -> dict[str, torch.Tensor]:
    return {f"w{count}": torch.randn(count, dtype=kind[0]) for count in (*COUNTS, 0)}


def _wanted(value: torch.Tensor, keys: tuple[bytes, ...], scale: float, share: float, dtype: torch.dtype):
    draws = [
        np.concatenate([chacha.piece(key, number) for number in range(len(value) // chacha.PIECE + 1)]) for key in keys
    ]
    one = (draws[1] + draws[0]) * np.sqrt(0.5) if len(draws) == 2 else draws[0]
    return torch.from_numpy(value.double().numpy() * share + one[: len(value)] * scale).to(dtype)


@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_kernel_adds_the_bits_of_the_definition(kind, in_place):
    values = _sums(kind)
    keys = {
        name: tuple(bytes([at, layer, *range(30)]) for layer in range(1 + (kind[1] is torch.float64)))
        for at, name in enumerate(values)
    }
    scales = {name: 0.1 + at for at, name in enumerate(values)}
    wanted = {n: _wanted(value, keys[n], scales[n], 0.3, kind[1]) for n, value in values.items() if len(value)}
    there = {name: value.to(DEVICE) for name, value in values.items()}
    in_place &= kind[0] is kind[1]
    targets = there if in_place else {n: torch.full_like(v, torch.nan, dtype=kind[1]) for n, v in there.items()}
    dispatch.add_noise(there, targets, keys=keys, scales=scales, share=0.3)
    for name, value in wanted.items():
        assert torch.equal(targets[name].cpu(), value), name


@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_release_has_the_same_bits_with_a_kernel_and_without(kind, monkeypatch):
    sums = {"a": torch.randn(50, 43, dtype=kind[0]), "b": torch.randn(43, 50, dtype=kind[0]).T, "c": torch.zeros(0)}
    total = ClippedSum({n: v.to(DEVICE) for n, v in sums.items()}, 0.7, noise_weights={"b": 2.0})
    into = {name: torch.zeros(value.shape, dtype=kind[1], device=DEVICE) for name, value in sums.items()}
    monkeypatch.setattr(noise, "_on_host", lambda value: False)
    monkeypatch.setattr(dispatch, "_on_accelerator", lambda value: True)
    found = []
    for with_kernel in (True, False):
        if not with_kernel:
            monkeypatch.setattr(dispatch, "_found", lambda: False)
        source = NoiseSource.insecure_seed(3)
        released = release(total, noise_multiplier=1.3, source=source, divisor=48.0, into=into)
        found.append({name: value.clone() for name, value in released.tensors.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in sums)
    noise_b = found[0]["b"].cpu().double() - sums["b"].double() / 48
    assert 0.9 < float(noise_b.std()) / (2 * 1.3 * 0.7 / 48) < 1.1
