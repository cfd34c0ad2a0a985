/* Inner loops of batchnorm.pyx, for float and double: a part of vector.h's template. */

/* Every loop works on a run of n values. step 0: all of one channel, p points at that channel's column of the parameter
   table. step 1: value j belongs to column j of the table. */

/* -- statistics -- */

/* sum[j] += x - pivot and square[j] += (x - pivot)**2 for `rows`, a constant, rows of n columns, one every `stride` values.
   grouped, a constant: these rows are added up by themselves first. 64 squares one by one err by up to 8 ulp where the
   data lie on a grid, for squares of integers (0 or 1 modulo 4) all round to one side; 8 of them by 1. */
FASTNORM_INLINE void FN(bn_stats_loop)(const real *x, int rows, ptrdiff_t stride, ptrdiff_t n, const real *pivot, int step,
                                       real *sum, real *square, int grouped) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        real s = grouped ? 0 : sum[j], q = grouped ? 0 : square[j];
        for (int r = 0; r < rows; r++) {
            const real d = x[r * stride + j] - pivot[j * step];
            s += d;
            q += d * d;
        }
        sum[j] = grouped ? sum[j] + s : s;
        square[j] = grouped ? square[j] + q : q;
    }
}

/* -- reading from a cache line's begin --

   NumPy's large arrays begin 16 bytes after one, and a vector that spans two lines costs up to half of the speed of memory
   (61 against 85 GB/s backward on two cores). So loops over long contiguous memory begin with the first whole line. What
   is added to which partial sum, and in what order, stays the same: sums are rotated before and rotated back after. */

/* How many values lie before the first line that begins at x or later. */
FASTNORM_INLINE ptrdiff_t FN(before_line)(const real *x) {
    return (ptrdiff_t)(((0 - (uintptr_t)x) & 63) / sizeof(real));
}

/* x[i] = x[(i + h) % n] for h values of a line at most, and back. */
static void FN(rotate)(real *x, ptrdiff_t n, ptrdiff_t h) {
    real first[64 / sizeof(real)];
    memcpy(first, x, (size_t)h * sizeof(real));
    memmove(x, x + h, (size_t)(n - h) * sizeof(real));
    memcpy(x + n - h, first, (size_t)h * sizeof(real));
}
static void FN(rotate_back)(real *x, ptrdiff_t n, ptrdiff_t h) {
    real last[64 / sizeof(real)];
    memcpy(last, x + n - h, (size_t)h * sizeof(real));
    memmove(x + h, x, (size_t)(n - h) * sizeof(real));
    memcpy(x, last, (size_t)h * sizeof(real));
}

/* to[i] = from[(i + h) % LANES], h from 0 to LANES: the same, and back, for partial sums of runs. */
FASTNORM_INLINE void FN(rotate_lanes)(const real *from, ptrdiff_t h, real *to) {
    if (h % LANES == 0) {
        memcpy(to, from, LANES * sizeof(real));
    } else {
        real twice[2 * LANES];
        memcpy(twice, from, LANES * sizeof(real));
        memcpy(twice + LANES, from, LANES * sizeof(real));
        memcpy(to, twice + h, LANES * sizeof(real));
    }
}

#ifndef FASTNORM_DOUBLE
enum {
    RUN_ALIGNED = 2048, /* a run from which that pays */
    /* Rows taken at once, so that sums and parameters are loaded and stored once for them. More lines 4 KB apart than
       these, of x and dy together, do not fit one set of the first-level cache. */
    STATS_ROWS = 8,
    REDUCE_ROWS = 4
};
#endif

/* Ask for LANES values of each of so many rows. */
FASTNORM_INLINE void FN(fetch_rows)(const real *x, int rows, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < LANES; j += 64 / (int)sizeof(real)) PREFETCH(x + r * stride + j);
}

/* ahead: the same columns of the rows to come are fetched while these are added up; strips of LANES columns, for vectors. */
FASTNORM_INLINE void FN(bn_stats_rows)(const real *restrict x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n,
                                       const real *restrict pivot, real *restrict sum, real *restrict square, int grouped,
                                       int ahead) {
    const int at_once = STATS_ROWS;
    ptrdiff_t r = 0;
    for (; r + at_once <= rows; r += at_once) {
        ptrdiff_t j = 0;
        for (; ahead && j + LANES <= n; j += LANES) {
            FN(fetch_rows)(x + (r + at_once) * stride + j, at_once, stride);
            FN(bn_stats_loop)(x + r * stride + j, at_once, stride, LANES, pivot + j, 1, sum + j, square + j, grouped);
        }
        FN(bn_stats_loop)(x + r * stride + j, at_once, stride, n - j, pivot + j, 1, sum + j, square + j, grouped);
    }
    for (; r < rows; r++) FN(bn_stats_loop)(x + r * stride, 1, stride, n, pivot, 1, sum, square, grouped);
}

