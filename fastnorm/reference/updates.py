"""Twins of the optimizer updates: each formula in float64, then rounded to the arrays' dtype.

State is rounded before it is used, as the kernels' is, and so is what comes under the root of centered RMSProp.
Moving averages are ``decay * a + (1 - decay) * x`` here and ``a + ((1 - decay) * x - (1 - decay) * a)`` in the kernels,
which rounds less in float32; in float64 the two differ by a rounding or two of the larger term.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .._arrays import Array
from ..updates import (
    Arrays,
    Lists,
    _check_adagrad,
    _check_adam,
    _check_all_finite,
    _check_clip,
    _check_momentum,
    _check_rmsprop,
)

__all__ = ["adagrad_step", "adam_step", "all_finite", "clip_grad_norm", "momentum_step", "rmsprop_step"]

# NaN and infinity pass without a warning, as in the kernels.
_quiet = np.errstate(all="ignore")


def _positions(lists: Lists, present: tuple[int | None, ...]) -> Iterator[list[tuple[Array, Array]]]:
    """For each parameter, its arrays and their float64 values; absent ones are empty."""
    for position in zip(*lists.arrays, strict=True):
        arrays = [np.empty(0) if at is None else position[at] for at in present]
        yield [(a, a.astype(np.float64, subok=False)) for a in arrays]  # the * of np.matrix is another


def _direction(grad: Array, p: Array, weight_decay: float, maximize: bool) -> Array:
    g = -grad if maximize else grad
    return g + weight_decay * p if weight_decay else g


def _store(array: Array, value: Array) -> Array:
    """Write new state; return it as stored, in float64."""
    array[...] = value
    return array.astype(np.float64, subok=False)


@_quiet
def momentum_step(params: Arrays, grads: Arrays, velocities: Arrays | None, *, lr: float, momentum: float = 0.9,
                  dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
                  maximize: bool = False) -> None:
    """Twin of `fastnorm.momentum_step`."""
    lists, (lr, momentum, dampening, nesterov, weight_decay, maximize) = _check_momentum(
        params, grads, velocities, lr, momentum, dampening, nesterov, weight_decay, maximize)
    at_velocity = None if velocities is None else 2
    for (param, p), (_, grad), (velocity, v) in _positions(lists, (0, 1, at_velocity)):
        g = _direction(grad, p, weight_decay, maximize)
        v = (1 - dampening) * g if at_velocity is None else _store(velocity, momentum * v + (1 - dampening) * g)
        param[...] = p - lr * (g + momentum * v if nesterov else v)


@_quiet
def rmsprop_step(params: Arrays, grads: Arrays, square_avgs: Arrays, *, lr: float = 1e-2, alpha: float = 0.99,
                 eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
                 momentum_buffers: Arrays | None = None, centered: bool = False, grad_avgs: Arrays | None = None,
                 eps_inside_sqrt: bool = False, maximize: bool = False) -> None:
    """Twin of `fastnorm.rmsprop_step`."""
    lists, (at_m, at_b), (lr, alpha, eps, weight_decay, momentum, eps_inside_sqrt, maximize) = _check_rmsprop(
        params, grads, square_avgs, lr, alpha, eps, weight_decay, momentum, momentum_buffers, centered, grad_avgs,
        eps_inside_sqrt, maximize)
    for (param, p), (_, grad), (square_avg, s), (grad_avg, m), (buffer, b) in _positions(lists, (0, 1, 2, at_m, at_b)):
        g = _direction(grad, p, weight_decay, maximize)
        wide_s = alpha * s + (1 - alpha) * g * g
        s = _store(square_avg, wide_s)
        if centered:
            m = alpha * m + (1 - alpha) * g
            grad_avg[...] = m
            s = np.maximum(wide_s - m**2, 0).astype(param.dtype).astype(np.float64)
        d = g / (np.sqrt(s + eps) if eps_inside_sqrt else np.sqrt(s) + eps)
        if momentum:
            d = _store(buffer, momentum * b + d)
        param[...] = p - lr * d


@_quiet
def adam_step(params: Arrays, grads: Arrays, exp_avgs: Arrays, exp_avg_sqs: Arrays, *, step: int, lr: float = 1e-3,
              betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
              decoupled_weight_decay: bool = False, amsgrad: bool = False, max_exp_avg_sqs: Arrays | None = None,
              epsilon_hat: bool = False, maximize: bool = False) -> None:
    """Twin of `fastnorm.adam_step`."""
    lists, at_max, constants = _check_adam(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay,
                                           decoupled_weight_decay, amsgrad, max_exp_avg_sqs, epsilon_hat, maximize)
    t, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, epsilon_hat, maximize = constants
    # 1 - beta**t, without cancellation
    correction1, correction2 = (-np.expm1(t * np.log(beta)) for beta in (beta1, beta2))
    for (param, p), (_, grad), (exp_avg, m), (exp_avg_sq, v), (largest, v_max) in _positions(
            lists, (0, 1, 2, 3, at_max)):
        if decoupled_weight_decay:
            g = _direction(grad, p, 0.0, maximize)
            p = (1 - lr * weight_decay) * p
        else:
            g = _direction(grad, p, weight_decay, maximize)
        m = _store(exp_avg, beta1 * m + (1 - beta1) * g)
        v = _store(exp_avg_sq, beta2 * v + (1 - beta2) * g * g)
        if amsgrad:
            v = _store(largest, np.maximum(v_max, v))
        if epsilon_hat:
            param[...] = p - lr * np.sqrt(correction2) / correction1 * (m / (np.sqrt(v) + eps))
        else:
            param[...] = p - lr * (m / correction1 / (np.sqrt(v / correction2) + eps))


@_quiet
def adagrad_step(params: Arrays, grads: Arrays, state_sums: Arrays, *, step: int, lr: float = 1e-2,
                 lr_decay: float = 0.0, eps: float = 1e-10, weight_decay: float = 0.0, maximize: bool = False) -> None:
    """Twin of `fastnorm.adagrad_step`."""
    lists, (t, lr, lr_decay, eps, weight_decay, maximize) = _check_adagrad(
        params, grads, state_sums, step, lr, lr_decay, eps, weight_decay, maximize)
    for (param, p), (_, grad), (state_sum, s) in _positions(lists, (0, 1, 2)):
        g = _direction(grad, p, weight_decay, maximize)
        s = _store(state_sum, s + g**2)
        param[...] = p - lr / (1 + (t - 1) * lr_decay) * (g / (np.sqrt(s) + eps))


@_quiet
def clip_grad_norm(grads: Arrays, max_norm: float) -> float:
    """Twin of `fastnorm.clip_grad_norm`."""
    lists, (max_norm, measure_only) = _check_clip(grads, max_norm)
    norm = float(np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in lists.arrays[0])))
    factor = 1.0 if measure_only else float(np.minimum(1.0, max_norm / (norm + 1e-6)))  # np.minimum: NaN stays NaN
    if factor != 1.0:
        for g in lists.arrays[0]:
            g[...] = np.asarray(g, np.float64) * factor
    return norm


def all_finite(arrays: Arrays) -> bool:
    """Twin of `fastnorm.all_finite`."""
    return all(bool(np.isfinite(a).all()) for a in _check_all_finite(arrays).arrays[0])
