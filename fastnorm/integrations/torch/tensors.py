"""From tensors to arrays over the same memory, and the one check that says which tensors can go that way."""

from __future__ import annotations

from typing import Any

import torch

from ..._arrays import Array


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a dense float32 or float64 tensor in CPU memory: the silent half of `check_tensor`."""
    return (tensor.is_cpu and tensor.layout is torch.strided
            and (tensor.dtype is torch.float32 or tensor.dtype is torch.float64))


def check_tensor(name: str, tensor: Any, dtype: torch.dtype | None = None,
                 shape: tuple[int, ...] | None = None) -> None:
    """Require a dense float32 or float64 tensor in CPU memory, of exactly this dtype and shape where they are given."""
    check_memory(name, tensor)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected dtype torch.float32 or torch.float64, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_memory(name: str, tensor: Any) -> None:
    """Require a dense tensor in CPU memory, of any dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu":
        raise TypeError(f"{name}: expected a tensor in CPU memory, got one on device {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def array(tensor: torch.Tensor) -> Array:
    """The tensor's own memory as an array."""
    view: Array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return view


def optional_array(tensor: torch.Tensor | None) -> Array | None:
    """The tensor's own memory as an array; None for None."""
    return None if tensor is None else array(tensor)
