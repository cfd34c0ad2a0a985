/* Inner loops of activation.pyx, for float and double: a part of vector.h's template. */

/* Splits ln 2 times a unit for exp_reduce. */
static void FN(exp_period)(double unit, real *hi, real *lo) {
    double upper = unit * 0.6931471805599453;
    uint64_t bits;
    memcpy(&bits, &upper, sizeof bits);
    bits &= ~(uint64_t)0 << (sizeof(real) == 4 ? 41 : 11); /* what n, of 8 or 11 bits, leaves free of 24 or 53 */
    memcpy(&upper, &bits, sizeof upper);
    *hi = (real)upper;
    *lo = (real)(fma(unit, 6.93145751953125e-1, -upper) + unit * 1.42860682030941723212e-6);
}

/* T(r) = (e**r - 1 - r) / r**2 for |r| <= ln(2)/2 (1 + 2**-11): minimax in the error relative to e**r (bench/fit_expm1.py),
   2**-29.8 for float and 2**-60.2 for double, of which rounding the coefficients is most. */
FASTNORM_INLINE real FN(exp_tail)(real r) {
#ifdef FASTNORM_DOUBLE
    real p = 2.0826599421577516e-09;
    p = FN(muladd)(p, r, 2.5112083237466785e-08);
    p = FN(muladd)(p, r, 2.7557582212141034e-07);
    p = FN(muladd)(p, r, 2.7557234731309124e-06);
    p = FN(muladd)(p, r, 2.480158692582369e-05);
    p = FN(muladd)(p, r, 0.00019841269896511828);
    p = FN(muladd)(p, r, 0.001388888888911629);
    p = FN(muladd)(p, r, 0.008333333333316983);
    p = FN(muladd)(p, r, 0.041666666666666095);
    p = FN(muladd)(p, r, 0.16666666666666682);
#else
    real p = 0.00019790299120359123f;
    p = FN(muladd)(p, r, 0.0013944702222943306f);
    p = FN(muladd)(p, r, 0.008333497680723667f);
    p = FN(muladd)(p, r, 0.04166629537940025f);
    p = FN(muladd)(p, r, 0.1666666567325592f);
#endif
    return FN(muladd)(p, r, (real)0.5);
}

/* e**x - 1 for x <= 0 without cancellation: x = n ln 2 + r + low, where low is what rounding r left, then
   (2**n - 1) + 2**n r + 2**n (low + r**2 T(r)). The last term is so much smaller than the others that its own roundings hardly
   count, and what rounding the sum of the others left is added to it (Dekker 1971, Fast2Sum): at most 0.9 ulp. NaN passes;
   the sign of zero does not. */
FASTNORM_INLINE real FN(expm1_nonpositive)(real x) {
    const real bottom = sizeof(real) == 4 ? -20 : -40; /* the result is -1 there */
    const real y = x < bottom ? bottom : x;
    real low;
    uint_of_real n_plus_bias2;
    const real r = FN(exp_reduce_low)(y, y, EXP_LN2_HI, EXP_LN2_LO, &n_plus_bias2, &low);
    const uint_of_real bits = (n_plus_bias2 - EXP_BIAS) << EXP_SHIFT;
    real power;
    memcpy(&power, &bits, sizeof power);
    const real whole = power - 1, part = power * r, sum = whole + part;
    return sum + FN(muladd)(power, FN(muladd)(FN(exp_tail)(r), r * r, low), (whole - sum) + part);
}

/* dy * gain * e**(x/alpha) for x <= 0 that is not subnormal (slow) and gain = mantissa * 2**exponent. Half of the power of
   two goes to dy: a slope too small for a float is not lost where a large dy makes a normal product of it. x/alpha itself
   is not formed: its rounding at -80 alone would cost 40 ulp. At most 3 ulp.

   inverse, period_hi, period_lo : 1/alpha and exp_period of alpha
   lowest : alpha * lowest_exponent(exponent); below, the slope stays what it is there, 2**-251 (2**-2043 in double)
   vanishing : alpha * SLOPE_VANISHES; below, the slope is 0 */
FASTNORM_INLINE real FN(times_slope)(real dy, real x, real inverse, real period_hi, real period_lo, real lowest,
                                     real vanishing, real mantissa, int exponent) {
    const real limited = x < lowest ? lowest : x; /* written so that NaN passes */
    uint_of_real n_plus_bias2;
    const real r = FN(exp_reduce)(limited, limited * inverse, period_hi, period_lo, &n_plus_bias2) * inverse;
    real a, b;
    FN(two_powers_of_two)(n_plus_bias2 + (uint_of_real)exponent, &a, &b);
    const real rest = FN(exp_polynomial)(r) * mantissa * b;
    return (dy * a) * (x < vanishing ? 0 : rest);
}
#define SLOPE_VANISHES -1490.2664382038824 /* e**(x/2), squared in the twin, is 0 in double below this */

