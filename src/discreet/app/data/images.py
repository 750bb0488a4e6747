"""Images: IDX files (``*-ubyte``, also gzipped) and folders with one folder of images per class.

Sizes, pixel ranges and folder names are facts about the format, and are treated as public; labels are not.

Shape legend: N = images, C = channels, H x W = pixels.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from discreet.app.data.labels import ClassList, public_classes, released_classes
from discreet.app.data.records import optional_import, read_bytes
from discreet.app.data.source import (
    IGNORED,
    Examples,
    ImageInput,
    Prepared,
    Request,
    Source,
    SourceKind,
    Task,
    count_statement,
    digest_of,
    held_out_statement,
)
from discreet.app.data.split import PublicCalibration, SetApart, is_test
from discreet.core.histogram import Counts, Names
from discreet.errors import ConfigError, DataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
_LABEL = "label"

PIXELS = [0, 255]
"""The range of a file's pixels, public, which is scaled to [-1, 1]; it stands so in the record of a run."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        pixels: uint8, shape (N, C, H, W).
        labels: name of each image's class.
    """

    pixels: Tensor
    labels: list[str]

    def split(self) -> tuple[ImageSet, ImageSet]:
        """Training and test images, told apart by `is_test` of pixels and label."""
        return self._apart(is_test)

    def set_apart(self, part: SetApart) -> tuple[ImageSet, ImageSet]:
        """Training images, and those that are kept for calibration."""
        return self._apart(part.of(len(self.labels)).holds)

    def _apart(self, chosen: Callable[[tuple[bytes, bytes]], bool]) -> tuple[ImageSet, ImageSet]:
        pixels = self.pixels.numpy()
        mask = np.fromiter(
            (
                chosen((image.tobytes(), label.encode("utf-8")))
                for image, label in zip(pixels, self.labels, strict=True)
            ),
            dtype=bool,
            count=len(self.labels),
        )
        return self._take(~mask), self._take(mask)

    def parts(self) -> Iterator[bytes]:
        """Everything that the images hold, in order, for a fingerprint."""
        yield repr(tuple(self.pixels.shape)).encode()
        yield self.pixels.numpy().tobytes()
        yield from (label.encode("utf-8", "surrogatepass") for label in self.labels)

    def _take(self, mask: np.ndarray) -> ImageSet:
        rows = np.flatnonzero(mask)
        return ImageSet(pixels=self.pixels[torch.from_numpy(rows)], labels=[self.labels[i] for i in rows])


class ImageSource(Source):
    """Labelled images of one size."""

    def __init__(
        self,
        *,
        path: Path,
        train: ImageSet,
        test: ImageSet | None,
        classes: ClassList | None,
        calibration: ImageSet | None = None,
    ) -> None:
        self._train, self._test, self._classes, self._calibration = train, test, classes, calibration
        for name, images in (("test", test), ("calibration", calibration)):
            if images is not None and images.pixels.shape[1:] != train.pixels.shape[1:]:
                raise DataError(f"{path}: {name} images are of another size than training images; give --image-size.")
        super().__init__(
            kind=SourceKind.IMAGES,
            path=path,
            examples=len(train.labels),
            request=Request(buckets={}, names={})
            if classes is not None
            else Request(buckets={}, names={_LABEL: Names(train.labels)}, classes=_LABEL),
            input_spec=ImageInput(*train.pixels.shape[1:]),
            calibration_examples=None if calibration is None else len(calibration.labels),
        )

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        others = [part for images in (self._test, self._calibration) if images is not None for part in images.parts()]
        return digest_of((repr(self._classes).encode(), *self._train.parts(), *others))

    def _encode(self, counts: Counts | None) -> Prepared:
        classes = self._classes
        if classes is None:
            assert counts is not None
            classes = released_classes(counts, column=_LABEL, path=self.path)

        def examples(images: ImageSet) -> Examples:
            return Examples(features=images.pixels, targets=classes.encode(images.labels))

        _, channels, height, width = self._train.pixels.shape
        size = ImageInput(channels=channels, height=height, width=width)
        scaled = f"Pixels are scaled from the public range 0..255 to -1..1; {channels} x {height} x {width} is public."
        test = None if self._test is None else examples(self._test)
        return Prepared(
            train=examples(self._train),
            test=test,
            calibration=None if self._calibration is None else examples(self._calibration),
            task=Task.CLASSIFICATION,
            classes=classes.names,
            input=size,
            record={
                "kind": self.kind.value,
                "image": {**size.to_json(), "range": PIXELS},
                "target": {"name": _LABEL, **classes.to_json()},
            },
            statements=(
                scaled,
                classes.statement,
                *count_statement(counts, columns=self.statistics),
                held_out_statement(test),
            ),
            private=counts is None or counts.private,
        )


def open_images(
    path: Path,
    *,
    test: Path | None,
    classes: int | Sequence[str] | None,
    image_size: tuple[int, int] | None,
    calibration: SetApart | PublicCalibration | None = None,
) -> ImageSource:
    """Read a folder of IDX files, or of one folder of images per class.

    Without ``test``, the ``t10k-*`` pair (IDX) or the folder ``test`` (images) is the test set; else one image in
    five, by a public hash of the image.
    """
    held_out: ImageSet | None
    public = calibration.path if isinstance(calibration, PublicCalibration) else None
    if _idx_files(path):
        train, held_out = _read_idx_folder(path)
        held_out = _read_idx_folder(test)[0] if test is not None else held_out
        apart = None if public is None else _read_idx_folder(public)[0]
        listed = None if classes is None else public_classes(classes)
        apart = None if apart is None else _rename(apart, listed)
        train, held_out = _rename(train, listed), None if held_out is None else _rename(held_out, listed)
    else:
        train, held_out, names = _read_class_folders(path, test=test, image_size=image_size)
        listed = public_classes(names if classes is None else classes)
        apart = None if public is None else _read_class_folders(public, test=None, image_size=image_size)[0]
    _check_labels(path, train, listed)
    if held_out is None:
        train, held_out = train.split()
    if isinstance(calibration, SetApart):
        train, apart = train.set_apart(calibration)
    return ImageSource(
        path=path, train=train, test=held_out if held_out.labels else None, classes=listed, calibration=apart
    )


def _rename(images: ImageSet, classes: ClassList | None) -> ImageSet:
    """IDX labels are numbers: where the classes have names, label i means the i-th name."""
    if classes is None or all(name.isdigit() for name in classes.names):
        return images
    names = dict(enumerate(classes.names))
    return ImageSet(pixels=images.pixels, labels=[names.get(int(label), label) for label in images.labels])


def _check_labels(path: Path, images: ImageSet, classes: ClassList | None) -> None:
    """Refuse labels that nothing can be learned from. The refusal tells one bit, to whoever has the images."""
    found = sorted(set(images.labels))
    if classes is None and len(found) < 2:
        raise DataError(f"{path}: one class only; needs at least 2; is it the right folder?")
    if classes is not None and (classes.encode(found) == IGNORED).all():
        raise DataError(f"{path}: no label is in the given class list; correct the list or the number of classes.")


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes (``00 00 08 rank``, then big-endian sizes, then data).

    Raises:
        DataError: truncated, another element type, or another number of bytes than the header says.
    """
    raw = read_bytes(path)
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{path}: not a complete gzip file; download or compress it again.") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or not 1 <= raw[3] <= 3:
        raise DataError(
            f"{path}: not an IDX file of unsigned bytes with rank 1 to 3; its first bytes must be 00 00 08 rank."
        )
    rank, start = raw[3], 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path}: cut off inside the IDX header; copy the file again.")
    shape = struct.unpack(f">{rank}I", raw[4:start])
    expected = math.prod(shape)
    if len(raw) - start != expected:
        raise DataError(f"{path}: {len(raw) - start} bytes of data, its header says {expected}; copy the file again.")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()


