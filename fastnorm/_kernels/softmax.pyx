"""softmax kernels."""

from .vector cimport fastnorm_build_flags


def build_flags():
    """Compiler flags of this level's build."""
    return fastnorm_build_flags().decode()