/* Groups of rows begin at the first row whatever the address is: no rotation, and so no loads that begin at lines. Where
   rows are not grouped and follow one another, `pivot` repeats a line's values behind the last column. */
static void FN(bn_stats_columns)(const real *restrict x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n,
                                 const real *restrict pivot, real *restrict sum, real *restrict square, int grouped,
                                 int ahead) {
    const ptrdiff_t h = FN(before_line)(x);
    if (grouped) {
        FN(bn_stats_rows)(x, rows, stride, n, pivot, sum, square, 1, ahead);
        return;
    }
    if (stride != n || rows < 2 * STATS_ROWS || h == 0 || h > n) {
        FN(bn_stats_rows)(x, rows, stride, n, pivot, sum, square, 0, ahead);
        return;
    }
    FN(bn_stats_loop)(x, 1, 0, h, pivot, 1, sum, square, 0);
    FN(rotate)(sum, n, h);
    FN(rotate)(square, n, h);
    FN(bn_stats_rows)(x + h, rows - 1, n, n, pivot + h, sum, square, 0, ahead);
    FN(bn_stats_loop)(x + h + (rows - 1) * n, 1, 0, n - h, pivot + h, 1, sum, square, 0);
    FN(rotate_back)(sum, n, h);
    FN(rotate_back)(square, n, h);
}

/* The same over one channel's run, onto LANES partial sums. */
static void FN(bn_stats_run)(const real *restrict x, ptrdiff_t n, real pivot, Ahead ahead, real *restrict sum,
                             real *restrict square) {
    const ptrdiff_t h = n < RUN_ALIGNED ? 0 : FN(before_line)(x);
    real s[LANES], q[LANES];
    FN(bn_stats_loop)(x, 1, 0, h, &pivot, 0, sum, square, 0);
    FN(rotate_lanes)(sum, h, s);
    FN(rotate_lanes)(square, h, q);
    ptrdiff_t i = h;
    for (; i + LANES <= n; i += LANES) {
        fetch_ahead(x, i * (ptrdiff_t)sizeof(real), LANES * sizeof(real), ahead);
        FN(bn_stats_loop)(x + i, 1, 0, LANES, &pivot, 0, s, q, 0);
    }
    FN(bn_stats_loop)(x + i, 1, 0, n - i, &pivot, 0, s, q, 0);
    FN(rotate_lanes)(s, LANES - h, sum);
    FN(rotate_lanes)(q, LANES - h, square);
}

/* Of each of n columns, the one of its first values that lies nearest to their mean; 0 where that is not finite. A value
   of the data keeps d exact where the data lie on a grid (integers, pixels), and 0 for constant data. */
static void FN(bn_typical)(const real *restrict x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n, real *restrict pivot,
                           double *restrict mean) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) mean[j] = pivot[j] = x[j];
    for (ptrdiff_t r = 1; r < rows; r++) {
        SIMD
        for (ptrdiff_t j = 0; j < n; j++) mean[j] += x[r * stride + j];
    }
    const double each = 1.0 / (double)rows;
    for (ptrdiff_t r = 1; r < rows; r++) {
        SIMD
        for (ptrdiff_t j = 0; j < n; j++) {
            const double m = mean[j] * each, distance = x[r * stride + j] - m, best = pivot[j] - m;
            pivot[j] = distance * distance < best * best ? x[r * stride + j] : pivot[j];
        }
    }
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) pivot[j] = mean[j] - mean[j] == 0 ? pivot[j] : 0;
}

/* Give `inner` columns the same value, in whole vectors: up to SPREAD - 1 columns behind them are written too. */
#define SPREAD 16
static void FN(bn_spread)(real value, ptrdiff_t inner, real *restrict out) {
    for (ptrdiff_t j = 0; j < inner; j += SPREAD) {
        SIMD
        for (int i = 0; i < SPREAD; i++) out[j + i] = value;
    }
}

/* Each channel's sum over its columns in `fold` rows of them, in double. */
static void FN(bn_channel_sums)(const real *restrict columns, ptrdiff_t fold, ptrdiff_t channels, ptrdiff_t inner,
                                double *restrict out) {
    if (inner == 1) {
        SIMD
        for (ptrdiff_t k = 0; k < channels; k++) out[k] = columns[k];
    } else {
        for (ptrdiff_t k = 0; k < channels; k++) out[k] = FN(lanes_sum)(columns + k * inner, inner);
    }
    for (ptrdiff_t f = 1; f < fold; f++) {
        columns += channels * inner;
        if (inner == 1) {
            SIMD
            for (ptrdiff_t k = 0; k < channels; k++) out[k] += columns[k];
        } else {
            for (ptrdiff_t k = 0; k < channels; k++) out[k] += FN(lanes_sum)(columns + k * inner, inner);
        }
    }
}

