/* What Cython cannot say: omp simd loops and reductions, streaming stores, exp; and facts about the CPU. All the C of the
   project: the loops of each kernel are in a file of their own, included at the end, and no file but this one holds an
   intrinsic. It is compiled once a level; `vector.pxd` gives it to Cython.

   Design:
   - Everything is plain C that any compiler builds. `omp simd` tells GCC and Clang what they may vectorize (and that
     x and y may be the same array); other compilers ignore it.
   - Reductions keep LANES partial sums, the same number at every level, added up pairwise by `lanes_sum`: the order of
     the additions depends on the length alone, never on alignment, thread count or instruction set.
   - One template for float and double: the part below "per dtype" includes itself twice. Names end in _f32 or _f64. */

#ifndef FASTNORM_VECTOR_H
#define FASTNORM_VECTOR_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef FASTNORM_DEBUG
#include <stdio.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)0)
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

/* Whether the level multiplies and adds with one rounding. */
#if defined(__FMA__) || defined(__aarch64__)
#define FUSED_MULADD 1
#else
#define FUSED_MULADD 0
#endif

#if defined(_MSC_VER)
#define FASTNORM_THREAD_LOCAL __declspec(thread)
#else
#define FASTNORM_THREAD_LOCAL __thread
#endif

/* a != b, and neither is NaN. */
#if defined(__GNUC__)
#define LESS_OR_GREATER(a, b) __builtin_islessgreater(a, b)
#else
#define LESS_OR_GREATER(a, b) ((a) < (b) || (a) > (b))
#endif

/* SHUFFLE(a, b, i, j, ...): a vector of the elements i, j, ... of a and b, one behind the other. */
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif

/* Ask for the cache line of an address, which need not exist. */
#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)0)
#endif

/* What is read a page after n_bytes at `at`, for loops over long memory that do more than such a loop between: the processor's
   own prefetch stops at the end of a page, and what it could find out by running ahead is hidden behind the other
   instructions. Memory is read run by run; `left` bytes after `from` the run ends, and the next one begins `jump` bytes
   further on: beside that end lies what is not read for long. */
enum { FETCH_AHEAD = 4096 };
typedef struct {
    ptrdiff_t by, left, jump;
} Ahead;

/* For runs of so many bytes, so many apart; apart = 0 where there is no next run. */
static inline Ahead ahead_of_runs(ptrdiff_t run, ptrdiff_t apart) {
    Ahead ahead = {run < FETCH_AHEAD ? run : FETCH_AHEAD, run, 0};
    ahead.jump = apart ? apart - run : -ahead.by; /* what is there already */
    return ahead;
}

static inline void fetch_ahead(const void *from, ptrdiff_t at, ptrdiff_t n_bytes, Ahead ahead) {
    const ptrdiff_t there = at + ahead.by;
    const char *next = (const char *)from + (there < ahead.left ? there : there + ahead.jump);
    for (ptrdiff_t i = 0; i < n_bytes; i += 64) PREFETCH(next + i);
}
/* Ask for n_bytes that are the next piece of work. */
static inline void fetch(const void *from, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) PREFETCH((const char *)from + i);
}

/* The next of the numbers that several threads take. */
static inline ptrdiff_t claim(ptrdiff_t *next) {
#if defined(_MSC_VER)
    return (ptrdiff_t)_InterlockedExchangeAdd64((volatile __int64 *)next, 1);
#else
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
#endif
}

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

