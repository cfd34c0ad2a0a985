"""Softmax and log-softmax against the twin, an extended-precision computation and exact cases."""

import numpy as np
import pytest
from conftest import LAYOUTS, assert_close, assert_same_bits, assert_unchanged, snapshot

import fastnorm as fn
from fastnorm.reference import loss as reference

CLASSES = [1, 2, 3, 10, 16, 17, 31, 33, 64, 65, 127, 128, 129, 257, 1000, 5000]
BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])

# (outer, C, inner) of each path through the kernels: rows, rows too wide to keep their exponentials, transposed lanes
# (of few, of many classes), gathered runs, lanes read in place, and the same with classes too many to keep.
PATHS = {"rows": (9, 300, 1), "wide rows": (2, 140_000, 1), "transposed": (530, 10, 1),
         "transposed, 100": (131, 100, 1), "gathered": (37, 5, 7), "gathered, wide": (40, 1100, 3),
         "in place": (3, 21, 301), "in place, wide": (2, 1100, 67), "few lanes, wide": (1, 40_000, 2)}
# Outputs large enough to be streamed (8 MB of float32).
STREAMED = {"rows": (701, 3001, 1), "delayed rows": (301, 7001, 1), "transposed": (210_001, 10, 1),
            "gathered": (50_001, 6, 7), "in place": (3, 21, 33_333)}


def logits(rng, shape, dtype, spread=4.0):
    return (rng.standard_normal(shape) * spread).astype(dtype)


def smallest_logarithm(dtype):
    """The logarithm of a sum near 1 is what the sum, added in float64, keeps of it: right to a float64's ulp of 1."""
    return np.finfo(np.float64).eps / np.finfo(dtype).eps


def assert_softmax_close(actual, x, axis, name):
    """Against the twin in float64.

    The kernel: exp 1.2 ulp, the sum's terms the same, its inverse and the product 0.5 each, and the additions, 16 in a
    row, which round both ways: 4 ulp. In float64 the twin errs too: x - max rounds, which costs |x - max| / 2 ulp of
    the exponential; and the kernel adds C terms one by one where the classes are not contiguous.
    """
    expected = getattr(reference, name)(x.astype(np.float64), axis=axis)
    size = np.ones(x.shape)
    if x.dtype == np.float64:
        size += np.nan_to_num(np.abs(x - x.max(axis=axis, keepdims=True)), posinf=0) + np.sqrt(x.shape[axis])
    size *= np.abs(expected) if name == "softmax" else np.maximum(np.abs(expected), smallest_logarithm(x.dtype))
    assert_close(actual, expected.astype(x.dtype), ulps=4, scale=size)


@BOTH
@pytest.mark.parametrize("classes", CLASSES)
def test_twin_by_classes(name, classes, dtype, level, rng):
    for shape, axis in (((5, classes), -1), ((classes, 3), 0), ((2, classes, 3, 5), 1), ((classes,), 0)):
        x = logits(rng, shape, dtype)
        before = x.copy()
        actual = getattr(fn, name)(x, axis=axis)
        assert actual.dtype == dtype
        assert_softmax_close(actual, x, axis, name)
        assert_unchanged([before], x)


@BOTH
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_twin_by_layout(name, axis, layout, dtype, rng):
    x = layout(logits(rng, (3, 4, 5, 70), dtype))
    actual = getattr(fn, name)(x, axis=axis)
    assert_softmax_close(actual, x, axis, name)
    out = layout(np.zeros(x.shape, dtype))
    assert getattr(fn, name)(x, axis=axis, out=out) is out
    np.testing.assert_array_equal(out, actual)
    plain = np.empty(x.shape, dtype)
    np.testing.assert_array_equal(getattr(fn, name)(x, axis=axis, out=plain), actual)
    assert getattr(fn, name)(x, axis=axis, out=x) is x
    np.testing.assert_array_equal(x, actual)