#ifndef FASTNORM_DOUBLE /* once, and before its first use */
/* Add n values of mean mean_n and sum of squared deviations m2_n (Chan, Golub & LeVeque 1979, eq. 2.1). An infinite mean
   stays infinite, as a plain sum would; its deviations are NaN. */
FASTNORM_INLINE void bn_merge(double count, double n, double mean_n, double m2_n, double *mean, double *m2) {
    const double delta = mean_n - *mean;
    const int finite = delta - delta == 0;
    *m2 += m2_n + (finite ? delta * delta : NAN) * (count * n / (count + n));
    *mean += finite ? delta * (n / (count + n)) : mean_n;
}

/* Whether the mean of d lies more than two standard deviations from zero for any channel: d*d has lost digits. Not for
   NaN. */
static int bn_any_far(double n, const double *restrict sum, const double *restrict square, ptrdiff_t channels) {
    int far = 0;
    for (ptrdiff_t k = 0; k < channels; k++) far |= 5 * sum[k] * sum[k] > 4 * n * square[k];
    return far;
}
#endif

/* Merge a chunk of n values a channel, given its sums of d and d*d, to `count` values before; the means less the bases.
   Rounding does not make M2 negative; NaN stays. */
static void FN(bn_merge_chunk)(double count, double n, const real *restrict pivot, ptrdiff_t inner,
                               const double *restrict sum, const double *restrict square, ptrdiff_t channels,
                               const double *restrict base, double *restrict mean, double *restrict m2) {
    SIMD
    for (ptrdiff_t k = 0; k < channels; k++) {
        const double mean_d = sum[k] / n, deviations = square[k] - sum[k] * mean_d;
        const double mean_n = (pivot[k * inner] - base[k]) + mean_d, m2_n = deviations < 0 ? 0 : deviations;
        if (count == 0)
            mean[k] = mean_n, m2[k] = m2_n;
        else
            bn_merge(count, n, mean_n, m2_n, mean + k, m2 + k);
    }
}

/* Whether every channel's sums of d and d*d kept their digits: a float overflows beyond 1e19 squared, a double beyond
   1e154, and a float loses squares that are subnormal. NaN is not in range. Both sums are 0 where all data equal the
   pivot: 1. But below 2**-48 they may be 0 for data whose squares all vanish, which have to be looked at: 2. */
static int FN(bn_in_range)(const double *restrict sum, const double *restrict square, const real *restrict pivot,
                           ptrdiff_t inner, ptrdiff_t channels) {
    int all = 1, any_none = 0;
    for (ptrdiff_t k = 0; k < channels; k++) {
        if (sizeof(real) == 4) {
            const int none = (square[k] == 0) & (sum[k] == 0);
            all &= ((square[k] >= 1e-30) & (square[k] <= 3.4028234663852886e38)) | none;
            any_none |= none;
        } else
            all &= square[k] <= 1.7976931348623157e308;
    }
    for (ptrdiff_t k = 0; (all & any_none) && k < channels; k++)
        if (square[k] == 0 && pivot[k * inner] < 0x1p-48f && pivot[k * inner] > -0x1p-48f) return 2;
    return all;
}

/* Whether a channel without squares has a value in these rows that is not its pivot. */
static int FN(bn_squares_vanished)(const real *restrict x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t channels,
                                   ptrdiff_t inner, const real *restrict pivot, const double *restrict square) {
    int any = 0;
    for (ptrdiff_t r = 0; r < rows; r++, x += stride) {
        if (inner == 1)
            for (ptrdiff_t k = 0; k < channels; k++) any |= (x[k] != pivot[k]) & (square[k] == 0);
        else
            for (ptrdiff_t k = 0; k < channels; k++)
                if (square[k] == 0)
                    for (ptrdiff_t i = k * inner; i < (k + 1) * inner; i++) any |= x[i] != pivot[k * inner];
    }
    return any;
}

#ifndef FASTNORM_DOUBLE
/* Add n sums of dz and of dz * (x - mean) to those before. Returns 0, with nothing added, unless all are finite. */
static int bn_add_finite(const double *restrict a, const double *restrict b, ptrdiff_t n, double *restrict sum,
                         double *restrict product) {
    double zero = 0;
    _Pragma("omp simd reduction(+ : zero)")
    for (ptrdiff_t k = 0; k < n; k++) zero += (a[k] - a[k]) + (b[k] - b[k]);
    if (zero != 0) return 0;
    SIMD
    for (ptrdiff_t k = 0; k < n; k++) {
        sum[k] += a[k];
        product[k] += b[k];
    }
    return 1;
}
#endif

