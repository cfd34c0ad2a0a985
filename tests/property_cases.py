"""What the property tests call: for each public function its right calls, and how far its results may err.

Errors are derived: each formula is written once more in the numbers of `bounds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from bounds import Arithmetic, Bounded
from hypothesis import strategies as st
from strategies import ODD_OPTIONS, READ_LAYOUTS, WRITTEN_LAYOUTS, Plan, shapes

import fastnorm as fn
from fastnorm import reference

DOUBLE = Arithmetic.of(np.float64)
Arguments = dict[str, Any]
Errors = dict[str, Any]  # by name of a result or of an argument that is written: the bound on its error


class Function(NamedTuple):
    """A function to call: its right calls, what a call writes, and how far its results may err."""

    name: str
    calls: st.SearchStrategy[Arguments]
    errors: Callable[[Arguments], Errors]  # of the arguments before the call; by name of the argument or result
    written: tuple[str, ...] = ("out",)
    results: tuple[str, ...] = ("result",)
    call: Callable[[Any, Arguments], Any] | None = None  # with which module; by default, the function of this name

    def __call__(self, module: Any, arguments: Arguments) -> Any:
        if self.call is not None:
            return self.call(module, arguments)
        return getattr(module, self.name)(**arguments)


# -- arguments ---------------------------------------------------------------------------------------------------------

DTYPES = ["float32", "float32", "float64"]
KINDS = ["normal", "normal", "normal", "whole", "special", "shifted", "large", "small", "subnormal", "zero"]


class Drawn:
    """What the plans of one call have in common, and plans made of it.

    A draw costs Hypothesis more than most calls take, so that what a call is about is drawn one by one, and all the
    rest (layouts, options, which arguments are there) at once: bytes, read as a number of mixed radix.
    """

    def __init__(self, draw: st.DrawFn, *, minimum_rank: int = 0) -> None:
        self.shape, self.dtype, self.kind = draw(CALL[minimum_rank])
        self.rest = int.from_bytes(draw(DETAILS), "little")
        self.start = self.number(4_000)

    def number(self, n: int) -> int:
        """A number below n."""
        self.rest, digit = divmod(self.rest, n)
        return digit

    def one_of(self, *choices: Any) -> Any:
        return choices[self.number(len(choices))]

    def plan(self, shape: tuple[int, ...] | None = None, *, written: bool = False, **changes: Any) -> Plan:
        """An array of the call's dtype, kind and shape unless told otherwise."""
        self.start += 997  # another part of the pool for each array
        layout = self.one_of(*(WRITTEN_LAYOUTS if written else READ_LAYOUTS))
        plan = Plan(self.shape if shape is None else shape, self.dtype, self.kind, start=self.start, layout=layout)
        return plan._replace(**changes) if changes else plan

    def maybe(self, *args: Any, **changes: Any) -> Plan | None:
        """A plan, or None as often."""
        return self.plan(*args, **changes) if self.one_of(False, True) else None

    def out(self) -> Arguments:
        """An output, in a third of the calls."""
        return {"out": self.plan(written=True, kind="normal")} if self.one_of(False, False, True) else {}

    def axis(self) -> int:
        rank = max(len(self.shape), 1)
        return self.number(2 * rank) - rank


CALL = {rank: st.tuples(shapes(minimum_rank=rank), st.sampled_from(DTYPES), st.sampled_from(KINDS)) for rank in (0, 1)}
DETAILS = st.binary(min_size=16, max_size=16)


def exact(value: np.ndarray) -> Bounded:
    """An argument: known to the last bit."""
    return Bounded(value, Arithmetic.of(value.dtype))


# -- activations -------------------------------------------------------------------------------------------------------

FACTORS = {"leaky_relu": "negative_slope", "elu": "alpha", "celu": "alpha"}
FACTOR_VALUES = (0.01, 1.0, 0.3, 2.5, 1e-3, 100.0)


@st.composite
def activation_calls(draw: st.DrawFn, name: str, saved: str) -> Arguments:
    """Arguments of an activation, or of its backward if it takes what was ``saved``."""
    d = Drawn(draw)
    plain = d.plan(kind="unit") if saved == "y" else d.plan()
    arguments: Arguments = {"dy": d.plan(), saved: plain} if saved else {"x": plain}
    if name in FACTORS and d.one_of(False, True):
        arguments[FACTORS[name]] = d.one_of(*FACTOR_VALUES, *((0.0,) if name != "celu" else ()))
    return arguments | d.out()


def expm1(x: Bounded) -> Bounded:
    """To within the kernels' 2 ulp; below -800 it is -1 whatever the error of x."""
    x = Bounded(x.value, x.arithmetic, np.where(x.value < -800, 0.0, x.error))
    return x.apply(np.expm1(x.value), np.exp(x.value + x.error), ulps=2)


def activation_error(name: str, arguments: Arguments) -> Bounded:
    x = exact(arguments["x"])
    factor = arguments.get(FACTORS.get(name), {"leaky_relu": 0.01}.get(name, 1.0))
    negative = Bounded(np.minimum(x.value, 0), x.arithmetic)
    if name in ("relu", "leaky_relu"):
        return x.where(x.value > 0, x * factor if name == "leaky_relu" else 0.0)
    if name in ("elu", "celu"):
        return x.where(x.value > 0, factor * expm1(negative / factor if name == "celu" else negative))
    value = reference.sigmoid(x.value) if name == "sigmoid" else np.tanh(x.value)
    return x.apply(value, 0.0, ulps=4)  # exp or expm1 to 2 ulp, a sum and a quotient of it


