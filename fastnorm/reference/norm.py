"""Batch normalization in plain NumPy: the twin of ``fastnorm/norm.py``, computed in float64 and rounded once.

The pre-activation that decides the mask of a fused activation is rounded to x's dtype first, as the kernels' is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .._arrays import AnyArray, Array, block, matching
from ..norm import (
    ACTIVATIONS,
    Backward,
    _check_backward,
    _check_forward_arrays,
    _check_forward_options,
    _check_inference_arrays,
    _check_inference_options,
    _slope_of,
)

__all__ = ["batch_norm_backward", "batch_norm_forward", "batch_norm_inference"]

RELU, LEAKY_RELU = ACTIVATIONS["relu"], ACTIVATIONS["leaky_relu"]


class BatchNormCache(NamedTuple):
    """What the backward needs: x, x - mean, the mask's source z, and float64 statistics shaped to broadcast."""

    x: Array
    residual: Array | None
    z: Array
    centered: Array
    inv_std: Array
    gamma: Array | None
    has_beta: bool
    axis: int
    training: bool
    activation: int
    negative_slope: float


def _store(result: Array, like: Array, out: Array | None) -> Array:
    """Round to like's dtype, in like's memory order, into ``out`` where there is one."""
    target = np.empty_like(like, subok=False) if out is None else out
    target[...] = result
    return target


def by_channel(a: Array, axis: int) -> Array:
    """All values of each channel in a row of its own, in float64: NumPy adds pairwise along contiguous rows only."""
    others = math.prod(a.shape[:axis] + a.shape[axis + 1:])
    return np.ascontiguousarray(np.moveaxis(a, axis, 0), np.float64).reshape(a.shape[axis], others)


def _statistics(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """First value of each channel, the mean less it, and the biased variance: exact for constant data."""
    rows = by_channel(x, axis)
    with np.errstate(all="ignore"):
        first = np.where(np.abs(rows[:, :1]) < 1e300, rows[:, :1], 0)  # x - first must not overflow
        deviation = rows - first
        return first[:, 0], deviation.mean(1), deviation.var(1)


def mean_and_variance(x: Array, axis: int) -> tuple[Array, Array]:
    """Mean and biased variance of each channel."""
    first, offset, var = _statistics(x, axis)
    return first + offset, var


def _normalize(x: Array, mean: Array, low: Array, var: Array, gamma: Array | None, beta: Array | None, axis: int,
               eps: float, activation: int, slope: float, residual: Array | None, out: Array | None,
               training: bool) -> tuple[Array, BatchNormCache]:
    """The formula, for statistics of either origin, each of shape (C,); the mean is mean + low, low what it was rounded
    by.
    """
    # The cache refers to the same memory as the kernels', so that both refuse the same outputs in backward.
    x = np.asarray(block(x, axis)[0])
    residual = None if residual is None else np.asarray(matching(residual, x))
    shape = [1] * x.ndim
    shape[axis] = -1
    centered = (x - mean.reshape(shape)) - np.where(np.isfinite(low), low, 0).reshape(shape)
    inv_std = 1 / np.sqrt(var.reshape(shape) + eps)
    scale = None if gamma is None else gamma.astype(np.float64).reshape(shape)
    z = centered * (inv_std if scale is None else inv_std * scale)
    if beta is not None:
        z += beta.astype(np.float64).reshape(shape)
    if residual is not None:
        z += residual
    z = z.astype(x.dtype)
    y = z
    if activation == RELU:
        y = np.where(z <= 0, 0, z)
    elif activation == LEAKY_RELU:
        y = np.where(z <= 0, z * slope, z)
    cache = BatchNormCache(x, residual, z, centered, inv_std, scale, beta is not None, axis, training, activation,
                           slope)
    return _store(y, x, out), cache


def batch_norm_forward(x: AnyArray, gamma: AnyArray | None = None, beta: AnyArray | None = None,
                       running_mean: AnyArray | None = None, running_var: AnyArray | None = None, *, axis: int = 1,
                       training: bool = True, momentum: float = 0.1, eps: float = 1e-5,
                       unbiased_running_var: bool = True, activation: str | None = None, negative_slope: float = 0.01,
                       residual: AnyArray | None = None, out: AnyArray | None = None) -> tuple[Array, BatchNormCache]:
    """Twin of `fastnorm.batch_norm_forward`."""
    number, slope = _check_forward_options(training, momentum, eps, unbiased_running_var, activation, negative_slope)
    (x, gamma, beta, running_mean, running_var, residual, out), axis = _check_forward_arrays(
        x, gamma, beta, running_mean, running_var, residual, out, axis, training)
    slope = _slope_of(number, slope, x)
    with np.errstate(all="ignore"):
        if training:
            first, offset, var = _statistics(x, axis)
            mean = first + offset
            low = (first - mean) + offset
            if running_mean is not None and running_var is not None:
                n = x.size // x.shape[axis] if x.size else 2  # no channels: nothing to divide
                running_mean[...] = (1 - momentum) * running_mean.astype(np.float64) + momentum * mean
                running_var[...] = ((1 - momentum) * running_var.astype(np.float64)
                                    + momentum * var * (n / (n - 1) if unbiased_running_var else 1))
        else:
            mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)  # type: ignore[union-attr]
            low = np.zeros_like(mean)
        return _normalize(x, mean, low, var, gamma, beta, axis, eps, number, slope, residual, out, bool(training))


