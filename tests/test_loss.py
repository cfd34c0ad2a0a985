"""Softmax cross-entropy and its gradient against the twin, finite differences, exact cases and PyTorch."""

import itertools

import numpy as np
import pytest
from conftest import LAYOUTS, assert_close, snapshot
from test_softmax import CLASSES, PATHS, STREAMED

import fastnorm as fn
from fastnorm.reference import loss as reference

KINDS = ["labels", "probabilities"]
WEIGHTS = [None, "positive", "mixed"]
IGNORED = [-100, 1]
SMOOTHINGS = [0.0, 0.1, 1.0]
REDUCTIONS = ["mean", "sum", "none"]
PRODUCT = list(itertools.product(KINDS, WEIGHTS, IGNORED, SMOOTHINGS, REDUCTIONS))
SOME = [("labels", None, -100, 0.0, "mean"), ("labels", "mixed", 1, 0.1, "none"),
        ("labels", "positive", -100, 0.0, "sum"), ("labels", None, 1, 0.3, "mean"),
        ("probabilities", None, -100, 0.0, "mean"), ("probabilities", "mixed", -100, 0.1, "none")]


def assert_untouched(before, *arrays):
    """Arrays of any layout hold the values that they held (NaN where NaN was)."""
    for old, new in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(new, old)


def make_case(rng, shape, axis, dtype, kind, weight, ignore, smoothing, reduction):
    """Logits, targets and keyword arguments of one call."""
    x = (rng.standard_normal(shape) * 4).astype(dtype)
    classes = shape[axis]
    if kind == "labels":
        targets = rng.integers(0, classes, shape[:axis] + shape[axis + 1:])
        if ignore < 0 and targets.size > 1:
            targets[rng.random(targets.shape) < 0.2] = ignore
        if targets.size:
            targets.flat[0] = classes - 1
    else:
        targets = rng.random(shape)
        targets[rng.random(shape) < 0.3] = 0
        targets = (targets / np.maximum(targets.sum(axis=axis, keepdims=True), 0.1)).astype(dtype)
    w = None
    if weight is not None:
        w = rng.uniform(0.5, 2, classes).astype(dtype)
        if weight == "mixed":
            w[::3] = 0
            w[1::3] *= -1
    return x, targets, {"axis": axis, "weight": w, "ignore_index": ignore, "label_smoothing": smoothing,
                        "reduction": reduction}


