"""fastnorm under HIPS autograd: batch norm, softmax cross-entropy and the activations, with their gradients.

The functions take what ``autograd.numpy`` works on. Their gradients are fastnorm's backward functions, and have no
gradients of their own: a second derivative raises autograd's NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from autograd.extend import defvjp, defvjp_argnums, primitive
from autograd.tracer import getval, isbox

import fastnorm

from .._arrays import Array

__all__ = ["batch_norm", "celu", "elu", "leaky_relu", "relu", "sigmoid", "softmax_cross_entropy", "tanh"]


class _Kept:
    """What a forward call leaves for its gradient: an argument of it that autograd passes through."""

    value: Any = None


def _like(gradient: Any, result: Array) -> Array:
    """An incoming gradient as the kernels need it: autograd may give a scalar of another dtype."""
    return np.asarray(gradient, result.dtype)


def _constant(value: Any) -> Any:
    """The array in what may be autograd's box, as it is for everything in a dict that is differentiated."""
    while isbox(value):
        value = getval(value)
    return value


def _refuse_out(options: dict[str, Any]) -> None:
    if "out" in options:
        raise TypeError("out: expected no such argument: autograd needs every result to stay as it is")


# -- batch norm --------------------------------------------------------------------------------------------------------


@primitive
def _batch_norm(x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, kept: _Kept,
                options: dict[str, Any]) -> Array:
    y, kept.value = fastnorm.batch_norm_forward(x, gamma, beta, residual=residual, **options)
    return y


@primitive
def _batch_norm_gradients(dy: Array, x: Array, gamma: Array | None, beta: Array | None, residual: Array | None,
                          kept: _Kept) -> dict[int, Array | None]:
    """The gradient by each argument of `_batch_norm`, by its position."""
    return dict(enumerate(fastnorm.batch_norm_backward(_like(dy, x), kept.value)))


def _differentiate_batch_norm(argnums: tuple[int, ...], y: Array, arguments: tuple[Any, ...],
                              options: dict[str, Any]) -> Callable[[Array], tuple[Array, ...]]:
    *arrays, kept, _ = arguments

    def gradients(dy: Array) -> tuple[Array, ...]:
        every = _batch_norm_gradients(dy, *arrays, kept)
        return tuple(every[at] for at in argnums)

    return gradients


defvjp_argnums(_batch_norm, _differentiate_batch_norm)


def batch_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, running_mean: Array | None = None,
               running_var: Array | None = None, *, residual: Array | None = None, **options: Any) -> Array:
    """`fastnorm.batch_norm_forward` without the cache, differentiable by x, gamma, beta and residual.

    Parameters
    ----------
    x : ndarray
        The batch, float32 or float64, of any rank and memory layout, with C channels along ``axis``.
    gamma, beta : ndarray, optional
        Scale and shift, shape (C,), x's dtype.
    running_mean, running_var : ndarray, optional
        Running statistics, shape (C,), x's dtype: constants to autograd, updated in place in training.
    residual : ndarray, optional
        Added before the activation; shape and dtype of x.
    **options
        ``axis``, ``training``, ``momentum``, ``eps``, ``unbiased_running_var``, ``activation``, ``negative_slope``: as
        in `fastnorm.batch_norm_forward`.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        As `fastnorm.batch_norm_forward` does.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from fastnorm.integrations.autograd import batch_norm
    >>> x = np.array([[1.0], [2.0], [4.0]])
    >>> grad(lambda gamma: np.sum(batch_norm(x, gamma) ** 2))(np.ones(1)).round(3)
    array([6.])
    """
    _refuse_out(options)
    options = {"running_mean": _constant(running_mean), "running_var": _constant(running_var), **options}
    y: Array = _batch_norm(x, gamma, beta, residual, _Kept(), options)
    return y


# -- cross-entropy -----------------------------------------------------------------------------------------------------