def test_result_keeps_memory_order_and_needs_no_copy(rng):
    x = np.moveaxis(logits(rng, (4, 5, 6, 3), np.float32), -1, 1)
    assert fn.softmax(x, axis=1).strides == x.strides


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_every_path(name, path, dtype, level, rng):
    x = logits(rng, PATHS[path], dtype)
    p = getattr(fn, name)(x, axis=1)
    assert_softmax_close(p, x, 1, name)


@BOTH
@pytest.mark.parametrize("path", PATHS)
def test_same_bits_for_threads_and_alignment_and_in_place(name, path, dtype, rng):
    x = logits(rng, PATHS[path], dtype)
    function = getattr(fn, name)
    before = fn.get_num_threads()
    try:
        fn.set_num_threads(1)
        expected = function(x, axis=1)
        for n in (2, 3, 7):
            fn.set_num_threads(n)
            assert function(x, axis=1).tobytes() == expected.tobytes()
    finally:
        fn.set_num_threads(before)
    assert function(LAYOUTS["unaligned"](x), axis=1).tobytes() == expected.tobytes()
    assert function(x, axis=1, out=x).tobytes() == expected.tobytes()


@BOTH
@pytest.mark.parametrize("path", STREAMED)
def test_streamed_results_are_the_same_bits(name, path, level, rng):
    x = logits(rng, STREAMED[path], np.float32)
    raw = np.empty(x.size + 24, np.float32)
    for shift in (0, 3):  # at any place in a cache line; what is around the result stays 0
        raw[...] = 0
        around = raw[shift:shift + x.size + 16]
        out = around[8:-8].reshape(x.shape)
        getattr(fn, name)(x, axis=1, out=out)
        assert not around[:8].any()
        assert not around[-8:].any()
    in_place = x.copy()
    getattr(fn, name)(in_place, axis=1, out=in_place)  # which does not stream
    assert out.tobytes() == in_place.tobytes()
    part = x[-2:] if x.shape[0] > 2 else x
    assert_softmax_close(in_place[-2:], part, 1, name)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="no extended precision here")
@pytest.mark.parametrize("shape", [(50, 400), (400, 10), (5, 30, 40)], ids=str)
@pytest.mark.parametrize("spread", [1, 30])
def test_accuracy_in_extended_precision(shape, spread, dtype, level, rng):
    x = logits(rng, shape, dtype, spread)
    exact = x.astype(np.longdouble)
    exact -= exact.max(axis=1, keepdims=True)
    e = np.exp(exact)
    total = e.sum(axis=1, keepdims=True)
    assert_close(fn.softmax(x, axis=1), (e / total).astype(np.float64).astype(dtype), ulps=4)
    # x - max and the logarithm round, and their difference; the two have one sign, so nothing cancels.
    expected = exact - np.log(total)
    scale = np.maximum(np.abs(expected), smallest_logarithm(dtype))
    assert_close(fn.log_softmax(x, axis=1), expected.astype(np.float64).astype(dtype), ulps=4,
                 scale=scale.astype(np.float64))


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 64, 100, 128, 1000, 4096])
@pytest.mark.parametrize("value", [0.0, -5.3, 88.1, -1e4, 3e38])
def test_equal_logits_are_exact(classes, value, dtype, level):
    for shape in ((3, classes), (2, classes, 5)):
        x = np.full(shape, value, dtype)
        np.testing.assert_array_equal(fn.softmax(x, axis=1), dtype.type(1) / dtype.type(classes))
        assert_close(fn.log_softmax(x, axis=1), np.full(shape, -np.log(classes), dtype), ulps=1)


