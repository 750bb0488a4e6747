"""Published results, tried on pictures that anybody can tell apart; and scattering features against convolutions."""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.auto_lr import published, scattering

SIDE = 28


def _pictures(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes: a bright stripe at one of ten heights."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 10
    images = torch.randint(0, 60, (count, SIDE, SIDE), generator=generator)
    for row, target in enumerate(targets.tolist()):
        images[row, 2 * target + 3 : 2 * target + 6] = 250
    return images.to(torch.uint8), targets


def _write(folder: Path) -> None:
    folder.mkdir()
    for part, count in (("train", 600), ("t10k", 200)):
        images, targets = _pictures(count, seed=count)
        header = struct.pack(">IIII", 0x0803, count, SIDE, SIDE)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.numpy().tobytes()))
        header = struct.pack(">II", 0x0801, count)
        bare = targets.to(torch.uint8).numpy().tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bare))


def test_both_models_run_once_and_learn_what_is_easy(tmp_path, capsys):
    _write(tmp_path / "mnist")
    out = tmp_path / "rows.json"
    words = ["--data", str(tmp_path), "--out", str(out), "--sets", "mnist", "--steps", "80", "--contestants", "auto"]
    assert published.main(words) == 0
    rows = {row["model"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"scatter", "tanh"}
    assert rows["scatter"]["accuracy"] > 0.8
    for row in rows.values():
        assert row["accuracy"] > 0.2
        assert 0 < row["epsilon"] <= published.EPSILONS["mnist"]
        assert (row["delta"], row["updates"], row["examples"]) == (1e-5, 80, 600)
        assert row["probes"] == 3
    assert capsys.readouterr().out.count("published 0.98") == 2
    assert published.main(words) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert capsys.readouterr().out == ""


def test_the_tanh_network_is_that_of_the_paper():
    network = published.network("tanh")
    assert sum(parameter.numel() for parameter in network.parameters()) == 26_010
    assert network(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, 10)


def _convolved(image_SS: np.ndarray, filter_SS: np.ndarray) -> np.ndarray:
    """Circular convolution from its definition."""
    side = len(image_SS)
    out = np.zeros((side, side), dtype=np.complex128)
    for y in range(side):
        for x in range(side):
            out += filter_SS[y, x] * np.roll(image_SS, (y, x), axis=(0, 1))
    return out


def test_scattering_is_a_cascade_of_moduli_and_averages():
    """Orders 0 and 1 at the finest scale, and one path of order 2, from circular convolutions of whole pictures."""
    image = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bank = scattering.filters(SIDE, device=torch.device("cpu"))
    maps = scattering.scatter(image[None].float(), bank)[0].numpy()
    padded = np.pad(image.numpy(), bank.border[0], mode="reflect")
    low = scattering._gabor(bank.side, sigma=1.6, angle=0.0, frequency=0.0, slant=1.0)
    fine = scattering._morlet(bank.side, sigma=0.8, angle=3 * math.pi / 8, frequency=0.75 * math.pi, slant=0.5)
    coarse = scattering._morlet(bank.side, sigma=1.6, angle=3 * math.pi / 8, frequency=0.375 * math.pi, slant=0.5)

    def averaged(picture: np.ndarray) -> np.ndarray:
        return _convolved(picture, low).real[::4, ::4][1:-1, 1:-1]

    first = np.abs(_convolved(padded, fine))
    assert maps[0] == pytest.approx(averaged(padded), abs=1e-4)
    assert maps[1] == pytest.approx(averaged(first), abs=1e-4)
    # Sampling before the modulus leaves out what the coarse filter has above half the frequencies.
    assert maps[17] == pytest.approx(averaged(np.abs(_convolved(first, coarse))), abs=2e-3)


def test_wavelets_see_no_constant_and_the_average_keeps_it():
    bank = scattering.filters(SIDE, device=torch.device("cpu"))
    maps = scattering.scatter(torch.full((1, SIDE, SIDE), 0.7), bank)[0]
    assert maps.shape == (scattering.MAPS, 7, 7)
    assert maps[0].numpy() == pytest.approx(0.7, abs=1e-3)
    assert float(maps[1:].abs().max()) < 1e-3


def test_features_are_normalised_picture_by_picture():
    images, _ = _pictures(12, seed=1)
    together = scattering.features(images[:, None], chunk=5)
    alone = scattering.features(images[3:4, None])
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-4)
    groups = together.reshape(12, scattering.GROUPS, -1)
    assert float(groups.mean(2).abs().max()) < 1e-3
    variances = groups.var(2, unbiased=False)
    assert float(variances.max()) == pytest.approx(1.0, abs=0.01)
    assert float(variances.max()) <= 1.0


def test_features_are_those_of_kymatio(monkeypatch):
    special = pytest.importorskip("scipy.special")
    if getattr(special, "sph_harm", None) is None:
        monkeypatch.setattr(special, "sph_harm", None, raising=False)
    kymatio = pytest.importorskip("kymatio.torch", reason="kymatio is not installed")
    images = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    theirs = kymatio.Scattering2D(J=2, shape=(SIDE, SIDE))(images)
    ours = scattering.scatter(images, scattering.filters(SIDE, device=torch.device("cpu")))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
