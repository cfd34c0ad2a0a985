"""Fully connected layers: `Dense`, and `DropConnect`, whose weights are dropped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from .. import init as _init
from .._arrays import (
    AnyArray,
    Array,
    check_array,
    check_choice,
    check_dtype,
    check_flag,
    check_integer,
    check_like,
    check_number,
)
from .._backend import Backend
from ..init import Rng
from .base import Layer, RandomStream

# NaN and infinity pass without a warning, as in the kernels.
_quiet = np.errstate(all="ignore")

Initializer = Callable[[tuple[int, ...], Rng, DTypeLike], Array]


class Dense(Layer):
    """Fully connected layer, ``y = x @ weight + bias``.

    Parameters
    ----------
    in_features, out_features : int
        Lengths of a row of x and of y.
    bias : bool, default True
        Whether to add a bias, zero at first.
    init : str or callable, default "he_normal"
        Name of a function of `fastnorm.init`, or a function of ``(shape, rng, dtype)`` that returns the weights,
        which are copied.
    rng : numpy.random.Generator, int or None, optional
        Where the initial weights come from. Layers of one network share a generator; with the same integer they would
        begin with the same numbers.
    dtype : dtype, default numpy.float32
        float32 or float64.
    backend : module, optional
        Unused here: matrix products are NumPy's.

    Attributes
    ----------
    weight, weight_grad : ndarray (in_features, out_features)
        Weights and their gradient.
    bias, bias_grad : ndarray (out_features,) or None
        Bias and its gradient.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a number is out of its range, ``init`` is unknown or returns another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import Dense
    >>> layer = Dense(3, 2, rng=0)
    >>> layer.forward(np.ones((4, 3), np.float32)).shape
    (4, 2)
    >>> layer.backward(np.ones((4, 2), np.float32)).shape
    (4, 3)
    >>> layer.bias_grad
    array([4., 4.], dtype=float32)
    """

    _parameter_names = ("weight", "bias")

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, init: str | Initializer = "he_normal",
                 rng: Rng = None, dtype: DTypeLike = np.float32, backend: Backend = None) -> None:
        super().__init__(backend)
        shape = check_integer("in_features", in_features, 1), check_integer("out_features", out_features, 1)
        self.dtype = check_dtype("dtype", dtype)
        has_bias = check_flag("bias", bias)
        function: Initializer = (
            init if callable(init) else getattr(_init, str(check_choice("init", init, _init.__all__))))
        # a copy: a function that returns an array kept elsewhere, or read-only, shall not tie two networks together
        self.weight = np.array(check_like("init", function(shape, rng, self.dtype), shape, self.dtype), order="C")
        self.weight_grad = np.zeros_like(self.weight)
        self.bias = np.zeros(shape[1], self.dtype) if has_bias else None
        self.bias_grad = np.zeros(shape[1], self.dtype) if has_bias else None
        self._kept_input: Array | None = None

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return ``x @ weight + bias`` for x of shape (N, in_features)."""
        training = check_flag("training", training)
        x = self._check_input(x)
        y = self._product(x, self.weight)
        self._kept_input = x if training else None
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return ``dy @ weight.T`` for dy of shape (N, out_features); overwrite `grads`."""
        return self._product_backward(dy, self.weight)

    def _check_input(self, x: object) -> Array:
        x = check_array("x", x, self.dtype)
        if x.ndim != 2 or x.shape[1] != self.weight.shape[0]:
            raise ValueError(f"x: expected shape (N, {self.weight.shape[0]}), got {x.shape}")
        return x

    @_quiet
    def _product(self, x: Array, weight: Array) -> Array:
        y: Array = x @ weight
        if self.bias is not None:
            y += self.bias
        return y

    @_quiet
    def _product_backward(self, dy: AnyArray, weight: Array) -> Array:
        x: Array = self._kept(self._kept_input)
        dy = check_like("dy", dy, (x.shape[0], weight.shape[1]), self.dtype)
        np.matmul(x.T, dy, out=self.weight_grad)
        if self.bias_grad is not None:
            # NumPy adds up a float32 column one by one in float32: off by percents on a long one.
            self.bias_grad[...] = dy.sum(axis=0, dtype=np.float64)
        dx: Array = dy @ weight.T
        return dx


class DropConnect(Dense):
    """Dense layer that drops weights in training: each is 0 with probability ``p``, else multiplied by ``1 / (1 - p)``.

    One mask serves the whole batch, and every training forward draws a fresh one. The bias is never dropped. With
    ``training=False`` it is a plain `Dense` layer.

    Parameters
    ----------
    in_features, out_features, bias, init, rng, dtype
        As for `Dense`.
    p : float, default 0.5
        Probability of dropping a weight, in [0, 1].
    seed : int, optional
        Which masks, in [0, 2**64); by default from the operating system. Give every layer its own.
    backend : module, optional
        Where ``dropout`` and ``dropout_backward`` are looked up: `fastnorm` by default.

    Attributes
    ----------
    seed, offset : ndarray () of uint64
        Seed, and the number of masks drawn so far; both are part of the state, so that a resumed training goes on with
        the same bits.

    Notes
    -----
    Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of Neural Networks using DropConnect", 2013; their mask of its
    own for each example would make the product with a matrix one of many matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import DropConnect
    >>> layer = DropConnect(3, 2, p=0.5, rng=0, seed=1)
    >>> x = np.ones((4, 3), np.float32)
    >>> bool(np.array_equal(layer.forward(x), layer.forward(x)))  # two masks
    False
    """

    _buffer_names = ("seed", "offset")

    def __init__(self, in_features: int, out_features: int, p: float = 0.5, *, bias: bool = True,
                 init: str | Initializer = "he_normal", rng: Rng = None, seed: int | None = None,
                 dtype: DTypeLike = np.float32, backend: Backend = None) -> None:
        self.p = check_number("p", p, 0.0, 1.0)
        self._stream = RandomStream(seed)
        super().__init__(in_features, out_features, bias=bias, init=init, rng=rng, dtype=dtype, backend=backend)
        self._kept_mask: tuple[Array, dict[str, int]] | None = None

    @property
    def seed(self) -> Array:
        """Seed of the masks."""
        return self._stream.seed

    @property
    def offset(self) -> Array:
        """Number of masks drawn so far."""
        return self._stream.offset

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return ``x @ dropped_weight + bias`` for x of shape (N, in_features)."""
        if not check_flag("training", training):
            return super().forward(x, False)
        x = self._check_input(x)
        mask = self._stream.current()
        dropped = self._functions.dropout(self.weight, self.p, **mask)
        y = self._product(x, dropped)
        self._kept_input, self._kept_mask = x, (dropped, mask)
        self._stream.advance()
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return ``dy @ dropped_weight.T`` for dy of shape (N, out_features); overwrite `grads`."""
        dropped, mask = self._kept(self._kept_mask if self._kept_input is not None else None)
        dx = self._product_backward(dy, dropped)
        self._functions.dropout_backward(self.weight_grad, self.p, **mask, out=self.weight_grad)
        return dx
