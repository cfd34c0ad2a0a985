"""Activations and dropout, forward and backward: elementwise functions of an array of any rank.

Every forward has a backward that multiplies the incoming gradient ``dy`` by the activation's derivative. The
derivative of ReLU, leaky ReLU, ELU and CELU is computed from the input ``x`` of the forward; that of sigmoid and tanh
from its output ``y``, which is both cheaper and more accurate.

Results keep the memory order of ``x`` (in a backward: of the array beside ``dy``).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import numpy as np

from ._arrays import (
    FLOAT32,
    FLOAT32_MAX,
    AnyArray,
    Array,
    _block_order,
    check_array,
    check_integer,
    check_like,
    check_number,
    check_out,
    is_dense,
    matching,
    write_back,
)
from ._kernels.checks import elementwise_arrays
from ._outputs import destination
from ._runtime import kernels, threads_for_call

__all__ = ["celu", "celu_backward", "dropout", "dropout_backward", "elu", "elu_backward", "leaky_relu",
           "leaky_relu_backward", "relu", "relu_backward", "sigmoid", "sigmoid_backward", "tanh", "tanh_backward"]

_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_WORDS = 1 << 32  # how many values a random word has
_MAX_SEED = (1 << 64) - 1


# -- checks, shared with fastnorm.reference.activations ----------------------------------------------------------------


def _check_forward(x: object, out: object, name: str = "x") -> tuple[Array, Array | None]:
    if not elementwise_arrays(x, None, out):
        x = check_array(name, x)
        out = None if out is None else check_out(out, x, (name, x), may_equal=(name,))
    return cast(Array, x), cast("Array | None", out)


def _check_backward(dy: object, saved: object, out: object, name: str) -> tuple[Array, Array, Array | None]:
    """``saved`` is what the forward left for the backward, its input or its output, under the name the user sees."""
    if dy is None or not elementwise_arrays(saved, dy, out):
        saved = check_array(name, saved)
        dy = check_like("dy", dy, saved.shape, saved.dtype)
        out = None if out is None else check_out(out, saved, ("dy", dy), (name, saved), may_equal=("dy",))
    return cast(Array, dy), cast(Array, saved), cast("Array | None", out)


def _check_factor(name: str, value: object, dtype: np.dtype[Any], *, positive: bool = False) -> float:
    """A finite number >= 0 that is still one (> 0 and normal if ``positive``) after rounding to the dtype."""
    factor = check_number(name, value)
    single = dtype == FLOAT32
    if single and factor > FLOAT32_MAX:
        raise ValueError(f"{name}: expected a number that float32 can hold, got {factor:g}")
    if positive and factor < (_FLOAT32_TINY if single else 2.0**-1022):
        raise ValueError(f"{name}: expected a number > 0 (and normal in {dtype.name}), got {factor:g}")
    return factor


def _check_dropout(p: object, seed: object, offset: object) -> tuple[float, int, int]:
    return check_number("p", p, 0.0, 1.0), _check_word("seed", seed), _check_word("offset", offset)


def _check_word(name: str, value: object) -> int:
    number = check_integer(name, value, 0)
    if number > _MAX_SEED:
        raise ValueError(f"{name}: expected an integer < 2**64, got {number}")
    return number


def _dropout_parameters(p: float) -> tuple[int, float]:
    """Threshold below which a random word drops its element, and the scale of the elements kept."""
    return (int(p * _WORDS), 1 / (1 - p)) if p < 1 else (0, 0.0)


# -- from arrays to kernels --------------------------------------------------------------------------------------------


def _dense(a: Array) -> Array:
    return a if is_dense(a) else a.copy(order="K")


def _forward(name: str, x: Array, out: Array | None, factor: float = 0.0) -> Array:
    x = _dense(x)
    y = destination(out, x)
    kernels.activation.forward(name, x, y, factor, threads_for_call())
    return write_back(out, y)


def _backward(name: str, dy: Array, saved: Array, out: Array | None, factor: float = 0.0) -> Array:
    saved = _dense(saved)
    dx = destination(out, saved)
    kernels.activation.backward(name, matching(dy, saved), saved, dx, factor, threads_for_call())
    return write_back(out, dx)


@lru_cache(maxsize=4096)
def _logical_axes(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
                  ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a dense block, outermost in memory first: lengths, and strides in the C-ordered logical array.

    Neighbours that make one run in both orders are merged, so that a C-ordered array is one axis of stride 1.
    """
    axes: list[tuple[int, int]] = []
    for i in _block_order(shape, strides, itemsize) or ():
        n, step = shape[i], math.prod(shape[i + 1:])
        if axes and axes[-1][1] == n * step:
            axes[-1] = (axes[-1][0] * n, step)
        else:
            axes.append((n, step))
    return tuple(n for n, _ in axes) or (1,), tuple(step for _, step in axes) or (1,)


