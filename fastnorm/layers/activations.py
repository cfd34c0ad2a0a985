"""Elementwise layers without parameters: the activations and `Dropout`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._arrays import FLOAT64, AnyArray, Array, check_array, check_flag, check_like, check_number
from .._backend import Backend
from ..activations import _check_factor
from .base import Layer, RandomStream


class _Activation(Layer):
    """An elementwise function of the backend and its backward, which takes the input or the output of the forward."""

    _name: ClassVar[str]
    _keeps_output: ClassVar[bool] = False

    def __init__(self, *, backend: Backend = None) -> None:
        super().__init__(backend)
        self._options: dict[str, float] = {}
        self._saved: AnyArray | None = None

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return the activation of x, an array of any shape."""
        training = check_flag("training", training)
        y: Array = getattr(self._functions, self._name)(x, **self._options)
        self._saved = (y if self._keeps_output else x) if training else None
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return the gradient for x."""
        dx: Array = getattr(self._functions, self._name + "_backward")(dy, self._kept(self._saved), **self._options)
        return dx


class ReLU(_Activation):
    """Rectified linear unit: `fastnorm.relu` as a layer.

    Parameters
    ----------
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import ReLU
    >>> layer = ReLU()
    >>> layer.forward(np.array([-2.0, 3.0]))
    array([0., 3.])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([0., 1.])
    """

    _name = "relu"


class LeakyReLU(_Activation):
    """Leaky rectified linear unit: `fastnorm.leaky_relu` as a layer.

    Parameters
    ----------
    negative_slope : float, default 0.01
        Slope for x <= 0: finite, at least 0.
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import LeakyReLU
    >>> layer = LeakyReLU(0.5)
    >>> layer.forward(np.array([-2.0, 3.0]))
    array([-1.,  3.])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([0.5, 1. ])
    """

    _name = "leaky_relu"

    def __init__(self, negative_slope: float = 0.01, *, backend: Backend = None) -> None:
        super().__init__(backend=backend)
        self._options = {"negative_slope": _check_factor("negative_slope", negative_slope, FLOAT64)}


class ELU(_Activation):
    """Exponential linear unit: `fastnorm.elu` as a layer.

    Parameters
    ----------
    alpha : float, default 1.0
        Minus the limit for very negative x: finite, at least 0.
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import ELU
    >>> layer = ELU()
    >>> layer.forward(np.array([0.0, 3.0]))
    array([0., 3.])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([1., 1.])
    """

    _name = "elu"

    def __init__(self, alpha: float = 1.0, *, backend: Backend = None) -> None:
        super().__init__(backend=backend)
        self._options = {"alpha": _check_factor("alpha", alpha, FLOAT64)}


class CELU(_Activation):
    """Continuously differentiable ELU: `fastnorm.celu` as a layer.

    Parameters
    ----------
    alpha : float, default 1.0
        Minus the limit for very negative x: finite, greater than 0.
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import CELU
    >>> layer = CELU(0.5)
    >>> layer.forward(np.array([0.0, 3.0]))
    array([0., 3.])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([1., 1.])
    """

    _name = "celu"

    def __init__(self, alpha: float = 1.0, *, backend: Backend = None) -> None:
        super().__init__(backend=backend)
        self._options = {"alpha": _check_factor("alpha", alpha, FLOAT64, positive=True)}


class Sigmoid(_Activation):
    """Logistic sigmoid: `fastnorm.sigmoid` as a layer.

    Parameters
    ----------
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import Sigmoid
    >>> layer = Sigmoid()
    >>> layer.forward(np.array([0.0, 800.0]))
    array([0.5, 1. ])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([0.25, 0.  ])
    """

    _name = "sigmoid"
    _keeps_output = True


class Tanh(_Activation):
    """Hyperbolic tangent: `fastnorm.tanh` as a layer.

    Parameters
    ----------
    backend : module, optional
        Where the functions are looked up: `fastnorm` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import Tanh
    >>> layer = Tanh()
    >>> layer.forward(np.array([0.0, 20.0]))
    array([0., 1.])
    >>> layer.backward(np.array([1.0, 1.0]))
    array([1., 0.])
    """

    _name = "tanh"
    _keeps_output = True


class Dropout(Layer):
    """Inverted dropout in training; with ``training=False`` the input itself is returned.

    Parameters
    ----------
    p : float, default 0.5
        Probability of dropping an element, in [0, 1].
    seed : int, optional
        Which masks, in [0, 2**64); by default from the operating system. Give every layer its own.
    backend : module, optional
        Where ``dropout`` and ``dropout_backward`` are looked up: `fastnorm` by default.

    Attributes
    ----------
    seed, offset : ndarray () of uint64
        Seed, and the number of masks drawn so far: every training forward draws a fresh one. Both are part of the
        state, so that a resumed training goes on with the same bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import Dropout
    >>> layer = Dropout(0.5, seed=1)
    >>> x = np.ones(8, np.float32)
    >>> layer.forward(x)
    array([2., 2., 2., 2., 2., 2., 0., 2.], dtype=float32)
    >>> layer.backward(x)
    array([2., 2., 2., 2., 2., 2., 0., 2.], dtype=float32)
    >>> layer.forward(x, training=False) is x
    True
    """

    _buffer_names = ("seed", "offset")

    def __init__(self, p: float = 0.5, *, seed: int | None = None, backend: Backend = None) -> None:
        super().__init__(backend)
        self.p = check_number("p", p, 0.0, 1.0)
        self._stream = RandomStream(seed)
        self._kept_mask: tuple[tuple[int, ...], np.dtype[Any], dict[str, int]] | None = None

    @property
    def seed(self) -> Array:
        """Seed of the masks."""
        return self._stream.seed

    @property
    def offset(self) -> Array:
        """Number of masks drawn so far."""
        return self._stream.offset

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return x with elements dropped, an array of any shape."""
        if not check_flag("training", training):
            self._kept_mask = None
            return check_array("x", x)
        mask = self._stream.current()
        y: Array = self._functions.dropout(x, self.p, **mask)
        self._kept_mask = y.shape, y.dtype, mask  # which are those of x
        self._stream.advance()
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return the gradient for x: dy with the same elements dropped."""
        shape, dtype, mask = self._kept(self._kept_mask)
        dx: Array = self._functions.dropout_backward(check_like("dy", dy, shape, dtype), self.p, **mask)
        return dx
