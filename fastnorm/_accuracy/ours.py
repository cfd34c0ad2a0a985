"""fastnorm's results, under the names that `references.exact` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fastnorm as fn

from .._arrays import Array
from .cases import ACTIVATIONS, EPS, MAX_NORM, UPDATES, Inputs, Update

Results = dict[str, Any]


def _exp(a: Inputs) -> Results:
    # The slope of ELU at x <= 0 is the kernels' exp, times 1.
    return {"exp": fn.elu_backward(np.ones_like(a["x"]), a["x"])}


def _batch_norm_forward(a: Inputs) -> Results:
    mean, var = np.zeros_like(a["gamma"]), np.ones_like(a["gamma"])
    y, _ = fn.batch_norm_forward(a["x"], a["gamma"], a["beta"], mean, var, momentum=1.0, eps=EPS)
    return {"y": y, "mean": mean, "variance": var}


def _batch_norm_inference(a: Inputs) -> Results:
    return {"y": fn.batch_norm_inference(a["x"], a["running_mean"], a["running_var"], a["gamma"], a["beta"], eps=EPS)}


def _batch_norm_backward(a: Inputs) -> Results:
    _, cache = fn.batch_norm_forward(a["x"], a["gamma"], a["beta"], eps=EPS)
    return dict(zip(("dx", "dgamma", "dbeta"), fn.batch_norm_backward(a["dy"], cache), strict=True))


def _moments(a: Inputs) -> Results:
    m = fn.Moments()
    m.update(a["x"])
    return {"mean": m.mean, "variance": m.var()}


def _cross_entropy(a: Inputs) -> Results:
    losses, gradient = fn.softmax_cross_entropy(a["x"], a["labels"], axis=1, reduction="none")
    mean, _ = fn.softmax_cross_entropy(a["x"], a["labels"], axis=1)
    return {"losses": losses, "mean loss": np.array([mean]), "gradient": gradient}


def _update(update: Update, a: Inputs) -> Results:
    p = a["params"].copy()
    states = [np.zeros_like(p) for _ in update.states]
    plain = 2 if update.rule == "adam" else 1  # states that are positional arguments
    named: dict[str, Array] = dict(zip(update.states[plain:], states[plain:], strict=True))
    step = getattr(fn, f"{update.rule}_step")
    for t, g in enumerate(a["grads"], 1):
        number = {"step": t} if update.rule in ("adam", "adagrad") else {}
        step(p, g, *states[:plain], **named, **number, **update.options)
    return {"params": p, **dict(zip(update.states, states, strict=True))}


def _clip_by_norm(a: Inputs) -> Results:
    grads = a["grads"].copy()
    return {"norm": np.array([fn.clip_grad_norm(grads, MAX_NORM)]), "grads": grads}


def _activation(kernel: str, a: Inputs) -> Results:
    name, direction = kernel.split()
    if direction == "forward":
        return {"y": getattr(fn, name)(a["x"], **ACTIVATIONS[name])}
    return {"dx": getattr(fn, f"{name}_backward")(a["dy"], a["saved"], **ACTIVATIONS[name])}


_KERNELS: dict[str, Callable[[Inputs], Results]] = {
    "exp": _exp, "batch norm forward": _batch_norm_forward, "batch norm backward": _batch_norm_backward,
    "batch norm inference": _batch_norm_inference, "Moments": _moments,
    "softmax": lambda a: {"p": fn.softmax(a["x"], axis=1)},
    "log-softmax": lambda a: {"log p": fn.log_softmax(a["x"], axis=1)},
    "cross-entropy": _cross_entropy, "clip by norm": _clip_by_norm,
}


def results(kernel: str, inputs: Inputs) -> Results:
    """What the kernel gives, on the instruction set that is loaded."""
    if kernel in _KERNELS:
        return _KERNELS[kernel](inputs)
    if kernel in UPDATES:
        return _update(UPDATES[kernel], inputs)
    return _activation(kernel, inputs)
