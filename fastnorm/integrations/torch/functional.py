"""`batch_norm` and `cross_entropy` for tensors, with their gradients.

# Design: each is a custom operator over the kernels, so that ``torch.compile``, export and `torch.func` know it
# (https://docs.pytorch.org/docs/stable/library.html). PyTorch differentiates only operators that change nothing, so the
# running statistics go in, come out updated, and are copied back: two vectors, not the batch. Outputs are allocated by
# PyTorch, so that their strides are those that the fake implementation promises to a compiler.
#
# An operator written in Python costs 50 to 70 us a call. Where nobody but autograd looks (`is_eager`), a
# `torch.autograd.Function` calls the same kernels. The transforms of `torch.func` cannot differentiate an operator
# written in Python: for them, too, there is a Function, which calls the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from ..._arrays import Array, block, check_choice, matching
from ...loss import softmax_cross_entropy
from ...norm import (
    ACTIVATIONS,
    FORWARD_ROWS,
    TABLE_ROWS,
    WIDE_ROWS,
    BatchNormCache,
    batch_norm_backward,
    batch_norm_forward,
    layout_of,
)
from .tensors import array, check_memory, check_tensor, optional_array

__all__ = ["batch_norm", "cross_entropy"]

CHANNELS = 1  # the axis, in every format of PyTorch
ARGUMENTS = {"x": "input", "gamma": "weight", "beta": "bias", "logits": "input", "targets": "target"}  # ours, PyTorch's


def is_eager() -> bool:
    """Whether operations are just carried out: not compiled, traced or seen by a dispatch mode."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())


def is_transformed() -> bool:
    """Whether this is inside a transform of `torch.func`, and not compiled with it."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def _refuse_second_order(name: str) -> None:
    """Raise where the gradient itself is to be differentiated; autograd would take parts of it for constants."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: expected create_graph=False: gradients of the gradient are not implemented")


def _in_terms_of_torch(error: TypeError | ValueError) -> TypeError | ValueError:
    """The same error with the name that the argument has here."""
    name, colon, rest = str(error).partition(":")
    return type(error)(ARGUMENTS.get(name, name) + colon + rest)


# What autograd does not differentiate, it takes for a constant, without a word. So under a transform, which asks for a
# graph whether it will be used or not, everything that a gradient is made of is differentiable, and raises.


def _refuse_transformed_gradient() -> NoReturn:
    raise NotImplementedError("batch_norm and cross_entropy: gradients of the gradient are not implemented")


class _Transformed(torch.autograd.Function):
    """What Functions for transforms share."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("batch_norm and cross_entropy: expected reverse-mode differentiation (grad, vjp, "
                                  "jacrev): forward mode is not implemented")


class _Gradient(_Transformed):
    """``compute(*inputs)``, a gradient."""

    @staticmethod
    def forward(compute: Callable[..., Any], *inputs: Any) -> Any:
        return compute(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _refuse_transformed_gradient()


# -- batch norm --------------------------------------------------------------------------------------------------------


def _forward(
    x: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, weight: torch.Tensor | None,
    bias: torch.Tensor | None, residual: torch.Tensor | None, training: bool, momentum: float, eps: float,
    activation: str | None, negative_slope: float,
) -> tuple[torch.Tensor, BatchNormCache]:
    """y, and what the gradient needs; running statistics are updated in place."""
    y = torch.empty_like(x)
    try:
        _, cache = batch_norm_forward(
            array(x), optional_array(weight), optional_array(bias), optional_array(running_mean),
            optional_array(running_var), axis=CHANNELS, training=training, momentum=momentum, eps=eps,
            activation=activation, negative_slope=negative_slope, residual=optional_array(residual), out=array(y))
    except (TypeError, ValueError) as error:
        raise _in_terms_of_torch(error) from None
    return y, cache


@torch.library.custom_op("fastnorm::batch_norm", mutates_args=(), device_types="cpu")
def _batch_norm(
    x: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, weight: torch.Tensor | None,
    bias: torch.Tensor | None, residual: torch.Tensor | None, training: bool, momentum: float, eps: float,
    activation: str | None, negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; both tables for the gradient; the new running statistics, empty if there are none."""
    if training and running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.clone(), running_var.clone()
        new_statistics = running_mean, running_var
    else:
        new_statistics = x.new_empty(0), x.new_empty(0)
    y, cache = _forward(x, running_mean, running_var, weight, bias, residual, training, momentum, eps, activation,
                        negative_slope)
    cache.table[FORWARD_ROWS:] = 0  # equal inputs give equal outputs: what an operator must promise
    return y, torch.from_numpy(cache.table), torch.from_numpy(cache.wide_table), *new_statistics


