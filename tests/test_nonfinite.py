"""NaN, infinity, the largest numbers and subnormals in every position of every argument: the outcome is the twin's."""

from __future__ import annotations

import ctypes
import os
import platform
import time

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import reference

# Names of what is put in, and its value for a dtype. The largest doubles leave 2**24: the twin has no wider type there
# that would keep products and sums of a few terms from overflowing on their way.
SPECIAL = {
    "nan": lambda info: np.nan,
    "+inf": lambda info: np.inf,
    "-inf": lambda info: -np.inf,
    "largest": lambda info: info.max if info.bits == 32 else info.max * 2.0**-24,
    "-largest": lambda info: -info.max if info.bits == 32 else -info.max * 2.0**-24,
    "subnormal": lambda info: 3 * info.smallest_subnormal,
    "-subnormal": lambda info: -3 * info.smallest_subnormal,
}


# -- the calls: (backend, arrays by argument name) to everything that the caller sees afterwards -----------------------


def batch_norm(**options):
    def call(backend, a):
        y, cache = backend.batch_norm_forward(**{k: v for k, v in a.items() if k != "dy"}, **options)
        return [y, a["running_mean"], a["running_var"], *backend.batch_norm_backward(a["dy"], cache)]
    return call


def moments(backend, a):
    m = backend.Moments()
    m.update(a["x"])
    m.update(a["second"])
    return [m.mean, m.var(), m.standardize(a["x"], eps=1e-3)]


def cross_entropy(**options):
    def call(backend, a):
        logits = a["logits"]
        given = dict(a)
        given.setdefault("targets", np.indices(logits.shape)[0][:, 0] % logits.shape[1])
        loss, gradient = backend.softmax_cross_entropy(**given, axis=1, **options)
        return [np.asarray(loss), gradient]
    return call


def returned(name, **options):
    """A function whose result is new, its arguments given in order."""
    return lambda backend, a: [getattr(backend, name)(*a.values(), **options)]


def update(name, **options):
    """A function that writes into its arguments."""
    def call(backend, a):
        result = getattr(backend, name)(**a, **options)
        return [*([] if result is None else [np.asarray(result)]), *a.values()]
    return call


# Kinds of arguments: "x" of x's shape, "c" one a channel; "+" positive, "01" between 0 and 1.
VECTORS = {"gamma": "c", "beta": "c", "running_mean": "c", "running_var": "+c"}
STATE = {"params": "x", "grads": "x"}
ELEMENTWISE = ("relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh")
CASES = {
    "batch norm": (batch_norm(), {"x": "x", **VECTORS, "dy": "x"}),
    "batch norm relu residual": (batch_norm(activation="relu"), {"x": "x", **VECTORS, "dy": "x", "residual": "x"}),
    "batch norm frozen": (batch_norm(training=False, activation="leaky_relu"), {"x": "x", **VECTORS, "dy": "x"}),
    "inference": (lambda backend, a: [backend.batch_norm_inference(**a)], {"x": "x", **VECTORS}),
    "moments": (moments, {"x": "x", "second": "x"}),
    "softmax": (returned("softmax", axis=1), {"x": "x"}),
    "log_softmax": (returned("log_softmax", axis=1), {"x": "x"}),
    "labels": (cross_entropy(), {"logits": "x"}),
    "labels smoothing": (cross_entropy(label_smoothing=0.1), {"logits": "x", "weight": "+c"}),
    "labels none": (cross_entropy(reduction="none"), {"logits": "x", "weight": "+c"}),
    "probabilities": (cross_entropy(reduction="sum"), {"logits": "x", "targets": "+x"}),
    "probabilities smoothing": (cross_entropy(label_smoothing=0.1), {"logits": "x", "targets": "+x", "weight": "+c"}),
    "probabilities none": (cross_entropy(reduction="none"), {"logits": "x", "targets": "+x", "weight": "+c"}),
    **{name: (returned(name), {"x": "x"}) for name in ELEMENTWISE},
    **{f"{name}_backward": (returned(f"{name}_backward"), {"dy": "x", "saved": "01x"}) for name in ELEMENTWISE},
    "dropout": (returned("dropout", p=0.5, seed=3), {"x": "x"}),
    "dropout_backward": (returned("dropout_backward", p=0.5, seed=3), {"dy": "x"}),
    "momentum": (update("momentum_step", lr=0.1, weight_decay=0.01), {**STATE, "velocities": "x"}),
    "nesterov": (update("momentum_step", lr=0.1, nesterov=True), {**STATE, "velocities": "x"}),
    "rmsprop": (update("rmsprop_step"), {**STATE, "square_avgs": "+x"}),
    "rmsprop centered": (update("rmsprop_step", centered=True, momentum=0.9),
                         {**STATE, "square_avgs": "+x", "grad_avgs": "x", "momentum_buffers": "x"}),
    "adam": (update("adam_step", step=3), {**STATE, "exp_avgs": "x", "exp_avg_sqs": "+x"}),
    "adamw amsgrad": (update("adam_step", step=1000, amsgrad=True, decoupled_weight_decay=True, weight_decay=0.1),
                      {**STATE, "exp_avgs": "x", "exp_avg_sqs": "+x", "max_exp_avg_sqs": "+x"}),
    "adagrad": (update("adagrad_step", step=2), {**STATE, "state_sums": "+x"}),
    "clip": (update("clip_grad_norm", max_norm=1.0), {"grads": "x"}),
}
# (N, C) with few and many classes, channels of short and of long runs: with heads, bodies and tails in each.
SHAPES = [(70, 5), (9, 150), (3, 4, 37), (2, 3, 300)]
ROWS, LANES = (9, 150), (3, 4, 37)  # the two forms of a softmax; for what works on flat memory one is enough