def assert_twin(x, targets, options, actual):
    """Loss and gradient against the twin in float64.

    Losses are sums of q (log sum + (max - x)), gradients are p Q - q, both divided: the scale is the sum of the
    magnitudes of these terms. Ulps: 4 for p and log sum (see test_softmax), 3 for Q, q and the divisor and the
    products; in float64 also the twin's own |max - x| / 2, and sums over the classes and rows on either side.
    """
    wide = [np.asarray(a).astype(np.float64) if np.asarray(a).dtype.kind == "f" else a for a in (x, targets)]
    given = options | {"weight": None if options["weight"] is None else options["weight"].astype(np.float64)}
    axis, classes = options["axis"], x.shape[options["axis"]]
    loss, gradient = reference.softmax_cross_entropy(*wide, **given)
    positive = given | {"weight": None if given["weight"] is None else np.abs(given["weight"])}

    p = reference.softmax(wide[0], axis=axis)
    log_p = np.abs(reference.log_softmax(wide[0], axis=axis))
    if np.asarray(targets).dtype.kind == "f":
        q, divisor = np.array(wide[1]), float(x.size // classes)
        kept = np.ones(x.shape[:axis] + x.shape[axis + 1:], bool)
        q *= 1 - options["label_smoothing"]
    else:
        kept = np.asarray(targets) != options["ignore_index"]
        y = np.where(kept, targets, 0)
        one_hot = np.expand_dims(y, axis) == np.arange(classes).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        q = one_hot * (1 - options["label_smoothing"])
        divisor = np.sum(kept if given["weight"] is None else given["weight"][y] * kept)
    w = np.ones(classes) if positive["weight"] is None else positive["weight"]
    w = w.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    uniform = options["label_smoothing"] / classes * w
    q = q * w + uniform
    q = np.where(np.expand_dims(kept, axis), q, 0)
    if options["reduction"] != "mean":
        divisor = 1.0
    divisor = abs(divisor) or 1.0
    own = 7 + (np.sqrt(x.size) + log_p if x.dtype == np.float64 else 0)
    total_q = q.sum(axis=axis, keepdims=True)
    loss_scale = (own * q * (1 + log_p)).sum(axis=axis)
    if options["reduction"] != "none":
        loss_scale = loss_scale.sum()
    assert_close(actual[0], np.asarray(loss).astype(x.dtype), ulps=1, scale=np.asarray(loss_scale / divisor))
    assert_close(actual[1], gradient.astype(x.dtype), ulps=1, scale=own * (p * total_q + q) / divisor)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_twin_over_every_option(axis, layout, dtype, level, rng):
    for options in PRODUCT:
        x, targets, keywords = make_case(rng, (6, 5, 7), axis, dtype, *options)
        x = layout(x)
        if targets.dtype.kind == "f":
            targets = layout(targets)
        if keywords["weight"] is not None:
            keywords["weight"] = layout(keywords["weight"])
        before = snapshot(x, targets)
        loss, dx = fn.softmax_cross_entropy(x, targets, **keywords)
        assert_untouched(before, x, targets)
        assert loss.dtype == dx.dtype == dtype
        assert isinstance(loss, np.ndarray) == (keywords["reduction"] == "none")
        assert_twin(x, targets, keywords, (loss, dx))


@pytest.mark.parametrize("classes", CLASSES)
def test_twin_by_classes(classes, dtype, level, rng):
    for options in SOME:
        for shape, axis in (((7, classes), 1), ((classes, 6), 0), ((2, classes, 3, 3), 1), ((classes,), 0)):
            x, targets, keywords = make_case(rng, shape, axis, dtype, *options)
            assert_twin(x, targets, keywords, fn.softmax_cross_entropy(x, targets, **keywords))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_the_same_bits_everywhere(path, options, dtype, rng):
    x, targets, keywords = make_case(rng, PATHS[path], 1, dtype, *options)
    before = fn.get_num_threads()
    try:
        fn.set_num_threads(1)
        loss, dx = fn.softmax_cross_entropy(x, targets, **keywords)
        assert_twin(x, targets, keywords, (loss, dx))
        for n in (2, 3, 7):
            fn.set_num_threads(n)
            again, dx_again = fn.softmax_cross_entropy(x, targets, **keywords)
            assert again.tobytes() == loss.tobytes()
            assert dx_again.tobytes() == dx.tobytes()
    finally:
        fn.set_num_threads(before)
    shifted, dx_shifted = fn.softmax_cross_entropy(LAYOUTS["unaligned"](x), LAYOUTS["unaligned"](targets), **keywords)
    assert shifted.tobytes() == loss.tobytes()
    assert dx_shifted.tobytes() == dx.tobytes()
    in_place, same = fn.softmax_cross_entropy(x, targets, out=x, **keywords)
    assert same is x
    assert in_place.tobytes() == loss.tobytes()
    assert x.tobytes() == dx.tobytes()


@pytest.mark.parametrize("options", SOME[1:3] + SOME[4:5], ids=str)
@pytest.mark.parametrize("path", STREAMED)
def test_streamed_gradients_are_the_same_bits(path, options, level, rng):
    x, targets, keywords = make_case(rng, STREAMED[path], 1, np.float32, *options)
    loss, dx = fn.softmax_cross_entropy(x, targets, **keywords)
    again, _ = fn.softmax_cross_entropy(x, targets, out=x, **keywords)  # in place, which does not stream
    assert again.tobytes() == loss.tobytes()
    assert dx.tobytes() == x.tobytes()


@pytest.mark.parametrize("probabilities", [False, True])
def test_delayed_rows(probabilities, dtype, level, rng):
    """A row is written while the next one is computed, whatever that one is: ignored, or of a mass beyond the range."""
    x = rng.standard_normal((320, 6400)).astype(dtype)
    weight = rng.uniform(0.5, 1, 6400).astype(dtype)
    if probabilities:
        targets = rng.uniform(0, 1e-3, x.shape).astype(dtype)
        targets[::7] *= dtype.type(np.finfo(dtype).max / 1e5)
    else:
        targets = rng.integers(0, 6400, 320)
        targets[rng.integers(0, 320, 100)] = targets[[0, 1, 7, 8, 318, 319]] = -100
    losses, dx = fn.softmax_cross_entropy(x, targets, weight=weight, reduction="none")
    one_by_one = [fn.softmax_cross_entropy(x[i:i + 1], targets[i:i + 1], weight=weight, reduction="none")
                  for i in range(320)]
    assert losses.tobytes() == np.concatenate([loss for loss, _ in one_by_one]).tobytes()
    assert dx.tobytes() == np.concatenate([d for _, d in one_by_one]).tobytes()


@pytest.mark.parametrize("out_layout", LAYOUTS)
def test_out_of_any_layout(out_layout, layout, dtype, rng):
    x, targets, keywords = make_case(rng, (3, 4, 5), 1, dtype, "labels", "positive", 1, 0.1, "none")
    expected = fn.softmax_cross_entropy(x, targets, **keywords)
    out = LAYOUTS[out_layout](np.zeros_like(x))
    x = layout(x)
    losses, dx = fn.softmax_cross_entropy(x, targets, out=out, **keywords)
    assert dx is out
    # Another layout may take the other form, which rounds differently.
    assert_close(losses, expected[0], ulps=4, scale=1 + np.abs(expected[0]))
    assert_close(out, expected[1], ulps=4, scale=np.ones(x.shape))
    fn.softmax_cross_entropy(x, targets, out=x, **keywords)
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("integer", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
                                     np.longlong, np.ulonglong])
