"""PyTorch's optimizers with fastnorm's updates: `SGD`, `RMSprop`, `Adam`, `AdamW`, `Adagrad`.

Each class is PyTorch's own with another ``step``: arguments, parameter groups, state (its keys, its ``step`` tensors)
and state dicts are inherited, so that they cannot differ. The update is one call of ``fastnorm.updates`` for all
parameters of a group that have taken as many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar, NamedTuple

import torch

from ... import updates
from ..._arrays import Array
from .tensors import array, check_tensor, is_plain

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]

Group = dict[str, Any]  # a parameter group: the options and the list of parameters under "params"
State = dict[str, Any]  # what PyTorch keeps for a parameter: tensors by name


class _Batch(NamedTuple):
    """Parameters of one group that have a gradient and have taken as many steps."""

    group: Group
    steps: int
    params: list[torch.Tensor]
    grads: list[torch.Tensor]


class _Call(NamedTuple):
    """The arguments of an update of one batch, and what they were made from."""

    params: list[torch.Tensor]
    states: list[State]
    arrays: tuple[list[Array], list[Array]]
    options: dict[str, Any]


class _Step(torch.optim.Optimizer):
    """The ``step`` that stands in front of an optimizer of PyTorch.

    A subclass names the update, its check alone, the options of a group that it takes, and the state that it takes
    (`_buffers`).
    """

    _update: ClassVar[Callable[..., None]]
    _check: ClassVar[Callable[..., Any]]
    _defaults: ClassVar[dict[str, Any]]  # of the update, which its check does not have
    _options: ClassVar[tuple[str, ...]]
    _counts_steps: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """Note the defaults of the update."""
        super().__init_subclass__()
        if hasattr(cls, "_update"):
            cls._defaults = {name: parameter.default for name, parameter in signature(cls._update).parameters.items()
                             if parameter.default is not Parameter.empty}

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as PyTorch's optimizers do.

        Raises
        ------
        TypeError
            If a parameter is no dense tensor of float32 or float64 in CPU memory.
        ValueError
            If ``capturable`` or ``differentiable`` is on.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for i, param in enumerate(group["params"]):
                check_tensor(_name(len(self.param_groups) - 1, i), param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in its own memory.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        The loss that ``closure`` returned, else None.

        Raises
        ------
        TypeError
            If a parameter or a gradient is not dense, not in CPU memory or neither float32 nor float64, or does not fit
            its state.
        ValueError
            If an option is out of its range, or ``capturable`` or ``differentiable`` is on. Nothing has changed then,
            in no group.
        RuntimeError
            If a ``GradScaler`` expects the update to unscale the gradients, as it does with ``fused=True``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("step: with fused=True, GradScaler leaves unscaling to the update, which fastnorm's "
                               "does not do: use fused=False")
        calls = [self._prepare(batch) for at in range(len(self.param_groups)) for batch in self._batches(at)]
        if len(calls) > 1:  # an update checks its arguments itself, but only when the ones before it have run
            for call in calls:
                self._check(*call.arrays, **{**self._defaults, **call.options})
        for call in calls:
            self._run(call)
        return loss

    def _batches(self, at: int) -> list[_Batch]:
        """The checked batches of one group. PyTorch counts the steps of each parameter by itself."""
        group = self.param_groups[at]
        _check_options(group)
        by_steps: dict[int, _Batch] = {}
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if not is_plain(param) or not is_plain(grad) or grad.dtype is not param.dtype:
                check_tensor(_name(at, i), param)
                check_tensor(f"gradient of {_name(at, i)}", grad, param.dtype)
            steps = self._steps_taken(param)
            batch = by_steps.get(steps)
            if batch is None:
                batch = by_steps[steps] = _Batch(group, steps, [], [])
            batch.params.append(param)
            batch.grads.append(grad)
        return list(by_steps.values())

    def _prepare(self, batch: _Batch) -> _Call:
        """The call that updates a batch."""
        group, steps, params, grads = batch
        buffers = self._buffers(group)
        states = [self._state_of(param, group, buffers) for param in params]
        kept = {argument: [array(state[key]) for state in states] for key, argument in buffers.items()}
        return _Call(params, states, ([array(param) for param in params], [array(grad) for grad in grads]),
                     {**kept, **self._arguments(group, steps + 1)})

    def _run(self, call: _Call) -> None:
        """Update one batch. State that is not there yet is kept only once the update has worked."""
        self._update(*call.arrays, **call.options)
        torch.autograd.graph.increment_version(call.params)  # autograd must know that a saved parameter has changed
        if self._counts_steps:
            torch._foreach_add_([state["step"] for state in call.states], 1)
        for param, state in zip(call.params, call.states, strict=True):
            if state:
                self.state[param] = state

    def _state_of(self, param: torch.Tensor, group: Group, buffers: dict[str, str]) -> State:
        """The parameter's state as PyTorch keeps it, with what is missing at its initial value."""
        state: State = self.state.get(param, {})
        missing = [key for key in buffers if state.get(key) is None]
        if not missing and (state or not self._counts_steps):
            return state
        state = dict(state)
        if self._counts_steps and "step" not in state:
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            state["step"] = torch.zeros((), dtype=dtype)
        for key in missing:
            state[key] = torch.full_like(param, self._initial(group), requires_grad=False)
        return state

    def _steps_taken(self, param: torch.Tensor) -> int:
        step = self.state.get(param, {}).get("step")
        return 0 if step is None else int(step.item())

    def _buffers(self, group: Group) -> dict[str, str]:
        """The state that the update takes with these options: PyTorch's key, and the name of the argument."""
        raise NotImplementedError

    def _initial(self, group: Group) -> float:
        """What a buffer starts from."""
        return 0.0

    def _arguments(self, group: Group, step: int) -> dict[str, Any]:
        """The arguments of the update that are no arrays."""
        return {name: _number(group[name]) for name in ("lr", *self._options)}


