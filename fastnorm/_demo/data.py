"""Labeled images: scikit-learn's digits, IDX files (MNIST, Fashion-MNIST), stratified splits and random shifts.

Format of IDX files: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .._arrays import Array
from .errors import UserError, reason, require

UNSIGNED_BYTE = 0x08  # IDX code of the element type
GZIP_MAGIC = b"\x1f\x8b"
# The usual stratified hold-out, with its usual seed, fixed before any accuracy on it was seen. 359 test images make the
# standard error of an accuracy 0.7 %.
TEST_SHARE, SPLIT_SEED = 0.2, 0


@dataclass(frozen=True)
class Split:
    """Images as float32 rows in [0, 1], shape (N, height * width), and their labels, shape (N,), int64."""

    images: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Array) -> Split:
        """The rows that a mask or an index names."""
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Data:
    """A training set, the test set held out from it, and what both have in common."""

    name: str
    train: Split
    test: Split
    image_shape: tuple[int, int]
    classes: int

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of the training set, by which a checkpoint recognizes what it was trained on."""
        return zlib.crc32(self.train.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.train.images).data))


def middle_of_every(labels: Array, k: int) -> Array:
    """A stratified hold-out without a random number: mask of the middle one of every k rows of the same label.

    Examples
    --------
    >>> import numpy as np
    >>> middle_of_every(np.array([0, 0, 1, 0, 1, 1, 0]), 3)
    array([False,  True, False, False,  True, False, False])
    """
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[k // 2::k]] = True
    return mask


def hold_out(data: Data, k: int) -> Data:
    """The same data with one of every k training images of a class in place of the test set, which stays untouched."""
    mask = middle_of_every(data.train.labels, k)
    if not mask.any():
        raise UserError(f"{data.name}: expected more than {k // 2} training images of some class, "
                        f"to hold out one of {k}")
    return Data(data.name, data.train.take(~mask), data.train.take(mask), data.image_shape, data.classes)


def load_digits() -> Data:
    """scikit-learn's 1,797 scans of 8 x 8 handwritten digits; a fifth of each class is held out for the test."""
    bunch = require("sklearn.datasets", "scikit-learn").load_digits()
    everything = Split((bunch.data / 16.0).astype(np.float32), bunch.target.astype(np.int64))  # 17 gray levels
    train, test = require("sklearn.model_selection", "scikit-learn").train_test_split(
        np.arange(len(everything)), test_size=TEST_SHARE, stratify=everything.labels, random_state=SPLIT_SEED)
    return Data("digits", everything.take(np.sort(train)), everything.take(np.sort(test)), (8, 8), 10)


# -- IDX files ---------------------------------------------------------------------------------------------------------


def read_idx(path: Path, ndim: int) -> Array:
    """Read a whole IDX file of unsigned bytes with ``ndim`` dimensions, gzipped or not (told by its first bytes)."""
    try:
        raw = path.read_bytes()
        if raw[:2] == GZIP_MAGIC:
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({reason(error)})") from None
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    header = 4 + 4 * ndim
    magic = bytes([0, 0, UNSIGNED_BYTE, ndim])
    if raw[:4] != magic[:len(raw[:4])]:
        raise UserError(f"{path}: not an IDX file of unsigned bytes in {ndim} dimension{'s' * (ndim > 1)}: "
                        f"expected magic number {magic.hex()}, got {raw[:4].hex()}")
    if len(raw) < header:
        raise UserError(f"{path}: truncated: expected a header of {header} bytes, got {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, 4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        problem = "truncated" if len(raw) < expected else "too long"
        raise UserError(f"{path}: {problem}: expected {expected} bytes for shape {shape}, got {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    """The file of this name, or the gzipped one."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: expected {name} or {name}.gz there, found neither")


def _read_split(folder: Path, prefix: str) -> tuple[Array, Array]:
    image_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    label_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{label_path}: expected {len(images)} labels, one for each image of {image_path.name}, "
                        f"got {len(labels)}")
    if images.size == 0:
        raise UserError(f"{image_path}: expected images, got shape {images.shape}")
    return images, labels


def load_idx(folder: Path) -> Data:
    """MNIST, Fashion-MNIST or any other set published as the same four IDX files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a directory' if folder.exists() else 'no such directory'}")
    images, labels = _read_split(folder, "train")
    test_images, test_labels = _read_split(folder, "t10k")
    if len(images) < 2:
        raise UserError(f"{folder}: expected at least 2 training images, got {len(images)}")
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{folder}: expected test images of shape {images.shape[1:]} as in training, "
                        f"got {test_images.shape[1:]}")
    classes = int(labels.max()) + 1
    if test_labels.max() >= classes:
        raise UserError(f"{folder}: expected test labels below {classes} as in training, got {test_labels.max()}")

    def split(images: Array, labels: Array) -> Split:
        rows = images.reshape(len(images), -1).astype(np.float32)
        rows /= np.float32(255)
        return Split(rows, labels.astype(np.int64))

    return Data(folder.resolve().name, split(images, labels), split(test_images, test_labels),
                (images.shape[1], images.shape[2]), classes)


# -- augmentation ------------------------------------------------------------------------------------------------------


def max_shift(image_shape: tuple[int, int]) -> int:
    """How far an image is shifted at most: 1 pixel of 8, 2 pixels of 28."""
    return max(1, min(image_shape) // 14)


def shift(images: Array, image_shape: tuple[int, int], dy: Array | int, dx: Array | int) -> Array:
    """Shift each image by (dy, dx) pixels, down and right; what enters is black.

    Parameters
    ----------
    images : ndarray, (N, height * width)
    image_shape : (height, width)
    dy, dx : int or ndarray of int, (N,)
        Each at most `max_shift` in magnitude.

    Returns
    -------
    ndarray, (N, height * width)
        Fresh memory.

    Examples
    --------
    >>> import numpy as np
    >>> shift(np.array([[1., 2., 3., 4.]]), (2, 2), np.array([1]), np.array([0]))
    array([[0., 0., 1., 2.]])
    """
    n, (height, width), pad = len(images), image_shape, max_shift(image_shape)
    padded = np.zeros((n, height + 2 * pad, width + 2 * pad), images.dtype)
    padded[:, pad:pad + height, pad:pad + width] = images.reshape(n, height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, image_shape, axis=(1, 2))
    shifted: Array = windows[np.arange(n), pad - dy, pad - dx]
    return shifted.reshape(n, height * width)


def random_shifts(images: Array, image_shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Shift each image by an amount of its own, drawn uniformly in both directions."""
    reach = max_shift(image_shape)
    dy, dx = rng.integers(-reach, reach, size=(2, len(images)), endpoint=True)
    return shift(images, image_shape, dy, dx)
