"""The NumPy twin of fastnorm: same function names, same signatures, same checks, same values, plain NumPy.

``backend = fastnorm`` and ``backend = fastnorm.reference`` are interchangeable. Every function computes in float64 and
rounds once, so that it also is the yardstick of accuracy.
"""

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
    "clip_grad_norm",
    "dropout",
    "dropout_backward",
    "elu",
    "elu_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "log_softmax",
    "momentum_step",
    "relu",
    "relu_backward",
    "rmsprop_step",
    "sigmoid",
    "sigmoid_backward",
    "softmax",
    "softmax_cross_entropy",
    "tanh",
    "tanh_backward",
]