class _CountedStep(_Step):
    """An update that takes the number of the step."""

    def _arguments(self, group: Group, step: int) -> dict[str, Any]:
        return {**super()._arguments(group, step), "step": step}


def _name(group: int, at: int) -> str:
    """A parameter in an error message."""
    return f"param_groups[{group}]['params'][{at}]"


def _check_options(group: Group) -> None:
    for name in ("capturable", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name}: expected False, got True: fastnorm's update cannot be recorded")


def _number(value: Any) -> Any:
    """An option of a group; PyTorch lets numbers be tensors of one element, and those of pairs, too."""
    if isinstance(value, (list, tuple)):
        return tuple([_number(each) for each in value])
    return value.item() if isinstance(value, torch.Tensor) else value


class SGD(_Step, torch.optim.SGD):
    """`torch.optim.SGD` with the update of `fastnorm.momentum_step`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts
        Dense tensors of float32 or float64 in CPU memory, in any memory format; or parameter groups.
    lr, momentum, dampening, weight_decay, nesterov, maximize
        As in ``torch.optim.SGD``.
    foreach, fused : bool, optional
        Kept for state dicts; without effect: there is one implementation.
    differentiable : bool
        Must be False.

    Raises
    ------
    TypeError
        If a parameter is of another kind, dtype, layout or device.
    ValueError
        If an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import SGD
    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = SGD([w], lr=0.1)
    >>> (w ** 2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([3.2000])
    """

    _update = staticmethod(updates.momentum_step)
    _check = staticmethod(updates._check_momentum)
    _options = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    _counts_steps = False

    def _buffers(self, group: Group) -> dict[str, str]:
        return {"momentum_buffer": "velocities"} if group["momentum"] else {}

    def _steps_taken(self, param: torch.Tensor) -> int:
        """0 before the first step with momentum, else 1: PyTorch does not count, and nothing depends on more."""
        return int(self.state.get(param, {}).get("momentum_buffer") is not None)

    def _arguments(self, group: Group, step: int) -> dict[str, Any]:
        arguments = super()._arguments(group, step)
        if not group["momentum"]:
            arguments["velocities"] = None
        if step == 1 or not group["momentum"]:  # the velocity starts as the first gradient, and without it, all counts
            arguments["dampening"] = 0.0
        return arguments