def _dropout(x: Array, p: float, seed: int, offset: int, out: Array | None) -> Array:
    threshold, scale = _dropout_parameters(p)
    x = _dense(x)
    y = destination(out, x)
    lengths, strides = _logical_axes(x.shape, x.strides, x.itemsize)
    kernels.activation.dropout(x, y, scale, threshold, seed, offset, lengths, strides, threads_for_call())
    return write_back(out, y)


# -- activations -------------------------------------------------------------------------------------------------------


def relu(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Rectified linear unit, ``max(x, 0)``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``. NaN passes through.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, or dtypes differ.
    ValueError
        If ``out`` has another shape, is read-only or partly overlaps ``x``.

    Notes
    -----
    Nair and Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", 2010.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.relu(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 3.])
    """
    x, out = _check_forward(x, out)
    return _forward("relu", x, out)


def relu_backward(dy: AnyArray, x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Gradient of `relu` with respect to its input: ``dy`` where x > 0, else 0 (at exactly 0 too).

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``x``, any layout.
    x : ndarray
        Input of the forward (its output gives the same result).
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in x's memory order, or ``out``. Where x is NaN it is ``dy``.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, or dtypes differ.
    ValueError
        If shapes differ, or ``out`` is read-only, overlaps ``x`` or partly overlaps ``dy``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.relu_backward(np.array([5.0, 5.0, 5.0]), np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 5.])
    """
    dy, x, out = _check_backward(dy, x, out, "x")
    return _backward("relu", dy, x, out)


def leaky_relu(x: AnyArray, *, negative_slope: float = 0.01, out: AnyArray | None = None) -> Array:
    """Leaky rectified linear unit, ``x if x > 0 else negative_slope * x``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    negative_slope : float, default 0.01
        Slope for x <= 0: finite, at least 0.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu`, and if ``negative_slope`` is not a finite number >= 0.

    Notes
    -----
    Maas, Hannun and Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", 2013, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.leaky_relu(np.array([-2.0, 0.0, 3.0]), negative_slope=0.5)
    array([-1.,  0.,  3.])
    """
    x, out = _check_forward(x, out)
    return _forward("leaky_relu", x, out, _check_factor("negative_slope", negative_slope, x.dtype))


def leaky_relu_backward(dy: AnyArray, x: AnyArray, *, negative_slope: float = 0.01,
                        out: AnyArray | None = None) -> Array:
    """Gradient of `leaky_relu` with respect to its input: ``dy if x > 0 else negative_slope * dy``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``x``, any layout.
    x : ndarray
        Input of the forward.
    negative_slope : float, default 0.01
        As in the forward. It is also the slope at exactly 0.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in x's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu_backward`, and if ``negative_slope`` is not a finite number >= 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.leaky_relu_backward(np.array([6.0, 6.0, 6.0]), np.array([-2.0, 0.0, 3.0]), negative_slope=0.5)
    array([3., 3., 6.])
    """
    dy, x, out = _check_backward(dy, x, out, "x")
    return _backward("leaky_relu", dy, x, out, _check_factor("negative_slope", negative_slope, x.dtype))


def elu(x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Exponential linear unit, ``x if x > 0 else alpha * (exp(x) - 1)``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    alpha : float, default 1.0
        The result tends to ``-alpha`` for very negative x: finite, at least 0.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``; accurate to a few ulp near 0 too.

    Raises
    ------
    TypeError, ValueError
        As `relu`, and if ``alpha`` is not a finite number >= 0.

    Notes
    -----
    Clevert, Unterthiner and Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear Units", 2016,
    equation 15.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.elu(np.array([-np.inf, 0.0, 3.0]), alpha=0.5)
    array([-0.5,  0. ,  3. ])
    """
    x, out = _check_forward(x, out)
    return _forward("elu", x, out, _check_factor("alpha", alpha, x.dtype))


def elu_backward(dy: AnyArray, x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Gradient of `elu` with respect to its input: ``dy if x > 0 else alpha * exp(x) * dy``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``x``, any layout.
    x : ndarray
        Input of the forward. (From the output, ``y + alpha`` would cancel for very negative x.)
    alpha : float, default 1.0
        As in the forward.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in x's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu_backward`, and if ``alpha`` is not a finite number >= 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.elu_backward(np.array([6.0, 6.0, 6.0]), np.array([-np.inf, 0.0, 3.0]), alpha=0.5)
    array([0., 3., 6.])
    """
    dy, x, out = _check_backward(dy, x, out, "x")
    return _backward("elu", dy, x, out, _check_factor("alpha", alpha, x.dtype))


def celu(x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Continuously differentiable ELU, ``x if x > 0 else alpha * (exp(x / alpha) - 1)``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    alpha : float, default 1.0
        The result tends to ``-alpha`` for very negative x: finite, greater than 0.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu`, and if ``alpha`` is not a finite number > 0.

    Notes
    -----
    Barron, "Continuously Differentiable Exponential Linear Units", 2017, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.celu(np.array([-np.inf, 0.0, 3.0]), alpha=0.5)
    array([-0.5,  0. ,  3. ])
    """
    x, out = _check_forward(x, out)
    return _forward("celu", x, out, _check_factor("alpha", alpha, x.dtype, positive=True))


def celu_backward(dy: AnyArray, x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Gradient of `celu` with respect to its input: ``dy if x > 0 else exp(x / alpha) * dy``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``x``, any layout.
    x : ndarray
        Input of the forward.
    alpha : float, default 1.0
        As in the forward.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in x's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu_backward`, and if ``alpha`` is not a finite number > 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.celu_backward(np.array([6.0, 6.0, 6.0]), np.array([-np.inf, 0.0, 3.0]), alpha=0.5)
    array([0., 6., 6.])
    """
    dy, x, out = _check_backward(dy, x, out, "x")
    return _backward("celu", dy, x, out, _check_factor("alpha", alpha, x.dtype, positive=True))


def sigmoid(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Logistic sigmoid, ``1 / (1 + exp(-x))``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``; accurate to a few ulp, for very negative x too.

    Raises
    ------
    TypeError, ValueError
        As `relu`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.sigmoid(np.array([-np.inf, 0.0, 800.0]))
    array([0. , 0.5, 1. ])
    """
    x, out = _check_forward(x, out)
    return _forward("sigmoid", x, out)


def sigmoid_backward(dy: AnyArray, y: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Gradient of `sigmoid` with respect to its input: ``y * (1 - y) * dy``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``y``, any layout.
    y : ndarray
        Output of the forward.
    out : ndarray, optional
        Array of y's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in y's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.sigmoid_backward(np.array([4.0, 4.0]), np.array([0.5, 1.0]))
    array([1., 0.])
    """
    dy, y, out = _check_backward(dy, y, out, "y")
    return _backward("sigmoid", dy, y, out)


def tanh(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Hyperbolic tangent.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``; accurate to a few ulp near 0 too.

    Raises
    ------
    TypeError, ValueError
        As `relu`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.tanh(np.array([-np.inf, 0.0, 20.0]))
    array([-1.,  0.,  1.])
    """
    x, out = _check_forward(x, out)
    return _forward("tanh", x, out)


def tanh_backward(dy: AnyArray, y: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Gradient of `tanh` with respect to its input: ``(1 - y**2) * dy``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output; shape and dtype of ``y``, any layout.
    y : ndarray
        Output of the forward.
    out : ndarray, optional
        Array of y's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in y's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `relu_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.tanh_backward(np.array([4.0, 4.0]), np.array([0.5, 1.0]))
    array([3., 0.])
    """
    dy, y, out = _check_backward(dy, y, out, "y")
    return _backward("tanh", dy, y, out)


# -- dropout -----------------------------------------------------------------------------------------------------------


def dropout(x: AnyArray, p: float, *, seed: int, offset: int = 0, out: AnyArray | None = None) -> Array:
    """Inverted dropout: each element becomes 0 with probability ``p``, else is multiplied by ``1 / (1 - p)``.

    Parameters
    ----------
    x : ndarray
        float32 or float64, any shape and layout.
    p : float
        Probability of dropping an element, in [0, 1]. With 1, all are dropped.
    seed : int
        Which sequence of random numbers, in [0, 2**64).
    offset : int, default 0
        Which part of the sequence, in [0, 2**64): every offset gives a fresh, independent mask. A training loop counts
        it up from call to call.
    out : ndarray, optional
        Array of x's shape and dtype for the result; may be ``x`` itself.

    Returns
    -------
    ndarray
        Array like x, in x's memory order, or ``out``. A dropped element is multiplied by 0, so that a dropped NaN or
        infinity shows as NaN.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, dtypes differ, or ``seed`` or ``offset`` is no integer.
    ValueError
        If a number is out of its range, or ``out`` has another shape, is read-only or partly overlaps ``x``.

    Notes
    -----
    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; scaled at training
    time as in its section 10.

    The mask depends on ``(seed, offset)`` and the element's index alone: element i, counted in C order of the array as
    it is indexed, whatever its memory layout, takes word ``i % 4`` of block ``(i // 4, offset)`` of Philox4x32-10 with
    key ``seed`` (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), and is dropped if that word is
    less than ``floor(p * 2**32)``. It is the same for every dtype, thread count and instruction set. An array in C
    order is the fastest; another order costs up to four times as much arithmetic.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> x = np.ones(8, np.float32)
    >>> y = fn.dropout(x, 0.5, seed=1)
    >>> y
    array([2., 2., 2., 2., 2., 2., 0., 2.], dtype=float32)
    >>> np.array_equal(fn.dropout_backward(x, 0.5, seed=1), y)  # the same mask, nothing stored
    True
    """
    x, out = _check_forward(x, out)
    return _dropout(x, *_check_dropout(p, seed, offset), out)


def dropout_backward(dy: AnyArray, p: float, *, seed: int, offset: int = 0, out: AnyArray | None = None) -> Array:
    """Gradient of `dropout` with respect to its input: ``dy`` under the same mask and scale, generated again.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output, float32 or float64, of the shape that the forward had, any layout.
    p : float
        As in the forward.
    seed, offset : int
        As in the forward.
    out : ndarray, optional
        Array of dy's shape and dtype for the result; may be ``dy`` itself.

    Returns
    -------
    ndarray
        Gradient with respect to the input, in dy's memory order, or ``out``.

    Raises
    ------
    TypeError, ValueError
        As `dropout`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.dropout_backward(np.ones((2, 4)), 0.5, seed=1)
    array([[2., 2., 2., 2.],
           [2., 2., 0., 2.]])
    """
    dy, out = _check_forward(dy, out, "dy")
    return _dropout(dy, *_check_dropout(p, seed, offset), out)
