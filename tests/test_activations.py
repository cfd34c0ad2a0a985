"""Activations: equal to the twin, to extended precision and to finite differences; corners; errors."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TAILS, assert_close, assert_same_bits, every_magnitude

import fastnorm as fn
from fastnorm.reference import activations as reference

# name, options, whether backward takes the forward's output
CASES = {
    "relu": ("relu", {}, False),
    "leaky_relu": ("leaky_relu", {}, False),
    "leaky_relu 0.3": ("leaky_relu", {"negative_slope": 0.3}, False),
    "leaky_relu 0": ("leaky_relu", {"negative_slope": 0}, False),
    "elu": ("elu", {}, False),
    "elu 0.7": ("elu", {"alpha": 0.7}, False),
    "celu": ("celu", {}, False),
    "celu 0.7": ("celu", {"alpha": 0.7}, False),
    "celu 1e-4": ("celu", {"alpha": 1e-4}, False),
    "sigmoid": ("sigmoid", {}, True),
    "tanh": ("tanh", {}, True),
}
# The kernel's functions err by at most 3 ulp (test_accuracy); alpha, its product and dy's add half an ulp each; the
# float64 twin errs by 1 to 2 ulp itself.
ULPS = 6


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def values(rng, shape, dtype):
    """Both signs, from tiny to saturating, with NaN, infinity, signed zeros and subnormals where there is room."""
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 1.5, size=shape)
    corners = [np.nan, np.inf, -np.inf, 0.0, -0.0, np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).tiny / 4,
               np.finfo(dtype).max, np.finfo(dtype).min]
    if x.size > 2 * len(corners):
        x.reshape(-1)[rng.choice(x.size, len(corners), replace=False)] = corners
    return x.astype(dtype)


def gradient_scale(name, options, x, expected):
    """Size of the gradient, and in float64 the twin's own rounding of x/alpha, which exp multiplies by |x/alpha|."""
    size = np.nan_to_num(np.abs(expected, dtype=np.float64))
    if name == "celu" and x.dtype == np.float64:
        with np.errstate(over="ignore"):
            size *= 1 + np.nan_to_num(np.minimum(np.abs(x) / options.get("alpha", 1.0), 1e3))
    return size


def check_pair(case, x, dy):
    name, options, from_output = case
    y = getattr(fn, name)(x, **options)
    expected = getattr(reference, name)(x, **options)
    assert y.dtype == x.dtype
    assert_close(y, expected, ulps=ULPS)
    saved = expected if from_output else x
    dx = getattr(fn, name + "_backward")(dy, saved, **options)
    expected_dx = getattr(reference, name + "_backward")(dy, saved, **options)
    assert dx.dtype == x.dtype
    assert_close(dx, expected_dx, ulps=ULPS, scale=gradient_scale(name, options, x, expected_dx))
    return y, dx


# -- equal to the twin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 9), (1, 1, 1), (4, 3), (40,)])
def test_layouts(level, dtype, layout, rng, case, shape):
    x = layout(values(rng, shape, dtype))
    dy = layout(rng.normal(size=shape).astype(dtype))
    check_pair(case, x, dy)


