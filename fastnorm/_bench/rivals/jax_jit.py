"""JAX, compiled by `jax.jit` on the CPU. Optimizers donate their state, which is the JAX way to update in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..cases import (
    DROPOUT,
    FRESH,
    IN_PLACE,
    STATES,
    STEP,
    BatchNorm,
    Case,
    CrossEntropy,
    Elementwise,
    Inputs,
    Softmax,
    Update,
)
from ..measure import Call
from . import AbsentError, need

EPS, MOMENTUM, LR = 1e-5, 0.1, 1e-3


def load(threads: int) -> JAX:
    """JAX with a pool of so many threads."""
    return JAX(need("jax"), threads)


def _start(jax: Any, threads: int) -> None:
    """Start the CPU client; it makes a thread for each CPU that the process may use, so let it be so many."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        raise AbsentError("the number of its threads cannot be set on this system") from None
    try:
        os.sched_setaffinity(0, sorted(allowed)[:threads])
        jax.config.update("jax_enable_x64", True)  # float64 cases; float32 arrays stay float32
        jax.config.update("jax_platforms", "cpu")
        jax.jit(lambda x: x + 1)(np.ones(1 << 20, np.float32)).block_until_ready()
    finally:
        for task in Path("/proc/self/task").iterdir():  # its threads were born with the mask
            os.sched_setaffinity(int(task.name), allowed)


class JAX:
    """`jax.jit`."""

    name = "JAX"
    _started: int | None = None

    def __init__(self, jax: Any, threads: int) -> None:
        if JAX._started is None:
            _start(jax, threads)
            JAX._started = threads
        if JAX._started != threads:
            raise AbsentError(f"it runs on {JAX._started} threads in this process already")
        self.jax, self.threads, self.version = jax, threads, jax.__version__

    def calls(self, case: Case, inputs: Inputs) -> Iterator[Call]:
        """As `Rival.calls`."""
        makers: dict[type[Case], Callable[..., tuple[str, Callable[[], Any]]]] = {
            BatchNorm: _batch_norm, CrossEntropy: _cross_entropy, Softmax: _softmax, Update: _update,
            Elementwise: _elementwise}
        mode, run = makers[type(case)](self.jax, case, inputs)
        yield Call(self.name, mode, run, "jit", self.threads)


