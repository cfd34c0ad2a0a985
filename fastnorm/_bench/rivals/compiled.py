"""`torch.compile`: PyTorch's own operators, fused by its compiler for these very shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from ..cases import DROPOUT, FRESH, IN_PLACE, BatchNorm, Case, CrossEntropy, Elementwise, Inputs, Softmax, Update
from ..measure import Call
from . import need
from .pytorch import EPS, MOMENTUM, channels_second, optimizer

MOST_ARRAYS = 2  # longer lists compile for minutes


def load(threads: int) -> Compiled:
    """The compiler for so many threads."""
    torch = need("torch")
    torch._logging.set_logs(all=logging.ERROR)
    return Compiled(torch, threads)


class Compiled:
    """`torch.compile`."""

    name = "torch.compile"

    def __init__(self, torch: Any, threads: int) -> None:
        self.torch, self.threads, self.version = torch, threads, torch.__version__

    def calls(self, case: Case, inputs: Inputs) -> Iterator[Call]:
        """As `Rival.calls`."""
        torch, threads = self.torch, self.threads
        makers: dict[type[Case], Callable[..., tuple[str, Callable[[], Any]] | None]] = {
            BatchNorm: _batch_norm, CrossEntropy: _cross_entropy, Softmax: _softmax, Update: _update,
            Elementwise: _elementwise}
        torch._dynamo.reset()  # one case's guards are no business of the next
        made = makers[type(case)](torch, case, inputs)
        if made is not None:
            mode, run = made
            yield Call(self.name, mode, run, "", threads, prepare=lambda: torch.set_num_threads(threads))


def _bound(torch: Any, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    compiled = torch.compile(function, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return compiled(*arguments)

    return run


def _batch_norm(torch: Any, case: BatchNorm, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    aten = torch.ops.aten
    x, dy, residual = (channels_second(torch, inputs[name], case) for name in ("x", "dy", "residual"))
    vectors = [torch.from_numpy(inputs[name]) for name in ("gamma", "beta", "running_mean", "running_var")]

    def forward(x: Any, residual: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        z, saved_mean, inv_std = torch.native_batch_norm(x, gamma, beta, mean, var, case.what != "inference", MOMENTUM,
                                                         EPS)
        z = z if residual is None else z + residual
        return z.relu() if case.activation else z, saved_mean, inv_std

    def backward(dy: Any, x: Any, y: Any, saved: Any, gamma: Any, mean: Any, var: Any) -> Any:
        dz = aten.threshold_backward(dy, y, 0) if case.activation else dy
        gradients = aten.native_batch_norm_backward(dz, x, gamma, mean, var, *saved, True, EPS, [True] * 3)
        return (*gradients, dz) if case.residual else tuple(gradients)

    def both(dy: Any, x: Any, residual: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        y, *saved = forward(x, residual, gamma, beta, mean, var)
        return backward(dy, x, y, saved, gamma, mean, var)

    if case.what in ("forward", "inference"):
        return FRESH, _bound(torch, forward, x, residual, *vectors)
    if case.what == "both":
        return FRESH, _bound(torch, both, dy, x, residual, *vectors)
    with torch.no_grad():
        y, *saved = forward(x, residual, *vectors)
    return FRESH, _bound(torch, backward, dy, x, y, saved, vectors[0], *vectors[2:])


def _softmax(torch: Any, case: Softmax, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    return FRESH, _bound(torch, lambda x: torch.softmax(x, case.axis), torch.from_numpy(inputs["x"]))


def _cross_entropy(torch: Any, case: CrossEntropy, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    gradient = torch.func.grad_and_value(torch.nn.functional.cross_entropy)
    return FRESH, _bound(torch, lambda x, t: gradient(x, t), torch.from_numpy(inputs["x"]),
                         torch.from_numpy(inputs["targets"]))


def _update(torch: Any, case: Update, inputs: Inputs) -> tuple[str, Callable[[], Any]] | None:
    if len(case.arrays) > MOST_ARRAYS:
        return None
    made, _, _ = optimizer(torch, case, inputs, foreach=True)
    return IN_PLACE, torch.compile(made.step, dynamic=False)


def _elementwise(torch: Any, case: Elementwise, inputs: Inputs) -> tuple[str, Callable[[], Any]]:
    aten, functional = torch.ops.aten, torch.nn.functional
    x, saved, dy = (torch.from_numpy(inputs[name]) for name in ("x", "saved", "dy"))
    if case.what == "forward":
        forward: dict[str, Callable[[Any], Any]] = {
            "relu": torch.relu, "leaky_relu": functional.leaky_relu, "elu": functional.elu, "celu": functional.celu,
            "sigmoid": torch.sigmoid, "tanh": torch.tanh, "dropout": lambda a: aten.native_dropout(a, DROPOUT, True)}
        return FRESH, _bound(torch, forward[case.function], x)
    backward: dict[str, Callable[[Any, Any], Any]] = {
        "relu": lambda d, s: aten.threshold_backward(d, s, 0),
        "leaky_relu": lambda d, s: aten.leaky_relu_backward(d, s, 0.01, False),
        "elu": lambda d, s: aten.elu_backward(d, 1.0, 1.0, 1.0, False, s),
        "celu": lambda d, s: aten.elu_backward(d, 1.0, 1.0, 1.0, False, s),
        "sigmoid": aten.sigmoid_backward, "tanh": aten.tanh_backward,
        "dropout": lambda d, mask: aten.native_dropout_backward(d, mask, 1 / (1 - DROPOUT))}
    if case.function == "dropout":
        saved = torch.rand_like(x) < DROPOUT
    return FRESH, _bound(torch, backward[case.function], dy, saved)
