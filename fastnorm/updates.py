"""Optimizer updates in place: momentum, RMSProp, Adam, Adagrad; gradient clipping by norm, and a look for NaN.

Every function takes one array or a list of arrays an argument and handles the whole list in one call. The formulas and
defaults are PyTorch's; ``fastnorm.optim`` holds the classes that keep the state.

State is rounded to its dtype before it is used: a gradient whose square that dtype cannot hold (from 1.8e19 on in
float32) makes ``v`` infinite and leaves the parameter where it is, as in PyTorch. An ``eps`` above 0 that is too small
for float32 counts as float32's smallest number; an option too large for float32 is a ValueError where a parameter is
of that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _runtime
from ._arrays import (
    FLOAT32,
    FLOAT32_MAX,
    AnyArray,
    Array,
    check_array,
    check_disjoint,
    check_flag,
    check_integer,
    check_like,
    check_number,
    check_writeable,
    has_protocol,
    is_dense,
    matching,
)
from ._kernels import checks
from ._runtime import kernels

__all__ = ["adagrad_step", "adam_step", "all_finite", "clip_grad_norm", "momentum_step", "rmsprop_step"]

Arrays = AnyArray | Sequence[AnyArray]  # a list or a tuple; to a type checker, list[ndarray] is no list[AnyArray]
Argument = tuple[str, object, bool]  # name, value, whether the call writes it


# -- lists of arrays ---------------------------------------------------------------------------------------------------


class Lists(NamedTuple):
    """The checked array arguments of a call, one tuple of arrays each."""

    arrays: tuple[tuple[Array, ...], ...]
    written: tuple[bool, ...]  # not needed, and empty, where they are ready
    ready: bool  # kernels can take them as they are


def check_lists(*arguments: Argument) -> Lists:
    """Require one array an argument or lists of one length, and arrays at one position that match the first argument's.

    Those that are written are writeable and overlap nothing else in the call.
    """
    well = checks.optimizer_lists(arguments)
    return _check_lists(arguments) if well is None else Lists(well, (), True)


def _check_lists(arguments: tuple[Argument, ...]) -> Lists:
    """Check the arrays of a call one by one; a function of its own, so that small calls do not pay for its closures."""
    names = [name for name, _, _ in arguments]
    written = tuple(writes for _, _, writes in arguments)
    first_name, first, _ = arguments[0]
    single = isinstance(first, np.ndarray) or has_protocol(first)
    if single:
        lists: tuple[tuple[Any, ...], ...] = tuple([(value,) for _, value, _ in arguments])
    else:
        for name, value, _ in arguments:
            if not isinstance(value, (list, tuple)):
                wanted = "an array or a list" if name == first_name else f"a list, as {first_name} is,"
                raise TypeError(f"{name}: expected {wanted} of arrays, got {type(value).__name__}")
        lists = tuple([tuple(value) for _, value, _ in arguments])  # type: ignore[arg-type]  # list or tuple by now
        for name, arrays in zip(names, lists, strict=True):
            if len(arrays) != len(lists[0]):
                raise ValueError(f"{name}: expected {len(lists[0])} arrays as in {first_name}, got {len(arrays)}")
    labeled = [[(name if single else f"{name}[{i}]", a) for i, a in enumerate(arrays)]
               for name, arrays in zip(names, lists, strict=True)]
    checked = [_check_position(position, written) for position in zip(*labeled, strict=True)]
    _check_disjoint_lists([(labeled[at][i][0], position[at], writes) for at, writes in enumerate(written)
                           for i, position in enumerate(checked)])
    return Lists(tuple([tuple([position[at] for position in checked]) for at in range(len(lists))]), written, False)


def _check_position(labeled: Sequence[tuple[str, object]], written: tuple[bool, ...]) -> list[Array]:
    """The arrays at one position of the lists: all like the first, and writeable where they are written."""
    like = check_array(*labeled[0], written=written[0])
    arrays = [like, *(check_like(label, a, like.shape, like.dtype, writes)
                      for (label, a), writes in zip(labeled[1:], written[1:], strict=True))]
    for (label, _), a, writes in zip(labeled, arrays, written, strict=True):
        if writes:
            check_writeable(label, a)
    return arrays


def _check_disjoint_lists(arrays: list[tuple[str, Array, bool]]) -> None:
    """Require that no array that is written shares a byte with any other one."""
    ranges = sorted([(*np.lib.array_utils.byte_bounds(a), at) for at, (_, a, _) in enumerate(arrays) if a.size])
    open_ranges: list[tuple[int, int]] = []  # (end, position) of those that may reach the next one
    meeting: list[tuple[int, int]] = []  # positions of pairs whose ranges meet, the later one first
    for low, high, at in ranges:
        open_ranges = [(end, other) for end, other in open_ranges if end > low]
        meeting += [(max(at, other), min(at, other)) for _, other in open_ranges]
        open_ranges.append((high, at))
    # The exact test costs microseconds: only where ranges meet. In the order of the arguments, not of the addresses, so
    # that the message is the same every time.
    for later, earlier in sorted(meeting):
        (name, a, writes), (other_name, b, other_writes) = arrays[later], arrays[earlier]
        if writes:
            check_disjoint((name, a), (other_name, b))
        elif other_writes:
            check_disjoint((other_name, b), (name, a))


def _run(kernel: Callable[..., Any], lists: Lists, present: tuple[int | None, ...], *constants: object) -> Any:
    """Call a kernel with the lists named by position (None: absent), through dense copies where they need it."""
    threads = _runtime.threads_for_call()
    if lists.ready:
        arrays = lists.arrays
        return kernel(*[None if at is None else arrays[at] for at in present], *constants, threads)
    dense = []
    for position in zip(*lists.arrays, strict=True):
        like = position[0] if is_dense(position[0]) else position[0].copy(order="K")
        dense.append([like, *(matching(a, like) for a in position[1:])])
    columns = [tuple([position[at] for position in dense]) for at in range(len(lists.arrays))]
    copies = [(a, updated) for at in present if at is not None and lists.written[at]
              for a, updated in zip(lists.arrays[at], columns[at], strict=True) if a is not updated]
    arguments = (*[None if at is None else columns[at] for at in present], *constants, threads)
    return checks.run_and_copy(kernel, arguments, [a for a, _ in copies], [updated for _, updated in copies])


def _check_float32(lists: Lists, **constants: float) -> None:
    """Require constants that float32 can hold if any parameter is float32: beyond, updates would be NaN.

    To be called where their sum is beyond, as it seldom is: looking at every dtype takes long.
    """
    for name, value in constants.items():
        if value > FLOAT32_MAX and any(a.dtype == FLOAT32 for a in lists.arrays[0]):
            raise ValueError(f"{name}: expected a number that float32, a parameter's dtype, can hold, got {value:g}")


def _need(name: str, value: object, reason: str) -> None:
    if value is None:
        raise ValueError(f"{name}: expected arrays like params because {reason}, got None")


def _check_step(step: object) -> float:
    """The number of the update, from 1, as a float that any power and product of it fits."""
    return float(min(check_integer("step", step, 1), 2**53))


# -- momentum ----------------------------------------------------------------------------------------------------------


def _check_momentum(params: object, grads: object, velocities: object, lr: object, momentum: object, dampening: object,
                    nesterov: object, weight_decay: object, maximize: object,
                    ) -> tuple[Lists, tuple[float, float, float, bool, float, bool]]:
    constants = (check_number("lr", lr), check_number("momentum", momentum), check_number("dampening", dampening),
                 check_flag("nesterov", nesterov), check_number("weight_decay", weight_decay),
                 check_flag("maximize", maximize))
    arguments: list[Argument] = [("params", params, True), ("grads", grads, False)]
    if constants[1] != 0.0:
        _need("velocities", velocities, f"momentum is {constants[1]:g}")
    if velocities is not None:
        arguments.append(("velocities", velocities, True))
    lists = check_lists(*arguments)
    if constants[0] + constants[1] + constants[2] + constants[4] > FLOAT32_MAX:
        _check_float32(lists, lr=constants[0], momentum=constants[1], dampening=constants[2], weight_decay=constants[4])
    return lists, constants


def momentum_step(params: Arrays, grads: Arrays, velocities: Arrays | None, *, lr: float, momentum: float = 0.9,
                  dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
                  maximize: bool = False) -> None:
    """Update parameters in place by gradient descent with momentum.

    ::

        g = grad + weight_decay * p                            (-grad with maximize)
        v = momentum * v + (1 - dampening) * g
        p = p - lr * v                                         or p - lr * (g + momentum * v) with nesterov

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters of any shape and layout, float32 or float64, updated in place. Arrays of a list may differ from each
        other in shape and dtype.
    grads : ndarray or list of ndarray
        Gradient of each parameter, of its shape and dtype; only read.
    velocities : ndarray or list of ndarray or None
        Running sum of gradients of each parameter, of its shape and dtype, updated in place; zeros before the first
        step. None only with ``momentum=0``, where the update is the same without them (given, they are still written).
    lr : float
        Learning rate, >= 0.
    momentum : float, default 0.9
        Decay of the velocity a step, >= 0.
    dampening : float, default 0.0
        Share of the gradient that does not enter the velocity, >= 0. It applies to every step; PyTorch's SGD, and
        ``fastnorm.optim.SGD``, leave the first one undampened.
    nesterov : bool, default False
        Look ahead by one step of momentum.
    weight_decay : float, default 0.0
        Factor of the L2 penalty added to the gradient, >= 0.
    maximize : bool, default False
        Ascend in place of descend.

    Raises
    ------
    TypeError
        If an argument is no array or list of arrays, or a dtype is not supported or does not match.
    ValueError
        If shapes or lengths do not match, a number is out of its range (or of float32's, for
        parameters of that dtype), an array to be written is read-only or overlaps another one, or velocities are
        missing. Nothing has been written then.

    References
    ----------
    Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning", 2013.
    The form is that of ``torch.optim.SGD``, where the learning rate multiplies the velocity.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w, v = np.array([1.0, 2.0]), np.zeros(2)
    >>> fn.momentum_step(w, np.array([0.5, -0.5]), v, lr=0.1)
    >>> w
    array([0.95, 2.05])
    """
    lists, constants = _check_momentum(params, grads, velocities, lr, momentum, dampening, nesterov, weight_decay,
                                       maximize)
    _run(kernels.optimizer.momentum, lists, (0, 1, None if velocities is None else 2), *constants)


# -- RMSProp -----------------------------------------------------------------------------------------------------------


def _check_rmsprop(params: object, grads: object, square_avgs: object, lr: object, alpha: object, eps: object,
                   weight_decay: object, momentum: object, momentum_buffers: object, centered: object,
                   grad_avgs: object, eps_inside_sqrt: object, maximize: object,
                   ) -> tuple[Lists, tuple[int | None, ...], tuple[float, float, float, float, float, bool, bool]]:
    constants = (check_number("lr", lr), check_number("alpha", alpha, 0.0, 1.0), check_number("eps", eps),
                 check_number("weight_decay", weight_decay), check_number("momentum", momentum),
                 check_flag("eps_inside_sqrt", eps_inside_sqrt), check_flag("maximize", maximize))
    centered, has_momentum = check_flag("centered", centered), constants[4] != 0.0
    if centered:
        _need("grad_avgs", grad_avgs, "centered is True")
    if has_momentum:
        _need("momentum_buffers", momentum_buffers, f"momentum is {constants[4]:g}")
    arguments: list[Argument] = [("params", params, True), ("grads", grads, False), ("square_avgs", square_avgs, True)]
    at_grad_avgs = at_buffers = None
    if grad_avgs is not None:
        at_grad_avgs = len(arguments) if centered else None
        arguments.append(("grad_avgs", grad_avgs, centered))
    if momentum_buffers is not None:
        at_buffers = len(arguments) if has_momentum else None
        arguments.append(("momentum_buffers", momentum_buffers, has_momentum))
    lists = check_lists(*arguments)
    if constants[0] + constants[2] + constants[3] + constants[4] > FLOAT32_MAX:
        _check_float32(lists, lr=constants[0], eps=constants[2], weight_decay=constants[3], momentum=constants[4])
    return lists, (at_grad_avgs, at_buffers), constants


def rmsprop_step(params: Arrays, grads: Arrays, square_avgs: Arrays, *, lr: float = 1e-2, alpha: float = 0.99,
                 eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
                 momentum_buffers: Arrays | None = None, centered: bool = False, grad_avgs: Arrays | None = None,
                 eps_inside_sqrt: bool = False, maximize: bool = False) -> None:
    """Update parameters in place by RMSProp.

    ::

        g = grad + weight_decay * p                            (-grad with maximize)
        s = alpha * s + (1 - alpha) * g**2
        m = alpha * m + (1 - alpha) * g                        (centered)
        d = g / (sqrt(s) + eps)                                or g / sqrt(s + eps) with eps_inside_sqrt
        b = momentum * b + d                                   (momentum > 0)
        p = p - lr * b                                         or p - lr * d without momentum

    Centered, ``s`` under the root is ``max(s - m**2, 0)``: an estimate of the gradient's variance.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters of any shape and layout, float32 or float64, updated in place. Arrays of a list may differ from each
        other in shape and dtype.
    grads : ndarray or list of ndarray
        Gradient of each parameter, of its shape and dtype; only read.
    square_avgs : ndarray or list of ndarray
        ``s``: running average of squared gradients, updated in place; zeros before the first step.
    lr : float, default 1e-2
        Learning rate, >= 0.
    alpha : float, default 0.99
        Decay of the running averages, in [0, 1].
    eps : float, default 1e-8
        Added to the denominator, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty added to the gradient, >= 0.
    momentum : float, default 0.0
        Decay of the momentum buffer, >= 0.
    momentum_buffers : ndarray or list of ndarray, optional
        ``b``: updated in place; zeros before the first step. Needed with momentum; without it, checked and left alone.
    centered : bool, default False
        Divide by the standard deviation of the gradient in place of its root mean square.
    grad_avgs : ndarray or list of ndarray, optional
        ``m``: running average of gradients, updated in place; zeros before the first step. Needed with ``centered``;
        without it, checked and left alone.
    eps_inside_sqrt : bool, default False
        Add eps under the root, as Keras and Optax do; PyTorch adds it to the root.
    maximize : bool, default False
        Ascend in place of descend.

    Raises
    ------
    TypeError
        If an argument is no array or list of arrays, or a dtype is not supported or does not match.
    ValueError
        If shapes or lengths do not match, a number is out of its range (or of float32's, for
        parameters of that dtype), an array to be written is read-only or overlaps another one, or a needed buffer is
        missing. Nothing has been written then.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5: RMSProp", 2012. Graves, "Generating sequences with recurrent neural networks",
    2013, equations 38 to 41, for the centered form. The form is that of ``torch.optim.RMSprop``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w, s = np.array([1.0, 2.0]), np.zeros(2)
    >>> fn.rmsprop_step(w, np.array([0.5, -0.5]), s)
    >>> w.round(3)
    array([0.9, 2.1])
    """
    lists, (at_grad_avgs, at_buffers), constants = _check_rmsprop(
        params, grads, square_avgs, lr, alpha, eps, weight_decay, momentum, momentum_buffers, centered, grad_avgs,
        eps_inside_sqrt, maximize)
    _run(kernels.optimizer.rmsprop, lists, (0, 1, 2, at_grad_avgs, at_buffers), *constants)


# -- Adam --------------------------------------------------------------------------------------------------------------


def _check_adam(params: object, grads: object, exp_avgs: object, exp_avg_sqs: object, step: object, lr: object,
                betas: object, eps: object, weight_decay: object, decoupled_weight_decay: object, amsgrad: object,
                max_exp_avg_sqs: object, epsilon_hat: object, maximize: object,
                ) -> tuple[Lists, int | None, tuple[float, float, float, float, float, float, bool, bool, bool]]:
    if not isinstance(betas, (list, tuple)):
        raise TypeError(f"betas: expected a pair of numbers, got {type(betas).__name__}")
    if len(betas) != 2:
        raise ValueError(f"betas: expected a pair of numbers, got {len(betas)}")
    constants = (_check_step(step), check_number("lr", lr),
                 check_number("betas[0]", betas[0], 0.0, 1.0, open_high=True),
                 check_number("betas[1]", betas[1], 0.0, 1.0, open_high=True),
                 check_number("eps", eps), check_number("weight_decay", weight_decay),
                 check_flag("decoupled_weight_decay", decoupled_weight_decay), check_flag("epsilon_hat", epsilon_hat),
                 check_flag("maximize", maximize))
    amsgrad = check_flag("amsgrad", amsgrad)
    arguments: list[Argument] = [("params", params, True), ("grads", grads, False), ("exp_avgs", exp_avgs, True),
                                 ("exp_avg_sqs", exp_avg_sqs, True)]
    if amsgrad:
        _need("max_exp_avg_sqs", max_exp_avg_sqs, "amsgrad is True")
    if max_exp_avg_sqs is not None:
        arguments.append(("max_exp_avg_sqs", max_exp_avg_sqs, amsgrad))
    lists = check_lists(*arguments)
    if constants[1] + constants[4] + constants[5] > FLOAT32_MAX:
        _check_float32(lists, lr=constants[1], eps=constants[4], weight_decay=constants[5])
    return lists, 4 if amsgrad else None, constants


def adam_step(params: Arrays, grads: Arrays, exp_avgs: Arrays, exp_avg_sqs: Arrays, *, step: int, lr: float = 1e-3,
              betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
              decoupled_weight_decay: bool = False, amsgrad: bool = False, max_exp_avg_sqs: Arrays | None = None,
              epsilon_hat: bool = False, maximize: bool = False) -> None:
    """Update parameters in place by Adam or AdamW.

    ::

        g = grad + weight_decay * p                            (-grad with maximize)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**step)) / (sqrt(v / (1 - beta2**step)) + eps)

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters of any shape and layout, float32 or float64, updated in place. Arrays of a list may differ from each
        other in shape and dtype.
    grads : ndarray or list of ndarray
        Gradient of each parameter, of its shape and dtype; only read.
    exp_avgs : ndarray or list of ndarray
        ``m``: running average of gradients, updated in place; zeros before the first step.
    exp_avg_sqs : ndarray or list of ndarray
        ``v``: running average of squared gradients, updated in place; zeros before the first step.
    step : int
        Number of this update, from 1, for the bias corrections.
    lr : float, default 1e-3
        Learning rate, >= 0.
    betas : pair of float, default (0.9, 0.999)
        Decay of ``m`` and of ``v``, each in [0, 1).
    eps : float, default 1e-8
        Added to the denominator, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty added to the gradient, >= 0.
    decoupled_weight_decay : bool, default False
        Multiply the parameter by ``1 - lr * weight_decay`` in place of adding to the gradient: AdamW.
    amsgrad : bool, default False
        Divide by the root of the largest ``v`` so far in place of this one's.
    max_exp_avg_sqs : ndarray or list of ndarray, optional
        Largest ``v`` so far, updated in place; zeros before the first step. Needed with ``amsgrad``; without it,
        checked and left alone.
    epsilon_hat : bool, default False
        Add eps to the uncorrected root: ``p - lr * sqrt(1 - beta2**step) / (1 - beta1**step) * m / (sqrt(v) + eps)``.
        This is the paper's epsilon hat, as in Keras, scikit-learn and ONNX.
    maximize : bool, default False
        Ascend in place of descend.

    Raises
    ------
    TypeError
        If an argument is no array or list of arrays, or a dtype is not supported or does not match.
    ValueError
        If shapes or lengths do not match, a number is out of its range (or of float32's, for
        parameters of that dtype), an array to be written is read-only or overlaps another one, or a needed buffer is
        missing. Nothing has been written then.

    References
    ----------
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1. Loshchilov and Hutter, "Decoupled
    weight decay regularization", 2019. Reddi, Kale and Kumar, "On the convergence of Adam and beyond", 2018, for
    AMSGrad (PyTorch's form: the maximum is taken before the bias correction).

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w, m, v = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
    >>> fn.adam_step(w, np.array([0.5, -0.5]), m, v, step=1, lr=0.1)
    >>> w.round(3)
    array([0.9, 2.1])
    """
    lists, at_max, constants = _check_adam(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay,
                                           decoupled_weight_decay, amsgrad, max_exp_avg_sqs, epsilon_hat, maximize)
    _run(kernels.optimizer.adam, lists, (0, 1, 2, 3, at_max), *constants)


# -- Adagrad -----------------------------------------------------------------------------------------------------------


def _check_adagrad(params: object, grads: object, state_sums: object, step: object, lr: object, lr_decay: object,
                   eps: object, weight_decay: object, maximize: object,
                   ) -> tuple[Lists, tuple[float, float, float, float, float, bool]]:
    constants = (_check_step(step), check_number("lr", lr), check_number("lr_decay", lr_decay),
                 check_number("eps", eps), check_number("weight_decay", weight_decay),
                 check_flag("maximize", maximize))
    lists = check_lists(("params", params, True), ("grads", grads, False), ("state_sums", state_sums, True))
    if constants[1] + constants[3] + constants[4] > FLOAT32_MAX:
        _check_float32(lists, lr=constants[1], eps=constants[3], weight_decay=constants[4])
    return lists, constants


def adagrad_step(params: Arrays, grads: Arrays, state_sums: Arrays, *, step: int, lr: float = 1e-2,
                 lr_decay: float = 0.0, eps: float = 1e-10, weight_decay: float = 0.0, maximize: bool = False) -> None:
    """Update parameters in place by Adagrad.

    ::

        g = grad + weight_decay * p                            (-grad with maximize)
        s = s + g**2
        p = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(s) + eps)

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters of any shape and layout, float32 or float64, updated in place. Arrays of a list may differ from each
        other in shape and dtype.
    grads : ndarray or list of ndarray
        Gradient of each parameter, of its shape and dtype; only read.
    state_sums : ndarray or list of ndarray
        ``s``: sum of squared gradients, updated in place; zeros (or a small number) before the first step.
    step : int
        Number of this update, from 1, for the decay of the learning rate.
    lr : float, default 1e-2
        Learning rate, >= 0.
    lr_decay : float, default 0.0
        Decay of the learning rate, >= 0.
    eps : float, default 1e-10
        Added to the denominator, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty added to the gradient, >= 0.
    maximize : bool, default False
        Ascend in place of descend.

    Raises
    ------
    TypeError
        If an argument is no array or list of arrays, or a dtype is not supported or does not match.
    ValueError
        If shapes or lengths do not match, a number is out of its range (or of float32's, for
        parameters of that dtype), or an array to be written is read-only or overlaps another one. Nothing has been
        written then.

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", 2011. The
    form is that of ``torch.optim.Adagrad``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w, s = np.array([1.0, 2.0]), np.zeros(2)
    >>> fn.adagrad_step(w, np.array([0.5, -0.5]), s, step=1, lr=0.1)
    >>> w.round(3)
    array([0.9, 2.1])
    """
    lists, constants = _check_adagrad(params, grads, state_sums, step, lr, lr_decay, eps, weight_decay, maximize)
    _run(kernels.optimizer.adagrad, lists, (0, 1, 2), *constants)


# -- clipping ----------------------------------------------------------------------------------------------------------


def _check_clip(grads: object, max_norm: object) -> tuple[Lists, tuple[float, bool]]:
    max_norm = check_number("max_norm", max_norm, finite=False)
    measure_only = max_norm == math.inf
    return check_lists(("grads", grads, not measure_only)), (max_norm, measure_only)


def clip_grad_norm(grads: Arrays, max_norm: float) -> float:
    """Scale gradients in place so that their common norm is at most ``max_norm``; return the norm before.

    ::

        norm = sqrt(sum of g**2 over all elements of all arrays)
        g = g * min(1, max_norm / (norm + 1e-6))

    Parameters
    ----------
    grads : ndarray or list of ndarray
        Gradients of any shape and layout, float32 or float64, scaled in place.
    max_norm : float
        Largest norm allowed, >= 0. Infinity measures only: nothing is written, and arrays may be read-only.

    Returns
    -------
    float
        The norm before scaling, accumulated in float64; 0 for an empty list. Where it is NaN, every gradient becomes
        NaN; where it is infinite, finite gradients become 0 and infinite ones NaN, as in PyTorch with
        ``error_if_nonfinite=False``.

    Raises
    ------
    TypeError
        If ``grads`` is no array or list of arrays, or a dtype is not supported.
    ValueError
        If ``max_norm`` is negative or NaN, or an array is read-only or overlaps another one. Nothing has been written
        then.

    References
    ----------
    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013, algorithm 1. The form
    is that of ``torch.nn.utils.clip_grad_norm_``.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> g = [np.array([3.0]), np.array([4.0])]
    >>> fn.clip_grad_norm(g, 1.0)
    5.0
    >>> [a.round(3) for a in g]
    [array([0.6]), array([0.8])]
    """
    lists, constants = _check_clip(grads, max_norm)
    norm: float = _run(kernels.optimizer.clip_grad_norm, lists, (0,), *constants)
    return norm


# -- values that are not finite ----------------------------------------------------------------------------------------


def _check_all_finite(arrays: object) -> Lists:
    return check_lists(("arrays", arrays, False))


def all_finite(arrays: Arrays) -> bool:
    """Tell whether no element of any array is NaN or infinite, in one pass over memory and without a copy.

    Parameters
    ----------
    arrays : ndarray or list of ndarray
        Arrays of any shape and layout, float32 or float64, such as the gradients of a step; only read.

    Returns
    -------
    bool
        ``all(numpy.isfinite(a).all() for a in arrays)``; True for an empty list.

    Raises
    ------
    TypeError
        If ``arrays`` is no array or list of arrays, or a dtype is not supported.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> fn.all_finite([np.ones(3), np.array([1.0, np.inf])])
    False
    """
    finite: bool = _run(kernels.optimizer.all_finite, _check_all_finite(arrays), (0,))
    return finite