/* Sum of n squared deviations from the mean, in double. */
static double FN(bn_square_sum)(const real *restrict x, ptrdiff_t n, double mean) {
    double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) {
        SIMD
        for (int j = 0; j < 8; j++) lane[j] += (x[i + j] - mean) * (x[i + j] - mean);
    }
    for (int j = 0; i + j < n; j++) lane[j] += (x[i + j] - mean) * (x[i + j] - mean);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* Mean and M2 of each channel of `rows` rows in two passes in double: where `bn_in_range` says no. */
static void FN(bn_wide_moments)(const real *restrict x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t channels,
                                ptrdiff_t inner, double *restrict mean, double *restrict m2) {
    const double each = 1.0 / ((double)rows * (double)inner);
    memset(mean, 0, (size_t)channels * sizeof *mean);
    memset(m2, 0, (size_t)channels * sizeof *m2);
    for (ptrdiff_t r = 0; r < rows; r++) {
        if (inner == 1) {
            SIMD
            for (ptrdiff_t k = 0; k < channels; k++) mean[k] += x[r * stride + k];
        } else {
            for (ptrdiff_t k = 0; k < channels; k++) mean[k] += FN(lanes_sum)(x + r * stride + k * inner, inner);
        }
    }
    for (ptrdiff_t k = 0; k < channels; k++) mean[k] *= each;
    for (ptrdiff_t r = 0; r < rows; r++) {
        if (inner == 1) {
            SIMD
            for (ptrdiff_t k = 0; k < channels; k++)
                m2[k] += (x[r * stride + k] - mean[k]) * (x[r * stride + k] - mean[k]);
        } else {
            for (ptrdiff_t k = 0; k < channels; k++)
                m2[k] += FN(bn_square_sum)(x + r * stride + k * inner, inner, mean[k]);
        }
    }
    for (ptrdiff_t k = 0; k < channels; k++) m2[k] = mean[k] - mean[k] == 0 ? m2[k] : NAN;
}

/* running = (1 - momentum) * running + momentum * batch, batch times factor. */
static void FN(bn_update_running)(real *restrict running, const double *restrict batch, double factor, double momentum,
                                  ptrdiff_t channels) {
    SIMD
    for (ptrdiff_t c = 0; c < channels; c++)
        running[c] = (real)((1 - momentum) * running[c] + momentum * (batch[c] * factor));
}

/* The first four rows of the parameter table, and the wide table, for channels of mean base + offset and this variance. An
   infinite mean has no low part (inf - inf is NaN). */
FASTNORM_INLINE void FN(bn_parameters_loop)(const double *restrict base, const double *restrict offset,
                                            const double *restrict var, const real *restrict gamma,
                                            const real *restrict beta, double eps,
                                            ptrdiff_t channels, real *restrict p, ptrdiff_t ld, double *restrict wide,
                                            int with_gamma, int with_beta) {
    SIMD
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double mean = base[c] + offset[c];
        const real hi = (real)mean, lo = (real)((base[c] - hi) + offset[c]);
        const double inverse = 1 / sqrt(var[c] + eps), scale = with_gamma ? gamma[c] * inverse : inverse;
        wide[BN_INV_STD * ld + c] = inverse;
        wide[BN_WIDE_MEAN * ld + c] = mean;
        wide[BN_WIDE_SCALE * ld + c] = scale;
        p[BN_MEAN_HI * ld + c] = hi;
        p[BN_MEAN_LO * ld + c] = lo - lo == 0 ? lo : 0;
        p[BN_SCALE * ld + c] = (real)scale;
        p[BN_BETA * ld + c] = with_beta ? beta[c] : 0;
    }
}

static void FN(bn_parameters)(const double *base, const double *offset, const double *var, const real *gamma,
                              const real *beta, double eps, ptrdiff_t channels, real *p, ptrdiff_t ld, double *wide) {
    if (gamma && beta) FN(bn_parameters_loop)(base, offset, var, gamma, beta, eps, channels, p, ld, wide, 1, 1);
    else if (gamma) FN(bn_parameters_loop)(base, offset, var, gamma, beta, eps, channels, p, ld, wide, 1, 0);
    else if (beta) FN(bn_parameters_loop)(base, offset, var, gamma, beta, eps, channels, p, ld, wide, 0, 1);
    else FN(bn_parameters_loop)(base, offset, var, gamma, beta, eps, channels, p, ld, wide, 0, 0);
}

/* -- apply, reduce, gradient -- */

/* What forward computes before the activation, said once: backward recomputes its mask from the same bits. The mean is
   two numbers, because in float32 one is not enough for data far from zero. */
FASTNORM_INLINE real FN(bn_centered)(real x, real mean_hi, real mean_lo) { return (x - mean_hi) - mean_lo; }
#define BN_P(row, j) p[(row) * ld + (j) * step]
#define BN_NORMALIZED(centered, j) ((centered) * BN_P(BN_SCALE, j) + BN_P(BN_BETA, j))
#define BN_Z(centered, j, at) (with_residual ? BN_NORMALIZED(centered, j) + residual[at] : BN_NORMALIZED(centered, j))

