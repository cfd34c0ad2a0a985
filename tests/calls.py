"""Every public kernel as one call on the same arrays, for the tests of threads, processes and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastnorm as fn


class Arrays(NamedTuple):
    """What calls work on: arrays of one shape, channels (classes) along axis 1, and vectors of one value a channel."""

    x: np.ndarray[Any, Any]
    g: np.ndarray[Any, Any]
    states: tuple[np.ndarray[Any, Any], ...]  # three like x, not negative
    vectors: tuple[np.ndarray[Any, Any], ...]  # four of shape (C,), positive
    labels: np.ndarray[Any, Any]  # of x's shape without axis 1


class Call(NamedTuple):
    """A public function: `run` returns all that it computed; `writes` names the arrays that it updates in place."""

    run: Callable[[Arrays], list[Any]]
    writes: tuple[str, ...] = ()


def make(shape, dtype, seed=0):
    """Arrays of this shape and dtype."""
    rng = np.random.default_rng(seed)
    x, g, *states = (rng.standard_normal(shape).astype(dtype) for _ in range(5))
    vectors = tuple(rng.uniform(0.5, 1.5, shape[1]).astype(dtype) for _ in range(4))
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    return Arrays(x, g, tuple(np.abs(state) for state in states), vectors, labels)


def flat(arrays):
    """All arrays, one after another."""
    return [arrays.x, arrays.g, *arrays.states, *arrays.vectors, arrays.labels]


def rebuild(arrays, change):
    """Arrays with `change` applied to each of floating point."""
    return Arrays(change(arrays.x), change(arrays.g), tuple(map(change, arrays.states)),
                  tuple(map(change, arrays.vectors)), arrays.labels)


def private(call, arrays):
    """The same arrays, with copies of those that the call writes."""
    copies = {name: tuple(a.copy() for a in getattr(arrays, name)) if name != "x" else arrays.x.copy()
              for name in call.writes}
    return arrays._replace(**copies)


def to_bytes(results):
    """The bits of all results, to compare."""
    return [np.asarray(result).tobytes() for result in results]


def _forward(a):
    gamma, beta, mean, var = a.vectors
    y, cache = fn.batch_norm_forward(a.x, gamma, beta, mean, var, activation="relu")
    return [y, mean, var, cache.table[:4], cache.wide_table]


def _backward(a):
    gamma, beta = a.vectors[:2]
    _, cache = fn.batch_norm_forward(a.x, gamma, beta, activation="leaky_relu", residual=a.states[0])
    return list(fn.batch_norm_backward(a.g, cache))


def _inference(a):
    gamma, beta, mean, var = a.vectors
    return [fn.batch_norm_inference(a.x, mean, var, gamma, beta)]


def _moments(a):
    m = fn.Moments(axis=1)
    m.update(a.x)
    m.update(a.g)
    return [m.mean, m.var(), m.standardize(a.x)]


def _momentum(a):
    fn.momentum_step(a.x, a.g, a.states[0], lr=0.1, weight_decay=0.01, nesterov=True)
    return [a.x, a.states[0]]


def _rmsprop(a):
    fn.rmsprop_step(a.x, a.g, a.states[0], momentum=0.9, momentum_buffers=a.states[1], centered=True,
                    grad_avgs=a.states[2])
    return [a.x, *a.states]


def _adam(a):
    fn.adam_step(a.x, a.g, a.states[0], a.states[1], step=3, amsgrad=True, max_exp_avg_sqs=a.states[2])
    return [a.x, *a.states]


def _adagrad(a):
    fn.adagrad_step(a.x, a.g, a.states[0], step=2)
    return [a.x, a.states[0]]


def _clip(a):
    return [fn.clip_grad_norm([a.x, *a.states], 1.0), a.x, *a.states]


def _activation(name, saved):
    forward, backward = getattr(fn, name), getattr(fn, f"{name}_backward")
    return {name: Call(lambda a: [forward(a.x)]),
            f"{name}_backward": Call(lambda a: [backward(a.g, getattr(a, saved))])}


CALLS = {
    "batch_norm_forward": Call(_forward, ("vectors",)),
    "batch_norm_backward": Call(_backward),
    "batch_norm_inference": Call(_inference),
    "softmax": Call(lambda a: [fn.softmax(a.x, axis=1)]),
    "log_softmax": Call(lambda a: [fn.log_softmax(a.x, axis=1)]),
    "softmax_cross_entropy": Call(lambda a: list(fn.softmax_cross_entropy(
        a.x, a.labels, axis=1, weight=a.vectors[0], ignore_index=0, label_smoothing=0.1))),
    "Moments": Call(_moments),
    "momentum_step": Call(_momentum, ("x", "states")),
    "rmsprop_step": Call(_rmsprop, ("x", "states")),
    "adam_step": Call(_adam, ("x", "states")),
    "adagrad_step": Call(_adagrad, ("x", "states")),
    "clip_grad_norm": Call(_clip, ("x", "states")),
    "dropout": Call(lambda a: [fn.dropout(a.x, 0.4, seed=1, offset=2)]),
    "dropout_backward": Call(lambda a: [fn.dropout_backward(a.g, 0.4, seed=1, offset=2)]),
    **_activation("relu", "x"), **_activation("leaky_relu", "x"), **_activation("elu", "x"),
    **_activation("celu", "x"), **_activation("sigmoid", "x"), **_activation("tanh", "x"),
}
