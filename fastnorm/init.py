"""Initial weights whose scale keeps the variance of the signal from layer to layer.

Fans, the numbers of inputs and outputs that one weight's unit is connected to, follow from the shape:

=========================================  ========================  =========================
shape of the weights                       fan_in                    fan_out
=========================================  ========================  =========================
``(in_features, out_features)``            in_features               out_features
``(out_channels, in_channels, *field)``    in_channels × ∏ field     out_channels × ∏ field
=========================================  ========================  =========================

So a 2-d shape is a dense kernel as `fastnorm.layers.Dense` stores it (``y = x @ W + b``, inputs first), and any longer
shape is a convolution kernel with its receptive field, as PyTorch stores it (outputs first). For a dense kernel stored
outputs first, as PyTorch does, draw the reversed shape and transpose.

Numbers are drawn in float64 and then rounded, so that float32 and float64 weights of one seed agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from ._arrays import Array, check_dtype, check_integer

__all__ = ["he_normal", "he_uniform", "lecun_normal", "lecun_uniform", "xavier_normal", "xavier_uniform"]

# A string, because touching np.random here would import it: 8 ms that only those who initialize need to pay.
Rng: TypeAlias = "np.random.Generator | int | None"


def _generator(rng: object) -> np.random.Generator:
    """The generator itself, one seeded by an integer, or one seeded by the operating system for None."""
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    try:
        seed = check_integer("rng", rng, 0)
    except TypeError:
        raise TypeError("rng: expected a numpy.random.Generator, an integer seed or None, "
                        f"got {type(rng).__name__}") from None
    return np.random.default_rng(seed)


def _fans(shape: Iterable[int]) -> tuple[tuple[int, ...], int, int]:
    """The checked shape, fan_in and fan_out."""
    if not isinstance(shape, Iterable):
        raise TypeError(f"shape: expected a sequence of integers, got {type(shape).__name__}")
    lengths = tuple(check_integer("shape", n, 1) for n in shape)
    if len(lengths) < 2:
        raise ValueError("shape: expected (fan_in, fan_out) or (out_channels, in_channels, *receptive_field), "
                         f"got {lengths}")
    if len(lengths) == 2:
        return lengths, lengths[0], lengths[1]
    receptive_field = math.prod(lengths[2:])
    return lengths, lengths[1] * receptive_field, lengths[0] * receptive_field


def _normal(shape: tuple[int, ...], variance: float, rng: Rng, dtype: DTypeLike) -> Array:
    wanted = check_dtype("dtype", dtype)
    return (_generator(rng).standard_normal(shape) * math.sqrt(variance)).astype(wanted, copy=False)


def _uniform(shape: tuple[int, ...], variance: float, rng: Rng, dtype: DTypeLike) -> Array:
    limit = math.sqrt(3 * variance)  # the variance of U(-limit, limit) is limit**2 / 3
    wanted = check_dtype("dtype", dtype)
    return _generator(rng).uniform(-limit, limit, shape).astype(wanted, copy=False)


def lecun_normal(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """LeCun's initialization, normal: mean 0, variance ``1 / fan_in``.

    Parameters
    ----------
    shape : sequence of int
        ``(fan_in, fan_out)`` of a dense kernel or ``(out_channels, in_channels, *receptive_field)`` of a convolution
        kernel.
    rng : numpy.random.Generator, int or None, optional
        Where the numbers come from: a generator (which advances), a seed, or None for fresh ones.
    dtype : dtype, default numpy.float32
        float32 or float64.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError
        If ``shape`` or ``rng`` is of another kind, or ``dtype`` is not float32 or float64.
    ValueError
        If ``shape`` has fewer than two lengths or one below 1, or the seed is negative.

    Notes
    -----
    LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, section 4.6.

    Examples
    --------
    >>> from fastnorm import init
    >>> weights = init.lecun_normal((400, 300), rng=0)
    >>> bool(abs(weights.std() - (1 / 400) ** 0.5) < 1e-3)
    True
    """
    shape, fan_in, _ = _fans(shape)
    return _normal(shape, 1 / fan_in, rng, dtype)


def lecun_uniform(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """LeCun's initialization, uniform in ±``sqrt(3 / fan_in)``: variance ``1 / fan_in``.

    Parameters
    ----------
    shape, rng, dtype
        As in `lecun_normal`.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError, ValueError
        As `lecun_normal`.

    Notes
    -----
    LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, section 4.6.

    Examples
    --------
    >>> from fastnorm import init
    >>> weights = init.lecun_uniform((300, 100), rng=0)
    >>> bool(abs(weights).max() <= 0.1)
    True
    """
    shape, fan_in, _ = _fans(shape)
    return _uniform(shape, 1 / fan_in, rng, dtype)


def xavier_normal(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """Xavier (Glorot) initialization, normal: mean 0, variance ``2 / (fan_in + fan_out)``.

    Parameters
    ----------
    shape, rng, dtype
        As in `lecun_normal`.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError, ValueError
        As `lecun_normal`.

    Notes
    -----
    Glorot and Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", 2010, equation 12.

    Examples
    --------
    >>> from fastnorm import init
    >>> weights = init.xavier_normal((300, 500), rng=0)
    >>> bool(abs(weights.std() - (2 / 800) ** 0.5) < 1e-3)
    True
    """
    shape, fan_in, fan_out = _fans(shape)
    return _normal(shape, 2 / (fan_in + fan_out), rng, dtype)


def xavier_uniform(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """Xavier (Glorot) initialization, uniform in ±``sqrt(6 / (fan_in + fan_out))``.

    Parameters
    ----------
    shape, rng, dtype
        As in `lecun_normal`.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError, ValueError
        As `lecun_normal`.

    Notes
    -----
    Glorot and Bengio, "Understanding the Difficulty of Training Deep Feedforward Neural Networks", 2010, equation 16.

    Examples
    --------
    >>> from fastnorm import init
    >>> weights = init.xavier_uniform((200, 400), rng=0)
    >>> bool(abs(weights).max() <= 0.1)
    True
    """
    shape, fan_in, fan_out = _fans(shape)
    return _uniform(shape, 2 / (fan_in + fan_out), rng, dtype)


def he_normal(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """He (Kaiming) initialization for ReLU, normal: mean 0, variance ``2 / fan_in``.

    Parameters
    ----------
    shape, rng, dtype
        As in `lecun_normal`.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError, ValueError
        As `lecun_normal`.

    Notes
    -----
    He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015, equation 10.

    Examples
    --------
    >>> from fastnorm import init
    >>> kernel = init.he_normal((64, 32, 3, 3), rng=0)
    >>> bool(abs(kernel.std() - (2 / (32 * 3 * 3)) ** 0.5) < 1e-3)
    True
    """
    shape, fan_in, _ = _fans(shape)
    return _normal(shape, 2 / fan_in, rng, dtype)


def he_uniform(shape: Iterable[int], rng: Rng = None, dtype: DTypeLike = np.float32) -> Array:
    """He (Kaiming) initialization for ReLU, uniform in ±``sqrt(6 / fan_in)``: variance ``2 / fan_in``.

    Parameters
    ----------
    shape, rng, dtype
        As in `lecun_normal`.

    Returns
    -------
    ndarray
        Of the given shape and dtype, in C order.

    Raises
    ------
    TypeError, ValueError
        As `lecun_normal`.

    Notes
    -----
    He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015, equation 10 (its variance).

    Examples
    --------
    >>> from fastnorm import init
    >>> weights = init.he_uniform((600, 10), rng=0)
    >>> bool(abs(weights).max() <= 0.1)
    True
    """
    shape, fan_in, _ = _fans(shape)
    return _uniform(shape, 2 / fan_in, rng, dtype)