def gradient_error(name: str, arguments: Arguments) -> Bounded:
    dy = exact(arguments["dy"])
    if "y" in arguments:
        y = exact(arguments["y"])
        return dy * (1 - y) * (y if name == "sigmoid" else 1 + y)
    x = exact(arguments["x"])
    factor = arguments.get(FACTORS.get(name), {"leaky_relu": 0.01}.get(name, 1.0))
    if name in ("relu", "leaky_relu"):
        return dy.where(x.value > 0, dy * factor if name == "leaky_relu" else 0.0)
    negative = Bounded(np.minimum(x.value, 0), x.arithmetic)
    slope = (negative / factor).exp() if name == "celu" else factor * negative.exp()
    return dy.where(x.value > 0, dy * slope)


def returned(error: Callable[[Arguments], Any]) -> Callable[[Arguments], Errors]:
    """Errors of a function with one result, returned and also in ``out`` if that is given."""
    def errors(arguments: Arguments) -> Errors:
        bound = error(arguments)
        return {"result": bound, "out": bound}
    return errors


def activations() -> list[Function]:
    functions = []
    for name in ("relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh"):
        saved = "y" if name in ("sigmoid", "tanh") else "x"
        functions += [
            Function(name, activation_calls(name, ""), returned(lambda a, name=name: activation_error(name, a))),
            Function(name + "_backward", activation_calls(name, saved),
                     returned(lambda a, name=name: gradient_error(name, a)))]
    return functions


@st.composite
def dropout_calls(draw: st.DrawFn, name: str) -> Arguments:
    d = Drawn(draw)
    return {name: d.plan(), "p": d.one_of(0.5, 0.0, 0.1, 0.99, 1.0, 1e-10, 1 - 2.0**-53),
            "seed": d.one_of(0, 1, 7, 2**64 - 1, 12345), "offset": d.one_of(0, 1, 2**33, 2**64 - 1)} | d.out()


def dropout_error(arguments: Arguments) -> Bounded:
    x = exact(arguments["x"] if "x" in arguments else arguments["dy"])
    return x / (1 - arguments["p"]) if arguments["p"] < 1 else x * 0.0


# -- softmax and cross-entropy -----------------------------------------------------------------------------------------


@st.composite
def softmax_calls(draw: st.DrawFn) -> Arguments:
    d = Drawn(draw, minimum_rank=1)
    return {"x": d.plan(), "axis": d.axis()} | d.out()


def log_and_sum(x: np.ndarray, axis: int) -> tuple[Bounded, Bounded, Bounded]:
    """x - max, its exponential, and the sum along the axis (in float64 one by one where classes are not contiguous)."""
    logits = exact(x)
    centered = logits - Bounded(logits.value.max(axis, keepdims=True), logits.arithmetic)
    e = centered.exp()
    return centered, e, e.sum(axis, chain=x.shape[axis])


def softmax_error(arguments: Arguments) -> Bounded:
    _, e, total = log_and_sum(arguments["x"], arguments["axis"])
    return e / total


def log_softmax_error(arguments: Arguments) -> Bounded:
    centered, _, total = log_and_sum(arguments["x"], arguments["axis"])
    return centered - total.log()


LABEL_DTYPES = ["int64", "int32", "int8", "uint8", "uint64", "int16"]


@st.composite
def cross_entropy_calls(draw: st.DrawFn) -> Arguments:
    d = Drawn(draw, minimum_rank=1)
    axis = d.axis()
    classes = d.shape[axis]
    if d.one_of(False, True):
        targets = d.plan(kind=d.one_of("normal", "unit", "whole", d.kind), positive=d.one_of(True, True, False))
    else:
        rows = tuple(n for i, n in enumerate(d.shape) if i != axis % len(d.shape))
        targets = d.plan(rows, dtype=d.one_of(*LABEL_DTYPES), classes=max(classes, 1),
                         kind=d.one_of(*["valid"] * 9, "invalid"))
    return {"logits": d.plan(), "targets": targets, "axis": axis,
            "weight": d.maybe((classes,), kind=d.one_of("normal", d.kind), positive=d.one_of(True, True, False)),
            "ignore_index": d.one_of(-100, -100, 0, 1, 2**63, -2**70), "label_smoothing": d.one_of(0.0, 0.1, 1.0, 0.5),
            "reduction": d.one_of("mean", "sum", "none")} | d.out()


