"""Batch normalization: training, frozen and inference, with an optional activation and residual fused in.

Thin: check, allocate, call one kernel of ``_kernels/batchnorm.pyx``. The twin is ``reference/norm.py``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _runtime
from ._arrays import (
    FLOAT32,
    FLOAT32_MAX,
    Array,
    View,
    block,
    check_array,
    check_axis,
    check_choice,
    check_disjoint,
    check_flag,
    check_like,
    check_number,
    check_writeable,
    dense_vector,
    matching,
    write_back,
)
from ._kernels import checks
from ._outputs import destination, empty_like
from ._runtime import kernels

__all__ = ["BatchNormCache", "batch_norm_backward", "batch_norm_forward", "batch_norm_inference"]

# The kernels' numbers for what follows the normalization: the enum in vector.h.
ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2}
TABLE_ROWS = 6  # BN_ROWS in vector.h
FORWARD_ROWS = 4  # of these, the ones that a forward call fills
WIDE_ROWS = 3  # BN_WIDE_ROWS, of the table in float64

Backward = tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, Array]


class BatchNormCache(NamedTuple):
    """What `batch_norm_backward` needs of its forward call; opaque.

    It copies the vectors of per-channel numbers and refers to ``x`` and ``residual``: do not modify these two
    before the backward call. It can be used more than once.
    """

    x: Array
    residual: Array | None
    view: View
    table: Array
    wide_table: Array
    training: bool
    activation: int
    negative_slope: float
    has_gamma: bool
    has_beta: bool


def _check_input(x: object, axis: object) -> tuple[Array, int]:
    """Check x and the axis; return both, the axis counted from the front."""
    x = check_array("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got 0")
    return x, check_axis(axis, x.ndim)


def _check_parameters(x: Array, axis: int, gamma: Any, beta: Any, running_mean: Any, running_var: Any,
                      residual: Any) -> None:
    """Check the per-channel vectors and the residual against x."""
    channels = (x.shape[axis],)
    vectors = (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var))
    for name, vector in vectors:
        if vector is not None:
            check_like(name, vector, channels, x.dtype)
    if residual is not None:
        check_like("residual", residual, x.shape, x.dtype)


def _check_activation(activation: object, negative_slope: object) -> tuple[int, float]:
    """Check the fused activation; return the kernels' number for it and the slope."""
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    slope = check_number("negative_slope", negative_slope, low=-math.inf)
    return ACTIVATIONS[activation], slope  # type: ignore[index]  # just checked


def _slope_of(number: int, slope: float, x: Array) -> float:
    """Check that x's dtype can hold the slope; return the one that the kernels use: 0 for ReLU, which they rely on."""
    if abs(slope) > FLOAT32_MAX and x.dtype == FLOAT32:
        raise ValueError(f"negative_slope: expected a number that float32 can hold, got {slope:g}")
    return slope if number == ACTIVATIONS["leaky_relu"] else 0.0


def _check_out(out: Any, x: Array, others: tuple[tuple[str, Array | None], ...],
               may_equal: tuple[str, ...] = ()) -> None:
    """Check an output of x's shape and dtype that overlaps nothing it must not."""
    if out is not None:
        check_like("out", out, x.shape, x.dtype)
        check_writeable("out", out)
        check_disjoint(("out", out), *others, may_equal=may_equal)


def _check_forward(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, axis: Any, training: Any,
                   momentum: Any, eps: Any, unbiased_running_var: Any, activation: Any, negative_slope: Any,
                   residual: Any, out: Any) -> tuple[int, int, float]:
    """Check every argument of `batch_norm_forward`; return axis, activation number and slope."""
    check_flag("training", training)
    check_flag("unbiased_running_var", unbiased_running_var)
    check_number("momentum", momentum, high=1.0)
    check_number("eps", eps)
    number, slope = _check_activation(activation, negative_slope)
    at = checks.batch_norm_arrays(x, axis, gamma, beta, running_mean, running_var, residual, out, training)
    if at < 0:
        at = _check_forward_arrays(x, gamma, beta, running_mean, running_var, axis, training, residual, out)
    return at, number, _slope_of(number, slope, x)


def _check_forward_arrays(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, axis: Any, training: bool,
                          residual: Any, out: Any) -> int:
    """Check the arrays of `batch_norm_forward` one by one; return the axis counted from the front."""
    x, at = _check_input(x, axis)
    _check_parameters(x, at, gamma, beta, running_mean, running_var, residual)
    if (running_mean is None) != (running_var is None):
        absent, present = ("running_mean", "running_var")[:: 1 if running_mean is None else -1]
        raise ValueError(f"{absent}: expected an array beside {present}, got None")
    if training:
        values = math.prod(x.shape[:at] + x.shape[at + 1:])
        if values < 2:
            raise ValueError(f"x: expected more than one value per channel in training, got {values} (shape {x.shape})")
        if running_mean is not None:
            inputs = (("x", x), ("gamma", gamma), ("beta", beta), ("residual", residual))
            check_writeable("running_mean", running_mean)
            check_writeable("running_var", running_var)
            check_disjoint(("running_mean", running_mean), ("running_var", running_var), *inputs)
            check_disjoint(("running_var", running_var), *inputs)
    elif running_mean is None:
        raise ValueError("running_mean: expected an array with training=False, got None")
    _check_out(out, x, (("x", x), ("gamma", gamma), ("beta", beta), ("running_mean", running_mean),
                        ("running_var", running_var), ("residual", residual)))
    return at