FASTNORM_INLINE void FN(bn_apply_loop)(const real *x, const real *residual, real *y, ptrdiff_t n, const real *restrict p,
                                       ptrdiff_t ld, int step, real slope, int activation, int with_residual) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real centered = FN(bn_centered)(x[j], BN_P(BN_MEAN_HI, j), BN_P(BN_MEAN_LO, j));
        y[j] = FN(activate)(BN_Z(centered, j, j), activation, slope);
    }
}

/* sum[j] += dz and product[j] += dz * (x - mean), where dz = act'(z) * dy; a constant number of rows at a time. */
FASTNORM_INLINE void FN(bn_reduce_loop)(const real *dy, const real *x, const real *residual, int rows, ptrdiff_t stride,
                                        ptrdiff_t n, const real *restrict p, ptrdiff_t ld, int step, real slope,
                                        int activation, int with_residual, real *sum, real *product) {
    SIMD
    for (ptrdiff_t i = 0; i < n; i++) {
        real s = sum[i], q = product[i];
        for (int r = 0; r < rows; r++) {
            const ptrdiff_t at = r * stride + i;
            const real centered = FN(bn_centered)(x[at], BN_P(BN_MEAN_HI, i), BN_P(BN_MEAN_LO, i));
            const real dz = !activation ? dy[at] : FN(activate_gradient)(dy[at], BN_Z(centered, i, at), activation, slope);
            s += dz;
            q += dz * centered;
        }
        sum[i] = s;
        product[i] = q;
    }
}

/* dx = scale * (dz - dz_mean - (x - mean) * slope_x), or scale * dz with frozen statistics; dresidual = dz. */
FASTNORM_INLINE void FN(bn_gradient_loop)(const real *dy, const real *x, const real *residual, real *dx, real *dresidual,
                                          ptrdiff_t n, const real *restrict p, ptrdiff_t ld, int step, real slope,
                                          int frozen, int activation, int with_residual) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real centered = FN(bn_centered)(x[j], BN_P(BN_MEAN_HI, j), BN_P(BN_MEAN_LO, j));
        const real dz = !activation ? dy[j] : FN(activate_gradient)(dy[j], BN_Z(centered, j, j), activation, slope);
        dx[j] = BN_P(BN_SCALE, j) * (frozen ? dz : (dz - BN_P(BN_DZ_MEAN, j)) - centered * BN_P(BN_SLOPE_X, j));
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

/* `ahead` as in bn_stats_rows. */
FASTNORM_INLINE void FN(bn_reduce_rows)(const real *dy, const real *x, const real *residual, ptrdiff_t rows,
                                        ptrdiff_t stride, ptrdiff_t n, const real *p, ptrdiff_t ld, real slope,
                                        int activation, int with_residual, int ahead, real *sum, real *product) {
    const int at_once = REDUCE_ROWS;
    const ptrdiff_t strip = ahead ? LANES : n;
    ptrdiff_t r = 0;
    for (; r + at_once <= rows; r += at_once) {
        for (ptrdiff_t j = 0; j < n; j += strip) {
            const ptrdiff_t at = r * stride + j, next = at + at_once * stride;
            if (ahead) {
                FN(fetch_rows)(x + next, at_once, stride);
                FN(fetch_rows)(dy + next, at_once, stride);
                if (with_residual) FN(fetch_rows)(residual + next, at_once, stride);
            }
            FN(bn_reduce_loop)(dy + at, x + at, with_residual ? residual + at : NULL, at_once, stride,
                               n - j < strip ? n - j : strip, p + j, ld, 1, slope, activation, with_residual, sum + j,
                               product + j);
        }
    }
    for (; r < rows; r++)
        FN(bn_reduce_loop)(dy + r * stride, x + r * stride, with_residual ? residual + r * stride : NULL, 1, stride, n, p,
                           ld, 1, slope, activation, with_residual, sum, product);
}

