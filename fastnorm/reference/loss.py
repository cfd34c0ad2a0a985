"""The twin of `fastnorm.loss`: softmax, log-softmax, and cross-entropy with its gradient, in float64, classes last."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arrays import AnyArray, Array
from ..loss import _check_cross_entropy, _check_softmax, _raise_for_labels

__all__ = ["log_softmax", "softmax", "softmax_cross_entropy"]


def _classes_last(x: Array, axis: int) -> Array:
    """A float64 copy with contiguous rows, which NumPy adds pairwise."""
    return np.moveaxis(np.asarray(x), axis, -1).astype(np.float64, order="C")


def _give(result: Array, axis: int, like: Array, out: Array | None) -> Array:
    """The result with its class axis back in place, as an array like the logits."""
    if out is None:
        out = np.empty_like(like, subok=False)
    out[...] = np.moveaxis(result, -1, axis)
    return out


def _log_softmax(x: Array) -> Array:
    centered: Array = x - x.max(axis=-1, keepdims=True)
    log_sum: Array = np.log(np.exp(centered).sum(axis=-1, keepdims=True))
    return centered - log_sum


def softmax(x: AnyArray, *, axis: int = -1, out: AnyArray | None = None) -> Array:
    """Return exp(x) scaled to sum to 1 along an axis; see `fastnorm.softmax`."""
    x, axis, out = _check_softmax(x, axis, out)
    with np.errstate(all="ignore"):
        rows = _classes_last(x, axis)
        e = np.exp(rows - rows.max(axis=-1, keepdims=True))
        return _give(e / e.sum(axis=-1, keepdims=True), axis, x, out)


def log_softmax(x: AnyArray, *, axis: int = -1, out: AnyArray | None = None) -> Array:
    """Return the logarithm of the softmax along an axis; see `fastnorm.log_softmax`."""
    x, axis, out = _check_softmax(x, axis, out)
    with np.errstate(all="ignore"):
        return _give(_log_softmax(_classes_last(x, axis)), axis, x, out)


def softmax_cross_entropy(logits: AnyArray, targets: AnyArray | int | np.integer[Any], *, axis: int = -1,
                          weight: AnyArray | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                          reduction: str = "mean", out: AnyArray | None = None) -> tuple[Any, Array]:
    """Return the cross-entropy and its gradient by the logits; see `fastnorm.softmax_cross_entropy`."""
    given = _check_cross_entropy(logits, targets, axis, weight, ignore_index, label_smoothing, reduction, out)
    axis, s = given.axis, given.label_smoothing
    classes = given.logits.shape[axis]

    with np.errstate(all="ignore"):  # a signaling NaN warns even where it is only cast
        w = np.ones(classes) if given.weight is None else given.weight.astype(np.float64)
        log_p = _log_softmax(_classes_last(given.logits, axis))
        if given.labels is not None:
            _raise_for_labels(given.labels, classes, given.ignore_index)
            labels = np.asarray(given.labels)
            kept = labels != given.ignore_index
            y = np.where(kept, labels, 0).astype(np.int64)[..., None]
            q = (s / classes * w if s else 0) + np.where(np.arange(classes) == y, (1 - s) * w[y], 0)
            divisor = float(np.sum(w[y[..., 0]], where=kept))
        else:
            assert given.probabilities is not None
            kept = np.ones(log_p.shape[:-1], bool)
            q = ((1 - s) * _classes_last(given.probabilities, axis) + s / classes) * w
            divisor = float(kept.size)

        terms = np.where((q == 0) & (log_p == -np.inf), 0, q * -log_p)
        losses = np.where(kept, terms.sum(axis=-1), 0)
        gradient = np.where(kept[..., None], np.exp(log_p) * q.sum(axis=-1, keepdims=True) - q, 0)
        if given.reduction == "mean" and divisor == 0:
            losses, gradient = np.zeros_like(losses), np.zeros_like(gradient)
        elif given.reduction == "mean":
            losses, gradient = losses / divisor, gradient / divisor
        loss: Any = losses if given.reduction == "none" else losses.sum()
        return loss.astype(given.logits.dtype), _give(gradient, axis, given.logits, given.out)
