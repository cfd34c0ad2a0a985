"""NumPy arrays whose memory goes to a pool when they die: see ``output_pool.h``. Compiled for the baseline only."""

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memset, strcpy

import numpy as np

cimport numpy as cnp

cnp.import_array()

cdef extern from "output_pool.h" nogil:
    const bint POOL_AVAILABLE
    void* pool_malloc(void* context, size_t n)
    void* pool_calloc(void* context, size_t count, size_t size)
    void* pool_realloc(void* context, void* data, size_t n)
    void pool_free(void* context, void* data, size_t n)
    void pool_set_limit(size_t limit)
    size_t pool_waiting()
    size_t pool_memory()

cdef cnp.PyDataMem_Handler handler

memset(&handler, 0, sizeof(handler))
strcpy(handler.name, b"fastnorm_output_pool")
handler.version = 1
handler.allocator.malloc = pool_malloc
handler.allocator.calloc = pool_calloc
handler.allocator.realloc = pool_realloc
handler.allocator.free = pool_free
cdef object capsule = PyCapsule_New(&handler, "mem_handler", NULL)


def available():
    """Whether there is a pool on this system."""
    return POOL_AVAILABLE


def empty_like(like):
    """`numpy.empty_like`, a plain array, on the pool's memory."""
    cdef object before = cnp.PyDataMem_SetHandler(capsule)
    try:
        return np.empty_like(like, subok=False)
    finally:
        cnp.PyDataMem_SetHandler(before)


def set_limit(size_t n_bytes):
    """Keep at most so many bytes; what is more goes back to the system now."""
    pool_set_limit(n_bytes)


def waiting():
    """Bytes that the pool holds for arrays to come."""
    return pool_waiting()


def memory():
    """Bytes of memory that the machine has; 0 where there is no pool."""
    return pool_memory()
