/* Inner loops of softmax.pyx, for float and double: a part of vector.h's template. */

/* Design:
   - e**(x - m) for a row's maximum m, without the rounding of x - m, which at x - m = -80 alone would cost 32 ulp: both
     numbers are reduced by multiples of ln 2 that differ by the integer n, and what remains is subtracted. It is exact
     at x = m: e**0 = 1, so equal logits give equal probabilities and one class gives 1.
   - The exponentials carry a factor SOFTMAX_UNIT, so that none is subnormal (slow) before it is scaled by 1 / sum, and
     the scaling rounds once. Below half the smallest subnormal they are 0.
   - What depends on m alone is the frame: five numbers, computed once a row; in the lanes form, five rows of lanes.
   - `step` as in batch norm: 0, one number for the run; 1, one a lane.
   - `careful`: whether subnormal numbers are likely, among the logits or the results. The same bits; only the time
     differs, where a processor is slow with them (met_subnormals). */

#ifdef FASTNORM_DOUBLE
#define SOFTMAX_BIAS 1076     /* the exponent field of e**0; n = -1076 gives the field 0, which is the number 0 */
#define SOFTMAX_FAR 2048.0    /* above it x - m is exact (Sterbenz) wherever e**(x - m) is not 0 */
#define SOFTMAX_LOWEST 745.86 /* 1076.05 ln 2 */
#define SOFTMAX_UNIT 9007199254740992.0 /* 2**53 */
#define SOFTMAX_RAISE 0x1p900           /* times an exponential and its factor no subnormal, and no overflow */
#define SOFTMAX_NORMAL 0x1p-69          /* DBL_MIN, times unit and raise */
#define SOFTMAX_LEAST 0x1p121           /* raised in the unit, to multiples of the least number, 2**-1074 */
#else
#define SOFTMAX_BIAS 151
#define SOFTMAX_FAR 256.0f
#define SOFTMAX_LOWEST 104.7f /* 151.05 ln 2 */
#define SOFTMAX_UNIT 16777216.0 /* 2**24 */
#define SOFTMAX_RAISE 0x1p100f
#define SOFTMAX_NORMAL 0x1p-2f
#define SOFTMAX_LEAST 0x1p25f
#endif
#define SOFTMAX_LOG2E ((real)1.4426950408889634)
#define SOFTMAX_CHUNK 1024 /* elements summed in `real` before the sum goes on in double: 16 a lane */

FASTNORM_INLINE real FN(without_subnormal)(real x) { return FN(unless)(FN(absolute)(x) < FN(least_normal), x); }

/* m, infinite or NaN, gives a frame in which every e**(x - m) is NaN. */
FASTNORM_INLINE void FN(softmax_frame)(real m, real *shift, real *top, real *bottom, real *magic, real *residue) {
    const real s = m > SOFTMAX_FAR || m < -SOFTMAX_FAR ? m : 0;
    const real t = FN(without_subnormal)(m - s);
    const real n = (t * SOFTMAX_LOG2E + EXP_MAGIC) - EXP_MAGIC;
    *shift = s;
    *top = t;
    *bottom = t - SOFTMAX_LOWEST;
    *magic = EXP_MAGIC + SOFTMAX_BIAS - n;
    *residue = FN(muladd)(n, -EXP_LN2_HI, t);
}

/* SOFTMAX_UNIT * e**(x - m), x <= m; NaN gives NaN, -inf gives 0. At most 1.3 ulp (measured; 1.1 with fused
   multiply-add). */
FASTNORM_INLINE real FN(exp_in_frame)(real x, real shift, real top, real bottom, real magic, real residue) {
    real y = x - shift;
    y = y < bottom ? bottom : y; /* written so that NaN passes */
    const real shifted = FN(muladd)(y - top, SOFTMAX_LOG2E, EXP_MAGIC + SOFTMAX_BIAS);
    const real n = shifted - (EXP_MAGIC + SOFTMAX_BIAS);                   /* of x - m */
    real r = FN(muladd)(shifted - magic, -EXP_LN2_HI, y) - residue;        /* y and m less their multiples, exact */
    r = FN(muladd)(n, -EXP_LN2_LO, r);
    uint_of_real bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= EXP_SHIFT;
    real power;
    memcpy(&power, &bits, sizeof power);
    return FN(exp_polynomial)(r) * power;
}

