"""fastnorm: training kernels for NumPy arrays on the CPU.

Functions take and return plain ``numpy.ndarray`` of float32 or float64. Where they take an array, they also take one of
another library that has ``__dlpack__`` or ``__array__``, over the same memory where it lies on the CPU; what they write
must be writeable memory of the caller's. ``fastnorm.reference`` holds a NumPy twin of every function:
``backend = fastnorm`` and ``backend = fastnorm.reference`` are interchangeable.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

try:
    from . import _runtime as _runtime
except ImportError as error:
    # `python -m fastnorm` imports this file before its own: a user gets one line there, a program gets the exception.
    from ._demo.errors import exit_command_line

    exit_command_line(error)
    raise

from . import init, layers, optim, reference
from ._outputs import get_output_pool, set_output_pool
from ._runtime import get_num_threads, set_num_threads, show_config
from .activations import (
    celu,
    celu_backward,
    dropout,
    dropout_backward,
    elu,
    elu_backward,
    leaky_relu,
    leaky_relu_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    tanh,
    tanh_backward,
)
from .loss import log_softmax, softmax, softmax_cross_entropy
from .moments import Moments
from .norm import batch_norm_backward, batch_norm_forward, batch_norm_inference
from .updates import adagrad_step, adam_step, all_finite, clip_grad_norm, momentum_step, rmsprop_step

if _TYPE_CHECKING:
    from . import checkpoint

__all__ = [
    "Moments",
    "adagrad_step",
    "adam_step",
    "all_finite",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "celu",
    "celu_backward",
    "checkpoint",
    "clip_grad_norm",
    "dropout",
    "dropout_backward",
    "elu",
    "elu_backward",
    "get_num_threads",
    "get_output_pool",
    "init",
    "layers",
    "leaky_relu",
    "leaky_relu_backward",
    "log_softmax",
    "momentum_step",
    "optim",
    "reference",
    "relu",
    "relu_backward",
    "rmsprop_step",
    "set_num_threads",
    "set_output_pool",
    "show_config",
    "sigmoid",
    "sigmoid_backward",
    "softmax",
    "softmax_cross_entropy",
    "tanh",
    "tanh_backward",
]


def __getattr__(name: str) -> _Any:
    """Import `checkpoint` when it is first asked for: hashlib, json and zipfile take as long as all the rest."""
    if name == "checkpoint":
        return _import_module(".checkpoint", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
