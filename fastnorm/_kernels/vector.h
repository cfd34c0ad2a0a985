/* Inner loops that Cython cannot say: omp simd loops and reductions, streaming stores, exp; and facts about the CPU.
   The one C file of the project. It is compiled once a level; `vector.pxd` gives it to Cython.

   Design:
   - Everything is plain C that any compiler builds. `omp simd` tells GCC and Clang what they may vectorize (and that
     x and y may be the same array); other compilers ignore it.
   - Reductions keep LANES partial sums, the same number at every level, added up pairwise by `lanes_sum`: the order of
     the additions depends on the length alone, never on alignment, thread count or instruction set.
   - One template for float and double: the part below "per dtype" includes itself twice. Names end in _f32 or _f64. */

#ifndef FASTNORM_VECTOR_H
#define FASTNORM_VECTOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#define FASTNORM_X86 1
#endif

#if defined(_MSC_VER)
#define FASTNORM_INLINE static __forceinline
#define restrict __restrict
#elif defined(__GNUC__)
#define FASTNORM_INLINE static inline __attribute__((always_inline))
#else
#define FASTNORM_INLINE static inline
#endif

#define SIMD _Pragma("omp simd")
#if defined(_MSC_VER)
#undef SIMD
#define SIMD
#endif

/* -- facts about the CPU, the compiler and OpenMP (used by runtime.pyx) ------------------------------------------- */

/* The CPU side of the table of levels in setup.py. The compiler's own detection also asks XGETBV whether the operating
   system saves the wide registers. */
static int fastnorm_cpu_supports(const char *level) {
    if (strcmp(level, "baseline") == 0) return 1;
#if defined(FASTNORM_X86) && defined(__GNUC__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
                     && __builtin_cpu_supports("bmi2");
    if (strcmp(level, "avx2") == 0) return avx2;
    if (strcmp(level, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd")
               && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
               && __builtin_cpu_supports("avx512vl");
#endif
    return 0;
}

static int fastnorm_openmp_version(void) {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}

static int fastnorm_openmp_max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static const char *fastnorm_compiler(void) {
#if defined(__clang__)
    return "Clang " __clang_version__;
#elif defined(__GNUC__)
    return "GCC " __VERSION__;
#elif defined(_MSC_VER)
    return "MSVC";
#else
    return "unknown";
#endif
}

static const char *fastnorm_architecture(void) {
#if defined(__x86_64__) || defined(_M_X64)
    return "x86-64";
#elif defined(__aarch64__) || defined(_M_ARM64)
    return "arm64";
#else
    return "generic";
#endif
}

static const char *fastnorm_build_flags(void) {
#ifdef FASTNORM_BUILD_FLAGS
    return FASTNORM_BUILD_FLAGS;
#else
    return "";
#endif
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* Copies to memory that will not be read soon: whole cache lines go around the cache, so that the bus carries the
   output once and never reads it first. Call `stream_fence` before another thread may look. */
static void stream_copy(void *dst, const void *src, size_t bytes) {
#ifdef FASTNORM_X86
    char *d = (char *)dst;
    const char *s = (const char *)src;
    size_t head = (size_t)(-(uintptr_t)d) & 63;
    if (head > bytes) head = bytes;
    memcpy(d, s, head);
    size_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)(d + i), _mm512_loadu_si512((const void *)(s + i)));
#elif defined(__AVX2__)
        _mm256_stream_si256((void *)(d + i), _mm256_loadu_si256((const void *)(s + i)));
        _mm256_stream_si256((void *)(d + i + 32), _mm256_loadu_si256((const void *)(s + i + 32)));
#else
        for (int j = 0; j < 64; j += 16)
            _mm_stream_si128((void *)(d + i + j), _mm_loadu_si128((const void *)(s + i + j)));
#endif
    }
    memcpy(d + i, s + i, bytes - i);
#else
    memcpy(dst, src, bytes);
#endif
}

static void stream_fence(void) {
#ifdef FASTNORM_X86
    _mm_sfence();
#endif
}

/* Scratch memory on a cache line boundary; `scratch_free` takes it back. NULL when there is none. */
static void *scratch_alloc(size_t bytes) {
    char *raw = (char *)malloc(bytes + 64 + sizeof(void *));
    if (raw == NULL) return NULL;
    char *aligned = (char *)(((uintptr_t)raw + sizeof(void *) + 63) & ~(uintptr_t)63);
    memcpy(aligned - sizeof(void *), &raw, sizeof(void *));
    return aligned;
}

static void scratch_free(void *scratch) {
    if (scratch == NULL) return;
    void *raw;
    memcpy(&raw, (char *)scratch - sizeof(void *), sizeof(void *));
    free(raw);
}

/* -- per dtype ------------------------------------------------------------------------------------------------------ */

/* Partial sums of a reduction, for either dtype: four AVX-512 registers of floats. GCC keeps them in registers. */
#define LANES 64

/* What follows batch norm; norm.py has the names. */
enum { ACTIVATION_NONE = 0, ACTIVATION_RELU = 1, ACTIVATION_LEAKY_RELU = 2 };

/* Rows of batch norm's table of parameters: entry (row, j) is p[row * ld + j]. Forward uses the first four. */
enum { BN_MEAN_HI, BN_MEAN_LO, BN_SCALE, BN_BETA, BN_DZ_MEAN, BN_SLOPE_X, BN_ROWS };