/* SOFTMAX_UNIT * e**x for x <= 0, without what the other half of the range needs. At most 1.2 ulp; NaN gives NaN. */
FASTNORM_INLINE real FN(exp_in_units)(real x) {
    return FN(exp_in_frame)(x, 0, 0, -SOFTMAX_LOWEST, EXP_MAGIC + SOFTMAX_BIAS, 0);
}

/* Largest of n values, NaN left out; -inf of none. */
static real FN(softmax_max)(const real *restrict x, ptrdiff_t n) {
    real m[LANES];
    for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        SIMD
        for (int j = 0; j < LANES; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    }
    SIMD
    for (int j = 0; j < n - i; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (int width = LANES / 2; width; width /= 2) {
        SIMD
        for (int j = 0; j < width; j++) m[j] = m[j + width] > m[j] ? m[j + width] : m[j];
    }
    return m[0];
}

/* While the processor computes, memory fetches what lies `ahead`: the next row (15 to 12.5 ms at (2048,32000)). */
FASTNORM_INLINE double FN(softmax_exp_loop)(const real *restrict x, real *restrict e, ptrdiff_t n, real m,
                                            ptrdiff_t ahead, int keep, int careful) {
    real shift, top, bottom, magic, residue;
    FN(softmax_frame)(m, &shift, &top, &bottom, &magic, &residue);
    double total = 0;
    for (ptrdiff_t start = 0; start < n; start += SOFTMAX_CHUNK) {
        const ptrdiff_t end = n - start < SOFTMAX_CHUNK ? n : start + SOFTMAX_CHUNK;
        real sum[LANES];
        memset(sum, 0, sizeof sum);
        ptrdiff_t i = start;
        for (; i + LANES <= end; i += LANES) {
            for (int j = 0; j < LANES; j += 64 / (int)sizeof(real)) PREFETCH(x + ahead + i + j);
            SIMD
            for (int j = 0; j < LANES; j++) {
                const real logit = careful ? FN(without_subnormal)(x[i + j]) : x[i + j];
                const real v = FN(exp_in_frame)(logit, shift, top, bottom, magic, residue);
                if (keep) e[i + j] = v;
                sum[j] += v;
            }
        }
        SIMD
        for (int j = 0; j < end - i; j++) {
            const real logit = careful ? FN(without_subnormal)(x[i + j]) : x[i + j];
            const real v = FN(exp_in_frame)(logit, shift, top, bottom, magic, residue);
            if (keep) e[i + j] = v;
            sum[j] += v;
        }
        total += FN(lanes_sum)(sum, LANES);
    }
    return total / SOFTMAX_UNIT;
}

/* Sum of e**(x - m) over a row; e, where there is one, takes SOFTMAX_UNIT times the terms. */
static double FN(softmax_exp)(const real *x, real *e, ptrdiff_t n, real m, ptrdiff_t ahead, int careful) {
    if (careful) return FN(softmax_exp_loop)(x, e, n, m, ahead, e != NULL, 1);
    return e ? FN(softmax_exp_loop)(x, e, n, m, ahead, 1, 0) : FN(softmax_exp_loop)(x, e, n, m, ahead, 0, 0);
}

/* The same sum of terms already there, in double. */
static double FN(softmax_sum)(const real *e, ptrdiff_t n) { return FN(lanes_sum)(e, n) / SOFTMAX_UNIT; }

/* (e * factor) * power for power = 1 / SOFTMAX_UNIT, |factor| <= 1. A subnormal result is put together as an integer. */
FASTNORM_INLINE real FN(softmax_tiny_or_not)(real e, real factor, real power) {
    const real raised = e * SOFTMAX_RAISE * factor, size = FN(absolute)(raised);
    const int tiny = size < SOFTMAX_NORMAL;
    const real normal = FN(unless)(tiny, e) * factor * power;
    const real two = (real)((uint_of_real)1 << EXP_SHIFT), shifted = FN(unless)(!tiny, size) * SOFTMAX_LEAST + two;
    uint_of_real bits, two_bits, sign;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&two_bits, &two, sizeof bits);
    memcpy(&sign, &raised, sizeof bits);
    bits = (bits - two_bits) | (sign & (uint_of_real)1 << (8 * sizeof(real) - 1));
    real subnormal;
    memcpy(&subnormal, &bits, sizeof bits);
    return FN(choose)(tiny, subnormal, normal);
}

