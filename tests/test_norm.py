"""Batch norm: kernels against the twin, exact data, gradients, determinism, the error table."""

from __future__ import annotations

import copy
import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import LEVELS, TAILS, assert_close, assert_unchanged, snapshot

import fastnorm as fn
from fastnorm import _runtime, reference

ACTIVATIONS = [None, "relu", "leaky_relu"]
# (shape, axis): both inner loops, every plan (one tile, channel tiles, chains of them, blocks), odd extents, tiny ones.
SHAPES = [((2, 1), 1), ((3, 5), 1), ((5, 3), 0), ((64, 256), 1), ((67, 33), 1), ((700, 7), -1), ((4, 3, 5, 5), 1),
          ((2, 6, 7, 7), 1), ((3, 5, 17, 19), 1), ((1, 4, 300), 1), ((2, 3, 255), 1), ((3, 4, 256), 1),
          ((5, 7, 3, 4), -1), ((3, 2, 4, 2, 3), 2), ((2, 1, 9, 9), 1), ((9, 1), 1)]
LARGE = [((40000, 10), 1), ((300, 70, 8), 1), ((2, 3, 150000), 1), ((3, 300000), 0), ((40, 130, 49), 1),
         ((16, 40, 30, 30), 1), ((200001, 1), 1), ((30, 9, 10007), 1), ((40, 24, 2048), 1)]


def make(rng, shape, axis, dtype, *, mean=0.0, residual=False):
    """Arguments of a forward call and a gradient for its result."""
    channels = shape[axis]
    draw = lambda s: rng.standard_normal(s).astype(dtype)  # noqa: E731
    return {"x": (rng.standard_normal(shape) + mean).astype(dtype), "gamma": draw(channels), "beta": draw(channels),
            "running_mean": draw(channels), "running_var": draw(channels) ** 2,
            "residual": draw(shape) if residual else None}, draw(shape)


def along(axis, vector, ndim):
    return np.asarray(vector, np.float64).reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def term_sizes(args, axis, training, eps=1e-5):
    """|scale|, and the size of the centered x: in float64 the rounded mean counts, in float32 it travels as two."""
    x = args["x"].astype(np.float64)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean = x.mean(others, keepdims=True) if training else along(axis, args["running_mean"], x.ndim)
    var = x.var(others, keepdims=True) if training else along(axis, args["running_var"], x.ndim)
    scale = np.abs(along(axis, args["gamma"], x.ndim)) / np.sqrt(var + eps)
    centered = np.abs(x - mean)
    if args["x"].dtype == np.float64 or not training:
        centered = centered + np.abs(mean)
    # The mean errs too: 64 values added one by one err about sqrt(sum of k) / 2 = 22 ulp of a deviation, divided by 64,
    # in kernel and (over more values in more steps) twin; the worst of hundreds of channels is some three times that.
    return scale, centered + np.sqrt(var) * 0.3, others


def compare(args, dy, axis, *, ulps=8, **options):
    """Forward and backward of kernels and twin agree; returns what the kernels gave.

    Tolerances: six roundings on the way to y, each half an ulp of the terms it adds, and the statistics' own error:
    float sums of 64 squares err sqrt(64)/2 ulp, typically, half of that after the root. Sums over n values: the terms'
    magnitudes added up, times the error of one term.
    """
    training = options.get("training", True)
    fast = {k: None if v is None else v.copy(order="K") for k, v in args.items()}
    slow = {k: None if v is None else v.copy(order="K") for k, v in args.items()}
    fast["x"], fast["residual"] = args["x"], args["residual"]  # the layout under test
    y, cache = fn.batch_norm_forward(**fast, axis=axis, **options)
    y2, cache2 = reference.batch_norm_forward(**slow, axis=axis, **options)
    scale, centered, others = term_sizes(args, axis, training)
    beta = np.abs(along(axis, args["beta"], dy.ndim))
    residual = 0 if args["residual"] is None else np.abs(args["residual"])
    assert_close(y, y2, ulps=ulps, scale=centered * scale + beta + residual)
    size = np.abs(args["x"]).mean(others, dtype=np.float64)
    for name, power in (("running_mean", 1), ("running_var", 2)):
        spread = size if power == 1 else args["x"].astype(np.float64).var(others)
        if args["x"].dtype == np.float64:
            spread = spread + (size ** 2 if power == 2 else 0)
        assert_close(fast[name], slow[name], ulps=ulps * 4, scale=np.abs(args[name]) + spread)
    got, want = fn.batch_norm_backward(dy, cache), reference.batch_norm_backward(dy, cache2)
    assert len(got) == len(want)
    n = dy.size // len(args["gamma"])
    inv_std = scale / np.abs(along(axis, args["gamma"], dy.ndim))
    sum_dz = np.abs(dy).sum(others, keepdims=True, dtype=np.float64)
    sum_product = (np.abs(dy) * centered).sum(others, keepdims=True) * inv_std
    terms = scale * (np.abs(dy) + ((sum_dz + centered * inv_std * sum_product) / n if training else 0))
    assert_close(got[0], want[0], ulps=ulps, scale=terms)
    assert_close(got[1], want[1], ulps=ulps, scale=sum_product.reshape(-1))
    assert_close(got[2], want[2], ulps=ulps, scale=sum_dz.reshape(-1))
    if args["residual"] is not None:
        assert_close(got[3], want[3], ulps=2)  # one multiplication, by a slope that was rounded too
    return y, cache, got


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_kernels_equal_twin(level, threads, dtype, shape, axis, rng):
    args, dy = make(rng, shape, axis, dtype)
    compare(args, dy, axis)


