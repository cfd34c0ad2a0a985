"""Images for the demonstration: the IDX reader, the held-out split, random shifts."""

import gzip
import importlib.util
import struct

import numpy as np
import pytest

from fastnorm._demo import data
from fastnorm._demo.errors import UserError

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


def idx(array, *, magic=None, shape=None):
    """The bytes of an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    return header + struct.pack(f">{array.ndim}I", *(shape or array.shape)) + array.astype(np.uint8).tobytes()


def write_set(folder, rng, *, n=40, n_test=20, side=6, compress=False, classes=3):
    """Four files as MNIST is published; returns the arrays by file name."""
    arrays = {}
    for prefix, count in (("train", n), ("t10k", n_test)):
        labels = np.arange(count) % classes
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side))
        arrays[f"{prefix}-labels-idx1-ubyte"] = labels
    for name, array in arrays.items():
        raw = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(raw) if compress else raw)
    return arrays


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_reads_idx(tmp_path, rng, compress):
    arrays = write_set(tmp_path, rng, compress=compress)
    loaded = data.load_idx(tmp_path)
    assert (loaded.name, loaded.image_shape, loaded.classes) == (tmp_path.name, (6, 6), 3)
    for prefix, split in (("train", loaded.train), ("t10k", loaded.test)):
        images, labels = arrays[f"{prefix}-images-idx3-ubyte"], arrays[f"{prefix}-labels-idx1-ubyte"]
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(split.images, (images.reshape(len(images), -1) / 255).astype(np.float32))
        np.testing.assert_array_equal(split.labels, labels)


def test_gzip_is_told_by_content_not_by_name(tmp_path, rng):
    array = rng.integers(0, 256, 5)
    (tmp_path / "named.gz").write_bytes(idx(array))
    (tmp_path / "plain").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "named.gz", 1), array)
    np.testing.assert_array_equal(data.read_idx(tmp_path / "plain", 1), array)


LABELS = np.arange(10)
DAMAGED = {
    "empty": (b"", "truncated: expected a header of 8 bytes, got 0"),
    "half a header": (idx(LABELS)[:6], "truncated: expected a header of 8 bytes, got 6"),
    "truncated": (idx(LABELS)[:-1], "truncated: expected 18 bytes for shape (10,), got 17"),
    "trailing": (idx(LABELS) + b"\0", "too long: expected 18 bytes for shape (10,), got 19"),
    "huge": (idx(LABELS, shape=(2**32 - 1,)), "truncated: expected 4294967303 bytes"),
    "wrong rank": (idx(LABELS.reshape(5, 2)), "expected magic number 00000801, got 00000802"),
    "wrong type": (idx(LABELS, magic=bytes([0, 0, 0x0D, 1])), "got 00000d01"),
    "no IDX": (b"<html>404</html>", "not an IDX file"),
    "truncated gzip": (gzip.compress(idx(np.arange(200)))[:-12], "truncated or damaged gzip file"),
    "gzip header only": (gzip.compress(idx(LABELS))[:5], "truncated or damaged gzip file"),
    "damaged gzip": (gzip.compress(idx(LABELS))[:-8] + bytes(8), "truncated or damaged gzip file"),
    "damaged stream": (gzip.compress(idx(LABELS))[:12] + b"\xff" * 20, "truncated or damaged gzip file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.read_idx(path, 1)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _replace(name, array):
    return lambda folder: (folder / name).write_bytes(idx(array))


INCONSISTENT = {
    "missing": (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
                "expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz there, found neither"),
    "labels of other length": (_replace("train-labels-idx1-ubyte", np.zeros(39)), "expected 40 labels"),
    "test images of other shape": (_replace("t10k-images-idx3-ubyte", np.zeros((20, 6, 7))),
                                   "expected test images of shape (6, 6)"),
    "test labels of other classes": (_replace("t10k-labels-idx1-ubyte", np.full(20, 3)),
                                     "expected test labels below 3"),
    "no images": (_replace("train-images-idx3-ubyte", np.zeros((0, 6, 6))), "expected 0 labels"),
    "no pixels": (_replace("train-images-idx3-ubyte", np.zeros((40, 0, 6))), "expected images, got shape (40, 0, 6)"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_inconsistent_files(tmp_path, rng, case):
    write_set(tmp_path, rng)
    spoil, message = INCONSISTENT[case]
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        data.load_idx(tmp_path)
    assert message in str(error.value)


def test_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        data.load_idx(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"):
        data.load_idx(tmp_path / "file")


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        data.read_idx(tmp_path, 1)


@needs_sklearn
def test_digits():
    digits = data.load_digits()
    assert len(digits.train) + len(digits.test) == 1797
    counts = np.bincount(digits.train.labels) / np.bincount(digits.test.labels)
    assert np.all((counts > 3.8) & (counts < 4.2))  # stratified: four to one in every class
    assert digits.train.images.min() == 0
    assert digits.train.images.max() == 1
    again = data.load_digits()
    np.testing.assert_array_equal(again.test.images, digits.test.images)
    assert again.fingerprint == digits.fingerprint


@needs_sklearn
def test_hold_out_leaves_the_test_set_alone():
    digits = data.load_digits()
    part = data.hold_out(digits, 5)
    assert len(part.train) + len(part.test) == len(digits.train)
    rows = {row.tobytes() for row in digits.test.images}
    assert not any(row.tobytes() in rows for row in part.test.images)
    assert part.fingerprint != digits.fingerprint


def test_hold_out_needs_enough(rng):
    few = data.Split(rng.random((4, 9), np.float32), np.arange(4))
    with pytest.raises(UserError, match="expected more than 2 training images of some class"):
        data.hold_out(data.Data("few", few, few, (3, 3), 4), 5)


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (5, 9)])
def test_shift_against_indices(rng, shape):
    """Every pixel, one by one, against the definition."""
    reach, (height, width) = data.max_shift(shape), shape
    images = rng.random((20, height * width), np.float32)
    dy, dx = rng.integers(-reach, reach, (2, 20), endpoint=True)
    expected = np.zeros((20, height, width), np.float32)
    for i, row, column in np.ndindex(20, height, width):
        if 0 <= row - dy[i] < height and 0 <= column - dx[i] < width:
            expected[i, row, column] = images[i].reshape(shape)[row - dy[i], column - dx[i]]
    np.testing.assert_array_equal(data.shift(images, shape, dy, dx), expected.reshape(20, -1))


def test_random_shifts(rng):
    images = rng.random((300, 64), np.float32)
    before = images.copy()
    first, again, other = (data.random_shifts(images, (8, 8), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(images, before)
    possible = [data.shift(images, (8, 8), dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    used = [np.all(first == candidate, axis=1).sum() for candidate in possible]
    assert sum(used) == 300  # each image is one of its nine shifts,
    assert min(used) > 10  # and all nine occur: 33 expected, 10 is four deviations below