class RMSprop(_Step, torch.optim.RMSprop):
    """`torch.optim.RMSprop` with the update of `fastnorm.rmsprop_step`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts
        Dense tensors of float32 or float64 in CPU memory, in any memory format; or parameter groups.
    lr, alpha, eps, weight_decay, momentum, centered, maximize
        As in ``torch.optim.RMSprop``. Centered, a variance that rounding made negative counts as 0.
    foreach : bool, optional
        Kept for state dicts; without effect: there is one implementation.
    capturable, differentiable : bool
        Must be False.

    Raises
    ------
    TypeError
        If a parameter is of another kind, dtype, layout or device.
    ValueError
        If an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import RMSprop
    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = RMSprop([w], lr=0.1)
    >>> (w ** 2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([3.])
    """

    _update = staticmethod(updates.rmsprop_step)
    _check = staticmethod(updates._check_rmsprop)
    _options = ("alpha", "eps", "weight_decay", "momentum", "centered", "maximize")

    def _buffers(self, group: Group) -> dict[str, str]:
        buffers = {"square_avg": "square_avgs"}
        if group["momentum"]:
            buffers["momentum_buffer"] = "momentum_buffers"
        if group["centered"]:
            buffers["grad_avg"] = "grad_avgs"
        return buffers


class _AdamStep(_CountedStep):
    """What Adam and AdamW share."""

    _update = staticmethod(updates.adam_step)
    _check = staticmethod(updates._check_adam)
    _options = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")

    def _buffers(self, group: Group) -> dict[str, str]:
        buffers = {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs"}
        if group["amsgrad"]:
            buffers["max_exp_avg_sq"] = "max_exp_avg_sqs"
        return buffers


class Adam(_AdamStep, torch.optim.Adam):
    """`torch.optim.Adam` with the update of `fastnorm.adam_step`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts
        Dense tensors of float32 or float64 in CPU memory, in any memory format; or parameter groups.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in ``torch.optim.Adam``.
    foreach, fused : bool, optional
        Kept for state dicts; without effect: there is one implementation.
    capturable, differentiable : bool
        Must be False.

    Raises
    ------
    TypeError
        If a parameter is of another kind, dtype, layout or device.
    ValueError
        If an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import Adam
    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = Adam([w], lr=0.1)
    >>> (w ** 2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([3.9000])
    """


class AdamW(_AdamStep, torch.optim.AdamW):
    """`torch.optim.AdamW` with the update of `fastnorm.adam_step`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts
        Dense tensors of float32 or float64 in CPU memory, in any memory format; or parameter groups.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As in ``torch.optim.AdamW``.
    foreach, fused : bool, optional
        Kept for state dicts; without effect: there is one implementation.
    capturable, differentiable : bool
        Must be False.

    Raises
    ------
    TypeError
        If a parameter is of another kind, dtype, layout or device.
    ValueError
        If an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import AdamW
    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.5)
    >>> (0 * w).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([3.8000])
    """


class Adagrad(_CountedStep, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with the update of `fastnorm.adagrad_step`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts
        Dense tensors of float32 or float64 in CPU memory, in any memory format; or parameter groups.
    lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize
        As in ``torch.optim.Adagrad``.
    foreach, fused : bool, optional
        Kept for state dicts; without effect: there is one implementation.
    differentiable : bool
        Must be False.

    Raises
    ------
    TypeError
        If a parameter is of another kind, dtype, layout or device.
    ValueError
        If an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import Adagrad
    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = Adagrad([w], lr=0.1)
    >>> (w ** 2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([3.9000])
    """

    _update = staticmethod(updates.adagrad_step)
    _check = staticmethod(updates._check_adagrad)
    _options = ("lr_decay", "eps", "weight_decay", "maximize")

    def _buffers(self, group: Group) -> dict[str, str]:
        return {"sum": "state_sums"}

    def _initial(self, group: Group) -> float:
        return float(group["initial_accumulator_value"])
