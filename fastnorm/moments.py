"""Mean and variance of each channel of everything seen: input standardization and population statistics.

Thin over the statistics half of ``_kernels/batchnorm.pyx``. The twin is ``reference/moments.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _runtime
from ._arrays import (
    AnyArray,
    Array,
    View,
    block,
    check_array,
    check_axis,
    check_integer,
    check_number,
    check_out,
    write_back,
)
from ._outputs import destination
from ._runtime import kernels
from .norm import FORWARD_ROWS, WIDE_ROWS

__all__ = ["Moments"]


class Moments:
    """Count, mean and M2 of each channel of all arrays passed to `update`, as if they were one.

    M2 is the sum of squared deviations from the mean. Batches, and parts seen by different workers, are merged by
    the pairwise update of Chan, Golub & LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", eq. 2.1: the result does not depend on how the data was cut, up to rounding in float64.

    Parameters
    ----------
    axis : int
        The channel axis of the arrays to come: 1 for (N, features) and NCHW, -1 for NHWC.

    Attributes
    ----------
    axis : int
    count : int
        Values seen per channel.
    mean : ndarray
        Mean of each channel, float64, shape (C,), a copy. ValueError before the first value.

    Raises
    ------
    TypeError
        If ``axis`` is not an integer.

    Examples
    --------
    >>> import numpy as np, fastnorm as fn
    >>> m = fn.Moments(axis=1)
    >>> m.update(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> m.count, m.mean, m.var()
    (2, array([2., 5.]), array([1., 0.]))
    >>> m.standardize(np.array([[4.0, 6.0]]))
    array([[2., 1.]])
    """

    def __init__(self, axis: int = 1) -> None:
        self.axis = check_integer("axis", axis)
        self.count = 0
        self._mean: Array | None = None
        self._m2: Array | None = None

    @property
    def mean(self) -> Array:
        """Mean of each channel, float64, shape (C,)."""
        return self._seen()[0].copy()

    def var(self, ddof: int = 0) -> Array:
        """Variance of each channel, M2 / (count - ddof).

        Parameters
        ----------
        ddof : int
            0 for the population's variance, 1 for the unbiased estimate from a sample.

        Returns
        -------
        ndarray
            float64, shape (C,).

        Raises
        ------
        TypeError
            If ``ddof`` is not an integer.
        ValueError
            If ``ddof`` is negative, or if no more than ``ddof`` values have been seen.
        """
        ddof = check_integer("ddof", ddof, 0)
        _, m2 = self._seen()
        if self.count <= ddof:
            raise ValueError(f"ddof: expected an integer < {self.count}, the values seen per channel, got {ddof}")
        return m2 / (self.count - ddof)

    def update(self, x: AnyArray) -> None:
        """Add all values of an array.

        Parameters
        ----------
        x : ndarray
            Float32 or float64, any rank and layout, C channels along ``axis``; C must be the same in every call.

        Raises
        ------
        TypeError
            If ``x`` is not such an array.
        ValueError
            If its number of channels is not that of the arrays before.
        """
        x, axis = self._check(x)
        x, view = block(x, axis)
        n = view[0] * view[2]
        if n:
            self._add(n, *self._measure(x, view))

    def merge(self, other: Moments) -> None:
        """Add everything that another object has seen, for example on another worker.

        Parameters
        ----------
        other : Moments
            Not changed.

        Raises
        ------
        TypeError
            If ``other`` is not a Moments object.
        ValueError
            If its number of channels differs.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected a Moments object, got {type(other).__name__}")
        if other._mean is None or other._m2 is None:
            return
        if self._mean is not None and self._mean.shape != other._mean.shape:
            raise ValueError(f"other: expected {len(self._mean)} channels, got {len(other._mean)}")
        self._add(other.count, other._mean.copy(), other._m2.copy())

    def standardize(self, x: AnyArray, eps: float = 0.0, out: AnyArray | None = None) -> Array:
        """Subtract the mean and divide by the standard deviation, ``(x - mean) / sqrt(var() + eps)``.

        Channels without variance (pixels that are always black) are divided by 1.

        Parameters
        ----------
        x : ndarray
            Float32 or float64, C channels along ``axis``; need not be among the arrays seen.
        eps : float
            Added to the variance, at least 0.
        out : ndarray, optional
            Where to write: shape and dtype of x; may be x itself.

        Returns
        -------
        ndarray
            Shape, dtype and memory order of x; ``out`` if given.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind or dtype.
        ValueError
            If nothing has been seen, if a shape or range is wrong, or if ``out`` is read-only or overlaps x in part.
        """
        x, axis = self._check(x)
        eps = check_number("eps", eps)
        mean, _ = self._seen()
        if out is not None:
            out = check_out(out, x, ("x", x), may_equal=("x",))
        var = self.var()
        return self._standardize(x, axis, mean, np.where(var == 0, 1.0, var + eps), out)

    def _seen(self) -> tuple[Array, Array]:
        if self._mean is None or self._m2 is None:
            raise ValueError("x: expected at least one value per channel to have been seen by update, got none")
        return self._mean, self._m2

    def _check(self, x: Any) -> tuple[Array, int]:
        """Check an array against the axis and the channels so far; return it and the axis from the front."""
        x = check_array("x", x)
        if x.ndim == 0:
            raise ValueError("x: expected at least 1 dimension, got 0")
        axis = check_axis(self.axis, x.ndim)
        if self._mean is not None and x.shape[axis] != len(self._mean):
            raise ValueError(f"x: expected {len(self._mean)} channels along axis {self.axis}, got shape {x.shape}")
        return x, axis

    def _add(self, n: int, mean: Array, m2: Array) -> None:
        """Merge statistics of n more values per channel; the arrays become this object's."""
        if self._mean is None or self._m2 is None:
            self.count, self._mean, self._m2 = n, mean, m2
            return
        total = self.count + n
        with np.errstate(invalid="ignore", over="ignore"):
            delta = mean - self._mean
            finite = np.isfinite(delta)
            # An infinite mean stays infinite, as a plain sum would; its deviations are NaN.
            self._mean = np.where(finite, self._mean + delta * (n / total), self._mean + mean)
            self._m2 = self._m2 + m2 + np.where(finite, delta * delta * (self.count * (n / total)), np.nan)
        self.count = total

    def _measure(self, x: Array, view: View) -> tuple[Array, Array]:
        """Mean and M2 of each channel of a dense array."""
        mean, m2 = np.empty(view[1]), np.empty(view[1])
        kernels.batchnorm.moments(x, mean, m2, *view, _runtime.threads_for_call())
        return mean, m2

    def _standardize(self, x: Array, axis: int, mean: Array, var: Array, out: Array | None) -> Array:
        """``(x - mean) / sqrt(var)`` on checked arguments."""
        x, view = block(x, axis)
        y = destination(out, x)
        kernels.batchnorm.standardize(x, y, mean, var, np.empty((FORWARD_ROWS, view[1]), x.dtype),
                                      np.empty((WIDE_ROWS, view[1])), *view, _runtime.threads_for_call())
        return write_back(out, y)
