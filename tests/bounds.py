"""Running error analysis: how far two right evaluations of one formula may lie apart.

A `Bounded` is a float64 value with a bound on the error that a computation in a given dtype has made so far (Wilkinson
1963; Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.3). Writing a formula once more in these
numbers derives its tolerance, element by element: every operation adds half an ulp of its result to what its operands'
errors become. Where an intermediate result may leave the dtype's range, or stands under a division or root that may
meet 0, the bound is infinite: there, evaluations that are right differ.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np


class Arithmetic(NamedTuple):
    """What one operation costs in a dtype."""

    unit: float  # relative error of one rounding, half an ulp
    least: float  # absolute error below the smallest normal number
    largest: float

    @classmethod
    def of(cls, dtype) -> Arithmetic:
        info = np.finfo(dtype)
        return cls(float(info.eps) / 2, float(info.smallest_subnormal), float(info.max))


class Bounded:
    """Value and error bound, arrays of one shape or ones that broadcast; the operators of NumPy float64 arrays.

    Values that are NaN or infinite because an operand was are exact: kernels must agree on them.
    """

    __slots__ = ("arithmetic", "error", "value")

    def __init__(self, value, arithmetic: Arithmetic, error=0.0) -> None:
        self.value, self.arithmetic, self.error = np.asarray(value, np.float64), arithmetic, error

    def rounded(self, value, error, *operands, roundings: float = 1.0) -> Bounded:
        """A result of an operation: the error that its operands brought, and that of rounding."""
        a = self.arithmetic
        size = np.abs(value)
        error = error + roundings * (a.unit * size + np.where(size > 0, a.least, 0.0))
        error = np.where((size > a.largest) | np.isnan(error), np.inf, error)
        # Of NaN and infinity follow NaN and infinity; of what is exact follows what is exact.
        exact = ~np.isfinite(size) & (functools.reduce(np.logical_or, [~np.isfinite(o.value) for o in operands])
                                      | functools.reduce(np.logical_and, [o.error == 0 for o in operands]))
        uncertain = functools.reduce(np.logical_or, [np.isinf(o.error) for o in operands])
        return Bounded(value, a, np.where(uncertain, np.inf, np.where(exact, 0.0, error)))

    def to(self, arithmetic: Arithmetic) -> Bounded:
        """The same number, rounded to another dtype's precision."""
        return Bounded(self.value, arithmetic, self.error).rounded(self.value, self.error, self)

    def lift(self, other) -> Bounded:
        """A number or array as an operand; a number is rounded to the dtype first."""
        if isinstance(other, Bounded):
            return other
        value = np.asarray(other, np.float64)
        return Bounded(value, self.arithmetic, np.abs(value) * self.arithmetic.unit if value.ndim == 0 else 0.0)

    def __add__(self, other) -> Bounded:
        other = self.lift(other)
        return self.rounded(self.value + other.value, self.error + other.error, self, other)

    __radd__ = __add__

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.arithmetic, self.error)

    def __sub__(self, other) -> Bounded:
        return self + -self.lift(other)

    def __rsub__(self, other) -> Bounded:
        return -self + other

    def __mul__(self, other) -> Bounded:
        other = self.lift(other)
        error = (np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error)
        product = self.rounded(self.value * other.value, error, self, other)
        # Infinity times what may be 0 or of either sign.
        unclear = ((np.isinf(self.value) & (other.error > 0) & (np.abs(other.value) <= other.error))
                   | (np.isinf(other.value) & (self.error > 0) & (np.abs(self.value) <= self.error)))
        return Bounded(product.value, product.arithmetic, np.where(unclear, np.inf, product.error))

    __rmul__ = __mul__

    def __truediv__(self, other) -> Bounded:
        other = self.lift(other)
        value = self.value / other.value
        nearest = np.abs(other.value) - other.error  # to 0 that the divisor may be
        error = np.where(nearest > 0, (self.error + np.abs(value) * other.error) / nearest,
                         np.where((other.error == 0) & (self.error == 0), 0.0, np.inf))
        return self.rounded(value, error, self, other)

    def __rtruediv__(self, other) -> Bounded:
        return self.lift(other) / self

    def apply(self, value, slope, *, ulps: float) -> Bounded:
        """A function of which the value is given, the largest slope within the error, and its own error in ulps."""
        return self.rounded(value, np.where(self.error == 0, 0.0, slope * self.error), self, roundings=2 * ulps)

    def sqrt(self) -> Bounded:
        """Square root; the root of the error where that is all there is."""
        value = np.sqrt(self.value)
        slope = np.where(self.error < self.value, 1 / (np.sqrt(np.maximum(self.value - self.error, 0)) + value),
                         1 / np.sqrt(self.error))
        return self.apply(value, slope, ulps=0.5)

    def exp(self, ulps: float = 2) -> Bounded:
        """Exponential, by default to within the 2 ulp that the kernels promise."""
        value = np.exp(self.value)
        return self.apply(value, np.exp(self.value + self.error), ulps=ulps)

    def log(self, ulps: float = 2) -> Bounded:
        """Logarithm of what is clearly positive."""
        return self.apply(np.log(self.value), 1 / (self.value - self.error), ulps=ulps)

    def sum(self, axis, *, chain: int) -> Bounded:
        """Sum along axes, kept as of length 1, of which at most ``chain`` terms are added in a row before the sum goes
        on in float64.
        """
        total = self.value.sum(axis, keepdims=True)
        size = np.abs(self.value).sum(axis, keepdims=True)
        n = self.value.size // max(total.size, 1)
        a = self.arithmetic
        unit = a.unit * min(chain, n) + 2.0**-53 * n
        error = np.sum(np.broadcast_to(self.error, self.value.shape), axis, keepdims=True) + unit * size + a.least * n
        finite = np.isfinite(self.value).all(axis, keepdims=True)
        return Bounded(total, a, np.where(finite, np.where(size > a.largest, np.inf, error), 0.0))

    def maximum(self, other) -> Bounded:
        """The larger one, or NaN."""
        other = self.lift(other)
        return Bounded(np.maximum(self.value, other.value), self.arithmetic, np.maximum(self.error, other.error))

    def where(self, condition, other, uncertain=False) -> Bounded:
        """This where the condition holds, else the other; either one where the condition is uncertain."""
        other = self.lift(other)
        value = np.where(condition, self.value, other.value)
        error = np.where(condition, self.error, other.error)
        if np.any(uncertain):
            either = np.abs(self.value - other.value) + np.maximum(self.error, other.error)
            error = np.where(uncertain, np.where(np.isnan(either), np.inf, either), error)
        return Bounded(value, self.arithmetic, error)


def differing(actual: np.ndarray, expected: np.ndarray, error) -> np.ndarray:
    """Where two results differ by more than either may err; NaN and infinity agree unless the bound is infinite."""
    got, want = actual.astype(np.float64), expected.astype(np.float64)
    info = np.finfo(actual.dtype)
    # Each of the two may err by the bound, and is rounded once more to be stored.
    allowed = 2 * np.asarray(error) + 2 * (float(info.eps) * np.abs(want) + float(info.smallest_subnormal))
    right = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= allowed) | np.isinf(error)
    # One side of the end of the range, and the other.
    edge = float(info.max) * (1 - 4 * float(info.eps))
    right |= np.isinf(got) & (np.abs(want) + error >= edge) & (np.sign(got) == np.sign(want))
    right |= np.isinf(want) & (np.abs(got) + np.nan_to_num(error) >= edge) & (np.sign(got) == np.sign(want))
    return ~right