def shapes_of(name, kinds):
    if "running_mean" in kinds or name == "moments":  # every form without an activation, two with
        return SHAPES if name in ("batch norm", "inference") else SHAPES[:1] + SHAPES[-1:]
    return [ROWS, LANES] if "logits" in kinds or "softmax" in name else [ROWS]


def make(rng, kinds, shape, dtype):
    arrays = {}
    for name, kind in kinds.items():
        a = rng.standard_normal(shape if kind[-1] == "x" else shape[1])
        if kind[0] == "+":
            a = a * a + 0.1
        elif kind[:2] == "01":
            a = 1 / (1 + np.exp(a))
        arrays[name] = a.astype(dtype)
    return arrays


def term_size(a, finite):
    """About how large the terms of a channel's results are: its largest finite result, or that of half of the channels
    where its own have cancelled. `test_norm.py` and the others hold each element to its own terms.
    """
    size = np.where(finite, np.abs(a, dtype=np.float64), 0)
    if a.ndim > 1:
        size = size.max(axis=tuple(i for i in range(a.ndim) if i != 1), keepdims=True)
    return np.maximum(size, np.median(size))


def assert_same_outcome(call, arrays, where):
    """NaN where the twin has NaN, infinity where it has that infinity, the rest close."""
    first = next(iter(arrays.values()))
    info = np.finfo(first.dtype)
    # Each of the additions that make a channel's sum errs half an ulp of the sum so far at most, in the kernel and the
    # twin; in float32 there are 64 before the sum goes on in double.
    ulps = 64 if info.bits == 32 else max(64, first.size // first.shape[1])
    fast, slow = ({name: a.copy() for name, a in arrays.items()} for _ in range(2))
    for i, (got, want) in enumerate(zip(call(fn, fast), call(reference, slow), strict=True)):
        if want is None:
            assert got is None
            continue
        nan, infinite = np.isnan(want), np.isinf(want)
        if not np.array_equal(np.isnan(got), nan) or not np.array_equal(got[infinite], want[infinite]):
            np.testing.assert_array_equal(got, want, err_msg=f"{where}, result {i}")  # shows where
        finite = ~(nan | infinite)
        with np.errstate(over="ignore", invalid="ignore"):
            error = np.where(finite, np.abs(np.subtract(got, want, dtype=np.float64)), 0)
            allowed = ulps * (info.eps * term_size(want, finite) + info.smallest_subnormal)
        assert np.all(error <= allowed), f"{where}, result {i}: {(error / allowed).max() * ulps:.0f} ulp"


@pytest.mark.parametrize("name", CASES)
def test_one_number_in_each_position_of_each_argument(level, dtype, rng, name):
    call, kinds = CASES[name]
    for shape in shapes_of(name, kinds):
        base = make(rng, kinds, shape, dtype)
        for argument, a in base.items():
            for special, value in SPECIAL.items():
                if argument == "exp_avgs" and "largest" in special:
                    continue  # no training gets there: it takes gradients of which exp_avg_sqs is infinite
                for position in {0, a.size // 2, a.size - 2, a.size - 1}:
                    arrays = {**base, argument: a.copy()}
                    arrays[argument].flat[position] = value(np.finfo(dtype))
                    assert_same_outcome(call, arrays, f"{shape}, {special} in {argument}[{position}]")


# -- batch norm near the ends of the range -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_batch_norm_beyond_the_range_of_the_loops(level, dtype, rng, shape, activation):
    info = np.finfo(dtype)
    large, tiny = (3e38, 1e-42) if info.bits == 32 else (1e150, 1e-140)
    makers = {
        "both ends": lambda x: np.sign(x) * large,
        "tiny": lambda x: x * tiny,
        "tiny around a tiny mean": lambda x: (x + 5) * tiny,
        "far and tiny": lambda x: 1 + x * (1e-6 if info.bits == 32 else 1e-14),
    }
    for text, maker in makers.items():
        for eps, gain in ((0.0, 1.0), (1e-5, 1.0), (0.0, 1e30), (0.0, 1e-30)):
            arrays = make(rng, {"x": "x", **VECTORS, "dy": "x"}, shape, dtype)
            arrays["x"][:, 1] = maker(arrays["x"][:, 1].astype(np.float64))
            arrays["gamma"] *= dtype.type(gain)
            for training in (True, False):
                assert_same_outcome(batch_norm(activation=activation, eps=eps, training=training), arrays,
                                    f"{text}, eps {eps}, gamma {gain:g}, training {training}")


def test_moments_beyond_the_range_of_a_float(level):
    x = np.array([[-3e38], [3e38], [2e38], [1e38]], np.float32)
    wide = np.array([[1e300], [1e300 + 1e290], [3e300]])
    results = []
    for backend in (fn, reference):
        m, wide_m = backend.Moments(), backend.Moments()
        m.update(x)
        wide_m.update(wide[:2])
        results.append([m.standardize(x), wide_m.standardize(x), wide_m.mean])
    for got, want in zip(*results, strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, want, rtol=1e-6)


# -- optimizers: constants that float32 cannot hold --------------------------------------------------------------------


@pytest.mark.parametrize("backend", [fn, reference], ids=["kernels", "twin"])
@pytest.mark.parametrize(("name", "option"), [
    ("momentum_step", "lr"), ("momentum_step", "momentum"), ("momentum_step", "dampening"),
    ("momentum_step", "weight_decay"), ("rmsprop_step", "lr"), ("rmsprop_step", "eps"), ("rmsprop_step", "momentum"),
    ("rmsprop_step", "weight_decay"), ("adam_step", "lr"), ("adam_step", "eps"), ("adam_step", "weight_decay"),
    ("adagrad_step", "lr"), ("adagrad_step", "eps"), ("adagrad_step", "weight_decay")])
def test_constants_beyond_float32_are_refused_for_float32(backend, name, option):
    buffers = {"momentum_step": ["velocities"], "rmsprop_step": ["square_avgs", "momentum_buffers"],
               "adam_step": ["exp_avgs", "exp_avg_sqs"], "adagrad_step": ["state_sums"]}[name]
    options = {"lr": 0.1, option: 1e300, **({"step": 1} if name in ("adam_step", "adagrad_step") else {})}
    wide = {b: [np.zeros(3)] for b in ["params", "grads", *buffers]}
    getattr(backend, name)(**wide, **options)
    mixed = {b: [np.zeros(3), np.zeros(2, np.float32)] for b in wide}
    with pytest.raises(ValueError, match=f"^{option}: expected a number that float32, a parameter's dtype, can hold, "
                                         "got 1e\\+300"):
        getattr(backend, name)(**mixed, **options)
    assert all(not a.any() for arrays in mixed.values() for a in arrays)


@pytest.mark.parametrize("name", ["rmsprop", "adam", "adagrad"])
@pytest.mark.parametrize("eps", [1e-300, 1e-45, 1e-40])
def test_an_eps_too_small_for_the_dtype_still_prevents_nan(level, dtype, name, eps):
    kinds = CASES[name][1]
    options = {"rmsprop": {}, "adam": {"step": 1, "betas": (0.9, 0.999)}, "adagrad": {"step": 1}}[name]
    for backend in (fn, reference):
        arrays = {k: np.zeros(70, dtype) for k in kinds}
        getattr(backend, f"{name}_step")(**arrays, eps=eps, **options)
        assert all(np.all(a == 0) for a in arrays.values())


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [ROWS, LANES])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_infinite_weights_and_targets(level, dtype, rng, shape, value, smoothing, reduction):
    call = cross_entropy(label_smoothing=smoothing, reduction=reduction)
    arrays = make(rng, {"logits": "x", "targets": "+x", "weight": "+c"}, shape, dtype)
    arrays["targets"][0] = 0  # 0 times an infinite weight
    for zero in (False, True):
        arrays["weight"][2] = 0 if zero else 1
        for argument, at in (("weight", 1), ("targets", 3), ("targets", -1)):
            changed = {**arrays, argument: arrays[argument].copy()}
            changed[argument].flat[at] = value
            # the largest logit is that of the infinite mass: its distance from the maximum is 0
            changed["logits"] = arrays["logits"].copy()
            changed["logits"][1, 1] += 9
            assert_same_outcome(call, changed, f"{argument}[{at}], zero weight {zero}")
            if argument == "weight":
                del changed["targets"]
                assert_same_outcome(call, changed, f"labels, {argument}[{at}]")


def test_an_infinite_weight_leaves_the_rows_of_other_labels_alone(level, dtype):
    x, w = np.array([[1, 2, 3], [0, 0, 0]], dtype), np.array([1, np.inf, 1], dtype)
    for backend in (fn, reference):
        losses, gradient = backend.softmax_cross_entropy(x, np.array([1, 0]), weight=w, reduction="none")
        assert losses[0] == np.inf
        np.testing.assert_allclose(losses[1], np.log(3), rtol=1e-6)
        np.testing.assert_allclose(gradient[1], [-2 / 3, 1 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("backend", [fn, reference], ids=["kernels", "twin"])
def test_labels_and_ignore_index_at_the_ends_of_64_bits(backend, dtype):
    x = np.zeros(3, dtype)
    for label in (2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30):
        loss, gradient = backend.softmax_cross_entropy(x, label, ignore_index=label)
        assert loss == 0
        assert not gradient.any()
        for other in (label - 1, label + 1, label - 2**64, -1):
            with pytest.raises(ValueError, match=f"or ignore_index {other}, got {label}$"):
                backend.softmax_cross_entropy(x, label, ignore_index=other)
    labels = np.array([2**63, 1, 2**64 - 1], np.uint64)
    rows = np.zeros((3, 3), dtype)
    with pytest.raises(ValueError, match=f"got {2**63} at position 0"):
        backend.softmax_cross_entropy(rows, labels, ignore_index=-(2**63))
    with pytest.raises(ValueError, match=f"got {2**64 - 1} at position 2"):
        backend.softmax_cross_entropy(rows, labels, ignore_index=2**63)
    labels[2] = 2**63
    losses, _ = backend.softmax_cross_entropy(rows, labels, ignore_index=2**63, reduction="none")
    np.testing.assert_array_equal(losses == 0, [True, False, True])


# -- activations whose slope underflows --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elu", "celu"])
@pytest.mark.parametrize("alpha", [1.0, 0.25, 3.0])
def test_a_small_slope_and_a_large_gradient(level, dtype, name, alpha):
    wide = 8 if dtype == np.float64 else 1
    x = np.linspace(-150 * wide, 0, 301, dtype=dtype) * dtype.type(alpha if name == "celu" else 1)
    for exponent in (0, 10, 30, 37):
        dy = np.full(x.size, 10.0 ** (exponent * wide), dtype)
        got = getattr(fn, f"{name}_backward")(dy, x, alpha=alpha)
        half = np.exp(x.astype(np.float64) / (alpha if name == "celu" else 1) / 2)  # the whole underflows in float64
        want = (half * dy * half * (alpha if name == "elu" else 1)).astype(dtype)
        # 4 for the kernel, as in test_activations.py, 4 here; in float64 the rounding of x / alpha is multiplied by it
        ulps = 8 + (np.abs(x) / alpha if wide > 1 else 0)
        info = np.finfo(dtype)
        assert np.all(np.abs(got - want) <= ulps * (info.eps * np.abs(want) + info.smallest_subnormal * max(alpha, 1)))


# -- overlaps that are hard to decide ----------------------------------------------------------------------------------


def test_the_overlap_test_gives_up_in_time():
    # A subset-sum problem in 24 dimensions: strides are odd multiples of 8 bytes of which few combinations meet.
    rng = np.random.default_rng(1)
    memory = np.zeros(4_000_000, np.float32)
    strides = tuple(int(s) * 4 for s in rng.integers(10_000, 30_000, 24))
    a, b = (np.lib.stride_tricks.as_strided(memory[start:], (2,) * 24, strides, writeable=False) for start in (0, 1))
    began = time.perf_counter()
    with pytest.raises(ValueError, match="out"):
        fn._arrays.check_disjoint(("out", a), ("x", b))
    assert time.perf_counter() - began < 5


# -- denormals ---------------------------------------------------------------------------------------------------------


def floating_point_mode():
    """Control bits of MXCSR (rounding, flush to zero, denormals are zero), as glibc's fegetenv stores them."""
    environment = (ctypes.c_uint32 * 64)()
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    return environment[7] & ~0x3F  # without the flags of exceptions that have occurred


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads glibc's fenv_t")
def test_the_floating_point_mode_is_left_alone(level, dtype, rng):
    before = floating_point_mode()
    assert before & 0x8040 == 0
    for call, kinds in CASES.values():
        call(fn, make(rng, kinds, (100, 100, 9), dtype))
    assert floating_point_mode() == before


def test_subnormals_survive(level, dtype, threads):
    smallest = np.full(100_000, np.finfo(dtype).smallest_subnormal)
    assert 5e-324 * float(np.float64(1)) == 5e-324
    assert np.all(smallest * smallest.dtype.type(1) == smallest)
    assert np.all(fn.relu(smallest) == smallest)
    assert np.all(fn.leaky_relu(-smallest * 4, negative_slope=0.25) == -smallest)


@pytest.mark.skipif("FASTNORM_CALM" not in os.environ, reason="timing: set FASTNORM_CALM=1 on a calm machine")
@pytest.mark.parametrize("name", CASES)
def test_subnormals_are_not_slow(level, dtype, rng, name):
    call, kinds = CASES[name]
    ordinary = make(rng, kinds, (256, 64, 49), dtype)
    tiny = {k: (a * np.finfo(dtype).tiny / 16).astype(dtype) if kinds[k][-1] == "x" else a for k, a in ordinary.items()}
    times = {"ordinary": [], "tiny": []}
    for _ in range(15):
        for text, arrays in (("ordinary", ordinary), ("tiny", tiny)):
            copies = {k: a.copy() for k, a in arrays.items()}
            began = time.perf_counter()
            call(fn, copies)
            times[text].append(time.perf_counter() - began)
    ratio = np.quantile(times["tiny"], 0.1) / np.quantile(times["ordinary"], 0.1)
    print(f"{name}, {dtype.name}, {level}: subnormal data take {ratio:.2f} times as long")
    assert ratio < 3
