"""Where outputs are written: what the caller gave, a fresh array, or, if it is large, one on the pool's memory.

The pool keeps the memory of large outputs that are no longer used for the next ones: see `set_output_pool`.
"""

from __future__ import annotations

import os

import numpy as np

from ._arrays import Array, check_integer, same_layout
from ._kernels import output_pool as _pool

# From this size on. What is smaller the C library keeps itself (M_MMAP_THRESHOLD), without system calls: at 25.7 MB,
# 0.59 ms against the 0.78 with the pool; at 51 MB, 3.7 against 1.6 (batch norm inference).
POOLED_BYTES = 32 << 20
MOST_BYTES = 4 << 30


def _limit_from_environment() -> int:
    """``FASTNORM_OUTPUT_POOL``, or what is right for this machine."""
    value = os.environ.get("FASTNORM_OUTPUT_POOL", "").strip()
    if value and not value.isdecimal():
        raise ImportError(f"FASTNORM_OUTPUT_POOL: expected a number of bytes, got {value!r}")
    if not _pool.available():
        return 0
    return min(int(value), _LARGEST) if value else min(_pool.memory() // 16, MOST_BYTES)


_LARGEST = (1 << 62) - 1
_limit = _limit_from_environment()
_pool.set_limit(_limit)


def get_output_pool() -> int:
    """Return how many bytes of memory are kept at most for large outputs to come: see `set_output_pool`.

    Returns
    -------
    int
        0 where nothing is kept.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_output_pool() >= 0
    True
    """
    return _limit


def set_output_pool(n_bytes: int) -> None:
    """Set how many bytes of memory are kept at most for large outputs to come, for the whole process.

    When an array of 32 MB and more that fastnorm returned is no longer used, its memory is kept for the next output of
    about its size. A training loop, whose steps return the same shapes again and again, then does not pay for fresh
    pages: for 200 MB, they take as long as the computation. The memory that waits counts as used by this process in
    most tools, but the system takes it as soon as it needs it (``MADV_FREE``). ``out=`` avoids fresh pages as well.
    A limit of the process's address space (``RLIMIT_AS``) does count it: outputs of fastnorm get what waits then, but
    other allocations do not. There, set a lower limit here, or 0.

    The default is a sixteenth of the machine's memory, at most 4 GB, or the environment variable
    ``FASTNORM_OUTPUT_POOL``, in bytes, read at import.

    Parameters
    ----------
    n_bytes : int
        At least 0, which gives back all that waits, and keeps nothing.

    Raises
    ------
    TypeError
        If ``n_bytes`` is not an integer.
    ValueError
        If ``n_bytes`` is negative.

    Notes
    -----
    Linux alone; elsewhere nothing is kept, and the limit stays 0.

    Examples
    --------
    >>> import fastnorm as fn
    >>> before = fn.get_output_pool()
    >>> fn.set_output_pool(0)
    >>> fn.get_output_pool()
    0
    >>> fn.set_output_pool(before)
    """
    global _limit
    n_bytes = check_integer("n_bytes", n_bytes, 0)
    _limit = min(n_bytes, _LARGEST) if _pool.available() else 0
    _pool.set_limit(_limit)


def empty_like(like: Array) -> Array:
    """A plain array of the same shape, dtype and memory order, not set to anything."""
    if like.nbytes < POOLED_BYTES or not _limit:
        return np.empty_like(like, subok=False)
    return _pool.empty_like(like)


def destination(out: Array | None, like: Array) -> Array:
    """Where a kernel that walks ``like`` writes: ``out`` if it is laid out the same, else a fresh array that is.

    A caller that got another array than ``out`` finishes with `_arrays.write_back`.
    """
    if out is not None and same_layout(out, like):
        return out
    return empty_like(like)