/* Where rows follow one another, each row of the table repeats a line's values behind the last column. */
FASTNORM_INLINE void FN(bn_reduce_columns_loop)(const real *dy, const real *x, const real *residual, ptrdiff_t rows,
                                                ptrdiff_t stride, ptrdiff_t n, const real *p, ptrdiff_t ld, real slope,
                                                int activation, int with_residual, int ahead, real *sum,
                                                real *product) {
    const ptrdiff_t h = FN(before_line)(x), last = h + (rows - 1) * n;
    if (stride != n || rows < 2 * REDUCE_ROWS || h == 0 || h > n) {
        FN(bn_reduce_rows)(dy, x, residual, rows, stride, n, p, ld, slope, activation, with_residual, ahead, sum, product);
        return;
    }
    FN(bn_reduce_loop)(dy, x, residual, 1, 0, h, p, ld, 1, slope, activation, with_residual, sum, product);
    FN(rotate)(sum, n, h);
    FN(rotate)(product, n, h);
    FN(bn_reduce_rows)(dy + h, x + h, with_residual ? residual + h : NULL, rows - 1, n, n, p + h, ld, slope, activation,
                       with_residual, ahead, sum, product);
    FN(bn_reduce_loop)(dy + last, x + last, with_residual ? residual + last : NULL, 1, 0, n - h, p + h, ld, 1, slope,
                       activation, with_residual, sum, product);
    FN(rotate_back)(sum, n, h);
    FN(rotate_back)(product, n, h);
}

/* apply and gradient for whole channels of `inner` values each, side by side: IN x and dy, OUT buffers that nothing else
   may overlap. All but the last channel are computed in whole vectors, whose surplus reads from the next channel and is
   overwritten by it: no tails, and no table as wide as the row. */
#define BN_VECTOR 16
#define BN_EACH_CHANNEL(LOOP) \
    for (ptrdiff_t k = 0; k < channels; k++) { \
        real own[BN_ROWS]; /* of one channel: stays in registers */ \
        for (int row = 0; row < BN_ROWS; row++) own[row] = row < rows ? p[row * ld + k] : 0; \
        const ptrdiff_t at = k * inner; \
        if (k + 1 < channels) \
            for (ptrdiff_t j = at; j < at + inner; j += BN_VECTOR) LOOP(j, BN_VECTOR); \
        else \
            LOOP(at, inner); \
    }

FASTNORM_INLINE void FN(bn_apply_channels_loop)(const real *x, const real *residual, real *y, ptrdiff_t channels,
                                                ptrdiff_t inner, const real *p, ptrdiff_t ld, real slope,
                                                int activation, int with_residual) {
    const int rows = BN_BETA + 1;
#define BN_ONE(j, n) FN(bn_apply_loop)(x + (j), with_residual ? residual + (j) : NULL, y + (j), n, own, 1, 0, slope, \
                                       activation, with_residual)
    BN_EACH_CHANNEL(BN_ONE)
#undef BN_ONE
}

static void FN(bn_apply_channels)(const real *x, const real *residual, real *y, ptrdiff_t channels, ptrdiff_t inner,
                                  const real *p, ptrdiff_t ld, real slope, int activation) {
#define EACH(A, R) FN(bn_apply_channels_loop)(x, residual, y, channels, inner, p, ld, slope, A, R)
    BN_DISPATCH(EACH)
#undef EACH
}

FASTNORM_INLINE void FN(bn_gradient_channels_loop)(const real *dy, const real *x, const real *residual, real *dx,
                                                   real *dresidual, ptrdiff_t channels, ptrdiff_t inner, const real *p,
                                                   ptrdiff_t ld, real slope, int frozen, int activation,
                                                   int with_residual) {
    const int rows = BN_ROWS;
#define BN_ONE(j, n) FN(bn_gradient_loop)(dy + (j), x + (j), with_residual ? residual + (j) : NULL, dx + (j), \
                                          with_residual ? dresidual + (j) : NULL, n, own, 1, 0, slope, frozen, \
                                          activation, with_residual)
    BN_EACH_CHANNEL(BN_ONE)
#undef BN_ONE
}

static void FN(bn_gradient_channels)(const real *dy, const real *x, const real *residual, real *dx, real *dresidual,
                                     ptrdiff_t channels, ptrdiff_t inner, const real *p, ptrdiff_t ld, real slope,
                                     int activation, int frozen) {
#define EACH(A, R) FN(bn_gradient_channels_loop)(dy, x, residual, dx, dresidual, channels, inner, p, ld, slope, 0, A, R)
#define EACH_FROZEN(A, R) FN(bn_gradient_channels_loop)(dy, x, residual, dx, dresidual, channels, inner, p, ld, slope, 1, \
                                                        A, R)
    if (frozen) BN_DISPATCH(EACH_FROZEN) else BN_DISPATCH(EACH)
#undef EACH
#undef EACH_FROZEN
}

static void FN(bn_reduce_columns)(const real *dy, const real *x, const real *residual, ptrdiff_t rows, ptrdiff_t stride,
                                  ptrdiff_t n, const real *p, ptrdiff_t ld, real slope, int activation, int ahead,
                                  real *restrict sum, real *restrict product) {
#define EACH(A, R) FN(bn_reduce_columns_loop)(dy, x, residual, rows, stride, n, p, ld, slope, A, R, ahead, sum, product)
    BN_DISPATCH(EACH)
#undef EACH
}

