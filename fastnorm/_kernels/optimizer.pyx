"""Optimizer updates in place over whole lists of parameters: momentum, RMSProp, Adam, Adagrad; gradient clipping and a
look for values that are not finite.

Twins: fastnorm/reference/updates.py, under the names of the public functions.

# Design:
# - One call takes the whole list and runs one parallel region over its tiles. A tile is a run of at most TILE elements
#   of one parameter with the addresses of its arrays, so float32 and float64 parameters may follow each other.
#   Every element is computed by itself; the tiles of the norm depend on the sizes alone, and their sums are added up in
#   their order: the same bits for every thread count and address.
# - The arrays of one parameter are dense and laid out alike, so an update is a loop over flat memory.
# - Constants (bias corrections, 1 - beta, ...) are computed in double and rounded once to the parameter's dtype.
#   A choice that adds or drops an array is a constant argument of its loop, so that each combination is compiled for
#   itself, without a branch; a choice of arithmetic alone is a select, or a constant of 0 or 1 (adding 0 and
#   multiplying by 1 are exact). GCC vectorizes every loop here at every level.
# - Arithmetic with subnormal floats takes Intel's processors 100 times as long, and a moving average of a gradient that
#   has become 0 ends among them and stays there: 0.9 times the least four of them rounds to itself. So each loop is
#   compiled once more for floats, to compute in double what it rounds to float after every operation: the same bits,
#   and no subnormal operand. The processor's own flags say when a block should have taken it: see `watched`.
"""

cimport numpy as cnp
from cython.parallel cimport parallel, threadid
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport expm1, fabs, fabsf, log, sqrt, sqrtf

from .vector cimport (
    Shares, Team, Turn, expect_subnormals, fits, hidden_one, met_subnormals, muladd_f32, muladd_f64,
    muladd_through_double, next_tile, real, scratch_alloc, scratch_free, share_out, sum_squares, team_close, team_mark,
    team_open, turn_of,
)

include "common.pxi"

cnp.import_array()

cdef enum:
    # Elements of a tile: enough to hide the handing out, few enough to share a layer among threads. A long list takes
    # longer ones, for the processor's prefetch begins anew in each: Adam on 25,000,000 is 2 to 4 % faster.
    TILE = 16384
    LONG_TILE = 131072
    TILES = 64  # of a long list
    # Elements of a whole list that one thread updates alone: below, a second one saves nothing. Momentum on 100,000:
    # 13 us alone, 8 us by two.
    SMALL = 65536
    LINE = 64
    ARRAYS = 5  # at most, of one parameter
    # Elements between two looks for subnormals: the first few of a tile, and then so many that a look costs nothing.
    PROBE = 64
    BLOCK = 4096

# What is computed with: `real` itself, or double for floats. Every result is rounded to `real`.
ctypedef fused work:
    float
    double

# What a tile is: a run of `n` elements at the same place of each array of one parameter.
cdef struct Tile:
    void* array[ARRAYS]
    Py_ssize_t n
    bint is_float32
    double sum  # of a reduction over this tile
    bint found  # whether a search met what it looks for in this tile

cdef struct Tiles:
    Tile* tile
    Py_ssize_t n
    Py_ssize_t elements

# careful: whether subnormals are likely here, which changes no bit.
ctypedef void (*TileKernel)(Tile* t, const void* constants, bint careful) noexcept nogil

# -- tiles -------------------------------------------------------------------------------------------------------------

