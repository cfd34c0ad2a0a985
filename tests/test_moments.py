"""Moments: against the twin, merging, standardization, errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import assert_close, assert_unchanged, snapshot

import fastnorm as fn
from fastnorm import reference

SHAPES = [((5, 3), 1), ((64, 33), 0), ((3, 4, 7, 7), 1), ((2, 5, 20, 20), 1), ((6, 2, 3), -1), ((1, 3), 1),
          ((40000, 11), 1), ((2, 3, 120000), 1)]


def assert_same_moments(a, b, *, ulps=16):
    assert a.count == b.count
    deviation = np.sqrt(b.var()) + np.abs(b.mean)
    assert_close(a.mean, b.mean, ulps=ulps, scale=deviation)
    assert_close(a.var(), b.var(), ulps=ulps, scale=b.var() + deviation * np.abs(b.mean) * 2.0**-50)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_float64_equals_twin(level, threads, layout, shape, axis, rng):
    x = layout(rng.standard_normal(shape) + 3)
    fast, slow = fn.Moments(axis), reference.Moments(axis)
    for m in (fast, slow):
        m.update(x)
        m.update(x)
    assert_same_moments(fast, slow)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("mean", [0, 1e4])
def test_float32_equals_twin(level, shape, axis, mean, rng):
    """Float sums of 64 values a partial sum: their error, in float32 ulps of a deviation and of the variance."""
    x = (rng.standard_normal(shape) + mean).astype(np.float32)
    fast, slow = fn.Moments(axis), reference.Moments(axis)
    fast.update(x)
    slow.update(x)
    assert np.all(np.abs(fast.mean - slow.mean) <= 4 * 2.0**-24 * (np.sqrt(slow.var()) + 2.0**-20))
    assert np.all(np.abs(fast.var() - slow.var()) <= 8 * 2.0**-23 * slow.var())


def test_any_cut_gives_the_same_moments(rng):
    x = rng.standard_normal((1000, 7)) * 3 + 100
    whole = fn.Moments()
    whole.update(x)
    for cuts in ([1], [500], [3, 4, 999], list(range(100, 1000, 100))):
        parts = fn.Moments()
        for part in np.split(x, cuts):
            parts.update(part)
        assert_same_moments(parts, whole)
        workers = [fn.Moments() for _ in range(len(cuts) + 1)]
        for worker, part in zip(workers, np.split(x, cuts), strict=True):
            worker.update(part)
        merged = fn.Moments()
        for worker in workers:
            merged.merge(worker)
        assert_same_moments(merged, whole)
    columns = np.ascontiguousarray(x.T)  # NumPy adds pairwise along contiguous rows only
    assert_close(whole.mean, columns.mean(1), ulps=4)
    assert_close(whole.var(ddof=1), columns.var(1, ddof=1), ulps=64)


def test_exact_data():
    m = fn.Moments()
    for size in (3, 1):  # each batch is balanced, so that every mean on the way is representable
        m.update(np.array([[8 + 3, 100 - 1], [8 - 3, 100 + 1]] * size, np.float32))
    assert m.count == 8
    np.testing.assert_array_equal(m.mean, [8, 100])
    np.testing.assert_array_equal(m.var(), [9, 1])


def test_dtypes_and_empty_arrays_mix(rng):
    m = fn.Moments()
    m.update(np.zeros((0, 3), np.float32))
    assert m.count == 0
    m.update(np.ones((2, 3), np.float32))
    m.update(np.zeros((2, 3)))
    m.update(np.zeros((0, 3)))
    m.merge(fn.Moments())
    assert m.count == 4
    np.testing.assert_array_equal(m.mean, 0.5)


@pytest.mark.parametrize("shape", [(50, 6), (3, 6, 5, 5), (2, 6, 300), (70000, 6)])
def test_standardize(level, threads, dtype, shape, rng):
    x = rng.standard_normal(shape).astype(dtype) * 7 + 1000
    x[:, 2] = 5  # a channel without variance
    fast, slow = fn.Moments(), reference.Moments()
    fast.update(x)
    slow.update(x)
    for eps in (0.0, 0.5):
        got, want = fast.standardize(x, eps), slow.standardize(x, eps)
        scale = 1 + np.abs(want) + (1000 if dtype == np.float64 else 0)
        assert_close(got, want, ulps=8, scale=scale)
        np.testing.assert_array_equal(got[:, 2], 0)
    inside = x.copy()
    assert fast.standardize(inside, out=inside) is inside
    np.testing.assert_array_equal(inside, fast.standardize(x))


def test_standardize_layouts(layout, dtype, rng):
    x = layout(rng.standard_normal((4, 3, 5, 2)).astype(dtype))
    m = fn.Moments()
    m.update(x)
    out = layout(np.zeros((4, 3, 5, 2), dtype))
    y = m.standardize(x)
    assert y.strides == np.empty_like(x).strides
    np.testing.assert_array_equal(m.standardize(x, out=out), y)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)


def test_same_bits_for_every_thread_count(dtype, rng):
    x = rng.standard_normal((90000, 7)).astype(dtype)
    before, results = fn.get_num_threads(), []
    for n in (1, 2, 3, 7):
        fn.set_num_threads(n)
        m = fn.Moments()
        m.update(x)
        results.append((m.mean.tobytes(), m.var().tobytes()))
    fn.set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("channels", [64, 256, 300])
def test_same_bits_at_every_address(level, dtype, channels, rng):
    x = rng.normal(size=(300, channels)).astype(dtype)
    room = np.empty(x.size + 17, dtype)
    expected = fn.Moments()
    expected.update(x)
    for offset in range(17):
        moved = room[offset:offset + x.size].reshape(x.shape)
        moved[...] = x
        m = fn.Moments()
        m.update(moved)
        np.testing.assert_array_equal(m.mean, expected.mean)
        np.testing.assert_array_equal(m.var(), expected.var())


def test_squares_on_a_grid_are_not_rounded_to_one_side(level, rng):
    """Far from zero float32 data lie on a grid; 64 squares of integers added one by one are 4e-7 too small."""
    x = (rng.normal(size=(4096, 16)) + 1e4).astype(np.float32)
    m = fn.Moments()
    m.update(x)
    np.testing.assert_allclose(m.var(), x.astype(np.float64).var(0), rtol=np.finfo(np.float32).eps)


def test_nonfinite_values_propagate_as_in_the_twin(level, rng):
    for value, first in itertools.product((np.nan, np.inf, -np.inf), (False, True)):
        parts = [rng.standard_normal((9, 3)) for _ in range(3)]
        parts[0 if first else 1][4, 1] = value
        fast, slow = fn.Moments(), reference.Moments()
        for part in parts:
            fast.update(part)
            slow.update(part)
        np.testing.assert_array_equal(np.isnan(fast.mean), np.isnan(slow.mean))
        np.testing.assert_array_equal(np.isinf(fast.mean), np.isinf(slow.mean))
        assert np.isnan(fast.var()[1])
        assert np.isfinite(fast.var()[[0, 2]]).all()


def seen():
    m = fn.Moments()
    m.update(np.array([[1.0, 2.0], [3.0, 4.0]]))
    return m


X = np.ones((3, 2))
ERRORS = [
    (lambda: fn.Moments(axis="1"), TypeError, "axis: expected an integer, got str"),
    (lambda: fn.Moments().mean, ValueError, "x: expected at least one value per channel to have been seen"),
    (lambda: fn.Moments().var(), ValueError, "x: expected at least one value per channel to have been seen"),
    (lambda: fn.Moments().standardize(X), ValueError, "x: expected at least one value per channel to have been seen"),
    (lambda: seen().var(ddof=2), ValueError, "ddof: expected an integer < 2"),
    (lambda: seen().var(ddof=-1), ValueError, "ddof: expected an integer >= 0, got -1"),
    (lambda: seen().var(ddof=0.5), TypeError, "ddof: expected an integer, got float"),
    (lambda: seen().update([[1.0, 2.0]]), TypeError, "x: expected a numpy.ndarray, got list"),
    (lambda: seen().update(np.ones((3, 2), int)), TypeError, "x: expected dtype float32 or float64, got int64"),
    (lambda: seen().update(np.ones((3, 4))), ValueError, "x: expected 2 channels along axis 1, got shape (3, 4)"),
    (lambda: seen().update(np.ones(2)), ValueError, "axis: expected an integer in [-1, 0] for 1 dimensions, got 1"),
    (lambda: fn.Moments().update(np.array(1.0)), ValueError, "x: expected at least 1 dimension, got 0"),
    (lambda: seen().merge(3), TypeError, "other: expected a Moments object, got int"),
    (lambda: seen().standardize(np.ones((3, 4))), ValueError, "x: expected 2 channels along axis 1, got shape (3, 4)"),
    (lambda: seen().standardize(X, eps=-1), ValueError, "eps: expected a finite number >= 0, got -1"),
    (lambda: seen().standardize(X, eps=None), TypeError, "eps: expected a real number, got NoneType"),
    (lambda: seen().standardize(X, out=np.ones((2, 2))), ValueError, "out: expected shape (3, 2), got (2, 2)"),
    (lambda: seen().standardize(X, out=np.ones((3, 2), "f")), TypeError, "out: expected dtype float64, got float32"),
    (lambda: seen().standardize(X, out=np.broadcast_to(1.0, (3, 2))), ValueError, "out: expected a writeable array"),
    (lambda: (lambda p: seen().standardize(p[:3], out=p[1:]))(np.ones((4, 2))), ValueError,
     "out: expected the same array as x or one that does not overlap it"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m for _, _, m in ERRORS])
def test_refuses(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)


def test_merge_of_other_channels_changes_nothing():
    m, other = seen(), fn.Moments()
    other.update(np.ones((3, 4)))
    before = snapshot(m.mean, m.var())
    with pytest.raises(ValueError, match="other: expected 2 channels, got 4"):
        m.merge(other)
    assert_unchanged(before, m.mean, m.var())
    assert m.count == 2


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(500, 3), (3, 3, 700)])
def test_float32_whose_squares_a_float_cannot_hold(level, size, shape, rng):
    x = (rng.standard_normal(shape) * size).astype(np.float32)
    fast, twin = fn.Moments(), reference.Moments()
    for m in (fast, twin):
        m.update(x)
    np.testing.assert_allclose(fast.var(), twin.var(), rtol=1e-14)
    np.testing.assert_allclose(fast.standardize(x), twin.standardize(x), rtol=1e-4, atol=1e-6)
