/* Inner loops of batchnorm.pyx, for float and double: a part of vector.h's template. */

/* Every loop works on a run of n values. step 0: all of one channel, p points at that channel's column of the parameter
   table. step 1: value j belongs to column j of the table. */

/* sum[j] += x - pivot and square[j] += (x - pivot)**2, column by column. */
FASTNORM_INLINE void FN(bn_stats_loop)(const real *x, ptrdiff_t n, const real *pivot, int step, real *sum, real *square) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real d = x[j] - pivot[j * step];
        sum[j] += d;
        square[j] += d * d;
    }
}

static void FN(bn_stats_columns)(const real *restrict x, ptrdiff_t n, const real *restrict pivot, real *restrict sum,
                                 real *restrict square) {
    FN(bn_stats_loop)(x, n, pivot, 1, sum, square);
}

/* The same over one channel's run, onto LANES partial sums. */
static void FN(bn_stats_run)(const real *restrict x, ptrdiff_t n, real pivot, real *restrict sum, real *restrict square) {
    real s[LANES], q[LANES];
    memcpy(s, sum, sizeof s);
    memcpy(q, square, sizeof q);
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) FN(bn_stats_loop)(x + i, LANES, &pivot, 0, s, q);
    FN(bn_stats_loop)(x + i, n - i, &pivot, 0, s, q);
    memcpy(sum, s, sizeof s);
    memcpy(square, q, sizeof q);
}

/* The one place that says what forward computes before the activation; backward recomputes its mask from the same bits.
   The mean is two numbers, because in float32 one is not enough for data far from zero. */
#define BN_P(row) p[(row) * ld + j * step]
#define BN_CENTERED ((x[j] - BN_P(BN_MEAN_HI)) - BN_P(BN_MEAN_LO))
#define BN_Z(centered) (with_residual ? ((centered) * BN_P(BN_SCALE) + BN_P(BN_BETA)) + residual[j] \
                                      : (centered) * BN_P(BN_SCALE) + BN_P(BN_BETA))

FASTNORM_INLINE void FN(bn_apply_loop)(const real *x, const real *residual, real *y, ptrdiff_t n, const real *restrict p,
                                       ptrdiff_t ld, int step, real slope, int activation, int with_residual) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) y[j] = FN(activate)(BN_Z(BN_CENTERED), activation, slope);
}

/* sum[j] += dz and product[j] += dz * (x - mean), where dz = act'(z) * dy. */
FASTNORM_INLINE void FN(bn_reduce_loop)(const real *dy, const real *x, const real *residual, ptrdiff_t n,
                                        const real *restrict p, ptrdiff_t ld, int step, real slope, int activation,
                                        int with_residual, real *sum, real *product) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real centered = BN_CENTERED;
        const real dz = activation ? FN(activate_gradient)(dy[j], BN_Z(centered), activation, slope) : dy[j];
        sum[j] += dz;
        product[j] += dz * centered;
    }
}

/* dx = scale * (dz - dz_mean - (x - mean) * slope_x), or scale * dz with frozen statistics; dresidual = dz. */
FASTNORM_INLINE void FN(bn_gradient_loop)(const real *dy, const real *x, const real *residual, real *dx, real *dresidual,
                                          ptrdiff_t n, const real *restrict p, ptrdiff_t ld, int step, real slope,
                                          int frozen, int activation, int with_residual) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real centered = BN_CENTERED;
        const real dz = activation ? FN(activate_gradient)(dy[j], BN_Z(centered), activation, slope) : dy[j];
        dx[j] = BN_P(BN_SCALE) * (frozen ? dz : (dz - BN_P(BN_DZ_MEAN)) - centered * BN_P(BN_SLOPE_X));
        if (with_residual) dresidual[j] = dz;
    }
}

