"""`accelerate` and `restore`: the batch norms of an existing model, with fastnorm's kernels and without."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import ClassVar, TypeVar

import torch
from torch import nn

from .functional import batch_norm

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)


class _BatchNorm(nn.Module):
    """The ``forward`` that stands in front of a batch norm of PyTorch."""

    activation: ClassVar[str | None] = None  # an instance that a ReLU follows has its own

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize as PyTorch's module does."""
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if tracks:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(self.num_batches_tracked) if tracks else 0.0
        use_buffers = not self.training or self.track_running_stats
        return batch_norm(
            input, self.running_mean if use_buffers else None, self.running_var if use_buffers else None, self.weight,
            self.bias, self.training or self.running_mean is None, momentum, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        """PyTorch's words, and the activation."""
        words: str = super().extra_repr()
        return words if self.activation is None else f"{words}, activation={self.activation!r}"


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on fastnorm's kernels."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on fastnorm's kernels."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on fastnorm's kernels."""


class FusedReLU(nn.Identity):
    """Stands where a ReLU was that the batch norm before it has taken over."""

    def __init__(self, relu: nn.ReLU) -> None:
        super().__init__()
        self.replaced = (relu,)  # in a tuple, so that it is no child
        self.train(relu.training)


_TWINS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
_ORIGINALS = {twin: original for original, twin in _TWINS.items()}


def accelerate(module: Model, *, fuse_relu: bool = True) -> Model:
    """Let every ``BatchNorm1d/2d/3d`` inside a model use fastnorm's kernels, in place.

    The modules stay the objects that they are (parameters, buffers, hooks, names); only their class changes, to a
    subclass of their own. So ``state_dict`` and optimizers know no difference, and `restore` takes it back.

    Parameters
    ----------
    module : torch.nn.Module
        The model; it may be a batch norm itself. Subclasses of PyTorch's batch norms are left alone.
    fuse_relu : bool, default True
        In an ``nn.Sequential``, let a batch norm compute the ``nn.ReLU`` right behind it too, and put a module that
        does nothing in its place. The output of the batch norm alone is then the rectified one: where a model calls
        it without its ReLU (by its index, or as part of a slice), or where one of both is replaced later, pass False.
        A batch norm that is registered in several places is not fused, and neither are modules that have hooks.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        If ``module`` is no module. Later, a forward call raises what `batch_norm` raises: for tensors that are
        not in CPU memory or of another dtype than float32 and float64, bfloat16 under autocast among them.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import accelerate
    >>> accelerate(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU()))
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation='relu')
      (2): FusedReLU()
    )
    """
    _check_module(module)
    for each in module.modules():
        if type(each) in _TWINS:
            each.__class__ = _TWINS[type(each)]
    if fuse_relu:
        places = Counter(id(each) for _, each in module.named_modules(remove_duplicate=False))
        for each in module.modules():
            if isinstance(each, nn.Sequential) and type(each).forward is nn.Sequential.forward:
                _fuse_relu(each, places)
    return module


def _fuse_relu(sequence: nn.Sequential, places: Counter[int]) -> None:
    for at, (norm, relu) in enumerate(pairwise(list(sequence)), 1):
        if (type(norm) in _ORIGINALS and type(relu) is nn.ReLU and places[id(norm)] == 1
                and not _has_hooks(norm) and not _has_hooks(relu)):
            norm.activation = "relu"
            sequence[at] = FusedReLU(relu)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def restore(module: Model) -> Model:
    """Take back what `accelerate` did to a model, in place.

    Parameters
    ----------
    module : torch.nn.Module
        The model.

    Returns
    -------
    torch.nn.Module
        The same object, with PyTorch's batch norms and its own ReLUs.

    Raises
    ------
    TypeError
        If ``module`` is no module.

    Examples
    --------
    >>> import torch
    >>> from fastnorm.integrations.torch import accelerate, restore
    >>> restore(accelerate(torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())))[1]
    ReLU()
    """
    _check_module(module)
    for each in list(module.modules()):
        if type(each) in _ORIGINALS:
            each.__class__ = _ORIGINALS[type(each)]
            each.__dict__.pop("activation", None)
        elif isinstance(each, nn.Sequential):
            for at, child in enumerate(each):
                if type(child) is FusedReLU:
                    (relu,) = child.replaced
                    each[at] = relu.train(child.training)
    return module


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