@pytest.mark.parametrize("classes", [4, 200])
@pytest.mark.parametrize("inner", [1, 70])
def test_wide_gaps_and_infinities(classes, inner, dtype, level):
    inf, nan, top = np.inf, np.nan, float(np.float32(3e38))
    cases = [  # first logits of a row (the others are -inf), their softmax, their log-softmax
        ([0, -1e4], [1, 0], [0, -1e4]),
        ([1e4, -1e4], [1, 0], [0, -2e4]),
        ([top, -top], [1, 0], [0, -top - top]),
        ([-top, -inf], [1, 0], [0, -inf]),
        ([top, top], [0.5, 0.5], [-np.log(2), -np.log(2)]),
        ([0, -inf], [1, 0], [0, -inf]),
        ([-inf, -inf], [nan, nan], [nan, nan]),
        ([inf, 0], [nan, nan], [nan, nan]),
        ([inf, -inf], [nan, nan], [nan, nan]),
        ([nan, 0], [nan, nan], [nan, nan]),
        ([0, nan], [nan, nan], [nan, nan]),
    ]
    x = np.full((len(cases), classes, inner), -inf, dtype)
    for i, (first, _, _) in enumerate(cases):
        x[i, :2] = np.array(first, dtype)[:, None]
    p, lp = fn.softmax(x, axis=1), fn.log_softmax(x, axis=1)
    for i, (_, softmax, log_softmax) in enumerate(cases):
        fill = nan if np.isnan(softmax[0]) else 0
        with np.errstate(over="ignore"):
            wanted_p, wanted_lp = np.array(softmax, dtype), np.array(log_softmax).astype(dtype)
        np.testing.assert_array_equal(p[i, :2], np.repeat(wanted_p[:, None], inner, 1))
        assert_close(lp[i, :2], np.repeat(wanted_lp[:, None], inner, 1), ulps=1)
        np.testing.assert_array_equal(p[i, 2:], fill)
        np.testing.assert_array_equal(lp[i, 2:], nan if fill else -inf)
    np.testing.assert_array_equal(p, reference.softmax(x, axis=1))
    assert_close(lp, reference.log_softmax(x, axis=1), ulps=1)


def test_gradual_underflow(dtype, level):
    tiny = np.finfo(dtype).smallest_subnormal
    lowest = np.log(np.finfo(dtype).tiny, dtype=np.float64)
    x = np.zeros((40, 2), dtype)
    x[:, 1] = np.linspace(lowest + 1, lowest - (20 if dtype == np.float32 else 40), 40)
    p = fn.softmax(x)
    expected = np.exp(x[:, 1].astype(np.longdouble))  # the sum is 1 to the last bit
    assert np.all(np.abs(p[:, 1] - expected) <= 2 * np.maximum(tiny, np.finfo(dtype).eps * expected))
    assert p[-1, 1] == 0
    assert np.any((p[:, 1] > 0) & (p[:, 1] < np.finfo(dtype).tiny))


@BOTH
def test_hundred_thousand_classes(name, dtype, level, rng):
    x = logits(rng, (3, 100_000), dtype)
    assert_softmax_close(getattr(fn, name)(x), x, 1, name)


@BOTH
@pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (2, 3, 0)], ids=str)
def test_empty(name, shape, dtype):
    axis = 1 if shape[1] else 2
    assert getattr(fn, name)(np.empty(shape, dtype), axis=axis).shape == shape


X = np.arange(12, dtype=np.float32).reshape(3, 4)
READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False
ERRORS = [
    ({"x": [1.0, 2.0]}, TypeError, "x: expected a numpy.ndarray, got list"),
    ({"x": X.astype(np.float16)}, TypeError, "x: expected dtype float32 or float64, got float16"),
    ({"x": X.astype(int)}, TypeError, "x: expected dtype float32 or float64, got int64"),
    ({"x": X.astype(X.dtype.newbyteorder())}, TypeError,
     "x: expected dtype float32 or float64, got float32 in non-native byte order"),
    ({"x": np.float32(1)}, TypeError, "x: expected a numpy.ndarray, got float32"),
    ({"x": np.array(1.0)}, ValueError, "x: expected at least 1 dimension, got shape ()"),
    ({"x": np.empty((3, 0))}, ValueError, "x: expected at least one class along axis 1, got shape (3, 0)"),
    ({"axis": 2}, ValueError, "axis: expected an integer in [-2, 1] for 2 dimensions, got 2"),
    ({"axis": 1.0}, TypeError, "axis: expected an integer, got float"),
    ({"out": np.empty((3, 5), np.float32)}, ValueError, "out: expected shape (3, 4), got (3, 5)"),
    ({"out": np.empty((3, 4))}, TypeError, "out: expected dtype float32, got float64"),
    ({"out": READ_ONLY}, ValueError, "out: expected a writeable array, got a read-only one"),
    ({"out": X[::-1]}, ValueError, "out: expected the same array as x or one that does not overlap it"),
]


