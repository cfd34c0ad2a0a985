"""fastnorm under scikit-learn: whole trainings beside scikit-learn's own, and what is put back afterwards."""

from __future__ import annotations

import importlib.util
import pickle
import runpy
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close, integration

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
import sklearn
from joblib import parallel_config
from scipy.sparse import csc_array, csr_array
from sklearn.model_selection import cross_validate
from sklearn.neural_network import MLPClassifier, MLPRegressor, _base
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, BaseOptimizer, SGDOptimizer
from threadpoolctl import threadpool_limits

fast = integration("sklearn")
EXAMPLE = Path(__file__).parents[1] / "examples" / "sklearn_digits.py"
ROWS, FEATURES, CLASSES = 150, 12, 5
SETTINGS = {"hidden_layer_sizes": (16, 8), "batch_size": 32, "max_iter": 15, "random_state": 0}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # short trainings on purpose


def sgd(**options):
    return {"solver": "sgd", "learning_rate_init": 0.05, **options}


# Each solver and schedule, each activation, each kind of target.
TRAININGS = {
    "adam": ("multiclass", {}),
    "adam, hyper-parameters": ("multiclass", {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3,
                                              "learning_rate_init": np.float64(0.02)}),
    "adam, identity": ("multiclass", {"activation": "identity"}),
    "adam, logistic": ("multiclass", {"activation": "logistic", "learning_rate_init": 0.02}),
    "adam, tanh": ("multiclass", {"activation": "tanh"}),
    "adam, early stopping": ("multiclass", {"early_stopping": True, "n_iter_no_change": 2}),
    "adam, alpha": ("multiclass", {"alpha": 3.0}),
    "adam, neither alpha nor shuffle": ("multiclass", {"alpha": 0.0, "shuffle": False, "batch_size": "auto"}),
    "adam, no hidden layer": ("multiclass", {"hidden_layer_sizes": ()}),
    "sgd, Nesterov": ("multiclass", sgd()),
    "sgd, momentum": ("multiclass", sgd(nesterovs_momentum=False)),
    "sgd, no momentum": ("multiclass", sgd(momentum=0.0)),
    "sgd, invscaling": ("multiclass", sgd(learning_rate="invscaling", power_t=0.3)),
    "sgd, adaptive": ("multiclass", sgd(learning_rate="adaptive", tol=0.1, n_iter_no_change=1, max_iter=25)),
    "sgd, adaptive, early stopping": ("multiclass", sgd(learning_rate="adaptive", early_stopping=True,
                                                        n_iter_no_change=1, max_iter=25)),
    "lbfgs": ("multiclass", {"solver": "lbfgs", "max_iter": 5}),
    "binary": ("binary", {}),
    "binary, sgd": ("binary", sgd(activation="tanh")),
    "multilabel": ("multilabel", {}),
    "regression": ("regression", {}),
    "regression, sgd": ("regression", sgd(learning_rate="invscaling", activation="logistic")),
    "regression, two outputs": ("two outputs", {"early_stopping": True}),
    "poisson": ("counts", {"loss": "poisson"}),
}


def data(kind, dtype):
    """X and y of a learnable problem."""
    rng = np.random.default_rng(7)
    X = rng.standard_normal((ROWS, FEATURES))
    scores = X @ rng.standard_normal((FEATURES, CLASSES))
    y = {"multiclass": scores.argmax(axis=1), "binary": np.where(scores[:, 0] > 0, "yes", "no"),
         "multilabel": (scores > 1).astype(int), "regression": np.tanh(scores[:, 0]),
         "two outputs": np.tanh(scores[:, :2]), "counts": rng.poisson(np.exp(scores[:, 0] / 4))}[kind]
    return X.astype(dtype), y


def estimator(kind, options):
    return (MLPRegressor if kind in ("regression", "two outputs", "counts") else MLPClassifier)(**SETTINGS | options)