/* out = unit_e * scale / unit - mass, where mass_c = (t_c a + b) w_c. scale comes as two factors, one of them a power of
   two (see softmax_factors). */
FASTNORM_INLINE void FN(softmax_output_loop)(const real *e, const real *t, const real *w, real *out, ptrdiff_t n,
                                             const real *restrict factor, const real *restrict power, real a, real b,
                                             int step, int with_t, int with_w, int with_b, int careful) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real p = careful ? FN(softmax_tiny_or_not)(e[j], factor[j * step], power[j * step])
                               : (e[j] * factor[j * step]) * power[j * step];
        if (with_t || with_b) {
            const real mass = with_t ? t[j] * a + b : b;
            out[j] = p - (with_w ? mass * w[j] : mass);
        } else {
            out[j] = p;
        }
    }
}

FASTNORM_INLINE void FN(softmax_output_forms)(const real *e, const real *t, const real *w, real *out, ptrdiff_t n,
                                              const real *factor, const real *power, real a, real b, int step,
                                              int careful) {
#define SOFTMAX_CALL(S, T, W, B) FN(softmax_output_loop)(e, t, w, out, n, factor, power, a, b, S, T, W, B, careful)
    if (step) {
        if (t) SOFTMAX_CALL(1, 1, 0, 1);
        else if (b != 0) SOFTMAX_CALL(1, 0, 0, 1);
        else SOFTMAX_CALL(1, 0, 0, 0);
    } else if (t) {
        if (w) SOFTMAX_CALL(0, 1, 1, 1); else SOFTMAX_CALL(0, 1, 0, 1);
    } else if (b != 0) {
        if (w) SOFTMAX_CALL(0, 0, 1, 1); else SOFTMAX_CALL(0, 0, 0, 1);
    } else {
        SOFTMAX_CALL(0, 0, 0, 0);
    }
#undef SOFTMAX_CALL
}

static void FN(softmax_output)(const real *e, const real *t, const real *w, real *out, ptrdiff_t n, const real *factor,
                               const real *power, real a, real b, int step, int careful) {
    for (ptrdiff_t j = 0; careful && j < (step ? n : 1); j++) careful = power[j] == (real)(1 / SOFTMAX_UNIT);
    if (careful) FN(softmax_output_forms)(e, t, w, out, n, factor, power, a, b, step, 1);
    else FN(softmax_output_forms)(e, t, w, out, n, factor, power, a, b, step, 0);
}

/* The two factors of scale / SOFTMAX_UNIT whose product with an exponential overflows or underflows only if the result
   does. */
FASTNORM_INLINE void FN(softmax_factors)(double scale, real *factor, real *power) {
    const int small = scale <= 1 && scale >= -1;
    *factor = (real)(small ? scale : scale / SOFTMAX_UNIT);
    *power = (real)(small ? 1 / SOFTMAX_UNIT : 1);
}

/* out = (x - m) - log_sum. */
static void FN(log_softmax_output)(const real *x, real *out, ptrdiff_t n, const real *restrict m,
                                   const real *restrict log_sum, int step) {
    if (step) {
        SIMD
        for (ptrdiff_t j = 0; j < n; j++) out[j] = (x[j] - m[j]) - log_sum[j];
    } else {
        SIMD
        for (ptrdiff_t j = 0; j < n; j++) out[j] = (x[j] - *m) - *log_sum;
    }
}

/* One class's part of a row's target mass and of sum(q_c (m - x_c)); 0 * inf counts as 0. In double, because m - x_c may
   be beyond a float. */
#define SOFTMAX_DOT(MASS, DOT, M) { \
    const double base = with_t ? t[j] * a + b : b; \
    const double q = with_w ? base * w[j] : base; \
    const double term = q * ((double)(M) - (double)x[j]); \
    if (with_t) MASS += q; \
    DOT += q == 0 ? 0 : term; }

