"""`vector.h` for Cython: each loop once, for whichever dtype `real` is; and how kernels take arrays from Python."""

cimport numpy as cnp
from libc.stdint cimport uint32_t, uint64_t

ctypedef fused real:
    float
    double

cdef extern from "vector.h" nogil:
    enum: LANES
    enum: STREAM_BYTES
    enum: ACTIVATION_RELU
    enum: ACTIVATION_LEAKY_RELU
    enum: BN_MEAN_HI
    enum: BN_MEAN_LO
    enum: BN_BETA
    enum: BN_INV_STD
    enum: BN_ROWS
    enum: BN_WIDE_ROWS

    const char* fastnorm_build_flags()
    void assume_l2_bytes(Py_ssize_t n_bytes)
    Py_ssize_t l2_bytes()
    void stream_copy(void* dst, const void* src, size_t n_bytes)
    void stream_fence()
    void fetch(const void* start, size_t n_bytes)
    ctypedef struct Ahead:
        Py_ssize_t left
    Ahead ahead_of_runs(Py_ssize_t run, Py_ssize_t apart)
    void fetch_ahead(const void* start, Py_ssize_t at, Py_ssize_t n_bytes, Ahead ahead)
    Py_ssize_t claim(Py_ssize_t* next)
    void* scratch_alloc(size_t n_bytes)
    void scratch_free(void* scratch)

    ctypedef struct Team:
        int size
    ctypedef struct TeamState:
        pass
    TeamState* team_own_state()
    TeamState* (*team_state)()
    Team team_open(int wanted, double bytes)
    void team_mark(Team* team)
    void team_close(Team* team)

    ctypedef struct Share:
        Py_ssize_t next
        Py_ssize_t end
    ctypedef struct Shares:
        int n
        Share share[64]
    ctypedef struct Turn:
        pass
    void share_out(Shares* shares, Py_ssize_t tiles, int threads)
    Turn turn_of(const Shares* shares, int thread)
    int team_present()
    void team_barrier(int present)
    Py_ssize_t next_tile(Shares* shares, Turn* turn)

    void assume_subnormals(int slow)
    bint expect_subnormals()
    bint met_subnormals(int hold)
    double hidden_one
    float muladd_through_double(double a, float b, float c, double one)
    float muladd_f32(float a, float b, float c)
    double muladd_f64(double a, double b, double c)
    double lanes_sum_f32(const float* x, Py_ssize_t n)
    double lanes_sum_f64(const double* x, Py_ssize_t n)
    double sum_squares_f32(const float* x, Py_ssize_t n)
    double sum_squares_f64(const double* x, Py_ssize_t n)

    void bn_stats_columns_f32(const float* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, const float* pivot,
                              float* sum, float* square, bint grouped, bint ahead)
    void bn_stats_columns_f64(const double* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, const double* pivot,
                              double* sum, double* square, bint grouped, bint ahead)
    void bn_typical_f32(const float* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, float* pivot, double* mean)
    void bn_typical_f64(const double* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, double* pivot,
                        double* mean)
    void bn_channel_sums_f32(const float* columns, Py_ssize_t fold, Py_ssize_t channels, Py_ssize_t inner,
                             double* out)
    void bn_channel_sums_f64(const double* columns, Py_ssize_t fold, Py_ssize_t channels, Py_ssize_t inner,
                             double* out)
    void bn_merge_chunk_f32(double count, double n, const float* pivot, Py_ssize_t inner, const double* sum,
                            const double* square, Py_ssize_t channels, const double* base, double* mean, double* m2)
    void bn_merge_chunk_f64(double count, double n, const double* pivot, Py_ssize_t inner, const double* sum,
                            const double* square, Py_ssize_t channels, const double* base, double* mean, double* m2)
    void bn_wide_moments_f32(const float* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                             Py_ssize_t inner, double* mean, double* m2)
    void bn_wide_moments_f64(const double* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                             Py_ssize_t inner, double* mean, double* m2)
    double bn_square_sum_f32(const float* x, Py_ssize_t n, double mean)
    double bn_square_sum_f64(const double* x, Py_ssize_t n, double mean)
    void bn_apply_channels_f32(const float* x, const float* residual, float* y, Py_ssize_t channels, Py_ssize_t inner,
                               const float* p, Py_ssize_t ld, float slope, int activation)
    void bn_apply_channels_f64(const double* x, const double* residual, double* y, Py_ssize_t channels,
                               Py_ssize_t inner, const double* p, Py_ssize_t ld, double slope, int activation)
    void bn_gradient_channels_f32(const float* dy, const float* x, const float* residual, float* dx, float* dresidual,
                                  Py_ssize_t channels, Py_ssize_t inner, const float* p, Py_ssize_t ld, float slope,
                                  int activation, bint frozen)
    void bn_gradient_channels_f64(const double* dy, const double* x, const double* residual, double* dx,
                                  double* dresidual, Py_ssize_t channels, Py_ssize_t inner, const double* p,
                                  Py_ssize_t ld, double slope, int activation, bint frozen)
    enum: STATS_ROWS
    enum: SPREAD
    void bn_spread_f32(float value, Py_ssize_t inner, float* out)
    void bn_spread_f64(double value, Py_ssize_t inner, double* out)
    int bn_in_range_f32(const double* sum, const double* square, const float* pivot, Py_ssize_t inner,
                        Py_ssize_t channels)
    bint bn_squares_vanished_f32(const float* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                                 Py_ssize_t inner, const float* pivot, const double* square)
    int bn_in_range_f64(const double* sum, const double* square, const double* pivot, Py_ssize_t inner,
                        Py_ssize_t channels)
    bint bn_squares_vanished_f64(const double* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                                 Py_ssize_t inner, const double* pivot, const double* square)
    void bn_update_running_f32(float* running, const double* batch, double factor, double momentum,
                               Py_ssize_t channels)
    void bn_update_running_f64(double* running, const double* batch, double factor, double momentum,
                               Py_ssize_t channels)
    void bn_parameters_f32(const double* base, const double* offset, const double* var, const float* gamma,
                           const float* beta, double eps, Py_ssize_t channels, float* p, Py_ssize_t ld, double* wide)
    void bn_parameters_f64(const double* base, const double* offset, const double* var, const double* gamma,
                           const double* beta, double eps, Py_ssize_t channels, double* p, Py_ssize_t ld, double* wide)
    void bn_finish_reduction_f32(const double* sum, const double* product, const double* inv_std, double n,
                                 Py_ssize_t channels, float* dgamma, float* dbeta, float* p, Py_ssize_t ld)
    void bn_finish_reduction_f64(const double* sum, const double* product, const double* inv_std, double n,
                                 Py_ssize_t channels, double* dgamma, double* dbeta, double* p, Py_ssize_t ld)
    void bn_reduce_columns_f32(const float* dy, const float* x, const float* residual, Py_ssize_t rows,
                               Py_ssize_t stride, Py_ssize_t n, const float* p, Py_ssize_t ld, float slope,
                               int activation, bint ahead, float* sum, float* product)
    void bn_reduce_columns_f64(const double* dy, const double* x, const double* residual, Py_ssize_t rows,
                               Py_ssize_t stride, Py_ssize_t n, const double* p, Py_ssize_t ld, double slope,
                               int activation, bint ahead, double* sum, double* product)
    void bn_merge(double count, double n, double mean_n, double m2_n, double* mean, double* m2)
    bint bn_add_finite(const double* a, const double* b, Py_ssize_t n, double* sum, double* product)
    bint bn_any_far(double n, const double* sum, const double* square, Py_ssize_t channels)
    void bn_stats_run_f32(const float* x, Py_ssize_t n, float pivot, Ahead ahead, float* sum, float* square)
    void bn_stats_run_f64(const double* x, Py_ssize_t n, double pivot, Ahead ahead, double* sum, double* square)
    void bn_apply_f32(const float* x, const float* residual, float* y, Py_ssize_t n, const float* p, Py_ssize_t ld,
                      int step, float slope, int activation)
    void bn_apply_f64(const double* x, const double* residual, double* y, Py_ssize_t n, const double* p,
                      Py_ssize_t ld, int step, double slope, int activation)
    void bn_reduce_run_f32(const float* dy, const float* x, const float* residual, Py_ssize_t n, const float* p,
                           Py_ssize_t ld, float slope, int activation, Ahead ahead, float* sum, float* product)
    void bn_reduce_run_f64(const double* dy, const double* x, const double* residual, Py_ssize_t n, const double* p,
                           Py_ssize_t ld, double slope, int activation, Ahead ahead, double* sum, double* product)
    void bn_gradient_f32(const float* dy, const float* x, const float* residual, float* dx, float* dresidual,
                         Py_ssize_t n, const float* p, Py_ssize_t ld, int step, float slope, int activation,
                         bint frozen)
    void bn_gradient_f64(const double* dy, const double* x, const double* residual, double* dx, double* dresidual,
                         Py_ssize_t n, const double* p, Py_ssize_t ld, int step, double slope, int activation,
                         bint frozen)
    bint bn_plain_f32(const float* p, const double* wide, Py_ssize_t ld, Py_ssize_t channels)
    bint bn_plain_gradient_f32(const float* p, Py_ssize_t ld, Py_ssize_t channels)
    void bn_careful_apply_f32(const float* x, const float* residual, float* y, Py_ssize_t n, const float* p,
                              const double* wide, Py_ssize_t ld, float slope, int activation)
    void bn_careful_reduce_f32(const float* dy, const float* x, const float* residual, Py_ssize_t n, const float* p,
                               const double* wide, Py_ssize_t ld, float slope, int activation, double* sum,
                               double* product)
    void bn_careful_gradient_f32(const float* dy, const float* x, const float* residual, float* dx, float* dresidual,
                                 Py_ssize_t n, const float* p, const double* wide, Py_ssize_t ld, float slope,
                                 int activation, bint frozen, double sum, double product, double count)
    bint bn_plain_f64(const double* p, const double* wide, Py_ssize_t ld, Py_ssize_t channels)
    bint bn_plain_gradient_f64(const double* p, Py_ssize_t ld, Py_ssize_t channels)
    void bn_careful_apply_f64(const double* x, const double* residual, double* y, Py_ssize_t n, const double* p,
                              const double* wide, Py_ssize_t ld, double slope, int activation)
    void bn_careful_reduce_f64(const double* dy, const double* x, const double* residual, Py_ssize_t n, const double* p,
                               const double* wide, Py_ssize_t ld, double slope, int activation, double* sum,
                               double* product)
    void bn_careful_gradient_f64(const double* dy, const double* x, const double* residual, double* dx,
                                 double* dresidual, Py_ssize_t n, const double* p, const double* wide, Py_ssize_t ld,
                                 double slope, int activation, bint frozen, double sum, double product, double count)
    # activations
    enum: ACTIVATION_ELU
    enum: ACTIVATION_CELU
    enum: ACTIVATION_SIGMOID
    enum: ACTIVATION_TANH
    void philox4x32(uint32_t* counter, uint32_t key0, uint32_t key1)
    void activation_f32(int kind, const float* x, float* y, Py_ssize_t n, double factor, bint careful)
    void activation_f64(int kind, const double* x, double* y, Py_ssize_t n, double factor, bint careful)
    void activation_backward_f32(int kind, const float* dy, const float* x, float* y, Py_ssize_t n, double factor,
                                 bint careful)
    void activation_backward_f64(int kind, const double* dy, const double* x, double* y, Py_ssize_t n, double factor,
                                 bint careful)
    void dropout_f32(const float* x, float* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                     uint64_t step, uint32_t threshold, float scale)
    void dropout_f64(const double* x, double* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                     uint64_t step, uint32_t threshold, double scale)
    # softmax
    double log_of_sum(double x)
    void lanes_log(const double* x, double* out, Py_ssize_t n)

    float softmax_max_f32(const float* x, Py_ssize_t n)
    double softmax_exp_f32(const float* x, float* e, Py_ssize_t n, float m, Py_ssize_t ahead, bint careful)
    double softmax_sum_f32(const float* e, Py_ssize_t n)
    void softmax_output_f32(const float* e, const float* t, const float* w, float* out, Py_ssize_t n,
                            const float* factor, const float* power, float a, float b, int step, bint careful)
    void softmax_factors_f32(double scale, float* factor, float* power)
    void log_softmax_output_f32(const float* x, float* out, Py_ssize_t n, const float* m, const float* log_sum,
                                int step)
    void softmax_dot_f32(const float* x, const float* t, const float* w, Py_ssize_t n, float m, double a, double b,
                         double* mass, double* dot)
    void lanes_transpose_f32(const float* source, Py_ssize_t source_step, float* to, Py_ssize_t to_step,
                             Py_ssize_t rows, Py_ssize_t columns)
    void lanes_max_f32(const float* x, float* m, Py_ssize_t n)
    void lanes_frame_f32(const float* m, float* frame, Py_ssize_t width, Py_ssize_t n)
    void lanes_exp_f32(const float* x, float* e, const float* frame, Py_ssize_t width, double* total, Py_ssize_t n,
                       bint careful)
    void lanes_dot_f32(const float* x, const float* t, Py_ssize_t n, const float* m, double a, double b,
                       double* mass, double* dot)

    double softmax_max_f64(const double* x, Py_ssize_t n)
    double softmax_exp_f64(const double* x, double* e, Py_ssize_t n, double m, Py_ssize_t ahead, bint careful)
    double softmax_sum_f64(const double* e, Py_ssize_t n)
    void softmax_output_f64(const double* e, const double* t, const double* w, double* out, Py_ssize_t n,
                            const double* factor, const double* power, double a, double b, int step, bint careful)
    void softmax_factors_f64(double scale, double* factor, double* power)
    void log_softmax_output_f64(const double* x, double* out, Py_ssize_t n, const double* m, const double* log_sum,
                                int step)
    void softmax_dot_f64(const double* x, const double* t, const double* w, Py_ssize_t n, double m, double a, double b,
                         double* mass, double* dot)
    void lanes_transpose_f64(const double* source, Py_ssize_t source_step, double* to, Py_ssize_t to_step,
                             Py_ssize_t rows, Py_ssize_t columns)
    void lanes_max_f64(const double* x, double* m, Py_ssize_t n)
    void lanes_frame_f64(const double* m, double* frame, Py_ssize_t width, Py_ssize_t n)
    void lanes_exp_f64(const double* x, double* e, const double* frame, Py_ssize_t width, double* total, Py_ssize_t n,
                       bint careful)
    void lanes_dot_f64(const double* x, const double* t, Py_ssize_t n, const double* m, double a, double b,
                       double* mass, double* dot)


