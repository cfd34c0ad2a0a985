"""fastnorm under scikit-learn: within `accelerate`, MLPClassifier and MLPRegressor train on fastnorm's kernels.

# Design:
# - Only leaves are replaced: activations, their derivatives, the losses of classifiers, and the updates of both
#   optimizers. Each keeps scikit-learn's contract and state, so that a training may begin with one and go on with the
#   other, subclasses of the estimators keep what they override, and what is fitted refers to nothing of fastnorm's.
# - The backward pass around them stays scikit-learn's. One of our own with `softmax_cross_entropy` in it was measured:
#   no faster with 10 classes, 5 % with 1,000.
# - What the kernels do not take (long double, gradients of another dtype than their parameters' state) goes to the
#   functions that were replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import sklearn

import fastnorm

from .._arrays import FLOAT32, FLOAT64, Array
from .._runtime import kernels
from ..updates import _run, check_lists

__all__ = ["accelerate"]

_TESTED = ("1.7", "1.8", "1.9")  # of them, `_multilayer_perceptron.py` and what it imports compute the same


def _check_version() -> None:
    version = sklearn.__version__
    if ".".join(version.split(".")[:2]) not in _TESTED:
        raise ImportError(f"scikit-learn: expected version {', '.join(_TESTED[:-1])} or {_TESTED[-1]}, whose private "
                          f"functions fastnorm.integrations.sklearn knows, got {version}", name="sklearn")


_check_version()  # before anything private is imported: hence E402 below
from sklearn.neural_network import _base  # noqa: E402
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, BaseOptimizer, SGDOptimizer  # noqa: E402

# -- activations -------------------------------------------------------------------------------------------------------


def _fit_kernels(*arrays: Array) -> bool:
    """Whether arrays are of one dtype, and the kernels have it."""
    return arrays[0].dtype in (FLOAT32, FLOAT64) and all(a.dtype == arrays[0].dtype for a in arrays[1:])


def _activation(kernel: Callable[..., Array], original: Callable[[Array], None]) -> Callable[[Array], None]:
    """An activation in place."""
    def replacement(X: Array) -> None:
        if _fit_kernels(X):
            kernel(X, out=X)
        else:
            original(X)

    return replacement


def _derivative(kernel: Callable[..., Array], original: Callable[[Array, Array], None]
                ) -> Callable[[Array, Array], None]:
    """The product of delta and an activation's derivative, in place, from the activation's output Z.

    ReLU's kernel wants the input, but asks only whether it is > 0: the output is whenever the input is.
    """
    def replacement(Z: Array, delta: Array) -> None:
        if _fit_kernels(Z, delta):
            kernel(delta, Z, out=delta)
        else:
            original(Z, delta)

    return replacement


# -- losses ------------------------------------------------------------------------------------------------------------
# scikit-learn keeps probabilities eps away from 0 and 1, and takes a logarithm of each of them, most to be multiplied
# by 0. Here it is taken of those that count, and always in float64, as scikit-learn does beside SciPy 1.17. Beside
# 1.18, boolean targets no longer make float64 of float32, so that it rounds each of float32's logarithms.


def _log_of(probabilities: Array) -> Array:
    eps = np.finfo(probabilities.dtype).eps
    logarithms: Array = np.log(np.clip(probabilities, eps, 1 - eps), dtype=np.float64)
    return logarithms


def _log_loss(y_true: Array, y_prob: Array, sample_weight: Array | None = None) -> Any:
    """Mean of -log of the probability of each row's class; y_true (rows, classes) marks one class a row."""
    if y_true.dtype != np.bool_ or y_true.shape[1] == 1:
        return _base.log_loss(y_true, y_prob, sample_weight)
    return -np.average(_log_of(y_prob[y_true]), weights=sample_weight)


def _binary_log_loss(y_true: Array, y_prob: Array, sample_weight: Array | None = None) -> Any:
    """Sum over the outputs of the mean of -log of the probability of what y_true (rows, outputs) says."""
    if y_true.dtype != np.bool_:
        return _base.binary_log_loss(y_true, y_prob, sample_weight)
    return -np.average(_log_of(np.where(y_true, y_prob, 1 - y_prob)), weights=sample_weight, axis=0).sum()


# -- optimizers --------------------------------------------------------------------------------------------------------


def _state_fits(params: list[Array], *state: list[Array]) -> bool:
    """Whether the state has the parameters' dtypes: scikit-learn's own updates may have left float64 for float32."""
    return all(_fit_kernels(*arrays) for arrays in zip(params, *state, strict=True))