FASTNORM_INLINE void FN(softmax_dot_loop)(const real *restrict x, const real *restrict t, const real *restrict w,
                                          ptrdiff_t n, real m, double a, double b, double *mass, double *dot,
                                          int with_t, int with_w) {
    double masses[16], dots[16];
    memset(masses, 0, sizeof masses);
    memset(dots, 0, sizeof dots);
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16) {
        SIMD
        for (int j = 0; j < 16; j++) SOFTMAX_DOT(masses[j], dots[j], m)
        x += 16;
        t = with_t ? t + 16 : t;
        w = with_w ? w + 16 : w;
    }
    for (int j = 0; j < n - i; j++) SOFTMAX_DOT(masses[j], dots[j], m)
    for (int width = 8; width; width /= 2) {
        SIMD
        for (int j = 0; j < width; j++) {
            masses[j] += masses[j + width];
            dots[j] += dots[j + width];
        }
    }
    *mass += masses[0];
    *dot += dots[0];
}

/* Of a row: mass += sum(q_c) if there is a t (else it is the same for all rows), dot += sum(q_c (m - x_c)), where
   q_c = (t_c a + b) w_c; t and w may be NULL. */
static void FN(softmax_dot)(const real *x, const real *t, const real *w, ptrdiff_t n, real m, double a, double b,
                            double *mass, double *dot) {
    if (t) {
        if (w) FN(softmax_dot_loop)(x, t, w, n, m, a, b, mass, dot, 1, 1);
        else FN(softmax_dot_loop)(x, t, w, n, m, a, b, mass, dot, 1, 0);
    } else {
        if (w) FN(softmax_dot_loop)(x, t, w, n, m, a, b, mass, dot, 0, 1);
        else FN(softmax_dot_loop)(x, t, w, n, m, a, b, mass, dot, 0, 0);
    }
}

/* The lanes form: each function is given one class of n positions. */

/* to[j * to_step + i] = from[i * from_step + j]: positions to lanes and back. In squares of 4 x 4, the last ones over some of
   their neighbors again: element by element it was 45 % of the time at (4096,10). */
#ifdef SHUFFLE
FASTNORM_INLINE void FN(transpose_square)(const real *from, ptrdiff_t from_step, real *to, ptrdiff_t to_step) {
    typedef real Four __attribute__((vector_size(4 * sizeof(real))));
    Four row[4], pair[4], column[4];
    for (int i = 0; i < 4; i++) memcpy(&row[i], from + i * from_step, sizeof row[i]);
    for (int i = 0; i < 2; i++) { /* rows i and i + 2, side by side */
        pair[i] = SHUFFLE(row[i], row[i + 2], 0, 4, 1, 5);
        pair[i + 2] = SHUFFLE(row[i], row[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; i += 2) {
        column[i] = SHUFFLE(pair[i], pair[i + 1], 0, 4, 1, 5);
        column[i + 1] = SHUFFLE(pair[i], pair[i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 4; i++) memcpy(to + i * to_step, &column[i], sizeof column[i]);
}
#endif

static void FN(lanes_transpose)(const real *restrict from, ptrdiff_t from_step, real *restrict to, ptrdiff_t to_step,
                                ptrdiff_t rows, ptrdiff_t columns) {
#ifdef SHUFFLE
    if (rows >= 4 && columns >= 4) {
        for (ptrdiff_t j = 0; j < columns; j += 4) {
            if (j > columns - 4) j = columns - 4;
            for (ptrdiff_t i = 0; i < rows; i += 4) {
                if (i > rows - 4) i = rows - 4;
                FN(transpose_square)(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
            }
        }
        return;
    }
#endif
    for (ptrdiff_t j = 0; j < columns; j++)
        for (ptrdiff_t i = 0; i < rows; i++) to[j * to_step + i] = from[i * from_step + j];
}

static void FN(lanes_max)(const real *restrict x, real *restrict m, ptrdiff_t n) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) m[j] = x[j] > m[j] ? x[j] : m[j];
}

/* The frame of lane j is frame[j], frame[width + j], ... */
static void FN(lanes_frame)(const real *restrict m, real *restrict frame, ptrdiff_t width, ptrdiff_t n) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++)
        FN(softmax_frame)(m[j], frame + j, frame + width + j, frame + 2 * width + j, frame + 3 * width + j,
                          frame + 4 * width + j);
}

/* e takes SOFTMAX_UNIT * e**(x - m), and total[j] += e**(x - m). e may be x. */
FASTNORM_INLINE void FN(lanes_exp_loop)(const real *x, real *e, const real *restrict frame, ptrdiff_t width,
                                        double *restrict total, ptrdiff_t n, int careful) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real logit = careful ? FN(without_subnormal)(x[j]) : x[j];
        e[j] = FN(exp_in_frame)(logit, frame[j], frame[width + j], frame[2 * width + j], frame[3 * width + j],
                                frame[4 * width + j]);
        total[j] += e[j] * (1 / SOFTMAX_UNIT);
    }
}
static void FN(lanes_exp)(const real *x, real *e, const real *restrict frame, ptrdiff_t width, double *restrict total,
                          ptrdiff_t n, int careful) {
    if (careful) FN(lanes_exp_loop)(x, e, frame, width, total, n, 1);
    else FN(lanes_exp_loop)(x, e, frame, width, total, n, 0);
}

