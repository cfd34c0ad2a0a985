"""Softmax, log-softmax, and softmax cross-entropy with its gradient."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import _runtime
from ._arrays import (
    AnyArray,
    Array,
    as_array,
    block,
    check_array,
    check_axis,
    check_choice,
    check_integer,
    check_like,
    check_number,
    check_out,
    check_shape,
    dense_vector,
    first_true,
    has_protocol,
    matching,
    write_back,
)
from ._outputs import destination
from ._runtime import kernels

__all__ = ["log_softmax", "softmax", "softmax_cross_entropy"]

_INT64 = np.dtype(np.int64)
_UINT64 = np.dtype(np.uint64)


# -- checks, shared with the twin --------------------------------------------------------------------------------------


def _check_logits(name: str, x: object, axis: object) -> tuple[Array, int]:
    """Logits and their class axis counted from the front."""
    x = check_array(name, x)
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least 1 dimension, got shape ()")
    axis = check_axis(axis, x.ndim)
    if x.shape[axis] == 0:
        raise ValueError(f"{name}: expected at least one class along axis {axis}, got shape {x.shape}")
    return x, axis


def _check_softmax(x: object, axis: object, out: object) -> tuple[Array, int, Array | None]:
    x, axis = _check_logits("x", x, axis)
    return x, axis, None if out is None else check_out(out, x, ("x", x), may_equal=("x",))


class _CrossEntropy(NamedTuple):
    """Checked arguments of `softmax_cross_entropy`; one of ``labels`` and ``probabilities`` is there."""

    logits: Array
    axis: int
    labels: Array | None
    probabilities: Array | None
    weight: Array | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    out: Array | None


def _check_label(targets: object, classes: int, ignore_index: int) -> tuple[Array, int]:
    """The label of 1-d logits, any int, as one of 64 bits, and an ``ignore_index`` that it equals if it did before."""
    number = check_integer("targets", targets)
    if -(2**63) <= number < 2**63:
        return np.array(number, _INT64), ignore_index
    if number != ignore_index:
        raise _wrong_label(classes, ignore_index, number)
    return np.array(-1, _INT64), -1


def _check_targets(targets: object, logits: Array, axis: int) -> Array:
    """Integer targets of logits' shape without the class axis, or probabilities of logits' shape and dtype."""
    if not isinstance(targets, np.ndarray):
        targets = as_array("targets", targets)
    if isinstance(targets, np.ma.MaskedArray):
        raise TypeError(f"targets: expected a plain numpy.ndarray, got {type(targets).__name__}, whose mask would be "
                        "ignored")
    found = targets.dtype
    if found.kind in "iu" and found.isnative:
        check_shape("targets", targets, logits.shape[:axis] + logits.shape[axis + 1:])
    elif found == logits.dtype:
        check_shape("targets", targets, logits.shape)
    else:
        swapped = "" if found.isnative else " in non-native byte order"
        raise TypeError(f"targets: expected an integer dtype or {logits.dtype.name}, got {found.name}{swapped}")
    return targets


def _check_cross_entropy(logits: object, targets: object, axis: object, weight: object, ignore_index: object,
                         label_smoothing: object, reduction: object, out: object) -> _CrossEntropy:
    """Every check but the range of the labels (`_raise_for_labels`)."""
    logits, axis = _check_logits("logits", logits, axis)
    ignore_index = check_integer("ignore_index", ignore_index)
    if logits.ndim == 1 and not (isinstance(targets, np.ndarray) or has_protocol(targets)):
        targets, ignore_index = _check_label(targets, logits.size, ignore_index)
    else:
        targets = _check_targets(targets, logits, axis)
    if weight is not None:
        weight = check_like("weight", weight, (logits.shape[axis],), logits.dtype)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    reduction = check_choice("reduction", reduction, ("mean", "sum", "none"))
    assert reduction is not None
    if out is not None:
        out = check_out(out, logits, ("logits", logits), ("targets", targets), ("weight", weight),
                        may_equal=("logits",))
    are_labels = targets.dtype.kind != "f"
    return _CrossEntropy(logits, axis, targets if are_labels else None, None if are_labels else targets, weight,
                         ignore_index, label_smoothing, reduction, out)


def _wrong_label(classes: int, ignore_index: int, label: object, where: str = "") -> ValueError:
    return ValueError(f"targets: expected classes in [0, {classes - 1}] or ignore_index {ignore_index}, "
                      f"got {label}{where}")


def _raise_for_labels(labels: Array, classes: int, ignore_index: int) -> None:
    """Raise for the first label, in C order, that is neither a class nor ``ignore_index``; return if there is none."""
    wrong = (labels < 0) | (labels >= classes)
    wrong &= labels != ignore_index
    if not wrong.any():
        return
    at, where = first_true(wrong)
    raise _wrong_label(classes, ignore_index, labels[at], where)


# -- positions: the elements of integer targets, in the order of the logits' memory ------------------------------------


@lru_cache(maxsize=4096)
def _position_order(strides: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The axes of integer targets, ordered as these dense logits' memory is."""
    order = sorted((i for i in range(len(strides)) if i != axis), key=lambda i: -strides[i])
    return tuple(i - (i > axis) for i in order)