/* The least x of whose power of two, times 2**exponent, both halves are normal numbers. */
static double FN(lowest_exponent)(int exponent) { return (3 - 2 * EXP_BIAS - exponent) * 0.6931471805599453; }

/* 1 / (1 + e**-x), from e**-|x| so that nothing overflows and the left tail keeps its relative accuracy. */
FASTNORM_INLINE real FN(sigmoid)(real x) {
    const real a = FN(absolute)(x), e = FN(exp_in_units)(-FN(unless)(a < EXP_TINY, a));
    return FN(choose)(x >= 0, (real)SOFTMAX_UNIT, e) / ((real)SOFTMAX_UNIT + e);
}

FASTNORM_INLINE real FN(with_sign)(real x, real sign) {
    return sizeof(real) == 4 ? (real)copysignf((float)x, (float)sign) : (real)copysign((double)x, (double)sign);
}

/* For |x| <= 3/4, x + x**3 P(x**2) / Q(x**2): minimax in relative error (bench/fit_tanh.py), 2**-36 for float and 2**-67
   for double before rounding. Beyond, 1 - 2 e / (1 + e) from e = e**(-2|x|). Either way a quotient of less than 0.6 of the
   result is added last, so that the roundings in it count less than one at the end: at most 1.5 ulp. One division serves
   both. */
FASTNORM_INLINE real FN(tanh)(real x) {
    const real a = FN(absolute)(x), b = FN(unless)(a < EXP_TINY, a), z = b * b; /* tanh x is x there */
    const real e = FN(exp_in_units)(-2 * b);
#ifdef FASTNORM_DOUBLE
    real p = -1.7377518777645974e-08;
    p = FN(muladd)(p, z, -0.00024358508377471437);
    p = FN(muladd)(p, z, -0.02141587138420524);
    p = FN(muladd)(p, z, -0.3333333333333333);
    real q = 0.00025463390981707496;
    q = FN(muladd)(q, z, 0.02452503900761055);
    q = FN(muladd)(q, z, 0.4642476141526156);
#else
    real p = -0.014742882181670927f;
    p = FN(muladd)(p, z, -0.3333333327380975f);
    real q = 0.015786881906308455f;
    q = FN(muladd)(q, z, 0.44422861299337923f);
#endif
    q = FN(muladd)(q, z, 1);
    const int within = a <= (real)0.75;
    const real dividend = within ? b * z * p : -2 * e, divisor = within ? q : (real)SOFTMAX_UNIT + e;
    return FN(with_sign)((within ? a : 1) + dividend / divisor, x);
}

/* From -tiny on, e**x - 1 is x and slopes are 1, to the last bit; tiny is EXP_TINY, for CELU times alpha. */
FASTNORM_INLINE real FN(elu)(real x, real alpha) {
    const real below = FN(expm1_nonpositive)(FN(unless)(x > -EXP_TINY, x));
    return x > 0 ? x : alpha * (x > -EXP_TINY ? x : below);
}
FASTNORM_INLINE real FN(elu_gradient)(real dy, real x, real lowest, real mantissa, int exponent) {
    const real below = FN(times_slope)(dy, x > -EXP_TINY ? 0 : x, 1, EXP_LN2_HI, EXP_LN2_LO, lowest, SLOPE_VANISHES,
                                       mantissa, exponent);
    return x > 0 ? dy : below;
}
FASTNORM_INLINE real FN(celu)(real x, real alpha, real tiny) {
    const real below = alpha * FN(expm1_nonpositive)(FN(unless)(x > -tiny, x) / alpha);
    return x > -tiny ? x : below;
}
FASTNORM_INLINE real FN(celu_gradient)(real dy, real x, real inverse, real period_hi, real period_lo, real tiny,
                                       real lowest, real vanishing) {
    const int linear = x > -tiny;
    const real below = FN(times_slope)(FN(unless)(linear, dy), linear ? 0 : x, inverse, period_hi, period_lo, lowest,
                                       vanishing, 1, 0);
    return linear ? dy : below;
}
/* a*b. With care, floats are multiplied in double, where none is subnormal: the same bits. */
FASTNORM_INLINE real FN(product)(real a, real b, int careful, double one) {
    return careful && sizeof(real) == 4 ? (real)(one * (double)a * (double)b) : a * b;
}
FASTNORM_INLINE real FN(leaky)(real passed, real z, real slope, int careful, double one) {
    const real below = FN(product)(passed, slope, careful, one);
    return z <= 0 ? below : passed;
}
/* From y, in an order of the factors in which no product overflows and no difference cancels. */
FASTNORM_INLINE real FN(sigmoid_gradient)(real dy, real y, int careful, double one) {
    const real of = careful ? FN(unless)(FN(absolute)(y) < EXP_TINY, y) : y;
    return FN(product)(FN(product)(dy, 1 - of, careful, one), y, careful, one);
}
/* 1 - y*y, which without a fused operation would lose its digits near 1. */
FASTNORM_INLINE real FN(tanh_gradient)(real dy, real y, int careful, double one) {
    const real of = careful ? FN(unless)(FN(absolute)(y) < EXP_TINY, y) : y;
    return FN(product)(dy, FUSED_MULADD ? FN(muladd)(-of, of, 1) : (1 - of) * (1 + of), careful, one);
}