def _check_inference(x: Any, running_mean: Any, running_var: Any, gamma: Any, beta: Any, axis: Any, eps: Any,
                     activation: Any, negative_slope: Any, residual: Any, out: Any) -> tuple[int, int, float]:
    """Check every argument of `batch_norm_inference`; return axis, activation number and slope."""
    check_number("eps", eps)
    number, slope = _check_activation(activation, negative_slope)
    at = checks.batch_norm_arrays(x, axis, gamma, beta, running_mean, running_var, residual, out, False)
    if at < 0:
        x, at = _check_input(x, axis)
        for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
            if vector is None:
                raise TypeError(f"{name}: expected a numpy.ndarray, got NoneType")
        _check_parameters(x, at, gamma, beta, running_mean, running_var, residual)
        _check_out(out, x, (("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta),
                            ("running_mean", running_mean), ("running_var", running_var)), may_equal=("x", "residual"))
    return at, number, _slope_of(number, slope, x)


def _check_backward(dy: Any, cache: Any, cache_type: type, out: Any) -> None:
    """Check every argument of `batch_norm_backward`; the caches of kernels and twin differ in type alone."""
    if not isinstance(cache, cache_type):
        raise TypeError("cache: expected what batch_norm_forward of the same module returned, "
                        f"got {type(cache).__name__}")
    x, residual = cache.x, cache.residual  # type: ignore[attr-defined]  # both cache types have them
    if checks.batch_norm_gradients(dy, x, residual, out):
        return
    check_like("dy", dy, x.shape, x.dtype)
    _check_out(out, x, (("dy", dy), ("x", x), ("residual", residual)), may_equal=("dy",) if residual is None else ())


def _normalize(x: Array, gamma: Array | None, beta: Array | None, running_mean: Array | None,
               running_var: Array | None, axis: int, training: bool, momentum: float, eps: float, unbiased: bool,
               activation: int, slope: float, residual: Array | None,
               out: Array | None) -> tuple[Array, BatchNormCache]:
    """Allocate and call the forward kernel on checked arguments."""
    x, view = block(x, axis)
    residual = None if residual is None else matching(residual, x)
    y = destination(out, x)
    channels = view[1]
    table = np.empty((TABLE_ROWS, channels), x.dtype)
    wide_table = np.empty((WIDE_ROWS, channels), np.float64)
    gamma_ = None if gamma is None else dense_vector(gamma)
    beta_ = None if beta is None else dense_vector(beta)
    mean_ = None if running_mean is None else dense_vector(running_mean)
    var_ = None if running_var is None else dense_vector(running_var)
    kernels.batchnorm.forward(x, residual, y, gamma_, beta_, mean_, var_, table, wide_table, *view, training, momentum,
                              eps, unbiased, activation, slope, _runtime.threads_for_call())
    if training and running_mean is not None and running_var is not None:
        write_back(running_mean, mean_)  # type: ignore[arg-type]  # an array like running_mean
        write_back(running_var, var_)  # type: ignore[arg-type]
    cache = BatchNormCache(x, residual, view, table, wide_table, training, activation, slope, gamma is not None,
                           beta is not None)
    return write_back(out, y), cache


def batch_norm_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased_running_var: bool = True,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, BatchNormCache]:
    """Normalize each channel of a batch; return the result and what the backward call needs.

    ``y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual)``, with mean and biased variance of the
    batch over every axis but ``axis`` (Ioffe & Szegedy 2015, Algorithm 1). With ``training=False`` the running
    statistics take their place, and backward treats them as constants.

    Parameters
    ----------
    x : ndarray
        The batch, float32 or float64, of any rank and memory layout, with C channels along ``axis``.
    gamma, beta : ndarray, optional
        Scale and shift, shape (C,), x's dtype. Either may be absent: 1 and 0.
    running_mean, running_var : ndarray, optional
        Running statistics, shape (C,), x's dtype; both or neither. In training they are updated in place:
        ``running = (1 - momentum) * running + momentum * batch``. With ``training=False`` they are required.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    training : bool
        Whether to use (and record) the statistics of this batch.
    momentum : float
        Weight of this batch in the running statistics, in [0, 1].
    eps : float
        Added to the variance, at least 0.
    unbiased_running_var : bool
        Whether the running variance takes ``var * n / (n - 1)``, n values a channel (as PyTorch does).
    activation : {None, "relu", "leaky_relu"}
        Applied to the result. The gradient at exactly 0 is the slope of the negative side.
    negative_slope : float
        Slope of "leaky_relu" below 0.
    residual : ndarray, optional
        Added before the activation; shape and dtype of x.
    out : ndarray, optional
        Where to write y: shape and dtype of x, overlapping no other argument.

    Returns
    -------
    y : ndarray
        Shape, dtype and memory order of x; ``out`` if given.
    cache : BatchNormCache
        For `batch_norm_backward`. It refers to x and residual: do not modify them before that call.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape or range is wrong, if an array to be written is read-only or overlaps another, if only one of the
        running statistics is given, or if training has fewer than two values per channel. Nothing was written.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, cache = fn.batch_norm_forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    axis, number, slope = _check_forward(x, gamma, beta, running_mean, running_var, axis, training, momentum, eps,
                                         unbiased_running_var, activation, negative_slope, residual, out)
    return _normalize(x, gamma, beta, running_mean, running_var, axis, bool(training), momentum, eps,
                      bool(unbiased_running_var), number, slope, residual, out)


def batch_norm_inference(
    x: Array,
    running_mean: Array,
    running_var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics, as at test time.

    ``y = activation((x - running_mean) / sqrt(running_var + eps) * gamma + beta + residual)``
    (Ioffe & Szegedy 2015, Algorithm 2).

    Parameters
    ----------
    x : ndarray
        Float32 or float64, of any rank, size and memory layout, with C channels along ``axis``.
    running_mean, running_var : ndarray
        Mean and variance of each channel, shape (C,), x's dtype. They are not changed.
    gamma, beta, axis, eps, activation, negative_slope, residual
        As in `batch_norm_forward`.
    out : ndarray, optional
        Where to write y: shape and dtype of x; may be x or residual itself.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of x; ``out`` if given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape or range is wrong, or if ``out`` is read-only or overlaps another argument. Nothing was written.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> fn.batch_norm_inference(np.array([[5.0], [9.0]]), np.array([5.0]), np.array([4.0]), eps=0.0)
    array([[0.],
           [2.]])
    """
    axis, number, slope = _check_inference(x, running_mean, running_var, gamma, beta, axis, eps, activation,
                                           negative_slope, residual, out)
    return _normalize(x, gamma, beta, running_mean, running_var, axis, False, 0.0, eps, True, number, slope, residual,
                      out)[0]