def _labels_by_position(labels: Array, logits: Array, axis: int) -> Array:
    """Contiguous labels in the order of the logits' memory, uint64 seen as int64."""
    if labels.ndim > 1:
        labels = labels.transpose(_position_order(logits.strides, axis))
    if not (labels.flags.c_contiguous and labels.flags.aligned):
        labels = labels.copy(order="C")
    return labels.view(_INT64) if labels.dtype == _UINT64 else labels


def _new_losses(logits: Array, axis: int, reduction: str) -> tuple[Array, Array]:
    """Memory for the losses, and the same seen as what the user gets."""
    if reduction != "none":
        losses: Array = np.empty((), logits.dtype)
        return losses, losses
    shape = logits.shape[:axis] + logits.shape[axis + 1:]
    order = _position_order(logits.strides, axis)
    losses = np.empty(tuple(shape[i] for i in order), logits.dtype)
    return losses, losses.transpose(tuple(order.index(i) for i in range(len(order))))


def _comparable_ignore_index(ignore_index: int, dtype: np.dtype[Any]) -> tuple[bool, int]:
    """Whether labels of this dtype can equal ``ignore_index``, and the int64 that they then equal."""
    low, high = (0, 2**64) if dtype == _UINT64 else (-(2**63), 2**63)
    if not low <= ignore_index < high:
        return False, 0
    return True, ignore_index - 2**64 if ignore_index >= 2**63 else ignore_index


# -- public ------------------------------------------------------------------------------------------------------------


def _softmax(x: object, axis: object, out: object, log: bool) -> Array:
    x, axis, out_array = _check_softmax(x, axis, out)
    dense, view = block(x, axis)
    result = destination(out_array, dense)
    kernels.softmax.softmax(dense, result, *view, log, _runtime.threads_for_call())
    return write_back(out_array, result)