def cross_entropy_errors(arguments: Arguments) -> Errors:
    logits, targets, axis, smoothing = (arguments[k] for k in ("logits", "targets", "axis", "label_smoothing"))
    x = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
    classes = x.shape[-1]
    centered, e, total = log_and_sum(x, -1)
    log_p, p = centered - total.log(), e / total
    given = arguments["weight"]
    w = exact(np.ones(classes, x.dtype) if given is None else given)
    if targets.dtype.kind == "f":
        kept, divisor = np.ones(x.shape[:-1], bool), Bounded(float(x[..., 0].size), DOUBLE)
        q = ((1 - smoothing) * exact(np.moveaxis(targets, axis, -1)) + smoothing / classes) * w
    else:
        kept = targets != arguments["ignore_index"]
        y = np.where(kept, targets, 0).astype(np.int64)[..., None]
        of_label = w.lift(w.value[y])
        q = smoothing / classes * w + ((1 - smoothing) * of_label).where(np.arange(classes) == y, 0.0)
        divisor = Bounded(np.where(kept, of_label.value[..., 0], 0.0), DOUBLE).sum(None, chain=x.size)
    terms = (-log_p * q).where((q.value != 0) | (log_p.value != -np.inf), 0.0)
    losses = terms.sum(-1, chain=classes).where(kept[..., None], 0.0)
    gradient = (p * q.sum(-1, chain=classes) - q).where(kept[..., None], 0.0)
    if arguments["reduction"] == "mean":
        losses, gradient = losses / divisor.value.sum(), gradient / divisor.value.sum()
    loss = losses.error[..., 0] if arguments["reduction"] == "none" else losses.sum(None, chain=1).error.reshape(())
    by_class = np.moveaxis(np.broadcast_to(gradient.error, x.shape), -1, axis)
    return {"losses": loss, "dlogits": by_class, "out": by_class}


# -- batch norm --------------------------------------------------------------------------------------------------------

VECTORS = ("gamma", "beta", "running_mean", "running_var")


@st.composite
def batch_norm_calls(draw: st.DrawFn, *, training: bool, backward: bool = False) -> Arguments:
    """Arguments of the forward in training or with given statistics; with ``backward``, ``dy`` and its ``out`` too."""
    d = Drawn(draw, minimum_rank=1)
    axis = d.axis()
    channels = (d.shape[axis],)
    with_statistics = not training or (not backward and d.one_of(False, True))  # backward's forward shall write nothing
    vector_kind = d.one_of("normal", "normal", "whole", "special")
    arguments: Arguments = {"x": d.plan()}
    for name in VECTORS:
        is_statistic = name.startswith("running")
        present = with_statistics if is_statistic else d.one_of(False, True)
        arguments[name] = d.plan(channels, kind=vector_kind, positive=name == "running_var",
                                 written=training and is_statistic) if present else None
    arguments |= {"axis": axis, "eps": d.one_of(1e-5, 1e-3, 0.0, 1.0), "residual": d.maybe(),
                  "activation": d.one_of(None, "relu", "leaky_relu"), "negative_slope": d.one_of(0.01, 0.3, -0.5, 0.0)}
    if backward:
        arguments |= {"_training": training, "dy": d.plan(kind=d.one_of("normal", d.kind))}
    elif training:
        arguments |= {"momentum": d.one_of(0.1, 0.0, 1.0, 0.3), "unbiased_running_var": d.one_of(False, True)}
    return arguments | d.out()


def statistics(x: np.ndarray, axis: int) -> tuple[Bounded, Bounded]:
    """Mean and variance of each channel, shaped to broadcast.

    The kernels add at most 64 deviations from a pivot in a row before they go on in float64. The pivot lies within two
    standard deviations of the mean, so that deviations are 3 of them and their squares 5 variances on average. In
    float32 the mean travels as two numbers.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    mean, var = (a.reshape(shape) for a in reference.norm.mean_and_variance(x, axis % x.ndim))
    unit = 64 * Arithmetic.of(x.dtype).unit
    kept = 2.0**-46 if x.dtype == np.float32 else 2.0**-51
    mean_error = unit * 3 * np.sqrt(var) + kept * np.abs(mean)
    return (Bounded(mean, DOUBLE, np.where(np.isfinite(mean), mean_error, 0.0)),
            Bounded(var, DOUBLE, np.where(np.isfinite(var), 5 * unit * var + mean_error**2 * (var > 0), 0.0)))


def normalization(a: Arguments, *, training: bool) -> tuple[Bounded, Bounded, Bounded, Bounded]:
    """x - mean, 1 / std, gamma / std, and the pre-activation."""
    x, axis = exact(a["x"]), a["axis"]
    shape = [1] * a["x"].ndim
    shape[axis] = -1
    vectors = {name: None if a[name] is None else exact(a[name].reshape(shape)) for name in VECTORS}
    mean, var = statistics(a["x"], axis) if training else (vectors["running_mean"], vectors["running_var"])
    inv_std = 1 / (Bounded(var.value, DOUBLE, var.error) + a["eps"]).sqrt()
    scale = inv_std if vectors["gamma"] is None else inv_std * vectors["gamma"]
    centered = x - mean
    z = centered * scale.to(x.arithmetic)
    for term in (vectors["beta"], None if a["residual"] is None else exact(a["residual"])):
        z = z if term is None else z + term
    return centered, inv_std, scale, z


def activated(z: Bounded, passed: Bounded, a: Arguments) -> Bounded:
    """What passes, z itself or its gradient, behind the fused activation; either branch where z may be 0."""
    if a["activation"] is None:
        return passed
    negative = passed * a["negative_slope"] if a["activation"] == "leaky_relu" else 0.0  # not slope 0: 0 * inf is NaN
    return passed.where(~(z.value <= 0), negative, uncertain=np.abs(z.value) <= z.error)


def forward_errors(a: Arguments, *, training: bool) -> Errors:
    z = normalization(a, training=training)[3]
    y = activated(z, z, a)
    errors: Errors = {"result": y, "out": y}
    if training and a["running_mean"] is not None:
        n = a["x"].size // a["x"].shape[a["axis"]] if a["x"].size else 2
        unbiased = n / (n - 1) if a["unbiased_running_var"] else 1.0
        for name, batch, factor in zip(VECTORS[2:], statistics(a["x"], a["axis"]), (1.0, unbiased), strict=True):
            batch = Bounded(batch.value.reshape(-1) * factor, DOUBLE, np.reshape(batch.error, -1) * factor)
            running = Bounded(a[name], DOUBLE)
            errors[name] = ((1 - a["momentum"]) * running + a["momentum"] * batch).to(Arithmetic.of(a["x"].dtype))
    return errors


def backward_errors(a: Arguments) -> Errors:
    training = a["_training"]
    centered, inv_std, scale, z = normalization(a, training=training)
    others = tuple(i for i in range(z.value.ndim) if i != a["axis"] % z.value.ndim)
    dz = activated(z, exact(a["dy"]), a)
    sum_dz = dz.sum(others, chain=64)
    inv_std, scale = inv_std.to(dz.arithmetic), scale.to(dz.arithmetic)
    sum_product = (dz * centered).sum(others, chain=64) * inv_std
    n = max(dz.value.size // max(sum_dz.value.size, 1), 1)
    dx = scale * (dz - sum_dz / n - centered * inv_std * (sum_product / n)) if training else scale * dz
    return {"dx": dx, "out": dx, "dgamma": sum_product.error.reshape(-1), "dbeta": sum_dz.error.reshape(-1),
            "dresidual": dz}


def forward_alone(module: Any, arguments: Arguments, *, training: bool) -> Any:
    """The forward's result without the cache, which is opaque."""
    return module.batch_norm_forward(**arguments, training=training)[0]


