"""Argument checks, each with one wording, and the ``(outer, C, inner)`` view that every kernel works on.

Any array whose memory is one dense block in some axis order (C order, Fortran order, NCHW memory seen as NHWC, ...)
is, for a chosen axis, a C-contiguous ``(outer, C, inner)`` array: `block` finds these three numbers without a copy.
Every other array goes through one dense copy.

The checks only look; nothing here writes to an array except `write_back`, which a caller runs after every check. Those
of arrays return what the caller goes on with: the ndarray itself, or an array of another library as one
(`_interchange.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast

import numpy as np

from ._interchange import AnyArray as AnyArray
from ._interchange import Array as Array
from ._interchange import as_array as as_array
from ._interchange import has_protocol as has_protocol
from ._kernels.checks import dense_block, laid_out_alike, plain_output

View = tuple[int, int, int]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
FLOAT32_MAX = float(np.finfo(np.float32).max)
OVERLAP_WORK = 1_000_000  # candidate solutions that the overlap test tries: about 20 ms


# -- kinds, dtypes and shapes ------------------------------------------------------------------------------------------


def check_array(name: str, a: object, dtype: np.dtype[Any] | None = None, written: bool = False) -> Array:
    """Require an array of native float32 or float64, of exactly ``dtype`` where one is given; return it as an ndarray.

    With ``written``, one over the caller's own memory (`check_writeable` is left to the caller).
    """
    if not isinstance(a, np.ndarray):
        a = as_array(name, a, written=written)
    found = a.dtype
    if found is not FLOAT32 and found is not FLOAT64 and found != FLOAT32 and found != FLOAT64:
        expected = dtype.name if dtype is not None else "float32 or float64"
        swapped = " in non-native byte order" if not found.isnative else ""
        raise TypeError(f"{name}: expected dtype {expected}, got {found.name}{swapped}")
    if dtype is not None and found != dtype:
        raise TypeError(f"{name}: expected dtype {dtype.name}, got {found.name}")
    if type(a) is not np.ndarray and isinstance(a, np.ma.MaskedArray):  # the usual case costs one comparison
        raise TypeError(f"{name}: expected a plain numpy.ndarray, got {type(a).__name__}, whose mask would be ignored")
    return a


def check_shape(name: str, a: Array, shape: tuple[int, ...]) -> None:
    """Require exactly this shape."""
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {a.shape}")


def check_like(name: str, a: object, shape: tuple[int, ...], dtype: np.dtype[Any], written: bool = False) -> Array:
    """Require an array of this shape and dtype; return it as `check_array` does."""
    a = check_array(name, a, dtype, written)
    check_shape(name, a, shape)
    return a


def check_dtype(name: str, dtype: object) -> np.dtype[Any]:
    """Require what NumPy understands as native float32 or float64."""
    try:
        found: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"{name}: expected float32 or float64, got {dtype!r}") from None
    if dtype is None or found not in (FLOAT32, FLOAT64):  # None is NumPy's word for float64
        raise TypeError(f"{name}: expected float32 or float64, got {dtype if dtype is None else found}")
    return found


def check_writeable(name: str, a: Array) -> None:
    """Require an array that may be written, each element at an address of its own."""
    if not a.flags.writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    if not a.flags.forc and _overlaps_itself(a):
        raise ValueError(f"{name}: expected an array whose elements do not overlap, got strides {a.strides}")


def _overlaps_itself(a: Array) -> bool:
    """Whether two elements share a byte."""
    if a.size == 0:
        return False
    reach = a.itemsize  # bytes that the axes so far span
    for stride, n in sorted((abs(stride), n) for n, stride in zip(a.shape, a.strides, strict=True) if n > 1):
        if stride < reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    if 0 in (stride for n, stride in zip(a.shape, a.strides, strict=True) if n > 1):
        return True
    offsets = np.zeros(1, np.int64)  # axes that interleave, rare: look at every element
    for n, stride in zip(a.shape, a.strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(n) * stride).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < a.itemsize).any())


def check_axis(axis: object, ndim: int, name: str = "axis") -> int:
    """Require an integer axis of an ``ndim``-dimensional array; return it counted from the front."""
    index = check_integer(name, axis)
    if not -ndim <= index < ndim:
        raise ValueError(f"{name}: expected an integer in [{-ndim}, {ndim - 1}] for {ndim} dimensions, got {index}")
    return index % ndim


# -- scalars -----------------------------------------------------------------------------------------------------------


def check_integer(name: str, value: object, low: int | None = None) -> int:
    """Require an integer (NumPy's count, bool does not), at least ``low``."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if low is not None and number < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {number}")
    return number


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, *,
                 open_high: bool = False, finite: bool = True) -> float:
    """Require a real number in [low, high], or [low, high) with ``open_high``; infinite only with ``finite=False``."""
    if type(value) is float and low <= value < high and value != -math.inf:  # the usual case
        return value
    if type(value) is not float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name}: expected a real number, got {type(value).__name__}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name}: expected a number that a float can hold, got {value}") from None
    # Written so that NaN fails every comparison.
    if not (low <= value <= high) or (open_high and value == high) or (finite and abs(value) == math.inf):
        if high < math.inf:
            wanted = f"a number in [{low:g}, {high:g}{')' if open_high else ']'}"
        else:
            wanted = f"a {'finite ' if finite else ''}number" + (f" >= {low:g}" if low > -math.inf else "")
        raise ValueError(f"{name}: expected {wanted}, got {value:g}")
    return value