cdef Tiles cut(tuple lists, bint by_lines) except *:
    """Tiles of a whole list of parameters. ``lists``: one tuple of arrays an argument, or None where it is absent.

    by_lines: the first tile of an array is longer, so that the others begin where a cache line does, for a vector that
    spans two costs a few percent of the speed of memory; there may be one tile less than counted. Not for sums, whose
    bits are the same for any address, and of any other arrays in the list.
    """
    cdef Py_ssize_t n = len(<tuple> lists[0]), n_lists = len(lists), size, start, stop, head, i, j, longest = TILE
    cdef cnp.ndarray a
    cdef bint is_float32
    cdef Tiles tiles
    cdef Tile* t
    tiles.n = tiles.elements = 0
    for i in range(n):
        size = cnp.PyArray_SIZE(<cnp.ndarray> (<tuple> lists[0])[i])
        tiles.elements += size
    if by_lines:
        longest = max(<Py_ssize_t> TILE, min(<Py_ssize_t> LONG_TILE, tiles.elements // TILES))
    for i in range(n):
        tiles.n += (cnp.PyArray_SIZE(<cnp.ndarray> (<tuple> lists[0])[i]) + longest - 1) // longest
    tiles.tile = <Tile*> scratch_alloc(max(tiles.n, 1) * sizeof(Tile))
    if tiles.tile is NULL:
        raise MemoryError("fastnorm: no memory for the tiles of an optimizer call")
    t = tiles.tile
    for i in range(n):
        a = <cnp.ndarray> (<tuple> lists[0])[i]
        size = cnp.PyArray_SIZE(a)
        for j in range(n_lists):
            assert lists[j] is None or fits((<tuple> lists[j])[i], size, a)
        is_float32 = cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32
        head = 0
        if by_lines:
            head = <Py_ssize_t> ((0 - <size_t> cnp.PyArray_BYTES(a)) % LINE) // cnp.PyArray_ITEMSIZE(a)
        start = 0
        while start < size:
            stop = min(size, start + longest + head if start == 0 else start + longest)
            t.n = stop - start
            t.is_float32 = is_float32
            for j in range(n_lists):
                t.array[j] = NULL if lists[j] is None else (
                    cnp.PyArray_BYTES(<cnp.ndarray> (<tuple> lists[j])[i]) + start * cnp.PyArray_ITEMSIZE(a))
            for j in range(n_lists, ARRAYS):
                t.array[j] = NULL
            t += 1
            start = stop
    tiles.n = t - tiles.tile
    return tiles


cdef void watched(Tile* t, TileKernel kernel, const void* constants) noexcept nogil:
    """The kernel on a tile, block by block, each careful if this thread's last one met subnormals."""
    cdef Tile block = t[0]
    cdef Py_ssize_t done = 0, j
    cdef bint careful = expect_subnormals()
    if t.n <= BLOCK:
        kernel(t, constants, careful)
        met_subnormals(0)
        return
    while done < t.n:
        block.n = min(<Py_ssize_t> BLOCK if done else <Py_ssize_t> PROBE, t.n - done)
        kernel(&block, constants, careful)
        careful = met_subnormals(0)
        done += block.n
        for j in range(ARRAYS):
            if block.array[j] is not NULL:
                block.array[j] = <float*> block.array[j] + block.n


cdef inline void whole(Tile* t, TileKernel kernel, const void* constants, bint elementwise) noexcept nogil:
    if elementwise and t.is_float32:
        watched(t, kernel, constants)
    else:
        kernel(t, constants, False)


cdef void share_by_elements(Shares* shares, Tiles tiles, int threads) noexcept nogil:
    """Shares of about equal numbers of elements."""
    cdef Py_ssize_t seen = 0, t = 0
    cdef int i
    share_out(shares, 0, threads)
    for i in range(shares.n):
        shares.share[i].next = t
        while t < tiles.n and (seen + tiles.tile[t].n // 2) * shares.n < tiles.elements * (i + 1):
            seen += tiles.tile[t].n
            t += 1
        shares.share[i].end = t
    shares.share[shares.n - 1].end = tiles.n


cdef void take_part(Tiles tiles, TileKernel kernel, const void* constants, bint elementwise, Shares* shares, int thread,
                    Team* team) noexcept nogil:
    """One thread's part."""
    cdef Turn turn = turn_of(shares, thread)
    cdef Py_ssize_t t = next_tile(shares, &turn)
    while t >= 0:
        whole(&tiles.tile[t], kernel, constants, elementwise)
        team_mark(team)
        t = next_tile(shares, &turn)


cdef void run(Tiles tiles, TileKernel kernel, const void* constants, bint elementwise, int threads) noexcept nogil:
    """The kernel on every tile. elementwise: it may be cut further."""
    cdef Py_ssize_t t
    cdef Team team = team_open(1 if tiles.elements <= SMALL else threads, tiles.elements * 16.0)
    cdef Team* watch = &team
    cdef Shares shares
    cdef Shares* shared = &shares
    if team.size == 1:
        for t in range(tiles.n):
            whole(&tiles.tile[t], kernel, constants, elementwise)
    else:
        share_by_elements(shared, tiles, team.size)
        with parallel(num_threads=team.size):
            take_part(tiles, kernel, constants, elementwise, shared, threadid(), watch)
    team_close(watch)


cdef int update(tuple lists, TileKernel kernel, const void* constants, int threads) except -1:
    """Cut the lists and run the kernel, without the GIL."""
    cdef Tiles tiles = cut(lists, True)
    with nogil:
        run(tiles, kernel, constants, True, threads)
        scratch_free(tiles.tile)
    return 0


# -- elementwise mathematics -------------------------------------------------------------------------------------------
# `one` is 1 in the type that is computed with, `hidden_one` where that is double for floats. Sums, products, quotients
# and roots of floats that are rounded to double first are the same bits; see muladd_through_double for the rest.

cdef inline real muladd(work a, real b, real c, work one) noexcept nogil:
    if real is float and work is float:
        return muladd_f32(a, b, c)
    elif real is float:
        return muladd_through_double(a, b, c, one)
    else:
        return muladd_f64(a, b, c)


cdef inline real root(real x, work one) noexcept nogil:
    if work is float:
        return <real> sqrtf(<float> x)
    else:
        return <real> sqrt(one * x)


cdef inline real direction(real g, real p, work sign, work weight_decay) noexcept nogil:
    """Gradient to descend along: ±g + weight_decay * p. Without decay p is not looked at: 0 * inf is NaN."""
    return <real> (sign * g + <real> (weight_decay * p)) if weight_decay != 0 else <real> (sign * g)


cdef inline real epsilon(real rounded, double eps) noexcept nogil:
    """Eps rounded to the parameter's dtype, but not to 0: what keeps 0 / 0 from being NaN."""
    return <real> 1.401298464324817e-45 if eps > 0 and rounded == 0 else rounded


cdef inline real maximum(real a, real b) noexcept nogil:
    """The larger one; NaN if either is. Two selects: `or` would be a branch, which GCC does not vectorize."""
    cdef real larger = a if a >= b else b  # b where b is NaN
    return a if a != a else larger


cdef inline double positive_part(double x) noexcept nogil:
    return 0.0 if x < 0 else x  # NaN passes


# A moving average, decay * a + (1 - decay) * x, is a + (1 - decay) * (x - a) where decay > 1/2: the constants' sum is 1
# however they are rounded (float32(0.999) alone moves Adam's v by 1.3e-5 in the end), and only the last sum rounds at
# the size of a. Up to 1/2 the formula is taken as it stands, for nothing of a must be left where decay is 0. `average`
# takes halves of x and a, whose difference overflows nowhere; `average_of_square` is given (1 - decay) * x and x, in
# this order, for x * x overflows from 1.8e19 on in float32. From an infinite average nothing is taken away: inf - inf
# is NaN.

cdef inline double kept(double decay) noexcept nogil:
    return 1.0 if decay > 0.5 else decay


cdef inline double taken_away(double decay) noexcept nogil:
    return 1.0 - decay if decay > 0.5 else 0.0


cdef inline double half_taken(double decay) noexcept nogil:
    return 0.5 if decay > 0.5 else 0.0


cdef inline real finite_or_none(real loss, work one) noexcept nogil:
    return loss if <real> (one * loss - loss) == 0 else <real> 0


cdef inline real average(real a, real x, work gain, work keep, work half, work one) noexcept nogil:
    cdef real loss = finite_or_none(<real> (half * a), one)
    return muladd(gain + gain, <real> (<real> (one * <real> 0.5 * x) - one * loss), <real> (keep * a), one)


cdef inline real average_of_square(real a, real gain_x, real x, work keep, work take, work one) noexcept nogil:
    cdef real loss = finite_or_none(<real> (take * a), one)
    return <real> (one * <real> (keep * a) + muladd(one * gain_x, x, -loss, one))


# -- momentum ----------------------------------------------------------------------------------------------------------
#   g = ±grad + weight_decay * p
#   v = momentum * v + (1 - dampening) * g
#   p = p - lr * (g + momentum * v if nesterov else v)
# PyTorch, torch.optim.SGD; Sutskever et al. 2013 for Nesterov's form. Without velocities, momentum is 0.

cdef struct MomentumConstants:
    double lr, momentum, gain, weight_decay, sign
    bint nesterov, has_velocity


cdef inline void momentum_loop(
    real* p,  # IN OUT
    const real* grad,  # IN
    real* v,  # IN OUT
    Py_ssize_t n, const MomentumConstants* c, const bint has_velocity, const bint nesterov, work one,
) noexcept nogil:
    cdef work lr = one * <real> c.lr, momentum = one * <real> c.momentum, gain = one * <real> c.gain
    cdef work weight_decay = one * <real> c.weight_decay, sign = one * <real> c.sign
    cdef work ahead = one * <real> (c.lr * c.momentum)
    cdef real g, velocity
    cdef Py_ssize_t i
    for i in range(n):
        g = direction(grad[i], p[i], sign, weight_decay)
        if has_velocity:
            velocity = muladd(momentum, v[i], <real> (gain * g), one)
            v[i] = velocity
        else:
            velocity = <real> (gain * g)
        # lr * (g + momentum * velocity) would overflow on its way to a finite number
        p[i] = (<real> (one * p[i] - muladd(lr, g, <real> (ahead * velocity), one)) if nesterov
                else muladd(-lr, velocity, p[i], one))


cdef inline void momentum_flags(real* p, const real* grad, real* v, Py_ssize_t n, const MomentumConstants* c,
                                work one) noexcept nogil:
    if c.has_velocity:
        if c.nesterov:
            momentum_loop(p, grad, v, n, c, True, True, one)
        else:
            momentum_loop(p, grad, v, n, c, True, False, one)
    else:
        if c.nesterov:
            momentum_loop(p, grad, v, n, c, False, True, one)
        else:
            momentum_loop(p, grad, v, n, c, False, False, one)


cdef void momentum_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    cdef const MomentumConstants* c = <const MomentumConstants*> constants
    if not t.is_float32:
        momentum_flags(<double*> t.array[0], <const double*> t.array[1], <double*> t.array[2], t.n, c, 1.0)
    elif careful:
        momentum_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], t.n, c, hidden_one)
    else:
        momentum_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], t.n, c, <float> 1)