FASTNORM_INLINE void FN(lanes_dot_loop)(const real *restrict x, const real *restrict t, ptrdiff_t n,
                                        const real *restrict m, double a, double b, double *restrict mass,
                                        double *restrict dot, int with_t) {
    const real *w = NULL;
    const int with_w = 0;
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) SOFTMAX_DOT(mass[j], dot[j], m[j])
}

/* mass[j] += q if there is a t, dot[j] += q (m[j] - x[j]), where q = t[j] a + b; t may be NULL. */
static void FN(lanes_dot)(const real *x, const real *t, ptrdiff_t n, const real *m, double a, double b, double *mass,
                          double *dot) {
    if (t) FN(lanes_dot_loop)(x, t, n, m, a, b, mass, dot, 1);
    else FN(lanes_dot_loop)(x, t, n, m, a, b, mass, dot, 0);
}

#ifdef FASTNORM_DOUBLE
/* log x for x >= sqrt(1/2), which the sum of a row's exponentials is; NaN gives NaN. Without branches, so that loops
   around it vectorize. Reduction and polynomial of fdlibm's e_log.c (Sun Microsystems, 1993); at most 1 ulp. */
FASTNORM_INLINE double log_of_sum(double x) {
    const uint64_t root_half = 0x3fe6a09e667f3bcdULL, two_52 = 0x4330000000000000ULL;
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t exponent = (bits - root_half) >> 52;
    const uint64_t mantissa = bits - (exponent << 52), exponent_bits = two_52 | exponent;
    double k, f;
    memcpy(&k, &exponent_bits, sizeof k);
    memcpy(&f, &mantissa, sizeof f);
    k -= 4503599627370496.0;
    f -= 1.0;
    const double s = f / (2.0 + f), z = s * s, half_square = 0.5 * f * f;
    double p = 1.479819860511658591e-01;
    p = p * z + 1.531383769920937332e-01;
    p = p * z + 1.818357216161805012e-01;
    p = p * z + 2.222219843214978396e-01;
    p = p * z + 2.857142874366239149e-01;
    p = p * z + 3.999999999940941908e-01;
    p = p * z + 6.666666666666735130e-01;
    const double correction = s * (half_square + p * z) + k * 1.90821492927058770002e-10;
    return k * 6.93147180369123816490e-01 - ((half_square - correction) - f) + (x - x); /* x - x: NaN stays NaN */
}

static void lanes_log(const double *restrict x, double *restrict out, ptrdiff_t n) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) out[j] = log_of_sum(x[j]);
}
#endif

#undef SOFTMAX_BIAS
#undef SOFTMAX_FAR
#undef SOFTMAX_LOWEST
#undef SOFTMAX_LOG2E
#undef SOFTMAX_CHUNK
#undef SOFTMAX_DOT
#undef SOFTMAX_RAISE
#undef SOFTMAX_NORMAL
#undef SOFTMAX_LEAST
