"""Batch normalization as a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .._arrays import (
    AnyArray,
    Array,
    check_array,
    check_axis,
    check_choice,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
)
from .._backend import Backend
from .base import Layer


class BatchNorm(Layer):
    """Batch normalization of one axis, with an activation fused onto it.

    Training normalizes with the statistics of the batch and updates the running ones; ``training=False`` normalizes
    with the running statistics.

    Parameters
    ----------
    num_features : int
        Length of the channel axis.
    axis : int, default 1
        The channel axis; statistics go over all others.
    momentum : float, default 0.1
        Weight of the batch in the running statistics, in [0, 1].
    eps : float, default 1e-5
        Added to the variance, at least 0.
    affine : bool, default True
        Whether to learn a scale ``gamma`` (1 at first) and a shift ``beta`` (0 at first).
    unbiased_running_var : bool, default True
        Whether the running variance takes ``n / (n - 1)`` times the batch's.
    activation : {None, "relu", "leaky_relu"}
        Activation after the normalization.
    negative_slope : float, default 0.01
        Slope of the leaky ReLU.
    dtype : dtype, default numpy.float32
        float32 or float64.
    backend : module, optional
        Where the ``batch_norm`` functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    gamma, beta, gamma_grad, beta_grad : ndarray (num_features,) or None
        Scale and shift, and their gradients.
    running_mean, running_var : ndarray (num_features,)
        Running statistics, 0 and 1 at first; part of the state.
    frozen : bool
        False at first. True makes a training forward use the running statistics as constants and leave them alone
        (fine-tuning); gamma and beta still get their gradients.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a number is out of its range or ``activation`` is unknown.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015, algorithms 1 and 2.

    Examples
    --------
    >>> from fastnorm.layers import BatchNorm
    >>> layer = BatchNorm(64, activation="relu")
    >>> [p.shape for p in layer.params]
    [(64,), (64,)]
    >>> list(layer.state_dict())
    ['gamma', 'beta', 'running_mean', 'running_var']
    """

    _parameter_names = ("gamma", "beta")
    _buffer_names = ("running_mean", "running_var")

    def __init__(self, num_features: int, *, axis: int = 1, momentum: float = 0.1, eps: float = 1e-5,
                 affine: bool = True, unbiased_running_var: bool = True, activation: str | None = None,
                 negative_slope: float = 0.01, dtype: DTypeLike = np.float32, backend: Backend = None) -> None:
        super().__init__(backend)
        self.num_features = check_integer("num_features", num_features, 1)
        self.axis = check_integer("axis", axis)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        self.eps = check_number("eps", eps)
        self.unbiased_running_var = check_flag("unbiased_running_var", unbiased_running_var)
        self.activation = check_choice("activation", activation, (None, "relu", "leaky_relu"))
        self.negative_slope = check_number("negative_slope", negative_slope)
        self.dtype = check_dtype("dtype", dtype)
        self.frozen = False
        affine = check_flag("affine", affine)

        zeros, ones = np.zeros(self.num_features, self.dtype), np.ones(self.num_features, self.dtype)
        self.gamma = ones.copy() if affine else None
        self.beta = zeros.copy() if affine else None
        self.gamma_grad = zeros.copy() if affine else None
        self.beta_grad = zeros.copy() if affine else None
        self.running_mean, self.running_var = zeros, ones
        self._cache: Any = None

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return the normalized x, ``num_features`` long along ``axis``, of x's shape and memory order."""
        training = check_flag("training", training)
        x = check_array("x", x, self.dtype)
        axis = check_axis(self.axis, x.ndim)
        if x.shape[axis] != self.num_features:
            raise ValueError(f"x: expected {self.num_features} channels along axis {self.axis}, got shape {x.shape}")
        self._cache = None
        if not training:
            y: Array = self._functions.batch_norm_inference(
                x, self.running_mean, self.running_var, self.gamma, self.beta, axis=axis, eps=self.eps,
                activation=self.activation, negative_slope=self.negative_slope)
            return y
        y, self._cache = self._functions.batch_norm_forward(
            x, self.gamma, self.beta, self.running_mean, self.running_var, axis=axis, training=not self.frozen,
            momentum=self.momentum, eps=self.eps, unbiased_running_var=self.unbiased_running_var,
            activation=self.activation, negative_slope=self.negative_slope)
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return the gradient for x; overwrite `grads`."""
        cache = self._kept(self._cache)
        dx: Array
        dx, gamma_grad, beta_grad = self._functions.batch_norm_backward(dy, cache)
        if self.gamma_grad is not None and self.beta_grad is not None:
            self.gamma_grad[...] = gamma_grad
            self.beta_grad[...] = beta_grad
        return dx

    def set_statistics(self, moments: Any) -> None:
        """Replace the running averages by the statistics of all that ``moments`` has seen.

        Parameters
        ----------
        moments : fastnorm.Moments
            Count, mean and variance of the layer's *input* over a whole training set. The variance taken is the
            unbiased one if ``unbiased_running_var``, as in algorithm 2, step 10 of Ioffe and Szegedy.

        Raises
        ------
        TypeError
            If ``moments`` is of another kind.
        ValueError
            If it has another number of channels or too few values.

        Examples
        --------
        >>> import numpy as np
        >>> import fastnorm as fn
        >>> moments = fn.Moments()
        >>> moments.update(np.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> layer = fn.layers.BatchNorm(2)
        >>> layer.set_statistics(moments)
        >>> layer.running_mean, layer.running_var
        (array([2., 5.], dtype=float32), array([2., 0.], dtype=float32))
        """
        if not (hasattr(moments, "count") and hasattr(moments, "var")):  # mean of nothing is an error of its own
            raise TypeError(f"moments: expected a fastnorm.Moments, got {type(moments).__name__}")
        ddof = int(self.unbiased_running_var)
        if moments.count <= ddof:
            raise ValueError(f"moments: expected at least {ddof + 1} values per channel, got {moments.count}")
        mean, var = np.asarray(moments.mean), np.asarray(moments.var(ddof=ddof))
        if mean.shape != (self.num_features,):
            raise ValueError(f"moments: expected {self.num_features} channels, got mean of shape {mean.shape}")
        self.running_mean[...] = mean
        self.running_var[...] = var
