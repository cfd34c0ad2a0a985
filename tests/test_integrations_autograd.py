"""fastnorm under HIPS autograd: gradients by its own finite differences."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("autograd", reason="autograd is not installed")
import autograd.numpy as anp
from autograd import grad, value_and_grad
from autograd.test_util import check_grads

import fastnorm as fn
from fastnorm.integrations import autograd as fast

EXAMPLE = Path(__file__).parents[1] / "examples" / "autograd_digits.py"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("axis", [1, -1])
def test_batch_norm(training, activation, axis, rng):
    x, residual = rng.standard_normal((2, 6, 3, 3))
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 3))

    def normalize(x, gamma, beta, residual):
        return fast.batch_norm(x, gamma, beta, mean.copy(), var.copy(), residual=residual, axis=axis,
                               training=training, activation=activation)

    check_grads(normalize, modes=["rev"], order=1)(x, gamma, beta, residual)
    check_grads(lambda x: fast.batch_norm(x), modes=["rev"], order=1)(x)
    expected, _ = fn.batch_norm_forward(x, gamma, beta, mean.copy(), var.copy(), residual=residual, axis=axis,
                                        training=training, activation=activation)
    np.testing.assert_array_equal(normalize(x, gamma, beta, residual), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("axis", [0, -1])
def test_softmax_cross_entropy(reduction, axis, rng):
    logits = rng.standard_normal((4, 4))
    weight = rng.uniform(0.5, 2, 4)
    for targets in (np.array([0, 3, 1, 0]), rng.uniform(size=(4, 4))):
        check_grads(lambda a, targets=targets: 3 * fast.softmax_cross_entropy(
            a, targets, axis=axis, weight=weight, reduction=reduction, label_smoothing=0.1), modes=["rev"],
            order=1)(logits)


@pytest.mark.parametrize(("name", "options"), [
    ("relu", {}), ("leaky_relu", {"negative_slope": 0.2}), ("elu", {"alpha": 0.7}), ("celu", {"alpha": 0.7}),
    ("sigmoid", {}), ("tanh", {})])
def test_activations(name, options, rng):
    x = rng.standard_normal((5, 7))
    check_grads(lambda a: getattr(fast, name)(a, **options), modes=["rev"], order=1)(x)
    np.testing.assert_array_equal(getattr(fast, name)(x, **options), getattr(fn, name)(x, **options))


def test_float32_stays_float32(rng):
    x = rng.standard_normal((6, 3)).astype(np.float32)

    def loss(x):
        return fast.softmax_cross_entropy(fast.relu(fast.batch_norm(x)), np.array([0, 1, 2, 0, 1, 2]))

    value, gradient = value_and_grad(loss)(x)
    assert (value.dtype, gradient.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("function", [
    fast.batch_norm, fast.tanh, lambda x: fast.softmax_cross_entropy(x, np.array([0, 1, 0]))])
def test_second_derivatives_are_refused(function, rng):
    def penalty(x):
        return anp.sum(grad(lambda x: anp.sum(function(x) ** 2))(x) ** 2)

    with pytest.raises(NotImplementedError, match="VJP of"):
        grad(penalty)(rng.standard_normal((3, 2)))


def test_running_statistics_may_be_differentiated_around(rng):
    """In a dict of everything, say: to autograd they are constants, whose gradient is 0."""
    x = rng.standard_normal((6, 3))
    params = {"gamma": np.ones(3), "beta": np.zeros(3), "mean": np.zeros(3), "var": np.ones(3)}

    def loss(params):
        y = fast.batch_norm(x, params["gamma"], params["beta"], params["mean"], params["var"])
        return anp.sum(y ** 3)

    gradients = grad(loss)(params)
    expected = grad(lambda gamma: anp.sum(fast.batch_norm(x, gamma, params["beta"]) ** 3))(params["gamma"])
    np.testing.assert_array_equal(gradients["gamma"], expected)
    np.testing.assert_array_equal(gradients["mean"], np.zeros(3))
    assert not np.array_equal(params["var"], np.ones(3))  # updated


@pytest.mark.parametrize("function", [
    fast.batch_norm, fast.relu, lambda x, out: fast.softmax_cross_entropy(x, np.array([0, 1, 0]), out=out)])
def test_out_is_refused(function):
    with pytest.raises(TypeError, match="out: expected no such argument"):
        function(np.ones((3, 2)), out=np.empty((3, 2)))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="tests run outside a checkout")
def test_example_learns(monkeypatch, capsys):
    """And by autograd.numpy alone, which it is compared with, the same: float64 leaves roundings invisible."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--epochs", "2", "--dtype", "float64"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    losses = re.findall(r"loss (\S+) by autograd.numpy, (\S+) with fastnorm", out)
    assert len(losses) == 2
    assert all(plain == fast for plain, fast in losses)
    accuracy = float(out.split()[-2])
    assert accuracy > 80  # chance is 10
