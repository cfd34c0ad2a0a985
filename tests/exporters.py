"""Arrays of no library: one small class for each way to hand memory over, and for each way to refuse."""

from __future__ import annotations

from typing import Any

import numpy as np


class Exporter:
    """Holds an ndarray, which it is not; ``array`` is its memory, for the tests alone."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array


class Shared(Exporter):
    """What PyTorch's tensors do: DLPack, which shares memory."""

    device = (1, 0)

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class Converted(Exporter):
    """What pandas' columns do: ``__array__``, a view unless a copy is asked for."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.array, dtype) if copy else self.array.view()


class Copied(Exporter):
    """Memory that is laid out as no ndarray: every export is a copy."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("a copy cannot be avoided")
        return self.array.copy()


class WithoutCopy(Exporter):
    """``__array__`` as it was before NumPy 2: nobody can tell whether it copies."""

    def __array__(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        return self.array.view()


class Cheating(Exporter):
    """What tables of pandas 2 do: asked for no copy, they warn and copy."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.array.copy()


class OnGpu(Shared, Converted):
    """Memory of another device, that ``__array__`` would fetch."""

    device = (2, 0)


class Refusing(Shared):
    """What a tensor that requires a gradient does."""

    def __dlpack__(self, **options: Any) -> object:
        raise BufferError("detach it first\nmore about that")