def roundings(rng, shape, dtype):
    """Factors of 1, or one unit in the last place beside it."""
    return 1 + np.finfo(dtype).eps * rng.integers(-1, 2, shape).astype(dtype)


@contextmanager
def jittered(dtype):
    """Let scikit-learn's optimizers err by one more unit in the last place of each parameter a step."""
    rng = np.random.default_rng(0)

    def update_params(self, params, grads):
        BaseOptimizer.update_params(self, params, grads)
        for p in params:
            p *= roundings(rng, p.shape, dtype)

    with pytest.MonkeyPatch.context() as patch:
        for optimizer in (AdamOptimizer, SGDOptimizer):
            patch.setattr(optimizer, "update_params", update_params, raising=False)
        yield


def history(model):
    """Losses, and the scores of early stopping."""
    curve = getattr(model, "loss_curve_", [model.loss_])  # lbfgs has none
    return np.array([curve, getattr(model, "validation_scores_", None) or curve])


def assert_same_training(ours, theirs, moved, dtype):
    """Require the history of scikit-learn's training, to rounding.

    Training amplifies roundings. How much, ``moved`` tells: scikit-learn's training with one random unit in the last
    place more in X, and in each parameter a step, where the kernels err by a few units of the much smaller update. 4,
    since that is one draw. The values themselves come from probabilities of two computations, each with an exponential
    within 2 ulp, a sum of CLASSES terms and a division: CLASSES + 2 roundings of p are as many ulp of 1 in log p.
    """
    ours, theirs, moved = history(ours), history(theirs), history(moved)
    assert ours.shape == theirs.shape == moved.shape  # as many epochs
    eps = np.finfo(dtype).eps
    spread = np.maximum.accumulate(np.abs(moved - theirs), axis=1)
    allowed = 4 * spread + 2 * (CLASSES + 2) * eps * (1 + np.abs(theirs))
    assert np.all(allowed < np.sqrt(eps) * (1 + np.abs(theirs)))  # chaos would hide a wrong formula
    assert np.all(np.abs(ours - theirs) <= allowed)


def compare(train, X):
    """Train by a function of X: with scikit-learn alone, with fastnorm inside, and jittered."""
    theirs = train(X)
    with fast.accelerate():
        ours = train(X)
    with jittered(X.dtype):
        moved = train(X * roundings(np.random.default_rng(1), X.shape, X.dtype))
    assert_same_training(ours, theirs, moved, X.dtype)
    return ours, theirs


def replaced():
    """What `accelerate` may replace, as it is now."""
    return (dict(_base.ACTIVATIONS), dict(_base.DERIVATIVES), dict(_base.LOSS_FUNCTIONS),
            vars(AdamOptimizer).get("update_params"), vars(SGDOptimizer).get("update_params"))


PLAIN = replaced()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of the matrix products spin where others want to run; these are too small to need them."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    assert replaced() == PLAIN


# -- whole trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_are_those_of_scikit_learn(name, dtype):
    kind, options = TRAININGS[name]
    X, y = data(kind, dtype)
    ours, theirs = compare(lambda X: estimator(kind, options).fit(X, y), X)
    assert ours.n_iter_ == theirs.n_iter_
    assert [w.dtype for w in ours.coefs_] == [w.dtype for w in theirs.coefs_]
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), abs=float(np.sqrt(np.finfo(dtype).eps)))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("weight_dtype", [np.float32, np.float64])
def test_sample_weights(kind, weight_dtype, dtype, rng):
    X, y = data(kind, dtype)
    weights = rng.uniform(0, 2, ROWS).astype(weight_dtype)
    compare(lambda X: estimator(kind, {}).fit(X, y, weights), X)