def check_flag(name: str, value: object) -> bool:
    """Require True or False (NumPy's own bool counts)."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> str | None:
    """Require one of these names."""
    choices = tuple(choices)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def first_true(mask: Array) -> tuple[tuple[int, ...], str]:
    """Index of the first True in C order, and how a message says it; ``mask`` holds one."""
    at = tuple([int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape)]) if mask.ndim else ()
    return at, f" at position {at[0] if len(at) == 1 else at}" if at else ""


# -- overlap -----------------------------------------------------------------------------------------------------------


def same_array(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements at the same addresses."""
    return a is b or (a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype
                      and a.__array_interface__["data"][0] == b.__array_interface__["data"][0])


def _shares_memory(a: Array, b: Array) -> bool:
    """Whether two arrays share a byte; strides for which the exact test would take too long count as sharing."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)  # type: ignore[arg-type]  # the stub knows only -1 and 0
    except np.exceptions.TooHardError:
        return True


def check_disjoint(written: tuple[str, Array], *others: tuple[str, Array | None],
                   may_equal: tuple[str, ...] = ()) -> None:
    """Require that the array to be written shares no byte with the others.

    Those named in ``may_equal`` may also be exactly the same array. The test is exact, so interleaved views pass; but
    strides of many dimensions can make it hard (the question is NP-complete), and what takes too long is refused.
    """
    name, a = written
    for other_name, b in others:
        if b is None or not _shares_memory(a, b):
            continue
        if other_name in may_equal:
            if same_array(a, b):
                continue
            raise ValueError(f"{name}: expected the same array as {other_name} or one that does not overlap it, "
                             f"got a partial overlap with {other_name}")
        raise ValueError(f"{name}: expected an array that does not overlap {other_name}, got one that does")


def check_out(out: object, like: Array, *others: tuple[str, Array | None], may_equal: tuple[str, ...] = ()) -> Array:
    """Require an output of this shape and dtype that overlaps none of the others, but may be those in ``may_equal``."""
    if plain_output(out, like, others, may_equal):
        return cast(Array, out)
    out = check_like("out", out, like.shape, like.dtype, True)
    check_writeable("out", out)
    check_disjoint(("out", out), *others, may_equal=may_equal)
    return out


# -- the view that kernels work on -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _block_order(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Axes longer than 1 in memory order, outermost first, if they fill one dense block; else None."""
    if 0 in shape:
        return tuple(i for i, n in enumerate(shape) if n != 1)  # no element: any order will do
    order = sorted((i for i, n in enumerate(shape) if n > 1), key=lambda i: -strides[i])
    expected = itemsize
    for i in reversed(order):
        if strides[i] != expected:
            return None
        expected *= shape[i]
    return tuple(order)


@lru_cache(maxsize=4096)
def _view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> View | None:
    """``(outer, C, inner)`` of a dense block around ``axis``, or None."""
    order = _block_order(shape, strides, itemsize)
    if order is None:
        return None
    if axis in order:
        at = order.index(axis)
        before, after = order[:at], order[at + 1:]
    else:  # one channel: everything is inner
        before, after = (), order
    return math.prod(shape[i] for i in before), shape[axis], math.prod(shape[i] for i in after)


def is_dense(a: Array) -> bool:
    """Whether the array is one aligned dense block in some axis order: what a kernel can use without a copy."""
    return dense_block(a)


def block(a: Array, axis: int) -> tuple[Array, View]:
    """The array itself if it is dense, else a dense copy in the nearest memory order; and its view around ``axis``."""
    view = _view(a.shape, a.strides, a.itemsize, axis)
    if view is None or not a.flags.aligned:
        a = a.copy(order="K")
        view = _view(a.shape, a.strides, a.itemsize, axis)
        assert view is not None  # a fresh K-order copy is dense
    return a, view


def same_layout(a: Array, like: Array) -> bool:
    """Whether equal positions in memory are equal elements (``like`` is dense, shapes are equal)."""
    return laid_out_alike(a, like) or (
        a.flags.aligned
        and _block_order(a.shape, a.strides, a.itemsize) == _block_order(like.shape, like.strides, like.itemsize))


def matching(a: Array, like: Array) -> Array:
    """The array itself if it is laid out as ``like`` (dense, same shape), else a copy that is."""
    if same_layout(a, like):
        return a
    copy = np.empty_like(like, dtype=a.dtype, subok=False)
    copy[...] = a
    return copy


def write_back(out: Array | None, result: Array) -> Array:
    """Copy the result into ``out`` if the kernel could not write there itself; return what the user gets."""
    if out is None or out is result:
        return result
    out[...] = result
    return out


def dense_vector(v: Array) -> Array:
    """A 1-d array as contiguous aligned memory: itself where it is, else a copy."""
    return v if v.flags.c_contiguous and v.flags.aligned else v.copy()