@pytest.mark.parametrize(("shape", "axis"), LARGE)
def test_kernels_equal_twin_on_every_plan(level, dtype, shape, axis, rng):
    args, dy = make(rng, shape, axis, dtype, residual=True)
    compare(args, dy, axis, activation="relu")


@pytest.mark.parametrize("shape", [(20, 30, 15013), (512, 1024, 16)])
def test_chains_of_tiles_equal_twin_and_do_not_depend_on_threads(level, shape, rng):
    """Backward, and of columns, they are for arrays larger than the others here."""
    args, dy = make(rng, shape, 1, np.float32)
    compare(args, dy, 1, activation="relu")
    before, results = fn.get_num_threads(), []
    for n in (1, 3):
        fn.set_num_threads(n)
        results.append([a.tobytes() for a in run(args["x"], dy, args, axis=1, activation="relu")])
    fn.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_options_equal_twin(level, dtype, activation, residual, training, rng):
    shapes = [((6, 5, 7, 7), 1), ((3, 4, 17, 17), 1), ((40, 37), 1)]
    for (shape, axis), unbiased in itertools.product(shapes, (False, True)):
        args, dy = make(rng, shape, axis, dtype, residual=residual)
        compare(args, dy, axis, activation=activation, negative_slope=0.3, training=training, momentum=0.3,
                unbiased_running_var=unbiased)


@pytest.mark.parametrize("shape", [(6, 5, 3, 4), (3, 2, 20, 20), (5, 4)])
def test_layouts_equal_twin(level, dtype, layout, shape, rng):
    args, dy = make(rng, shape, 1, dtype, residual=True)
    args["x"], args["residual"] = layout(args["x"]), layout(args["residual"])
    compare(args, layout(dy), 1, activation="leaky_relu")
    args["residual"] = np.ascontiguousarray(args["residual"])  # laid out unlike x
    compare(args, np.ascontiguousarray(dy), 1, activation="leaky_relu")


@pytest.mark.parametrize("inner", TAILS)
def test_tails_equal_twin(level, inner, rng):
    for shape in ((3, 2, inner), (inner, 5)):
        args, dy = make(rng, shape, 1, np.float32, residual=True)
        if args["x"].size // shape[1] > 1:
            compare(args, dy, 1, activation="relu")


@pytest.mark.parametrize(("shape", "axis"), [((64, 16, 7, 7), 1), ((4, 3, 56, 56), 1), ((3000, 5), 1), ((80000, 9), 1)])
def test_data_far_from_zero(level, shape, axis, rng):
    """Float32 results stay within a few ulp when the mean is 10,000 standard deviations."""
    args, dy = make(rng, shape, axis, np.float32, mean=1e4)
    compare(args, dy, axis)


def test_pivot_recovers_when_the_first_samples_lie(level, rng):
    """An outlier first, and data that jump: the chunk is summed again around its own mean."""
    x = rng.standard_normal((4096, 3)).astype(np.float32)
    x[0] = 1e6
    x[2000:] += 5000
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T)[None], 1)):
        args, dy = make(rng, array.shape, axis, np.float32)
        args["x"] = array
        compare(args, dy, axis)


@pytest.mark.parametrize(("shape", "axis"), [((64, 3), 1), ((128, 4, 5, 5), 1), ((2, 3, 512), 1), ((65536, 5), 1),
                                             ((4, 2, 131072), 1)])