cdef inline void* data(object a) noexcept:
    """Address of an array's first element; NULL for None."""
    return NULL if a is None else cnp.PyArray_DATA(<cnp.ndarray> a)


cdef inline bint fits(object a, Py_ssize_t n, object like) except -1:
    """Whether an array, unless it is absent, is one aligned block of n elements of `like`'s dtype.

    For the assertions at the kernels' entrances, which debug builds alone keep: the thin layer has made sure of it.
    """
    cdef Py_ssize_t last = 0, length, stride  # last: where the last element is
    if a is None:
        return True
    for length, stride in zip(a.shape, a.strides):
        last += (length - 1) * stride
    return (a.size == n and a.dtype == like.dtype and a.flags.aligned
            and (n == 0 or last == (n - 1) * <Py_ssize_t> a.itemsize))


cdef inline bint is_float32(object a) noexcept:
    """Whether an array of float32 or float64 is one of float32."""
    return cnp.PyArray_TYPE(<cnp.ndarray> a) == cnp.NPY_FLOAT32


cdef inline const real* at_offset(const real* a, Py_ssize_t i) noexcept nogil:
    """&a[i] of an array that may be absent."""
    if a == NULL:
        return NULL
    return a + i


cdef inline double lanes_sum(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return lanes_sum_f32(x, n)
    else:
        return lanes_sum_f64(x, n)


cdef inline void bn_stats_columns(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, const real* pivot,
                                  real* sum, real* square, bint grouped, bint ahead) noexcept nogil:
    if real is float:
        bn_stats_columns_f32(x, rows, stride, n, pivot, sum, square, grouped, ahead)
    else:
        bn_stats_columns_f64(x, rows, stride, n, pivot, sum, square, grouped, ahead)


cdef inline void bn_typical(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t n, real* pivot,
                            double* mean) noexcept nogil:
    if real is float:
        bn_typical_f32(x, rows, stride, n, pivot, mean)
    else:
        bn_typical_f64(x, rows, stride, n, pivot, mean)


cdef inline void bn_channel_sums(const real* columns, Py_ssize_t fold, Py_ssize_t channels, Py_ssize_t inner,
                                 double* out) noexcept nogil:
    if real is float:
        bn_channel_sums_f32(columns, fold, channels, inner, out)
    else:
        bn_channel_sums_f64(columns, fold, channels, inner, out)


cdef inline void bn_merge_chunk(double count, double n, const real* pivot, Py_ssize_t inner, const double* sum,
                                const double* square, Py_ssize_t channels, const double* base, double* mean,
                                double* m2) noexcept nogil:
    if real is float:
        bn_merge_chunk_f32(count, n, pivot, inner, sum, square, channels, base, mean, m2)
    else:
        bn_merge_chunk_f64(count, n, pivot, inner, sum, square, channels, base, mean, m2)


cdef inline void bn_wide_moments(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                                 Py_ssize_t inner, double* mean, double* m2) noexcept nogil:
    if real is float:
        bn_wide_moments_f32(x, rows, stride, channels, inner, mean, m2)
    else:
        bn_wide_moments_f64(x, rows, stride, channels, inner, mean, m2)


cdef inline double bn_square_sum(const real* x, Py_ssize_t n, double mean) noexcept nogil:
    if real is float:
        return bn_square_sum_f32(x, n, mean)
    else:
        return bn_square_sum_f64(x, n, mean)


cdef inline void bn_apply_channels(const real* x, const real* residual, real* y, Py_ssize_t channels,
                                   Py_ssize_t inner, const real* p, Py_ssize_t ld, real slope,
                                   int activation) noexcept nogil:
    if real is float:
        bn_apply_channels_f32(x, residual, y, channels, inner, p, ld, slope, activation)
    else:
        bn_apply_channels_f64(x, residual, y, channels, inner, p, ld, slope, activation)


cdef inline void bn_gradient_channels(const real* dy, const real* x, const real* residual, real* dx, real* dresidual,
                                      Py_ssize_t channels, Py_ssize_t inner, const real* p, Py_ssize_t ld, real slope,
                                      int activation, bint frozen) noexcept nogil:
    if real is float:
        bn_gradient_channels_f32(dy, x, residual, dx, dresidual, channels, inner, p, ld, slope, activation, frozen)
    else:
        bn_gradient_channels_f64(dy, x, residual, dx, dresidual, channels, inner, p, ld, slope, activation, frozen)


cdef inline void bn_spread(real value, Py_ssize_t inner, real* out) noexcept nogil:
    if real is float:
        bn_spread_f32(value, inner, out)
    else:
        bn_spread_f64(value, inner, out)


cdef inline int bn_in_range(const double* sum, const double* square, const real* pivot, Py_ssize_t inner,
                            Py_ssize_t channels) noexcept nogil:
    if real is float:
        return bn_in_range_f32(sum, square, pivot, inner, channels)
    else:
        return bn_in_range_f64(sum, square, pivot, inner, channels)


cdef inline bint bn_squares_vanished(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels,
                                     Py_ssize_t inner, const real* pivot, const double* square) noexcept nogil:
    if real is float:
        return bn_squares_vanished_f32(x, rows, stride, channels, inner, pivot, square)
    else:
        return bn_squares_vanished_f64(x, rows, stride, channels, inner, pivot, square)


cdef inline void bn_update_running(real* running, const double* batch, double factor, double momentum,
                                   Py_ssize_t channels) noexcept nogil:
    if real is float:
        bn_update_running_f32(running, batch, factor, momentum, channels)
    else:
        bn_update_running_f64(running, batch, factor, momentum, channels)


cdef inline void bn_parameters(const double* base, const double* offset, const double* var, const real* gamma,
                               const real* beta, double eps, Py_ssize_t channels, real* p, Py_ssize_t ld,
                               double* wide) noexcept nogil:
    if real is float:
        bn_parameters_f32(base, offset, var, gamma, beta, eps, channels, p, ld, wide)
    else:
        bn_parameters_f64(base, offset, var, gamma, beta, eps, channels, p, ld, wide)


cdef inline void bn_finish_reduction(const double* sum, const double* product, const double* inv_std, double n,
                                     Py_ssize_t channels, real* dgamma, real* dbeta, real* p,
                                     Py_ssize_t ld) noexcept nogil:
    if real is float:
        bn_finish_reduction_f32(sum, product, inv_std, n, channels, dgamma, dbeta, p, ld)
    else:
        bn_finish_reduction_f64(sum, product, inv_std, n, channels, dgamma, dbeta, p, ld)


cdef inline void bn_reduce_columns(const real* dy, const real* x, const real* residual, Py_ssize_t rows,
                                   Py_ssize_t stride, Py_ssize_t n, const real* p, Py_ssize_t ld, real slope,
                                   int activation, bint ahead, real* sum, real* product) noexcept nogil:
    if real is float:
        bn_reduce_columns_f32(dy, x, residual, rows, stride, n, p, ld, slope, activation, ahead, sum, product)
    else:
        bn_reduce_columns_f64(dy, x, residual, rows, stride, n, p, ld, slope, activation, ahead, sum, product)


cdef inline void bn_stats_run(const real* x, Py_ssize_t n, real pivot, Ahead ahead, real* sum,
                              real* square) noexcept nogil:
    if real is float:
        bn_stats_run_f32(x, n, pivot, ahead, sum, square)
    else:
        bn_stats_run_f64(x, n, pivot, ahead, sum, square)


cdef inline void bn_apply(const real* x, const real* residual, real* y, Py_ssize_t n, const real* p, Py_ssize_t ld,
                          int step, real slope, int activation) noexcept nogil:
    if real is float:
        bn_apply_f32(x, residual, y, n, p, ld, step, slope, activation)
    else:
        bn_apply_f64(x, residual, y, n, p, ld, step, slope, activation)


cdef inline void bn_reduce_run(const real* dy, const real* x, const real* residual, Py_ssize_t n, const real* p,
                               Py_ssize_t ld, real slope, int activation, Ahead ahead, real* sum,
                               real* product) noexcept nogil:
    if real is float:
        bn_reduce_run_f32(dy, x, residual, n, p, ld, slope, activation, ahead, sum, product)
    else:
        bn_reduce_run_f64(dy, x, residual, n, p, ld, slope, activation, ahead, sum, product)


cdef inline void bn_gradient(const real* dy, const real* x, const real* residual, real* dx, real* dresidual,
                             Py_ssize_t n, const real* p, Py_ssize_t ld, int step, real slope, int activation,
                             bint frozen) noexcept nogil:
    if real is float:
        bn_gradient_f32(dy, x, residual, dx, dresidual, n, p, ld, step, slope, activation, frozen)
    else:
        bn_gradient_f64(dy, x, residual, dx, dresidual, n, p, ld, step, slope, activation, frozen)


cdef inline bint bn_plain(const real* p, const double* wide, Py_ssize_t ld, Py_ssize_t channels) noexcept nogil:
    if real is float:
        return bn_plain_f32(p, wide, ld, channels)
    else:
        return bn_plain_f64(p, wide, ld, channels)


cdef inline bint bn_plain_gradient(const real* p, Py_ssize_t ld, Py_ssize_t channels) noexcept nogil:
    if real is float:
        return bn_plain_gradient_f32(p, ld, channels)
    else:
        return bn_plain_gradient_f64(p, ld, channels)


cdef inline void bn_careful_apply(const real* x, const real* residual, real* y, Py_ssize_t n, const real* p,
                                  const double* wide, Py_ssize_t ld, real slope, int activation) noexcept nogil:
    if real is float:
        bn_careful_apply_f32(x, residual, y, n, p, wide, ld, slope, activation)
    else:
        bn_careful_apply_f64(x, residual, y, n, p, wide, ld, slope, activation)


cdef inline void bn_careful_reduce(const real* dy, const real* x, const real* residual, Py_ssize_t n, const real* p,
                                   const double* wide, Py_ssize_t ld, real slope, int activation, double* sum,
                                   double* product) noexcept nogil:
    if real is float:
        bn_careful_reduce_f32(dy, x, residual, n, p, wide, ld, slope, activation, sum, product)
    else:
        bn_careful_reduce_f64(dy, x, residual, n, p, wide, ld, slope, activation, sum, product)


cdef inline void bn_careful_gradient(const real* dy, const real* x, const real* residual, real* dx, real* dresidual,
                                     Py_ssize_t n, const real* p, const double* wide, Py_ssize_t ld, real slope,
                                     int activation, bint frozen, double sum, double product,
                                     double count) noexcept nogil:
    if real is float:
        bn_careful_gradient_f32(dy, x, residual, dx, dresidual, n, p, wide, ld, slope, activation, frozen, sum,
                                product, count)
    else:
        bn_careful_gradient_f64(dy, x, residual, dx, dresidual, n, p, wide, ld, slope, activation, frozen, sum,
                                product, count)


cdef inline double sum_squares(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return sum_squares_f32(x, n)
    else:
        return sum_squares_f64(x, n)
cdef inline void activation(int kind, const real* x, real* y, Py_ssize_t n, double factor,
                            bint careful) noexcept nogil:
    if real is float:
        activation_f32(kind, x, y, n, factor, careful)
    else:
        activation_f64(kind, x, y, n, factor, careful)


cdef inline void activation_backward(int kind, const real* dy, const real* x, real* y, Py_ssize_t n,
                                     double factor, bint careful) noexcept nogil:
    if real is float:
        activation_backward_f32(kind, dy, x, y, n, factor, careful)
    else:
        activation_backward_f64(kind, dy, x, y, n, factor, careful)


cdef inline void dropout_run(const real* x, real* y, Py_ssize_t n, uint64_t seed, uint64_t offset, uint64_t first,
                             uint64_t step, uint32_t threshold, real scale) noexcept nogil:
    if real is float:
        dropout_f32(x, y, n, seed, offset, first, step, threshold, scale)
    else:
        dropout_f64(x, y, n, seed, offset, first, step, threshold, scale)
# -- softmax -----------------------------------------------------------------------------------------------------------


cdef inline real softmax_max(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return softmax_max_f32(x, n)
    else:
        return softmax_max_f64(x, n)


cdef inline double softmax_exp(const real* x, real* e, Py_ssize_t n, real m, Py_ssize_t ahead,
                               bint careful) noexcept nogil:
    if real is float:
        return softmax_exp_f32(x, e, n, m, ahead, careful)
    else:
        return softmax_exp_f64(x, e, n, m, ahead, careful)


cdef inline double softmax_sum(const real* e, Py_ssize_t n) noexcept nogil:
    if real is float:
        return softmax_sum_f32(e, n)
    else:
        return softmax_sum_f64(e, n)


cdef inline void softmax_output(const real* e, const real* t, const real* w, real* out, Py_ssize_t n,
                                const real* factor, const real* power, real a, real b, int step,
                                bint careful) noexcept nogil:
    if real is float:
        softmax_output_f32(e, t, w, out, n, factor, power, a, b, step, careful)
    else:
        softmax_output_f64(e, t, w, out, n, factor, power, a, b, step, careful)


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


cdef inline void lanes_transpose(const real* source, Py_ssize_t source_step, real* to, Py_ssize_t to_step,
                                 Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    if real is float:
        lanes_transpose_f32(source, source_step, to, to_step, rows, columns)
    else:
        lanes_transpose_f64(source, source_step, to, to_step, rows, columns)


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
                           Py_ssize_t n, bint careful) noexcept nogil:
    if real is float:
        lanes_exp_f32(x, e, frame, width, total, n, careful)
    else:
        lanes_exp_f64(x, e, frame, width, total, n, careful)


cdef inline void lanes_dot(const real* x, const real* t, Py_ssize_t n, const real* m, double a, double b,
                           double* mass, double* dot) noexcept nogil:
    if real is float:
        lanes_dot_f32(x, t, n, m, a, b, mass, dot)
    else:
        lanes_dot_f64(x, t, n, m, a, b, mass, dot)
