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

/* -- random numbers --------------------------------------------------------------------------------------------------- */

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): the four words of
   one block are a function of its counter and key alone, so any thread computes any block by itself. */
#define PHILOX_ROUND(r) \
    { \
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p2 = (uint64_t)0xCD9E8D57u * c2; \
        c0 = (uint32_t)(p2 >> 32) ^ c1 ^ (key0 + (r) * 0x9E3779B9u); \
        c1 = (uint32_t)p2; \
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ (key1 + (r) * 0xBB67AE85u); \
        c3 = (uint32_t)p0; \
    }
/* Ten rounds on four variables c0 to c3; a macro, as a loop over the rounds would keep GCC from vectorizing the loop
   over blocks around it. */
#define PHILOX_TEN_ROUNDS \
    PHILOX_ROUND(0) PHILOX_ROUND(1) PHILOX_ROUND(2) PHILOX_ROUND(3) PHILOX_ROUND(4) \
    PHILOX_ROUND(5) PHILOX_ROUND(6) PHILOX_ROUND(7) PHILOX_ROUND(8) PHILOX_ROUND(9)

static void philox4x32(uint32_t c[4], uint32_t key0, uint32_t key1) {
    uint32_t c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    PHILOX_TEN_ROUNDS
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
}

#define PHILOX_WORDS 64

/* OUT words[PHILOX_WORDS]: those numbered first, first + step, first + 2*step, ...; returns how many of the `wanted`
   there are now. Word i is word i % 4 of the block with counter (i / 4, offset), each 64 bits, low half first; the key is
   the seed. */
static ptrdiff_t philox_words(uint32_t *restrict words, ptrdiff_t wanted, uint64_t seed, uint64_t offset, uint64_t first,
                              uint64_t step) {
    const uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    const uint32_t offset0 = (uint32_t)offset, offset1 = (uint32_t)(offset >> 32);
    if (step == 1) {
        const uint32_t low = (uint32_t)(first >> 2), high = (uint32_t)(first >> 34);
        const ptrdiff_t skip = (ptrdiff_t)(first & 3), available = PHILOX_WORDS - skip;
        uint32_t block[PHILOX_WORDS];
        SIMD
        for (int j = 0; j < PHILOX_WORDS / 4; j++) {
            uint32_t c0 = low + (uint32_t)j, c1 = high + (c0 < low), c2 = offset0, c3 = offset1;
            PHILOX_TEN_ROUNDS
            block[4 * j] = c0, block[4 * j + 1] = c1, block[4 * j + 2] = c2, block[4 * j + 3] = c3;
        }
        memcpy(words, block + skip, (size_t)available * sizeof *words);
        return wanted < available ? wanted : available;
    }
    if (wanted > PHILOX_WORDS) wanted = PHILOX_WORDS;
    SIMD
    for (ptrdiff_t j = 0; j < wanted; j++) {
        const uint64_t i = first + (uint64_t)j * step;
        const uint32_t word = (uint32_t)i;
        uint32_t c0 = (uint32_t)(i >> 2), c1 = (uint32_t)(i >> 34), c2 = offset0, c3 = offset1;
        PHILOX_TEN_ROUNDS
        const uint32_t even = word & 2 ? c2 : c0, odd = word & 2 ? c3 : c1;
        words[j] = word & 1 ? odd : even;
    }
    return wanted;
}

/* -- per dtype ------------------------------------------------------------------------------------------------------ */

/* Partial sums of a reduction, for either dtype: four AVX-512 registers of floats. GCC keeps them in registers. */
#define LANES 64

/* What follows batch norm; norm.py has the names. */
enum { ACTIVATION_NONE = 0, ACTIVATION_RELU = 1, ACTIVATION_LEAKY_RELU = 2 };

/* Rows of batch norm's table of parameters: entry (row, j) is p[row * ld + j]. Forward uses the first four. */
enum { BN_MEAN_HI, BN_MEAN_LO, BN_SCALE, BN_BETA, BN_DZ_MEAN, BN_SLOPE_X, BN_ROWS };
/* Activations that are functions of their own only; batch norm fuses the three above. */
enum { ACTIVATION_ELU = 3, ACTIVATION_CELU = 4, ACTIVATION_SIGMOID = 5, ACTIVATION_TANH = 6 };

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