def _idx_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.name.removesuffix(".gz").endswith("-ubyte"))


def _read_idx_folder(path: Path) -> tuple[ImageSet, ImageSet | None]:
    files = _idx_files(path)
    test_files = [file for file in files if file.name.startswith(("t10k-", "test-"))]
    train_files = [file for file in files if file not in test_files]
    if not train_files:
        train_files, test_files = test_files, []
    return _read_pair(path, train_files), _read_pair(path, test_files) if test_files else None


def _read_pair(path: Path, files: Sequence[Path]) -> ImageSet:
    image_files = [file for file in files if "images" in file.name]
    label_files = [file for file in files if "labels" in file.name]
    if len(image_files) != 1 or len(label_files) != 1:
        raise DataError(
            f"{path}: {len(image_files)} image and {len(label_files)} label files of one set; needs one of each, e.g. "
            "train-images-idx3-ubyte and train-labels-idx1-ubyte."
        )
    pixels, labels = read_idx(image_files[0]), read_idx(label_files[0])
    if pixels.ndim != 3 or labels.ndim != 1:
        raise DataError(
            f"{path}: images of rank {pixels.ndim}, labels of rank {labels.ndim}; must be 3 and 1; are they swapped?"
        )
    if len(pixels) != len(labels):
        raise DataError(f"{label_files[0]}: {len(labels)} labels for {len(pixels)} images; they must be as many.")
    if pixels.size == 0:
        raise DataError(f"{image_files[0]}: no image; it needs one per example.")
    return ImageSet(pixels=torch.from_numpy(pixels).unsqueeze(1), labels=[str(label) for label in labels.tolist()])


