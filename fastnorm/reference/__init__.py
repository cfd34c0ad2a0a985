"""The NumPy twin of fastnorm: same function names, same signatures, same checks, same values, plain NumPy.

``backend = fastnorm`` and ``backend = fastnorm.reference`` are interchangeable. Every function accumulates in float64
and rounds once, so that it also is the yardstick of accuracy.
"""

from .moments import Moments
from .norm import batch_norm_backward, batch_norm_forward, batch_norm_inference

__all__ = [
    "Moments",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
]