/* -- optimizer ------------------------------------------------------------------------------------------------------ */

/* Sum of n squares in double, in an order that depends on n alone. 32 partial sums: enough additions under way at once
   to keep up with memory. */
static double FN(sum_squares)(const real *restrict x, ptrdiff_t n) {
    double lane[32] = {0};
    ptrdiff_t i = 0;
    for (; i + 32 <= n; i += 32) {
        SIMD
        for (int j = 0; j < 32; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    }
    for (int j = 0; i + j < n; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    for (int width = 16; width > 0; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
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

/* e**r for |r| <= ln(2)/2 (1 + 2**-11), exactly 1 at 0. Minimax in relative error (Remez), error 2**-28.3 for float and
   2**-57.9 for double before rounding; the two lowest coefficients are Taylor's. */
FASTNORM_INLINE real FN(exp_polynomial)(real r) {
#ifdef FASTNORM_DOUBLE
    real p = 2.500001885308334e-08;
    p = FN(muladd)(p, r, 2.7630306255647857e-07);
    p = FN(muladd)(p, r, 2.755758680384707e-06);
    p = FN(muladd)(p, r, 2.480149294961707e-05);
    p = FN(muladd)(p, r, 1.9841269505773806e-04);
    p = FN(muladd)(p, r, 1.3888888943759984e-03);
    p = FN(muladd)(p, r, 8.333333333494976e-03);
    p = FN(muladd)(p, r, 4.1666666666529725e-02);
    p = FN(muladd)(p, r, 1.666666666666641e-01);
    p = FN(muladd)(p, r, 5.000000000000011e-01);
#else
    real p = 1.3814540579915047e-03f;
    p = FN(muladd)(p, r, 8.36874544620514e-03f);
    p = FN(muladd)(p, r, 4.166838899254799e-02f);
    p = FN(muladd)(p, r, 1.666652113199234e-01f);
    p = FN(muladd)(p, r, 4.999999403953552e-01f);
#endif
    p = FN(muladd)(p, r, 1);
    return FN(muladd)(p, r, 1);
}

/* e**x over the whole range, gradual underflow included; NaN gives NaN. Reduction by Cody and Waite, x = n ln 2 + r.
   At most 1.2 ulp (measured over 10**8 floats; 0.9 with fused multiply-add). */
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
    const real p = FN(exp_polynomial)(r);
    return FN(scale_by_power_of_two)(p, bits - magic_bits + bias2);
}

/* -- softmax -------------------------------------------------------------------------------------------------------- */

/* Design:
   - e**(x - m) for a row's maximum m, without the rounding of x - m, which at x - m = -80 alone would cost 32 ulp: both
     numbers are reduced by multiples of ln 2 that differ by the integer n, and what remains is subtracted. It is exact
     at x = m: e**0 = 1, so equal logits give equal probabilities and one class gives 1.
   - The exponentials carry a factor SOFTMAX_UNIT, so that none is subnormal (slow) before it is scaled by 1 / sum, and
     the scaling rounds once. Below half the smallest subnormal they are 0.
   - What depends on m alone is the frame: five numbers, computed once a row; in the lanes form, five rows of lanes.
   - `step` as in batch norm: 0, one number for the run; 1, one a lane. */

#ifdef FASTNORM_DOUBLE
#define SOFTMAX_BIAS 1076     /* the exponent field of e**0; n = -1076 gives the field 0, which is the number 0 */
#define SOFTMAX_FAR 2048.0    /* above it x - m is exact (Sterbenz) wherever e**(x - m) is not 0 */
#define SOFTMAX_LOWEST 745.86 /* 1076.05 ln 2 */
#define SOFTMAX_UNIT 9007199254740992.0 /* 2**53 */
#define SOFTMAX_MAGIC 6755399441055744.0
#define SOFTMAX_LN2_HI 6.93145751953125e-1
#define SOFTMAX_LN2_LO 1.42860682030941723212e-6
#define SOFTMAX_SHIFT 52
#else
#define SOFTMAX_BIAS 151
#define SOFTMAX_FAR 256.0f
#define SOFTMAX_LOWEST 104.7f /* 151.05 ln 2 */
#define SOFTMAX_UNIT 16777216.0 /* 2**24 */
#define SOFTMAX_MAGIC 12582912.0f
#define SOFTMAX_LN2_HI 0.693359375f
#define SOFTMAX_LN2_LO -2.12194440e-4f
#define SOFTMAX_SHIFT 23
#endif
#define SOFTMAX_LOG2E ((real)1.4426950408889634)
#define SOFTMAX_CHUNK 1024 /* elements summed in `real` before the sum goes on in double: 16 a lane */

/* m, infinite or NaN, gives a frame in which every e**(x - m) is NaN. */
FASTNORM_INLINE void FN(softmax_frame)(real m, real *shift, real *top, real *bottom, real *magic, real *residue) {
    const real s = m > SOFTMAX_FAR || m < -SOFTMAX_FAR ? m : 0;
    const real t = m - s;
    const real n = (t * SOFTMAX_LOG2E + SOFTMAX_MAGIC) - SOFTMAX_MAGIC;
    *shift = s;
    *top = t;
    *bottom = t - SOFTMAX_LOWEST;
    *magic = SOFTMAX_MAGIC + SOFTMAX_BIAS - n;
    *residue = FN(muladd)(n, -SOFTMAX_LN2_HI, t);
}

/* SOFTMAX_UNIT * e**(x - m), x <= m; NaN gives NaN, -inf gives 0. At most 1.3 ulp (measured; 1.1 with fused
   multiply-add). */
FASTNORM_INLINE real FN(exp_in_frame)(real x, real shift, real top, real bottom, real magic, real residue) {
    real y = x - shift;
    y = y < bottom ? bottom : y; /* written so that NaN passes */
    const real shifted = FN(muladd)(y - top, SOFTMAX_LOG2E, SOFTMAX_MAGIC + SOFTMAX_BIAS);
    const real n = shifted - (SOFTMAX_MAGIC + SOFTMAX_BIAS);                   /* of x - m */
    real r = FN(muladd)(shifted - magic, -SOFTMAX_LN2_HI, y) - residue;        /* y and m less their multiples, exact */
    r = FN(muladd)(n, -SOFTMAX_LN2_LO, r);
    uint_of_real bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= SOFTMAX_SHIFT;
    real power;
    memcpy(&power, &bits, sizeof power);
    return FN(exp_polynomial)(r) * power;
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

FASTNORM_INLINE double FN(softmax_exp_loop)(const real *restrict x, real *restrict e, ptrdiff_t n, real m, int keep) {
    real shift, top, bottom, magic, residue;
    FN(softmax_frame)(m, &shift, &top, &bottom, &magic, &residue);
    double total = 0;
    for (ptrdiff_t start = 0; start < n; start += SOFTMAX_CHUNK) {
        const ptrdiff_t end = n - start < SOFTMAX_CHUNK ? n : start + SOFTMAX_CHUNK;
        real sum[LANES];
        memset(sum, 0, sizeof sum);
        ptrdiff_t i = start;
        for (; i + LANES <= end; i += LANES) {
            SIMD
            for (int j = 0; j < LANES; j++) {
                const real v = FN(exp_in_frame)(x[i + j], shift, top, bottom, magic, residue);
                if (keep) e[i + j] = v;
                sum[j] += v;
            }
        }
        SIMD
        for (int j = 0; j < end - i; j++) {
            const real v = FN(exp_in_frame)(x[i + j], shift, top, bottom, magic, residue);
            if (keep) e[i + j] = v;
            sum[j] += v;
        }
        total += FN(lanes_sum)(sum, LANES);
    }
    return total / SOFTMAX_UNIT;
}

/* Sum of e**(x - m) over a row; e, where there is one, takes SOFTMAX_UNIT times the terms. */
static double FN(softmax_exp)(const real *x, real *e, ptrdiff_t n, real m) {
    return e ? FN(softmax_exp_loop)(x, e, n, m, 1) : FN(softmax_exp_loop)(x, e, n, m, 0);
}

/* The same sum of terms already there, in double. */
static double FN(softmax_sum)(const real *e, ptrdiff_t n) { return FN(lanes_sum)(e, n) / SOFTMAX_UNIT; }

/* out = unit_e * scale / unit - mass, where mass_c = (t_c a + b) w_c. scale comes as two factors, one of them a power of
   two (see softmax_factors). */
FASTNORM_INLINE void FN(softmax_output_loop)(const real *e, const real *t, const real *w, real *out, ptrdiff_t n,
                                             const real *restrict factor, const real *restrict power, real a, real b,
                                             int step, int with_t, int with_w, int with_b) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        const real p = (e[j] * factor[j * step]) * power[j * step];
        if (with_t || with_b) {
            const real mass = with_t ? t[j] * a + b : b;
            out[j] = p - (with_w ? mass * w[j] : mass);
        } else {
            out[j] = p;
        }
    }
}

static void FN(softmax_output)(const real *e, const real *t, const real *w, real *out, ptrdiff_t n, const real *factor,
                               const real *power, real a, real b, int step) {
#define SOFTMAX_CALL(S, T, W, B) FN(softmax_output_loop)(e, t, w, out, n, factor, power, a, b, S, T, W, B)
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

/* The two factors of scale / SOFTMAX_UNIT whose product with an exponential overflows or underflows only if the result
   does. */
FASTNORM_INLINE void FN(softmax_factors)(double scale, real *factor, real *power) {
    const int small = scale < 1 && scale > -1;
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
static void FN(lanes_exp)(const real *x, real *e, const real *restrict frame, ptrdiff_t width, double *restrict total,
                          ptrdiff_t n) {
    SIMD
    for (ptrdiff_t j = 0; j < n; j++) {
        e[j] = FN(exp_in_frame)(x[j], frame[j], frame[width + j], frame[2 * width + j], frame[3 * width + j],
                                frame[4 * width + j]);
        total[j] += e[j] * (1 / SOFTMAX_UNIT);
    }
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
#undef SOFTMAX_UNIT
#undef SOFTMAX_MAGIC
#undef SOFTMAX_LN2_HI
#undef SOFTMAX_LN2_LO
#undef SOFTMAX_SHIFT
#undef SOFTMAX_LOG2E
#undef SOFTMAX_CHUNK
#undef SOFTMAX_DOT

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

/* -- activations ---------------------------------------------------------------------------------------------------- */

#ifdef FASTNORM_DOUBLE
#define EXP_BIAS 1023
#define EXP_SHIFT 52
#define EXP_MAGIC 6755399441055744.0
#define EXP_BOTTOM -746.0
#else
#define EXP_BIAS 127
#define EXP_SHIFT 23
#define EXP_MAGIC 12582912.0f
#define EXP_BOTTOM -104.5f
#endif
#define LN2_HI 6.93145751953125e-1 /* 17 bits */
#define LN2_LO 1.42860682030941723212e-6

/* The reduction of exp for any unit: x = n*period + r, where period = ln 2 times the unit in two numbers, the upper one
   short enough for an exact product with n, and t is x in that unit, roughly. Returns r, and n + 2*EXP_BIAS. */
FASTNORM_INLINE real FN(exp_reduce)(real x, real t, real period_hi, real period_lo, uint_of_real *n_plus_bias2) {
    const real magic = EXP_MAGIC, shifted = t * (real)1.4426950408889634 + magic;
    const real n = shifted - magic;
    uint_of_real bits, magic_bits;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&magic_bits, &magic, sizeof bits);
    *n_plus_bias2 = bits - magic_bits + 2 * EXP_BIAS;
    return FN(muladd)(n, -period_lo, FN(muladd)(n, -period_hi, x));
}

/* Splits ln 2 times a unit for exp_reduce. */
static void FN(exp_period)(double unit, real *hi, real *lo) {
    double upper = unit * 0.6931471805599453;
    uint64_t bits;
    memcpy(&bits, &upper, sizeof bits);
    bits &= ~(uint64_t)0 << (sizeof(real) == 4 ? 41 : 11); /* what n, of 8 or 11 bits, leaves free of 24 or 53 */
    memcpy(&upper, &bits, sizeof upper);
    *hi = (real)upper;
    *lo = (real)(fma(unit, LN2_HI, -upper) + unit * LN2_LO);
}

/* e**x - 1 over the whole range without cancellation: x = n ln 2 + r as in exp, then 2**n (e**r - 1) + (2**n - 1), with
   2**n = a*b so that neither factor overflows before the result does. NaN and the sign of zero pass. At most 2 ulp.
   Polynomial of Cephes' expf (float), Taylor to degree 13 (double). */
FASTNORM_INLINE real FN(expm1)(real x) {
#ifdef FASTNORM_DOUBLE
    const real top = 710.0, bottom = -40.0, ln2_hi = LN2_HI, ln2_lo = LN2_LO;
#else
    const real top = 89.0f, bottom = -20.0f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
#endif
    real y = x > top ? top : x; /* written so that NaN passes */
    y = y < bottom ? bottom : y; /* the result is -1 there */
    uint_of_real n_plus_bias2;
    const real r = FN(exp_reduce)(y, y, ln2_hi, ln2_lo, &n_plus_bias2);
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
#else
    real p = 1.9875691500e-4f;
    p = FN(muladd)(p, r, 1.3981999507e-3f);
    p = FN(muladd)(p, r, 8.3334519073e-3f);
    p = FN(muladd)(p, r, 4.1665795894e-2f);
    p = FN(muladd)(p, r, 1.6666665459e-1f);
    p = FN(muladd)(p, r, 5.0000001201e-1f);
#endif
    p = FN(muladd)(p * r, r, r);
    const uint_of_real half = n_plus_bias2 >> 1, rest = n_plus_bias2 - half;
    const uint_of_real a_bits = half << EXP_SHIFT, b_bits = rest << EXP_SHIFT;
    const uint_of_real b_inverse_bits = (2 * EXP_BIAS - rest) << EXP_SHIFT;
    real a, b, b_inverse;
    memcpy(&a, &a_bits, sizeof a);
    memcpy(&b, &b_bits, sizeof b);
    memcpy(&b_inverse, &b_inverse_bits, sizeof b_inverse);
    const real result = FN(muladd)(p, a, a - b_inverse) * b;
    return x == 0 ? x : result;
}

/* e**(x/alpha) for x <= 0, given 1/alpha and exp_period of alpha: without the rounding of x/alpha, which at -80 alone
   would cost 40 ulp. At most 2 ulp. */
FASTNORM_INLINE real FN(exp_quotient)(real x, real inverse, real period_hi, real period_lo) {
    const real t = x * inverse;
    uint_of_real n_plus_bias2;
    const real r = FN(exp_reduce)(x, t, period_hi, period_lo, &n_plus_bias2) * inverse;
    const real result = FN(scale_by_power_of_two)(FN(exp_polynomial)(r), n_plus_bias2);
    return t < EXP_BOTTOM ? 0 : result; /* written so that NaN passes */
}

FASTNORM_INLINE real FN(absolute)(real x) { return x < 0 ? -x : x; }

/* 1 / (1 + e**-x), from e**-|x| so that nothing overflows and the left tail keeps its relative accuracy. */
FASTNORM_INLINE real FN(sigmoid)(real x) {
    const real e = FN(exp)(-FN(absolute)(x));
    return (x >= 0 ? 1 : e) / (1 + e);
}

/* From u = e**(-2|x|) - 1: |tanh x| = -u / (2 + u). */
FASTNORM_INLINE real FN(tanh)(real x) {
    const real u = FN(expm1)(-2 * FN(absolute)(x));
    const real t = u / (2 + u); /* -|tanh x| */
    return x < 0 ? t : -t;
}

FASTNORM_INLINE real FN(elu)(real x, real alpha) {
    const real negative = alpha * FN(expm1)(x > 0 ? 0 : x);
    return x > 0 ? x : negative;
}
FASTNORM_INLINE real FN(elu_gradient)(real dy, real x, real alpha) {
    const real slope = alpha * FN(exp)(x > 0 ? 0 : x);
    return x > 0 ? dy : dy * slope;
}
FASTNORM_INLINE real FN(celu)(real x, real alpha) {
    const real negative = alpha * FN(expm1)((x > 0 ? 0 : x) / alpha);
    return x > 0 ? x : negative;
}
FASTNORM_INLINE real FN(celu_gradient)(real dy, real x, real inverse, real period_hi, real period_lo) {
    const real slope = FN(exp_quotient)(x > 0 ? 0 : x, inverse, period_hi, period_lo);
    return x > 0 ? dy : dy * slope;
}
/* From y, in an order of the factors in which no product overflows and no difference cancels. */
FASTNORM_INLINE real FN(sigmoid_gradient)(real dy, real y) { return dy * (1 - y) * y; }
FASTNORM_INLINE real FN(tanh_gradient)(real dy, real y) { return dy * ((1 - y) * (1 + y)); }

#define ELEMENTWISE(EXPRESSION) \
    { \
        SIMD \
        for (ptrdiff_t i = 0; i < n; i++) y[i] = EXPRESSION; \
        return; \
    }

/* IN x[n], OUT y[n], which may be x. The factor is the slope or alpha. */
static void FN(activation)(int kind, const real *x, real *y, ptrdiff_t n, double factor) {
    const real a = (real)factor;
    switch (kind) {
    case ACTIVATION_RELU: ELEMENTWISE(FN(activate)(x[i], ACTIVATION_RELU, 0))
    case ACTIVATION_LEAKY_RELU: ELEMENTWISE(FN(activate)(x[i], ACTIVATION_LEAKY_RELU, a))
    case ACTIVATION_ELU: ELEMENTWISE(FN(elu)(x[i], a))
    case ACTIVATION_CELU: ELEMENTWISE(FN(celu)(x[i], a))
    case ACTIVATION_SIGMOID: ELEMENTWISE(FN(sigmoid)(x[i]))
    case ACTIVATION_TANH: ELEMENTWISE(FN(tanh)(x[i]))
    }
}

/* IN dy[n], x[n] (for sigmoid and tanh: their output), OUT y[n], which may be dy. */
static void FN(activation_backward)(int kind, const real *dy, const real *x, real *y, ptrdiff_t n, double factor) {
    const real a = (real)factor;
    switch (kind) {
    case ACTIVATION_RELU: ELEMENTWISE(FN(activate_gradient)(dy[i], x[i], ACTIVATION_RELU, 0))
    case ACTIVATION_LEAKY_RELU: ELEMENTWISE(FN(activate_gradient)(dy[i], x[i], ACTIVATION_LEAKY_RELU, a))
    case ACTIVATION_ELU: ELEMENTWISE(FN(elu_gradient)(dy[i], x[i], a))
    case ACTIVATION_CELU: {
        const real inverse = (real)(1 / factor);
        real hi, lo;
        FN(exp_period)(factor, &hi, &lo);
        ELEMENTWISE(FN(celu_gradient)(dy[i], x[i], inverse, hi, lo))
    }
    case ACTIVATION_SIGMOID: ELEMENTWISE(FN(sigmoid_gradient)(dy[i], x[i]))
    case ACTIVATION_TANH: ELEMENTWISE(FN(tanh_gradient)(dy[i], x[i]))
    }
}

#undef ELEMENTWISE
#undef EXP_BIAS
#undef EXP_SHIFT
#undef EXP_MAGIC
#undef EXP_BOTTOM
#undef LN2_HI
#undef LN2_LO

/* Inverted dropout of n values whose random words are numbered first, first + step, ...: IN x[n], OUT y[n], which may
   be x. A dropped value is multiplied by 0, so that NaN and infinity show. */
static void FN(dropout)(const real *x, real *y, ptrdiff_t n, uint64_t seed, uint64_t offset, uint64_t first,
                        uint64_t step, uint32_t threshold, real scale) {
    uint32_t words[PHILOX_WORDS];
    for (ptrdiff_t done = 0; done < n;) {
        const ptrdiff_t count = philox_words(words, n - done, seed, offset, first + (uint64_t)done * step, step);
        SIMD
        for (ptrdiff_t j = 0; j < count; j++) y[done + j] = x[done + j] * (words[j] >= threshold ? scale : 0);
        done += count;
    }
}

#endif
