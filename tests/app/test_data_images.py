"""Images: IDX files and folders of classes, whole and damaged."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from app.data_files import PREPROCESSING, idx, idx_folder, prepare, write
from discreet.app.data import IGNORED, ImageInput, Preprocessing, SourceKind, open_source
from discreet.app.data.images import read_idx
from discreet.errors import ConfigError, DataError


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_pairs(tmp_path, zipped):
    source = open_source(idx_folder(tmp_path, zipped=zipped))
    assert source.kind is SourceKind.IMAGES
    assert source.examples == 200
    assert source.statistics == ("label",)
    prepared = prepare(source)
    assert source.input == prepared.input == ImageInput(channels=1, height=6, width=5)
    assert source.fingerprint() == open_source(tmp_path).fingerprint() != open_source(tmp_path, classes=2).fingerprint()
    assert prepared.classes == ("0", "1")
    assert len(prepared.test) == 50
    features, targets = prepared.train.batch(np.array([4, 5]))
    assert features.shape == (2, 1, 6, 5)
    assert features.dtype == torch.float32
    assert targets.tolist() == [0, 1]
    raw = prepared.train.features[4].to(torch.float32)
    assert torch.allclose(features[0], raw / 127.5 - 1, atol=1e-6)
    assert float(features.min()) >= -1
    assert float(features.max()) <= 1


def test_a_number_of_classes_needs_no_query(tmp_path):
    source = open_source(idx_folder(tmp_path), classes=2)
    assert source.queries(PREPROCESSING) == ()
    assert prepare(source).private


def test_names_for_the_numbers_of_idx_labels(tmp_path):
    prepared = prepare(open_source(idx_folder(tmp_path), classes=["cat", "dog"]))
    assert prepared.classes == ("cat", "dog")
    assert prepared.train.targets[:4].tolist() == [0, 1, 0, 1]


def test_without_a_test_pair_one_image_in_five_is_held_out(tmp_path):
    source = open_source(idx_folder(tmp_path, test=None), classes=2)
    assert 120 <= source.examples <= 185
    assert source.examples + len(prepare(source).test) == 200


def test_another_folder_as_test(tmp_path):
    train, test = idx_folder(tmp_path / "a"), idx_folder(tmp_path / "b", train=30)
    assert len(prepare(open_source(train, classes=2, test=test)).test) == 30


def test_a_rare_class_is_never_told(tmp_path):
    folder = idx_folder(tmp_path)
    labels = np.arange(200) % 2
    labels[7] = 77
    write(folder / "train-labels-idx1-ubyte.gz", gzip.compress(idx(labels)))
    prepared = prepare(open_source(folder), preprocessing=Preprocessing(noise_multiplier=2.0, delta=1e-6))
    assert prepared.classes == ("0", "1")
    assert int(prepared.train.targets[7]) == IGNORED
    assert "77" not in repr((prepared.record, prepared.statements))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("train-images-idx3-ubyte", b"", "not an IDX"),
        ("train-images-idx3-ubyte", b"\x00\x00\x0d\x03" + bytes(12), "not an IDX"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x09" + bytes(40), "not an IDX"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03\x00", "cut off"),
        ("train-images-idx3-ubyte", idx(np.zeros((200, 6, 5)))[:-1], "5999 bytes of data, its header says 6000"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03" + b"\xff" * 12, "header says"),
        ("train-images-idx3-ubyte", idx(np.zeros((199, 6, 5))), "200 labels for 199 images"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 6, 5))), "200 labels for 0 images"),
        ("train-images-idx3-ubyte", idx(np.zeros((200, 6))), "must be 3 and 1"),
        ("train-labels-idx1-ubyte", idx(np.zeros((200, 1, 1))), "must be 3 and 1"),
        ("train-labels-idx1-ubyte", idx(np.zeros(200)), "one class only"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((50, 7, 5))), "another size"),
    ],
)
def test_damaged_idx_files(tmp_path, name, raw, message):
    folder = idx_folder(tmp_path, zipped=False)
    write(folder / name, raw)
    with pytest.raises(DataError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: b"x" + raw, lambda raw: raw[:40] + b"??" + raw[42:]]
)
def test_damaged_gzip(tmp_path, damage):
    folder = idx_folder(tmp_path)
    file = folder / "train-images-idx3-ubyte.gz"
    write(file, damage(file.read_bytes()))
    with pytest.raises(DataError, match="not a complete gzip"):
        open_source(folder)


def test_a_lonely_idx_file(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", idx(np.zeros((2, 3, 3))))
    with pytest.raises(DataError, match="1 image and 0 label files"):
        open_source(tmp_path)


def test_class_numbers_out_of_range(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", idx(np.zeros((20, 3, 3))))
    write(tmp_path / "train-labels-idx1-ubyte", idx(np.full(20, 9)))
    with pytest.raises(DataError, match="no label is in the given class list"):
        open_source(tmp_path, classes=3)


def test_read_idx_keeps_every_value(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(read_idx(write(tmp_path / "x-ubyte", idx(values))), values)


# ---- folders of classes


def _folders(root, count=20, size=(6, 5), suffix=".png"):
    draws = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draws.integers(0, 255, size=(*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}{suffix}")
    return root


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("x.png", lambda path: Image.new("P", (5, 6)).save(path, transparency=bytes([1, 2]))),
        ("x.png", lambda path: Image.new("1", (10_000, 9_000)).save(path)),
        ("x.jpg", lambda path: Image.new("RGB", (5, 6)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0junk")),
    ],
    ids=["palette", "size", "cut"],
)
def test_nothing_is_said_of_a_single_image(tmp_path, recwarn, name, save):
    """Warnings are failures in these tests; the program would print them, with the number of pixels."""
    folder = _folders(tmp_path / "data")
    save(folder / "cat" / name)
    assert open_source(folder, image_size=(6, 5)).examples == open_source(folder, image_size=(6, 5)).examples
    assert [str(warning.message) for warning in recwarn] == []


def test_folders_are_public_classes(tmp_path):
    source = open_source(_folders(tmp_path))
    assert source.queries(PREPROCESSING) == ()
    prepared = prepare(source)
    assert prepared.classes == ("cat", "dog")
    assert prepared.input == ImageInput(channels=3, height=6, width=5)
    assert len(prepared.train) + len(prepared.test) == 40


def test_pixels_of_a_png_are_kept(tmp_path):
    folder = _folders(tmp_path)
    expected = np.asarray(Image.open(folder / "cat" / "0.png")).transpose(2, 0, 1)
    prepared = prepare(open_source(folder, test=folder))
    assert np.array_equal(prepared.train.features[0].numpy(), expected)


def test_train_and_test_folders(tmp_path):
    _folders(tmp_path / "train")
    _folders(tmp_path / "test", count=3)
    prepared = prepare(open_source(tmp_path))
    assert (len(prepared.train), len(prepared.test)) == (40, 6)


def test_a_class_called_test_is_a_class(tmp_path):
    folder = _folders(tmp_path)
    (folder / "dog").rename(folder / "test")
    assert prepare(open_source(folder)).classes == ("cat", "test")


def test_images_of_other_sizes(tmp_path):
    folder = _folders(tmp_path)
    Image.new("RGB", (9, 9)).save(folder / "dog" / "99.png")
    with pytest.raises(DataError, match="--image-size"):
        open_source(folder)
    assert prepare(open_source(folder, image_size=(4, 7))).input == ImageInput(channels=3, height=4, width=7)
    with pytest.raises(ConfigError, match="sides must be"):
        open_source(folder, image_size=(0, 7))


def test_a_broken_image(tmp_path):
    folder = _folders(tmp_path)
    write(folder / "cat" / "3.png", b"\x89PNG\r\n\x1a\nnot")
    with pytest.raises(DataError, match="not a readable image"):
        open_source(folder)


def test_folders_without_images(tmp_path):
    with pytest.raises(DataError, match="0 folders of classes"):
        open_source(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="no image file"):
        open_source(tmp_path)


@pytest.mark.slow
def test_fashion_mnist(data_dir):
    prepared = prepare(
        open_source(data_dir / "fashion_mnist"), preprocessing=Preprocessing.share(epsilon=3.0, delta=1e-5)
    )
    assert prepared.classes == tuple("0123456789")
    assert (len(prepared.train), len(prepared.test)) == (60000, 10000)