def test_exact_statistics(level, threads, dtype, shape, axis):
    """Where every sum is representable, mean and variance have no error at all."""
    channel = np.arange(shape[axis])
    sign = np.where(np.arange(np.prod(shape) // shape[axis]) % 2 == 0, 1, -1)
    deviation = np.outer(channel + 1, sign)
    x = np.moveaxis((8 * channel[:, None] + deviation).reshape(
        shape[axis], *(n for i, n in enumerate(shape) if i != axis)), 0, axis).astype(dtype)
    x = np.ascontiguousarray(x)
    mean, var = np.zeros(shape[axis], dtype), np.zeros(shape[axis], dtype)
    y, _ = fn.batch_norm_forward(x, None, None, mean, var, axis=axis, momentum=1.0, eps=0.0, unbiased_running_var=False)
    np.testing.assert_array_equal(mean, 8 * channel)
    np.testing.assert_array_equal(var, (channel + 1) ** 2)
    np.testing.assert_allclose(np.abs(y), 1, rtol=2 * np.finfo(dtype).eps)


def test_constant_channels_give_beta(level, dtype):
    for value in (0.1, -3e4, 1e-30):
        x = np.full((1000, 3), value, dtype)
        beta = np.array([1, 2, 3], dtype)
        var = np.ones(3, dtype)
        y, cache = fn.batch_norm_forward(x, None, beta, np.zeros(3, dtype), var, momentum=1.0)
        np.testing.assert_array_equal(y, np.broadcast_to(beta, x.shape))
        np.testing.assert_array_equal(var, 0)
        assert np.isfinite(fn.batch_norm_backward(x, cache)[0]).all()


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 2, 3), 1), ((2, 3, 2, 2), -1), ((2, 2, 257), 1)])
def test_gradients_by_finite_differences(shape, axis, training, activation, rng):
    """Central differences in float64: error h**2 and eps/h, both near 1e-10 at h = 1e-5."""
    args, dy = make(rng, shape, axis, np.float64, residual=True)
    options = {"axis": axis, "training": training, "activation": activation, "negative_slope": 0.2}

    def loss():
        copies = {k: v.copy() if k.startswith("running") else v for k, v in args.items()}
        y, _ = fn.batch_norm_forward(**copies, **options)
        return float((y * dy).sum())

    copies = {k: v.copy() if k.startswith("running") else v for k, v in args.items()}
    gradients = fn.batch_norm_backward(dy, fn.batch_norm_forward(**copies, **options)[1])
    h = 1e-5
    for name, gradient in zip(("x", "gamma", "beta", "residual"), gradients, strict=True):
        a = args[name]
        for i in np.random.default_rng(1).permutation(a.size)[:40]:
            at = np.unravel_index(i, a.shape)
            keep = a[at]
            a[at] = keep + h
            up = loss()
            a[at] = keep - h
            down = loss()
            a[at] = keep
            assert abs((up - down) / (2 * h) - gradient[at]) < 1e-6 * max(1, abs(gradient[at])), (name, at)


@pytest.mark.parametrize("residual", [False, True])
def test_masks_of_forward_and_backward_agree(level, dtype, residual, rng):
    args, dy = make(rng, (200, 33), 1, dtype, residual=residual)
    dy[...] = 1
    y, cache = fn.batch_norm_forward(**args, activation="relu")
    z, _ = fn.batch_norm_forward(**args)
    np.testing.assert_array_equal(y, np.where(z > 0, z, 0))
    if residual:
        np.testing.assert_array_equal(fn.batch_norm_backward(dy, cache)[3], z > 0)


def test_gradient_at_zero_is_the_slope(level, dtype):
    x = np.array([[-1.0], [0.0], [1.0]], dtype)  # z is exactly 0 in the middle
    dy = np.ones((3, 1), dtype)
    for activation, expected in (("relu", [0, 0, 1]), ("leaky_relu", [0.25, 0.25, 1])):
        _, cache = fn.batch_norm_forward(x, activation=activation, negative_slope=0.25, residual=np.zeros_like(x))
        np.testing.assert_array_equal(fn.batch_norm_backward(dy, cache)[3].ravel(), expected)


# -- the same bits -----------------------------------------------------------------------------------------------------


def run(x, dy, args, **options):
    y, cache = fn.batch_norm_forward(x, args["gamma"], args["beta"], mean := args["running_mean"].copy(),
                                     var := args["running_var"].copy(), **options)
    return y, mean, var, *fn.batch_norm_backward(dy, cache)


@pytest.mark.parametrize(("shape", "axis"), [*LARGE, ((64, 256), 1)])
def test_same_bits_for_every_thread_count(dtype, shape, axis, rng):
    args, dy = make(rng, shape, axis, dtype)
    before = fn.get_num_threads()
    results = []
    for n in (1, 2, 3, 7, 2):
        fn.set_num_threads(n)
        results.append(run(args["x"], dy, args, axis=axis, activation="relu"))
    fn.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("shape", "axis"), [
    ((300, 70, 8), 1), ((3000, 17), 1), ((8, 3, 40, 41), 1),
    ((5000, 3), 1), ((4099, 64), 1), ((1001, 5, 7), 1),  # short rows taken together
    ((4, 3, 60, 61), 1), ((3, 2, 100, 400), 1),          # long runs, read from a line's begin; and streamed
    ((30, 9, 10007), 1),                                 # in chains of tiles
    ((67, 512, 7, 7), 1), ((70001, 64), 1)])             # channel by channel, and rows, streamed
def test_same_bits_for_every_alignment(level, dtype, shape, axis, rng):
    args, dy = make(rng, shape, axis, dtype)
    expected = run(args["x"], dy, args, axis=axis, activation="relu")
    for offset in (1, 3, 8):
        shifted = [np.zeros(dy.size + 16, dtype)[at:at + dy.size].reshape(shape) for at in (offset, offset * 5 % 16)]
        shifted[0][...], shifted[1][...] = args["x"], dy
        for a, b in zip(expected, run(*shifted, args, axis=axis, activation="relu"), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", [(30, 9, 10007), (64, 64, 32, 32), (72, 128, 16, 16),  # chains, or tiles for an L2
                                   (70000, 256)])                                        # rows, fetched ahead or not
