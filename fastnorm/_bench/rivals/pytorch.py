"""PyTorch eager: the raw operators, without autograd's bookkeeping, and the fused optimizers.

Tensors are made by `torch.from_numpy`: they share the memory of the inputs. NHWC is PyTorch's own channels-last format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..cases import (
    DROPOUT,
    FRESH,
    IN_PLACE,
    OUT,
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
from . import need

EPS, MOMENTUM = 1e-5, 0.1
Form = tuple[str, str, Callable[[], Any]]  # variant, where the results go, call


def load(threads: int) -> PyTorch:
    """PyTorch on so many threads."""
    return PyTorch(need("torch"), threads)


class PyTorch:
    """PyTorch eager."""

    name = "PyTorch"

    def __init__(self, torch: Any, threads: int) -> None:
        self.torch, self.threads, self.version = torch, threads, torch.__version__

    def calls(self, case: Case, inputs: Inputs) -> Iterator[Call]:
        """As `Rival.calls`."""
        torch, threads = self.torch, self.threads
        forms: dict[type[Case], Callable[..., Iterator[Form]]] = {
            BatchNorm: _batch_norm, CrossEntropy: _cross_entropy, Softmax: _softmax, Update: _update,
            Elementwise: _elementwise}
        with torch.no_grad():
            for variant, mode, run in forms[type(case)](torch, case, inputs):
                yield Call(self.name, mode, run if variant == "autograd" else torch.no_grad()(run), variant, threads,
                           prepare=lambda: torch.set_num_threads(threads))


def channels_second(torch: Any, a: Any, case: BatchNorm) -> Any:
    """The tensor as PyTorch wants it: NHWC memory seen as (N, C, H, W)."""
    if a is None:
        return None
    tensor = torch.from_numpy(a)
    return tensor.permute(0, 3, 1, 2) if case.layout == "NHWC" else tensor


def _batch_norm(torch: Any, case: BatchNorm, inputs: Inputs) -> Iterator[Form]:
    aten = torch.ops.aten
    x, dy, residual = (channels_second(torch, inputs[name], case) for name in ("x", "dy", "residual"))
    gamma, beta, mean, var = (torch.from_numpy(inputs[name]) for name in ("gamma", "beta", "running_mean",
                                                                         "running_var"))
    y, dx = torch.empty_like(x), torch.empty_like(x)
    vectors = [torch.empty_like(gamma) for _ in range(4)]
    forward_raw, backward_raw = torch.native_batch_norm, aten.native_batch_norm_backward
    training = case.what != "inference"
    every = [True] * 3

    def activate(z: Any) -> Any:
        if residual is not None:
            z += residual
        return z.relu_() if case.activation else z

    def forward() -> Any:
        z, *saved = forward_raw(x, gamma, beta, mean, var, training, MOMENTUM, EPS)
        return activate(z), saved

    def forward_out() -> Any:
        forward_raw(x, gamma, beta, mean, var, training, MOMENTUM, EPS, out=(y, vectors[0], vectors[1]))
        return activate(y), vectors[:2]

    def backward(result: Any, saved: Any) -> Any:
        dz = aten.threshold_backward(dy, result, 0) if case.activation else dy
        return *backward_raw(dz, x, gamma, mean, var, *saved, True, EPS, every), dz

    if case.what in ("forward", "inference"):
        yield "", FRESH, forward
        if x.dim() == 4 and training:  # for others, PyTorch 2.13 copies into out
            yield "", OUT, forward_out
    elif case.what == "backward":
        result, saved = forward()
        yield "", FRESH, lambda: backward(result, saved)
        if not case.activation:
            yield "", OUT, lambda: backward_raw.out(dy, x, gamma, mean, var, *saved, True, EPS, every, out0=dx,
                                                    out1=vectors[2], out2=vectors[3])
    else:
        yield "", FRESH, lambda: backward(*forward())


def _softmax(torch: Any, case: Softmax, inputs: Inputs) -> Iterator[Form]:
    x = torch.from_numpy(inputs["x"])
    out = torch.empty_like(x)
    yield "", FRESH, lambda: torch.softmax(x, case.axis)
    yield "", OUT, lambda: torch.softmax(x, case.axis, out=out)


def _cross_entropy(torch: Any, case: CrossEntropy, inputs: Inputs) -> Iterator[Form]:
    """Two ways: the four raw operators, and autograd; the faster one counts."""
    aten, functional = torch.ops.aten, torch.nn.functional
    x, targets = torch.from_numpy(inputs["x"]), torch.from_numpy(inputs["targets"])
    leaf = x.detach().requires_grad_()
    one = torch.ones((), dtype=x.dtype)
    axis = case.axis % x.dim()
    plain = x.dim() == 2
    nll, nll_backward = ((aten.nll_loss_forward, aten.nll_loss_backward) if plain else
                         (aten.nll_loss2d_forward, aten.nll_loss2d_backward))
    mean, ignored = 1, -100

    def raw() -> Any:
        log_p = aten._log_softmax(x, axis, False)
        loss, weight = nll(log_p, targets, None, mean, ignored)
        d = nll_backward(one, log_p, targets, None, mean, ignored, weight)
        return aten._log_softmax_backward_data(d, log_p, axis, x.dtype), loss

    def autograd() -> Any:
        leaf.grad = None
        loss = functional.cross_entropy(leaf, targets)
        loss.backward()
        return leaf.grad, loss

    yield "raw operators", FRESH, raw
    yield "autograd", FRESH, torch.enable_grad()(autograd)
    if plain:
        log_p, d, dx = torch.empty_like(x), torch.zeros_like(x), torch.empty_like(x)
        loss, weight = torch.empty((), dtype=x.dtype), torch.empty((), dtype=x.dtype)

        def raw_out() -> Any:
            aten._log_softmax.out(x, axis, False, out=log_p)
            nll.output(log_p, targets, None, mean, ignored, output=loss, total_weight=weight)
            nll_backward.grad_input(one, log_p, targets, None, mean, ignored, weight, grad_input=d)
            return aten._log_softmax_backward_data.out(d, log_p, axis, x.dtype, out=dx), loss

        yield "raw operators", OUT, raw_out


def optimizer(torch: Any, case: Update, inputs: Inputs, **options: Any) -> tuple[Any, list[Any], dict[str, list[Any]]]:
    """PyTorch's optimizer with its state on the inputs' memory; the parameters; and all lists by name."""
    lists = {name: list(map(torch.from_numpy, inputs[name])) for name in ("params", "grads", *STATES[case.rule])}
    params = [tensor.detach().requires_grad_() for tensor in lists["params"]]
    for param, grad in zip(params, lists["grads"], strict=True):
        param.grad = grad
    kinds: dict[str, Callable[..., Any]] = {
        "momentum": lambda: torch.optim.SGD(params, lr=1e-3, momentum=0.9, **options),
        "rmsprop": lambda: torch.optim.RMSprop(params, lr=1e-3, **options),
        "adam": lambda: torch.optim.Adam(params, lr=1e-3, **options),
        "adagrad": lambda: torch.optim.Adagrad(params, lr=1e-3, **options)}
    made = kinds[case.rule]()
    names = {"momentum": ("momentum_buffer",), "rmsprop": ("square_avg",), "adam": ("exp_avg", "exp_avg_sq"),
             "adagrad": ("sum",)}[case.rule]
    for at, param in enumerate(params):
        state = {name: lists[key][at] for name, key in zip(names, STATES[case.rule], strict=True)}
        if case.rule != "momentum":
            state["step"] = torch.tensor(float(STEP - 1))
        made.state[param] = state
    return made, params, lists


def _update(torch: Any, case: Update, inputs: Inputs) -> Iterator[Form]:
    """`step()` of the fused optimizer, and the operator inside it; RMSprop has no fused form, so its two others."""
    if case.rule == "rmsprop":
        for foreach in (True, False):
            made, _, _ = optimizer(torch, case, inputs, foreach=foreach)
            yield "step(), foreach" if foreach else "step(), for loop", IN_PLACE, made.step
        return
    made, _, lists = optimizer(torch, case, inputs, fused=True)
    yield "fused step()", IN_PLACE, made.step
    p, g = lists["params"], lists["grads"]
    states = [lists[name] for name in STATES[case.rule]]
    plain = {"lr": 1e-3, "weight_decay": 0.0, "maximize": False}
    if case.rule == "momentum":
        yield "raw operator", IN_PLACE, lambda: torch._fused_sgd_(
            p, g, *states, momentum=0.9, dampening=0.0, nesterov=False, is_first_step=False, **plain)
        return
    steps = [torch.tensor(float(STEP)) for _ in p]
    if case.rule == "adam":
        yield "raw operator", IN_PLACE, lambda: torch._fused_adam_(
            p, g, *states, [], steps, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, **plain)
    else:
        yield "raw operator", IN_PLACE, lambda: torch._fused_adagrad_(p, g, *states, steps, lr_decay=0.0, eps=1e-10,
                                                                      **plain)


def _elementwise(torch: Any, case: Elementwise, inputs: Inputs) -> Iterator[Form]:
    aten = torch.ops.aten
    x, saved, dy = (torch.from_numpy(inputs[name]) for name in ("x", "saved", "dy"))
    out = torch.empty_like(x)
    if case.function == "dropout":
        mask = torch.rand_like(x) < DROPOUT
        mask_out = torch.empty_like(mask)
        if case.what == "forward":
            yield "", FRESH, lambda: aten.native_dropout(x, DROPOUT, True)
            yield "", OUT, lambda: aten.native_dropout.out(x, DROPOUT, True, out0=out, out1=mask_out)
        else:
            yield "", FRESH, lambda: aten.native_dropout_backward(dy, mask, 1 / (1 - DROPOUT))
            yield "", OUT, lambda: aten.native_dropout_backward.out(dy, mask, 1 / (1 - DROPOUT), out=out)
        return
    forward: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "relu": (aten.relu, ()), "leaky_relu": (aten.leaky_relu, (0.01,)), "elu": (aten.elu, (1.0,)),
        "celu": (aten.celu, (1.0,)), "sigmoid": (aten.sigmoid, ()), "tanh": (aten.tanh, ())}
    backward: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "relu": (aten.threshold_backward, (saved, 0)), "leaky_relu": (aten.leaky_relu_backward, (saved, 0.01, False)),
        "elu": (aten.elu_backward, (1.0, 1.0, 1.0, False, saved)),
        "celu": (aten.elu_backward, (1.0, 1.0, 1.0, False, saved)),
        "sigmoid": (aten.sigmoid_backward, (saved,)), "tanh": (aten.tanh_backward, (saved,))}
    if case.what == "forward":
        operator, arguments = forward[case.function]
        yield "", FRESH, lambda: operator(x, *arguments)
        # PyTorch 2.13 has no out form of ReLU and CELU that does not copy; clamp and ELU do the same.
        in_memory = {"relu": lambda: torch.clamp_min(x, 0, out=out), "celu": lambda: aten.elu.out(x, 1.0, out=out)}
        yield "", OUT, in_memory.get(case.function, lambda: operator.out(x, *arguments, out=out))
    else:
        operator, arguments = backward[case.function]
        yield "", FRESH, lambda: operator(dy, *arguments)
        yield "", OUT, lambda: operator.grad_input(dy, *arguments, grad_input=out)
