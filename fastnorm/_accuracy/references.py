"""What each kernel should give, and the unit that its error is counted in.

The formulas are computed in the dtype of the inputs that they are given: float64 stands for the exact result of a
float32 kernel, long double (64 bits of mantissa or more) for that of a float64 kernel. Nothing is rounded in between.

Each value comes with its scale: the error is counted in ulps of that magnitude. It is the value itself where nothing
cancels. Where the last operations are sums, it is the largest of their terms, because that is what rounding a term
costs; sums over a whole batch count with the sum of their terms' magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._arrays import Array
from .cases import ACTIVATIONS, EPS, MAX_NORM, UPDATES, Inputs, Update


class Exact(NamedTuple):
    """A result and its scale, of one shape."""

    value: Array
    scale: Array


Outputs = dict[str, Exact]


def _plain(value: Array) -> Exact:
    """A result that nothing cancels in."""
    return Exact(value, np.abs(value))


def _sum(*terms: Array) -> Exact:
    """A sum of a few terms."""
    value = np.asarray(sum(terms[1:], terms[0]))
    scale = np.abs(value)
    for term in terms:
        scale = np.maximum(scale, np.abs(term))
    return Exact(value, scale)


# -- batch norm --------------------------------------------------------------------------------------------------------


def _rows(x: Array) -> Array:
    """(N, C, ...) as (C, n): NumPy adds pairwise along contiguous rows only."""
    return np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(x.shape[1], -1)


def _unrows(rows: Array, like: Array) -> Array:
    shape = (like.shape[1], like.shape[0], *like.shape[2:])
    return np.moveaxis(rows.reshape(shape), 0, 1)


class _Statistics(NamedTuple):
    """Of each channel, shape (C, 1), and x less the mean, (C, n)."""

    mean: Array
    var: Array
    centered: Array


def _statistics(x: Array) -> _Statistics:
    """Around each channel's first value, so that nothing is lost however far the data lie from zero."""
    rows = _rows(x)
    first = rows[:, :1]
    centered = rows - first
    offset = centered.mean(1, keepdims=True)
    centered -= offset
    return _Statistics(first + offset, np.square(centered).mean(1, keepdims=True), centered)


def _normalized(a: Inputs, centered: Array, var: Array) -> Exact:
    """The result, gamma * centered / sqrt(var + eps) + beta. A standard deviation of it counts among the terms: the
    statistics' own rounding is in proportion to it, also for a value that happens to lie at the mean.
    """
    scale = a["gamma"][:, None] / np.sqrt(var + EPS)
    y = _sum(centered * scale, np.broadcast_to(a["beta"][:, None], centered.shape))
    return Exact(_unrows(y.value, a["x"]), _unrows(np.maximum(y.scale, np.abs(scale) * np.sqrt(var)), a["x"]))


def _eps(wide: np.dtype[Any]) -> float:
    """Of the dtype that `wide` gives the exact results for."""
    return float(np.finfo(np.float32 if wide == np.float64 else np.float64).eps)


def _moments(s: _Statistics, var: Array) -> Outputs:
    """The mean and this variance, which for constant data counts as the square of an ulp of the mean."""
    mean = Exact(s.mean[:, 0], np.maximum(np.abs(s.mean), np.sqrt(s.var))[:, 0])
    least = np.square(s.mean * _eps(s.mean.dtype))
    return {"mean": mean, "variance": Exact(var[:, 0], np.maximum(var, least)[:, 0])}


def batch_norm_forward(a: Inputs) -> Outputs:
    """Result, mean and unbiased variance of a training batch."""
    s = _statistics(a["x"])
    n = s.centered.shape[1]
    return {"y": _normalized(a, s.centered, s.var), **_moments(s, s.var * n / (n - 1))}


def batch_norm_inference(a: Inputs) -> Outputs:
    """With the running statistics."""
    centered = _rows(a["x"]) - a["running_mean"][:, None]
    return {"y": _normalized(a, centered, a["running_var"][:, None])}


def batch_norm_backward(a: Inputs) -> Outputs:
    """Gradients by x, gamma and beta."""
    s, dy = _statistics(a["x"]), _rows(a["dy"])
    inv_std = 1 / np.sqrt(s.var + EPS)
    xhat = s.centered * inv_std
    product = dy * xhat
    scale = a["gamma"][:, None] * inv_std
    terms = (dy, -dy.mean(1, keepdims=True), -xhat * product.mean(1, keepdims=True))
    # The two means round in proportion to the magnitudes that they are means of, and xhat to a standard deviation.
    sizes = (np.abs(dy), np.abs(dy).mean(1, keepdims=True),
             np.maximum(np.abs(xhat), np.sqrt(s.var) * inv_std) * np.abs(product).mean(1, keepdims=True))
    dx = (scale * (terms[0] + terms[1] + terms[2]),
          np.abs(scale) * np.maximum(np.maximum(sizes[0], sizes[1]), sizes[2]))
    return {"dx": Exact(*(_unrows(part, a["x"]) for part in dx)),
            "dgamma": Exact(product.sum(1), np.abs(product).sum(1)), "dbeta": Exact(dy.sum(1), np.abs(dy).sum(1))}


