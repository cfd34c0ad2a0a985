"""Layers: gradients by finite differences, backends that agree, stable arrays, state, randomness; wrong use."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import layers
from fastnorm.layers import (
    CELU,
    ELU,
    BatchNorm,
    Dense,
    DropConnect,
    Dropout,
    LeakyReLU,
    ReLU,
    Sequential,
    Sigmoid,
    SoftmaxCrossEntropy,
    Tanh,
)

BACKENDS = {"compiled": fn, "reference": fn.reference}


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    return BACKENDS[request.param]


def network(backend, dtype=np.float64, rng=0):
    """One of every layer."""
    rng = np.random.default_rng(rng)
    return Sequential(
        Dense(5, 9, rng=rng, dtype=dtype, backend=backend),
        BatchNorm(9, activation="relu", dtype=dtype, backend=backend),
        DropConnect(9, 8, p=0.3, rng=rng, seed=1, dtype=dtype, backend=backend), ELU(0.7, backend=backend),
        Sequential(Dense(8, 8, init="xavier_uniform", rng=rng, dtype=dtype, backend=backend), Tanh(backend=backend)),
        Dropout(0.2, seed=2, backend=backend), LeakyReLU(0.1, backend=backend), CELU(1.3, backend=backend),
        Sigmoid(backend=backend), BatchNorm(8, affine=False, dtype=dtype, backend=backend), ReLU(backend=backend),
        Dense(8, 4, bias=False, init="lecun_normal", rng=rng, dtype=dtype, backend=backend))


# -- gradients ---------------------------------------------------------------------------------------------------------

LAYERS = {
    "Dense": ((6, 5), lambda b: Dense(5, 3, rng=0, dtype=np.float64, backend=b)),
    "Dense without bias": ((6, 5), lambda b: Dense(5, 3, bias=False, rng=0, dtype=np.float64, backend=b)),
    "DropConnect": ((6, 5), lambda b: DropConnect(5, 3, 0.4, rng=0, seed=3, dtype=np.float64, backend=b)),
    "BatchNorm": ((6, 5), lambda b: BatchNorm(5, dtype=np.float64, backend=b)),
    "BatchNorm images": ((3, 2, 4, 4), lambda b: BatchNorm(2, dtype=np.float64, backend=b)),
    "BatchNorm last axis": ((3, 4, 5), lambda b: BatchNorm(5, axis=-1, dtype=np.float64, backend=b)),
    "BatchNorm relu": ((6, 5), lambda b: BatchNorm(5, activation="relu", dtype=np.float64, backend=b)),
    "BatchNorm leaky": ((6, 5), lambda b: BatchNorm(5, activation="leaky_relu", negative_slope=0.2, dtype=np.float64,
                                                    backend=b)),
    "BatchNorm without affine": ((6, 5), lambda b: BatchNorm(5, affine=False, dtype=np.float64, backend=b)),
    "BatchNorm frozen": ((6, 5), lambda b: frozen(BatchNorm(5, dtype=np.float64, backend=b))),
    "ReLU": ((6, 5), lambda b: ReLU(backend=b)),
    "LeakyReLU": ((2, 3, 4), lambda b: LeakyReLU(0.2, backend=b)),
    "ELU": ((6, 5), lambda b: ELU(0.7, backend=b)),
    "CELU": ((6, 5), lambda b: CELU(0.7, backend=b)),
    "Sigmoid": ((6, 5), lambda b: Sigmoid(backend=b)),
    "Tanh": ((7,), lambda b: Tanh(backend=b)),
    "Dropout": ((2, 3, 4), lambda b: Dropout(0.4, seed=1, backend=b)),
    "Sequential": ((6, 5), network),
}


def frozen(layer):
    layer.frozen = True
    return layer


def numeric_gradient(f, a, h=1e-6):
    """Central differences of a scalar function for every element of `a`, changed in place and restored."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        value = a[i]
        a[i] = value + h
        above = f()
        a[i] = value - h
        gradient[i] = (above - f()) / (2 * h)
        a[i] = value
    return gradient