def _read_class_folders(
    path: Path, *, test: Path | None, image_size: tuple[int, int] | None
) -> tuple[ImageSet, ImageSet | None, tuple[str, ...]]:
    train_folder = path / "train" if (path / "train").is_dir() else path
    inner = path / "test" if train_folder != path and (path / "test").is_dir() else None
    test_folder = test if test is not None else inner
    names = tuple(
        sorted(folder.name for folder in train_folder.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    )
    if len(names) < 2:
        raise DataError(
            f"{train_folder}: {len(names)} folders of classes, no *-ubyte files; needs IDX files, or a folder of "
            "images for each of at least 2 classes."
        )
    pillow = optional_import("PIL.Image", extra="images", purpose=f"{path}: reading image files")
    train = _read_folder(pillow, train_folder, names=names, image_size=image_size)
    if test_folder is None:
        return train, None, names
    return train, _read_folder(pillow, test_folder, names=names, image_size=image_size), names


def _read_folder(
    pillow: ModuleType, folder: Path, *, names: Sequence[str], image_size: tuple[int, int] | None
) -> ImageSet:
    arrays: list[np.ndarray] = []
    labels: list[str] = []
    for name in names:
        files = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for file in files:
            if file.suffix.lower() in _SUFFIXES:
                arrays.append(_read_image(pillow, file, image_size=image_size))
                labels.append(name)
                if arrays[-1].shape != arrays[0].shape:
                    raise DataError(
                        f"{file}: its size differs from the first image's; all must be equal: give --image-size."
                    )
    if not arrays:
        raise DataError(
            f"{folder}: no image file in the folders of the classes; supported are {', '.join(sorted(_SUFFIXES))}."
        )
    return ImageSet(pixels=torch.from_numpy(np.stack(arrays)), labels=labels)


def _read_image(pillow: ModuleType, file: Path, *, image_size: tuple[int, int] | None) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # A warning would tell of this one image: its size, a palette, that something was cut off.
            warnings.simplefilter("ignore")
            with pillow.open(io.BytesIO(read_bytes(file))) as image:
                # Always three channels: whether all images are grey is a fact about the private ones.
                colour = image.convert("RGB")
                if image_size is not None:
                    colour = colour.resize((image_size[1], image_size[0]))
                return np.asarray(colour).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError):
        raise DataError(f"{file}: not a readable image; save it again, or remove it.") from None


def check_image_size(image_size: tuple[int, int] | None) -> None:
    """Height and width must be positive, where given."""
    if image_size is not None and not all(1 <= side <= 4096 for side in image_size):
        raise ConfigError(
            f"image size {image_size[0]} x {image_size[1]}: sides must be 1 to 4096 pixels; e.g. 32 x 32."
        )
