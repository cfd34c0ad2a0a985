"""Initial weights: variance and range of every function and shape, seeds, dtypes; errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastnorm import init

# The variance of each, from the fans.
VARIANCES = {
    "lecun": lambda fan_in, fan_out: 1 / fan_in,
    "xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "he": lambda fan_in, fan_out: 2 / fan_in,
}
SHAPES = {  # shape: fan_in, fan_out
    (300, 500): (300, 500),
    (64, 32, 3, 3): (32 * 9, 64 * 9),
    (128, 96, 5): (96 * 5, 128 * 5),
}
FUNCTIONS = [getattr(init, name) for name in init.__all__]


@pytest.mark.parametrize("scheme", VARIANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normal(scheme, shape):
    weights = getattr(init, scheme + "_normal")(shape, rng=0, dtype=np.float64)
    variance = VARIANCES[scheme](*SHAPES[shape])
    n = weights.size
    # 5 standard deviations of the sample's mean, variance and fourth moment
    assert abs(weights.mean()) < 5 * math.sqrt(variance / n)
    assert abs(weights.var() / variance - 1) < 5 * math.sqrt(2 / n)
    assert abs((weights**4).mean() / variance**2 - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("scheme", VARIANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_uniform(scheme, shape):
    weights = getattr(init, scheme + "_uniform")(shape, rng=0, dtype=np.float64)
    variance = VARIANCES[scheme](*SHAPES[shape])
    limit = math.sqrt(3 * variance)
    n = weights.size
    assert abs(weights.mean()) < 5 * math.sqrt(variance / n)
    assert abs(weights.var() / variance - 1) < 5 * math.sqrt(0.8 / n)  # of a uniform's square: 9/5 - 1
    assert 0.999 * limit < np.abs(weights).max() <= limit


@pytest.mark.parametrize("function", FUNCTIONS)
def test_seeds_and_dtypes(function):
    single, double = function((40, 30), rng=3), function((40, 30), rng=3, dtype=np.float64)
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert single.flags.c_contiguous
    assert single.shape == (40, 30)
    np.testing.assert_array_equal(single, double.astype(np.float32))
    np.testing.assert_array_equal(single, function([40, 30], np.random.default_rng(3), "float32"))
    assert not np.array_equal(single, function((40, 30), rng=4))
    assert not np.array_equal(function((40, 30)), function((40, 30)))
    generator = np.random.default_rng(3)
    function((40, 30), generator)
    assert not np.array_equal(single, function((40, 30), generator))  # it advances


ERRORS = [
    ("one length", {"shape": (3,)}, ValueError, "shape: expected (fan_in, fan_out) or (out_channels"),
    ("no length", {"shape": ()}, ValueError, "shape: expected (fan_in, fan_out)"),
    ("zero", {"shape": (3, 0)}, ValueError, "shape: expected an integer >= 1, got 0"),
    ("negative", {"shape": (3, -2)}, ValueError, "shape: expected an integer >= 1, got -2"),
    ("float", {"shape": (3, 2.0)}, TypeError, "shape: expected an integer, got float"),
    ("a number", {"shape": 3}, TypeError, "shape: expected a sequence of integers, got int"),
    ("dtype", {"dtype": np.int32}, TypeError, "dtype: expected float32 or float64, got int32"),
    ("dtype half", {"dtype": "float16"}, TypeError, "dtype: expected float32 or float64, got float16"),
    ("dtype unknown", {"dtype": "floating"}, TypeError, "dtype: expected float32 or float64, got 'floating'"),
    ("dtype None", {"dtype": None}, TypeError, "dtype: expected float32 or float64, got None"),
    ("rng kind", {"rng": "0"}, TypeError, "rng: expected a numpy.random.Generator, an integer seed or None, got str"),
    ("rng float", {"rng": 0.5}, TypeError, "an integer seed or None, got float"),
    ("rng negative", {"rng": -1}, ValueError, "rng: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("changes", "exception", "message"), [row[1:] for row in ERRORS],
                         ids=[row[0] for row in ERRORS])
def test_errors(function, changes, exception, message):
    with pytest.raises(exception) as caught:
        function(**({"shape": (3, 2)} | changes))
    assert message in str(caught.value)