@pytest.mark.parametrize("ignore", [0, 2, -1])
def test_integer_targets_of_any_width_and_layout(integer, ignore, rng):
    x = rng.standard_normal((3, 4, 6, 5)).astype(np.float32)
    targets = rng.integers(0, 4, (3, 6, 5))
    if ignore < 0 and np.iinfo(integer).min < 0:
        targets[1] = ignore
    for class_axis in (1, 3):
        logits = np.moveaxis(x, 1, class_axis)
        keywords = {"axis": class_axis, "ignore_index": ignore, "reduction": "none"}
        expected = reference.softmax_cross_entropy(logits, targets, **keywords)
        for view in (logits, np.asfortranarray(logits), logits.copy()):
            for labels in (targets.astype(integer), np.asfortranarray(targets.astype(integer)),
                           np.repeat(targets.astype(integer), 2, axis=1)[:, ::2],
                           targets[:, ::-1].astype(integer)[:, ::-1]):
                loss, dx = fn.softmax_cross_entropy(view, labels, **keywords)
                np.testing.assert_allclose(loss, expected[0], rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(dx, expected[1], rtol=1e-5, atol=1e-6)


def test_ignore_index_that_labels_cannot_hold(rng):
    x = rng.standard_normal((3, 4))
    for ignore in (-(2**70), -1, 300, 2**63, 2**64 - 1, 2**80):
        loss, _ = fn.softmax_cross_entropy(x, np.array([1, 2, 3], np.uint8), ignore_index=ignore)
        assert loss == fn.softmax_cross_entropy(x, np.array([1, 2, 3]))[0]
    top = np.array([1, 2**64 - 1, 3], np.uint64)
    for module in (fn, reference):
        loss, dx = module.softmax_cross_entropy(x, top, ignore_index=2**64 - 1)
        assert loss == pytest.approx(module.softmax_cross_entropy(x[[0, 2]], np.array([1, 3]))[0])
        assert not dx[1].any()
        with pytest.raises(ValueError, match="got 18446744073709551615 at position 1"):
            module.softmax_cross_entropy(x, top, ignore_index=-1)


@pytest.mark.parametrize("target", [2, np.int32(2), np.uint8(2), np.array(2), np.array(2, np.int16)], ids=repr)
def test_one_row(target, dtype):
    x = np.array([1, 2, 3, 4], dtype)
    for module in (fn, reference):
        loss, dx = module.softmax_cross_entropy(x, target)
        assert loss == pytest.approx(float(module.softmax_cross_entropy(x[None], np.array([2]))[0]), rel=1e-6)
        assert dx.shape == (4,)
        assert module.softmax_cross_entropy(x, target, ignore_index=2)[0] == 0
        losses, _ = module.softmax_cross_entropy(x, target, reduction="none")
        assert losses.shape == ()


@pytest.mark.parametrize("options", PRODUCT, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 1), ((2, 3, 4), 1)], ids=["rows", "inner"])
def test_finite_differences(shape, axis, options, rng):
    """Central differences: h**2 / 6 times a third derivative below 1, and the loss' rounding over h."""
    x, targets, keywords = make_case(rng, shape, axis, np.float64, *options)
    x /= 4
    if keywords["weight"] is not None:
        keywords["weight"] = np.abs(keywords["weight"]) + 0.1  # so that the mean's divisor is no near-cancellation
    _, gradient = fn.softmax_cross_entropy(x, targets, **keywords)
    h = 1e-5
    for i in np.ndindex(shape):
        sides = []
        for step in (h, -h):
            moved = x.copy()
            moved[i] += step
            sides.append(np.sum(fn.softmax_cross_entropy(moved, targets, **keywords)[0]))
        assert abs((sides[0] - sides[1]) / (2 * h) - gradient[i]) < 1e-8