def test_same_bits_for_every_cache(dtype, shape, rng):
    """Where the work is cut for the second-level cache of the machine, no bit depends on it."""
    args, dy = make(rng, shape, 1, dtype)
    batchnorm, results = _runtime.kernels.batchnorm, []
    try:
        for n_bytes in (1 << 20, 2 << 20, 3 << 20, 64 << 20):
            batchnorm.assume_l2(n_bytes)
            results.append(run(args["x"], dy, args, activation="relu"))
    finally:
        batchnorm.assume_l2(0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_same_bits_at_every_level(dtype, rng):
    """No fused multiply-add and a fixed number of partial sums: batch norm does not even depend on the level."""
    args, dy = make(rng, (300, 70, 8), 1, dtype)
    before, results = _runtime.kernels.level, []
    for level in LEVELS:
        _runtime.kernels.load(level)
        results.append(run(args["x"], dy, args, activation="leaky_relu"))
    _runtime.kernels.load(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", list(itertools.permutations(range(4))))
def test_permuted_axes_are_not_copied(axes, rng):
    """Any axis order of a dense block runs in place: the cache holds x itself, outputs keep the order, and the peak
    of a call into a given output is far below one array.
    """
    x = rng.standard_normal((16, 24, 20, 32)).astype(np.float32).transpose(axes)
    out, dx = np.empty_like(x), np.empty_like(x)
    assert out.strides == x.strides
    channels = x.shape[1]
    gamma = np.ones(channels, np.float32)
    tracemalloc.start()
    y, cache = fn.batch_norm_forward(x, gamma, out=out)
    fn.batch_norm_backward(y, cache, out=dx)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cache.x is x
    assert y is out
    assert peak < x.nbytes / 20
    expected, _ = reference.batch_norm_forward(x, gamma)
    assert_close(y, expected, ulps=8, scale=np.abs(expected) + 0.1)


def test_results_keep_memory_order(layout, rng):
    x = layout(rng.standard_normal((6, 5, 3, 4)).astype(np.float32))
    y, cache = fn.batch_norm_forward(x)
    for a in (y, fn.batch_norm_backward(x, cache)[0]):
        assert a.strides == np.empty_like(x).strides
        assert type(a) is np.ndarray


def test_in_place_arguments_of_any_layout_are_updated(layout, dtype, rng):
    args, dy = make(rng, (6, 5, 3, 4), 1, dtype)
    expected = run(args["x"], dy, args)
    out, dx = layout(np.zeros_like(dy)), layout(np.zeros_like(dy))
    mean, var = layout(args["running_mean"]), layout(args["running_var"])
    y, cache = fn.batch_norm_forward(args["x"], args["gamma"], args["beta"], mean, var, out=out)
    result = fn.batch_norm_backward(dy, cache, out=dx)
    assert y is out
    assert result[0] is dx
    for a, b in zip(expected, (y, mean, var, *result), strict=True):
        np.testing.assert_array_equal(a, b)


def test_backward_may_overwrite_dy_and_reuse_the_cache(level, dtype, rng):
    args, dy = make(rng, (50, 6, 20, 21), 1, dtype)
    _, cache = fn.batch_norm_forward(args["x"], args["gamma"], args["beta"], activation="relu")
    first = fn.batch_norm_backward(dy, cache)
    again = fn.batch_norm_backward(dy, cache)
    out = dy.copy()
    over = fn.batch_norm_backward(out, cache, out=out)
    assert over[0] is out
    for a, b, c in zip(first, again, over, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("where", ["x", "residual", "fresh"])
@pytest.mark.parametrize("shape", [(64, 33), (4, 5, 300), (3, 5, 7, 7), (30000, 50)])
def test_inference(level, threads, dtype, where, shape, rng):
    args, _ = make(rng, shape, 1, dtype, residual=True)
    expected = reference.batch_norm_inference(**args, activation="relu")
    frozen, _ = fn.batch_norm_forward(**args, activation="relu", training=False)
    out = {"x": args["x"], "residual": args["residual"], "fresh": None}[where]
    scale, centered, _ = term_sizes(args, 1, False)
    sizes = centered * scale + np.abs(along(1, args["beta"], len(shape))) + np.abs(args["residual"])
    y = fn.batch_norm_inference(**args, activation="relu", out=out)
    np.testing.assert_array_equal(y, frozen)
    assert out is None or y is out
    assert_close(y, expected, ulps=8, scale=sizes)


def test_interleaved_output_is_no_overlap(rng):
    both = np.zeros((8, 6), np.float32)
    both[::2] = rng.standard_normal((4, 6))
    y, _ = fn.batch_norm_forward(both[::2], out=both[1::2])
    np.testing.assert_array_equal(both[1::2], y)


# -- corners -----------------------------------------------------------------------------------------------------------


def test_absent_parameters_have_no_gradient(rng):
    x = rng.standard_normal((5, 3))
    for gamma, beta in itertools.product((None, np.ones(3)), (None, np.ones(3))):
        for module in (fn, reference):
            _, cache = module.batch_norm_forward(x, gamma, beta)
            dx, dgamma, dbeta = module.batch_norm_backward(x, cache)
            assert (dgamma is None, dbeta is None) == (gamma is None, beta is None)
            assert dx.shape == x.shape


@pytest.mark.parametrize("module", [fn, reference])
def test_empty_and_single(module, dtype):
    vector = np.ones(3, dtype)
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        x = np.zeros(shape, dtype)
        assert module.batch_norm_inference(x, vector, vector).shape == shape
        y, cache = module.batch_norm_forward(x, vector, vector, vector.copy(), vector.copy(), training=False)
        dx, dgamma, dbeta = module.batch_norm_backward(y, cache)
        assert dx.shape == shape
        np.testing.assert_array_equal(dgamma, 0)
        np.testing.assert_array_equal(dbeta, 0)
    y, cache = module.batch_norm_forward(np.zeros((4, 0), dtype))
    assert module.batch_norm_backward(y, cache)[0].shape == (4, 0)
    np.testing.assert_array_equal(module.batch_norm_inference(vector * 2, vector, vector, axis=0, eps=0.0), vector)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((70, 5), 1), ((3, 4, 300), 1), ((9, 4, 3, 3), 1), ((4, 3, 5000), 1)])
@pytest.mark.parametrize("name", ["x", "residual", "gamma", "beta", "running_mean", "running_var", "dy"])
def test_nonfinite_values_propagate_as_in_the_twin(level, value, shape, axis, name, rng):
    for training, at in itertools.product((False, True), (0, -1)):
        args, dy = make(rng, shape, axis, np.float32, residual=True)
        (dy if name == "dy" else args[name]).flat[at] = value
        results = []
        for module in (fn, reference):
            copies = {k: v.copy() for k, v in args.items()}
            y, cache = module.batch_norm_forward(**copies, axis=axis, activation="relu", training=training)
            results.append((y, copies["running_mean"], copies["running_var"], *module.batch_norm_backward(dy, cache)))
        for i, (a, b) in enumerate(zip(*results, strict=True)):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=f"result {i}")
            infinite = np.where(np.isinf(a), a, 0), np.where(np.isinf(b), b, 0)
            np.testing.assert_array_equal(*infinite, err_msg=f"result {i}")