def forward_and_backward(module: Any, arguments: Arguments) -> Any:
    rest = {name: value for name, value in arguments.items() if name not in ("_training", "dy", "out")}
    _, cache = module.batch_norm_forward(**rest, training=arguments["_training"])
    return module.batch_norm_backward(arguments["dy"], cache, out=arguments.get("out"))


# -- optimizers --------------------------------------------------------------------------------------------------------

UNDER_ROOT = ("square_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_sums")
BUFFERS = {"momentum_step": ("velocities",), "rmsprop_step": ("square_avgs", "momentum_buffers", "grad_avgs"),
           "adam_step": ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), "adagrad_step": ("state_sums",)}
RATES = (0.1, 0.01, 1e-3, 0.0)
FLAGS = (False, True)
STEPS = (1, 2, 10, 10**6, 2**60, 2**100)
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "momentum_step": {"momentum": (0.0, 0.9), "dampening": (0.0, 0.3), "nesterov": FLAGS},
    "rmsprop_step": {"alpha": (0.99, 0.5, 1.0), "eps": (1e-8, 1e-3, 0.0), "momentum": (0.0, 0.9), "centered": FLAGS,
                     "eps_inside_sqrt": FLAGS},
    "adam_step": {"step": STEPS, "betas": ((0.9, 0.999), (0.5, 0.9), (0.0, 0.0)), "eps": (1e-8, 1e-3, 0.0),
                  "decoupled_weight_decay": FLAGS, "amsgrad": FLAGS, "epsilon_hat": FLAGS},
    "adagrad_step": {"step": STEPS, "lr_decay": (0.0, 0.1), "eps": (1e-8, 1e-10, 0.0)}}
COMMON_OPTIONS = {"lr": RATES, "weight_decay": (0.0, 0.0, 0.1), "maximize": FLAGS}


@st.composite
def step_calls(draw: st.DrawFn, name: str) -> Arguments:
    """One array an argument, or lists of up to three that differ in shape and dtype; options one by one."""
    d = Drawn(draw)
    count = d.number(5)  # 4: no list
    shapes_and_dtypes = [(d.shape, d.dtype)]
    while len(shapes_and_dtypes) < count < 4:
        shapes_and_dtypes.append((d.one_of((3,), (2, 5), (), (0,), (70, 3)), d.one_of(*DTYPES)))

    def argument(name: str, written: bool) -> Any:
        plans = [d.plan(shape, written=written, dtype=dtype, positive=name in UNDER_ROOT,
                        kind=d.kind if name in ("params", "grads") or d.kind in ("large", "special") else "normal")
                 for shape, dtype in shapes_and_dtypes[:count]]
        return plans[0] if count == 4 else plans

    arguments = {"params": argument("params", True), "grads": argument("grads", False)}
    optional = ("momentum_buffers", "grad_avgs", "max_exp_avg_sqs", "velocities")
    for buffer in BUFFERS[name]:
        arguments[buffer] = None if buffer in optional and d.one_of(0, 0, 1) else argument(buffer, True)
    options = {option: d.one_of(*values) for option, values in (COMMON_OPTIONS | OPTIONS[name]).items()}
    return arguments | options


def direction(grad: Bounded, p: Bounded, a: Arguments) -> Bounded:
    g = -grad if a["maximize"] else grad
    return g + a["weight_decay"] * p if a["weight_decay"] else g