@pytest.mark.parametrize("classes", [1, 2, 4, 16, 128, 256])
@pytest.mark.parametrize("inner", [1, 64])
def test_exact(classes, inner, dtype, level):
    """Equal logits and powers of two: all of the gradient has an exact representation. The loss is a sum of up to 512
    equal numbers, added 8 in a row and then pairwise.
    """
    x = np.full((8, classes, inner), 3.0, dtype)
    y = np.arange(8)[:, None] * np.ones(inner, int) % classes
    one_hot = np.zeros_like(x)
    np.put_along_axis(one_hot, y[:, None], 1, 1)
    expected = (1 / dtype.type(classes) - one_hot) / (8 * inner)
    for targets in (y, one_hot):
        loss, dx = fn.softmax_cross_entropy(x, targets, axis=1)
        np.testing.assert_array_equal(dx, expected)
        assert_close(loss, np.array(np.log(classes), dtype)[()], ulps=1 if dtype == np.float32 else 5)


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("inner", [1, 70])
def test_extreme_logits(classes, inner, dtype, level):
    inf, nan, top = np.inf, np.nan, float(np.float32(3e38))
    cases = [  # first two logits of a row (the others are -inf), label, loss, gradient of the two
        ([0, -1e4], 0, 0, [0, 0]),
        ([0, -1e4], 1, 1e4, [1, -1]),
        ([1e4, -1e4], 1, 2e4, [1, -1]),
        ([top, -top], 0, 0, [0, 0]),
        ([top, -top], 1, 2 * top, [1, -1]),
        ([top, top], 0, np.log(2), [-0.5, 0.5]),
        ([5, -inf], 0, 0, [0, 0]),
        ([5, -inf], 1, inf, [1, -1]),
        ([-inf, -inf], 0, nan, [nan, nan]),
        ([inf, 0], 1, nan, [nan, nan]),
        ([nan, 0], 1, nan, [nan, nan]),
        ([-top, -inf], 0, 0, [0, 0]),
    ]
    x = np.full((len(cases), classes, inner), -inf, dtype)
    y = np.zeros((len(cases), inner), np.int64)
    one_hot = np.zeros_like(x)
    for i, (first, label, _, _) in enumerate(cases):
        x[i, :2] = np.array(first, dtype)[:, None]
        y[i] = label
        one_hot[i, label] = 1
    for targets in (y, one_hot):
        losses, dx = fn.softmax_cross_entropy(x, targets, axis=1, reduction="none")
        with np.errstate(over="ignore"):
            wanted = np.array([case[2] for case in cases]).astype(dtype)
        assert_close(losses, np.repeat(wanted[:, None], inner, 1), ulps=1)
        for i, (_, _, _, gradient) in enumerate(cases):
            np.testing.assert_array_equal(dx[i, :2], np.repeat(np.array(gradient, dtype)[:, None], inner, 1))
            np.testing.assert_array_equal(dx[i, 2:], nan if np.isnan(gradient[0]) else 0)
        twin, twin_dx = reference.softmax_cross_entropy(x, targets, axis=1, reduction="none")
        assert_close(losses, twin, ulps=1)
        np.testing.assert_array_equal(dx, twin_dx)
        # All rows but the one of -inf, the one of infinity and the one of NaN are right in the mean, too.
        good = np.isfinite(wanted) | (wanted == inf)
        mean, _ = fn.softmax_cross_entropy(x[good], targets[good], axis=1)
        assert mean == inf