FASTNORM_INLINE void FN(bn_reduce_run_loop)(const real *dy, const real *x, const real *residual, ptrdiff_t n,
                                            const real *restrict p, ptrdiff_t ld, real slope, int activation,
                                            int with_residual, Ahead ahead, real *restrict sum,
                                            real *restrict product) {
    const ptrdiff_t h = n < RUN_ALIGNED ? 0 : FN(before_line)(x);
    real s[LANES], q[LANES];
    FN(bn_reduce_loop)(dy, x, residual, 1, 0, h, p, ld, 0, slope, activation, with_residual, sum, product);
    FN(rotate_lanes)(sum, h, s);
    FN(rotate_lanes)(product, h, q);
    ptrdiff_t i = h;
    for (; i + LANES <= n; i += LANES) {
        const ptrdiff_t at = i * (ptrdiff_t)sizeof(real), n_bytes = LANES * sizeof(real);
        fetch_ahead(x, at, n_bytes, ahead);
        fetch_ahead(dy, at, n_bytes, ahead);
        if (with_residual) fetch_ahead(residual, at, n_bytes, ahead);
        FN(bn_reduce_loop)(dy + i, x + i, with_residual ? residual + i : NULL, 1, 0, LANES, p, ld, 0, slope,
                           activation, with_residual, s, q);
    }
    FN(bn_reduce_loop)(dy + i, x + i, with_residual ? residual + i : NULL, 1, 0, n - i, p, ld, 0, slope, activation,
                       with_residual, s, q);
    FN(rotate_lanes)(s, LANES - h, sum);
    FN(rotate_lanes)(q, LANES - h, product);
}

/* The same over one channel's run, onto LANES partial sums. */
static void FN(bn_reduce_run)(const real *dy, const real *x, const real *residual, ptrdiff_t n, const real *p,
                              ptrdiff_t ld, real slope, int activation, Ahead ahead, real *restrict sum,
                              real *restrict product) {
#define ONE(A, R) FN(bn_reduce_run_loop)(dy, x, residual, n, p, ld, slope, A, R, ahead, sum, product)
    BN_DISPATCH(ONE)
#undef ONE
}

/* dgamma, dbeta and the last two rows of the parameter table, from a tile's sums over n values a channel. */
static void FN(bn_finish_reduction)(const double *restrict sum, const double *restrict product,
                                    const double *restrict inv_std, double n, ptrdiff_t channels, real *restrict dgamma,
                                    real *restrict dbeta, real *restrict p, ptrdiff_t ld) {
    const double each = 1 / n;
    SIMD
    for (ptrdiff_t c = 0; c < channels; c++) {
        dbeta[c] = (real)sum[c];
        dgamma[c] = (real)(product[c] * inv_std[c]);
        p[BN_DZ_MEAN * ld + c] = (real)(sum[c] * each);
        p[BN_SLOPE_X * ld + c] = (real)(product[c] * each * inv_std[c] * inv_std[c]);
    }
}

/* -- channels beyond the range of the loops above --

   A loop overflows on its way to a finite result, or loses digits, where a mean, 1 / std, gamma / std or beta is very
   large or, but for 0, very small: x - mean beyond 3.4e38, a std of 1e-40, gamma = 1e30 over a small std. Tiles with such
   a channel (no other ones: this is known from the parameters alone) go through what follows: the twin's formulas in
   double. The other channels of such a tile take their masks from the same bits as everywhere. */

#ifdef FASTNORM_DOUBLE
#define BN_RANGE 8.452712498170644e270 /* 2**900 */
#else
#define BN_RANGE 1.2676506002282294e30 /* 2**100 */
#endif
/* Below 2**-100 a float mean has no place for its low part, an error of 2**-150: of y, 2**-130 at most with this scale. */
#define BN_SMALL_SCALE (sizeof(real) == 4 ? 1048576 : INFINITY)
#define BN_IN_RANGE(value) ((fabs(value) <= BN_RANGE) & (fabs(value) >= 1 / BN_RANGE)) /* not for NaN */
#define BN_ORDINARY 1048576 /* sums of sizes stay below it, and scales and 1 / std above its inverse */

