"""`vector.h` for Cython: each loop once, for whichever dtype `real` is; and how kernels take arrays from Python."""

cimport numpy as cnp

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
    double sum_squares_f32(const float* x, Py_ssize_t n)
    double sum_squares_f64(const double* x, Py_ssize_t n)
    float exp_f32(float x)
    double exp_f64(double x)


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


cdef inline double sum_squares(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return sum_squares_f32(x, n)
    else:
        return sum_squares_f64(x, n)
