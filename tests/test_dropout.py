"""Dropout: the published vectors of Philox, the same mask everywhere, the right rate; corners; errors."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import LAYOUTS, TAILS, assert_unchanged, snapshot

import fastnorm as fn
from fastnorm._runtime import kernels
from fastnorm.reference import activations as reference

# Known answers for philox4x32-10 published with Random123 (kat_vectors): counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_words(level, counter, key, words):
    assert kernels.activation.philox(counter, key) == words
    twin = reference.philox4x32(np.array(counter, np.uint32).reshape(4, 1), key)
    assert tuple(twin[:, 0]) == words


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 2), ((1 << 64) - 1, (1 << 64) - 1), (0xA409382229, 1 << 40)])
def test_words_and_elements(level, seed, offset):
    """Element i takes word i % 4 of the block with counter (i // 4, offset) and key seed, low halves first."""
    x = np.ones(1003)
    low = 0xFFFFFFFF
    words = np.concatenate([kernels.activation.philox((i, 0, offset & low, offset >> 32), (seed & low, seed >> 32))
                            for i in range(251)])[:1003]
    np.testing.assert_array_equal(reference.random_words(1003, seed, offset), words)
    for p in (0.1, 0.5, 0.9):
        np.testing.assert_array_equal(fn.dropout(x, p, seed=seed, offset=offset) != 0, words >= int(p * 2**32))


def test_counters_above_32_bits(level):
    """Element numbers that no array here reaches, through the kernel itself: in one run across 2**34, and far apart."""
    def words(numbers):
        return [kernels.activation.philox((i // 4 & 0xFFFFFFFF, i // 4 >> 32, 0, 0), (7, 0))[i % 4] for i in numbers]

    x, y = np.ones(400), np.empty(400)
    first = (1 << 34) - 102
    kernels.activation.dropout(x, y, 2.0, 1 << 31, 7, 0, (2, 200), (first, 1), 1)
    expected = np.array(words([*range(200), *range(first, first + 200)])) >= 1 << 31
    np.testing.assert_array_equal(y != 0, expected)
    step = (1 << 33) + 3
    kernels.activation.dropout(x, y, 2.0, 1 << 31, 7, 0, (400,), (step,), 1)
    np.testing.assert_array_equal(y != 0, np.array(words(range(0, 400 * step, step))) >= 1 << 31)


def expected_mask(shape, p, seed, offset):
    return (reference.random_words(int(np.prod(shape)), seed, offset) >= int(p * 2**32)).reshape(shape)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 9), (1, 1, 1), (4, 3), (40,), (2, 3, 4, 5, 6)])
def test_layouts(level, dtype, layout, rng, shape):
    """One mask for one logical array, whatever its layout, from the kernel and from the twin."""
    x = layout(rng.uniform(0.5, 2, size=shape).astype(dtype))
    y = fn.dropout(x, 0.4, seed=5, offset=9)
    mask = expected_mask(shape, 0.4, 5, 9)
    np.testing.assert_array_equal(y != 0, mask)
    scale = dtype.type(1 / (1 - 0.4))
    np.testing.assert_array_equal(y, np.where(mask, x * scale, 0))
    twin = reference.dropout(x, 0.4, seed=5, offset=9)
    np.testing.assert_array_equal(twin != 0, mask)
    # scale rounded to dtype, and the product: half an ulp each
    np.testing.assert_allclose(y, twin, rtol=np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_every_axis_order(level, axes):
    """Runs of every length and stride, over several tiles."""
    shape = (67, 5, 129)
    memory = np.ones([shape[i] for i in axes], np.float32)
    x = memory.transpose(np.argsort(axes))
    assert x.shape == shape
    y = fn.dropout(x, 0.3, seed=1, offset=2)
    assert y.strides == x.strides
    np.testing.assert_array_equal(y != 0, expected_mask(shape, 0.3, 1, 2))


@pytest.mark.parametrize("n", TAILS)
def test_tails(level, dtype, n):
    np.testing.assert_array_equal(fn.dropout(np.ones(n, dtype), 0.5, seed=3) != 0, expected_mask((n,), 0.5, 3, 0))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_tiny_shapes(dtype, shape):
    for backend in (fn, reference):
        y = backend.dropout(np.ones(shape, dtype), 0.5, seed=0)
        assert y.shape == shape
        assert y.dtype == dtype
        assert np.all((y == 0) | (y == 2))


def test_threads_give_the_same_bits(level, threads, rng):
    x = rng.uniform(0.5, 1, size=(9, 16384)).astype(np.float32)
    mask = expected_mask(x.shape, 0.5, 11, 0)
    for a in (x, np.asfortranarray(x)):
        np.testing.assert_array_equal(fn.dropout(a, 0.5, seed=11), np.where(mask, 2 * x, 0))


def test_streaming_output(dtype, rng):
    """Above the size where streaming stores begin, at an address that is no line's boundary."""
    n = (9 << 20) // dtype.itemsize
    memory = np.full(n + 8, 7, dtype)
    fn.dropout(np.ones(n, dtype), 0.5, seed=1, out=memory[3:-5])
    np.testing.assert_array_equal(memory[3:-5], 2 * expected_mask((n,), 0.5, 1, 0))
    assert np.all(memory[:3] == 7)
    assert np.all(memory[-5:] == 7)


def test_backward_regenerates_the_mask(level, dtype, rng):
    """In another layout too: the mask belongs to the logical array."""
    x = rng.uniform(0.5, 2, size=(6, 7, 8)).astype(dtype)
    y = fn.dropout(x, 0.4, seed=2, offset=3)
    for make in LAYOUTS.values():
        dy = make(np.ones_like(x))
        dx = fn.dropout_backward(dy, 0.4, seed=2, offset=3)
        np.testing.assert_array_equal(dx, np.where(y != 0, dtype.type(1 / 0.6), 0))
        np.testing.assert_array_equal(reference.dropout_backward(dy, 0.4, seed=2, offset=3) != 0, y != 0)


def test_in_place(dtype, layout, rng):
    x = rng.normal(size=(3, 4, 5)).astype(dtype)
    for function in (fn.dropout, fn.dropout_backward):
        expected = function(x, 0.5, seed=1)
        work = layout(x)
        assert function(work, 0.5, seed=1, out=work) is work
        np.testing.assert_array_equal(work, expected)


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_rate_and_mean(p):
    """The number kept is binomial: within 5 standard deviations; the expected value of the output is the input."""
    n = 1 << 20
    y = fn.dropout(np.ones(n), p, seed=12345)
    kept = np.count_nonzero(y)
    deviation = np.sqrt(n * p * (1 - p))
    assert abs(kept - n * (1 - p)) < 5 * deviation
    np.testing.assert_allclose(y.mean(), 1, atol=5 * deviation / n / (1 - p))


def test_seeds_and_offsets_are_independent():
    """Two masks of p = 1/2 agree on half of the elements: within 5 standard deviations."""
    n = 1 << 18
    masks = [fn.dropout(np.ones(n), 0.5, seed=seed, offset=offset) != 0
             for seed, offset in [(0, 0), (1, 0), (1 << 32, 0), (0, 1), (0, 1 << 32), (1, 1)]]
    masks.append(np.roll(masks[0], 1))  # neighbours are independent too
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(np.count_nonzero(a == b) - n / 2) < 5 * np.sqrt(n) / 2


# -- corners and errors ------------------------------------------------------------------------------------------------


def test_extreme_probabilities(level, dtype):
    x = np.array([1.5, -2.0, 3.0], dtype)
    for backend in (fn, reference):
        np.testing.assert_array_equal(backend.dropout(x, 0, seed=0), x)
        np.testing.assert_array_equal(backend.dropout(x, 1, seed=0), [0, 0, 0])
        np.testing.assert_array_equal(backend.dropout_backward(x, 1.0, seed=0), [0, 0, 0])


def test_nan_and_infinity_do_not_vanish(level, dtype):
    x = np.tile(np.array([np.nan, np.inf], dtype), 50)
    for backend in (fn, reference):
        y = backend.dropout(x, 0.5, seed=0)
        kept = expected_mask(x.shape, 0.5, 0, 0)
        np.testing.assert_array_equal(y, np.where(kept, x, np.nan))


READ_ONLY = np.ones(3, np.float32)
READ_ONLY.flags.writeable = False
BASE = np.ones(4, np.float32)

ERRORS = [
    ("list", {"x": [1.0]}, TypeError, "{x}: expected a numpy.ndarray, got list"),
    ("dtype", {"x": np.ones(3, np.float16)}, TypeError, "{x}: expected dtype float32 or float64, got float16"),
    ("p above", {"p": 1.5}, ValueError, "p: expected a number in [0, 1], got 1.5"),
    ("p below", {"p": -0.1}, ValueError, "p: expected a number in [0, 1], got -0.1"),
    ("p NaN", {"p": np.nan}, ValueError, "p: expected a number in [0, 1], got nan"),
    ("p kind", {"p": "0.5"}, TypeError, "p: expected a real number, got str"),
    ("seed kind", {"seed": 1.0}, TypeError, "seed: expected an integer, got float"),
    ("seed bool", {"seed": True}, TypeError, "seed: expected an integer, got bool"),
    ("seed below", {"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    ("seed above", {"seed": 1 << 64}, ValueError, "seed: expected an integer < 2**64"),
    ("offset kind", {"offset": None}, TypeError, "offset: expected an integer, got NoneType"),
    ("offset below", {"offset": -1}, ValueError, "offset: expected an integer >= 0, got -1"),
    ("offset above", {"offset": 1 << 64}, ValueError, "offset: expected an integer < 2**64"),
    ("out shape", {"out": np.ones(4, np.float32)}, ValueError, "out: expected shape (3,), got (4,)"),
    ("out dtype", {"out": np.ones(3)}, TypeError, "out: expected dtype float32, got float64"),
    ("out read-only", {"out": READ_ONLY}, ValueError, "out: expected a writeable array"),
    ("out overlap", {"x": BASE[:3], "out": BASE[1:]}, ValueError, "partial overlap with {x}"),
]


@pytest.mark.parametrize("backend", [fn, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize(("name", "argument"), [("dropout", "x"), ("dropout_backward", "dy")])
@pytest.mark.parametrize(("changes", "exception", "message"), [row[1:] for row in ERRORS],
                         ids=[row[0] for row in ERRORS])
def test_errors(backend, name, argument, changes, exception, message):
    arguments = {"x": np.ones(3, np.float32), "p": 0.5, "seed": 0, "offset": 0, "out": np.ones(3, np.float32)} | changes
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    before = snapshot(*arrays)
    x, p = arguments.pop("x"), arguments.pop("p")
    with pytest.raises(exception) as caught:
        getattr(backend, name)(x, p, **arguments)
    assert message.format(x=argument) in str(caught.value)
    assert_unchanged(before, *arrays)


def test_seed_is_required():
    with pytest.raises(TypeError, match="seed"):
        fn.dropout(np.ones(3), 0.5)
