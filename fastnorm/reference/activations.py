"""Twin of `fastnorm.activations` in plain NumPy: the formulas in float64, the result in the dtype of the input.

`dropout` draws the very bits of the compiled one: `philox4x32` is Philox4x32-10 in vectorized integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .._arrays import AnyArray, Array, write_back
from ..activations import (
    _check_backward,
    _check_dropout,
    _check_factor,
    _check_forward,
    _dropout_parameters,
)

__all__ = ["celu", "celu_backward", "dropout", "dropout_backward", "elu", "elu_backward", "leaky_relu",
           "leaky_relu_backward", "relu", "relu_backward", "sigmoid", "sigmoid_backward", "tanh", "tanh_backward"]


def _elementwise(formula: Callable[..., Array], arrays: tuple[Array, ...], out: Array | None) -> Array:
    """The formula on plain float64 copies (the * of np.matrix is another), in the dtype and order of the last array."""
    like = arrays[-1]
    # NaN, infinity, overflow and underflow are results here, not surprises.
    with np.errstate(all="ignore"):
        values = formula(*(a.astype(np.float64, subok=False) for a in arrays))
        result = np.empty_like(like, subok=False)
        result[...] = values
    return write_back(out, result)


# A comparison is written so that NaN takes the branch that keeps it. np.minimum keeps the branch that is not taken
# from overflowing.


def relu(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.relu`."""
    x, out = _check_forward(x, out)
    return _elementwise(lambda x: np.where(x <= 0, 0, x), (x,), out)


def relu_backward(dy: AnyArray, x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.relu_backward`."""
    dy, x, out = _check_backward(dy, x, out, "x")
    return _elementwise(lambda dy, x: np.where(x <= 0, 0, dy), (dy, x), out)


def _stored_slope(negative_slope: float, x: Array) -> float:
    """The checked slope, rounded to x's dtype: where that makes it 0, infinity times it is NaN."""
    return float(x.dtype.type(_check_factor("negative_slope", negative_slope, x.dtype)))


def leaky_relu(x: AnyArray, *, negative_slope: float = 0.01, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.leaky_relu`."""
    x, out = _check_forward(x, out)
    slope = _stored_slope(negative_slope, x)
    return _elementwise(lambda x: np.where(x <= 0, slope * x, x), (x,), out)


def leaky_relu_backward(dy: AnyArray, x: AnyArray, *, negative_slope: float = 0.01,
                        out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.leaky_relu_backward`."""
    dy, x, out = _check_backward(dy, x, out, "x")
    slope = _stored_slope(negative_slope, x)
    return _elementwise(lambda dy, x: np.where(x <= 0, slope * dy, dy), (dy, x), out)


def elu(x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.elu`."""
    x, out = _check_forward(x, out)
    alpha = _check_factor("alpha", alpha, x.dtype)
    return _elementwise(lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))), (x,), out)


def _times_exp(dy: Array, x: Array, gain: float = 1.0) -> Array:
    """``gain * exp(x) * dy``, where the exponential alone may underflow."""
    half = np.exp(x / 2)
    return np.asarray((gain * half) * (dy * half))


def elu_backward(dy: AnyArray, x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.elu_backward`."""
    dy, x, out = _check_backward(dy, x, out, "x")
    alpha = _check_factor("alpha", alpha, x.dtype)
    return _elementwise(lambda dy, x: np.where(x > 0, dy, _times_exp(dy, np.minimum(x, 0), alpha)), (dy, x), out)


def celu(x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.celu`."""
    x, out = _check_forward(x, out)
    alpha = _check_factor("alpha", alpha, x.dtype, positive=True)
    return _elementwise(lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / alpha)), (x,), out)


def celu_backward(dy: AnyArray, x: AnyArray, *, alpha: float = 1.0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.celu_backward`."""
    dy, x, out = _check_backward(dy, x, out, "x")
    alpha = _check_factor("alpha", alpha, x.dtype, positive=True)
    return _elementwise(lambda dy, x: np.where(x > 0, dy, _times_exp(dy, np.minimum(x, 0) / alpha)), (dy, x), out)


def sigmoid(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.sigmoid`."""
    x, out = _check_forward(x, out)

    def formula(x: Array) -> Array:
        e = np.exp(-np.abs(x))  # for x < 0: 1 / (1 + 1/e) = e / (1 + e)
        return np.asarray(np.where(x >= 0, 1, e) / (1 + e))

    return _elementwise(formula, (x,), out)


def sigmoid_backward(dy: AnyArray, y: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.sigmoid_backward`."""
    dy, y, out = _check_backward(dy, y, out, "y")
    return _elementwise(lambda dy, y: y * (1 - y) * dy, (dy, y), out)


def tanh(x: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.tanh`."""
    x, out = _check_forward(x, out)
    return _elementwise(np.tanh, (x,), out)


def tanh_backward(dy: AnyArray, y: AnyArray, *, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.tanh_backward`."""
    dy, y, out = _check_backward(dy, y, out, "y")
    return _elementwise(lambda dy, y: (1 - y) * (1 + y) * dy, (dy, y), out)


# -- dropout -----------------------------------------------------------------------------------------------------------


def philox4x32(counter: Array, key: tuple[int, int], rounds: int = 10) -> Array:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3, figure 2): ``counter`` (4, n) to random words (4, n), uint32."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in counter)  # 64 bits hold a product of two words
    for r in range(rounds):
        # Weyl sequences of the golden ratio and of sqrt(3) - 1
        k0 = np.uint64((key[0] + r * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + r * 0xBB67AE85) & 0xFFFFFFFF)
        product0, product2 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (product2 >> half) ^ c1 ^ k0, product2 & low, (product0 >> half) ^ c3 ^ k1, product0 & low
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def random_words(n: int, seed: int, offset: int) -> Array:
    """The first n random words of ``(seed, offset)``: word i is word ``i % 4`` of block ``i // 4``."""
    block = np.arange((n + 3) // 4, dtype=np.uint64)
    counter = np.stack([block & np.uint64(0xFFFFFFFF), block >> np.uint64(32),
                        np.full_like(block, offset & 0xFFFFFFFF), np.full_like(block, offset >> 32)])
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)[:n]


def _dropped(x: Array, p: float, seed: int, offset: int, out: Array | None) -> Array:
    threshold, scale = _dropout_parameters(p)
    kept = random_words(x.size, seed, offset).reshape(x.shape) >= threshold
    return _elementwise(lambda x: x * np.where(kept, scale, 0.0), (x,), out)


def dropout(x: AnyArray, p: float, *, seed: int, offset: int = 0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.dropout`."""
    x, out = _check_forward(x, out)
    return _dropped(x, *_check_dropout(p, seed, offset), out)


def dropout_backward(dy: AnyArray, p: float, *, seed: int, offset: int = 0, out: AnyArray | None = None) -> Array:
    """Twin of `fastnorm.dropout_backward`."""
    dy, out = _check_forward(dy, out, "dy")
    return _dropped(dy, *_check_dropout(p, seed, offset), out)