/* LOOP(activation, with_residual) with both as constants, so that the compiler makes each of the six for itself. */
#define BN_DISPATCH(LOOP) \
    switch (2 * activation + (residual != NULL)) { \
        case 2 * ACTIVATION_NONE: LOOP(ACTIVATION_NONE, 0); break; \
        case 2 * ACTIVATION_NONE + 1: LOOP(ACTIVATION_NONE, 1); break; \
        case 2 * ACTIVATION_RELU: LOOP(ACTIVATION_RELU, 0); break; \
        case 2 * ACTIVATION_RELU + 1: LOOP(ACTIVATION_RELU, 1); break; \
        case 2 * ACTIVATION_LEAKY_RELU: LOOP(ACTIVATION_LEAKY_RELU, 0); break; \
        default: LOOP(ACTIVATION_LEAKY_RELU, 1); \
    }

static void FN(bn_apply)(const real *x, const real *residual, real *y, ptrdiff_t n, const real *p, ptrdiff_t ld, int step,
                         real slope, int activation) {
#define ONE(A, R) FN(bn_apply_loop)(x, residual, y, n, p, ld, 0, slope, A, R)
#define EACH(A, R) FN(bn_apply_loop)(x, residual, y, n, p, ld, 1, slope, A, R)
    if (step) BN_DISPATCH(EACH) else BN_DISPATCH(ONE)
#undef ONE
#undef EACH
}

static void FN(bn_gradient)(const real *dy, const real *x, const real *residual, real *dx, real *dresidual, ptrdiff_t n,
                            const real *p, ptrdiff_t ld, int step, real slope, int activation, int frozen) {
#define ONE(A, R) FN(bn_gradient_loop)(dy, x, residual, dx, dresidual, n, p, ld, 0, slope, 0, A, R)
#define EACH(A, R) FN(bn_gradient_loop)(dy, x, residual, dx, dresidual, n, p, ld, 1, slope, 0, A, R)
#define ONE_FROZEN(A, R) FN(bn_gradient_loop)(dy, x, residual, dx, dresidual, n, p, ld, 0, slope, 1, A, R)
#define EACH_FROZEN(A, R) FN(bn_gradient_loop)(dy, x, residual, dx, dresidual, n, p, ld, 1, slope, 1, A, R)
    if (frozen) {
        if (step) BN_DISPATCH(EACH_FROZEN) else BN_DISPATCH(ONE_FROZEN)
    } else {
        if (step) BN_DISPATCH(EACH) else BN_DISPATCH(ONE)
    }
#undef ONE
#undef EACH
#undef ONE_FROZEN
#undef EACH_FROZEN
}

static void FN(bn_reduce_columns)(const real *dy, const real *x, const real *residual, ptrdiff_t n, const real *p,
                                  ptrdiff_t ld, real slope, int activation, real *restrict sum, real *restrict product) {
#define EACH(A, R) FN(bn_reduce_loop)(dy, x, residual, n, p, ld, 1, slope, A, R, sum, product)
    BN_DISPATCH(EACH)
#undef EACH
}

FASTNORM_INLINE void FN(bn_reduce_run_loop)(const real *dy, const real *x, const real *residual, ptrdiff_t n,
                                            const real *restrict p, ptrdiff_t ld, real slope, int activation,
                                            int with_residual, real *restrict sum, real *restrict product) {
    real s[LANES], q[LANES];
    memcpy(s, sum, sizeof s);
    memcpy(q, product, sizeof q);
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        FN(bn_reduce_loop)(dy + i, x + i, with_residual ? residual + i : NULL, LANES, p, ld, 0, slope, activation,
                           with_residual, s, q);
    FN(bn_reduce_loop)(dy + i, x + i, with_residual ? residual + i : NULL, n - i, p, ld, 0, slope, activation,
                       with_residual, s, q);
    memcpy(sum, s, sizeof s);
    memcpy(product, q, sizeof q);
}

/* The same over one channel's run, onto LANES partial sums. */
static void FN(bn_reduce_run)(const real *dy, const real *x, const real *residual, ptrdiff_t n, const real *p,
                              ptrdiff_t ld, real slope, int activation, real *restrict sum, real *restrict product) {
#define ONE(A, R) FN(bn_reduce_run_loop)(dy, x, residual, n, p, ld, slope, A, R, sum, product)
    BN_DISPATCH(ONE)
#undef ONE
}

#undef BN_P
#undef BN_CENTERED
#undef BN_Z
#undef BN_DISPATCH
