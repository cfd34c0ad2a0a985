"""fastnorm: training kernels for NumPy arrays on the CPU."""

__version__ = "0.1.0"

from ._runtime import get_num_threads, set_num_threads, show_config
from .loss import log_softmax, softmax, softmax_cross_entropy

__all__ = [
    "get_num_threads",
    "log_softmax",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_cross_entropy",
]