def momentum(tuple params, tuple grads, tuple velocities, double lr, double momentum, double dampening, bint nesterov,
             double weight_decay, bint maximize, int threads):
    """``momentum_step`` on checked lists; ``velocities`` may be None."""
    cdef MomentumConstants c
    c.lr, c.momentum, c.gain, c.weight_decay = lr, momentum, 1.0 - dampening, weight_decay
    c.sign = -1.0 if maximize else 1.0
    c.nesterov, c.has_velocity = nesterov, velocities is not None
    update((params, grads, velocities), momentum_tile, &c, threads)


# -- RMSProp -----------------------------------------------------------------------------------------------------------
#   g = ±grad + weight_decay * p
#   s = alpha * s + (1 - alpha) * g**2
#   m = alpha * m + (1 - alpha) * g                        centered only; else read 0 for m
#   d = g / (sqrt(s - m**2) + eps)                         or g / sqrt(s - m**2 + eps)
#   b = momentum * b + d                                   with momentum only; else read d for b
#   p = p - lr * b
# Tieleman and Hinton 2012; Graves 2013, equations 38-41, for the centered form; PyTorch, torch.optim.RMSprop.

cdef struct RMSPropConstants:
    double lr, alpha, eps_inside, eps_outside, weight_decay, momentum, sign
    bint centered, has_momentum