@torch.library.register_fake("fastnorm::batch_norm")
def _batch_norm_shapes(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any,
                       training: bool, momentum: float, eps: float, activation: Any, negative_slope: float) -> Any:
    channels = x.shape[CHANNELS]
    updated = channels if training and running_mean is not None else 0
    return (torch.empty_like(x), x.new_empty((TABLE_ROWS, channels)),
            x.new_empty((WIDE_ROWS, channels), dtype=torch.float64), x.new_empty(updated), x.new_empty(updated))


def _backward(
    dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, table: Array, wide_table: Array, training: bool,
    activation: str | None, negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of x, weight, bias and residual."""
    dx = torch.empty_like(x)
    dense, view = block(array(x), CHANNELS)
    cache = BatchNormCache(
        dense, None if residual is None else matching(array(residual), dense), CHANNELS, view, layout_of(dense), table,
        wide_table, training, ACTIVATIONS[activation], negative_slope if activation == "leaky_relu" else 0.0,
        has_gamma=True, has_beta=True)
    _, dweight, dbias, *dresidual = batch_norm_backward(array(dy), cache, out=array(dx))
    tensors = [torch.from_numpy(gradient) for gradient in (dweight, dbias, *dresidual)]
    return dx, tensors[0], tensors[1], tensors[2] if dresidual else None


@torch.library.custom_op("fastnorm::batch_norm_backward", mutates_args=(), device_types="cpu")
def _batch_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, table: torch.Tensor, wide_table: torch.Tensor,
    training: bool, activation: str | None, negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, bias and residual; the last one is empty without a residual."""
    dx, dweight, dbias, dresidual = _backward(dy, x, residual, array(table), array(wide_table), training, activation,
                                              negative_slope)
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@torch.library.register_fake("fastnorm::batch_norm_backward")
def _batch_norm_backward_shapes(dy: Any, x: Any, residual: Any, table: Any, wide_table: Any, training: bool,
                                activation: Any, negative_slope: float) -> Any:
    channels = x.shape[CHANNELS]
    return (torch.empty_like(x), x.new_empty(channels), x.new_empty(channels),
            x.new_empty(0) if residual is None else torch.empty_like(x))


def _save_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...],
                     non_differentiable: tuple[torch.Tensor, ...] | None = None) -> None:
    x, *_, residual, training, _, _, activation, negative_slope = inputs
    _, table, wide_table, *_ = output
    ctx.mark_non_differentiable(*(output[1:] if non_differentiable is None else non_differentiable))
    ctx.save_for_backward(x, residual, table, wide_table)
    ctx.options = training, activation, negative_slope


