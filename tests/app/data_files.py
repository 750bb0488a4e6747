"""Small files of made-up data for the tests of `discreet.app.data`."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from discreet.app.data import Prepared, Preprocessing, Source
from discreet.core.rng import NoiseSource

PREPROCESSING = Preprocessing(noise_multiplier=2.0, delta=1e-6)


def prepare(source: Source, *, seed: int = 0, preprocessing: Preprocessing = PREPROCESSING) -> Prepared:
    """Prepare with a test seed."""
    return source.prepare(noise_source=NoiseSource.insecure_seed(seed), preprocessing=preprocessing)


def table_rows(count: int, *, seed: int = 0) -> list[str]:
    """Rows of age, job, gain, flag, label."""
    draws = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        age = draws.integers(18, 80)
        job = draws.choice(["clerk", "smith", "baker"])
        gain = 0 if draws.random() < 0.8 else draws.integers(1000, 9000)
        flag = draws.integers(0, 2)
        rows.append(f"{age},{job},{gain},{flag},{'yes' if age + 30 * flag > 60 else 'no'}")
    return rows


def write(path: Path, text: str | bytes) -> Path:
    """Write and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(path: Path, count: int = 600, *, extra: tuple[str, ...] = ()) -> Path:
    """A CSV file with a header."""
    return write(path, "\n".join(["age,job,gain,flag,label", *table_rows(count), *extra]) + "\n")


def idx(values: np.ndarray) -> bytes:
    """The bytes of an IDX file of unsigned bytes."""
    header = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def idx_folder(folder: Path, *, train: int = 200, test: int | None = 50, zipped: bool = True) -> Path:
    """IDX files of 6 x 5 images in two classes."""
    draws = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        if count is not None:
            labels = np.arange(count) % 2
            images = draws.integers(0, 255, size=(count, 6, 5))
            for name, raw in (
                (f"{prefix}-images-idx3-ubyte", idx(images)),
                (f"{prefix}-labels-idx1-ubyte", idx(labels)),
            ):
                write(folder / (name + ".gz" if zipped else name), gzip.compress(raw) if zipped else raw)
    return folder