@pytest.mark.parametrize("container", [csr_array, csc_array])
@pytest.mark.parametrize("options", [{}, sgd()], ids=["adam", "sgd"])
def test_sparse_input(container, options, dtype):
    X, y = data("multiclass", dtype)
    X[np.abs(X) < 1] = 0
    ours, theirs = compare(lambda X: estimator("multiclass", options).fit(container(X), y), X)
    with fast.accelerate():
        np.testing.assert_array_equal(ours.predict(container(X)), theirs.predict(X))


@pytest.mark.parametrize("options", [{}, sgd(learning_rate="adaptive")], ids=["adam", "sgd"])
def test_warm_start(options, dtype):
    X, y = data("multiclass", dtype)

    def train(X):
        model = estimator("multiclass", {"warm_start": True, "max_iter": 4, **options})
        return model.fit(X, y).fit(X, y)

    assert len(compare(train, X)[0].loss_curve_) == 8


@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
@pytest.mark.parametrize("options", [{}, sgd(), sgd(learning_rate="invscaling", nesterovs_momentum=False)],
                         ids=["adam", "nesterov", "momentum"])
def test_partial_fit(kind, options, dtype):
    X, y = data(kind, dtype)
    classes = {} if kind == "regression" else {"classes": np.unique(y)}

    def train(X):
        model = estimator(kind, options)
        for _ in range(6):
            model.partial_fit(X, y, **classes)
        return model

    compare(train, X)


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
@pytest.mark.parametrize("options", [{}, sgd()], ids=["adam", "sgd"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_training_may_go_in_and_out(kind, options, first, dtype):
    """The optimizer's state is scikit-learn's, also where that is float64 for float32 parameters."""
    X, y = data(kind, dtype)
    classes = {} if kind == "regression" else {"classes": np.unique(y)}

    def train(X, accelerated):
        model = estimator(kind, options)
        for epoch in range(6):
            if accelerated and epoch % 2 == first:
                with fast.accelerate():
                    model.partial_fit(X, y, **classes)
            else:
                model.partial_fit(X, y, **classes)
        return model

    theirs, ours = train(X, False), train(X, True)
    with jittered(dtype):
        moved = train(X, False)
    assert_same_training(ours, theirs, moved, dtype)


def test_the_loss_of_wrong_and_certain_predictions_is_clipped_as_scikit_learn_does(dtype):
    X, y = data("multiclass", dtype)
    model = estimator("multiclass", {}).fit(X, y)
    for w in model.coefs_:
        w *= 50
    again = pickle.loads(pickle.dumps(model))
    model.partial_fit(X, (y + 1) % CLASSES)
    with fast.accelerate():
        again.partial_fit(X, (y + 1) % CLASSES)
    assert model.loss_ > 10
    assert again.loss_ == pytest.approx(model.loss_, rel=float(100 * np.finfo(dtype).eps))


# -- the pieces --------------------------------------------------------------------------------------------------------
# The kernels err by at most 3 ulp (test_accuracy); NumPy's and SciPy's functions by about 2, a product adds a half.
ULPS = 6


@pytest.mark.parametrize("name", ["relu", "logistic", "tanh", "softmax"])
def test_activations(name, dtype, rng):
    X = (rng.standard_normal((33, 9)) * 10).astype(dtype)
    expected, actual = X.copy(), X.copy()
    _base.ACTIVATIONS[name](expected)
    with fast.accelerate():
        assert _base.ACTIVATIONS[name](actual) is None
    # softmax: a sum of 9 terms in another order; a difference to the largest, whose rounding exp makes a factor
    assert_close(actual, expected, ulps=ULPS + (9 + np.ptp(X) if name == "softmax" else 0))


@pytest.mark.parametrize("name", ["relu", "logistic", "tanh"])
def test_derivatives(name, dtype, rng):
    Z, delta = (rng.standard_normal((2, 33, 9))).astype(dtype)
    _base.ACTIVATIONS[name](Z)
    kept, expected, actual = Z.copy(), delta.copy(), delta.copy()
    _base.DERIVATIVES[name](Z, expected)
    with fast.accelerate():
        _base.DERIVATIVES[name](Z, actual)
    np.testing.assert_array_equal(Z, kept)
    assert_close(actual, expected, ulps=ULPS, scale=np.abs(delta))  # 1 - Z**2 cancels


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["log_loss", "binary_log_loss"])
def test_losses(name, weighted, dtype, rng):
    p = rng.dirichlet(np.ones(CLASSES), 40).astype(dtype)
    p[:2] = 0, 1, 0, 0, 0
    y = np.arange(40)[:, np.newaxis] % CLASSES == np.arange(CLASSES)
    y = y if name == "log_loss" else rng.random(p.shape) < 0.5
    weights = rng.random(40) if weighted else None
    plain = _base.LOSS_FUNCTIONS[name]
    expected = plain(y.astype(float), p, weights)  # in float64, which booleans beside float32 are only until SciPy 1.17
    with fast.accelerate():
        actual = _base.LOSS_FUNCTIONS[name](y, p, weights)
        # of targets that are no booleans, and of a single column, scikit-learn's own
        assert _base.LOSS_FUNCTIONS[name](y.astype(float), p, weights) == expected
        assert _base.LOSS_FUNCTIONS[name](y[:, :1], p[:, :1]) == pytest.approx(plain(y[:, :1], p[:, :1]))
    assert type(actual) is np.float64
    assert_close(actual, expected, ulps=p.size)  # a sum of so many terms of one sign, in float64, in another order


@pytest.mark.parametrize(("optimizer", "options", "state"), [
    (AdamOptimizer, {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-4}, ["ms", "vs"]),
    (SGDOptimizer, {"momentum": 0.8, "nesterov": True}, ["velocities"]),
    (SGDOptimizer, {"momentum": 0.8, "nesterov": False}, ["velocities"]),
    (SGDOptimizer, {"momentum": 0, "nesterov": False}, ["velocities"])])
def test_updates_and_the_state_they_leave(optimizer, options, state, dtype, rng):
    steps, shapes = 5, [(4, 3), (3,), (1, 1)]
    start = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    gradients = [[rng.standard_normal(shape).astype(dtype) for shape in shapes] for _ in range(steps)]
    kept = pickle.loads(pickle.dumps(gradients))

    def run():
        params = [p.copy() for p in start]
        used = optimizer(params, 0.1, **options)
        for step, grads in enumerate(gradients):
            used.update_params(params, grads)
            if step == 2:
                used.learning_rate /= 5.0  # as the schedules of SGD do: past gradients keep their rate
        return params, used

    expected, theirs = run()
    with fast.accelerate():
        actual, ours = run()
    for a, b in zip(gradients, kept, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert (ours.learning_rate, getattr(ours, "t", None)) == (theirs.learning_rate, getattr(theirs, "t", None))
    pairs = list(zip(actual, expected, strict=True))
    for name in state:
        pairs += zip(getattr(ours, name), getattr(theirs, name), strict=True)
    for a, b in pairs:
        assert a.dtype == dtype
        # of terms below 4 in magnitude, at most 4 roundings a step on either side
        assert_close(a, b, ulps=2 * 4 * steps, scale=4)


def test_updates_are_in_place(dtype):
    X, y = data("multiclass", dtype)
    with fast.accelerate():
        for options, state in (({}, "ms"), (sgd(), "velocities")):
            model = estimator("multiclass", options).partial_fit(X, y, classes=np.unique(y))
            before = list(getattr(model._optimizer, state))
            model.partial_fit(X, y)
            assert all(a is b for a, b in zip(before, getattr(model._optimizer, state), strict=True))


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_what_the_kernels_do_not_take_goes_to_scikit_learn(activation):
    X, y = data("multiclass", np.float64)
    model = estimator("multiclass", {"activation": activation}).fit(X, y)
    expected = model.predict_proba(X.astype(np.longdouble))
    with fast.accelerate():
        actual = model.predict_proba(X.astype(np.longdouble))
    assert actual.dtype == np.longdouble
    np.testing.assert_array_equal(actual, expected)


# -- what is touched, and put back -------------------------------------------------------------------------------------


def test_nested_contexts_end_with_the_outermost():
    with fast.accelerate():
        inside = replaced()
        with fast.accelerate():
            assert replaced() == inside
        assert replaced() == inside != PLAIN
    assert replaced() == PLAIN


def test_an_exception_restores():
    with pytest.raises(ValueError, match="0 feature"), fast.accelerate():
        MLPClassifier().fit(np.zeros((3, 0)), [0, 1, 0])
    assert replaced() == PLAIN


def test_accelerate_decorates():
    seen = fast.accelerate()(replaced)
    assert seen() == seen() != PLAIN
    assert replaced() == PLAIN


def test_what_was_there_before_is_put_back(monkeypatch):
    def mine(*arguments):
        raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setitem(_base.ACTIVATIONS, "tanh", mine)
        patch.setattr(SGDOptimizer, "update_params", mine)
        with fast.accelerate():
            assert mine not in (_base.ACTIVATIONS["tanh"], SGDOptimizer.update_params)
        assert _base.ACTIVATIONS["tanh"] is SGDOptimizer.update_params is mine


def test_threads_leave_in_any_order():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with fast.accelerate():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    with fast.accelerate():
        inside = replaced()
        leave.set()
        thread.join()
        assert replaced() == inside != PLAIN
    assert replaced() == PLAIN


def test_a_training_goes_on_while_other_threads_come_and_go():
    X, y = data("multiclass", np.float64)
    model = estimator("multiclass", {"max_iter": 60})
    expected = model.fit(X, y).loss_curve_
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            with fast.accelerate():
                pass

    thread = threading.Thread(target=come_and_go)
    thread.start()
    actual = model.fit(X, y).loss_curve_
    done.set()
    thread.join()
    np.testing.assert_allclose(actual, expected, rtol=np.sqrt(np.finfo(float).eps))


def test_threads_of_joblib_take_part():
    X, y = data("multiclass", np.float64)
    model = estimator("multiclass", {})
    expected = cross_validate(model, X, y, cv=3, return_estimator=True)
    with fast.accelerate(), parallel_config("threading", n_jobs=2):
        actual = cross_validate(model, X, y, cv=3, return_estimator=True)
    np.testing.assert_array_equal(actual["test_score"], expected["test_score"])


def test_a_subclass_keeps_what_it_overrides():
    class Network(MLPClassifier):
        calls = 0

        def _backprop(self, *arguments):
            Network.calls += 1
            return super()._backprop(*arguments)

    X, y = data("multiclass", np.float64)
    with fast.accelerate():
        Network(**SETTINGS).partial_fit(X, y, classes=np.unique(y))
    assert Network.calls == -(-ROWS // SETTINGS["batch_size"])


def test_a_fitted_estimator_needs_no_fastnorm(tmp_path):
    X, y = data("multiclass", np.float32)
    with fast.accelerate():
        model = estimator("multiclass", {}).fit(X, y)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, X, y)))
    program = f"""
import pickle, sys
sys.modules["fastnorm"] = None  # importing it fails
with open({str(file)!r}, "rb") as file:
    model, X, y = pickle.load(file)
print(model.predict(X).tolist())
model.partial_fit(X, y)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(model.predict(X).tolist())


@pytest.mark.parametrize("version", ["1.6.1", "1.70.0", "1.999.dev0", "2.0"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(sklearn, "__version__", version)
    spec = importlib.util.find_spec(fast.__name__)
    with pytest.raises(ImportError, match=rf"scikit-learn: expected version .* or .*, got {version}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="tests run outside a checkout")
def test_example_shows_the_same_losses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--epochs", "3", "--rounds", "1", "--dtype", "float64"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(printed.split("losses differ by ")[1].split()[0]) < 1e-9