def _differentiate_batch_norm(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    _refuse_second_order("batch_norm")
    x, residual, table, wide_table = ctx.saved_tensors
    return _as_needed(ctx, *_batch_norm_backward(dy, x, residual, table, wide_table, *ctx.options))


def _as_needed(ctx: Any, dx: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor,
               dresidual: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What autograd asked for, of all inputs of the operator."""
    gradients = dx, None, None, dweight, dbias, dresidual
    needed = ctx.needs_input_grad[:len(gradients)]
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *[None] * 5


torch.library.register_autograd("fastnorm::batch_norm", _differentiate_batch_norm, setup_context=_save_batch_norm)


class _EagerBatchNorm(torch.autograd.Function):
    """The operator's inputs, y alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        y, cache = _forward(*inputs)
        x, *_, residual, training, _, _, activation, negative_slope = inputs
        ctx.save_for_backward(x, residual)
        ctx.rest = cache.table, cache.wide_table, training, activation, negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_second_order("batch_norm")
        return _as_needed(ctx, *_backward(*gradients, *ctx.saved_tensors, *ctx.rest))


class _TransformedBatchNorm(_Transformed):
    """The operator, and its running statistics copied back where nothing is transformed any more."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = _batch_norm(*inputs)
        _, running_mean, running_var, *_ = inputs
        for running, new in zip((running_mean, running_var), outputs[-2:], strict=True):
            if running is not None and new.numel():
                running.copy_(new)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _save_batch_norm(ctx, inputs, output, non_differentiable=output[-2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None or any(other is not None for other in others):
            _refuse_transformed_gradient()
        return _as_needed(ctx, *_Gradient.apply(_batch_norm_backward, dy, *ctx.saved_tensors, *ctx.options))


def batch_norm(input: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
               weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
               momentum: float = 0.1, eps: float = 1e-5, *, activation: str | None = None,
               negative_slope: float = 0.01, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.batch_norm` with an optional residual and activation fused in.

    ``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)``: see `fastnorm.batch_norm_forward`.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        float32 or float64, in any memory format; contiguous and channels-last tensors are used without a copy.
    running_mean, running_var : Tensor of shape (C,), or None
        Running statistics; both or neither. In training they are updated in place, the variance unbiased. Without
        training they are required.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift.
    training : bool
        Whether to use (and record) the statistics of this batch.
    momentum : float
        Weight of this batch in the running statistics, in [0, 1].
    eps : float
        Added to the variance, >= 0.
    activation : {None, "relu", "leaky_relu"}
        Applied to the result.
    negative_slope : float
        Slope of "leaky_relu" below 0.
    residual : Tensor of input's shape, optional
        Added before the activation; it has a gradient too.

    Returns
    -------
    Tensor
        Shape, dtype and memory format of ``input``.

    Raises
    ------
    TypeError
        If a tensor is not dense, not in CPU memory, neither float32 nor float64, or of another dtype than ``input``.
    ValueError
        If a shape or a range is wrong, or training has fewer than two values per channel. Nothing has changed then.
    NotImplementedError
        In a backward pass with ``create_graph=True``; in forward-mode differentiation (``torch.func.jvp``).

    Notes
    -----
    Compiled, traced and transformed (`torch.func`: ``grad``, ``vjp``, ``jacrev``, ``vmap``), this is the operator
    ``fastnorm::batch_norm``. PyTorch spends some 50 microseconds a call on an operator written in Python, which eager
    calls do without.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import batch_norm
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]], requires_grad=True)
    >>> batch_norm(x, None, None, training=True, activation="relu").detach().round(decimals=3)
    tensor([[0., 0.],
            [1., 1.]])
    """
    _check_batch_norm(input, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias},
                      activation, residual)
    inputs = (input, running_mean, running_var, weight, bias, residual, training, momentum, eps, activation,
              negative_slope)
    y: torch.Tensor
    if is_transformed():
        y, *_ = _TransformedBatchNorm.apply(*inputs)
        return y
    if is_eager():
        y = _EagerBatchNorm.apply(*inputs)
        if training and running_mean is not None and running_var is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))
        return y
    y, _, _, new_mean, new_var = _batch_norm(*inputs)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
    return y


def _check_batch_norm(x: torch.Tensor, vectors: dict[str, torch.Tensor | None], activation: object,
                      residual: torch.Tensor | None) -> None:
    """What must be known of the tensors before the operator is called; the rest it checks itself."""
    check_tensor("input", x)
    if x.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions, got shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(name, vector, x.dtype, (x.shape[CHANNELS],))
    if residual is not None:
        check_tensor("residual", residual, x.dtype, tuple(x.shape))
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)


# -- cross-entropy -----------------------------------------------------------------------------------------------------


