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
    enum: BN_MEAN_HI
    enum: BN_MEAN_LO
    enum: BN_SCALE
    enum: BN_BETA
    enum: BN_DZ_MEAN
    enum: BN_SLOPE_X
    enum: BN_ROWS

    const char* fastnorm_build_flags()
    void stream_copy(void* dst, const void* src, size_t n_bytes)
    void stream_fence()
    void* scratch_alloc(size_t n_bytes)
    void scratch_free(void* scratch)

    double lanes_sum_f32(const float* x, Py_ssize_t n)
    double lanes_sum_f64(const double* x, Py_ssize_t n)
    float exp_f32(float x)
    double exp_f64(double x)

    void bn_stats_columns_f32(const float* x, Py_ssize_t n, const float* pivot, float* sum, float* square)
    void bn_stats_columns_f64(const double* x, Py_ssize_t n, const double* pivot, double* sum, double* square)
    void bn_stats_run_f32(const float* x, Py_ssize_t n, float pivot, float* sum, float* square)
    void bn_stats_run_f64(const double* x, Py_ssize_t n, double pivot, double* sum, double* square)
    void bn_apply_f32(const float* x, const float* residual, float* y, Py_ssize_t n, const float* p, Py_ssize_t ld,
                      int step, float slope, int activation)
    void bn_apply_f64(const double* x, const double* residual, double* y, Py_ssize_t n, const double* p,
                      Py_ssize_t ld, int step, double slope, int activation)
    void bn_reduce_columns_f32(const float* dy, const float* x, const float* residual, Py_ssize_t n, const float* p,
                               Py_ssize_t ld, float slope, int activation, float* sum, float* product)
    void bn_reduce_columns_f64(const double* dy, const double* x, const double* residual, Py_ssize_t n,
                               const double* p, Py_ssize_t ld, double slope, int activation, double* sum,
                               double* product)
    void bn_reduce_run_f32(const float* dy, const float* x, const float* residual, Py_ssize_t n, const float* p,
                           Py_ssize_t ld, float slope, int activation, float* sum, float* product)
    void bn_reduce_run_f64(const double* dy, const double* x, const double* residual, Py_ssize_t n, const double* p,
                           Py_ssize_t ld, double slope, int activation, double* sum, double* product)
    void bn_gradient_f32(const float* dy, const float* x, const float* residual, float* dx, float* dresidual,
                         Py_ssize_t n, const float* p, Py_ssize_t ld, int step, float slope, int activation,
                         bint frozen)
    void bn_gradient_f64(const double* dy, const double* x, const double* residual, double* dx, double* dresidual,
                         Py_ssize_t n, const double* p, Py_ssize_t ld, int step, double slope, int activation,
                         bint frozen)


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


cdef inline void bn_stats_columns(const real* x, Py_ssize_t n, const real* pivot, real* sum,
                                  real* square) noexcept nogil:
    if real is float:
        bn_stats_columns_f32(x, n, pivot, sum, square)
    else:
        bn_stats_columns_f64(x, n, pivot, sum, square)


cdef inline void bn_stats_run(const real* x, Py_ssize_t n, real pivot, real* sum, real* square) noexcept nogil:
    if real is float:
        bn_stats_run_f32(x, n, pivot, sum, square)
    else:
        bn_stats_run_f64(x, n, pivot, sum, square)


cdef inline void bn_apply(const real* x, const real* residual, real* y, Py_ssize_t n, const real* p, Py_ssize_t ld,
                          int step, real slope, int activation) noexcept nogil:
    if real is float:
        bn_apply_f32(x, residual, y, n, p, ld, step, slope, activation)
    else:
        bn_apply_f64(x, residual, y, n, p, ld, step, slope, activation)


cdef inline void bn_reduce_columns(const real* dy, const real* x, const real* residual, Py_ssize_t n, const real* p,
                                   Py_ssize_t ld, real slope, int activation, real* sum,
                                   real* product) noexcept nogil:
    if real is float:
        bn_reduce_columns_f32(dy, x, residual, n, p, ld, slope, activation, sum, product)
    else:
        bn_reduce_columns_f64(dy, x, residual, n, p, ld, slope, activation, sum, product)


cdef inline void bn_reduce_run(const real* dy, const real* x, const real* residual, Py_ssize_t n, const real* p,
                               Py_ssize_t ld, real slope, int activation, real* sum, real* product) noexcept nogil:
    if real is float:
        bn_reduce_run_f32(dy, x, residual, n, p, ld, slope, activation, sum, product)
    else:
        bn_reduce_run_f64(dy, x, residual, n, p, ld, slope, activation, sum, product)


cdef inline void bn_gradient(const real* dy, const real* x, const real* residual, real* dx, real* dresidual,
                             Py_ssize_t n, const real* p, Py_ssize_t ld, int step, real slope, int activation,
                             bint frozen) noexcept nogil:
    if real is float:
        bn_gradient_f32(dy, x, residual, dx, dresidual, n, p, ld, step, slope, activation, frozen)
    else:
        bn_gradient_f64(dy, x, residual, dx, dresidual, n, p, ld, step, slope, activation, frozen)