@primitive
def _cross_entropy(logits: Array, targets: Array, kept: _Kept, options: dict[str, Any]) -> Any:
    loss, kept.value = fastnorm.softmax_cross_entropy(logits, targets, **options)
    return loss


@primitive
def _cross_entropy_gradient(dloss: Array, logits: Array, kept: _Kept, axis: int) -> Array:
    dloss = _like(dloss, logits)
    gradient: Array = kept.value * (np.expand_dims(dloss, axis) if dloss.ndim else dloss)
    return gradient


def _differentiate_cross_entropy(loss: Any, logits: Array, targets: Array, kept: _Kept,
                                 options: dict[str, Any]) -> Callable[[Array], Array]:
    return lambda dloss: _cross_entropy_gradient(dloss, logits, kept, options["axis"])


defvjp(_cross_entropy, _differentiate_cross_entropy, argnums=(0,))


def softmax_cross_entropy(logits: Array, targets: Array, *, axis: int = -1, **options: Any) -> Any:
    """The loss of `fastnorm.softmax_cross_entropy`, differentiable by the logits.

    The gradient is computed with the loss, in one pass, and kept until autograd asks for it.

    Parameters
    ----------
    logits : ndarray of float32 or float64, at least 1-d
        Unnormalized log-probabilities, in any memory layout.
    targets : ndarray
        Classes, or probabilities: constants to autograd.
    axis : int
        The axis of the classes.
    **options
        ``weight``, ``ignore_index``, ``label_smoothing``, ``reduction``: as in `fastnorm.softmax_cross_entropy`.

    Returns
    -------
    NumPy scalar of logits' dtype, or ndarray
        The loss; the loss of each row with ``reduction="none"``.

    Raises
    ------
    TypeError, ValueError
        As `fastnorm.softmax_cross_entropy` does.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from fastnorm.integrations.autograd import softmax_cross_entropy
    >>> grad(softmax_cross_entropy)(np.zeros((1, 4)), np.array([2]))
    array([[ 0.25,  0.25, -0.75,  0.25]])
    """
    _refuse_out(options)
    return _cross_entropy(logits, targets, _Kept(), {"axis": axis, **options})


# -- activations -------------------------------------------------------------------------------------------------------


def _activation(name: str, options: str, *, from_output: bool) -> Callable[..., Array]:
    """An activation of fastnorm as a primitive; its gradient is computed from its input or from its output."""
    forward, gradient = primitive(getattr(fastnorm, name)), getattr(fastnorm, f"{name}_backward")

    @primitive
    def backward(dy: Array, saved: Array, **options: Any) -> Array:
        dx: Array = gradient(_like(dy, saved), saved, **options)
        return dx

    def differentiate(y: Array, x: Array, **options: Any) -> Callable[[Array], Array]:
        saved = y if from_output else x
        return lambda dy: backward(dy, saved, **options)

    def activation(x: Array, **options: Any) -> Array:
        _refuse_out(options)
        y: Array = forward(x, **options)
        return y

    defvjp(forward, differentiate, argnums=(0,))
    activation.__name__ = activation.__qualname__ = name
    activation.__doc__ = f"""`fastnorm.{name}`, differentiable by x.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    **options
        {options}: as in `fastnorm.{name}`.

    Returns
    -------
    ndarray
        Array like x, in x's memory order.

    Raises
    ------
    TypeError, ValueError
        As `fastnorm.{name}` does.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from fastnorm.integrations.autograd import {name}
    >>> grad(lambda x: np.sum({name}(x)))(np.array([1e3]))
    array([{"0" if from_output else "1"}.])
    """
    return activation


relu = _activation("relu", "None", from_output=False)
leaky_relu = _activation("leaky_relu", "``negative_slope``", from_output=False)
elu = _activation("elu", "``alpha``", from_output=False)
celu = _activation("celu", "``alpha``", from_output=False)
sigmoid = _activation("sigmoid", "None", from_output=True)
tanh = _activation("tanh", "None", from_output=True)
