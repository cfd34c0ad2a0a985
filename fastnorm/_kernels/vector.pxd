"""`vector.h` for Cython: each loop once, for whichever dtype `real` is; and how kernels take arrays from Python."""

cimport numpy as cnp
from libc.stdint cimport uint32_t, uint64_t

ctypedef fused real:
    float
    double

cdef extern from "vector.h" nogil:
    enum: LANES
    enum: ACTIVATION_NONE
    enum: ACTIVATION_RELU
    enum: ACTIVATION_LEAKY_RELU

    const char* fastnorm_build_flags()
    void stream_copy(void* dst, const void* src, size_t n_bytes)
    void stream_fence()
    void* scratch_alloc(size_t n_bytes)
    void scratch_free(void* scratch)

    double lanes_sum_f32(const float* x, Py_ssize_t n)
    double lanes_sum_f64(const double* x, Py_ssize_t n)
    float exp_f32(float x)
    double exp_f64(double x)

    # activations
    enum: ACTIVATION_ELU
    enum: ACTIVATION_CELU
    enum: ACTIVATION_SIGMOID
    enum: ACTIVATION_TANH
    void philox4x32(uint32_t* counter, uint32_t key0, uint32_t key1)
    void activation_f32(int kind, const float* x, float* y, Py_ssize_t n, float a)
    void activation_f64(int kind, const double* x, double* y, Py_ssize_t n, double a)
    void activation_backward_f32(int kind, const float* dy, const float* x, float* y, Py_ssize_t n, float a)
    void activation_backward_f64(int kind, const double* dy, const double* x, double* y, Py_ssize_t n, double a)
    void dropout_f32(const float* x, float* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                     uint64_t step, uint32_t threshold, float scale)
    void dropout_f64(const double* x, double* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                     uint64_t step, uint32_t threshold, double scale)


cdef inline void* data(object a) noexcept:
    """Address of an array's first element; NULL for None."""
    return NULL if a is None else cnp.PyArray_DATA(<cnp.ndarray> a)


cdef inline bint is_float32(object a) noexcept:
    """Whether an array of float32 or float64 is one of float32."""
    return cnp.PyArray_TYPE(<cnp.ndarray> a) == cnp.NPY_FLOAT32


cdef inline double lanes_sum(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return lanes_sum_f32(x, n)
    else:
        return lanes_sum_f64(x, n)


cdef inline void activation(int kind, const real* x, real* y, Py_ssize_t n, real a) noexcept nogil:
    if real is float:
        activation_f32(kind, x, y, n, a)
    else:
        activation_f64(kind, x, y, n, a)


cdef inline void activation_backward(int kind, const real* dy, const real* x, real* y, Py_ssize_t n,
                                     real a) noexcept nogil:
    if real is float:
        activation_backward_f32(kind, dy, x, y, n, a)
    else:
        activation_backward_f64(kind, dy, x, y, n, a)


cdef inline void dropout_run(const real* x, real* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                             uint64_t step, uint32_t threshold, real scale) noexcept nogil:
    if real is float:
        dropout_f32(x, y, n, seed, offset, first, step, threshold, scale)
    else:
        dropout_f64(x, y, n, seed, offset, first, step, threshold, scale)