def test_infinite_inverse_deviation_is_the_twins(level, dtype):
    """A running variance of 0 without eps: terms of both signs, and 0, that 1/std = inf multiplies once, not each."""
    x, dy = np.array([[1, 1], [-2, 0]], dtype), np.array([[1, 1], [1, -1]], dtype)
    ones, zeros = np.ones(2, dtype), np.zeros(2, dtype)
    gradients = []
    for module in (fn, reference):
        _, cache = module.batch_norm_forward(x, ones, None, zeros, zeros, training=False, eps=0.0)
        gradients.append(module.batch_norm_backward(dy, cache)[1])
    np.testing.assert_array_equal(gradients, [[-np.inf, np.inf]] * 2)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize(("shape", "axis"), [((70, 5), 1), ((3, 4, 300), 1), ((9, 4, 3, 3), 1), ((4, 3, 5000), 1),
                                             ((40000, 10), 1)])
def test_values_whose_squares_a_float_cannot_hold(level, size, shape, axis, rng):
    """The twin's statistics are in double: float sums that overflow or vanish must not be seen in the results."""
    args, dy = make(rng, shape, axis, np.float32)
    args["x"] = (args["x"].astype(np.float64) * size).astype(np.float32)
    args["running_mean"] *= 0
    dy *= 100  # products with x overflow too
    results = []
    for module in (fn, reference):
        copies = {k: None if v is None else v.copy() for k, v in args.items()}
        y, cache = module.batch_norm_forward(**copies, axis=axis, eps=0.0)
        results.append((y, copies["running_mean"], copies["running_var"], *module.batch_norm_backward(dy, cache)))
    (y, mean, var, dx, dgamma, dbeta), expected = results
    others = tuple(i for i in range(y.ndim) if i != axis)
    x, n = args["x"].astype(np.float64), y.size // shape[axis]
    xhat = np.abs((x - x.mean(others, keepdims=True)) / x.std(others, keepdims=True))
    scale = np.abs(along(axis, args["gamma"], y.ndim))
    # Tolerances as in `compare`; the scale of 1e37's deviations is near the subnormals: 3 bits less.
    assert_close(y, expected[0], ulps=16, scale=scale * (xhat + 0.3) + np.abs(along(axis, args["beta"], y.ndim)))
    assert_close(mean, expected[1], ulps=16, scale=size)
    assert_close(var, expected[2], ulps=16)
    sums, products = np.abs(dy).sum(others), (np.abs(dy) * xhat).sum(others)
    terms = np.abs(dy) + along(axis, sums, y.ndim) / n + xhat * along(axis, products, y.ndim) / n
    assert_close(dx, expected[3], ulps=16, scale=scale * terms / x.std(others, keepdims=True))
    assert_close(dgamma, expected[4], ulps=16, scale=products + 0.3 * sums)
    assert_close(dbeta, expected[5], ulps=16, scale=sums)