def test_mean_of_losses_that_a_float32_holds_only_together():
    x = np.array([[3e38, -3e38], [0, 0], [0, -np.inf], [0, -np.inf]], np.float32)
    loss, _ = fn.softmax_cross_entropy(x, np.array([1, 0, 0, 0]))
    assert loss == np.float32(float(np.float32(3e38)) * 2 / 4)


@pytest.mark.parametrize("inner", [1, 70])
@pytest.mark.parametrize("classes", [3, 300])
def test_smoothing_meets_minus_infinity(classes, inner, dtype):
    x = np.zeros((2, classes, inner), dtype)
    x[0, 2] = -np.inf
    y = np.zeros((2, inner), int)
    loss, dx = fn.softmax_cross_entropy(x, y, axis=1, label_smoothing=0.3, reduction="none")
    assert np.all(loss[0] == np.inf)
    assert np.all(np.isfinite(loss[1]))
    assert_close(dx, reference.softmax_cross_entropy(x, y, axis=1, label_smoothing=0.3, reduction="none")[1], ulps=6,
                 scale=np.ones(x.shape))
    w = np.ones(classes, dtype)
    w[2] = 0  # no mass there: 0 * inf counts as 0
    loss, _ = fn.softmax_cross_entropy(x, y, axis=1, label_smoothing=0.3, weight=w, reduction="none")
    assert np.all(np.isfinite(loss))
    twin, _ = reference.softmax_cross_entropy(x, y, axis=1, label_smoothing=0.3, weight=w, reduction="none")
    assert_close(loss, twin, ulps=8 + (x.dtype == np.float64) * 20)


