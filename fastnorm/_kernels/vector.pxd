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
    float exp_f32(float x)
    double exp_f64(double x)

    # softmax
    double log_of_sum(double x)
    void lanes_log(const double* x, double* out, Py_ssize_t n)

    float softmax_max_f32(const float* x, Py_ssize_t n)
    double softmax_exp_f32(const float* x, float* e, Py_ssize_t n, float m)
    double softmax_sum_f32(const float* e, Py_ssize_t n)
    void softmax_output_f32(const float* e, const float* t, const float* w, float* out, Py_ssize_t n,
                            const float* factor, const float* power, float a, float b, int step)
    void softmax_factors_f32(double scale, float* factor, float* power)
    void log_softmax_output_f32(const float* x, float* out, Py_ssize_t n, const float* m, const float* log_sum,
                                int step)
    void softmax_dot_f32(const float* x, const float* t, const float* w, Py_ssize_t n, float m, double a, double b,
                         double* mass, double* dot)
    void lanes_max_f32(const float* x, float* m, Py_ssize_t n)
    void lanes_frame_f32(const float* m, float* frame, Py_ssize_t width, Py_ssize_t n)
    void lanes_exp_f32(const float* x, float* e, const float* frame, Py_ssize_t width, double* total, Py_ssize_t n)
    void lanes_dot_f32(const float* x, const float* t, Py_ssize_t n, const float* m, double a, double b,
                       double* mass, double* dot)

    double softmax_max_f64(const double* x, Py_ssize_t n)
    double softmax_exp_f64(const double* x, double* e, Py_ssize_t n, double m)
    double softmax_sum_f64(const double* e, Py_ssize_t n)
    void softmax_output_f64(const double* e, const double* t, const double* w, double* out, Py_ssize_t n,
                            const double* factor, const double* power, double a, double b, int step)
    void softmax_factors_f64(double scale, double* factor, double* power)
    void log_softmax_output_f64(const double* x, double* out, Py_ssize_t n, const double* m, const double* log_sum,
                                int step)
    void softmax_dot_f64(const double* x, const double* t, const double* w, Py_ssize_t n, double m, double a, double b,
                         double* mass, double* dot)
    void lanes_max_f64(const double* x, double* m, Py_ssize_t n)
    void lanes_frame_f64(const double* m, double* frame, Py_ssize_t width, Py_ssize_t n)
    void lanes_exp_f64(const double* x, double* e, const double* frame, Py_ssize_t width, double* total, Py_ssize_t n)
    void lanes_dot_f64(const double* x, const double* t, Py_ssize_t n, const double* m, double a, double b,
                       double* mass, double* dot)


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


# -- softmax -----------------------------------------------------------------------------------------------------------


cdef inline real softmax_max(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return softmax_max_f32(x, n)
    else:
        return softmax_max_f64(x, n)


cdef inline double softmax_exp(const real* x, real* e, Py_ssize_t n, real m) noexcept nogil:
    if real is float:
        return softmax_exp_f32(x, e, n, m)
    else:
        return softmax_exp_f64(x, e, n, m)


cdef inline double softmax_sum(const real* e, Py_ssize_t n) noexcept nogil:
    if real is float:
        return softmax_sum_f32(e, n)
    else:
        return softmax_sum_f64(e, n)


cdef inline void softmax_output(const real* e, const real* t, const real* w, real* out, Py_ssize_t n,
                                const real* factor, const real* power, real a, real b, int step) noexcept nogil:
    if real is float:
        softmax_output_f32(e, t, w, out, n, factor, power, a, b, step)
    else:
        softmax_output_f64(e, t, w, out, n, factor, power, a, b, step)


cdef inline void softmax_factors(double scale, real* factor, real* power) noexcept nogil:
    if real is float:
        softmax_factors_f32(scale, factor, power)
    else:
        softmax_factors_f64(scale, factor, power)


cdef inline void log_softmax_output(const real* x, real* out, Py_ssize_t n, const real* m, const real* log_sum,
                                    int step) noexcept nogil:
    if real is float:
        log_softmax_output_f32(x, out, n, m, log_sum, step)
    else:
        log_softmax_output_f64(x, out, n, m, log_sum, step)


cdef inline void softmax_dot(const real* x, const real* t, const real* w, Py_ssize_t n, real m, double a, double b,
                             double* mass, double* dot) noexcept nogil:
    if real is float:
        softmax_dot_f32(x, t, w, n, m, a, b, mass, dot)
    else:
        softmax_dot_f64(x, t, w, n, m, a, b, mass, dot)


cdef inline void lanes_max(const real* x, real* m, Py_ssize_t n) noexcept nogil:
    if real is float:
        lanes_max_f32(x, m, n)
    else:
        lanes_max_f64(x, m, n)


cdef inline void lanes_frame(const real* m, real* frame, Py_ssize_t width, Py_ssize_t n) noexcept nogil:
    if real is float:
        lanes_frame_f32(m, frame, width, n)
    else:
        lanes_frame_f64(m, frame, width, n)


cdef inline void lanes_exp(const real* x, real* e, const real* frame, Py_ssize_t width, double* total,
                           Py_ssize_t n) noexcept nogil:
    if real is float:
        lanes_exp_f32(x, e, frame, width, total, n)
    else:
        lanes_exp_f64(x, e, frame, width, total, n)


cdef inline void lanes_dot(const real* x, const real* t, Py_ssize_t n, const real* m, double a, double b,
                           double* mass, double* dot) noexcept nogil:
    if real is float:
        lanes_dot_f32(x, t, n, m, a, b, mass, dot)
    else:
        lanes_dot_f64(x, t, n, m, a, b, mass, dot)