def momentum_errors(s: dict[str, Bounded], a: Arguments) -> dict[str, Bounded]:
    p, momentum = s["params"], a["momentum"]
    g = direction(s["grads"], p, a)
    v = (1 - a["dampening"]) * g
    if "velocities" in s:
        v = momentum * s["velocities"] + v
    return {"params": p - a["lr"] * (g + momentum * v if a["nesterov"] else v), "velocities": v}


def rmsprop_errors(s: dict[str, Bounded], a: Arguments) -> dict[str, Bounded]:
    p, alpha, arithmetic = s["params"], a["alpha"], s["params"].arithmetic
    g = direction(s["grads"], p, a)
    new = {}
    if a["centered"]:  # in double, and so is all that cancels
        wide = {name: Bounded(array.value, DOUBLE) for name, array in s.items()}
        g_wide = direction(wide["grads"], wide["params"], a)
        square = alpha * wide["square_avgs"] + (1 - alpha) * (g_wide * g_wide)
        mean = alpha * wide["grad_avgs"] + (1 - alpha) * g_wide
        new = {"square_avgs": square.to(arithmetic), "grad_avgs": mean.to(arithmetic)}
        variance = (square - mean * mean).maximum(0.0).to(arithmetic)
    else:
        variance = new["square_avgs"] = alpha * s["square_avgs"] + (1 - alpha) * g * g
    d = g / ((variance + a["eps"]).sqrt() if a["eps_inside_sqrt"] else variance.sqrt() + a["eps"])
    if a["momentum"]:
        d = new["momentum_buffers"] = a["momentum"] * s["momentum_buffers"] + d
    return {"params": p - a["lr"] * d, **new}


def adam_errors(s: dict[str, Bounded], a: Arguments) -> dict[str, Bounded]:
    p, (beta1, beta2), t = s["params"], a["betas"], min(a["step"], 2**53)
    if a["decoupled_weight_decay"]:
        g = direction(s["grads"], p, a | {"weight_decay": 0.0})
        p = (1 - a["lr"] * a["weight_decay"]) * p
    else:
        g = direction(s["grads"], p, a)
    m = beta1 * s["exp_avgs"] + (1 - beta1) * g
    v = beta2 * s["exp_avg_sqs"] + (1 - beta2) * g * g
    new = {"exp_avgs": m, "exp_avg_sqs": v}
    if a["amsgrad"]:
        v = new["max_exp_avg_sqs"] = v.maximum(s["max_exp_avg_sqs"])
    root = math.sqrt(1 - beta2**t)
    d = m / (v.sqrt() + (a["eps"] if a["epsilon_hat"] else a["eps"] * root))
    return {"params": p - a["lr"] * root / (1 - beta1**t) * d, **new}


def adagrad_errors(s: dict[str, Bounded], a: Arguments) -> dict[str, Bounded]:
    p, t = s["params"], min(a["step"], 2**53)
    g = direction(s["grads"], p, a)
    total = s["state_sums"] + g * g
    rate = a["lr"] / (1 + (t - 1) * a["lr_decay"])
    return {"params": p - rate * (g / (total.sqrt() + a["eps"])), "state_sums": total}


def by_position(formula: Callable[[dict[str, Bounded], Arguments], dict[str, Bounded]],
                names: tuple[str, ...]) -> Callable[[Arguments], Errors]:
    """Errors of a step over lists from those of one parameter."""
    def errors(a: Arguments) -> Errors:
        present = {name: a[name] for name in ("params", "grads", *names) if a[name] is not None}
        if isinstance(a["params"], np.ndarray):
            return formula({name: exact(array) for name, array in present.items()}, a)
        result = {}
        for i in range(len(a["params"])):
            new = formula({name: exact(arrays[i]) for name, arrays in present.items()}, a)
            result |= {f"{name}[{i}]": error for name, error in new.items()}
        return result
    return errors


@st.composite
def clip_calls(draw: st.DrawFn) -> Arguments:
    d = Drawn(draw)
    grads = [d.plan(d.one_of(d.shape, (3,), (70, 3), ()), written=True, dtype=d.one_of(*DTYPES))
             for _ in range(d.number(4))]
    return {"grads": grads if len(grads) != 1 or d.one_of(False, True) else grads[0],
            "max_norm": d.one_of(1.0, 1e3, math.inf, 0.0, 1e-10)}


@st.composite
def all_finite_calls(draw: st.DrawFn) -> Arguments:
    d = Drawn(draw)
    arrays = [d.plan(d.one_of(d.shape, (3,), (70, 3), ()), dtype=d.one_of(*DTYPES)) for _ in range(d.number(4))]
    return {"arrays": arrays if len(arrays) != 1 or d.one_of(False, True) else arrays[0]}


def clip_errors(a: Arguments) -> Errors:
    """The norm is a sum in float64 of n squares; all else is rounded once."""
    grads = [a["grads"]] if isinstance(a["grads"], np.ndarray) else a["grads"]
    n = sum(g.size for g in grads)
    norm = reference.clip_grad_norm([g.copy() for g in grads], math.inf)
    relative = (n + 4) * DOUBLE.unit
    labels = ["grads"] if isinstance(a["grads"], np.ndarray) else [f"grads[{i}]" for i in range(len(grads))]
    return {"result": relative * norm if math.isfinite(norm) else 0.0,
            **{label: relative * np.where(np.isfinite(g), np.abs(g), 0.0)
               for label, g in zip(labels, grads, strict=True)}}