@pytest.mark.parametrize("pivot", [0.0, 2.0**-60, 1.0])
@pytest.mark.parametrize("shape", [(64, 40), (1024, 3), (5000, 3), (7, 3, 49), (4, 3, 5000)])
def test_deviations_that_cancel_and_whose_squares_vanish(level, threads, shape, pivot):
    """In float32 both sums of such a channel are 0, as those of a constant one, which stands beside it."""
    smallest = np.spacing(np.float32(pivot)) * (2.0**20 if pivot == 0 else 1)
    x = np.full(shape, pivot, np.float32)
    by_channel = np.moveaxis(x, 1, 0)
    deviations = by_channel[1].reshape(-1).astype(np.float64)
    deviations[5:7] += [smallest, -smallest]  # none of the few from which the pivot is chosen
    by_channel[1] = deviations.reshape(by_channel[1].shape)
    by_channel[2] = np.linspace(-1, 1, by_channel[2].size).reshape(by_channel[2].shape)
    results = []
    for module in (fn, reference):
        moments = module.Moments(axis=1)
        moments.update(x)
        y, _ = module.batch_norm_forward(x, axis=1, eps=0.0)  # var is seen in y: nan, or sqrt(n / 2) of the two
        results.append((moments.var(), y))
    (var, y), (expected_var, expected) = results
    assert var[0] == 0
    assert var[1] > 0
    np.testing.assert_allclose(var, expected_var, rtol=16 * np.finfo(np.float32).eps)
    assert_close(y, expected, ulps=16, scale=np.nan_to_num(np.abs(expected)) + 1)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("module", [fn, reference])
