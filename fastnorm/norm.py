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
    AnyArray,
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
    check_out,
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

# x, gamma, beta, running_mean, running_var, residual, out
ForwardArrays = tuple[Array, Array | None, Array | None, Array | None, Array | None, Array | None, Array | None]
InferenceArrays = tuple[Array, Array | None, Array | None, Array, Array, Array | None, Array | None]
Layout = tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]]  # dtype, shape, strides
Backward = tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, Array]


class BatchNormCache(NamedTuple):
    """What `batch_norm_backward` needs of its forward call; opaque.

    It copies the vectors of per-channel numbers and refers to ``x`` and ``residual``: do not modify these two
    before the backward call. It can be used more than once, copied and pickled.
    """

    x: Array
    residual: Array | None
    axis: int
    view: View
    layout: Layout  # of x, when the view was taken
    table: Array
    wide_table: Array
    training: bool
    activation: int
    negative_slope: float
    has_gamma: bool
    has_beta: bool

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it; arrays come back in C order, whatever theirs was."""
        return _restored, tuple(self)


def _restored(x: Array, residual: Array | None, axis: int, view: View, layout: Layout, *rest: Any) -> BatchNormCache:
    """A cache from its pickled fields."""
    x, view = block(x, axis)
    dtype, shape, _ = layout
    return BatchNormCache(x, None if residual is None else matching(residual, x), axis, view, (dtype, shape, x.strides),
                          *rest)


def layout_of(a: Array) -> Layout:
    """What of an array must stay as it is while a kernel's view of it is kept."""
    return a.dtype, a.shape, a.strides


def _check_input(x: object, axis: object) -> tuple[Array, int]:
    """Check x and the axis; return both, the axis counted from the front."""
    x = check_array("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected at least 1 dimension, got 0")
    return x, check_axis(axis, x.ndim)


def _check_parameters(x: Array, axis: int, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any,
                      training: bool) -> tuple[Array | None, ...]:
    """Check the per-channel vectors and the residual against x; return them."""
    channels = (x.shape[axis],)
    arguments = (("gamma", gamma, channels, False), ("beta", beta, channels, False),
                 ("running_mean", running_mean, channels, training), ("running_var", running_var, channels, training),
                 ("residual", residual, x.shape, False))
    return tuple([None if a is None else check_like(name, a, shape, x.dtype, written)
                  for name, a, shape, written in arguments])


def _check_activation(activation: object, negative_slope: object) -> tuple[int, float]:
    """Check the fused activation; return the kernels' number for it and the slope."""
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    slope = check_number("negative_slope", negative_slope, low=-math.inf)
    return ACTIVATIONS[activation], slope  # type: ignore[index]  # just checked


def _slope_of(number: int, slope: float, x: Any) -> float:
    """Check that x's dtype can hold the slope; return the one that the kernels use: 0 for ReLU, which they rely on."""
    if abs(slope) > FLOAT32_MAX and x.dtype == FLOAT32:
        raise ValueError(f"negative_slope: expected a number that float32 can hold, got {slope:g}")
    return slope if number == ACTIVATIONS["leaky_relu"] else 0.0


def _check_forward_options(training: object, momentum: object, eps: object, unbiased_running_var: object,
                           activation: object, negative_slope: object) -> tuple[int, float]:
    """Check the options of `batch_norm_forward`; return activation number and slope."""
    check_flag("training", training)
    check_flag("unbiased_running_var", unbiased_running_var)
    check_number("momentum", momentum, high=1.0)
    return _check_inference_options(eps, activation, negative_slope)


def _check_inference_options(eps: object, activation: object, negative_slope: object) -> tuple[int, float]:
    """Check the options of `batch_norm_inference`; return activation number and slope."""
    check_number("eps", eps)
    return _check_activation(activation, negative_slope)


def _check_forward_arrays(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any, out: Any,
                          axis: Any, training: bool) -> tuple[ForwardArrays, int]:
    """Check the arrays of `batch_norm_forward` one by one; return them, and the axis counted from the front."""
    x, at = _check_input(x, axis)
    gamma, beta, running_mean, running_var, residual = _check_parameters(x, at, gamma, beta, running_mean, running_var,
                                                                         residual, training)
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
    if out is not None:
        out = check_out(out, x, ("x", x), ("gamma", gamma), ("beta", beta), ("running_mean", running_mean),
                        ("running_var", running_var), ("residual", residual))
    return (x, gamma, beta, running_mean, running_var, residual, out), at