def moments(a: Inputs) -> Outputs:
    """Mean and biased variance."""
    s = _statistics(a["x"])
    return _moments(s, s.var)


# -- softmax, cross-entropy --------------------------------------------------------------------------------------------


def _log_parts(x: Array) -> tuple[Array, Array]:
    """The terms x - max(x) and log(sum(exp(x - max(x)))): by log1p, without the 1 that the largest logit adds to the
    sum, so that nothing is lost where the others add little to it.
    """
    largest = np.argmax(x, axis=1)[:, None]
    below = x - np.take_along_axis(x, largest, 1)
    e = np.exp(below)
    np.put_along_axis(e, largest, x.dtype.type(0), 1)
    return below, np.log1p(e.sum(1, keepdims=True))


def _logarithm(value: Array) -> Exact:
    """A logarithm of probabilities: near 0 it is what a double keeps of a sum of exponentials, of which one is 1. So
    its scale is where the dtype's ulp is that of float64 at 1, or more.
    """
    least = np.finfo(np.float64).eps / _eps(value.dtype)
    return Exact(value, np.maximum(np.abs(value), value.dtype.type(least)))


def softmax(a: Inputs) -> Outputs:
    """Probabilities."""
    below, log_sum = _log_parts(a["x"])
    return {"p": _plain(np.exp(below) / np.exp(log_sum))}


def log_softmax(a: Inputs) -> Outputs:
    """Their logarithms."""
    below, log_sum = _log_parts(a["x"])
    return {"log p": _logarithm(below - log_sum)}  # both terms are negative


def cross_entropy(a: Inputs) -> Outputs:
    """Loss of each row, their mean, and each row's gradient."""
    x, labels = a["x"], a["labels"][:, None]
    below, log_sum = _log_parts(x)
    losses = (log_sum - np.take_along_axis(below, labels, 1))[:, 0]
    p = np.exp(below) / np.exp(log_sum)
    hit = np.zeros_like(x)
    np.put_along_axis(hit, labels, 1, 1)
    return {"losses": _logarithm(losses), "mean loss": _logarithm(losses.mean(keepdims=True)),
            "gradient": _sum(p, -hit)}


# -- optimizers --------------------------------------------------------------------------------------------------------


class _Trajectory:
    """Values of a step, and the largest magnitude that any term of them had in all steps so far."""

    def __init__(self, start: Array) -> None:
        self.value, self.scale = start, np.abs(start)

    def set(self, *terms: Array) -> Array:
        """The sum of the terms."""
        step = _sum(*terms)
        self.value, self.scale = step.value, np.maximum(self.scale, step.scale)
        return self.value

    def exact(self) -> Exact:
        """Where the last step ended."""
        return Exact(self.value, self.scale)