def batch_norm_inference(x: AnyArray, running_mean: AnyArray, running_var: AnyArray, gamma: AnyArray | None = None,
                         beta: AnyArray | None = None, *, axis: int = 1, eps: float = 1e-5,
                         activation: str | None = None, negative_slope: float = 0.01, residual: AnyArray | None = None,
                         out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.batch_norm_inference`."""
    number, slope = _check_inference_options(eps, activation, negative_slope)
    (x, gamma, beta, mean, var, residual, out), axis = _check_inference_arrays(
        x, gamma, beta, running_mean, running_var, residual, out, axis)
    slope = _slope_of(number, slope, x)
    with np.errstate(all="ignore"):
        mean, var = mean.astype(np.float64), var.astype(np.float64)
        return _normalize(x, mean, np.zeros_like(mean), var, gamma, beta, axis, eps, number, slope, residual, out,
                          False)[0]


def batch_norm_backward(dy: AnyArray, cache: Any, *, out: AnyArray | None = None) -> Backward:
    """Twin of `fastnorm.batch_norm_backward`."""
    dy, out = _check_backward(dy, cache, BatchNormCache, out)
    x, residual, z, centered, inv_std, gamma, has_beta, axis, training, activation, slope = cache
    with np.errstate(all="ignore"):
        dz = dy.astype(np.float64, subok=False)
        if activation == RELU:
            dz = np.where(z <= 0, 0, dz)
        elif activation == LEAKY_RELU:
            dz = np.where(z <= 0, dz * slope, dz)
        xhat = centered * inv_std
        sum_dz = by_channel(dz, axis).sum(1)
        # 1/std once, behind the sum: where it is infinite, a sum of infinities of both signs would be NaN.
        sum_product = by_channel(dz * centered, axis).sum(1) * inv_std.reshape(-1)
        scale = inv_std if gamma is None else inv_std * gamma
        if training and x.size:
            n = x.size // x.shape[axis]
            dx = scale * (dz - sum_dz.reshape(inv_std.shape) / n - xhat * (sum_product.reshape(inv_std.shape) / n))
        else:
            dx = scale * dz
        dgamma = None if gamma is None else sum_product.astype(x.dtype)
        dbeta = sum_dz.astype(x.dtype) if has_beta else None
        dresidual = None if residual is None else _store(dz, x, None)
        gradients = (_store(dx, x, out), dgamma, dbeta)
    return gradients if dresidual is None else (*gradients, dresidual)