def _check_inference_arrays(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any, out: Any,
                            axis: Any) -> tuple[InferenceArrays, int]:
    """Check the arrays of `batch_norm_inference` one by one; return them, and the axis counted from the front."""
    x, at = _check_input(x, axis)
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        if vector is None:
            raise TypeError(f"{name}: expected a numpy.ndarray, got NoneType")
    gamma, beta, running_mean, running_var, residual = _check_parameters(x, at, gamma, beta, running_mean, running_var,
                                                                         residual, False)
    if out is not None:
        out = check_out(out, x, ("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta),
                        ("running_mean", running_mean), ("running_var", running_var), may_equal=("x", "residual"))
    return (x, gamma, beta, running_mean, running_var, residual, out), at


def _check_backward(dy: Any, cache: Any, cache_type: type, out: Any) -> tuple[Array, Array | None]:
    """Check every argument of `batch_norm_backward`, return ``dy`` and ``out``.

    The caches of kernels and twin differ in type alone.
    """
    if not isinstance(cache, cache_type):
        raise TypeError("cache: expected what batch_norm_forward of the same module returned, "
                        f"got {type(cache).__name__}")
    x, residual = cache.x, cache.residual  # type: ignore[attr-defined]  # both cache types have them
    if not checks.batch_norm_gradients(dy, x, residual, out):
        dy = check_like("dy", dy, x.shape, x.dtype)
        if out is not None:
            out = check_out(out, x, ("dy", dy), ("x", x), ("residual", residual),
                            may_equal=("dy",) if residual is None else ())
    return dy, out


def _normalize(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, axis: int, training: bool,
               momentum: float, eps: float, unbiased: bool, activation: int, slope: float, residual: Any,
               out: Any) -> tuple[Array, BatchNormCache]:
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
    cache = BatchNormCache(x, residual, axis, view, layout_of(x), table, wide_table, training, activation, slope,
                           gamma is not None, beta is not None)
    return write_back(out, y), cache


def batch_norm_forward(
    x: AnyArray,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    running_mean: AnyArray | None = None,
    running_var: AnyArray | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased_running_var: bool = True,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: AnyArray | None = None,
    out: AnyArray | None = None,
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
    number, slope = _check_forward_options(training, momentum, eps, unbiased_running_var, activation, negative_slope)
    at = checks.batch_norm_arrays(x, axis, gamma, beta, running_mean, running_var, residual, out, training)
    if at < 0:
        (x, gamma, beta, running_mean, running_var, residual, out), at = _check_forward_arrays(
            x, gamma, beta, running_mean, running_var, residual, out, axis, training)
    return _normalize(x, gamma, beta, running_mean, running_var, at, bool(training), momentum, eps,
                      bool(unbiased_running_var), number, _slope_of(number, slope, x), residual, out)


def batch_norm_inference(
    x: AnyArray,
    running_mean: AnyArray,
    running_var: AnyArray,
    gamma: AnyArray | None = None,
    beta: AnyArray | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: AnyArray | None = None,
    out: AnyArray | None = None,
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
    number, slope = _check_inference_options(eps, activation, negative_slope)
    at = checks.batch_norm_arrays(x, axis, gamma, beta, running_mean, running_var, residual, out, False)
    if at < 0:
        (x, gamma, beta, running_mean, running_var, residual, out), at = _check_inference_arrays(
            x, gamma, beta, running_mean, running_var, residual, out, axis)
    return _normalize(x, gamma, beta, running_mean, running_var, at, False, 0.0, eps, True, number,
                      _slope_of(number, slope, x), residual, out)[0]


def batch_norm_backward(dy: AnyArray, cache: BatchNormCache, *, out: AnyArray | None = None) -> Backward:
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
        If a shape is wrong, if ``x`` or the residual has no longer the form that it had in forward, or if ``out`` is
        read-only or overlaps another argument. Nothing was written.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> y, cache = fn.batch_norm_forward(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1))
    >>> dx, dgamma, dbeta = fn.batch_norm_backward(np.array([[2.0], [4.0]]), cache)
    >>> dbeta
    array([6.])
    """
    dy, out = _check_backward(dy, cache, BatchNormCache, out)
    x, residual, _, view, layout, table, wide_table, training, activation, slope, has_gamma, has_beta = cache
    if layout_of(x) != layout or (residual is not None and layout_of(residual)[:2] != layout[:2]):
        raise ValueError(f"cache: expected x and residual as they were in forward, got another dtype, shape or strides "
                         f"than {layout[0]}, {layout[1]} and {layout[2]}")
    dx = destination(out, x)
    dresidual = None if residual is None else empty_like(x)
    dgamma, dbeta = np.empty(view[1], x.dtype), np.empty(view[1], x.dtype)
    kernels.batchnorm.backward(matching(dy, x), x, residual, dx, dresidual, table.copy(), wide_table, dgamma, dbeta,
                               *view, training, activation, slope, _runtime.threads_for_call())
    gradients = (write_back(out, dx), dgamma if has_gamma else None, dbeta if has_beta else None)
    return gradients if dresidual is None else (*gradients, dresidual)
