"""The memory limit of this machine: loops that read, copy and update memory and do nothing else, for `_bench`.

Design:
- The three loops move memory in the three ways that kernels do. Read: a reduction. Copy: an input and an output that is
  streamed past the cache. Update: a parameter that is read and written where it is.
- Tiles are large, so that handing them out costs nothing, and many, so that no thread waits for another at the end.
"""

from cython.parallel cimport prange
from libc.string cimport memcpy

from .vector cimport data, stream_copy, stream_fence

include "common.pxi"

cdef extern from "bandwidth.h" nogil:
    float bandwidth_read(const float* x, Py_ssize_t n)
    void bandwidth_update(float* x, Py_ssize_t n, float a, float b)

cdef enum:
    TILE = 65536  # elements: 256 KB

cdef inline void copy_tile(float* dst, const float* src, Py_ssize_t n, bint stream) noexcept nogil:
    if stream:
        stream_copy(dst, src, n * sizeof(float))
        stream_fence()
    else:
        memcpy(dst, src, n * sizeof(float))


def read(x, int threads):
    """Read x once; return the sum, so that the compiler cannot skip the loop. IN x: contiguous float32."""
    cdef const float* p = <const float*> data(x)
    cdef Py_ssize_t n = x.size, t
    cdef double total = 0
    with nogil:
        for t in prange((n + TILE - 1) // TILE, schedule="dynamic", chunksize=1, num_threads=threads):
            total += bandwidth_read(p + t * TILE, min(TILE, n - t * TILE))
    return total


def copy(src, dst, bint stream, int threads):
    """dst = src, by streaming stores or ordinary ones. IN src; OUT dst: contiguous float32 of one size."""
    cdef const float* s = <const float*> data(src)
    cdef float* d = <float*> data(dst)
    cdef Py_ssize_t n = src.size, t
    with nogil:
        for t in prange((n + TILE - 1) // TILE, schedule="dynamic", chunksize=1, num_threads=threads):
            copy_tile(d + t * TILE, s + t * TILE, min(TILE, n - t * TILE), stream)


def update(x, float a, float b, int threads):
    """x = x*a + b in place. IN, OUT x: contiguous float32."""
    cdef float* p = <float*> data(x)
    cdef Py_ssize_t n = x.size, t
    with nogil:
        for t in prange((n + TILE - 1) // TILE, schedule="dynamic", chunksize=1, num_threads=threads):
            bandwidth_update(p + t * TILE, min(TILE, n - t * TILE), a, b)
