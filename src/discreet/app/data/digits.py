"""The bundled digits of scikit-learn: a small public data set for demonstrations."""

from __future__ import annotations

import numpy as np
import torch

from discreet.app.data.records import optional_import
from discreet.app.data.source import Examples, ImageInput, Prepared, SourceKind, Task
from discreet.app.data.split import SetApart, is_test

_LARGEST = 16


def digits(calibration: SetApart | None = None) -> Prepared:
    """1,797 images of 8 x 8 pixels in ten classes, scaled by their public range 0..16; nothing is counted privately.

    Args:
        calibration: a part of the training images to be set apart for a temperature.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    datasets = optional_import("sklearn.datasets", extra="demo", purpose="the digits demo")
    bundle = datasets.load_digits()
    pixels = torch.from_numpy(np.ascontiguousarray(bundle.images, dtype=np.float32))
    features = (pixels * (2.0 / _LARGEST) - 1.0).unsqueeze(1)
    targets = torch.from_numpy(bundle.target.astype(np.int64))
    held_out = torch.tensor(
        [is_test((image.numpy().tobytes(), bytes([label]))) for image, label in zip(pixels, targets, strict=True)]
    )
    kept = torch.zeros_like(held_out)
    if calibration is not None:
        rows = zip(pixels, targets, strict=True)
        calibration = calibration.of(int((~held_out).sum()))
        kept = torch.tensor([calibration.holds((image.numpy().tobytes(), bytes([label]))) for image, label in rows])
    train, kept = ~held_out & ~kept, ~held_out & kept
    size = ImageInput(channels=1, height=8, width=8)
    names = tuple(str(digit) for digit in range(10))
    return Prepared(
        train=Examples(features=features[train], targets=targets[train]),
        test=Examples(features=features[held_out], targets=targets[held_out]),
        task=Task.CLASSIFICATION,
        classes=names,
        input=size,
        record={
            "kind": SourceKind.IMAGES.value,
            "image": {**size.to_json(), "range": [0, _LARGEST]},
            "target": {"name": "digit", "classes": list(names), "source": "public"},
        },
        statements=("Pixels are scaled from the public range 0..16 to -1..1; the ten classes are public.",),
        private=True,
        calibration=None if calibration is None else Examples(features=features[kept], targets=targets[kept]),
    )