def test_subclasses_count_as_plain_arrays(module, rng):
    """The * of np.matrix is matrix multiplication."""
    x, v = rng.standard_normal((4, 4)), np.ones(4)
    for residual in (None, x):
        y, cache = module.batch_norm_forward(x.view(np.matrix), v, v, residual=residual)
        expected, plain = module.batch_norm_forward(x, v, v, residual=residual)
        np.testing.assert_array_equal(y, expected)
        for a, b in zip(module.batch_norm_backward(x.view(np.matrix), cache), module.batch_norm_backward(x, plain),
                        strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("module", [fn, reference])
def test_backward_refuses_x_only_where_the_cache_refers_to_it(module, rng):
    dense, strided = rng.standard_normal((6, 4)), rng.standard_normal((6, 8))[:, ::2]
    for x, refers in ((dense, True), (dense.T, True), (strided, False)):
        y, cache = module.batch_norm_forward(x)
        if refers:
            with pytest.raises(ValueError, match=r"^out: expected an array that does not overlap x"):
                module.batch_norm_backward(y, cache, out=x)
        else:
            assert module.batch_norm_backward(y, cache, out=x)[0] is x


def test_more_threads_than_channels_and_cores(rng):
    before = fn.get_num_threads()
    fn.set_num_threads(64)
    args, dy = make(rng, (300, 3, 300), 1, np.float32)
    compare(args, dy, 1)
    fn.set_num_threads(before)


# -- errors ------------------------------------------------------------------------------------------------------------

X = np.arange(24, dtype=np.float32).reshape(4, 6)
V, V5, V64 = np.ones(6, np.float32), np.ones(5, np.float32), np.ones(6)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


FORWARD_ERRORS = [
    ({"x": X.tolist()}, TypeError, "x: expected a numpy.ndarray, got list"),
    ({"x": X.astype(int)}, TypeError, "x: expected dtype float32 or float64, got int64"),
    ({"x": X.astype(np.float16)}, TypeError, "x: expected dtype float32 or float64, got float16"),
    ({"x": X.astype(">f4")}, TypeError, "x: expected dtype float32 or float64, got float32 in non-native byte order"),
    ({"x": X.astype(complex)}, TypeError, "x: expected dtype float32 or float64, got complex128"),
    ({"x": np.ma.masked_array(X)}, TypeError, "x: expected a plain numpy.ndarray, got MaskedArray"),
    ({"x": np.ones((), np.float32)}, ValueError, "x: expected at least 1 dimension, got 0"),
    ({"x": X[:1]}, ValueError, "x: expected more than one value per channel in training, got 1 (shape (1, 6))"),
    ({"x": X[:0]}, ValueError, "x: expected more than one value per channel in training, got 0 (shape (0, 6))"),
    ({"x": X[0], "axis": 0}, ValueError, "x: expected more than one value per channel in training, got 1"),
    ({"x": X[0]}, ValueError, "axis: expected an integer in [-1, 0] for 1 dimensions, got 1"),
    ({"axis": 2}, ValueError, "axis: expected an integer in [-2, 1] for 2 dimensions, got 2"),
    ({"axis": 1.0}, TypeError, "axis: expected an integer, got float"),
    ({"axis": None}, TypeError, "axis: expected an integer, got NoneType"),
    ({"axis": True}, TypeError, "axis: expected an integer, got bool"),
    ({"gamma": V5}, ValueError, "gamma: expected shape (6,), got (5,)"),
    ({"gamma": V[None]}, ValueError, "gamma: expected shape (6,), got (1, 6)"),
    ({"gamma": V64}, TypeError, "gamma: expected dtype float32, got float64"),
    ({"gamma": 1.0}, TypeError, "gamma: expected a numpy.ndarray, got float"),
    ({"beta": V5}, ValueError, "beta: expected shape (6,), got (5,)"),
    ({"beta": V64}, TypeError, "beta: expected dtype float32, got float64"),
    ({"running_mean": None}, ValueError, "running_mean: expected an array beside running_var, got None"),
    ({"running_var": None}, ValueError, "running_var: expected an array beside running_mean, got None"),
    ({"running_mean": V5}, ValueError, "running_mean: expected shape (6,), got (5,)"),
    ({"running_var": V64}, TypeError, "running_var: expected dtype float32, got float64"),
    ({"running_mean": read_only(V)}, ValueError, "running_mean: expected a writeable array, got a read-only one"),
    ({"running_var": read_only(V)}, ValueError, "running_var: expected a writeable array, got a read-only one"),
    ({"running_var": np.broadcast_to(np.float32(1), 6)}, ValueError, "running_var: expected a writeable array"),
    ({"training": None}, TypeError, "training: expected True or False, got NoneType"),
    ({"training": 1}, TypeError, "training: expected True or False, got int"),
    ({"training": False, "running_mean": None, "running_var": None}, ValueError,
     "running_mean: expected an array with training=False, got None"),
    ({"momentum": 1.5}, ValueError, "momentum: expected a number in [0, 1], got 1.5"),
    ({"momentum": -0.1}, ValueError, "momentum: expected a number in [0, 1], got -0.1"),
    ({"momentum": float("nan")}, ValueError, "momentum: expected a number in [0, 1], got nan"),
    ({"momentum": None}, TypeError, "momentum: expected a real number, got NoneType"),
    ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    ({"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0, got inf"),
    ({"eps": "1e-5"}, TypeError, "eps: expected a real number, got str"),
    ({"unbiased_running_var": 0}, TypeError, "unbiased_running_var: expected True or False, got int"),
    ({"activation": "gelu"}, ValueError, "activation: expected one of None, 'relu', 'leaky_relu', got 'gelu'"),
    ({"activation": 1}, TypeError, "activation: expected one of None, 'relu', 'leaky_relu', got int"),
    ({"negative_slope": float("nan")}, ValueError, "negative_slope: expected a finite number, got nan"),
    ({"negative_slope": 1e39}, ValueError, "negative_slope: expected a number that float32 can hold, got 1e+39"),
    ({"negative_slope": None}, TypeError, "negative_slope: expected a real number, got NoneType"),
    ({"residual": X[:2]}, ValueError, "residual: expected shape (4, 6), got (2, 6)"),
    ({"residual": X.astype(float)}, TypeError, "residual: expected dtype float32, got float64"),
    ({"out": X[:2].copy()}, ValueError, "out: expected shape (4, 6), got (2, 6)"),
    ({"out": X.astype(float)}, TypeError, "out: expected dtype float32, got float64"),
    ({"out": read_only(X)}, ValueError, "out: expected a writeable array, got a read-only one"),
    ({"out": np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (4, 6), (4, 4))}, ValueError,
     "out: expected an array whose elements do not overlap, got strides (4, 4)"),
]


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
@pytest.mark.parametrize(("change", "error", "message"), FORWARD_ERRORS, ids=[m for _, _, m in FORWARD_ERRORS])
def test_forward_refuses(module, change, error, message):
    args = {"x": X.copy(), "gamma": V.copy(), "beta": V.copy(), "running_mean": V.copy(), "running_var": V.copy()}
    args |= change
    arrays = [a for a in args.values() if isinstance(a, np.ndarray)]
    before = snapshot(*arrays)
    with pytest.raises(error) as raised:
        module.batch_norm_forward(**args)
    assert str(raised.value).startswith(message)
    assert_unchanged(before, *arrays)


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
@pytest.mark.parametrize("written", ["out", "running_mean", "running_var"])
@pytest.mark.parametrize("other", ["x", "gamma", "beta", "residual", "running_mean", "running_var"])
def test_forward_refuses_overlap(module, written, other):
    if written == other:
        return
    pool = np.linspace(0, 1, 100, dtype=np.float32)
    args = {"x": X.copy(), "gamma": V.copy(), "beta": V.copy(), "residual": X.copy(), "running_mean": V.copy(),
            "running_var": V.copy(), "out": X.copy()}
    for name, at in ((written, 0), (other, 3)):
        args[name] = pool[at:at + 24].reshape(4, 6) if args[name].ndim == 2 else pool[at:at + 6]
    before = snapshot(*args.values())
    with pytest.raises(ValueError, match="overlap"):
        module.batch_norm_forward(**args)
    assert_unchanged(before, *args.values())


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
def test_forward_refuses_its_input_as_output(module):
    x = X.copy()
    with pytest.raises(ValueError, match="out: expected an array that does not overlap x"):
        module.batch_norm_forward(x, out=x)
    np.testing.assert_array_equal(x, X)


INFERENCE_ERRORS = [
    ({"running_mean": None}, TypeError, "running_mean: expected a numpy.ndarray, got NoneType"),
    ({"running_var": V5}, ValueError, "running_var: expected shape (6,), got (5,)"),
    ({"gamma": V64}, TypeError, "gamma: expected dtype float32, got float64"),
    ({"eps": -1}, ValueError, "eps: expected a finite number >= 0, got -1"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    ({"axis": -3}, ValueError, "axis: expected an integer in [-2, 1]"),
    ({"residual": X[:, :2]}, ValueError, "residual: expected shape (4, 6), got (4, 2)"),
    ({"out": read_only(X)}, ValueError, "out: expected a writeable array"),
]


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
@pytest.mark.parametrize(("change", "error", "message"), INFERENCE_ERRORS, ids=[m for _, _, m in INFERENCE_ERRORS])
def test_inference_refuses(module, change, error, message):
    with pytest.raises(error) as raised:
        module.batch_norm_inference(**{"x": X.copy(), "running_mean": V.copy(), "running_var": V.copy(), **change})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
def test_inference_refuses_partial_overlap(module):
    pool = np.zeros(48, np.float32)
    with pytest.raises(ValueError, match="out: expected the same array as x or one that does not overlap it"):
        module.batch_norm_inference(pool[:24].reshape(4, 6), V, V, out=pool[6:30].reshape(4, 6))


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "twin"])
def test_backward_refuses(module):
    x = X.copy()
    _, cache = module.batch_norm_forward(x)
    _, with_residual = module.batch_norm_forward(x, residual=X.copy())
    other = (reference if module is fn else fn).batch_norm_forward(x)[1]
    dy = X.copy()
    table = [
        ((X.tolist(), cache, None), TypeError, "dy: expected a numpy.ndarray, got list"),
        ((X.astype(float), cache, None), TypeError, "dy: expected dtype float32, got float64"),
        ((X[:2], cache, None), ValueError, "dy: expected shape (4, 6), got (2, 6)"),
        ((dy, None, None), TypeError, "cache: expected what batch_norm_forward of the same module returned, got None"),
        ((dy, other, None), TypeError, "cache: expected what batch_norm_forward of the same module returned, got"),
        ((dy, cache, X[:2].copy()), ValueError, "out: expected shape (4, 6), got (2, 6)"),
        ((dy, cache, read_only(X)), ValueError, "out: expected a writeable array"),
        ((dy, cache, x), ValueError, "out: expected an array that does not overlap x"),
        ((dy, with_residual, dy), ValueError, "out: expected an array that does not overlap dy"),
    ]
    for (gradient, kept, out), error, message in table:
        with pytest.raises(error) as raised:
            module.batch_norm_backward(gradient, kept, out=out)
        assert str(raised.value).startswith(message)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(dy, X)