#define real float
#define uint_of_real uint32_t
#define int_of_real int32_t
#define FN(name) name##_f32
#include "vector.h"
#undef real
#undef uint_of_real
#undef int_of_real
#undef FN

#define FASTNORM_DOUBLE
#define real double
#define uint_of_real uint64_t
#define int_of_real int64_t
#define FN(name) name##_f64
#include "vector.h"
#undef real
#undef uint_of_real
#undef int_of_real
#undef FN
#undef FASTNORM_DOUBLE

#else /* ==== the template, included twice by the part above ========================================================= */

/* a*b + c: fused where the level has it in hardware. Only where both ways are within the stated accuracy. */
FASTNORM_INLINE real FN(muladd)(real a, real b, real c) {
#if defined(__FMA__) || defined(__aarch64__)
#ifdef FASTNORM_DOUBLE
    return __builtin_fma(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
#else
    return a * b + c;
#endif
}

/* Sum of n values in double, in an order that depends on n alone. */
static double FN(lanes_sum)(const real *restrict x, ptrdiff_t n) {
    double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) {
        SIMD
        for (int j = 0; j < 8; j++) lane[j] += x[i + j];
    }
    for (int j = 0; i + j < n; j++) lane[j] += x[i + j];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* -- exp ------------------------------------------------------------------------------------------------------------ */

/* 2**k * 2**m for k + m = n, without branches, for any n whose result or whose underflow or overflow is wanted. */
FASTNORM_INLINE real FN(scale_by_power_of_two)(real p, uint_of_real n_plus_bias2) {
    /* n_plus_bias2 = n + 2*BIAS (never negative), halved without a signed shift, which AVX2 lacks for 64 bits. */
#ifdef FASTNORM_DOUBLE
    const int shift = 52;
#else
    const int shift = 23;
#endif
    const uint_of_real half = n_plus_bias2 >> 1;
    const uint_of_real first = half << shift, second = (n_plus_bias2 - half) << shift;
    real a, b;
    memcpy(&a, &first, sizeof a);
    memcpy(&b, &second, sizeof b);
    return p * a * b;
}

/* e**x over the whole range, gradual underflow included; NaN gives NaN. Reduction by Cody and Waite, x = n ln 2 + r;
   polynomial of Cephes' expf (float), Taylor to degree 13 (double). At most 2 ulp. */
FASTNORM_INLINE real FN(exp)(real x) {
#ifdef FASTNORM_DOUBLE
    const real top = 710.0, bottom = -746.0, log2e = 1.4426950408889634, magic = 6755399441055744.0;
    const real ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
    const uint_of_real bias2 = 2 * 1023;
#else
    const real top = 89.0f, bottom = -104.5f, log2e = 1.44269504f, magic = 12582912.0f;
    const real ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
    const uint_of_real bias2 = 2 * 127;
#endif
    x = x > top ? top : x; /* written so that NaN passes */
    x = x < bottom ? bottom : x;
    const real shifted = x * log2e + magic; /* the sum's low bits are the nearest integer to x / ln 2 */
    const real n = shifted - magic;
    uint_of_real bits, magic_bits;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&magic_bits, &magic, sizeof bits);
    real r = FN(muladd)(n, -ln2_hi, x);
    r = FN(muladd)(n, -ln2_lo, r);
#ifdef FASTNORM_DOUBLE
    real p = 1.0 / 6227020800.0;
    p = FN(muladd)(p, r, 1.0 / 479001600.0);
    p = FN(muladd)(p, r, 1.0 / 39916800.0);
    p = FN(muladd)(p, r, 1.0 / 3628800.0);
    p = FN(muladd)(p, r, 1.0 / 362880.0);
    p = FN(muladd)(p, r, 1.0 / 40320.0);
    p = FN(muladd)(p, r, 1.0 / 5040.0);
    p = FN(muladd)(p, r, 1.0 / 720.0);
    p = FN(muladd)(p, r, 1.0 / 120.0);
    p = FN(muladd)(p, r, 1.0 / 24.0);
    p = FN(muladd)(p, r, 1.0 / 6.0);
    p = FN(muladd)(p, r, 0.5);
    p = FN(muladd)(p * r, r, r) + 1.0;
#else
    real p = 1.9875691500e-4f;
    p = FN(muladd)(p, r, 1.3981999507e-3f);
    p = FN(muladd)(p, r, 8.3334519073e-3f);
    p = FN(muladd)(p, r, 4.1665795894e-2f);
    p = FN(muladd)(p, r, 1.6666665459e-1f);
    p = FN(muladd)(p, r, 5.0000001201e-1f);
    p = FN(muladd)(p * r, r, r) + 1.0f;
#endif
    return FN(scale_by_power_of_two)(p, bits - magic_bits + bias2);
}

/* -- batch norm ----------------------------------------------------------------------------------------------------- */

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

/* act(z), and act'(z) * dy. Comparisons are written so that NaN passes through. */
FASTNORM_INLINE real FN(activate)(real z, int activation, real slope) {
    if (activation == ACTIVATION_RELU) return z <= 0 ? 0 : z;
    if (activation == ACTIVATION_LEAKY_RELU) return z <= 0 ? z * slope : z;
    return z;
}
FASTNORM_INLINE real FN(activate_gradient)(real dy, real z, int activation, real slope) {
    if (activation == ACTIVATION_RELU) return z <= 0 ? 0 : dy;
    if (activation == ACTIVATION_LEAKY_RELU) return z <= 0 ? dy * slope : dy;
    return dy;
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

#endif
