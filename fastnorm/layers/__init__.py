"""Layers of a feed-forward network: `forward`, `backward`, `params`, `grads`, and a saved state.

Every layer takes ``backend=``: `fastnorm` itself by default, or `fastnorm.reference` for its NumPy twin. Dtypes never
mix: a layer made with ``dtype=numpy.float32`` takes and gives float32.
"""

from .activations import CELU, ELU, Dropout, LeakyReLU, ReLU, Sigmoid, Tanh
from .base import Layer
from .dense import Dense, DropConnect
from .loss import SoftmaxCrossEntropy
from .norm import BatchNorm
from .sequential import Sequential

__all__ = ["CELU", "ELU", "BatchNorm", "Dense", "DropConnect", "Dropout", "Layer", "LeakyReLU", "ReLU", "Sequential",
           "Sigmoid", "SoftmaxCrossEntropy", "Tanh"]
