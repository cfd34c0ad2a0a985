"""Moments in plain NumPy: the twin of ``fastnorm/moments.py``."""

from __future__ import annotations

import numpy as np

from .. import moments
from .._arrays import Array, View
from .norm import mean_and_variance

__all__ = ["Moments"]


class Moments(moments.Moments):
    """Twin of `fastnorm.Moments`: the same merging, with NumPy's mean and variance of each array."""

    def _measure(self, x: Array, view: View) -> tuple[Array, Array]:
        # x is dense: its memory, whatever the axis order, is a C-contiguous (outer, C, inner) array.
        mean, var = mean_and_variance(np.ravel(x, order="K").reshape(view), 1)
        return mean, var * (view[0] * view[2])

    def _standardize(self, x: Array, axis: int, mean: Array, var: Array, out: Array | None) -> Array:
        shape = [1] * x.ndim
        shape[axis] = -1
        y = np.empty_like(x, subok=False) if out is None else out
        with np.errstate(all="ignore"):
            y[...] = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape))
        return y