# -- the cache between forward and backward ----------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
                         ids=["copy", "deepcopy", "pickle"])
def test_cache_can_be_copied_and_pickled(dtype, layout, copied, rng):
    """In whatever memory order x was; pickle makes C order of others."""
    args, dy = make(rng, (4, 5, 6, 3), 1, dtype, residual=True)
    x, residual = layout(args["x"]), layout(args["residual"])
    _, cache = fn.batch_norm_forward(x, args["gamma"], args["beta"], residual=residual, activation="relu")
    for a, b in zip(fn.batch_norm_backward(dy, copied(cache)), fn.batch_norm_backward(dy, cache), strict=True):
        assert_close(a, b, ulps=100, scale=100)  # sums in another order


@pytest.mark.filterwarnings("ignore:Setting the (strides|shape|dtype):DeprecationWarning")
@pytest.mark.parametrize("changed", ["x", "residual"])
def test_backward_refuses_a_cache_whose_arrays_have_another_form(rng, changed):
    """Their memory is what a kernel would read beyond."""
    dy = np.ones((6000, 400), np.float32)
    arrays = {name: rng.standard_normal(dy.shape).astype(np.float32) for name in ("x", "residual")}
    _, cache = fn.batch_norm_forward(arrays["x"], residual=arrays["residual"])
    arrays[changed].resize((30, 20), refcheck=False)
    for gradient in (dy, np.ones((30, 20), np.float32)):
        with pytest.raises(ValueError, match=r"^(cache|dy|residual): "):
            fn.batch_norm_backward(gradient, cache)
    _, cache = fn.batch_norm_forward(arrays["x"] if changed == "residual" else dy)
    cache.x.dtype = np.float64
    with pytest.raises(ValueError, match="cache: expected x and residual as they were in forward"):
        fn.batch_norm_backward(np.ones(cache.x.shape), cache)
