"""Scattering features of images: wavelet moduli averaged over 2^J pixels, fixed beforehand and fitted to nobody's data.

J = 2 scales and L = 8 angles, orders 0 to 2: 81 maps (Oyallon & Mallat; used for private learning by Tramer & Boneh,
arXiv:2011.11660, section 3.2). Filters and borders are those of kymatio 0.3 (`Scattering2D(J=2, shape)`), written out
because that package does not import beside SciPy 1.17; a test compares the two where it does.

Shape legend: N = images, F = filters, S = side after padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SCALES, ANGLES = 2, 8
MAPS = 1 + SCALES * ANGLES + ANGLES**2
GROUPS = 27
"""Maps are normalised in so many groups, as Tramer & Boneh do for linear models."""


def features(images: Tensor, *, chunk: int = 2048) -> Tensor:
    """Normalised scattering features of each image by itself.

    Each group of maps of each image has mean 0 and variance 1 (a group norm): nothing is learned from other images.

    Args:
        images: uint8, shape (N, 1, side, side), on any device; side a multiple of 4.
        chunk: images at a time.

    Returns:
        float32, shape (N, 81, side / 4, side / 4), on the same device.
    """
    bank = filters(images.shape[-1], device=images.device)
    parts = []
    for some in images.split(chunk):
        maps = scatter(some[:, 0].to(torch.float32) / 255.0, bank)
        parts.append(F.group_norm(maps, GROUPS))
    return torch.cat(parts)


@dataclass(frozen=True)
class Bank:
    """Filters in the Fourier domain, real.

    Attributes:
        low: of the low-pass filter at sides S, S/2, S/4. wavelets: of scale j at the sides from which it is applied:
            ``wavelets[j][r]``, shape (ANGLES, S / 2^r, S / 2^r).
        side: S. border: pixels added on each side.
    """

    low: list[Tensor]
    wavelets: list[list[Tensor]]
    side: int
    border: tuple[int, int]


def filters(side: int, *, device: torch.device) -> Bank:
    """Morlet wavelets and a Gaussian, for images of this side."""
    unit = 2**SCALES
    padded = ((side + unit) // unit + 1) * unit
    border = ((padded - side) // 2, (padded - side + 1) // 2)

    def on_device(filter_SS: np.ndarray, resolution: int) -> Tensor:
        spectrum = np.real(np.fft.fft2(filter_SS))
        return torch.from_numpy(_periodised(spectrum, resolution)).to(device, torch.float32)

    low = _gabor(padded, sigma=0.8 * 2 ** (SCALES - 1), angle=0.0, frequency=0.0, slant=1.0)
    wavelets = []
    for scale in range(SCALES):
        drawn = [
            _morlet(
                padded,
                sigma=0.8 * 2**scale,
                angle=(ANGLES // 2 - 1 - turn) * math.pi / ANGLES,
                frequency=0.75 * math.pi / 2**scale,
                slant=4.0 / ANGLES,
            )
            for turn in range(ANGLES)
        ]
        wavelets.append(
            [torch.stack([on_device(wavelet, resolution) for wavelet in drawn]) for resolution in range(scale + 1)]
        )
    return Bank([on_device(low, resolution) for resolution in range(SCALES + 1)], wavelets, padded, border)


def scatter(images_NSS: Tensor, bank: Bank) -> Tensor:
    """Orders 0, 1 and 2, shape (N, 81, side / 4, side / 4); the second order takes each scale after a smaller one."""
    before, after = bank.border
    padded = F.pad(images_NSS[:, None], (before, after, before, after), mode="reflect")
    spectrum_N1SS = torch.fft.fft2(padded)
    maps = [_averaged(spectrum_N1SS, bank, resolution=0)]
    for scale in range(SCALES):
        first = _modulus(spectrum_N1SS, bank.wavelets[scale][0], shrink=2**scale)
        maps.append(_averaged(first, bank, resolution=scale))
    finest = _modulus(spectrum_N1SS, bank.wavelets[0][0], shrink=1)
    second = _modulus(finest.unsqueeze(2), bank.wavelets[1][0], shrink=2)
    maps.append(_averaged(second.flatten(1, 2), bank, resolution=1))
    return torch.cat(maps, 1)


def _modulus(spectrum: Tensor, wavelets_FSS: Tensor, *, shrink: int) -> Tensor:
    """Spectrum of ``|x * psi|``, sampled at every ``shrink``-th pixel."""
    return torch.fft.fft2(torch.fft.ifft2(_sampled(spectrum * wavelets_FSS, shrink)).abs())


def _averaged(spectrum_NFSS: Tensor, bank: Bank, *, resolution: int) -> Tensor:
    """``x * phi`` at every 2^J-th pixel of the image, without the border."""
    low = _sampled(spectrum_NFSS * bank.low[resolution], 2 ** (SCALES - resolution))
    return torch.fft.ifft2(low).real[..., 1:-1, 1:-1]


def _sampled(spectrum: Tensor, every: int) -> Tensor:
    """Spectrum of every so-many-th pixel: its copies, averaged."""
    if every == 1:
        return spectrum
    height, width = spectrum.shape[-2:]
    folded = spectrum.reshape(*spectrum.shape[:-2], every, height // every, every, width // every)
    return folded.mean((-4, -2))


def _periodised(spectrum_SS: np.ndarray, resolution: int) -> np.ndarray:
    """The filter at half the side, ``resolution`` times: high frequencies are cut, the copies added."""
    side, every = len(spectrum_SS), 2**resolution
    keep = np.ones(side)
    cut = int(side * (1 - 1 / every))
    keep[int(side / (2 * every)) :][:cut] = 0.0
    kept = spectrum_SS * keep[:, None] * keep[None, :]
    return kept.reshape(every, side // every, every, side // every).sum((0, 2))


def _gabor(side: int, *, sigma: float, angle: float, frequency: float, slant: float) -> np.ndarray:
    """A Gaussian that is ``1 / slant`` times as long across its wave, times that wave; periodic, shape (S, S)."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    curve = turn @ np.diag([1.0, slant**2]) @ turn.T / (2 * sigma**2)
    total = np.zeros((side, side), dtype=np.complex128)
    for down in range(-2, 3):
        for right in range(-2, 3):
            y, x = np.mgrid[down * side : (down + 1) * side, right * side : (right + 1) * side].astype(np.float64)
            envelope = curve[0, 0] * y * y + 2 * curve[0, 1] * y * x + curve[1, 1] * x * x
            total += np.exp(-envelope + 1j * frequency * (y * math.cos(angle) + x * math.sin(angle)))
    return total * slant / (2 * math.pi * sigma**2)


def _morlet(side: int, *, sigma: float, angle: float, frequency: float, slant: float) -> np.ndarray:
    """The same less so much of its envelope that its mean is zero."""
    wave = _gabor(side, sigma=sigma, angle=angle, frequency=frequency, slant=slant)
    envelope = _gabor(side, sigma=sigma, angle=angle, frequency=0.0, slant=slant)
    return wave - wave.sum() / envelope.sum() * envelope