DEFAULTS = {
    "momentum": {"dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    "adam": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False},
    "adagrad": {"lr": 1e-2, "eps": 1e-10},
}


def _momentum(o: dict[str, Any], t: int, g: Array, p: _Trajectory, v: _Trajectory) -> None:
    gain, decay = 1 - o["dampening"], o["weight_decay"] * p.value
    v.set(o["momentum"] * v.value, gain * g, gain * decay)
    g = g + decay
    p.set(p.value, -o["lr"] * (g + o["momentum"] * v.value if o["nesterov"] else v.value))


def _rmsprop(o: dict[str, Any], t: int, g: Array, p: _Trajectory, s: _Trajectory, m: _Trajectory | None = None,
             b: _Trajectory | None = None) -> None:
    variance = s.set(o["alpha"] * s.value, (1 - o["alpha"]) * g**2)
    if m is not None:
        variance = variance - m.set(o["alpha"] * m.value, (1 - o["alpha"]) * g) ** 2
    d = g / (np.sqrt(variance) + o["eps"])
    if b is not None:
        d = b.set(o["momentum"] * b.value, d)
    p.set(p.value, -o["lr"] * d)


def _adam(o: dict[str, Any], t: int, g: Array, p: _Trajectory, m: _Trajectory, v: _Trajectory,
          largest: _Trajectory | None = None) -> None:
    m.set(o["beta1"] * m.value, (1 - o["beta1"]) * g)
    square = v.set(o["beta2"] * v.value, (1 - o["beta2"]) * g**2)
    if largest is not None:
        square = largest.set(np.maximum(largest.value, square))
    one = p.value.dtype.type(1)
    correction1, correction2 = (-np.expm1(t * np.log(one * o[beta])) for beta in ("beta1", "beta2"))
    p.set((1 - one * o["lr"] * o["weight_decay"]) * p.value,
          -o["lr"] / correction1 * m.value / (np.sqrt(square / correction2) + o["eps"]))


def _adagrad(o: dict[str, Any], t: int, g: Array, p: _Trajectory, s: _Trajectory) -> None:
    s.set(s.value, g**2)
    p.set(p.value, -o["lr"] * g / (np.sqrt(s.value) + o["eps"]))


RULES: dict[str, Callable[..., None]] = {"momentum": _momentum, "rmsprop": _rmsprop, "adam": _adam, "adagrad": _adagrad}


def update(update: Update, a: Inputs) -> Outputs:
    """Parameters and state after all steps."""
    options = {**DEFAULTS[update.rule], **update.options}
    p = _Trajectory(a["params"])
    states = [_Trajectory(np.zeros_like(a["params"])) for _ in update.states]
    for t, g in enumerate(a["grads"], 1):
        RULES[update.rule](options, t, g, p, *states)
    return {"params": p.exact(), **{name: s.exact() for name, s in zip(update.states, states, strict=True)}}


def clip_by_norm(a: Inputs) -> Outputs:
    """Norm, and gradients scaled to a norm of MAX_NORM."""
    norm = np.sqrt(np.square(a["grads"]).sum(keepdims=True))
    factor = np.minimum(1, MAX_NORM / (norm + 1e-6))
    return {"norm": _plain(norm), "grads": _plain(a["grads"] * factor)}


# -- activations, exp --------------------------------------------------------------------------------------------------


def _exp(a: Inputs) -> Outputs:
    return {"exp": _plain(np.exp(a["x"]))}


def _activation(name: str, x: Array, factor: Array) -> Array:
    negative = np.minimum(x, 0)
    e = np.exp(-np.abs(x))
    formulas: dict[str, Callable[[], Array]] = {
        "relu": lambda: np.maximum(x, 0),
        "leaky_relu": lambda: np.where(x > 0, x, factor * x),
        "elu": lambda: np.where(x > 0, x, factor * np.expm1(negative)),
        "celu": lambda: np.where(x > 0, x, factor * np.expm1(negative / factor)),
        "sigmoid": lambda: np.where(x >= 0, 1, e) / (1 + e),
        "tanh": lambda: np.tanh(x)}
    return np.asarray(formulas[name]())


def _activation_slope(name: str, saved: Array, factor: Array) -> Array:
    """For sigmoid and tanh, `saved` is the output."""
    negative = np.minimum(saved, 0)
    formulas: dict[str, Callable[[], Array]] = {
        "relu": lambda: np.where(saved > 0, 1, 0),
        "leaky_relu": lambda: np.where(saved > 0, 1, factor),
        "elu": lambda: np.where(saved > 0, 1, factor * np.exp(negative)),
        "celu": lambda: np.where(saved > 0, 1, np.exp(negative / factor)),
        "sigmoid": lambda: saved * (1 - saved),
        "tanh": lambda: (1 - saved) * (1 + saved)}
    return np.asarray(formulas[name]())


def activation(name: str, backward: bool, a: Inputs) -> Outputs:
    """y, or dx."""
    factor = a["x"].dtype.type(next(iter(ACTIVATIONS[name].values()), 0))
    if backward:
        return {"dx": _plain(_activation_slope(name, a["saved"], factor) * a["dy"])}
    return {"y": _plain(_activation(name, a["x"], factor))}


# -- all ---------------------------------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[[Inputs], Outputs]] = {
    "exp": _exp, "batch norm forward": batch_norm_forward, "batch norm backward": batch_norm_backward,
    "batch norm inference": batch_norm_inference, "Moments": moments, "softmax": softmax, "log-softmax": log_softmax,
    "cross-entropy": cross_entropy, "clip by norm": clip_by_norm,
}


def exact(kernel: str, inputs: Inputs, wide: np.dtype[Any]) -> Outputs:
    """The kernel's results, computed in `wide` from the very inputs that it is given."""
    a = {name: value.astype(wide) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
         for name, value in inputs.items()}
    with np.errstate(all="ignore"):  # overflow, underflow and infinity are results here
        if kernel in KERNELS:
            return KERNELS[kernel](a)
        if kernel in UPDATES:
            return update(UPDATES[kernel], a)
        name, direction = kernel.split()
        return activation(name, direction == "backward", a)
