"""fastnorm: training kernels for NumPy arrays on the CPU."""

__version__ = "0.1.0"

from . import optim
from ._runtime import get_num_threads, set_num_threads, show_config
from .moments import Moments
from .norm import batch_norm_backward, batch_norm_forward, batch_norm_inference

__all__ = [
    "Moments",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "get_num_threads",
from .updates import adagrad_step, adam_step, clip_grad_norm, momentum_step, rmsprop_step

__all__ = [
    "adagrad_step",
    "adam_step",
    "clip_grad_norm",
    "get_num_threads",
    "momentum_step",
    "optim",
    "rmsprop_step",
    "set_num_threads",
    "show_config",
]
from . import init, layers
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

__all__ = ["celu", "celu_backward", "dropout", "dropout_backward", "elu", "elu_backward", "get_num_threads", "init",
           "layers", "leaky_relu", "leaky_relu_backward", "relu", "relu_backward", "set_num_threads", "show_config",
           "sigmoid", "sigmoid_backward", "tanh", "tanh_backward"]
from .loss import log_softmax, softmax, softmax_cross_entropy

__all__ = [
    "get_num_threads",
    "log_softmax",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_cross_entropy",
]