cdef inline void rmsprop_loop(
    real* p,  # IN OUT
    const real* grad,  # IN
    real* s,  # IN OUT
    real* m,  # IN OUT
    real* b,  # IN OUT
    Py_ssize_t n, const RMSPropConstants* c, const bint centered, const bint has_momentum, work one,
) noexcept nogil:
    cdef work lr = one * <real> c.lr, gain = one * <real> (1.0 - c.alpha)
    cdef work keep = one * <real> kept(c.alpha), take = one * <real> taken_away(c.alpha)
    cdef work eps_inside = one * epsilon(<real> c.eps_inside, c.eps_inside)
    cdef work eps_outside = one * epsilon(<real> c.eps_outside, c.eps_outside)
    cdef work weight_decay = one * <real> c.weight_decay, sign = one * <real> c.sign
    cdef work momentum = one * <real> c.momentum
    cdef double wide_gain = 1.0 - c.alpha, wide_keep = kept(c.alpha), half = half_taken(c.alpha)
    cdef double wide_take = taken_away(c.alpha)
    cdef double wide_weight_decay = c.weight_decay, wide_sign = c.sign
    cdef real g, variance, d
    cdef double wide_g, square, mean
    cdef Py_ssize_t i
    for i in range(n):
        if centered:
            # In double: s - m**2 cancels where a gradient is steady, and its root magnifies what is left.
            wide_g = direction[double, double](grad[i], p[i], wide_sign, wide_weight_decay)
            square = average_of_square[double, double](s[i], wide_gain * wide_g, wide_g, wide_keep, wide_take, 1.0)
            mean = average[double, double](m[i], wide_g, wide_gain, wide_keep, half, 1.0)
            s[i] = <real> square
            m[i] = <real> mean
            g = <real> wide_g
            variance = <real> positive_part(square - mean * mean)
        else:
            g = direction(grad[i], p[i], sign, weight_decay)
            variance = average_of_square(s[i], <real> (gain * g), g, keep, take, one)
            s[i] = variance
        d = <real> (one * g / <real> (eps_outside + root(<real> (eps_inside + variance), one)))
        if has_momentum:
            d = muladd(momentum, b[i], d, one)
            b[i] = d
        p[i] = muladd(-lr, d, p[i], one)


