"""Optimizers that keep their state: `SGD`, `RMSProp`, `Adam`, `AdamW`, `Adagrad`.

Names and defaults are PyTorch's. Each object holds the parameters, the buffers of its update and the number of steps
taken, and calls one function of ``fastnorm.updates`` a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from . import updates
from ._arrays import Array, check_choice, check_integer, check_like, check_number, first_true
from ._backend import Backend, HasBackend
from .updates import Arrays, check_lists

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSProp"]

NONFINITE = ("propagate", "skip", "raise")


class Optimizer(HasBackend):
    """What the optimizers share: parameters, buffers, the step, and the state as a dictionary.

    A subclass names the function that updates (``_function``) and says which buffers it takes (`_buffer_names`); its
    options are that function's keyword arguments unless `_arguments` says otherwise.
    """

    _function: ClassVar[str]

    def __init__(self, params: Arrays, lr: float, options: dict[str, Any], nonfinite: str, backend: Backend,
                 fill: float = 0.0) -> None:
        super().__init__(backend)
        self._nonfinite = check_choice("nonfinite", nonfinite, NONFINITE)
        self._skipped_steps = 0
        self._single = not isinstance(params, (list, tuple))
        self.params: tuple[Array, ...] = check_lists(("params", params, True)).arrays[0]
        self._lr, self._options = self._checked(lr, options)
        self._steps = 0
        self._buffers = {name: tuple([np.full_like(p, fill, subok=False) for p in self.params])
                         for name in self._buffer_names(self._options)}

    @property
    def lr(self) -> float:
        """Learning rate of the next step; a finite number >= 0."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = check_number("lr", value)

    @property
    def skipped_steps(self) -> int:
        """Calls of `step` that changed nothing because of a gradient that is not finite (``nonfinite="skip"``)."""
        return self._skipped_steps

    def __repr__(self) -> str:
        shown = {**self._options, "nonfinite": self._nonfinite}
        options = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}(<{len(self.params)} arrays>, lr={self._lr!r}{options})"

    def step(self, grads: Arrays) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        grads : ndarray or list of ndarray
            Gradient of each parameter, of its shape and dtype, in the order of ``params``; one array if ``params`` was
            one. Only read.

        Raises
        ------
        TypeError, ValueError
            If the gradients do not match the parameters. Neither parameters nor state have changed then.
        FloatingPointError
            With ``nonfinite="raise"``, if a gradient holds NaN or infinity; the message names the first one. Neither
            parameters nor state have changed then.
        """
        if self._nonfinite != "propagate":
            grads = self._checked_grads(grads)
            if not self._functions.all_finite(grads):
                if self._nonfinite == "raise":
                    raise FloatingPointError(_first_nonfinite(grads))
                self._skipped_steps += 1
                return
        buffers = {name: self._as_given(arrays) for name, arrays in self._buffers.items()}
        update = getattr(self._functions, self._function)
        # Counted first: KeyboardInterrupt comes when the kernels are done, before another line would run.
        self._steps += 1
        try:
            update(self._as_given(self.params), grads, lr=self._lr, **buffers,
                   **self._arguments(self._options, self._steps))
        except Exception:
            self._steps -= 1
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, beside the parameters.

        Returns
        -------
        dict
            ``optimizer`` (the class name), ``step`` (the number of steps taken, without those skipped), ``lr``, the
            options (numbers, flags, ``betas`` as a pair), ``nonfinite``, ``skipped_steps`` and, for each buffer of the
            update, a list of copies, one array a parameter.
        """
        return {"optimizer": type(self).__name__, "step": self._steps, "lr": self._lr, **self._options,
                "nonfinite": self._nonfinite, "skipped_steps": self._skipped_steps,
                **{name: [a.copy() for a in arrays] for name, arrays in self._buffers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; ``lr`` and the options are taken from it too.

        Parameters
        ----------
        state : dict
            As returned by `state_dict` of an optimizer of the same class, over parameters of the same shapes and
            dtypes. The arrays are copied. Numbers may be 0-d arrays, as ``numpy.load`` gives them. A state without
            ``nonfinite`` or ``skipped_steps`` leaves the optimizer's own choice, or sets the count to 0.

        Raises
        ------
        TypeError
            If ``state`` is no mapping, or a value is of the wrong kind or dtype.
        ValueError
            If it is the state of another class, a key is missing or unknown, or a value has the wrong shape or range.
            Nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a dict, got {type(state).__name__}")
        kind = _plain(state.get("optimizer"))
        if kind != type(self).__name__:
            raise ValueError(f"state: expected the state of {type(self).__name__}, got that of {kind}")
        scalars = ["optimizer", "step", "lr", *self._options]
        _check_keys(state, scalars, may_have_more=True)
        steps = check_integer("step", _plain(state["step"]), 0)
        lr, options = self._checked(_plain(state["lr"]), {name: _plain(state[name]) for name in self._options})
        nonfinite = check_choice("nonfinite", _plain(state.get("nonfinite", self._nonfinite)), NONFINITE)
        skipped_steps = check_integer("skipped_steps", _plain(state.get("skipped_steps", 0)), 0)
        names = self._buffer_names(options)
        _check_keys(state, [*scalars, *names], optional=("nonfinite", "skipped_steps"))
        buffers = {}
        for name in names:
            arrays = state[name]
            if not isinstance(arrays, (list, tuple)):
                raise TypeError(f"{name}: expected a list of arrays, got {type(arrays).__name__}")
            if len(arrays) != len(self.params):
                raise ValueError(f"{name}: expected {len(self.params)} arrays as in params, got {len(arrays)}")
            copies = []
            for i, (a, p) in enumerate(zip(arrays, self.params, strict=True)):
                copies.append(np.empty_like(p, subok=False))
                copies[i][...] = check_like(f"{name}[{i}]", a, p.shape, p.dtype)
            buffers[name] = tuple(copies)
        self._steps, self._lr, self._options, self._buffers = steps, lr, options, buffers
        self._nonfinite, self._skipped_steps = nonfinite, skipped_steps

    def _checked_grads(self, grads: Arrays) -> Array | tuple[Array, ...]:
        """Check the gradients against the parameters, so that no skipped step hides a wrong argument; return them."""
        lists = check_lists(("params", self._as_given(self.params), True), ("grads", grads, False))
        return self._as_given(lists.arrays[1])

    def _buffer_names(self, options: dict[str, Any]) -> tuple[str, ...]:
        """Names of the update's arguments that hold state, given the options."""
        raise NotImplementedError

    def _arguments(self, options: dict[str, Any], step: int) -> dict[str, Any]:
        """Keyword arguments of the update at this step, without ``lr`` and the buffers."""
        return options

    def _checked(self, lr: object, options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """Require what the update itself requires: an update of no parameters checks every number."""
        lr = check_number("lr", lr)
        getattr(updates, self._function)([], [], lr=lr, **{name: [] for name in self._buffer_names(options)},
                                         **self._arguments(options, 1))
        return lr, {name: tuple(value) if isinstance(value, list) else value.item() if isinstance(value, np.generic)
                    else value for name, value in options.items()}

    def _as_given(self, arrays: tuple[Array, ...]) -> Array | tuple[Array, ...]:
        """One array where ``params`` was one, so that messages speak of `grads` and not of `grads[0]`."""
        return arrays[0] if self._single else arrays


def _plain(value: Any) -> Any:
    """A Python number, string or list where the value went through a NumPy file."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _first_nonfinite(grads: Array | tuple[Array, ...]) -> str:
    """The message about the first gradient, and its first element in C order, that is NaN or infinite."""
    arrays = [("grads", grads)] if isinstance(grads, np.ndarray) else [(f"grads[{i}]", a) for i, a in enumerate(grads)]
    name, grad = next((name, a) for name, a in arrays if not np.isfinite(a).all())
    at, where = first_true(~np.isfinite(np.asarray(grad)))
    return f"{name}: expected finite values, got {grad[at]}{where}"


def _check_keys(state: Mapping[str, Any], expected: list[str], *, may_have_more: bool = False,
                optional: tuple[str, ...] = ()) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [] if may_have_more else [str(name) for name in state if name not in (*expected, *optional)]
    if missing or unknown:
        found = " and ".join([f"{what} {', '.join(names)}" for what, names in
                              (("missing", missing), ("unknown", unknown)) if names])
        raise ValueError(f"state: expected the keys {', '.join(expected)}, got {found}")


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for: see `fastnorm.momentum_step` for the formula.

    As in PyTorch, dampening leaves the first step alone (the velocity starts as the first gradient), and without
    momentum it does nothing.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters, float32 or float64, of any layout. They are referred to, not copied, and updated in place.
    lr : float, default 1e-3
        Learning rate, >= 0.
    momentum : float, default 0.0
        Decay of the velocity a step, >= 0.
    dampening : float, default 0.0
        Share of the gradient that does not enter the velocity, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty, >= 0.
    nesterov : bool, default False
        Look ahead by one step of momentum; needs momentum and no dampening.
    maximize : bool, default False
        Ascend in place of descend.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does about a gradient that holds NaN or infinity: update with it; change nothing but
        `skipped_steps`; or change nothing and raise FloatingPointError. The last two read the gradients once more.
    backend : module, optional
        Where the update functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set.
    skipped_steps : int
        Calls of `step` that changed nothing because of ``nonfinite="skip"``; saved with the state.

    Raises
    ------
    TypeError
        If a parameter is no array of float32 or float64, or a value is of the wrong kind.
    ValueError
        If a number is out of its range, ``nonfinite`` is none of the three, a parameter is read-only or given twice, or
        ``nesterov`` lacks its conditions.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w = np.array([4.0])
    >>> optimizer = fn.optim.SGD(w, lr=0.1, momentum=0.5)
    >>> for _ in range(100):
    ...     optimizer.step(2 * w - 10)  # the gradient of w**2 - 10 w + 25
    >>> w.round(3)
    array([5.])
    """

    _function = "momentum_step"

    def __init__(self, params: Arrays, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False,
                 nonfinite: str = "propagate", backend: Backend = None) -> None:
        super().__init__(params, lr, {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                                      "nesterov": nesterov, "maximize": maximize}, nonfinite, backend)

    def _buffer_names(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("velocities",) if check_number("momentum", options["momentum"]) > 0 else ()

    def _arguments(self, options: dict[str, Any], step: int) -> dict[str, Any]:
        arguments = dict(options)
        if options["momentum"] == 0:
            arguments["velocities"] = None
        if options["momentum"] == 0 or step == 1:
            arguments["dampening"] = 0.0
        return arguments

    def _checked(self, lr: object, options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        dampening = check_number("dampening", options["dampening"])  # which the first step does not pass on
        lr, options = super()._checked(lr, options)
        if options["nesterov"] and (options["momentum"] == 0 or dampening != 0):
            raise ValueError(f"nesterov: expected momentum > 0 and no dampening beside it, got momentum "
                             f"{options['momentum']:g} and dampening {dampening:g}")
        return lr, options


class RMSProp(Optimizer):
    """RMSProp: see `fastnorm.rmsprop_step` for the formula.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters, float32 or float64, of any layout. They are referred to, not copied, and updated in place.
    lr : float, default 1e-2
        Learning rate, >= 0.
    alpha : float, default 0.99
        Decay of the running averages, in [0, 1].
    eps : float, default 1e-8
        Added to the denominator, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty, >= 0.
    momentum : float, default 0.0
        Decay of the momentum buffer, >= 0.
    centered : bool, default False
        Divide by the standard deviation of the gradient in place of its root mean square.
    maximize : bool, default False
        Ascend in place of descend.
    eps_inside_sqrt : bool, default False
        Add eps under the root, as Keras and Optax do.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does about a gradient that holds NaN or infinity: update with it; change nothing but
        `skipped_steps`; or change nothing and raise FloatingPointError. The last two read the gradients once more.
    backend : module, optional
        Where the update functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set.
    skipped_steps : int
        Calls of `step` that changed nothing because of ``nonfinite="skip"``; saved with the state.

    Raises
    ------
    TypeError
        If a parameter is no array of float32 or float64, or a value is of the wrong kind.
    ValueError
        If a number is out of its range, ``nonfinite`` is none of the three, or a parameter is read-only or given twice.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w = [np.array([4.0])]
    >>> fn.optim.RMSProp(w, lr=0.1, centered=True)
    RMSProp(<1 arrays>, lr=0.1, alpha=0.99, eps=1e-08, weight_decay=0.0, momentum=0.0, centered=True, maximize=False,
    eps_inside_sqrt=False, nonfinite='propagate')
    """

    _function = "rmsprop_step"

    def __init__(self, params: Arrays, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
                 weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False, maximize: bool = False, *,
                 eps_inside_sqrt: bool = False, nonfinite: str = "propagate", backend: Backend = None) -> None:
        super().__init__(params, lr, {"alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
                                      "centered": centered, "maximize": maximize, "eps_inside_sqrt": eps_inside_sqrt},
                         nonfinite, backend)

    def _buffer_names(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avgs", *(["grad_avgs"] if options["centered"] else []),
                *(["momentum_buffers"] if check_number("momentum", options["momentum"]) > 0 else []))


class Adam(Optimizer):
    """Adam, and AdamW by ``decoupled_weight_decay``: see `fastnorm.adam_step` for the formula.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters, float32 or float64, of any layout. They are referred to, not copied, and updated in place.
    lr : float, default 1e-3
        Learning rate, >= 0.
    betas : pair of float, default (0.9, 0.999)
        Decay of the running averages of the gradient and of its square, each in [0, 1).
    eps : float, default 1e-8
        Added to the denominator, >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty, >= 0.
    amsgrad : bool, default False
        Divide by the root of the largest average so far.
    maximize : bool, default False
        Ascend in place of descend.
    decoupled_weight_decay : bool, default False
        Shrink the parameters in place of adding the penalty to the gradient.
    epsilon_hat : bool, default False
        Add eps to the uncorrected root, as Keras, scikit-learn and ONNX do.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does about a gradient that holds NaN or infinity: update with it; change nothing but
        `skipped_steps`; or change nothing and raise FloatingPointError. The last two read the gradients once more.
    backend : module, optional
        Where the update functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set.
    skipped_steps : int
        Calls of `step` that changed nothing because of ``nonfinite="skip"``; saved with the state.

    Raises
    ------
    TypeError
        If a parameter is no array of float32 or float64, or a value is of the wrong kind.
    ValueError
        If a number is out of its range, ``nonfinite`` is none of the three, or a parameter is read-only or given twice.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w, b = np.array([4.0, 3.0]), np.array([1.0])
    >>> optimizer = fn.optim.Adam([w, b], lr=0.1)
    >>> optimizer.step([np.array([0.5, -0.5]), np.array([2.0])])
    >>> w.round(3), b.round(3)
    (array([3.9, 3.1]), array([0.9]))
    >>> optimizer.lr /= 10
    >>> optimizer.state_dict()["step"]
    1

    Steps with a gradient that overflowed can be left out:

    >>> optimizer = fn.optim.Adam([w, b], lr=0.1, nonfinite="skip")
    >>> optimizer.step([np.array([0.5, np.nan]), np.array([2.0])])
    >>> w.round(3), optimizer.skipped_steps
    (array([3.9, 3.1]), 1)
    """

    _function = "adam_step"

    def __init__(self, params: Arrays, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False,
                 decoupled_weight_decay: bool = False, epsilon_hat: bool = False, nonfinite: str = "propagate",
                 backend: Backend = None) -> None:
        super().__init__(params, lr, {"betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
                                      "maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay,
                                      "epsilon_hat": epsilon_hat}, nonfinite, backend)

    def _buffer_names(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avgs", "exp_avg_sqs", *(["max_exp_avg_sqs"] if options["amsgrad"] else []))

    def _arguments(self, options: dict[str, Any], step: int) -> dict[str, Any]:
        return {**options, "step": step}


class AdamW(Adam):
    """Adam with decoupled weight decay, 1e-2 by default: see `fastnorm.adam_step` for the formula.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters, float32 or float64, of any layout. They are referred to, not copied, and updated in place.
    lr : float, default 1e-3
        Learning rate, >= 0.
    betas : pair of float, default (0.9, 0.999)
        Decay of the running averages of the gradient and of its square, each in [0, 1).
    eps : float, default 1e-8
        Added to the denominator, >= 0.
    weight_decay : float, default 1e-2
        Each step multiplies the parameters by ``1 - lr * weight_decay``; >= 0.
    amsgrad : bool, default False
        Divide by the root of the largest average so far.
    maximize : bool, default False
        Ascend in place of descend.
    epsilon_hat : bool, default False
        Add eps to the uncorrected root, as Keras, scikit-learn and ONNX do.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does about a gradient that holds NaN or infinity: update with it; change nothing but
        `skipped_steps`; or change nothing and raise FloatingPointError. The last two read the gradients once more.
    backend : module, optional
        Where the update functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set.
    skipped_steps : int
        Calls of `step` that changed nothing because of ``nonfinite="skip"``; saved with the state.

    Raises
    ------
    TypeError
        If a parameter is no array of float32 or float64, or a value is of the wrong kind.
    ValueError
        If a number is out of its range, ``nonfinite`` is none of the three, or a parameter is read-only or given twice.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w = np.array([4.0])
    >>> fn.optim.AdamW(w, lr=0.1, weight_decay=0.5).step(np.zeros(1))
    >>> w
    array([3.8])
    """

    def __init__(self, params: Arrays, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
                 epsilon_hat: bool = False, nonfinite: str = "propagate", backend: Backend = None) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
                         decoupled_weight_decay=True, epsilon_hat=epsilon_hat, nonfinite=nonfinite, backend=backend)


class Adagrad(Optimizer):
    """Adagrad: see `fastnorm.adagrad_step` for the formula.

    Parameters
    ----------
    params : ndarray or list of ndarray
        Parameters, float32 or float64, of any layout. They are referred to, not copied, and updated in place.
    lr : float, default 1e-2
        Learning rate, >= 0.
    lr_decay : float, default 0.0
        The learning rate of step t is ``lr / (1 + (t - 1) * lr_decay)``; >= 0.
    weight_decay : float, default 0.0
        Factor of the L2 penalty, >= 0.
    initial_accumulator_value : float, default 0.0
        Where the sums of squared gradients start, >= 0.
    eps : float, default 1e-10
        Added to the denominator, >= 0.
    maximize : bool, default False
        Ascend in place of descend.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does about a gradient that holds NaN or infinity: update with it; change nothing but
        `skipped_steps`; or change nothing and raise FloatingPointError. The last two read the gradients once more.
    backend : module, optional
        Where the update functions are looked up: `fastnorm` by default.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set.
    skipped_steps : int
        Calls of `step` that changed nothing because of ``nonfinite="skip"``; saved with the state.

    Raises
    ------
    TypeError
        If a parameter is no array of float32 or float64, or a value is of the wrong kind.
    ValueError
        If a number is out of its range, ``nonfinite`` is none of the three, or a parameter is read-only or given twice.

    Examples
    --------
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> w = np.array([4.0])
    >>> fn.optim.Adagrad(w, lr=0.1).step(np.array([3.0]))
    >>> w.round(3)
    array([3.9])
    """

    _function = "adagrad_step"

    def __init__(self, params: Arrays, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
                 initial_accumulator_value: float = 0.0, eps: float = 1e-10, *, maximize: bool = False,
                 nonfinite: str = "propagate", backend: Backend = None) -> None:
        fill = check_number("initial_accumulator_value", initial_accumulator_value)
        super().__init__(params, lr, {"lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
                                      "maximize": maximize}, nonfinite, backend, fill)

    def _buffer_names(self, options: dict[str, Any]) -> tuple[str, ...]:
        return ("state_sums",)

    def _arguments(self, options: dict[str, Any], step: int) -> dict[str, Any]:
        return {**options, "step": step}