/* Whether all these channels can go through the loops above: ordinary ones by one look, others by their own. */
static int FN(bn_plain)(const real *restrict p, const double *restrict wide, ptrdiff_t ld, ptrdiff_t channels) {
    real sizes = 0;
    double inverses = 0;
    _Pragma("omp simd reduction(+ : sizes)")
    for (ptrdiff_t c = 0; c < channels; c++) {
        const real scale = FN(absolute)(p[BN_SCALE * ld + c]);
        sizes += (FN(absolute)(p[BN_MEAN_HI * ld + c]) + FN(absolute)(p[BN_BETA * ld + c]))
                 + (scale >= (real)1 / BN_ORDINARY ? scale : BN_ORDINARY);
    }
    _Pragma("omp simd reduction(+ : inverses)")
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double inverse = wide[BN_INV_STD * ld + c];
        inverses += inverse >= 1.0 / BN_ORDINARY ? inverse : BN_ORDINARY;
    }
    if (sizes < BN_ORDINARY && inverses < BN_ORDINARY) return 1;
    int all = 1;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double mean = wide[BN_WIDE_MEAN * ld + c], scale = wide[BN_WIDE_SCALE * ld + c];
        all &= (BN_IN_RANGE(mean) | (mean == 0) | ((fabs(mean) < 1) & (fabs(scale) <= BN_SMALL_SCALE)))
               & (BN_IN_RANGE(scale) | (scale == 0)) & BN_IN_RANGE(wide[BN_INV_STD * ld + c])
               & (fabs((double)p[BN_BETA * ld + c]) <= BN_RANGE);
    }
    return all;
}

/* The same for what the gradient needs besides: the table's last rows. */
static int FN(bn_plain_gradient)(const real *restrict p, ptrdiff_t ld, ptrdiff_t channels) {
    int all = 1;
    _Pragma("omp simd reduction(& : all)")
    for (ptrdiff_t c = 0; c < channels; c++)
        all &= FN(absolute)(p[BN_DZ_MEAN * ld + c]) + FN(absolute)(p[BN_SLOPE_X * ld + c]) <= (real)BN_RANGE;
    return all;
}

/* What follows works on a run of one channel; p and wide point at its column of the tables. The pre-activation's bits: */
FASTNORM_INLINE real FN(bn_careful_z)(real x, const real *residual, const real *p, const double *wide, ptrdiff_t ld,
                                      int plain) {
    if (plain) {
        const real z = FN(bn_centered)(x, p[BN_MEAN_HI * ld], p[BN_MEAN_LO * ld]) * p[BN_SCALE * ld] + p[BN_BETA * ld];
        return residual ? z + *residual : z;
    }
    const double z = (x - wide[BN_WIDE_MEAN * ld]) * wide[BN_WIDE_SCALE * ld] + p[BN_BETA * ld];
    return (real)(residual ? z + *residual : z);
}

static void FN(bn_careful_apply)(const real *x, const real *residual, real *y, ptrdiff_t n, const real *p,
                                 const double *wide, ptrdiff_t ld, real slope, int activation) {
    const int plain = FN(bn_plain)(p, wide, ld, 1);
    for (ptrdiff_t j = 0; j < n; j++)
        y[j] = FN(activate)(FN(bn_careful_z)(x[j], residual ? residual + j : NULL, p, wide, ld, plain), activation, slope);
}

/* sum += dz and product += dz * (x - mean). */
static void FN(bn_careful_reduce)(const real *dy, const real *x, const real *residual, ptrdiff_t n, const real *p,
                                  const double *wide, ptrdiff_t ld, real slope, int activation, double *sum,
                                  double *product) {
    const int plain = FN(bn_plain)(p, wide, ld, 1);
    for (ptrdiff_t j = 0; j < n; j++) {
        const real z = FN(bn_careful_z)(x[j], residual ? residual + j : NULL, p, wide, ld, plain);
        const double dz = FN(activate_gradient)(dy[j], z, activation, slope);
        *sum += dz;
        *product += dz * (x[j] - wide[BN_WIDE_MEAN * ld]);
    }
}

/* dx and dresidual, from the sums over `count` values. */
static void FN(bn_careful_gradient)(const real *dy, const real *x, const real *residual, real *dx, real *dresidual,
                                    ptrdiff_t n, const real *p, const double *wide, ptrdiff_t ld, real slope,
                                    int activation, int frozen, double sum, double product, double count) {
    const int plain = FN(bn_plain)(p, wide, ld, 1);
    const double dz_mean = sum / count, xhat_mean = product * wide[BN_INV_STD * ld] / count;
    for (ptrdiff_t j = 0; j < n; j++) {
        const real z = FN(bn_careful_z)(x[j], residual ? residual + j : NULL, p, wide, ld, plain);
        const real dz = FN(activate_gradient)(dy[j], z, activation, slope);
        const double xhat = (x[j] - wide[BN_WIDE_MEAN * ld]) * wide[BN_INV_STD * ld];
        dx[j] = (real)(wide[BN_WIDE_SCALE * ld] * (frozen ? dz : dz - dz_mean - xhat * xhat_mean));
        if (dresidual) dresidual[j] = dz;
    }
}

#undef BN_RANGE
#undef BN_SMALL_SCALE
#undef BN_IN_RANGE
#undef BN_ORDINARY

#undef BN_VECTOR
#undef BN_EACH_CHANNEL
#undef BN_P
#undef BN_NORMALIZED
#undef BN_Z
#undef BN_DISPATCH