# -- Moments -----------------------------------------------------------------------------------------------------------


@st.composite
def moments_calls(draw: st.DrawFn) -> Arguments:
    """What one object sees at once, or in two parts that are merged, and what it then standardizes."""
    d = Drawn(draw, minimum_rank=1)
    axis = d.axis()
    first = d.shape if d.one_of(0, 1) else tuple(n if i == axis % len(d.shape) else 2 for i, n in enumerate(d.shape))
    return {"axis": axis, "x": d.plan(), "other": d.maybe(first), "eps": d.one_of(0.0, 1e-5, 1.0),
            "ddof": d.one_of(0, 0, 1)} | d.out()


def moments_results(module: Any, a: Arguments) -> Any:
    m = module.Moments(a["axis"])
    m.update(a["x"])
    if a["other"] is not None:
        other = module.Moments(a["axis"])
        other.update(a["other"])
        m.merge(other)
    return m.count, m.mean, m.var(a["ddof"]), m.standardize(a["x"], a["eps"], a.get("out"))


def moments_errors(a: Arguments) -> Errors:
    """As `statistics`: means of parts err by their deviations, whose squares are no larger than those of the whole."""
    m = reference.Moments(a["axis"])
    for part in (a["x"], a["other"]):
        if part is not None and part.size:  # merging what has seen nothing is right for any number of channels
            m.update(part)
    arithmetic = Arithmetic.of(a["x"].dtype)
    shape = [1] * a["x"].ndim
    shape[a["axis"]] = -1
    mean, var = m.mean, m.var()
    mean_error = 64 * arithmetic.unit * 3 * np.sqrt(var) + 2.0**-46 * np.abs(mean)
    var_error = 64 * arithmetic.unit * 11 * var + 4 * 2.0**-46 * np.abs(mean) * np.sqrt(var)
    bounded = (Bounded(mean.reshape(shape), DOUBLE, mean_error.reshape(shape)),
               Bounded(var.reshape(shape), DOUBLE, var_error.reshape(shape)))
    root = (bounded[1] + a["eps"]).sqrt().where(var.reshape(shape) != 0, 1.0)
    y = (exact(a["x"]) - bounded[0]) * (1 / root).to(arithmetic)
    scale = m.count / (m.count - a["ddof"]) if m.count > a["ddof"] else 1.0
    return {"mean": np.where(np.isfinite(mean), mean_error, 0.0),
            "var": np.where(np.isfinite(var), var_error * scale, 0.0), "standardized": y, "out": y}


STEP_ERRORS = {"momentum_step": momentum_errors, "rmsprop_step": rmsprop_errors, "adam_step": adam_errors,
               "adagrad_step": adagrad_errors}


# -- optimizers and layers as objects ----------------------------------------------------------------------------------

OPTIMIZERS = {"SGD": "momentum_step", "RMSProp": "rmsprop_step", "Adam": "adam_step", "AdamW": "adam_step",
              "Adagrad": "adagrad_step"}
CLASS_OPTIONS = {"SGD": ("momentum", "dampening", "nesterov", "weight_decay", "maximize"),
                 "RMSProp": ("alpha", "eps", "momentum", "centered", "eps_inside_sqrt", "weight_decay", "maximize"),
                 "Adam": ("betas", "eps", "amsgrad", "epsilon_hat", "decoupled_weight_decay", "weight_decay",
                          "maximize"),
                 "AdamW": ("betas", "eps", "amsgrad", "epsilon_hat", "weight_decay", "maximize"),
                 "Adagrad": ("lr_decay", "eps", "weight_decay", "maximize")}
# What a saved state may hold in place of what it should.
WRONG_ENTRIES = (None, 1.5, "x", [], np.zeros((2, 2)), np.zeros(3, np.float16), -1, math.nan, math.inf, True, 2**70,
                 [np.zeros(1)], {}, object())


@st.composite
def optimizer_calls(draw: st.DrawFn, name: str, *, loads: bool = False) -> Arguments:
    """Parameters, the gradients of a step and options; with ``loads``, what to do to a saved state."""
    d = Drawn(draw)
    choices = COMMON_OPTIONS | OPTIONS[OPTIMIZERS[name]]
    arguments = {"params": d.plan(written=True), "grads": d.plan(), "lr": d.one_of(*RATES)}
    if d.one_of(False, True):
        arguments |= {"params": [arguments["params"]], "grads": [arguments["grads"]]}
    arguments |= {option: d.one_of(*choices[option]) for option in CLASS_OPTIONS[name]}
    if name == "SGD" and arguments["nesterov"]:
        arguments |= {"momentum": 0.9, "dampening": 0.0}
    return arguments | ({"_change": state_change(d)} if loads else {})


def state_change(d: Drawn) -> tuple[str, int, Any]:
    """How a saved state differs from what was saved: what is done, to which entry, and what is put there."""
    what = d.one_of("nothing", "missing", "more", "replaced", "replaced", "no mapping")
    return what, d.number(8), d.one_of(*WRONG_ENTRIES)