cdef inline void rmsprop_flags(real* p, const real* grad, real* s, real* m, real* b, Py_ssize_t n,
                               const RMSPropConstants* c, work one) noexcept nogil:
    if c.centered:
        if c.has_momentum:
            rmsprop_loop(p, grad, s, m, b, n, c, True, True, one)
        else:
            rmsprop_loop(p, grad, s, m, b, n, c, True, False, one)
    else:
        if c.has_momentum:
            rmsprop_loop(p, grad, s, m, b, n, c, False, True, one)
        else:
            rmsprop_loop(p, grad, s, m, b, n, c, False, False, one)


cdef void rmsprop_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    cdef const RMSPropConstants* c = <const RMSPropConstants*> constants
    if not t.is_float32:
        rmsprop_flags(<double*> t.array[0], <const double*> t.array[1], <double*> t.array[2], <double*> t.array[3],
                      <double*> t.array[4], t.n, c, 1.0)
    elif careful:
        rmsprop_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], <float*> t.array[3],
                      <float*> t.array[4], t.n, c, hidden_one)
    else:
        rmsprop_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], <float*> t.array[3],
                      <float*> t.array[4], t.n, c, <float> 1)


def rmsprop(tuple params, tuple grads, tuple square_avgs, tuple grad_avgs, tuple momentum_buffers, double lr,
            double alpha, double eps, double weight_decay, double momentum, bint eps_inside_sqrt, bint maximize,
            int threads):
    """``rmsprop_step`` on checked lists; centered with ``grad_avgs``, with momentum if ``momentum_buffers``."""
    cdef RMSPropConstants c
    c.lr, c.alpha, c.weight_decay, c.momentum = lr, alpha, weight_decay, momentum
    c.eps_inside = eps if eps_inside_sqrt else 0.0
    c.eps_outside = 0.0 if eps_inside_sqrt else eps
    c.sign = -1.0 if maximize else 1.0
    c.centered, c.has_momentum = grad_avgs is not None, momentum_buffers is not None
    update((params, grads, square_avgs, grad_avgs, momentum_buffers), rmsprop_tile, &c, threads)


# -- Adam --------------------------------------------------------------------------------------------------------------
#   g = ±grad + weight_decay * p                           coupled (L2); g = ±grad and
#   p = (1 - lr * weight_decay) * p                        decoupled (AdamW)
#   m = beta1 * m + (1 - beta1) * g
#   v = beta2 * v + (1 - beta2) * g**2
#   w = v, or with amsgrad w = the largest v so far
#   p = p - lr * m / (1 - beta1**t) / (sqrt(w / (1 - beta2**t)) + eps)
# With r = sqrt(1 - beta2**t) this is p - (lr * r / (1 - beta1**t)) * m / (sqrt(w) + eps * r), and leaving out the last
# r gives the paper's epsilon hat: one loop, two values of eps.
# Kingma and Ba 2015, algorithm 1 and the end of section 2; Loshchilov and Hutter 2019 (AdamW); Reddi et al. 2018
# (AMSGrad); PyTorch, torch.optim.Adam and AdamW.

cdef struct AdamConstants:
    double step_size, beta1, beta2, eps, weight_decay, shrink, sign
    bint amsgrad


