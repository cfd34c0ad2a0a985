"""Which kernels are measured on which data, and what their inputs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import reference
from .._arrays import Array

Inputs = dict[str, Any]
Make = Callable[[np.random.Generator, np.dtype[Any]], Inputs]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
EPS, MAX_NORM = 1e-5, 1.0  # of batch norm, of clipping
MANY_ROWS = 10_000_000
BINADE = 1 << 23  # float32s of one sign and exponent


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of data in one dtype."""

    kernel: str
    data: str
    dtype: np.dtype[Any]
    make: Callable[[int], Inputs]
    chunks: int = 1  # of inputs, made and measured one after the other
    seeds: bool = False  # whether the chunks differ in their random numbers alone
    steps: int = 1  # of an optimizer

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return f"{self.kernel}, {self.data}, {self.dtype.name}"


@dataclass(frozen=True)
class Update:
    """An optimizer: the rule of `fastnorm.updates`, its state arrays, and its options."""

    rule: str
    states: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


_ADAM = ("exp_avgs", "exp_avg_sqs")
UPDATES = {
    "momentum": Update("momentum", ("velocities",), {"lr": 1e-2, "momentum": 0.9}),
    "Nesterov momentum, weight decay": Update(
        "momentum", ("velocities",), {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "RMSProp": Update("rmsprop", ("square_avgs",)),
    "RMSProp, centered, momentum": Update(
        "rmsprop", ("square_avgs", "grad_avgs", "momentum_buffers"), {"centered": True, "momentum": 0.9}),
    "Adam": Update("adam", _ADAM),
    "AdamW": Update("adam", _ADAM, {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "Adam, AMSGrad": Update("adam", (*_ADAM, "max_exp_avg_sqs"), {"amsgrad": True}),
    "Adagrad": Update("adagrad", ("state_sums",)),
}
# The largest error varies twofold from seed to seed: of centered RMSProp, where s - m**2 nearly vanishes in one
# element, and the last bits of the stored s and m are magnified without the unit growing; and of a few channels' sums.
SEEDED = ("RMSProp, centered, momentum", "batch norm forward", "batch norm backward", "batch norm inference", "Moments")
SEEDS = 9  # that these are measured with, but for those data that take seconds
ACTIVATIONS: dict[str, dict[str, float]] = {
    "relu": {}, "leaky_relu": {"negative_slope": 0.01}, "elu": {"alpha": 1.0}, "celu": {"alpha": 0.7},
    "sigmoid": {}, "tanh": {}}
FROM_OUTPUT = ("sigmoid", "tanh")  # whose backward takes the forward's output
FAR = {"mean 1e4 deviations from zero": 1e4, "mean 1e6 deviations from zero": 1e6}


# -- batch norm --------------------------------------------------------------------------------------------------------


def _far(deviations: float, shape: tuple[int, ...]) -> Callable[[np.random.Generator, np.dtype[Any]], Array]:
    """Values whose mean lies so many standard deviations from zero; each channel has a scale of its own."""

    def make(rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
        scale = np.exp(rng.normal(size=(shape[1], *(1 for _ in shape[2:]))))
        return np.asarray((rng.normal(size=shape) + deviations) * scale).astype(dtype)

    return make


def _outlier(rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    x = rng.normal(size=(4096, 16))
    x[1234] = 1e6
    return x.astype(dtype)


def _constant(rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    return np.repeat((10.0 ** rng.uniform(-4, 6, (1, 64))).astype(dtype), 1000, 0)


def _denormal(rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    return np.asarray(rng.normal(size=(4096, 16)) * float(np.finfo(dtype).tiny / 8)).astype(dtype)


def _norm_data(quick: bool) -> Iterator[tuple[str, Callable[[np.random.Generator, np.dtype[Any]], Array]]]:
    yield "ordinary, (1024, 64)", _far(0, (1024, 64))
    yield "ordinary, (16, 32, 28, 28)", _far(0, (4, 32, 28, 28) if quick else (16, 32, 28, 28))
    yield "ordinary, (64, 32, 7, 7)", _far(0, (64, 32, 7, 7))
    for name, deviations in FAR.items():
        yield name, _far(deviations, (4096, 16))
    yield "one outlier of 1e6", _outlier
    yield "constant channels", _constant
    yield "denormals", _denormal


def _norm_inputs(make_x: Callable[[np.random.Generator, np.dtype[Any]], Array]) -> Make:
    def make(rng: np.random.Generator, dtype: np.dtype[Any]) -> Inputs:
        x = make_x(rng, dtype)
        others = tuple(i for i in range(x.ndim) if i != 1)
        wide = x.astype(np.float64)
        gamma, beta = rng.uniform(0.5, 2, x.shape[1]), rng.normal(size=x.shape[1])
        # As training leaves them: near the batch's own. Variance 0 stays above 0, as a running average does.
        running_mean = wide.mean(others) + 0.1 * wide.std(others) * rng.normal(size=x.shape[1])
        running_var = np.maximum(wide.var(others) * rng.uniform(0.8, 1.2, x.shape[1]), float(np.finfo(dtype).tiny))
        vectors: dict[str, Any] = {
            "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
        return {"x": x, "dy": np.asarray(rng.normal(size=x.shape)).astype(dtype),
                **{name: v.astype(dtype) for name, v in vectors.items()}}

    return make


# -- softmax, cross-entropy --------------------------------------------------------------------------------------------


def _logits(make_x: Callable[[np.random.Generator, np.dtype[Any]], Array]) -> Make:
    def make(rng: np.random.Generator, dtype: np.dtype[Any]) -> Inputs:
        x = make_x(rng, dtype).astype(dtype)
        return {"x": x, "labels": rng.integers(0, x.shape[1], len(x))}

    return make


def _softmax_data(quick: bool) -> Iterator[tuple[str, Callable[[np.random.Generator, np.dtype[Any]], Array]]]:
    rows, many = (64, 2) if quick else (512, 16)
    yield "ordinary, 1000 classes", lambda rng, dtype: rng.normal(size=(rows, 1000)) * 4
    yield "ordinary, 10 classes", lambda rng, dtype: rng.normal(size=(8 * rows, 10)) * 2
    yield "logits of ±1e4", lambda rng, dtype: rng.uniform(-1e4, 1e4, (rows, 100)).round(1)
    yield "logits of ±3e38", lambda rng, dtype: rng.choice([-3e38, 0, 1.5e38, 3e38], (rows, 100))
    yield "100,000 classes", lambda rng, dtype: rng.normal(size=(many, 100_000)) * 4
    yield "probabilities that underflow", lambda rng, dtype: rng.uniform(
        110 * (np.log2(float(np.finfo(dtype).tiny)) / 126), 0, (rows, 200))
    yield "equal logits", lambda rng, dtype: np.repeat(rng.normal(size=(rows, 1)) * 100, 300, 1)
    yield "denormal logits", lambda rng, dtype: rng.normal(size=(rows, 100)) * float(np.finfo(dtype).tiny / 8)


# -- optimizers --------------------------------------------------------------------------------------------------------


def _steps(quick: bool) -> int:
    return 10 if quick else 50


def _update_data(quick: bool) -> Iterator[tuple[str, Make]]:
    steps, n = _steps(quick), 2048 if quick else 20_000

    def trajectory(change: Callable[[Array, np.dtype[Any]], Array]) -> Make:
        def make(rng: np.random.Generator, dtype: np.dtype[Any]) -> Inputs:
            grads = change(rng.normal(size=(steps, n)), dtype)
            return {"params": rng.normal(size=n).astype(dtype), "grads": grads.astype(dtype)}

        return make

    def outlier(grads: Array, dtype: np.dtype[Any]) -> Array:
        grads[steps // 2] *= 1e6
        return grads

    yield "ordinary", trajectory(lambda grads, dtype: grads)
    yield "one outlier of 1e6", trajectory(outlier)
    yield "squares that are denormal", trajectory(
        lambda grads, dtype: grads * np.sqrt(float(np.finfo(dtype).tiny)) / 4)
    yield "steady gradients", trajectory(lambda grads, dtype: grads[:1] * (1 + 1e-3 * grads))


def _clip_data(quick: bool) -> Iterator[tuple[str, Make]]:
    def gradients(scale: Callable[[np.dtype[Any]], float]) -> Make:
        n = 10_000 if quick else 1_000_000
        return lambda rng, dtype: {"grads": (rng.normal(size=n) * scale(dtype)).astype(dtype)}

    yield "ordinary", gradients(lambda dtype: 1.0)
    yield "squares that overflow float32", gradients(lambda dtype: 1e30)
    yield "denormals", gradients(lambda dtype: float(np.finfo(dtype).tiny / 8))


# -- activations, exp --------------------------------------------------------------------------------------------------


def _activation_data(name: str, quick: bool) -> Iterator[tuple[str, Make]]:
    n = 20_000 if quick else 300_000

    def pairs(make_x: Callable[[np.random.Generator, np.dtype[Any]], Array]) -> Make:
        def make(rng: np.random.Generator, dtype: np.dtype[Any]) -> Inputs:
            x = make_x(rng, dtype).astype(dtype)
            # What the backward takes: the rounded output, which is its exact input.
            saved = getattr(reference, name)(x) if name in FROM_OUTPUT else x
            return {"x": x, "dy": rng.normal(size=n).astype(dtype), "saved": saved}

        return make

    def every_exponent(rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
        info = np.finfo(dtype)
        return np.ldexp(rng.uniform(-1, 1, n), rng.integers(info.minexp - info.nmant, info.maxexp, n))

    yield "ordinary", pairs(lambda rng, dtype: rng.normal(size=n) * 3)
    yield "every exponent, denormals too", pairs(every_exponent)
    yield "tails", pairs(lambda rng, dtype: rng.uniform(-1, 1, n) * (760 if dtype == FLOAT64 else 110))


def _exp_sample(rng: np.random.Generator, dtype: np.dtype[Any], quick: bool) -> Array:
    """Evenly spaced bit patterns x <= 0, and evenly spaced numbers where the result is neither 0 nor 1."""
    n = 1 << (16 if quick else 21)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    last = int(np.array(-np.inf, dtype).view(unsigned))
    first = int(np.array(-0.0, dtype).view(unsigned))
    bits = np.arange(n, dtype=np.uint64) * np.uint64((last - first) // n) + np.uint64(first)
    return np.concatenate([bits.astype(unsigned).view(dtype),
                           (rng.uniform(-760 if dtype == FLOAT64 else -110, 0, n)).astype(dtype)])


def _binade(number: int) -> Inputs:
    """All float32s x <= 0 of one exponent."""
    return {"x": (np.arange(BINADE, dtype=np.uint32) + np.uint32((1 << 31) + number * BINADE)).view(np.float32)}


# -- all ---------------------------------------------------------------------------------------------------------------


def _families(quick: bool) -> Iterator[tuple[str, str, Make]]:
    rows = 100_000 if quick else MANY_ROWS
    sums = ("batch norm forward", "batch norm backward", "Moments")
    for data, make_x in _norm_data(quick):
        for kernel in (*sums, "batch norm inference"):
            yield kernel, data, _norm_inputs(make_x)
    for kernel in sums:
        yield kernel, f"{rows:,} rows in one column", _norm_inputs(_far(0, (rows, 1)))
    for data, make_x in _softmax_data(quick):
        for kernel in ("softmax", "log-softmax", "cross-entropy"):
            yield kernel, data, _logits(make_x)
    for kernel in UPDATES:
        for data, make in _update_data(quick):
            yield kernel, data, make
    for data, make in _clip_data(quick):
        yield "clip by norm", data, make
    for name in ACTIVATIONS:
        for data, make in _activation_data(name, quick):
            yield f"{name} forward", data, make
            yield f"{name} backward", data, make


def _seeded(number: int, make: Make, dtype: np.dtype[Any]) -> Callable[[int], Inputs]:
    return lambda chunk: make(np.random.default_rng([20261120, number, *([chunk] if chunk else [])]), dtype)


def every(quick: bool, exhaustive: bool) -> list[Case]:
    """All cases, kernel by kernel."""
    cases = []
    for dtype in (FLOAT32, FLOAT64):
        if exhaustive and dtype == FLOAT32:
            cases.append(Case("exp", "every finite x <= 0", dtype, _binade, 255))
        else:
            cases.append(Case("exp", "x <= 0, a dense sample", dtype, _seeded(
                0, lambda rng, dtype: {"x": _exp_sample(rng, dtype, quick)}, dtype)))
    for number, (kernel, data, make) in enumerate(_families(quick)):
        seeds = kernel in SEEDED and not data.startswith(f"{MANY_ROWS:,}")
        cases += [Case(kernel, data, dtype, _seeded(number, make, dtype), SEEDS if seeds else 1, seeds,
                       _steps(quick) if kernel in UPDATES else 1) for dtype in (FLOAT32, FLOAT64)]
    order = list(dict.fromkeys(case.kernel for case in cases))
    return sorted(cases, key=lambda case: order.index(case.kernel))