def changed_state(state: dict[str, Any], change: tuple[str, int, Any]) -> Any:
    """The state after such a change."""
    what, at, value = change
    name = list(state)[at % len(state)] if state else "none"
    if what == "no mapping":
        return value
    if what == "missing":
        return {k: v for k, v in state.items() if k != name}
    if what == "nothing":
        return state
    return state | {"one more" if what == "more" else name: value}


def bits(state: Any) -> Any:
    """A state as something that compares bit by bit."""
    if isinstance(state, dict):
        return {name: bits(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return (state.dtype, state.shape, state.tobytes()) if isinstance(state, np.ndarray) else repr(state)


def unchanged_if_refused(thing: Any, action: Callable[[], Any]) -> Any:
    """Run an action on something with a state, which an error must leave as it was."""
    before = bits(thing.state_dict())
    try:
        return action()
    except (TypeError, ValueError):
        assert bits(thing.state_dict()) == before, "an error changed the state"
        raise


def optimizer(module: Any, name: str, arguments: Arguments) -> Any:
    options = {k: v for k, v in arguments.items() if k not in ("params", "grads", "_change")}
    return getattr(fn.optim, name)(arguments["params"], **options, backend=module)


def first_step(name: str) -> Callable[[Any, Arguments], Any]:
    """Make an optimizer and take a step."""
    def call(module: Any, arguments: Arguments) -> Any:
        made = optimizer(module, name, arguments)
        unchanged_if_refused(made, lambda: made.step(arguments["grads"]))
    return call


def load_optimizer(name: str) -> Callable[[Any, Arguments], Any]:
    """Load a saved state, as it was or spoiled; what was loaded is what is saved next."""
    def call(module: Any, arguments: Arguments) -> Any:
        other = optimizer(module, name, arguments)
        copies = [p.copy() for p in other.params]
        made = optimizer(module, name, arguments | {"params": copies[0] if other._single else copies})
        made.step(arguments["grads"])
        state = changed_state(made.state_dict(), arguments["_change"])
        unchanged_if_refused(other, lambda: other.load_state_dict(state))
        if arguments["_change"][0] == "nothing":
            assert bits(other.state_dict()) == bits(made.state_dict())
    return call


def first_step_errors(name: str) -> Callable[[Arguments], Errors]:
    """Those of the function from buffers of 0 at step 1, where SGD leaves the dampening out."""
    function = OPTIMIZERS[name]
    defaults = {"nesterov": False, "decoupled_weight_decay": name == "AdamW"}

    def errors(a: Arguments) -> Errors:
        a = defaults | a | {"step": 1, "dampening": 0.0}
        single = isinstance(a["params"], np.ndarray)
        zeros = {buffer: [np.zeros(p.shape, p.dtype) for p in ([a["params"]] if single else a["params"])]
                 for buffer in BUFFERS[function]}
        a |= {buffer: arrays[0] if single else arrays for buffer, arrays in zeros.items()}
        return by_position(STEP_ERRORS[function], BUFFERS[function])(a)
    return errors


LAYERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ReLU": {}, "Sigmoid": {}, "Tanh": {}, "LeakyReLU": {"negative_slope": (0.01, 0.3, 0.0)},
    "ELU": {"alpha": (1.0, 0.3)}, "CELU": {"alpha": (1.0, 0.3)},
    "Dropout": {"p": (0.5, 0.0, 1.0), "seed": (1, 2**64 - 1)},
    "BatchNorm": {"axis": (1, -1), "momentum": (0.1, 1.0), "affine": FLAGS, "activation": (None, "relu"),
                  "eps": (1e-5, 1.0)},
    "Dense": {"bias": FLAGS, "rng": (1, 2)}, "DropConnect": {"p": (0.5, 0.0), "rng": (1, 2), "seed": (3,)}}


@st.composite
def layer_calls(draw: st.DrawFn, name: str) -> Arguments:
    """A batch, a gradient, options of the layer, and what to do to its saved state."""
    d = Drawn(draw)
    if d.kind == "large":  # a product of matrices that overflows is NumPy's to warn of
        d.kind = "normal"
    if name in ("Dense", "DropConnect"):
        rows, features, outputs = d.one_of(0, 1, 3, 40), d.one_of(1, 3, 17), d.one_of(1, 2, 9)
        sizes, x, dy = (features, outputs), d.plan((rows, features)), d.plan((rows, outputs))
    else:
        if name == "BatchNorm":
            d.shape = d.one_of((3, 4), (2, 3, 5), (7, 1), (2, 4, 3, 3), (1, 1), (5,))
        sizes, x, dy = (d.shape[-1],) if name == "BatchNorm" else (), d.plan(), d.plan()
    options = {option: d.one_of(*values) for option, values in LAYERS[name].items()}
    if name in ("BatchNorm", "Dense", "DropConnect"):
        options["dtype"] = d.dtype
    return {"x": x, "dy": dy, "_sizes": sizes, **options, "_change": state_change(d)}


def layer_results(name: str) -> Callable[[Any, Arguments], Any]:
    """Forward, backward, and a state loaded as it was saved or spoiled."""
    def call(module: Any, arguments: Arguments) -> Any:
        options = {k: v for k, v in arguments.items() if k not in ("x", "dy", "_sizes", "_change")}
        layer = getattr(fn.layers, name)(*arguments["_sizes"], **options, backend=module)
        y = unchanged_if_refused(layer, lambda: layer.forward(arguments["x"]))
        dx = unchanged_if_refused(layer, lambda: layer.backward(arguments["dy"]))
        saved = layer.state_dict()
        state = changed_state(saved, arguments["_change"])
        unchanged_if_refused(layer, lambda: layer.load_state_dict(state))
        if arguments["_change"][0] == "nothing":
            assert bits(layer.state_dict()) == bits(saved)
        return y, dx
    return call


def any_values(arguments: Arguments) -> Errors:
    """Of layers, kinds and shapes count here: their values are those of the functions."""
    return {"y": math.inf, "dx": math.inf}


# -- initializers and threads ------------------------------------------------------------------------------------------


@st.composite
def init_calls(draw: st.DrawFn) -> Arguments:
    d = Drawn(draw)
    return {"shape": d.one_of((2, 3), (1, 1), (4, 3, 5, 5), [7, 2], (0, 3), (3,), (), (-1, 2), (2, 2.0), "ab", 5),
            "rng": d.one_of(0, 7, 2**70, -1, 1.5, True, "x"),
            "dtype": d.one_of(np.float32, np.float64, "float32", ">f4", np.int32, None, "no", object())}


def init_results(name: str) -> Callable[[Any, Arguments], Any]:
    """The same integer gives the same weights, of the shape and dtype that were asked for."""
    def call(module: Any, arguments: Arguments) -> Any:
        weights = getattr(fn.init, name)(**arguments)
        assert (weights.shape, weights.dtype) == (tuple(arguments["shape"]), np.dtype(arguments["dtype"]))
        assert np.isfinite(weights).all()
        return weights
    return call


def init_errors(arguments: Arguments) -> Errors:
    """None, but with a seed from the operating system."""
    return {"weights": math.inf if arguments["rng"] is None else 0.0}


def setting_results(name: str) -> Callable[[Any, Arguments], Any]:
    """The number is taken over, or refused and the old one kept."""
    get, set_ = getattr(fn, f"get_{name}"), getattr(fn, f"set_{name}")

    def results(module: Any, arguments: Arguments) -> Any:
        before = get()
        try:
            set_(**arguments)
        except (TypeError, ValueError):
            assert get() == before
            raise
        return get()

    return results


@st.composite
def setting_calls(draw: st.DrawFn, name: str) -> Arguments:
    return {name: draw(st.one_of(st.integers(), st.integers(1, 64), st.sampled_from(ODD_OPTIONS)))}


# -- all of them -------------------------------------------------------------------------------------------------------

def bound_training(training: bool) -> Callable[[Any, Arguments], Any]:
    return lambda module, arguments: forward_alone(module, arguments, training=training)


FUNCTIONS = [
    *activations(),
    Function("dropout", dropout_calls("x"), returned(dropout_error)),
    Function("dropout_backward", dropout_calls("dy"), returned(dropout_error)),
    Function("softmax", softmax_calls(), returned(softmax_error)),
    Function("log_softmax", softmax_calls(), returned(log_softmax_error)),
    Function("softmax_cross_entropy", cross_entropy_calls(), cross_entropy_errors,
             results=("losses", "dlogits")),
    Function("batch_norm_forward", batch_norm_calls(training=True), lambda a: forward_errors(a, training=True),
             ("out", "running_mean", "running_var"), call=bound_training(True)),
    Function("batch_norm_forward frozen", batch_norm_calls(training=False), lambda a: forward_errors(a, training=False),
             call=bound_training(False)),
    Function("batch_norm_inference", batch_norm_calls(training=False), lambda a: forward_errors(a, training=False)),
    Function("batch_norm_backward", st.booleans().flatmap(lambda t: batch_norm_calls(training=t, backward=True)),
             backward_errors, results=("dx", "dgamma", "dbeta", "dresidual"), call=forward_and_backward),
    *[Function(name, step_calls(name), by_position(formula, BUFFERS[name]), ("params", *BUFFERS[name]))
      for name, formula in STEP_ERRORS.items()],
    Function("clip_grad_norm", clip_calls(), clip_errors, ("grads",)),
    Function("all_finite", all_finite_calls(), lambda a: {}, ()),
    Function("Moments", moments_calls(), moments_errors, results=("count", "mean", "var", "standardized"),
             call=moments_results),
]

OBJECTS = [
    *[Function(f"optim.{name}", optimizer_calls(name), first_step_errors(name), ("params",), call=first_step(name))
      for name in OPTIMIZERS],
    *[Function(f"optim.{name}.load_state_dict", optimizer_calls(name, loads=True), any_values, (),
               call=load_optimizer(name)) for name in OPTIMIZERS],
    *[Function(f"layers.{name}", layer_calls(name), any_values, (), ("y", "dx"), layer_results(name))
      for name in LAYERS],
    *[Function(f"init.{name}", init_calls(), init_errors, (), ("weights",), init_results(name))
      for name in fn.init.__all__],
    Function("set_num_threads", setting_calls("n"), any_values, (), ("n",), setting_results("num_threads")),
    Function("set_output_pool", setting_calls("n_bytes"), any_values, (), ("n_bytes",), setting_results("output_pool"))]