def test_large_and_small_weights(dtype, level):
    """The scale of the gradient may be far from 1: only the result may overflow or underflow, no step before it."""
    x = np.array([[0, -1, -80, -np.inf]] * 3, dtype)
    for exponent in (30, -35):
        w = np.full(4, 2.0**(exponent * (3 if dtype == np.float32 else 20)), dtype)
        _, dx = fn.softmax_cross_entropy(x, np.array([0, 1, 2]), weight=w, reduction="sum")
        _, twin = reference.softmax_cross_entropy(x, np.array([0, 1, 2]), weight=w, reduction="sum")
        assert_close(dx, twin, ulps=90 if dtype == np.float64 else 8, scale=np.abs(twin) + w[0] * (twin < 0))


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("kind", ["no rows", "ignored", "weight 0", "cancelling weights", "NaN but ignored"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_divisor_of_zero(module, kind, reduction, dtype):
    x = np.array([[1, 2, 3], [4, 5, 6]], dtype)
    y, w, out = np.array([0, 1]), None, np.full((2, 3), 7, dtype)
    if kind == "no rows":
        x, y, out = x[:0], y[:0], out[:0]
    elif kind == "ignored":
        y[:] = -100
    elif kind == "weight 0":
        w = np.array([0, 0, 1], dtype)
    elif kind == "cancelling weights":
        w = np.array([1, -1, 1], dtype)
    else:
        x[:], y[:] = np.nan, -100
    loss, dx = module.softmax_cross_entropy(x, y, weight=w, reduction=reduction, out=out)
    if kind == "cancelling weights" and reduction != "mean":
        return
    np.testing.assert_array_equal(loss, np.zeros(y.shape) if reduction == "none" else 0)
    np.testing.assert_array_equal(dx, np.zeros(x.shape))


def test_no_rows_of_probabilities(dtype):
    for module in (fn, reference):
        loss, dx = module.softmax_cross_entropy(np.empty((0, 3), dtype), np.empty((0, 3), dtype))
        assert loss == 0
        assert dx.shape == (0, 3)


def test_hundred_thousand_classes(dtype, level, rng):
    for options in SOME:
        x, targets, keywords = make_case(rng, (3, 100_000), 1, dtype, *options)
        assert_twin(x, targets, keywords, fn.softmax_cross_entropy(x, targets, **keywords))


def test_many_rows_sum_in_float64(rng):
    x = rng.standard_normal((1_000_000, 2)).astype(np.float32)
    y = rng.integers(0, 2, 1_000_000)
    loss, _ = fn.softmax_cross_entropy(x, y)
    assert_close(loss, np.float32(reference.softmax_cross_entropy(x.astype(np.float64), y)[0]), ulps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_layouts_run_in_place_without_a_copy(kind, rng):
    x, targets, _ = make_case(rng, (4, 6, 5, 3), 3, np.float32, kind, None, -100, 0.0, "none")
    x, targets = np.moveaxis(x, 3, 1), np.moveaxis(targets, 3, 1) if kind == "probabilities" else targets
    losses, dx = fn.softmax_cross_entropy(x, targets, axis=1, reduction="none")
    assert dx.strides == x.strides
    assert losses.flags.c_contiguous


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
Y = np.array([0, 3, 1])
P = np.full((3, 4), 0.25, np.float32)
READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False
BROADCAST = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (3, 4), (0, 4))
ERRORS = [
    ({"logits": [[1.0]]}, TypeError, "logits: expected a numpy.ndarray, got list"),
    ({"logits": X.astype(np.float16)}, TypeError, "logits: expected dtype float32 or float64, got float16"),
    ({"logits": np.float64(1)}, TypeError, "logits: expected a numpy.ndarray, got float64"),
    ({"logits": np.array(1.0)}, ValueError, "logits: expected at least 1 dimension, got shape ()"),
    ({"logits": np.empty((3, 0))}, ValueError, "logits: expected at least one class along axis 1, got shape (3, 0)"),
    ({"logits": np.empty((0, 0))}, ValueError, "logits: expected at least one class along axis 1, got shape (0, 0)"),
    ({"axis": 2}, ValueError, "axis: expected an integer in [-2, 1] for 2 dimensions, got 2"),
    ({"axis": None}, TypeError, "axis: expected an integer, got NoneType"),
    ({"targets": [0, 3, 1]}, TypeError, "targets: expected a numpy.ndarray, got list"),
    ({"targets": 1}, TypeError, "targets: expected a numpy.ndarray, got int"),
    ({"logits": X[0], "targets": 1.0}, TypeError, "targets: expected an integer, got float"),
    ({"logits": X[0], "targets": True}, TypeError, "targets: expected an integer, got bool"),
    ({"logits": X[0], "targets": 4}, ValueError, "targets: expected classes in [0, 3] or ignore_index -100, got 4"),
    ({"logits": X[0], "targets": 10**30}, ValueError, "targets: expected classes in [0, 3] or ignore_index -100, got"),
    ({"targets": Y == 1}, TypeError, "targets: expected an integer dtype or float32, got bool"),
    ({"targets": Y.astype(Y.dtype.newbyteorder())}, TypeError,
     "targets: expected an integer dtype or float32, got int64 in non-native byte order"),
    ({"targets": P.astype(np.float64)}, TypeError, "targets: expected an integer dtype or float32, got float64"),
    ({"targets": Y.astype(complex)}, TypeError, "targets: expected an integer dtype or float32, got complex128"),
    ({"targets": np.ma.array(Y)}, TypeError, "targets: expected a plain numpy.ndarray, got MaskedArray"),
    ({"targets": Y[:2]}, ValueError, "targets: expected shape (3,), got (2,)"),
    ({"targets": Y[:, None]}, ValueError, "targets: expected shape (3,), got (3, 1)"),
    ({"targets": P[0]}, ValueError, "targets: expected shape (3, 4), got (4,)"),
    ({"targets": np.array([0, 4, 9])}, ValueError,
     "targets: expected classes in [0, 3] or ignore_index -100, got 4 at position 1"),
    ({"targets": np.array([0, 1, -1])}, ValueError,
     "targets: expected classes in [0, 3] or ignore_index -100, got -1 at position 2"),
    ({"targets": np.array([0, 1, -100]), "ignore_index": 7}, ValueError,
     "targets: expected classes in [0, 3] or ignore_index 7, got -100 at position 2"),
    ({"logits": np.zeros((2, 4, 3)), "targets": np.array([[0, 1, 2], [3, 200, 255]], np.uint8), "axis": 1}, ValueError,
     "targets: expected classes in [0, 3] or ignore_index -100, got 200 at position (1, 1)"),
    ({"weight": np.ones(4)}, TypeError, "weight: expected dtype float32, got float64"),
    ({"weight": np.ones(3, np.float32)}, ValueError, "weight: expected shape (4,), got (3,)"),
    ({"weight": [1.0] * 4}, TypeError, "weight: expected a numpy.ndarray, got list"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an integer, got float"),
    ({"ignore_index": True}, TypeError, "ignore_index: expected an integer, got bool"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected a number in [0, 1], got -0.1"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number in [0, 1], got 1.5"),
    ({"label_smoothing": np.nan}, ValueError, "label_smoothing: expected a number in [0, 1], got nan"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing: expected a real number, got str"),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ({"reduction": None}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got None"),
    ({"out": np.empty((4, 3), np.float32)}, ValueError, "out: expected shape (3, 4), got (4, 3)"),
    ({"out": np.empty((3, 4))}, TypeError, "out: expected dtype float32, got float64"),
    ({"out": READ_ONLY}, ValueError, "out: expected a writeable array, got a read-only one"),
    ({"out": BROADCAST}, ValueError, "out: expected an array whose elements do not overlap"),
    ({"out": X[:, ::-1]}, ValueError, "out: expected the same array as logits or one that does not overlap it"),
    ({"targets": P, "out": P}, ValueError, "out: expected an array that does not overlap targets"),
    ({"weight": P[1], "out": P}, ValueError, "out: expected an array that does not overlap weight"),
]


@pytest.mark.parametrize("module", [fn, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(("bad", "error", "message"), ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(module, bad, error, message):
    arguments = {"logits": X, "targets": Y} | bad
    written = arguments.setdefault("out", np.full(np.shape(arguments["logits"]), 7, getattr(
        arguments["logits"], "dtype", np.float32)))
    watched = (X, Y, P, READ_ONLY, written)
    before = snapshot(*watched)
    with pytest.raises(error) as caught:
        module.softmax_cross_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)
    assert message in str(caught.value)
    assert_untouched(before, *watched)


def test_wrong_label_among_many(threads):
    y = np.zeros(200_000, np.int32)
    y[[150_000, 199_999]] = 2
    x = np.zeros((200_000, 2), np.float32)
    with pytest.raises(ValueError, match="got 2 at position 150000"):
        fn.softmax_cross_entropy(x, y, out=x)
    assert not x.any()
    y[y == 2] = 1
    w = np.array([0.25, 8], np.float32)
    loss, _ = fn.softmax_cross_entropy(x, y, weight=w)
    assert loss == np.float32(np.log(2))


@pytest.mark.parametrize("options", PRODUCT, ids=str)
def test_pytorch(options, rng):
    """Values and gradients of torch.nn.functional.cross_entropy in float64."""
    torch = pytest.importorskip("torch")
    for shape in ((6, 5), (3, 5, 7), (5,)):
        axis = 0 if len(shape) == 1 else 1
        x, targets, keywords = make_case(rng, shape, axis, np.float64, *options)
        if keywords["weight"] is not None:
            # Where the divisor is 0 PyTorch gives NaN; here, and by design, 0.
            keywords["weight"] = keywords["weight"] + 3
        if options[0] == "labels" and np.all(targets == keywords["ignore_index"]):
            continue
        theirs = {k: v for k, v in keywords.items() if k != "axis"}
        if options[0] == "probabilities":  # where it refuses an ignore_index >= 0; here it has no effect
            theirs["ignore_index"] = -100
        if theirs["weight"] is not None:
            theirs["weight"] = torch.from_numpy(theirs["weight"])
        leaf = torch.from_numpy(x.copy()).requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, torch.from_numpy(np.asarray(targets)), **theirs)
        expected.sum().backward()
        loss, dx = fn.softmax_cross_entropy(x, targets, **keywords)
        np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(dx, leaf.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("module", [fn, reference])
def test_subclasses_count_as_plain_arrays(module):
    x, y = np.arange(24.0).reshape(3, 4, 2) % 5, np.array([[0, 1], [2, 3], [3, 0]])
    for logits, targets in ((x, y.view(np.matrix)), (x[..., 0].view(np.matrix), y[:, 0]),
                            (x[..., 0], x[..., 1].copy().view(np.matrix))):
        expected = module.softmax_cross_entropy(np.asarray(logits), np.asarray(targets), axis=1)
        for a, b in zip(module.softmax_cross_entropy(logits, targets, axis=1), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_signaling_nan_weights_warn_of_nothing():
    """A cast of one is an invalid operation to the processor: the twin must keep that to itself."""
    weight = np.array([0x7F800001, 0x3F800000], np.uint32).view(np.float32)
    for module in (fn, reference):
        loss, _ = module.softmax_cross_entropy(np.zeros((1, 2), np.float32), np.array([0]), weight=weight)
        assert np.isnan(loss)