@pytest.mark.parametrize("name", LAYERS)
def test_finite_differences(backend, rng, name):
    """All gradients of sum(w * y). The error of central differences is about eps / h = 2e-10 times the terms' size."""
    shape, make = LAYERS[name]
    layer = make(backend)
    for p in layer.params:
        p += 0.3 * rng.normal(size=p.shape)
    x = rng.normal(size=shape)
    state = layer.state_dict()
    w = rng.normal(size=layer.forward(x).shape)

    def loss():
        keep = {name: a for name, a in zip(state, layer._state().values(), strict=True)
                if name.endswith(("offset", "running_mean", "running_var"))}
        for key, a in keep.items():  # the same masks and statistics again
            a[...] = state[key]
        return float((w * layer.forward(x)).sum())

    loss()
    dx = layer.backward(w)
    grads = [g.copy() for g in layer.grads]
    assert dx.shape == x.shape
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), rtol=1e-6, atol=1e-7)
    assert len(grads) == len(layer.params)
    for gradient, p in zip(grads, layer.params, strict=True):
        np.testing.assert_allclose(gradient, numeric_gradient(loss, p), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"},
                                     {"weight": np.array([0.5, 1.0, 2.0])}])
def test_loss_gradient(backend, rng, options):
    criterion = SoftmaxCrossEntropy(backend=backend, **options)
    logits, targets = rng.normal(size=(6, 3)), rng.integers(0, 3, 6)
    criterion.forward(logits, targets)
    gradient = criterion.backward().copy()
    np.testing.assert_allclose(gradient, numeric_gradient(lambda: float(criterion.forward(logits, targets)), logits),
                               rtol=1e-6, atol=1e-8)
    assert criterion.params == criterion.grads == []
    assert criterion.state_dict() == {}