def softmax(x: AnyArray, *, axis: int = -1, out: AnyArray | None = None) -> Array:
    """Return exp(x) scaled to sum to 1 along an axis.

    ``p = exp(x - max(x)) / sum(exp(x - max(x)))``, maximum and sum taken along ``axis``.

    Parameters
    ----------
    x : ndarray of float32 or float64, at least 1-d
        Logits, in any memory layout.
    axis : int
        The axis of the classes.
    out : ndarray like x, optional
        Where to write the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Probabilities of x's shape, dtype and memory order; ``out`` if given. A logit of -inf has probability 0. A row
        that holds NaN or +inf, or nothing but -inf, is NaN.

    Raises
    ------
    TypeError
        If ``x`` or ``out`` is no ndarray of float32 or float64, or their dtypes differ.
    ValueError
        If ``x`` is 0-d or has no classes, ``axis`` is out of range, or ``out`` has another shape, is read-only or
        overlaps ``x`` without being it.

    References
    ----------
    Goodfellow, Bengio, Courville: *Deep Learning* (2016), equation 6.29.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.softmax(np.array([[0.0, 0.0], [0.0, -np.inf]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    return _softmax(x, axis, out, False)


def log_softmax(x: AnyArray, *, axis: int = -1, out: AnyArray | None = None) -> Array:
    """Return the logarithm of the softmax along an axis, right where the softmax itself is too small for its dtype.

    ``log p = (x - max(x)) - log(sum(exp(x - max(x))))``, maximum and sum taken along ``axis``.

    Parameters
    ----------
    x : ndarray of float32 or float64, at least 1-d
        Logits, in any memory layout.
    axis : int
        The axis of the classes.
    out : ndarray like x, optional
        Where to write the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Logarithms of x's shape, dtype and memory order; ``out`` if given. A logit of -inf gives -inf. A row that holds
        NaN or +inf, or nothing but -inf, is NaN.

    Raises
    ------
    TypeError, ValueError
        As `softmax` does.

    References
    ----------
    Goodfellow, Bengio, Courville: *Deep Learning* (2016), equation 6.30.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.log_softmax(np.array([1000.0, 0.0]))
    array([    0., -1000.])
    """
    return _softmax(x, axis, out, True)


def softmax_cross_entropy(logits: AnyArray, targets: AnyArray | int | np.integer[Any], *, axis: int = -1,
                          weight: AnyArray | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                          reduction: str = "mean", out: AnyArray | None = None) -> tuple[Any, Array]:
    r"""Return the cross-entropy between targets and the softmax of logits, and its gradient by the logits.

    With the softmax p of a row of C logits, class weights w (1 by default), smoothing s and a row's target masses q::

        labels y:         q_c = s/C w_c + (1 - s) w_y [c = y]     (0 in a row that is ignored)
        probabilities t:  q_c = ((1 - s) t_c + s/C) w_c
        loss = -sum_c q_c log p_c        gradient = p sum(q) - q

    ``reduction="sum"`` adds the losses of all rows; ``"mean"`` also divides loss and gradient by the sum of the weights
    w_y of the rows not ignored (labels) or by the number of rows (probabilities); ``"none"`` returns each row's loss
    and each row's own gradient.

    Parameters
    ----------
    logits : ndarray of float32 or float64, at least 1-d
        Unnormalized log-probabilities, in any memory layout.
    targets : ndarray of integers, or of logits' dtype
        Classes: native integers of any width, logits' shape without ``axis`` (for 1-d logits a 0-d array, a NumPy
        integer or an int). Or probabilities: logits' shape and dtype; they need not sum to 1.
    axis : int
        The axis of the classes.
    weight : ndarray of shape (C,) and logits' dtype, optional
        A weight for each class.
    ignore_index : int
        Rows with this label count for nothing: loss and gradient are 0 whatever the logits. It may be any integer, a
        class as well. Without effect on probabilities.
    label_smoothing : float
        Share s in [0, 1] of the target mass that is spread evenly over the classes.
    reduction : {"mean", "sum", "none"}
        What becomes of the rows' losses.
    out : ndarray like logits, optional
        Where to write the gradient; may be ``logits`` itself.

    Returns
    -------
    loss : NumPy scalar of logits' dtype, or ndarray
        Added up in float64; an array of logits' shape without ``axis`` for ``reduction="none"``. 0 if the divisor of
        the mean is 0: no rows, all ignored, weights of 0.
    dlogits : ndarray
        Gradient of logits' shape, dtype and memory order; ``out`` if given. Also 0 if the divisor is 0.

    Raises
    ------
    TypeError
        If an array has a dtype or kind that is not supported or that differs from logits', or an option is of a wrong
        type.
    ValueError
        If a shape does not fit, there are no classes, a label is neither a class nor ``ignore_index`` (the message
        names the first position), an option is out of range, or ``out`` is read-only, overlaps targets or weight, or
        overlaps logits without being them. Nothing has been written then.

    Notes
    -----
    A logit of -inf has probability 0, and a target mass of 0 there adds 0 to the loss, other masses infinity. A row
    that holds NaN or +inf, or nothing but -inf, has loss and gradient NaN. Infinite and NaN weights and probabilities
    are computed with as the formulas say: a row of infinite mass has an infinite loss, and a gradient that is infinite,
    or NaN where infinite terms cancel. Without smoothing, other classes' weights do not touch a label's row.

    References
    ----------
    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for Computer Vision (2016),
    section 7; with weights and ignored rows as PyTorch's ``torch.nn.functional.cross_entropy``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> logits = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]))
    >>> loss, dlogits = fn.softmax_cross_entropy(logits, np.array([0, 2]), reduction="sum")
    >>> print(f"{loss:.6f} {np.log(16):.6f}")
    2.772589 2.772589
    >>> dlogits.round(6)
    array([[-0.5  ,  0.25 ,  0.25 ],
           [ 0.125,  0.75 , -0.875]])
    """
    given = _check_cross_entropy(logits, targets, axis, weight, ignore_index, label_smoothing, reduction, out)
    threads = _runtime.threads_for_call()
    dense, view = block(given.logits, given.axis)
    dense_weight = None if given.weight is None else dense_vector(given.weight)
    labels = probabilities = None
    has_ignore, ignore = False, 0
    if given.labels is not None:
        labels = _labels_by_position(given.labels, dense, given.axis)
        has_ignore, ignore = _comparable_ignore_index(given.ignore_index, given.labels.dtype)
        divisor = kernels.softmax.check_labels(labels, view[1], has_ignore, ignore, dense_weight, threads)
        if divisor is None:
            _raise_for_labels(given.labels, view[1], given.ignore_index)
    else:
        assert given.probabilities is not None
        probabilities = matching(given.probabilities, dense)
        divisor = float(view[0] * view[2])
    dlogits = destination(given.out, dense)
    losses, result = _new_losses(dense, given.axis, given.reduction)
    kernels.softmax.cross_entropy(
        dense, labels, probabilities, dense_weight, dlogits, losses, *view, has_ignore, ignore, given.label_smoothing,
        divisor if given.reduction == "mean" else 1.0, given.reduction != "none", threads)
    return (result if given.reduction == "none" else result[()]), write_back(given.out, dlogits)