def _update_adam(self: Any, params: list[Array], grads: list[Array]) -> None:
    """A step of ``AdamOptimizer``."""
    if not _state_fits(params, self.ms, self.vs):
        BaseOptimizer.update_params(self, params, grads)
        return
    self.t += 1
    self.learning_rate = (  # for those who look at it: the kernel computes its own
        self.learning_rate_init * np.sqrt(1 - self.beta_2**self.t) / (1 - self.beta_1**self.t))
    grads = [grad.astype(param.dtype, copy=False) for param, grad in zip(params, grads, strict=True)]
    fastnorm.adam_step(params, grads, self.ms, self.vs, step=self.t, lr=float(self.learning_rate_init),
                       betas=(float(self.beta_1), float(self.beta_2)), eps=float(self.epsilon), epsilon_hat=True)


def _update_sgd(self: Any, params: list[Array], grads: list[Array]) -> None:
    """A step of ``SGDOptimizer``: ``v = momentum * v - lr * grad; p += v``, or ``momentum * v - lr * grad`` once more.

    The learning rate is inside the velocity, and the sign too: the kernel of `fastnorm.momentum_step` gives that for
    the gradient ``-lr * grad`` and a learning rate of -1, which the public function does not take.
    """
    if not _state_fits(params, self.velocities):
        BaseOptimizer.update_params(self, params, grads)
        return
    steps = [np.multiply(grad, -self.learning_rate, dtype=param.dtype, casting="same_kind")
             for param, grad in zip(params, grads, strict=True)]
    lists = check_lists(("params", params, True), ("grads", steps, False), ("velocities", self.velocities, True))
    _run(kernels.optimizer.momentum, lists, (0, 1, 2), -1.0, self.momentum, 0.0, self.nesterov, 0.0, False)


# -- the switch --------------------------------------------------------------------------------------------------------

_DICTIONARIES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (_base.ACTIVATIONS, {
        "relu": _activation(fastnorm.relu, _base.inplace_relu),
        "logistic": _activation(fastnorm.sigmoid, _base.inplace_logistic),
        "tanh": _activation(fastnorm.tanh, _base.inplace_tanh),
        "softmax": _activation(fastnorm.softmax, _base.inplace_softmax)}),
    (_base.DERIVATIVES, {
        "relu": _derivative(fastnorm.relu_backward, _base.inplace_relu_derivative),
        "logistic": _derivative(fastnorm.sigmoid_backward, _base.inplace_logistic_derivative),
        "tanh": _derivative(fastnorm.tanh_backward, _base.inplace_tanh_derivative)}),
    (_base.LOSS_FUNCTIONS, {"log_loss": _log_loss, "binary_log_loss": _binary_log_loss}),
)
_UPDATES = ((AdamOptimizer, _update_adam), (SGDOptimizer, _update_sgd))


class _Switch:
    """Counts those who want the replacements, from any thread: the first puts them in, the last takes them out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = ExitStack()

    def on(self) -> None:
        with self._lock:
            if not self._users:
                self._replace()
            self._users += 1

    def off(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()

    def _replace(self) -> None:
        for functions, replacements in _DICTIONARIES:
            self._undo.callback(functions.update, {name: functions[name] for name in replacements})
            functions.update(replacements)
        for optimizer, update in _UPDATES:
            if "update_params" in vars(optimizer):
                self._undo.callback(setattr, optimizer, "update_params", optimizer.update_params)
            else:  # inherited from `BaseOptimizer`, as long as nobody else has been here
                self._undo.callback(delattr, optimizer, "update_params")
            optimizer.update_params = update


_switch = _Switch()


@contextmanager
def accelerate() -> Iterator[None]:
    """Let scikit-learn's ``MLPClassifier`` and ``MLPRegressor`` train on fastnorm's kernels: a context manager.

    Within it, ``fit`` and ``partial_fit`` use fastnorm's updates of Adam and of SGD with momentum, its activations with
    their gradients, its softmax, and a log-loss that takes one logarithm a row; ``predict`` uses the activations too.
    The losses are scikit-learn's own to rounding, with every option, and sparse X works as before. Estimators stay
    scikit-learn's: one that was fitted within predicts, pickles, and goes on with ``partial_fit`` outside, or where
    fastnorm is not installed, and one that was fitted outside goes on within.

    What changes is a few functions inside scikit-learn, for all threads of the process, from the first entry to the
    last exit: contexts may be nested, entered from several threads and left in any order or by an exception. Processes
    that are started by joblib do not take part, and compute the same more slowly; its ``"threading"`` backend does.
    `accelerate` also decorates a function: ``@accelerate()``.

    The solver ``"lbfgs"`` gains from the activations and the losses alone. ``loss="poisson"`` and the squared error are
    left to scikit-learn.

    Raises
    ------
    ImportError
        When this module is imported, if scikit-learn's version is none that fastnorm was tested with.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.neural_network import MLPClassifier
    >>> from fastnorm.integrations.sklearn import accelerate
    >>> X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> with accelerate():
    ...     model = MLPClassifier(8, learning_rate_init=0.05, random_state=0).fit(X, [0, 1, 1, 0])
    >>> model.predict(X)
    array([0, 1, 1, 0])
    """
    _switch.on()
    try:
        yield
    finally:
        _switch.off()