def test_a_network_learns(backend):
    """Plain gradient descent on a small problem, as a user writes it: the loss falls by a factor of 10."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5)).astype(np.float32)
    targets = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    model = Sequential(Dense(5, 32, rng=rng), BatchNorm(32, activation="relu", backend=backend), Dense(32, 2, rng=rng))
    criterion = SoftmaxCrossEntropy(backend=backend)
    params, grads = model.params, model.grads  # taken once
    first = None
    for _ in range(200):
        loss = criterion.forward(model.forward(x), targets)
        first = first or loss
        model.backward(criterion.backward())
        for p, g in zip(params, grads, strict=True):
            p -= 0.5 * g
    assert loss < first / 10


# -- backends ----------------------------------------------------------------------------------------------------------


def test_backends_agree(dtype):
    """The same masks, and values within rounding: 12 layers of a few products each."""
    x = np.random.default_rng(1).normal(size=(16, 5)).astype(dtype)
    results = []
    for backend in BACKENDS.values():
        model = network(backend, dtype)
        y = model.forward(x)
        dx = model.backward(np.ones_like(y))
        assert y.dtype == dx.dtype == dtype
        assert all(p.dtype == g.dtype == dtype for p, g in zip(model.params, model.grads, strict=True))
        results.append([y, dx, *model.grads, model.forward(x, training=False)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=500 * np.finfo(dtype).eps * max(1, np.abs(b).max()))


def test_functions_are_looked_up_at_the_call(monkeypatch):
    layer, dropout = ReLU(), Dropout(0.5, seed=0)
    monkeypatch.setattr(fn, "relu", lambda x: x + 100)
    monkeypatch.setattr(fn, "dropout", lambda x, p, *, seed, offset: x + p)
    assert layer.forward(np.zeros(1)) == 100
    assert dropout.forward(np.zeros(1)) == 0.5


def test_a_layer_of_ones_own(dtype):
    class Double(layers.Layer):
        def forward(self, x, training=True):
            return 2 * x

        def backward(self, dy):
            return 2 * dy

    model = Sequential(Double(), ReLU())
    np.testing.assert_array_equal(model.forward(np.array([-1, 3], dtype)), [0, 6])
    np.testing.assert_array_equal(model.backward(np.ones(2, dtype)), [0, 2])
    assert model.params == []


# -- layers one by one -------------------------------------------------------------------------------------------------


def test_arrays_are_stable(backend, rng):
    """An optimizer may hold params and grads for ever: training, backward and loading change them in place."""
    model = network(backend)
    params, grads = model.params, model.grads
    for _ in range(2):
        model.backward(model.forward(rng.normal(size=(6, 5))))
    model.load_state_dict(network(backend, rng=7).state_dict())
    assert all(a is b for a, b in zip(params, model.params, strict=True))
    assert all(a is b for a, b in zip(grads, model.grads, strict=True))
    assert all(p.shape == g.shape for p, g in zip(params, grads, strict=True))


def test_dense_values(dtype):
    layer = Dense(2, 3, init=lambda shape, rng, dtype: np.arange(6, dtype=dtype).reshape(shape), dtype=dtype)
    layer.bias[...] = [10, 20, 30]
    x = np.array([[1, 2], [3, 4]], dtype)
    np.testing.assert_array_equal(layer.forward(x), [[16, 29, 42], [22, 39, 56]])
    dx = layer.backward(np.array([[1, 0, 0], [0, 1, 0]], dtype))
    np.testing.assert_array_equal(dx, [[0, 3], [1, 4]])
    np.testing.assert_array_equal(layer.weight_grad, [[1, 3, 0], [2, 4, 0]])
    np.testing.assert_array_equal(layer.bias_grad, [1, 1, 0])
    assert layer.forward(np.zeros((0, 2), dtype)).shape == (0, 3)
    assert layer.backward(np.zeros((0, 3), dtype)).shape == (0, 2)
    assert not layer.weight_grad.any()


def test_dense_bias_gradient_of_a_long_column():
    """Ones added to 2**24 one by one in float32 vanish; the sum must not."""
    dy = np.ones((1025, 2), np.float32)
    dy[0] = 1 << 24
    layer = Dense(1, 2, rng=0)
    layer.forward(np.zeros((1025, 1), np.float32))
    layer.backward(dy)
    np.testing.assert_array_equal(layer.bias_grad, (1 << 24) + 1024)


def test_dense_layouts(layout, dtype, rng):
    x, dy = rng.normal(size=(6, 5)).astype(dtype), rng.normal(size=(6, 3)).astype(dtype)
    layer = Dense(5, 3, rng=0, dtype=dtype)
    for make in (lambda a: a, layout):
        y = layer.forward(make(x))
        dx = layer.backward(make(dy))
        np.testing.assert_allclose(y, x @ layer.weight, rtol=0, atol=20 * np.finfo(dtype).eps)
        np.testing.assert_allclose(dx, dy @ layer.weight.T, rtol=0, atol=20 * np.finfo(dtype).eps)
        np.testing.assert_allclose(layer.weight_grad, x.T @ dy, rtol=0, atol=40 * np.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [Dense, DropConnect])
def test_dense_passes_nan_and_infinity_without_a_warning(kind, dtype):
    """A warning, an error in these tests, would also leave gradients half written."""
    layer = kind(3, 2, rng=1, dtype=dtype)
    x, dy = np.full((4, 3), np.inf, dtype), np.array([[np.inf, np.nan], [-np.inf, 1], [0, 1], [2, 3]], dtype)
    assert not np.isfinite(layer.forward(x)).all()
    assert not np.isfinite(layer.backward(dy)).all()
    assert np.isnan(layer.bias_grad).all()


@pytest.mark.parametrize("name", fn.init.__all__)
def test_dense_initializers(name):
    np.testing.assert_array_equal(Dense(4, 3, init=name, rng=5).weight, getattr(fn.init, name)((4, 3), rng=5))


def test_initial_weights_are_copied():
    """Two networks that begin with the same array do not train each other; a read-only one can be trained."""
    start = np.ones((3, 2), np.float32)
    start.flags.writeable = False
    one, other = (Dense(3, 2, init=lambda shape, rng, dtype: start) for _ in range(2))
    one.weight += 1
    assert (one.weight == 2).all()
    assert (other.weight == 1).all()


def test_dropout_masks_are_fresh_and_reproducible(backend):
    x = np.ones((50, 20), np.float32)
    first, second = Dropout(0.5, seed=3, backend=backend), Dropout(0.5, seed=3, backend=backend)
    masks = [first.forward(x) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[1], masks[2])
    first.forward(x, training=False)  # draws nothing
    for mask in masks:
        np.testing.assert_array_equal(second.forward(x), mask)
        np.testing.assert_array_equal(second.backward(x), mask)
    np.testing.assert_array_equal(first.forward(x), second.forward(x))
    assert not np.array_equal(Dropout(0.5, backend=backend).forward(x), Dropout(0.5, backend=backend).forward(x))


def test_drop_connect_drops_weights(backend):
    layer = DropConnect(200, 100, p=0.25, init=lambda shape, rng, dtype: np.ones(shape, dtype), seed=1, backend=backend)
    layer.bias += 1
    dropped = layer.forward(np.eye(200, dtype=np.float32)) - 1
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / kept.size)
    layer.backward(np.ones((200, 100), np.float32))
    np.testing.assert_array_equal(layer.weight_grad != 0, kept)
    np.testing.assert_array_equal(layer.forward(np.eye(200, dtype=np.float32), training=False), np.full((200, 100), 2))


def test_batch_norm_statistics(backend, rng):
    layer = BatchNorm(3, momentum=1.0, dtype=np.float64, backend=backend)
    x = rng.normal(2, 3, size=(50, 3))
    layer.forward(x)
    np.testing.assert_allclose(layer.running_mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, x.var(0, ddof=1), rtol=1e-12)
    before = layer.state_dict()
    y = layer.forward(x, training=False)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5), rtol=1e-9, atol=1e-12)
    layer.frozen = True
    np.testing.assert_allclose(layer.forward(x + 1), layer.forward(x + 1, training=False), rtol=1e-12)
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.parametrize("unbiased", [True, False])
def test_set_statistics(rng, unbiased):
    x = rng.normal(2, 3, size=(50, 3))
    moments = fn.Moments(axis=1)
    moments.update(x)
    layer = BatchNorm(3, unbiased_running_var=unbiased)
    mean, var = layer.running_mean, layer.running_var
    layer.set_statistics(moments)
    assert layer.running_mean is mean
    assert layer.running_var is var
    np.testing.assert_allclose(mean, x.mean(0), rtol=np.finfo(np.float32).eps)
    np.testing.assert_allclose(var, x.var(0, ddof=int(unbiased)), rtol=np.finfo(np.float32).eps)


def test_inference_keeps_nothing(backend, rng):
    for shape, make in LAYERS.values():
        layer = make(backend)
        x = rng.normal(size=shape)
        y = layer.forward(x)
        layer.backward(y)
        layer.forward(x, training=False)
        with pytest.raises(RuntimeError, match=r"backward: expected a call of forward with training=True before it"):
            layer.backward(y)


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_names(backend):
    assert list(network(backend).state_dict()) == [
        "0.weight", "0.bias", "1.gamma", "1.beta", "1.running_mean", "1.running_var", "2.weight", "2.bias", "2.seed",
        "2.offset", "4.0.weight", "4.0.bias", "5.seed", "5.offset", "9.running_mean", "9.running_var", "11.weight"]


def test_resumed_training_goes_on_with_the_same_bits(backend, rng):
    """Through a file: masks, weights and statistics."""
    x = rng.normal(size=(6, 5))
    model = network(backend)
    model.forward(x)
    file = io.BytesIO()
    np.savez(file, **model.state_dict())
    file.seek(0)
    resumed = network(backend, rng=99)
    with np.load(file) as state:
        resumed.load_state_dict(state)
    for _ in range(3):
        y, z = model.forward(x), resumed.forward(x)
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(model.backward(y), resumed.backward(z))
    np.testing.assert_array_equal(model.forward(x, training=False), resumed.forward(x, training=False))


def through_pickle(a):
    return pickle.loads(pickle.dumps(a))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("given", [None, fn, fn.reference], ids=["default", "compiled", "reference"])
def test_copied_and_pickled_training_goes_on_with_the_same_bits(copied, given, dtype, rng):
    """Network, loss and optimizer at once, in the middle of a step: a copied optimizer updates the copied network."""
    model = network(given, dtype)
    whole = model, SoftmaxCrossEntropy(backend=given), fn.optim.Adam(model.params, backend=given)
    x, labels = rng.standard_normal((6, 5)).astype(dtype), rng.integers(0, 4, 6)
    whole[1].forward(model.forward(x), labels)
    other = copied(whole)
    assert [part.backend for part in other] == [None, given, given]  # Sequential itself calls no function
    for model, loss, optimizer in (whole, other):
        model.backward(loss.backward())
        optimizer.step(model.grads)
    for a, b in zip(whole[0].params, other[0].params, strict=True):
        assert a is not b
        assert a.tobytes() == b.tobytes()
    assert whole[0].forward(x).tobytes() == other[0].forward(x).tobytes()


def test_state_is_a_copy(backend, rng):
    model = network(backend)
    state = model.state_dict()
    model.forward(rng.normal(size=(6, 5)))
    assert state["2.offset"] == 0
    assert model.state_dict()["2.offset"] == 1
    assert not any(np.shares_memory(a, b) for a in state.values() for b in model._state().values())


STATE_ERRORS = [
    ("kind", lambda s: list(s), TypeError, "state: expected a mapping of names to arrays, got list"),
    ("missing", lambda s: {k: s[k] for k in list(s)[2:]}, ValueError, "state: missing 0.weight, 0.bias"),
    ("unexpected", lambda s: s | {"0.wait": s["0.bias"]}, ValueError, "state: unexpected 0.wait"),
    ("shape", lambda s: s | {"11.weight": s["11.weight"].T}, ValueError,
     "state['11.weight']: expected shape (8, 4), got (4, 8)"),
    ("dtype", lambda s: s | {"11.weight": s["11.weight"].astype(np.float32)}, TypeError,
     "state['11.weight']: expected dtype float64, got float32"),
    ("not an array", lambda s: s | {"11.weight": s["11.weight"].tolist()}, TypeError,
     "state['11.weight']: expected a numpy.ndarray, got list"),
    ("offset", lambda s: s | {"5.offset": np.array(1.5)}, TypeError, "state['5.offset']: expected dtype uint64"),
    ("masked", lambda s: s | {"11.weight": np.ma.array(s["11.weight"])}, TypeError,
     "state['11.weight']: expected a plain numpy.ndarray, got MaskedArray"),
]


@pytest.mark.parametrize(("change", "exception", "message"), [row[1:] for row in STATE_ERRORS],
                         ids=[row[0] for row in STATE_ERRORS])
def test_state_errors_change_nothing(backend, change, exception, message):
    model = network(backend)
    before = model.state_dict()
    other = {name: a + 1 for name, a in before.items()}
    with pytest.raises(exception) as caught:
        model.load_state_dict(change(other))
    assert message in str(caught.value)
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_a_read_only_array_of_the_layers_own_keeps_the_state_out(backend):
    model = fn.layers.BatchNorm(3, backend=backend)
    before = model.state_dict()
    model.running_var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var: expected a writeable array to load"):
        model.load_state_dict({name: a + 1 for name, a in before.items()})
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_a_state_may_be_made_of_the_layers_own_arrays(backend):
    model = fn.layers.BatchNorm(3, backend=backend)
    model.gamma[...], model.beta[...] = [1, 2, 3], [4, 5, 6]
    model.load_state_dict(model.state_dict() | {"gamma": model.beta, "beta": model.gamma[::-1]})
    np.testing.assert_array_equal(model.gamma, [4, 5, 6])
    np.testing.assert_array_equal(model.beta, [3, 2, 1])


# -- wrong use ---------------------------------------------------------------------------------------------------------

X = np.ones((4, 5), np.float32)

CONSTRUCTION_ERRORS = [
    (lambda: Dense(0, 3), ValueError, "in_features: expected an integer >= 1, got 0"),
    (lambda: Dense(3, 2.0), TypeError, "out_features: expected an integer, got float"),
    (lambda: Dense(3, 2, bias=1), TypeError, "bias: expected True or False, got int"),
    (lambda: Dense(3, 2, init="he"), ValueError, "init: expected one of 'he_normal', 'he_uniform', 'lecun_normal'"),
    (lambda: Dense(3, 2, init=3), TypeError, "init: expected one of 'he_normal'"),
    (lambda: Dense(3, 2, init=lambda shape, rng, dtype: np.ones((2, 3), dtype)), ValueError,
     "init: expected shape (3, 2), got (2, 3)"),
    (lambda: Dense(3, 2, init=lambda shape, rng, dtype: np.ones(shape)), TypeError,
     "init: expected dtype float32, got float64"),
    (lambda: Dense(3, 2, dtype=int), TypeError, "dtype: expected float32 or float64, got int64"),
    (lambda: Dense(3, 2, rng="0"), TypeError, "rng: expected a numpy.random.Generator"),
    (lambda: DropConnect(3, 2, p=2), ValueError, "p: expected a number in [0, 1], got 2"),
    (lambda: DropConnect(3, 2, seed=-1), ValueError, "seed: expected an integer >= 0, got -1"),
    (lambda: Dropout("0.5"), TypeError, "p: expected a real number, got str"),
    (lambda: Dropout(seed=1 << 64), ValueError, "seed: expected an integer < 2**64"),
    (lambda: Dropout(seed=0.5), TypeError, "seed: expected an integer, got float"),
    (lambda: BatchNorm(0), ValueError, "num_features: expected an integer >= 1, got 0"),
    (lambda: BatchNorm(3, axis=1.0), TypeError, "axis: expected an integer, got float"),
    (lambda: BatchNorm(3, momentum=1.5), ValueError, "momentum: expected a number in [0, 1], got 1.5"),
    (lambda: BatchNorm(3, eps=-1e-5), ValueError, "eps: expected a finite number >= 0"),
    (lambda: BatchNorm(3, activation="gelu"), ValueError,
     "activation: expected one of None, 'relu', 'leaky_relu', got 'gelu'"),
    (lambda: BatchNorm(3, negative_slope=-1), ValueError, "negative_slope: expected a finite number >= 0"),
    (lambda: BatchNorm(3, affine=None), TypeError, "affine: expected True or False, got NoneType"),
    (lambda: BatchNorm(3, dtype="int8"), TypeError, "dtype: expected float32 or float64, got int8"),
    (lambda: LeakyReLU(-0.1), ValueError, "negative_slope: expected a finite number >= 0"),
    (lambda: ELU(np.nan), ValueError, "alpha: expected a finite number >= 0"),
    (lambda: CELU(0), ValueError, "alpha: expected a number > 0"),
    (lambda: SoftmaxCrossEntropy(reduction="average"), ValueError, "reduction: expected one of 'mean', 'sum', 'none'"),
    (lambda: SoftmaxCrossEntropy(label_smoothing=2), ValueError, "label_smoothing: expected a number in [0, 1]"),
    (lambda: SoftmaxCrossEntropy(weight=[1, 2]), TypeError, "weight: expected a numpy.ndarray, got list"),
    (lambda: SoftmaxCrossEntropy(ignore_index=None), TypeError, "ignore_index: expected an integer"),
    (lambda: Sequential(ReLU(), np.tanh), TypeError, "layers[1]: expected a fastnorm.layers.Layer, got ufunc"),
    (lambda: Sequential([ReLU()]), TypeError, "layers[0]: expected a fastnorm.layers.Layer, got list"),
    (lambda: Sequential(ReLU(), SoftmaxCrossEntropy()), TypeError, "layers[1]: expected a fastnorm.layers.Layer"),
    (lambda: Sequential(*[ReLU()] * 2), ValueError, "layers[1]: expected distinct layers"),
]
USE_ERRORS = [
    (lambda: Dense(5, 3).forward(np.ones((4, 6), np.float32)), ValueError, "x: expected shape (N, 5), got (4, 6)"),
    (lambda: Dense(5, 3).forward(np.ones(5, np.float32)), ValueError, "x: expected shape (N, 5), got (5,)"),
    (lambda: Dense(5, 3).forward(np.ones((4, 5))), TypeError, "x: expected dtype float32, got float64"),
    (lambda: Dense(5, 3).forward([[1.0] * 5]), TypeError, "x: expected a numpy.ndarray, got list"),
    (lambda: Dense(5, 3).forward(X, training=1), TypeError, "training: expected True or False, got int"),
    (lambda: Dense(5, 3).backward(X), RuntimeError, "Dense.backward: expected a call of forward with training=True"),
    (lambda: after_forward(Dense(5, 3)).backward(X), ValueError, "dy: expected shape (4, 3), got (4, 5)"),
    (lambda: after_forward(Dense(5, 3)).backward(np.ones((4, 3))), TypeError, "dy: expected dtype float32"),
    (lambda: DropConnect(5, 3).backward(X), RuntimeError, "DropConnect.backward: expected a call of forward"),
    (lambda: after_forward(DropConnect(5, 3)).backward(X), ValueError, "dy: expected shape (4, 3), got (4, 5)"),
    (lambda: BatchNorm(6).forward(X), ValueError, "x: expected 6 channels along axis 1, got shape (4, 5)"),
    (lambda: BatchNorm(5, axis=2).forward(X), ValueError, "axis: expected an integer in [-2, 1]"),
    (lambda: BatchNorm(5).forward(X.astype(float)), TypeError, "x: expected dtype float32, got float64"),
    (lambda: BatchNorm(5).backward(X), RuntimeError, "BatchNorm.backward: expected a call of forward"),
    (lambda: BatchNorm(5).set_statistics(X), TypeError, "moments: expected a fastnorm.Moments, got ndarray"),
    (lambda: BatchNorm(5).set_statistics(fn.Moments()), ValueError,
     "moments: expected at least 2 values per channel, got 0"),
    (lambda: BatchNorm(5).set_statistics(moments_of(X[:1])), ValueError,
     "moments: expected at least 2 values per channel, got 1"),
    (lambda: BatchNorm(6).set_statistics(moments_of(X)), ValueError,
     "moments: expected 6 channels, got mean of shape (5,)"),
    (lambda: ReLU().forward([1.0]), TypeError, "x: expected a numpy.ndarray, got list"),
    (lambda: ReLU().backward(X), RuntimeError, "ReLU.backward: expected a call of forward"),
    (lambda: after_forward(Tanh()).backward(X[:2]), ValueError, "dy: expected shape (4, 5), got (2, 5)"),
    (lambda: Dropout().backward(X), RuntimeError, "Dropout.backward: expected a call of forward"),
    (lambda: after_forward(Dropout()).backward(X[:2]), ValueError, "dy: expected shape (4, 5), got (2, 5)"),
    (lambda: Dropout().forward([1.0], training=False), TypeError, "x: expected a numpy.ndarray, got list"),
    (lambda: SoftmaxCrossEntropy().backward(), RuntimeError, "SoftmaxCrossEntropy.backward: expected a call"),
    (lambda: Sequential(Dense(5, 3), ReLU()).backward(X), RuntimeError, "ReLU.backward: expected a call of forward"),
]


def after_forward(layer):
    layer.forward(X)
    return layer


def moments_of(x):
    moments = fn.Moments()
    moments.update(x)
    return moments


@pytest.mark.parametrize(("call", "exception", "message"), CONSTRUCTION_ERRORS + USE_ERRORS,
                         ids=[message for _, _, message in CONSTRUCTION_ERRORS + USE_ERRORS])
def test_wrong_use(call, exception, message):
    with pytest.raises(exception) as caught:
        call()
    assert message in str(caught.value)


def test_a_failed_forward_draws_no_mask():
    for layer, bad in ((Dropout(seed=1), [1.0]), (DropConnect(5, 3, seed=1), X[:, :2])):
        with pytest.raises((TypeError, ValueError)):
            layer.forward(bad)
        assert layer.offset == 0