def _waiting(jax: Any, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    held = [jax.numpy.array(a) for a in arguments]
    return lambda: jax.block_until_ready(compiled(*held))


def _batch_norm(jax: Any, case: BatchNorm, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    np_ = jax.numpy
    x = inputs["x"]
    axes = tuple(i for i in range(x.ndim) if i != case.axis % x.ndim)
    shape = tuple(n if i not in axes else 1 for i, n in enumerate(x.shape))
    n = x.size // x.shape[case.axis]

    def finish(z: Any, residual: Any) -> Any:
        z = z if residual is None else z + residual
        return np_.maximum(z, 0) if case.activation else z

    def normalize(x: Any, mean: Any, inv_std: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        scale = inv_std * gamma
        return finish((x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape), residual)

    def forward(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any) -> Any:
        mean = np_.mean(x, axes)
        var = np_.maximum(np_.mean(x * x, axes) - mean * mean, 0)  # one pass: faster, less exact than the others
        inv_std = jax.lax.rsqrt(var + EPS)
        running = (1 - MOMENTUM) * running_mean + MOMENTUM * mean, (
            1 - MOMENTUM) * running_var + MOMENTUM * var * (n / (n - 1))
        return normalize(x, mean, inv_std, gamma, beta, residual), mean, inv_std, running

    def inference(x: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any, residual: Any) -> Any:
        return normalize(x, running_mean, jax.lax.rsqrt(running_var + EPS), gamma, beta, residual)

    def backward(dy: Any, x: Any, y: Any, gamma: Any, mean: Any, inv_std: Any) -> Any:
        dz = np_.where(y > 0, dy, 0) if case.activation else dy
        centered = x - mean.reshape(shape)
        dbeta, product = np_.sum(dz, axes), np_.sum(dz * centered, axes)
        dgamma = product * inv_std
        slope = (product * inv_std * inv_std / n).reshape(shape)
        dx = (inv_std * gamma).reshape(shape) * (dz - (dbeta / n).reshape(shape) - centered * slope)
        return (dx, dgamma, dbeta, dz) if case.residual else (dx, dgamma, dbeta)

    def both(dy: Any, x: Any, gamma: Any, *rest: Any) -> Any:
        y, mean, inv_std, running = forward(x, gamma, *rest)
        return *backward(dy, x, y, gamma, mean, inv_std), running

    residual = [] if inputs["residual"] is None else [inputs["residual"]]
    given = [inputs[name] for name in ("x", "gamma", "beta", "running_mean", "running_var")] + residual
    absent = [] if residual else [None]
    if case.what == "forward":
        return FRESH, _waiting(jax, lambda *a: forward(*a, *absent), *given)
    if case.what == "inference":
        return FRESH, _waiting(jax, lambda *a: inference(*a, *absent), *given)
    if case.what == "both":
        return FRESH, _waiting(jax, lambda *a: both(*a, *absent), inputs["dy"], *given)
    y, mean, inv_std, _ = jax.jit(lambda *a: forward(*a, *absent))(*given)
    return FRESH, _waiting(jax, backward, inputs["dy"], inputs["x"], y, inputs["gamma"], mean, inv_std)


def _softmax(jax: Any, case: Softmax, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    return FRESH, _waiting(jax, lambda x: jax.nn.softmax(x, case.axis), inputs["x"])


def _cross_entropy(jax: Any, case: CrossEntropy, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    np_ = jax.numpy

    def loss(x: Any, targets: Any) -> Any:
        log_p = jax.nn.log_softmax(x, case.axis)
        picked = np_.take_along_axis(log_p, np_.expand_dims(targets, case.axis), case.axis)
        return -np_.mean(picked)

    gradient = jax.value_and_grad(loss)
    return FRESH, _waiting(jax, lambda x, t: gradient(x, t)[::-1], inputs["x"], inputs["targets"].astype(np.int32))


def _rule(jax: Any, rule: str, p: Any, g: Any, *states: Any) -> Any:
    """One parameter and its states after the step."""
    np_ = jax.numpy
    if rule == "momentum":
        v = 0.9 * states[0] + g
        return p - LR * v, v
    if rule == "rmsprop":
        s = 0.99 * states[0] + 0.01 * g * g
        return p - LR * g / (np_.sqrt(s) + 1e-8), s
    if rule == "adagrad":
        s = states[0] + g * g
        return p - LR * g / (np_.sqrt(s) + 1e-10), s
    m, v = 0.9 * states[0] + 0.1 * g, 0.999 * states[1] + 0.001 * g * g
    corrected = np_.sqrt(v / (1 - 0.999**STEP)) + 1e-8
    return p - LR / (1 - 0.9**STEP) * m / corrected, m, v


def _update(jax: Any, case: Update, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    def step(grads: Any, lists: Any) -> Any:
        updated = [_rule(jax, case.rule, p, g, *states)
                   for g, p, *states in zip(grads, *lists, strict=True)]
        return [list(column) for column in zip(*updated, strict=True)]

    compiled = jax.jit(step, donate_argnums=1)
    held = [jax.numpy.array(g, copy=True) for g in inputs["grads"]]
    state = [[jax.numpy.array(a, copy=True) for a in inputs[name]] for name in ("params", *STATES[case.rule])]

    def run() -> Any:
        nonlocal state
        state = jax.block_until_ready(compiled(held, state))
        return state[0]

    return IN_PLACE, run


def _elementwise(jax: Any, case: Elementwise, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    np_, nn = jax.numpy, jax.nn
    forward: dict[str, Callable[[Any], Any]] = {
        "relu": nn.relu, "leaky_relu": nn.leaky_relu, "elu": nn.elu, "celu": nn.celu, "sigmoid": nn.sigmoid,
        "tanh": np_.tanh}
    backward: dict[str, Callable[[Any, Any], Any]] = {
        "relu": lambda dy, x: np_.where(x > 0, dy, 0), "leaky_relu": lambda dy, x: np_.where(x > 0, dy, 0.01 * dy),
        "elu": lambda dy, x: np_.where(x > 0, dy, dy * np_.exp(np_.minimum(x, 0))),
        "celu": lambda dy, x: np_.where(x > 0, dy, dy * np_.exp(np_.minimum(x, 0))),
        "sigmoid": lambda dy, y: dy * y * (1 - y), "tanh": lambda dy, y: dy * (1 - y * y)}
    x, saved, dy = inputs["x"], inputs["saved"], inputs["dy"]
    if case.function == "dropout":
        key = jax.random.key(1)  # the mask is drawn again in backward, as ours is: nothing is stored

        def dropped(a: Any) -> Any:
            return np_.where(jax.random.bernoulli(key, 1 - DROPOUT, a.shape), a / (1 - DROPOUT), 0)

        return FRESH, _waiting(jax, dropped, x if case.what == "forward" else dy)
    if case.what == "forward":
        return FRESH, _waiting(jax, forward[case.function], x)
    return FRESH, _waiting(jax, backward[case.function], dy, saved)