def batch_norm_backward(dy: Array, cache: BatchNormCache, *, out: Array | None = None) -> Backward:
    """Gradients of `batch_norm_forward` with respect to x, gamma, beta, and residual.

    With ``dz = activation'(z) * dy`` and ``xhat`` the normalized x: ``dbeta = sum(dz)``, ``dgamma = sum(dz * xhat)``,
    ``dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))``, ``dresidual = dz``; for a frozen
    forward (``training=False``) ``dx = gamma / sqrt(var + eps) * dz`` (Ioffe & Szegedy 2015, section 3).

    Parameters
    ----------
    dy : ndarray
        Gradient of the loss with respect to y: shape and dtype of x, any memory layout.
    cache : BatchNormCache
        What the forward call returned.
    out : ndarray, optional
        Where to write dx: shape and dtype of x; may be dy itself if the forward took no residual.

    Returns
    -------
    dx : ndarray
        Shape, dtype and memory order of x; ``out`` if given.
    dgamma, dbeta : ndarray or None
        Shape (C,), x's dtype; None for a parameter that the forward was not given.
    dresidual : ndarray
        Only if the forward took a residual: shape, dtype and memory order of x.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape is wrong, or if ``out`` is read-only or overlaps another argument. Nothing was written.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> y, cache = fn.batch_norm_forward(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1))
    >>> dx, dgamma, dbeta = fn.batch_norm_backward(np.array([[2.0], [4.0]]), cache)
    >>> dbeta
    array([6.])
    """
    _check_backward(dy, cache, BatchNormCache, out)
    x, residual, view, table, wide_table, training, activation, slope, has_gamma, has_beta = cache
    dx = destination(out, x)
    dresidual = None if residual is None else empty_like(x)
    dgamma, dbeta = np.empty(view[1], x.dtype), np.empty(view[1], x.dtype)
    kernels.batchnorm.backward(matching(dy, x), x, residual, dx, dresidual, table.copy(), wide_table, dgamma, dbeta,
                               *view, training, activation, slope, _runtime.threads_for_call())
    gradients = (write_back(out, dx), dgamma if has_gamma else None, dbeta if has_beta else None)
    return gradients if dresidual is None else (*gradients, dresidual)
