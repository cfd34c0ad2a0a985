"""Arrays of other libraries as ndarrays over the same memory, by the protocols ``__dlpack__`` and ``__array__``.

# Design:
# - An ndarray is taken as it is; the compiled checks see to that before anything here runs. For any other object
#   ``__dlpack__`` is asked first, which shares memory or fails, then ``__array__``, which may copy. Lists, tuples and
#   numbers, NumPy's too, have no memory to share and stay a TypeError.
# - What a call writes must be the caller's memory: each protocol is asked for no copy, and the first writeable answer
#   is taken. An update of a copy would be lost without a word.
# - Nothing is brought over from another device in silence: an array that says it lies on a GPU is a TypeError, even
#   where its ``__array__`` would fetch it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# DLPack's numbers for memory that the CPU reads and writes: kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged. They are
# those that `numpy.from_dlpack` takes.
CPU_DEVICES = (1, 3, 11, 13)


class SupportsDLPack(Protocol):
    """An object that shares its memory by DLPack: tensors of PyTorch, arrays of JAX, CuPy, TensorFlow and others."""

    def __dlpack__(self) -> object:
        """A capsule that describes the memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """On which kind of device the memory lies, and on which of these."""


class SupportsArray(Protocol):
    """An object that converts itself to an ndarray: pandas' and Polars' columns, xarray's variables and others."""

    def __array__(self) -> Array:
        """Its values, as a view of its memory where it can."""


AnyArray = Array | SupportsDLPack | SupportsArray
"""What public functions take where they take an array."""


def has_protocol(a: object) -> bool:
    """Whether this is an array of another library: neither an ndarray nor one of NumPy's numbers."""
    return not isinstance(a, (np.ndarray, np.generic)) and (_has(a, "__dlpack__") or _has(a, "__array__"))


def as_array(name: str, a: object, *, written: bool = False) -> Array:
    """Return the ndarray itself, or an array of another library as one; with ``written``, over its own memory.

    Raises TypeError for what is no array or cannot be read from here, and ValueError where it would be written and has
    no memory that may be.
    """
    if isinstance(a, np.ndarray):
        return a
    if not has_protocol(a):
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(a).__name__}")
    _check_device(name, a)
    return _writeable_view(name, a) if written else _readable(name, a)


def _has(a: object, method: str) -> bool:
    """Whether the object's type has the method; None there says that it has not."""
    return getattr(type(a), method, None) is not None


def _check_device(name: str, a: Any) -> None:
    """Require memory of the CPU, as far as the object says where its memory is."""
    try:
        device, _ = a.__dlpack_device__()
        number = int(device)
    except Exception:  # no such method, several devices, or none: `__array__` decides
        return
    if number not in CPU_DEVICES:
        raise TypeError(f"{name}: expected an array in CPU memory, got {type(a).__name__} on device "
                        f"{getattr(device, 'name', f'type {device}')}")


def _exports(a: Any, **options: Any) -> Iterator[Array | Exception]:
    """What each protocol of the object gives in turn, an array or its error; ``options`` are handed to it.

    Libraries raise what they like where they cannot export: for a tensor that requires a gradient, a dtype that NumPy
    does not have, a traced or deleted array, memory that is not strided, a file that is gone.
    """
    if _has(a, "__dlpack__"):
        try:
            yield np.from_dlpack(a, **options)
        except MemoryError:
            raise
        except Exception as error:
            yield error
    if _has(a, "__array__"):
        try:
            array = a.__array__(**options)
            yield array if isinstance(array, np.ndarray) else TypeError(
                f"__array__ returned {type(array).__name__}")
        except MemoryError:
            raise
        except Exception as error:
            yield error


def _readable(name: str, a: object) -> Array:
    """The first array that a protocol gives."""
    error: Exception | None = None
    for export in _exports(a):
        if isinstance(export, np.ndarray):
            return export
        error = export
    reason = str(error).partition("\n")[0]
    raise TypeError(f"{name}: expected an array that NumPy can read, got {type(a).__name__} ({reason})") from error


def _writeable_view(name: str, a: object) -> Array:
    """The first writeable array over the object's own memory."""
    # Asked twice: pandas 2 answers copy=False with a copy. Two copies alive at once lie apart, two views do not.
    views = [view for view, again in zip(_exports(a, copy=False), _exports(a, copy=False), strict=True)
             if isinstance(view, np.ndarray) and isinstance(again, np.ndarray)
             and (view.size == 0 or np.may_share_memory(view, again))]
    for view in views:
        if view.flags.writeable:
            return view
    if views:
        raise ValueError(f"{name}: expected a writeable array, got {type(a).__name__}, whose memory is read-only")
    _readable(name, a)  # what cannot be read at all has a better reason
    raise ValueError(f"{name}: expected a writeable array, got {type(a).__name__}, which does not share its memory")