/* CPUs that this thread may run on now: its affinity mask, where the system has one. */
static int fastnorm_available_cpus(void) {
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

/* The same, up to 10 ms old: to ask the system takes as long as a small kernel. */
static int fastnorm_recent_cpus(void) {
#ifdef _OPENMP
    static FASTNORM_THREAD_LOCAL double until = 0;
    static FASTNORM_THREAD_LOCAL int cpus = 1;
    const double now = omp_get_wtime();
    if (now >= until) {
        cpus = omp_get_num_procs();
        until = now + 10e-3;
    }
    return cpus;
#else
    return 1;
#endif
}

/* End the workers that libgomp keeps for this thread, so that a child forked from here does not wait for threads that it
   does not have. 0 where that cannot be done. libomp, which Clang links, looks after its own workers at a fork. */
static int fastnorm_openmp_release_workers(void) {
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 9
    return omp_pause_resource(omp_pause_hard, omp_get_initial_device()) == 0;
#else
    return 0;
#endif
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

/* Bytes of the second-level cache of one core, or 0 where the system does not tell. Tests assume others. */
static ptrdiff_t l2_assumed;
static void assume_l2_bytes(ptrdiff_t n_bytes) { l2_assumed = n_bytes; }
static ptrdiff_t l2_bytes(void) {
    if (l2_assumed) return l2_assumed;
#ifdef _SC_LEVEL2_CACHE_SIZE
    static ptrdiff_t known = -1;
    if (known < 0) {
        const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
        known = found > 0 ? (ptrdiff_t)found : 0;
    }
    return known;
#else
    return 0;
#endif
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* Outputs from this size on are not found in the cache by their next reader: L3 caches of today hold 16 to 64 MB, and the
   input takes its share. Measured with 32 MB: below 16 MB of output, ordinary stores are up to 2 times as fast. */
enum { STREAM_BYTES = 16 << 20 };

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

/* Scratch memory on a cache line boundary; `scratch_free` takes it back. NULL when there is none.
   A debug build fills it with NaN, so that a value that was never set shows; puts a guard behind it, which
   `scratch_free` looks at; and has no memory while the environment variable FASTNORM_FAIL_ALLOC is set. */
typedef struct {
    void *raw;
    unsigned char *end;
} ScratchHeader;

#ifdef FASTNORM_DEBUG
enum { SCRATCH_GUARD = 64, SCRATCH_GUARD_BYTE = 0xA5 };

static int scratch_fails(void) { return getenv("FASTNORM_FAIL_ALLOC") != NULL; }

static void scratch_mark(unsigned char *begin, unsigned char *end) {
    memset(begin, 0xFF, (size_t)(end - begin)); /* NaN in either dtype */
    memset(end, SCRATCH_GUARD_BYTE, SCRATCH_GUARD);
    ASAN_POISON_MEMORY_REGION(end, SCRATCH_GUARD);
}

static void scratch_check(const unsigned char *end) {
    ASAN_UNPOISON_MEMORY_REGION(end, SCRATCH_GUARD);
    for (int i = 0; i < SCRATCH_GUARD; i++) {
        if (end[i] != SCRATCH_GUARD_BYTE) {
            fprintf(stderr, "fastnorm: byte %d behind scratch memory was written\n", i);
            abort();
        }
    }
}
#else
enum { SCRATCH_GUARD = 0 };
static int scratch_fails(void) { return 0; }
static void scratch_mark(unsigned char *begin, unsigned char *end) { (void)begin, (void)end; }
static void scratch_check(const unsigned char *end) { (void)end; }
#endif

static void *scratch_alloc(size_t bytes) {
    if (scratch_fails()) return NULL;
    ScratchHeader header = {malloc(bytes + 63 + sizeof header + SCRATCH_GUARD), NULL};
    if (header.raw == NULL) return NULL;
    unsigned char *aligned = (unsigned char *)(((uintptr_t)header.raw + sizeof header + 63) & ~(uintptr_t)63);
    header.end = aligned + bytes;
    memcpy(aligned - sizeof header, &header, sizeof header);
    scratch_mark(aligned, header.end);
    return aligned;
}

static void scratch_free(void *scratch) {
    if (scratch == NULL) return;
    ScratchHeader header;
    memcpy(&header, (unsigned char *)scratch - sizeof header, sizeof header);
    scratch_check(header.end);
    free(header.raw);
}

#include "team.h"

/* -- subnormal numbers ---------------------------------------------------------------------------------------------- */

/* Intel's processors leave subnormal numbers to microcode, which takes a vector 100 cycles, in every operation but comparisons
   and conversions. Kernels that can go around ask `met_subnormals` after each piece of work whether there were any, and
   `expect_subnormals` before the first. */
static int subnormals_slow;
static void assume_subnormals(int slow) { /* 1, 0, or -1: as this processor is */
#if defined(FASTNORM_X86) && defined(__GNUC__)
    __builtin_cpu_init();
    subnormals_slow = slow < 0 ? __builtin_cpu_is("intel") != 0 : slow;
#elif defined(FASTNORM_X86)
    subnormals_slow = slow < 0 ? 1 : slow;
#else
    subnormals_slow = slow > 0;
#endif
}

/* For how many pieces of work yet. */
static FASTNORM_THREAD_LOCAL int subnormals_expected;

#ifdef FASTNORM_X86
enum { DENORMAL_OPERAND = 1 << 1, UNDERFLOW_FLAG = 1 << 4, FLUSH_OPERANDS = 1 << 6, FLUSH_RESULTS = 1 << 15 };
/* Not where the caller has them flushed to zero, as torch.set_flush_denormal does: nothing is slow then, and what goes around
   would not flush. */
static int expect_subnormals(void) {
    return subnormals_slow && subnormals_expected && !(_mm_getcsr() & (FLUSH_OPERANDS | FLUSH_RESULTS));
}

/* Whether this thread computed with subnormal numbers, or got them, since the last call, or not more than `hold` calls ago; by
   the processor's sticky flags, which are cleared here, and which a product that is rounded to 0 raises too. A loop that
   goes around raises none by results alone: it has to be held. */
static int met_subnormals(int hold) {
    if (!subnormals_slow) return 0;
    const unsigned flags = _mm_getcsr();
    if (flags & (DENORMAL_OPERAND | UNDERFLOW_FLAG)) {
        _mm_setcsr(flags & ~(unsigned)(DENORMAL_OPERAND | UNDERFLOW_FLAG));
        subnormals_expected = flags & (FLUSH_OPERANDS | FLUSH_RESULTS) ? 0 : 1 + hold;
    } else if (subnormals_expected) {
        subnormals_expected--;
    }
    return subnormals_expected != 0;
}
#else
static int expect_subnormals(void) { return 0; }
static int met_subnormals(int hold) {
    (void)hold;
    return 0;
}
#endif

/* 1, out of the compiler's sight: GCC finds that the sum or product of two floats, computed in double and rounded to float, is
   the same in float, and computes it there, which is what is to be avoided. One factor of 1 hides it. */
static volatile double hidden_one = 1;

/* muladd_f32(a, b, c) without subnormal operands, which a conversion to double does not count as; the same bits. a is a
   float, one is hidden_one. A double rounds a*b + c before the result does; it is made odd where that
   changed it, and then the second rounding ends where one alone would have (Boldo and Melquiond 2008). */
FASTNORM_INLINE float muladd_through_double(double a, float b, float c, double one) {
    const double product = a * (double)b; /* exact */
#if FUSED_MULADD
    const double sum = product + (double)c, part = sum - product;
    const double low = (product - (sum - part)) + ((double)c - part); /* Knuth's TwoSum; NaN where the sum is infinite */
    uint64_t bits, low_bits;
    double odd;
    memcpy(&bits, &sum, sizeof bits);
    memcpy(&low_bits, &low, sizeof bits);
    const uint64_t odd_bits = (bits - ((bits ^ low_bits) >> 63)) | 1;
    bits = LESS_OR_GREATER(low, 0) ? odd_bits : bits;
    memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
#else
    return (float)(one * (double)(float)product + (double)c);
#endif
}

#include "philox.h"

/* -- per dtype ------------------------------------------------------------------------------------------------------ */

/* Partial sums of a reduction, for either dtype: four AVX-512 registers of floats. GCC keeps them in registers. */
#define LANES 64

/* What follows batch norm; norm.py has the names. */
enum { ACTIVATION_NONE = 0, ACTIVATION_RELU = 1, ACTIVATION_LEAKY_RELU = 2 };

/* Rows of batch norm's table of parameters: entry (row, j) is p[row * ld + j]. Forward uses the first four. */
enum { BN_MEAN_HI, BN_MEAN_LO, BN_SCALE, BN_BETA, BN_DZ_MEAN, BN_SLOPE_X, BN_ROWS };
/* Rows of batch norm's wide table, of doubles: what does not fit a float, and 1 / std. */
enum { BN_INV_STD, BN_WIDE_MEAN, BN_WIDE_SCALE, BN_WIDE_ROWS };
/* Activations that are functions of their own only; batch norm fuses the three above. */
enum { ACTIVATION_ELU = 3, ACTIVATION_CELU = 4, ACTIVATION_SIGMOID = 5, ACTIVATION_TANH = 6 };

#define real float
#define uint_of_real uint32_t
#define FN(name) name##_f32
#include "vector.h"
#undef real
#undef uint_of_real
#undef FN

#define FASTNORM_DOUBLE
#define real double
#define uint_of_real uint64_t
#define FN(name) name##_f64
#include "vector.h"
#undef real
#undef uint_of_real
#undef FN
#undef FASTNORM_DOUBLE

#else /* ==== the template, included twice by the part above ========================================================= */

/* a*b + c: fused where the level has it in hardware. Only where both ways are within the stated accuracy. */
FASTNORM_INLINE real FN(muladd)(real a, real b, real c) {
#if FUSED_MULADD
#ifdef FASTNORM_DOUBLE
    return __builtin_fma(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
#else
    return a * b + c;
#endif
}

static const real FN(least_normal) = sizeof(real) == 4 ? (real)FLT_MIN : (real)DBL_MIN;

FASTNORM_INLINE real FN(absolute)(real x) { return sizeof(real) == 4 ? (real)fabsf((float)x) : (real)fabs((double)x); }

/* 0 where the condition holds, else x. To compute with subnormal numbers is slow, also where the result is not used. Bits,
   because a compiler would see through a conditional expression whose 0 is not used in the end, and compute with x. */
FASTNORM_INLINE real FN(unless)(int condition, real x) {
    uint_of_real bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= (uint_of_real)condition - 1;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* a where the condition holds, else b. Bits, because a compiler moves an operation on the result, a division even, into both
   branches where it then is done twice. */
FASTNORM_INLINE real FN(choose)(int condition, real a, real b) {
    uint_of_real bits, other;
    const uint_of_real mask = (uint_of_real)0 - (uint_of_real)condition;
    memcpy(&bits, &a, sizeof bits);
    memcpy(&other, &b, sizeof other);
    bits = (bits & mask) | (other & ~mask);
    memcpy(&a, &bits, sizeof a);
    return a;
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

/* -- exp -------------------------------------------------------------------------------------------------------------- */

#ifdef FASTNORM_DOUBLE
#define EXP_BIAS 1023
#define EXP_SHIFT 52
#define EXP_MAGIC 6755399441055744.0
#define EXP_TINY 0x1p-55 /* e**x rounds to 1 there */
#define EXP_LN2_HI 6.93145751953125e-1
#define EXP_LN2_LO 1.42860682030941723212e-6
#else
#define EXP_BIAS 127
#define EXP_SHIFT 23
#define EXP_MAGIC 12582912.0f
#define EXP_TINY 0x1p-26f
#define EXP_LN2_HI 0.693359375f
#define EXP_LN2_LO -2.12194440e-4f
#endif

/* 2**n as a * b, neither of which is beyond the range where 2**n is; n_plus_bias2 = n + 2*EXP_BIAS is never negative, and
   so is halved without a signed shift, which AVX2 lacks for 64 bits. */
FASTNORM_INLINE void FN(two_powers_of_two)(uint_of_real n_plus_bias2, real *a, real *b) {
    const uint_of_real half = n_plus_bias2 >> 1;
    const uint_of_real first = half << EXP_SHIFT, second = (n_plus_bias2 - half) << EXP_SHIFT;
    memcpy(a, &first, sizeof *a);
    memcpy(b, &second, sizeof *b);
}

/* p * 2**n without branches, for any n whose result, underflow or overflow is wanted. */
FASTNORM_INLINE real FN(scale_by_power_of_two)(real p, uint_of_real n_plus_bias2) {
    real a, b;
    FN(two_powers_of_two)(n_plus_bias2, &a, &b);
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

/* Reduction by Cody and Waite, for any unit: x = n*period + r + low, where period = ln 2 times the unit in two numbers, the
   upper one short enough for an exact product with n, t is x in that unit, roughly, and low is what rounding r left.
   Returns r, and n + 2*EXP_BIAS. */
FASTNORM_INLINE real FN(exp_reduce_low)(real x, real t, real period_hi, real period_lo, uint_of_real *n_plus_bias2,
                                        real *low) {
    const real magic = EXP_MAGIC, shifted = t * (real)1.4426950408889634 + magic;
    const real n = shifted - magic;
    uint_of_real bits, magic_bits;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&magic_bits, &magic, sizeof bits);
    *n_plus_bias2 = bits - magic_bits + 2 * EXP_BIAS;
    const real upper = FN(muladd)(n, -period_hi, x), r = FN(muladd)(n, -period_lo, upper);
    *low = FN(muladd)(n, -period_lo, upper - r);
    return r;
}
FASTNORM_INLINE real FN(exp_reduce)(real x, real t, real period_hi, real period_lo, uint_of_real *n_plus_bias2) {
    real low;
    return FN(exp_reduce_low)(x, t, period_hi, period_lo, n_plus_bias2, &low);
}

/* -- the activations that batch norm fuses ---------------------------------------------------------------------------- */

/* act(z), and act'(z) * dy. Comparisons are written so that NaN passes through. */
FASTNORM_INLINE real FN(activate)(real z, int activation, real slope) {
    if (activation == ACTIVATION_RELU) return z <= 0 ? 0 : z;
    if (activation == ACTIVATION_LEAKY_RELU) return z <= 0 ? z * slope : z;
    return z;
}
/* ReLU's slope is 0, but the compiler must not know: of "z <= 0 ? 0 : dy" GCC makes a load that waits for z (a masked
   one), and memory does one thing after another: 48 GB/s instead of 75. Bits, because 0 * inf is NaN. */
FASTNORM_INLINE real FN(activate_gradient)(real dy, real z, int activation, real slope) {
    if (activation == ACTIVATION_RELU) {
        uint_of_real bits, none;
        memcpy(&bits, &dy, sizeof bits);
        memcpy(&none, &slope, sizeof none);
        bits = z <= 0 ? bits & none : bits;
        memcpy(&dy, &bits, sizeof bits);
        return dy;
    }
    if (activation == ACTIVATION_LEAKY_RELU) return z <= 0 ? dy * slope : dy;
    return dy;
}

/* The loops of each kernel, one file a subject. */
#include "batchnorm.h"
#include "softmax.h"
#include "activation.h"

#undef EXP_BIAS
#undef EXP_SHIFT
#undef EXP_MAGIC
#undef EXP_TINY
#undef EXP_LN2_HI
#undef EXP_LN2_LO
#undef SOFTMAX_UNIT

#endif