cdef inline void adam_loop(
    real* p,  # IN OUT
    const real* grad,  # IN
    real* m,  # IN OUT
    real* v,  # IN OUT
    real* v_max,  # IN OUT
    Py_ssize_t n, const AdamConstants* c, const bint amsgrad, work one,
) noexcept nogil:
    cdef work step_size = one * <real> c.step_size, shrink = one * <real> c.shrink
    cdef work eps = one * epsilon(<real> c.eps, c.eps)
    cdef work gain1 = one * <real> (1.0 - c.beta1), gain2 = one * <real> (1.0 - c.beta2)
    cdef work keep1 = one * <real> kept(c.beta1), half1 = one * <real> half_taken(c.beta1)
    cdef work keep2 = one * <real> kept(c.beta2), take2 = one * <real> taken_away(c.beta2)
    cdef work weight_decay = one * <real> c.weight_decay, sign = one * <real> c.sign
    cdef real g, mean, square, quotient
    cdef Py_ssize_t i
    for i in range(n):
        g = direction(grad[i], p[i], sign, weight_decay)
        mean = average(m[i], g, gain1, keep1, half1, one)
        square = average_of_square(v[i], <real> (gain2 * g), g, keep2, take2, one)
        m[i] = mean
        v[i] = square
        if amsgrad:
            square = maximum(v_max[i], square)
            v_max[i] = square
        quotient = <real> (one * mean / <real> (eps + root(square, one)))
        p[i] = muladd(-step_size, quotient, <real> (shrink * p[i]), one)


cdef inline void adam_flags(real* p, const real* grad, real* m, real* v, real* v_max, Py_ssize_t n,
                            const AdamConstants* c, work one) noexcept nogil:
    if c.amsgrad:
        adam_loop(p, grad, m, v, v_max, n, c, True, one)
    else:
        adam_loop(p, grad, m, v, v_max, n, c, False, one)


cdef void adam_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    cdef const AdamConstants* c = <const AdamConstants*> constants
    if not t.is_float32:
        adam_flags(<double*> t.array[0], <const double*> t.array[1], <double*> t.array[2], <double*> t.array[3],
                   <double*> t.array[4], t.n, c, 1.0)
    elif careful:
        adam_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], <float*> t.array[3],
                   <float*> t.array[4], t.n, c, hidden_one)
    else:
        adam_flags(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], <float*> t.array[3],
                   <float*> t.array[4], t.n, c, <float> 1)


def adam(tuple params, tuple grads, tuple exp_avgs, tuple exp_avg_sqs, tuple max_exp_avg_sqs, double step, double lr,
         double beta1, double beta2, double eps, double weight_decay, bint decoupled_weight_decay, bint epsilon_hat,
         bint maximize, int threads):
    """``adam_step`` on checked lists; AMSGrad if ``max_exp_avg_sqs``."""
    cdef AdamConstants c
    # 1 - beta**step, which would cancel for the first steps: 30 ulp at step 1 of beta2 = 0.999.
    cdef double root_correction = sqrt(-expm1(step * log(beta2)))
    c.step_size = lr * root_correction / -expm1(step * log(beta1))
    c.beta1, c.beta2 = beta1, beta2
    c.eps = eps if epsilon_hat else eps * root_correction
    c.weight_decay = 0.0 if decoupled_weight_decay else weight_decay
    c.shrink = 1.0 - lr * weight_decay if decoupled_weight_decay else 1.0
    c.sign = -1.0 if maximize else 1.0
    c.amsgrad = max_exp_avg_sqs is not None
    update((params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs), adam_tile, &c, threads)


# -- Adagrad -----------------------------------------------------------------------------------------------------------
#   g = ±grad + weight_decay * p
#   s = s + g**2
#   p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
# Duchi, Hazan and Singer 2011; PyTorch, torch.optim.Adagrad.

cdef struct AdagradConstants:
    double step_size, eps, weight_decay, sign


cdef inline void adagrad_loop(
    real* p,  # IN OUT
    const real* grad,  # IN
    real* s,  # IN OUT
    Py_ssize_t n, const AdagradConstants* c, work one,
) noexcept nogil:
    cdef work step_size = one * <real> c.step_size, eps = one * epsilon(<real> c.eps, c.eps)
    cdef work weight_decay = one * <real> c.weight_decay, sign = one * <real> c.sign
    cdef real g, square, quotient
    cdef Py_ssize_t i
    for i in range(n):
        g = direction(grad[i], p[i], sign, weight_decay)
        square = muladd(one * g, g, s[i], one)
        s[i] = square
        quotient = <real> (one * g / <real> (eps + root(square, one)))
        p[i] = muladd(-step_size, quotient, p[i], one)