@BOTH
@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(("bad", "error", "message"), ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(name, module, bad, error, message):
    arguments = {"x": X} | bad
    before = snapshot(X)
    with pytest.raises(error) as caught:
        getattr(module, name)(arguments.pop("x"), **arguments)
    assert message in str(caught.value)
    assert_unchanged(before, X)


def test_out_beside_x():
    raw = np.arange(24, dtype=np.float64).reshape(3, 8)
    x, out = raw[:, ::2], raw[:, 1::2]
    expected = fn.softmax(x.copy())
    np.testing.assert_array_equal(fn.softmax(x, out=out), expected)
    np.testing.assert_array_equal(raw[:, ::2], np.arange(24).reshape(3, 8)[:, ::2])


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("module", [fn, reference])
def test_subclasses_count_as_plain_arrays(module):
    x = np.arange(12.0).reshape(3, 4)
    for f in (module.softmax, module.log_softmax):
        assert type(f(x.view(np.matrix))) is np.ndarray
        np.testing.assert_array_equal(f(x.view(np.matrix)), f(x))


def subnormal_logits(kind, shape, dtype, rng):
    """Logits whose results are subnormal, or which are so themselves."""
    info = np.finfo(dtype)
    wide = rng.uniform(-1.5 * np.log(info.max), 0, shape)
    tiny = rng.standard_normal(shape) * info.tiny / 16
    if kind == "alternating":
        return np.where(rng.random(shape) < 0.5, wide, tiny).astype(dtype)
    return {"wide": wide, "tiny": tiny}[kind].astype(dtype)


# Few classes, many, many positions; rows that are streamed out while the next one is computed.
@pytest.mark.parametrize("shape", [(2000, 5), (70, 700), (20, 30, 49), (160, 20000)])
@pytest.mark.parametrize("kind", ["wide", "tiny", "alternating"])
def test_subnormals_give_the_same_bits_with_and_without_care(shape, kind, dtype, assume_subnormals, rng):
    x = subnormal_logits(kind, shape, dtype, rng)
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    calls = {
        "softmax": lambda: fn.softmax(x, axis=1),
        "log_softmax": lambda: fn.log_softmax(x, axis=1),
        "labels": lambda: fn.softmax_cross_entropy(x, labels, axis=1, reduction="sum")[1],
        "smoothing": lambda: fn.softmax_cross_entropy(x, labels, axis=1, label_smoothing=0.1)[1],
        "probabilities": lambda: fn.softmax_cross_entropy(x, np.abs(x), axis=1, reduction="sum")[1],
    }
    for name, call in calls.items():
        results = []
        for slow in (0, 1):
            assume_subnormals(slow)
            call()  # leaves behind what it met
            results.append(np.ascontiguousarray(call()))
        assert_same_bits(*results)
        if name == "softmax" and kind == "wide":
            assert np.count_nonzero((results[0] != 0) & (results[0] < np.finfo(dtype).tiny)) > 10


def test_flushed_subnormals_are_flushed_everywhere(assume_subnormals):
    torch = pytest.importorskip("torch")
    x = np.full((640, 500), -90.0, np.float32)
    x[:, 0] = 0.0
    assume_subnormals(1)
    before = fn.get_num_threads()
    fn.set_num_threads(1)
    try:
        assert np.count_nonzero(fn.softmax(x)) == x.size
        torch.set_flush_denormal(True)
        assert np.count_nonzero(fn.softmax(x)) == len(x)
    finally:
        torch.set_flush_denormal(False)
        fn.set_num_threads(before)
