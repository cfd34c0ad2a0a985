"""The twin of `fastnorm.loss`: softmax, log-softmax, and cross-entropy with its gradient, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import Array
from ..loss import _check_cross_entropy, _check_softmax, _raise_for_labels

__all__ = ["log_softmax", "softmax", "softmax_cross_entropy"]


def _log_softmax(x: Array, axis: int) -> Array:
    x = x.astype(np.float64)
    centered = x - x.max(axis=axis, keepdims=True)
    return centered - np.log(np.exp(centered).sum(axis=axis, keepdims=True))


def _give(result: Array, dtype: np.dtype[Any], out: Array | None) -> Array:
    result = result.astype(dtype)
    if out is None:
        return result
    out[...] = result
    return out


def softmax(x: Array, *, axis: int = -1, out: Array | None = None) -> Array:
    """Return exp(x) scaled to sum to 1 along an axis; see `fastnorm.softmax`."""
    x, axis, out = _check_softmax(x, axis, out)
    with np.errstate(all="ignore"):
        x64 = x.astype(np.float64)
        e = np.exp(x64 - x64.max(axis=axis, keepdims=True))
        return _give(e / e.sum(axis=axis, keepdims=True), x.dtype, out)


def log_softmax(x: Array, *, axis: int = -1, out: Array | None = None) -> Array:
    """Return the logarithm of the softmax along an axis; see `fastnorm.log_softmax`."""
    x, axis, out = _check_softmax(x, axis, out)
    with np.errstate(all="ignore"):
        return _give(_log_softmax(x, axis), x.dtype, out)


def softmax_cross_entropy(logits: Array, targets: Array | int | np.integer[Any], *, axis: int = -1,
                          weight: Array | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                          reduction: str = "mean", out: Array | None = None) -> tuple[Any, Array]:
    """Return the cross-entropy and its gradient by the logits; see `fastnorm.softmax_cross_entropy`."""
    given = _check_cross_entropy(logits, targets, axis, weight, ignore_index, label_smoothing, reduction, out)
    logits, axis = given.logits, given.axis
    classes = logits.shape[axis]
    shape = tuple(classes if i == axis else 1 for i in range(logits.ndim))  # of a vector over the classes
    w = np.ones(classes) if given.weight is None else given.weight.astype(np.float64)
    s = given.label_smoothing

    with np.errstate(all="ignore"):
        if given.labels is not None:
            _raise_for_labels(given.labels, classes, given.ignore_index)
            kept = given.labels != given.ignore_index
            y = np.where(kept, given.labels, 0).astype(np.int64)
            is_label = np.expand_dims(y, axis) == np.arange(classes).reshape(shape)
            q = s / classes * w.reshape(shape) + np.where(is_label, (1 - s) * np.expand_dims(w[y], axis), 0)
            divisor = np.sum(w[y], where=kept)
        else:
            assert given.probabilities is not None
            kept = np.ones(logits.shape[:axis] + logits.shape[axis + 1:], bool)
            q = ((1 - s) * given.probabilities.astype(np.float64) + s / classes) * w.reshape(shape)
            divisor = float(kept.size)
        if reduction != "mean":
            divisor = 1.0

        log_p = _log_softmax(logits, axis)
        terms = np.where((q == 0) & (log_p == -np.inf), 0, q * -log_p)
        losses = np.where(kept, terms.sum(axis=axis), 0)
        gradient = np.where(np.expand_dims(kept, axis), np.exp(log_p) * q.sum(axis=axis, keepdims=True) - q, 0)
        if divisor == 0:
            losses, gradient = np.zeros_like(losses), np.zeros_like(gradient)
        else:
            gradient /= divisor
        if reduction == "none":
            loss: Any = losses.astype(logits.dtype)
        else:
            loss = (losses.sum() / (divisor or 1.0)).astype(logits.dtype)[()]
        return loss, _give(gradient, logits.dtype, given.out)