cdef void adagrad_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    cdef const AdagradConstants* c = <const AdagradConstants*> constants
    if not t.is_float32:
        adagrad_loop(<double*> t.array[0], <const double*> t.array[1], <double*> t.array[2], t.n, c, 1.0)
    elif careful:
        adagrad_loop(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], t.n, c, hidden_one)
    else:
        adagrad_loop(<float*> t.array[0], <const float*> t.array[1], <float*> t.array[2], t.n, c, <float> 1)


def adagrad(tuple params, tuple grads, tuple state_sums, double step, double lr, double lr_decay, double eps,
            double weight_decay, bint maximize, int threads):
    """``adagrad_step`` on checked lists."""
    cdef AdagradConstants c
    c.step_size = lr / (1.0 + (step - 1.0) * lr_decay)
    c.eps, c.weight_decay = eps, weight_decay
    c.sign = -1.0 if maximize else 1.0
    update((params, grads, state_sums), adagrad_tile, &c, threads)


# -- clipping ----------------------------------------------------------------------------------------------------------
#   norm = sqrt(Σ g**2) over all elements of all arrays;   g = g * min(1, max_norm / (norm + 1e-6))
# Pascanu, Mikolov and Bengio 2013, algorithm 1; PyTorch, torch.nn.utils.clip_grad_norm_.

cdef void sum_squares_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    if t.is_float32:
        t.sum = sum_squares(<const float*> t.array[0], t.n)
    else:
        t.sum = sum_squares(<const double*> t.array[0], t.n)


cdef inline void scale_loop(
    real* x,  # IN OUT
    Py_ssize_t n, double factor,
) noexcept nogil:
    # The factor in double: in float32, one for gradients of 1e30 is subnormal or 0.
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = <real> (x[i] * factor)


cdef void scale_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    cdef double factor = (<const double*> constants)[0]
    if t.is_float32:
        scale_loop(<float*> t.array[0], t.n, factor)
    else:
        scale_loop(<double*> t.array[0], t.n, factor)


def clip_grad_norm(tuple grads, double max_norm, bint measure_only, int threads):
    """``clip_grad_norm`` on a checked list; returns the norm before."""
    cdef Tiles tiles = cut((grads,), False)
    cdef double total = 0.0, norm, factor
    cdef Py_ssize_t t
    with nogil:
        run(tiles, sum_squares_tile, NULL, False, threads)
        for t in range(tiles.n):
            total += tiles.tile[t].sum
        norm = sqrt(total)
        factor = max_norm / (norm + 1e-6)
        if not measure_only and not factor >= 1.0:  # NaN is not, and spreads
            run(tiles, scale_tile, &factor, False, threads)
        scratch_free(tiles.tile)
    return norm


# -- values that are not finite ----------------------------------------------------------------------------------------
#   |x| <= the largest finite number, for every element of all arrays; NaN fails every comparison

cdef inline real magnitude(real x) noexcept nogil:
    if real is float:
        return fabsf(x)
    else:
        return fabs(x)


cdef inline bint any_nonfinite(
    const real* x,  # IN
    Py_ssize_t n, real largest,
) noexcept nogil:
    # To the end of the tile, whatever was found: a loop that may leave early does not vectorize.
    cdef bint found = False
    cdef Py_ssize_t i
    for i in range(n):
        found |= not magnitude(x[i]) <= largest
    return found


cdef void any_nonfinite_tile(Tile* t, const void* constants, bint careful) noexcept nogil:
    if t.is_float32:
        t.found = any_nonfinite(<const float*> t.array[0], t.n, FLT_MAX)
    else:
        t.found = any_nonfinite(<const double*> t.array[0], t.n, DBL_MAX)


def all_finite(tuple arrays, int threads):
    """``all_finite`` on a checked list."""
    cdef Tiles tiles = cut((arrays,), True)
    cdef bint found = False
    cdef Py_ssize_t t
    with nogil:
        run(tiles, any_nonfinite_tile, NULL, False, threads)
        for t in range(tiles.n):
            found |= tiles.tile[t].found
        scratch_free(tiles.tile)
    return not found