#define ELEMENTWISE(EXPRESSION) \
    { \
        SIMD \
        for (ptrdiff_t i = 0; i < n; i++) y[i] = EXPRESSION; \
        return; \
    }

/* IN x[n], OUT y[n], which may be x. The factor is the slope or alpha. careful: subnormals are likely; the same bits. */
static void FN(activation)(int kind, const real *x, real *y, ptrdiff_t n, double factor, int careful) {
    const real a = (real)factor;
    const double one = hidden_one;
    switch (kind) {
    case ACTIVATION_RELU: ELEMENTWISE(FN(activate)(x[i], ACTIVATION_RELU, 0))
    case ACTIVATION_LEAKY_RELU:
        if (careful) ELEMENTWISE(FN(leaky)(x[i], x[i], a, 1, one))
        ELEMENTWISE(FN(activate)(x[i], ACTIVATION_LEAKY_RELU, a))
    case ACTIVATION_CELU:
        if (a != 1) ELEMENTWISE(FN(celu)(x[i], a, a * EXP_TINY))
        ELEMENTWISE(FN(elu)(x[i], 1)) /* the same */
    case ACTIVATION_ELU:
        if (a != 1) ELEMENTWISE(FN(elu)(x[i], a))
        ELEMENTWISE(FN(elu)(x[i], 1))
    case ACTIVATION_SIGMOID: ELEMENTWISE(FN(sigmoid)(x[i]))
    case ACTIVATION_TANH: ELEMENTWISE(FN(tanh)(x[i]))
    }
}

/* IN dy[n], x[n] (for sigmoid and tanh: their output), OUT y[n], which may be dy. */
static void FN(activation_backward)(int kind, const real *dy, const real *x, real *y, ptrdiff_t n, double factor,
                                    int careful) {
    const real a = (real)factor;
    const double one = hidden_one;
    switch (kind) {
    case ACTIVATION_RELU: ELEMENTWISE(FN(activate_gradient)(dy[i], x[i], ACTIVATION_RELU, a))
    case ACTIVATION_LEAKY_RELU:
        if (careful) ELEMENTWISE(FN(leaky)(dy[i], x[i], a, 1, one))
        ELEMENTWISE(FN(activate_gradient)(dy[i], x[i], ACTIVATION_LEAKY_RELU, a))
    case ACTIVATION_ELU: {
        int exponent; /* 0 or that of a mantissa of at least 1, so that dy overflows alone only where the product does */
        const real mantissa = (real)(2 * frexp(factor, &exponent)), lowest = (real)FN(lowest_exponent)(--exponent);
        if (a != 1) ELEMENTWISE(FN(elu_gradient)(dy[i], x[i], lowest, mantissa, exponent))
        ELEMENTWISE(FN(celu_gradient)(dy[i], x[i], 1, EXP_LN2_HI, EXP_LN2_LO, EXP_TINY, lowest, SLOPE_VANISHES))
    }
    case ACTIVATION_CELU: {
        const real inverse = (real)(1 / factor), tiny = (real)(factor * EXP_TINY);
        const real lowest = (real)(factor * FN(lowest_exponent)(0)), vanishing = (real)(factor * SLOPE_VANISHES);
        real hi, lo;
        FN(exp_period)(factor, &hi, &lo);
        ELEMENTWISE(FN(celu_gradient)(dy[i], x[i], inverse, hi, lo, tiny, lowest, vanishing))
    }
    case ACTIVATION_SIGMOID:
        if (careful) ELEMENTWISE(FN(sigmoid_gradient)(dy[i], x[i], 1, one))
        ELEMENTWISE(FN(sigmoid_gradient)(dy[i], x[i], 0, one))
    case ACTIVATION_TANH:
        if (careful) ELEMENTWISE(FN(tanh_gradient)(dy[i], x[i], 1, one))
        ELEMENTWISE(FN(tanh_gradient)(dy[i], x[i], 0, one))
    }
}

#undef ELEMENTWISE
#undef SLOPE_VANISHES

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
