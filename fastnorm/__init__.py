"""fastnorm: training kernels for NumPy arrays on the CPU."""

__version__ = "0.1.0"

try:
    from . import _runtime as _runtime
except ImportError as error:
    # `python -m fastnorm` imports this file before its own: a user gets one line there, a program gets the exception.
    from ._demo.errors import exit_command_line

    exit_command_line(error)
    raise

from ._runtime import get_num_threads, set_num_threads, show_config
from .moments import Moments
from .norm import batch_norm_backward, batch_norm_forward, batch_norm_inference

__all__ = [
    "Moments",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]