def _loss_and_gradient(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int,
                       reduction: str, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient by the logits."""
    gradient = torch.empty_like(logits)
    try:
        loss, _ = softmax_cross_entropy(
            array(logits), array(target), axis=_class_axis(logits), weight=optional_array(weight),
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, out=array(gradient))
    except (TypeError, ValueError) as error:
        raise _in_terms_of_torch(error) from None
    return torch.from_numpy(np.asarray(loss, order="C")), gradient


_cross_entropy = torch.library.custom_op(
    "fastnorm::cross_entropy", _loss_and_gradient, mutates_args=(), device_types="cpu")


@torch.library.register_fake("fastnorm::cross_entropy")
def _cross_entropy_shapes(logits: Any, target: Any, weight: Any, ignore_index: int, reduction: str,
                          label_smoothing: float) -> Any:
    axis = _class_axis(logits)
    rows = (*logits.shape[:axis], *logits.shape[axis + 1:])
    return logits.new_empty(rows if reduction == "none" else ()), torch.empty_like(logits)


def _class_axis(logits: torch.Tensor) -> int:
    return CHANNELS if logits.dim() > 1 else 0


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.reduction = inputs[4]


def _differentiate_cross_entropy(ctx: Any, dloss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    _refuse_second_order("cross_entropy")
    (gradient,) = ctx.saved_tensors
    if ctx.reduction == "none":
        gradient = gradient * dloss.unsqueeze(_class_axis(gradient))
    elif type(dloss) is not torch.Tensor or dloss.item() != 1.0:  # a tracer's tensor has no value to look at
        gradient = gradient * dloss
    elif torch._C._autograd._get_current_graph_task_keep_graph():
        # It may be asked for again, when the caller has written to this one.
        gradient = gradient.clone()
    return gradient, *[None] * 5


torch.library.register_autograd("fastnorm::cross_entropy", _differentiate_cross_entropy,
                                setup_context=_save_cross_entropy)


class _EagerCrossEntropy(torch.autograd.Function):
    """The operator's inputs, the loss alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        loss, gradient = _loss_and_gradient(*inputs)
        ctx.save_for_backward(gradient)
        ctx.reduction = inputs[4]
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _differentiate_cross_entropy(ctx, gradients[0], None)


def _scaled(gradient: torch.Tensor, dloss: torch.Tensor, axis: int | None) -> torch.Tensor:
    return gradient * (dloss if axis is None else dloss.unsqueeze(axis))


class _TransformedCrossEntropy(_Transformed):
    """The operator."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        outputs: tuple[torch.Tensor, torch.Tensor] = _cross_entropy(*inputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)
        ctx.reduction = inputs[4]

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor | None, dgradient: torch.Tensor | None,
                 ) -> tuple[torch.Tensor | None, ...]:
        if dloss is None or dgradient is not None:
            _refuse_transformed_gradient()
        (gradient,) = ctx.saved_tensors
        axis = _class_axis(gradient) if ctx.reduction == "none" else None
        return _Gradient.apply(_scaled, gradient, dloss, axis), *[None] * 5


def cross_entropy(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None,
                  size_average: None = None, ignore_index: int = -100, reduce: None = None, reduction: str = "mean",
                  label_smoothing: float = 0.0) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`, loss and gradient computed in one pass.

    See `fastnorm.softmax_cross_entropy` for the formula. Where the divisor of the mean is 0 (every row ignored), loss
    and gradient are 0; PyTorch's are NaN.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...) or (C,)
        Logits, float32 or float64, in any memory format; contiguous and channels-last tensors are used without a copy.
    target : Tensor
        Classes: integers, ``input``'s shape without the class axis. Or probabilities: ``input``'s shape and dtype.
    weight : Tensor of shape (C,), optional
        A weight for each class.
    size_average, reduce : None
        PyTorch's deprecated names for ``reduction``.
    ignore_index : int
        Rows with this label count for nothing.
    reduction : {"mean", "sum", "none"}
        What becomes of the rows' losses.
    label_smoothing : float
        Share in [0, 1] of the target mass that is spread evenly over the classes.

    Returns
    -------
    Tensor
        A 0-d tensor of ``input``'s dtype; the loss of each row with ``reduction="none"``.

    Raises
    ------
    TypeError
        If a tensor is not dense, not in CPU memory, of a dtype that is not supported or that differs from ``input``'s.
    ValueError
        If a shape or a range is wrong, a label is out of range, ``size_average`` or ``reduce`` is given, or a gradient
        by ``target`` or ``weight`` is asked for.
    NotImplementedError
        In a backward pass with ``create_graph=True``; in forward-mode differentiation (``torch.func.jvp``).

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import cross_entropy
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 3]))
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.3750,  0.1250,  0.1250,  0.1250],
            [ 0.1250,  0.1250,  0.1250, -0.3750]])
    """
    check_tensor("input", input)
    check_memory("target", target)
    if weight is not None:
        check_tensor("weight", weight, input.dtype)
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise ValueError(f"{name}: expected None, got {value!r}: deprecated, use reduction")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does: only input has "
                             "a gradient")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    inputs = input, target, weight, ignore_index, reduction, label_smoothing
    loss: torch.Tensor
    if is_transformed():
        loss, _ = _TransformedCrossEntropy.apply(*inputs)
    elif is_eager():
        loss = _EagerCrossEntropy.apply(*inputs)
    else:
        loss, _ = _cross_entropy(*inputs)
    return loss