@pytest.mark.parametrize("n", TAILS)
def test_tails(level, dtype, rng, case, n):
    check_pair(case, values(rng, n, dtype), rng.normal(size=n).astype(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_tiny_shapes(dtype, case, shape):
    x = np.full(shape, -0.5, dtype)
    y, dx = check_pair(case, x, np.ones(shape, dtype))
    assert isinstance(y, np.ndarray)
    assert y.shape == dx.shape == shape


def test_threads_give_the_same_bits(level, dtype, rng, case):
    """Several tiles and a tail, and (in float64) an output above the size where streaming stores begin."""
    name, options, _ = case
    n = (8 << 20) // 8 + 12345
    x = rng.normal(size=n).astype(dtype)
    before = fn.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            fn.set_num_threads(threads)
            results.append((getattr(fn, name)(x, **options),
                            getattr(fn, name + "_backward")(x, x, **options)))
    finally:
        fn.set_num_threads(before)
    for y, dx in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(dx, results[0][1])
    in_place = x.copy()  # ordinary stores
    getattr(fn, name)(in_place, out=in_place, **options)
    np.testing.assert_array_equal(in_place, results[0][0])


def test_streaming_to_any_address(level, dtype, rng):
    """Streaming stores begin at a line's boundary: what lies before and behind must be right, nothing else change."""
    n = (9 << 20) // dtype.itemsize
    x = rng.normal(size=n).astype(dtype)
    expected = np.maximum(x, 0)
    for shift in (0, 1, 3, 64 // dtype.itemsize - 1):
        memory = np.full(n + 64, 7, dtype)
        fn.relu(x, out=memory[shift:shift + n])
        np.testing.assert_array_equal(memory[shift:shift + n], expected)
        assert np.all(memory[:shift] == 7)
        assert np.all(memory[shift + n:] == 7)


def test_mixed_layouts(dtype, layout, rng, case):
    """dy, the saved array and out each laid out in their own way."""
    name, options, from_output = case
    x = values(rng, (4, 6, 5), dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    saved = getattr(reference, name)(x, **options) if from_output else x
    expected = getattr(fn, name + "_backward")(dy, saved, **options)
    out = layout(np.zeros_like(x))
    assert getattr(fn, name + "_backward")(dy, np.asfortranarray(saved), out=out, **options) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(getattr(fn, name + "_backward")(layout(dy), saved, **options), expected)


def test_in_place(dtype, layout, rng, case):
    name, options, from_output = case
    x = values(rng, (3, 4, 5), dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    expected = getattr(fn, name)(x, **options)
    work = layout(x)
    assert getattr(fn, name)(work, out=work, **options) is work
    np.testing.assert_array_equal(work, expected)
    saved = expected if from_output else x
    expected_dx = getattr(fn, name + "_backward")(dy, saved, **options)
    work = layout(dy)
    assert getattr(fn, name + "_backward")(work, saved, out=work, **options) is work
    np.testing.assert_array_equal(work, expected_dx)


def test_results_keep_the_memory_order(dtype, rng, case):
    """A permuted dense block gives a result with the same strides, from the twin too."""
    name, options, _ = case
    x = rng.normal(size=(2, 5, 3, 4)).astype(dtype).transpose(0, 3, 1, 2)
    y = getattr(fn, name)(x, **options)
    assert y.strides == x.strides
    assert getattr(fn, name + "_backward")(np.ascontiguousarray(y), x, **options).strides == x.strides
    assert getattr(reference, name)(x, **options).strides == x.strides


def test_permuted_views_run_without_a_copy():
    tracemalloc = pytest.importorskip("tracemalloc")
    x = np.ones((32, 16, 16, 64), np.float32).transpose(0, 3, 1, 2)
    out = np.empty_like(x)
    fn.tanh(x, out=out)
    tracemalloc.start()
    try:
        fn.tanh(x, out=out)
        fn.tanh_backward(out, x, out=out)
        fn.dropout(x, 0.5, seed=1, out=out)
        assert tracemalloc.get_traced_memory()[1] < x.nbytes // 10
    finally:
        tracemalloc.stop()


# -- accuracy ----------------------------------------------------------------------------------------------------------


def extended(name, x):
    """The formula in extended precision."""
    x = x.astype(np.longdouble)
    e = np.exp(-np.abs(x))
    return {"tanh": lambda: np.tanh(x), "sigmoid": lambda: np.where(x >= 0, 1, e) / (1 + e),
            "elu": lambda: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
            "celu slope": lambda: np.where(x > 0, 1, np.exp(np.minimum(x, 0) / np.longdouble(0.7)))}[name]()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "elu", "celu slope"])
def test_accuracy(level, dtype, rng, name):
    """At most 3 ulp everywhere: near 0, in the tails, into the subnormals."""
    if dtype == np.float64 and np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no longer than double here")
    bits = rng.integers(0, 1 << 32, 400_000, np.uint64).astype(np.uint32).view(np.float32)  # every exponent
    bits = bits[np.isfinite(bits)]
    x = np.concatenate([bits, rng.uniform(-1, 1, 200_000), rng.uniform(-110, 110, 200_000),
                        rng.uniform(-760, 0, 100_000)]).astype(dtype)
    exact = extended(name, x)
    # the spacing of dtype at the exact value
    exponent = np.maximum(np.frexp(exact)[1], np.finfo(dtype).minexp + 1)
    ulp = np.ldexp(np.longdouble(1), exponent - 1 - np.finfo(dtype).nmant)
    y = fn.celu_backward(np.ones_like(x), x, alpha=0.7) if name == "celu slope" else getattr(fn, name)(x)
    error = np.abs(y - exact) / ulp
    assert error.max() <= 3


@pytest.mark.parametrize(("name", "x", "y"), [
    ("relu", [np.nan, np.inf, -np.inf], [np.nan, np.inf, 0]),
    ("leaky_relu", [np.nan, np.inf, -np.inf], [np.nan, np.inf, -np.inf]),
    ("elu", [np.nan, np.inf, -np.inf, -1e30], [np.nan, np.inf, -1, -1]),
    ("celu", [np.nan, np.inf, -np.inf, -1e30], [np.nan, np.inf, -1, -1]),
    ("sigmoid", [np.nan, np.inf, -np.inf, -1e30, 1e30], [np.nan, 1, 0, 0, 1]),
    ("tanh", [np.nan, np.inf, -np.inf, -1e30, 1e30], [np.nan, 1, -1, -1, 1]),
])
def test_non_finite(level, dtype, name, x, y):
    for backend in (fn, reference):
        np.testing.assert_array_equal(getattr(backend, name)(np.array(x, dtype)), np.array(y, dtype))


@pytest.mark.parametrize("name", ["elu", "celu", "tanh"])
def test_subnormals_and_signed_zero_are_kept(level, dtype, name):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([tiny, -tiny, 5 * tiny, -7 * tiny, 0.0, -0.0], dtype)
    y = getattr(fn, name)(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.parametrize("name", ["leaky_relu", "leaky_relu_backward", "sigmoid_backward", "tanh_backward"])
@pytest.mark.parametrize("n", [100, 60_000, 5_000_000])  # one piece, several, around the cache
def test_subnormals_give_the_same_bits_with_and_without_care(name, n, assume_subnormals, rng):
    saved = every_magnitude(n, rng)
    dy = every_magnitude(n, rng)
    arguments = (saved,) if name == "leaky_relu" else (dy, saved)
    results = []
    for slow in (0, 1):
        assume_subnormals(slow)
        with np.errstate(all="ignore"):
            getattr(fn, name)(*arguments)  # leaves behind what it met
            results.append(getattr(fn, name)(*arguments))
    assert_same_bits(*results)


def test_gradient_at_zero_and_nan(level, dtype):
    """At exactly 0 it is the slope's (0 for ReLU); where x is NaN, dy passes through."""
    x = np.array([0.0, -0.0, np.nan], dtype)
    dy = np.full(3, 2, dtype)
    for backend in (fn, reference):
        np.testing.assert_array_equal(backend.relu_backward(dy, x), [0, 0, 2])
        np.testing.assert_array_equal(backend.leaky_relu_backward(dy, x, negative_slope=0.25), [0.5, 0.5, 2])
        np.testing.assert_array_equal(backend.elu_backward(dy, x, alpha=0.25), [0.5, 0.5, np.nan])
        np.testing.assert_array_equal(backend.celu_backward(dy, x, alpha=0.25), [2, 2, np.nan])
        dy_nan = np.array([np.nan], dtype)
        for name in ("leaky_relu", "elu", "celu", "sigmoid", "tanh"):
            assert np.isnan(getattr(backend, name + "_backward")(dy_nan, np.array([0.5], dtype))[0])


@pytest.mark.parametrize("n", [50])
def test_finite_differences(rng, case, n):
    """Central differences in float64: h**2/6 times the third derivative, and eps/h, are both below 1e-9."""
    name, options, from_output = case
    h = 1e-5
    x = rng.normal(size=n) * 2
    x[np.abs(x) < 0.01] = 0.5  # away from the kink
    forward = getattr(fn, name)
    numeric = (forward(x + h, **options) - forward(x - h, **options)) / (2 * h)
    saved = forward(x, **options) if from_output else x
    dx = getattr(fn, name + "_backward")(np.ones(n), saved, **options)
    np.testing.assert_allclose(dx, numeric, rtol=0, atol=1e-9)


# -- errors ------------------------------------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)
READ_ONLY = np.ones((2, 3), np.float32)
READ_ONLY.flags.writeable = False
BASE = np.ones((3, 3), np.float32)

FORWARD_ERRORS = [
    ("list", {"x": [1.0]}, TypeError, "x: expected a numpy.ndarray, got list"),
    ("integers", {"x": np.ones(3, np.int64)}, TypeError, "x: expected dtype float32 or float64, got int64"),
    ("byte order", {"x": np.ones(3, ">f4")}, TypeError, "non-native byte order"),
    ("out list", {"out": [1.0]}, TypeError, "out: expected a numpy.ndarray, got list"),
    ("out dtype", {"out": np.ones((2, 3))}, TypeError, "out: expected dtype float32, got float64"),
    ("out shape", {"out": np.ones((3, 2), np.float32)}, ValueError, "out: expected shape (2, 3), got (3, 2)"),
    ("out read-only", {"out": READ_ONLY}, ValueError, "out: expected a writeable array"),
    ("out overlap", {"x": BASE[:2], "out": BASE[1:]}, ValueError, "partial overlap with x"),
    ("out elements", {"out": np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (2, 3), (0, 4))}, ValueError,
     "out: expected an array whose elements do not overlap"),
]
FACTOR_ERRORS = [
    ("leaky_relu", {"negative_slope": -0.1}, ValueError, "negative_slope: expected a finite number >= 0, got -0.1"),
    ("leaky_relu", {"negative_slope": np.inf}, ValueError, "negative_slope: expected a finite number"),
    ("leaky_relu", {"negative_slope": np.nan}, ValueError, "negative_slope: expected a finite number"),
    ("leaky_relu", {"negative_slope": "0.1"}, TypeError, "negative_slope: expected a real number, got str"),
    ("leaky_relu", {"negative_slope": 1e40}, ValueError, "negative_slope: expected a number that float32 can hold"),
    ("elu", {"alpha": -1.0}, ValueError, "alpha: expected a finite number >= 0, got -1"),
    ("elu", {"alpha": True}, TypeError, "alpha: expected a real number, got bool"),
    ("celu", {"alpha": 0.0}, ValueError, "alpha: expected a number > 0"),
    ("celu", {"alpha": 1e-50}, ValueError, "alpha: expected a number > 0 (and normal in float32), got 1e-50"),
]
BACKWARD_ERRORS = [
    ("dy list", {"dy": [1.0]}, TypeError, "dy: expected a numpy.ndarray, got list"),
    ("saved list", {"saved": [1.0]}, TypeError, "{saved}: expected a numpy.ndarray, got list"),
    ("dy dtype", {"dy": np.ones((2, 3))}, TypeError, "dy: expected dtype float32, got float64"),
    ("dy shape", {"dy": np.ones((3, 3), np.float32)}, ValueError, "dy: expected shape (2, 3), got (3, 3)"),
    ("out shape", {"out": np.ones(3, np.float32)}, ValueError, "out: expected shape (2, 3), got (3,)"),
    ("out dtype", {"out": np.ones((2, 3))}, TypeError, "out: expected dtype float32, got float64"),
    ("out read-only", {"out": READ_ONLY}, ValueError, "out: expected a writeable array"),
    ("out is saved", {"saved": X, "out": X}, ValueError, "out: expected an array that does not overlap {saved}"),
    ("out overlaps dy", {"dy": BASE[:2], "out": BASE[1:]}, ValueError, "partial overlap with dy"),
]


def raises(call, exception, message, *arrays):
    """The call raises this, and no array has changed."""
    before = [np.asarray(a).tobytes() for a in arrays]
    with pytest.raises(exception) as caught:
        call()
    assert message in str(caught.value)
    assert [np.asarray(a).tobytes() for a in arrays] == before


@pytest.fixture(params=[fn, reference], ids=["compiled", "reference"])
def backend(request):
    return request.param


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("changes", "exception", "message"), [row[1:] for row in FORWARD_ERRORS],
                         ids=[row[0] for row in FORWARD_ERRORS])
def test_forward_errors(backend, name, changes, exception, message):
    arguments = {"x": -np.ones((2, 3), np.float32), "out": np.ones((2, 3), np.float32)} | changes
    raises(lambda: getattr(backend, name)(arguments["x"], out=arguments["out"]), exception, message,
           *arguments.values())


@pytest.mark.parametrize(("name", "options", "exception", "message"), FACTOR_ERRORS)
def test_factor_errors(backend, name, options, exception, message):
    x = -np.ones((2, 3), np.float32)
    raises(lambda: getattr(backend, name)(x, out=x, **options), exception, message, x)
    raises(lambda: getattr(backend, name + "_backward")(x, X, out=x, **options), exception, message, x)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("changes", "exception", "message"), [row[1:] for row in BACKWARD_ERRORS],
                         ids=[row[0] for row in BACKWARD_ERRORS])
def test_backward_errors(backend, name, changes, exception, message):
    arguments = {"dy": np.ones((2, 3), np.float32), "saved": -np.ones((2, 3), np.float32),
                 "out": np.ones((2, 3), np.float32)} | changes
    saved = "y" if name in ("sigmoid", "tanh") else "x"
    raises(lambda: getattr(backend, name + "_backward")(arguments["dy"], arguments["saved"], out=arguments["out"]),
           exception, message.format(saved=saved), *arguments.values())


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("module", [fn, reference])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh"])
def test_subclasses_count_as_plain_arrays(module, name):
    a, x = np.arange(4.0).reshape(2, 2), np.array([[-0.5, 0.5], [0.25, -0.25]])
    f, backward = getattr(module, name), getattr(module, f"{name}_backward")
    np.testing.assert_array_equal(f(x.view(np.matrix)), f(x))
    np.testing.assert_array_equal(backward(a.view(np.matrix), x.view(np.matrix)), backward(a, x))


@pytest.mark.parametrize("module", [fn, reference])
@pytest.mark.parametrize(("strides", "fits"), [((12, 8), True), ((8, 20), True), ((16, 8), False), ((4, 4), False),
                                               ((0, 4), False), ((24, 2), False), ((-12, 8), True), ((8, -8), False)])
def test_out_that_overlaps_itself(module, strides, fits):
    """Two rows of three: axes may interleave, elements may not meet."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = np.zeros(40, np.float32)
    out = np.lib.stride_tricks.as_strided(raw[20:], x.shape, strides)
    if fits:
        np.testing.assert_array_equal(module.relu(x, out=out), x)
        return
    with pytest.raises(ValueError, match=r"^out: expected an array whose elements do not overlap, got strides"):
        module.relu(x, out=out)
    assert not raw.any()
