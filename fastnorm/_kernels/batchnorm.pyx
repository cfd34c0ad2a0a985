"""Batch normalization over the channel axis of (outer, C, inner) memory: training, frozen and inference.

Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift" (2015):

    y  = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat)),   dz = act'(z) * dy

The twin is `fastnorm/reference/norm.py`.
"""

# Design:
# - Stats, then apply; reduce, then apply. Work is cut into tiles of channels, and each tile's samples into blocks.
#   Where a tile fits the second-level cache there is one block, and both halves run on it at once: memory is read
#   once. Else (few channels of many samples) the tiles that L3 holds form a wave: its blocks do the first half, partial
#   results are merged in block order, and its blocks do the second half: 15 ms against 20 backward at (64,256,56,56).
#   Letting the second half of a wave run beside the first of the next gains nothing. Tiles and blocks depend on the
#   shape alone, so the bits do not depend on the threads.
# - Two inner loops. Runs: one channel's `inner` values are contiguous and long. Columns: `inner` is 1 (channels last)
#   or short (7x7), and a tile is a matrix with one row an outer index and one column a (channel, position): whole rows
#   of neighboring channels make long vectors without tails, and the parameter table has an entry for each column. Where
#   whole rows are short (64 channels last), several that follow one another are taken as one, the table is repeated.
# - Statistics of a chunk are sums of d = x - pivot and d*d over at most 64 values a partial sum (for Moments, of
#   columns, 8 sums of 8 rows), merged in double by Chan, Golub & LeVeque (1979). The pivot is one of a few samples;
#   where it turns out more than two standard deviations off, the chunk, still in cache, is summed again around its own
#   mean: one pass over memory, two-pass accuracy. Where a float cannot hold the sums (data beyond 1e19, or whose
#   squares vanish), the chunk is summed in double.
# - Means are kept and merged less a base, the first pivot: far from zero, their own rounding would be as large as what
#   M2 is made of. The mean travels as two numbers (mean_hi + mean_lo), for one is not enough there.
# - Channels whose parameters are so large or small that a float overflows or loses digits on the way are found from the
#   parameters, once a tile, and computed in double (`bn_plain`, `careful_item`).
# - Outputs of short runs are computed channel by channel in whole vectors into a buffer, each channel's surplus being
#   overwritten by the next: no tails, no wide table, and memory is walked in its own order. Only runs below SHORT use
#   the table of columns.
# - Streaming stores go through a small buffer in L1 (`Writer`), so that the loops need no second version and memory is
#   written in whole lines. Runs and rows use a short one: with 1,024 values, table and buffer crowd each other out of
#   L1, 11 ms against 7.5 at (100352,512). Channel by channel there is no table, and longer pieces pay.

from cython.parallel cimport parallel, prange, threadid
from libc.math cimport NAN, fabs, isfinite, isnan
from libc.string cimport memcpy, memset

from .vector cimport (
    BN_BETA, BN_INV_STD, BN_MEAN_HI, BN_MEAN_LO, BN_ROWS, BN_WIDE_ROWS, LANES, SPREAD, STATS_ROWS, STREAM_BYTES, Team,
    at_offset, bn_add_finite, bn_any_far, bn_apply, bn_apply_channels, bn_careful_apply, bn_careful_gradient,
    bn_careful_reduce, bn_channel_sums, bn_finish_reduction, bn_gradient, bn_gradient_channels, bn_in_range, bn_merge,
    bn_merge_chunk, bn_parameters, bn_plain, bn_plain_gradient, bn_reduce_columns, bn_reduce_run, bn_spread,
    bn_square_sum, bn_squares_vanished, bn_stats_columns, bn_stats_run, bn_typical, bn_update_running, bn_wide_moments,
    data, fits, is_float32, lanes_sum, real, scratch_alloc, scratch_free, stream_copy, stream_fence, team_close,
    team_mark, team_open,
)

include "common.pxi"

cdef enum:
    RUN_MIN = 256              # an inner extent from which one channel's run is vectorized by itself
    SHORT = 16                 # an inner extent from which outputs are computed channel by channel, without a table
    WIDTH = 2048               # columns of a tile at most: the parameter table and the sums of a tile stay in L1 and L2
    FOLD = 256                # columns that several short rows are taken together to make
    WIDTH_MIN = 64             # columns of a tile at least: 256 contiguous bytes
    CHUNK_ROWS = 64            # columns: rows that one float partial sum takes before it is merged in double
    CHUNK = 64 * 64            # runs: the same for LANES partial sums
    SAMPLES = 8                # values that the first pivot is chosen from
    PIECE = 1024               # values that are computed into a buffer at once, channel by channel
    STREAM_PIECE = 256         # the same for runs and rows that are streamed
    CACHE = 1024 * 1024        # bytes of a tile that is read twice and should be found in L2 the second time
    WAYS = 12                  # lines of one set of L2 that a tile may take: of 16, or of 8 in a cache twice as large
    WAY_BYTES = 64 * 1024      # bytes of one way of L2: 1 MB in 16 ways
    WAVE = 8 * 1024 * 1024     # bytes that are read twice and should be found in L3 the second time
    BLOCK = 256 * 1024         # bytes of a block where a tile's samples are cut
    SCATTERED = 16 * 1024      # bytes of a block that follow one another: 0.31 ns a value at (5349,64,784), not 0.44
    TILES = 16                 # tiles wanted, so that threads find work until the end
    PARTIALS = 40960           # at most this many partial results of each kind: 1 MB
    STATISTICS = 3             # partial results of a channel: mean less base, M2, base
    SMALL = 32768              # elements up to which one thread is faster than waking a second
    SHARE = 16384              # elements that a thread should have at least


cdef struct Job:
    Py_ssize_t outer, channels, inner
    bint columns                     # which of the two inner loops
    Py_ssize_t tile, tiles, wave     # channels of a tile; tiles; tiles that go through both halves before the next
    Py_ssize_t units, blocks         # what is cut into blocks: rows (columns) or samples of a channel (runs); blocks
    bint contiguous                  # columns: the rows of a tile follow one another
    Py_ssize_t fold                  # rows of a tile that are taken as one
    Py_ssize_t width                 # columns of a tile's tables, of all rows that are taken as one
    const void* x                    # IN   (outer, C, inner)
    const void* dy                   # IN   (outer, C, inner), backward
    const void* residual             # IN   (outer, C, inner) or NULL
    void* y                          # OUT  (outer, C, inner): y forward, dx backward
    void* dresidual                  # OUT  (outer, C, inner) or NULL, backward
    void* table                      # (BN_ROWS, C): OUT forward (first four rows), IN backward (all)
    double* wide                     # (BN_WIDE_ROWS, C): OUT forward, IN backward
    const void* gamma                # IN   (C,) or NULL
    const void* beta                 # IN   (C,) or NULL
    void* running_mean               # INOUT (C,) or NULL
    void* running_var                # INOUT (C,) or NULL
    void* dgamma                     # OUT  (C,)
    void* dbeta                      # OUT  (C,)
    double momentum, eps, slope
    bint unbiased, frozen, stream
    int activation
    bint grouped                     # statistics of columns: closer, for Moments; slower
    bint plain                       # no tile needs to ask `bn_plain` again
    Py_ssize_t partials              # doubles of `partial`
    double* partial                  # (blocks, STATISTICS, C) forward, (blocks, 2, C) backward: sum and product
    char* scratch
    size_t scratch_bytes             # of one thread


# -- how the work is cut -----------------------------------------------------------------------------------------------


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t lines_of_a_set(const Job* job, Py_ssize_t tile, Py_ssize_t itemsize) noexcept nogil:
    """About how many lines of a tile fall on one set of L2: rows a multiple of WAY_BYTES apart all fall on the same."""
    cdef Py_ssize_t stride = job.channels * job.inner * itemsize, run = tile * job.inner * itemsize, places = 1
    while places < WAY_BYTES // 64 and places * stride % WAY_BYTES != 0:
        places *= 2
    return ceil_div(job.outer, places) * max(1, run // max(1, WAY_BYTES // places))


cdef void cut_samples(Job* job, Py_ssize_t widest, Py_ssize_t n_bytes) noexcept nogil:
    """Tiles of up to `widest` channels, and blocks of about BLOCK bytes, contiguous memory where they can be."""
    cdef Py_ssize_t most = max(1, PARTIALS // job.channels), each = job.inner * n_bytes, in_wave
    job.tile = widest
    if job.inner >= SHORT:
        job.tile = max(1, min(widest, BLOCK // each))
        # Narrower tiles where L3 then holds a wave of them, unless that would scatter the memory of a block.
        in_wave = max(1, WAVE // (job.outer * each))
        if in_wave * each >= SCATTERED and in_wave * each * job.outer <= 2 * WAVE:
            job.tile = min(job.tile, in_wave)
    if job.columns:
        job.blocks = min(ceil_div(job.outer * job.tile * job.inner * n_bytes, BLOCK), most, job.outer)
    else:  # whole outers, or equal parts of each
        job.blocks = min(job.outer * ceil_div(job.inner * n_bytes, BLOCK), most)


cdef void plan(Job* job, Py_ssize_t itemsize, Py_ssize_t arrays, bint statistics) noexcept nogil:
    """Cut the work: `arrays` are read; with `statistics`, all of a channel is needed before its output."""
    cdef Py_ssize_t channel_bytes = job.outer * job.inner * itemsize * arrays
    cdef Py_ssize_t widest, narrowest, tile
    job.columns = job.inner < RUN_MIN
    widest = max(1, min(job.channels, WIDTH // job.inner if job.columns else WIDTH))
    narrowest = min(widest, ceil_div(WIDTH_MIN, job.inner) if job.columns else 1)
    job.units = job.outer if job.columns else job.outer * job.inner
    job.tile, job.blocks = widest, 1
    if statistics:
        tile = max(narrowest, min(widest, CACHE // max(1, channel_bytes), ceil_div(job.channels, TILES)))
        if channel_bytes * job.channels > BLOCK:
            job.tile = tile
            # A tile that the cache does not hold, or too few tiles to share out: cut the samples.
            if (tile * channel_bytes > CACHE or lines_of_a_set(job, tile, itemsize) > WAYS
                    or ceil_div(job.channels, tile) < TILES // 2):
                cut_samples(job, widest, itemsize * arrays)
                if job.blocks < 2:
                    job.tile, job.blocks = tile, 1
    elif job.inner >= SHORT:
        cut_samples(job, job.channels, itemsize)
    else:
        cut_samples(job, widest, itemsize)
    job.blocks = max(1, job.blocks)
    job.tiles = ceil_div(job.channels, job.tile)
    job.wave = max(1, min(job.tiles, WAVE // max(1, job.tile * channel_bytes)))
    job.contiguous = job.columns and job.tile == job.channels
    job.fold = 1
    if job.contiguous:
        while (2 * job.fold * job.channels * job.inner <= FOLD
               and 2 * job.fold * STATS_ROWS * job.blocks <= job.outer):
            job.fold *= 2
    job.width = LANES
    if job.columns and (statistics or job.inner < SHORT):
        job.width = job.tile * job.inner * job.fold + (STREAM_PIECE if job.contiguous and job.stream else 0)
    job.partials = STATISTICS * job.channels * (job.blocks if statistics else 1)
    # Of one thread, in whole cache lines: the table's rows, two rows of sums, buffers for two outputs; and two sums in
    # double for each channel.
    job.scratch_bytes = ((BN_ROWS + 2) * padded(job.width) + 2 * padded(PIECE + SPREAD)) * itemsize
    job.scratch_bytes = (job.scratch_bytes + 2 * job.tile * sizeof(double) + 127) // 64 * 64


cdef inline bint streams(Py_ssize_t n_bytes, Py_ssize_t inner, Py_ssize_t arrays) noexcept nogil:
    """Whether an output of this size goes around the cache; `arrays` are read.

    Where outputs go through a buffer anyway, streaming them leaves the tile in L2 and pays earlier: 0.30 ms against
    0.43 at (64,256,14,14), 12.8 MB. With channels last, the halves of the backward are far apart, and ordinary stores
    leave more of its input in L3: 1.95 ms against 2.44 at (100352,64), 25.7 MB.
    """
    return n_bytes >= (STREAM_BYTES * arrays if inner < SHORT else STREAM_BYTES // 4)


cdef inline Py_ssize_t padded(Py_ssize_t width) noexcept nogil:
    """Length of a row of scratch for `width` columns: written in whole vectors, and the next begins a cache line."""
    return (width + 2 * SPREAD - 1) // SPREAD * SPREAD


cdef int useful_threads(const Job* job, int threads) noexcept nogil:
    """How many threads this work is worth."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    if elements <= SMALL:
        return 1
    return <int> max(1, min(threads, job.tiles * job.blocks, elements // SHARE))


cdef inline void* scratch_of(const Job* job, int thread) noexcept nogil:
    return job.scratch + thread * job.scratch_bytes


cdef inline Py_ssize_t first_unit(const Job* job, Py_ssize_t block) noexcept nogil:
    return job.units * block // job.blocks


# -- statistics --------------------------------------------------------------------------------------------------------


cdef inline bint pivot_is_far(double n, double sum, double square) noexcept nogil:
    """`bn_any_far` for one channel."""
    return bn_any_far(n, &sum, &square, 1)


cdef inline void merge_moments(double count, double n, double mean_n, double m2_n, double* mean,
                               double* m2) noexcept nogil:
    """`bn_merge`, or the first values of all."""
    if count == 0:
        mean[0], m2[0] = mean_n, m2_n
    else:
        bn_merge(count, n, mean_n, m2_n, mean, m2)


cdef inline int spaced_offsets(Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                               Py_ssize_t* offsets) noexcept nogil:
    """Where a few of a channel's samples start to stop lie, evenly spaced: neighbors are alike; returns how many."""
    cdef int i, n = <int> min(<Py_ssize_t> SAMPLES, stop - start)
    cdef Py_ssize_t s
    offsets[0] = start // inner * stride + start % inner
    for i in range(1, n):
        s = start + (stop - start) // n * i
        offsets[i] = s // inner * stride + s % inner
    return n


cdef inline real typical(const real* x, const Py_ssize_t* offsets, int n) noexcept nogil:
    """`bn_typical` of one channel's values at these offsets."""
    cdef double mean = 0
    cdef real best = x[offsets[0]], value
    cdef int i
    for i in range(n):
        mean += x[offsets[i]]
    mean /= n
    for i in range(1, n):
        value = x[offsets[i]]
        best = value if fabs(value - mean) < fabs(best - mean) else best
    return best if isfinite(mean) else 0


cdef inline void repeat(real* row, Py_ssize_t n, Py_ssize_t total) noexcept nogil:
    """Repeat the first n columns until there are `total`."""
    cdef Py_ssize_t m
    while n < total:
        m = min(n, total - n)
        memcpy(row + n, row, m * sizeof(real))
        n += m


cdef inline void first_pivot(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels, Py_ssize_t inner,
                             real* pivot, double* work) noexcept nogil:
    """A value near each channel's mean."""
    cdef Py_ssize_t offsets[SAMPLES]
    cdef Py_ssize_t k
    cdef int n
    if inner == 1:
        n = <int> min(rows, <Py_ssize_t> SAMPLES)
        bn_typical(x, n, rows // n * stride, channels, pivot, work)
    else:
        n = spaced_offsets(0, rows * inner, inner, stride, offsets)
        for k in range(channels):
            bn_spread(typical(x + k * inner, offsets, n), inner, pivot + k * inner)


cdef void stats_of_columns(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t fold, Py_ssize_t channels,
                           Py_ssize_t inner, double* mean, double* m2, double* base, bint grouped,
                           real* scratch) noexcept nogil:
    """Mean less base, M2 and base of each channel over `rows` rows, of which `fold` are taken as one."""
    cdef Py_ssize_t width = channels * inner, ld = padded(fold * width), chunk, start, n_rows, k, j, attempt, whole
    cdef const real *first
    cdef real *pivot = scratch
    cdef real *sum = pivot + ld
    cdef real *square = sum + ld
    cdef double *sums = <double*> (square + ld)
    cdef double *squares = sums + channels
    cdef double n, better
    cdef int in_range
    first_pivot(x, rows, stride, channels, inner, pivot, sums)
    for k in range(channels):
        base[k] = pivot[k * inner]
    repeat(pivot, width, ld)
    for chunk in range(ceil_div(rows, CHUNK_ROWS * fold)):
        start = chunk * CHUNK_ROWS * fold
        first = x + start * stride
        n_rows = min(CHUNK_ROWS * fold, rows - start)
        whole = n_rows // fold
        n = <double> (n_rows * inner)
        for attempt in range(2):
            memset(sum, 0, 2 * ld * sizeof(real))
            bn_stats_columns(first, whole, fold * stride, fold * width, pivot, sum, square, grouped)
            bn_stats_columns(first + whole * fold * stride, 1, 0, (n_rows - whole * fold) * width, pivot, sum, square,
                             grouped)
            bn_channel_sums(sum, fold, channels, inner, sums)
            bn_channel_sums(square, fold, channels, inner, squares)
            if attempt == 1 or not bn_any_far(n, sums, squares, channels):
                break
            for k in range(channels):
                better = pivot[k * inner] + sums[k] / n
                # A vector at a time would write into the next channel's pivot, which is still to be read.
                for j in range(k * inner, (k + 1) * inner if isfinite(better) else 0):
                    pivot[j] = <real> better
            repeat(pivot, width, ld)
        in_range = bn_in_range(sums, squares, pivot, inner, channels)
        if in_range == 2:
            in_range = not bn_squares_vanished(first, n_rows, stride, channels, inner, pivot, squares)
        if in_range:
            bn_merge_chunk(<double> (start * inner), n, pivot, inner, sums, squares, channels, base, mean, m2)
        else:
            bn_wide_moments(first, n_rows, stride, channels, inner, sums, squares)
            for k in range(channels):
                merge_moments(<double> (start * inner), n, sums[k] - base[k], squares[k], &mean[k], &m2[k])


cdef inline void sum_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                         real pivot, real* sum, real* square) noexcept nogil:
    """Sums of d and d*d of a channel's samples start to stop, LANES of each; x is the channel's first sample."""
    cdef Py_ssize_t o, at, n
    memset(sum, 0, LANES * sizeof(real))
    memset(square, 0, LANES * sizeof(real))
    while start < stop:
        o = start // inner
        at = start - o * inner
        n = min(inner - at, stop - start)
        bn_stats_run(x + o * stride + at, n, pivot, sum, square)
        start += n


cdef void wide_moments_of_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                              double* mean, double* m2) noexcept nogil:
    """Mean and M2 of a channel's samples start to stop, in two passes in double."""
    cdef Py_ssize_t s, at, n, attempt
    mean[0] = m2[0] = 0
    for attempt in range(2):
        s = start
        while s < stop:
            at = s % inner
            n = min(inner - at, stop - s)
            if attempt == 0:
                mean[0] += lanes_sum(x + s // inner * stride + at, n)
            else:
                m2[0] += bn_square_sum(x + s // inner * stride + at, n, mean[0])
            s += n
        if attempt == 0:
            mean[0] /= <double> (stop - start)
    if not isfinite(mean[0]):
        m2[0] = NAN


cdef bint squares_of_run_vanished(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                                  real pivot) noexcept nogil:
    """`bn_squares_vanished` of a channel's samples start to stop, whose sum of squares is 0."""
    cdef double none = 0
    cdef Py_ssize_t at, n
    cdef bint vanished = False
    while start < stop:
        at = start % inner
        n = min(inner - at, stop - start)
        vanished |= bn_squares_vanished(x + start // inner * stride + at, 1, 0, 1, n, &pivot, &none)
        start += n
    return vanished


cdef void stats_of_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                       double* mean, double* m2, double* base, real* scratch) noexcept nogil:
    """Mean less base, M2 and base of one channel over its samples start to stop."""
    cdef real *sum = scratch
    cdef real *square = scratch + LANES
    cdef Py_ssize_t offsets[SAMPLES]
    cdef Py_ssize_t chunk, s, e
    cdef double n, a, b
    cdef int in_range
    cdef real pivot
    pivot = typical(x, offsets, spaced_offsets(start, stop, inner, stride, offsets))
    base[0] = pivot
    for chunk in range(ceil_div(stop - start, CHUNK)):
        s = start + chunk * CHUNK
        e = min(s + CHUNK, stop)
        n = <double> (e - s)
        sum_run(x, s, e, inner, stride, pivot, sum, square)
        a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
        if pivot_is_far(n, a, b) and isfinite(pivot + a / n):
            pivot = <real> (pivot + a / n)
            sum_run(x, s, e, inner, stride, pivot, sum, square)
            a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
        in_range = bn_in_range(&a, &b, &pivot, 1, 1)
        if in_range == 2:
            in_range = not squares_of_run_vanished(x, s, e, inner, stride, pivot)
        if in_range:
            bn_merge_chunk(<double> (s - start), n, &pivot, 1, &a, &b, 1, base, mean, m2)
        else:
            wide_moments_of_run(x, s, e, inner, stride, &a, &b)
            merge_moments(<double> (s - start), n, a - base[0], b, mean, m2)


cdef void stats_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the forward: the statistics of the channels of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef double *mean = job.partial + STATISTICS * b * job.channels
    cdef double *m2 = mean + job.channels
    cdef double *base = m2 + job.channels
    cdef const real *x = <const real*> job.x + c0 * job.inner
    if job.columns:
        stats_of_columns(x + u0 * stride, u1 - u0, stride, job.fold, c1 - c0, job.inner, mean + c0, m2 + c0,
                         base + c0, job.grouped, scratch)
    else:
        for c in range(c0, c1):
            stats_of_run(x + (c - c0) * job.inner, u0, u1, job.inner, stride, mean + c, m2 + c, base + c, scratch)


cdef void merge_blocks(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Merge the blocks of these channels in their order, into the first."""
    cdef Py_ssize_t b, c, per_unit = job.inner if job.columns else 1, before, n
    cdef double *part
    cdef const double *base = job.partial + 2 * job.channels
    for b in range(1, job.blocks):
        part = job.partial + STATISTICS * b * job.channels
        before = first_unit(job, b) * per_unit
        n = first_unit(job, b + 1) * per_unit - before
        for c in range(c0, c1):
            bn_merge(<double> before, <double> n, (part[2 * job.channels + c] - base[c]) + part[c],
                     part[job.channels + c], &job.partial[c], &job.partial[job.channels + c])


cdef inline void add_bases(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Make whole means of what `merge_blocks` leaves."""
    cdef Py_ssize_t c
    for c in range(c0, c1):
        job.partial[c] += job.partial[2 * job.channels + c]


cdef inline void set_parameters(const Job* job, Py_ssize_t c0, Py_ssize_t c1, const double* base, const double* offset,
                                const double* var, real* kind) noexcept nogil:
    """The parameter table of channels c0 to c1, of mean base + offset; each array begins at channel 0."""
    bn_parameters(base + c0, offset + c0, var + c0, at_offset(<const real*> job.gamma, c0),
                  at_offset(<const real*> job.beta, c0), job.eps, c1 - c0, <real*> job.table + c0, job.channels,
                  job.wide + c0)


cdef void finish_statistics(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
    """Merge the blocks of tile t; set running statistics and parameters."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c
    cdef double *mean = job.partial
    cdef double *m2 = job.partial + job.channels
    cdef double *base = m2 + job.channels
    cdef double count = <double> job.outer * job.inner
    merge_blocks(job, c0, c1)
    if job.running_mean != NULL:
        bn_update_running(<real*> job.running_var + c0, m2 + c0, 1 / (count - job.unbiased), job.momentum, c1 - c0)
    for c in range(c0, c1):
        m2[c] /= count
    set_parameters(job, c0, c1, base, mean, m2, kind)
    if job.running_mean != NULL:
        add_bases(job, c0, c1)
        bn_update_running(<real*> job.running_mean + c0, mean + c0, 1, job.momentum, c1 - c0)


# -- tiles with a channel beyond the range of the loops ----------------------------------------------------------------


cdef inline bint is_plain(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """Whether channels c0 to c1 can go through the usual loops."""
    return job.plain or bn_plain(<const real*> job.table + c0, job.wide + c0, job.channels, c1 - c0)


cdef inline bint is_gradient_plain(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """Whether their gradient can."""
    return job.frozen or bn_plain_gradient(<const real*> job.table + c0, job.channels, c1 - c0)


cdef void careful_item(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t b, double* sum, double* product,
                       real* kind) noexcept nogil:
    """Of channels c0 to c1 over block b, run by run: the sums of the backward where they are given, else the output."""
    cdef Py_ssize_t per_unit = job.inner if job.columns else 1, start = first_unit(job, b) * per_unit
    cdef Py_ssize_t stop = first_unit(job, b + 1) * per_unit, ld = job.channels, c, s, n, i
    cdef const real *x = <const real*> job.x
    cdef const real *dy = <const real*> job.dy
    cdef const real *residual
    cdef const real *table
    cdef const double *wide
    cdef real *dresidual
    cdef real *y = <real*> job.y
    cdef real slope = <real> job.slope
    for c in range(c0, c1):
        table, wide = <const real*> job.table + c, job.wide + c
        s = start
        while s < stop:
            n = min(job.inner - s % job.inner, stop - s)
            i = (s // job.inner * ld + c) * job.inner + s % job.inner
            residual = at_offset(<const real*> job.residual, i)
            if sum != NULL:
                bn_careful_reduce(dy + i, x + i, residual, n, table, wide, ld, slope, job.activation, &sum[c],
                                  &product[c])
            elif dy == NULL:
                bn_careful_apply(x + i, residual, y + i, n, table, wide, ld, slope, job.activation)
            else:
                dresidual = <real*> job.dresidual + i if job.dresidual != NULL else NULL
                bn_careful_gradient(dy + i, x + i, residual, y + i, dresidual, n, table, wide, ld, slope,
                                    job.activation, job.frozen, job.partial[c], job.partial[ld + c],
                                    <double> job.outer * job.inner)
            s += n


# -- apply -------------------------------------------------------------------------------------------------------------


cdef const real* spread_table(const Job* job, Py_ssize_t c0, Py_ssize_t c1, int first, int end, real* scratch,
                              Py_ssize_t* ld) noexcept nogil:
    """The parameter table of these channels, an entry for each column; returns it and its row length.

    Rows first to end are written; those before are there from the first half of the same tile. Where the tile's rows
    follow one another, the columns repeat until the end of the table's row.
    """
    cdef const real *table = <const real*> job.table
    cdef Py_ssize_t c, width = (c1 - c0) * job.inner
    cdef int row
    ld[0] = padded(job.width)
    for row in range(first, end):
        if job.inner == 1:  # a copy too: there each row begins a cache line
            memcpy(scratch + row * ld[0], table + row * job.channels + c0, width * sizeof(real))
        else:
            for c in range(c0, c1):
                bn_spread(table[row * job.channels + c], job.inner, scratch + row * ld[0] + (c - c0) * job.inner)
        if job.contiguous:
            repeat(scratch + row * ld[0], width, ld[0])
    return scratch


cdef struct Writer:
    char* target    # what is streamed next goes here
    char* buffer
    Py_ssize_t held  # bytes of the buffer that wait for the rest of their line


cdef inline void flush(Writer* writer) noexcept nogil:
    stream_copy(writer.target, writer.buffer, writer.held)
    writer.target += writer.held
    writer.held = 0


cdef inline char* writer_at(Writer* writer, void* target) noexcept nogil:
    """Where to compute what belongs at `target`: behind what is held, if it continues that."""
    if <char*> target != writer.target + writer.held:
        flush(writer)
        writer.target = <char*> target
    return writer.buffer + writer.held


cdef inline void written(Writer* writer, Py_ssize_t n_bytes) noexcept nogil:
    """So much has been computed there: stream the whole lines."""
    cdef Py_ssize_t held = writer.held + n_bytes, rest = <Py_ssize_t> (<size_t> (writer.target + held) % 64)
    if rest > held:
        rest = held
    stream_copy(writer.target, writer.buffer, held - rest)
    writer.target += held - rest
    writer.held = rest
    if rest:
        memcpy(writer.buffer, writer.buffer + held - rest, rest)


cdef struct Output:
    Writer y, dresidual
    const void* table  # of parameters
    Py_ssize_t ld      # its row length


cdef inline void output(const Job* job, Output* out, Py_ssize_t i, Py_ssize_t n, Py_ssize_t channels, Py_ssize_t column,
                        int step, real* kind) noexcept nogil:
    """y, or dx and dresidual, of n values at i: of `channels` whole channels, or with 0 of a run or row as `step` says.

    The first value's parameters are in this column of the table.
    """
    cdef const real *x = <const real*> job.x + i
    cdef const real *dy = at_offset(<const real*> job.dy, i)
    cdef const real *residual = at_offset(<const real*> job.residual, i)
    cdef const real *table = <const real*> out.table + column
    cdef real *y = <real*> job.y + i
    cdef real *dresidual = <real*> job.dresidual + i if job.dresidual != NULL else NULL
    cdef real *y_place = y
    cdef real *dresidual_place = dresidual
    cdef real slope = <real> job.slope
    if job.stream:
        y_place = <real*> writer_at(&out.y, y)
        if dresidual != NULL:
            dresidual_place = <real*> writer_at(&out.dresidual, dresidual)
    elif channels > 0:
        y_place, dresidual_place = <real*> out.y.buffer, <real*> out.dresidual.buffer
    if dy == NULL:
        if channels > 0:
            bn_apply_channels(x, residual, y_place, channels, job.inner, table, out.ld, slope, job.activation)
        else:
            bn_apply(x, residual, y_place, n, table, out.ld, step, slope, job.activation)
    elif channels > 0:
        bn_gradient_channels(dy, x, residual, y_place, dresidual_place, channels, job.inner, table, out.ld, slope,
                             job.activation, job.frozen)
    else:
        bn_gradient(dy, x, residual, y_place, dresidual_place, n, table, out.ld, step, slope, job.activation,
                    job.frozen)
    if job.stream:
        written(&out.y, n * sizeof(real))
        if dresidual != NULL:
            written(&out.dresidual, n * sizeof(real))
    elif channels > 0:
        memcpy(y, y_place, n * sizeof(real))
        if dresidual != NULL:
            memcpy(dresidual, dresidual_place, n * sizeof(real))


cdef inline Py_ssize_t piece(const Job* job, Py_ssize_t i, Py_ssize_t left, Py_ssize_t most, real* kind) noexcept nogil:
    """How many of the values left at i are next: up to the end of a cache line, where they are streamed."""
    if not job.stream:
        return min(left, most)
    return min(left, STREAM_PIECE - <Py_ssize_t> (<size_t> (<real*> job.y + i) % 64) // <Py_ssize_t> sizeof(real))


cdef void output_rows(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t width, Py_ssize_t start, Py_ssize_t stop,
                      real* kind) noexcept nogil:
    """The columns of rows start to stop, from the table of columns."""
    cdef Py_ssize_t i, end, column, n, o = start, stride = job.channels * job.inner, rows = 1
    if job.contiguous:
        rows = stop - start
    while o < stop:
        i, end, column = o * stride + c0 * job.inner, o * stride + c0 * job.inner + rows * width, 0
        while i < end:
            n = piece(job, i, end - i, job.fold * width, kind)
            output(job, out, i, n, 0, column, 1, kind)
            i += n
            column = (column + n) % width
        o += rows


cdef void output_channels(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t start, Py_ssize_t stop,
                          real* kind) noexcept nogil:
    """Channels c0 to c1 of rows start to stop, several at a time."""
    cdef Py_ssize_t group = max(1, PIECE // job.inner), o, c, n
    for o in range(start, stop):
        c = c0
        while c < c1:
            n = min(group, c1 - c)
            output(job, out, (o * job.channels + c) * job.inner, n * job.inner, n, c, 0, kind)
            c += n


cdef void output_runs(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t start, Py_ssize_t stop,
                      real* kind) noexcept nogil:
    """Samples start to stop of channels c0 to c1, in the order of memory: outer by outer, channel by channel."""
    cdef Py_ssize_t o, at, c, i, n, left
    for o in range(start // job.inner, ceil_div(stop, job.inner)):
        at = max(0, start - o * job.inner)
        for c in range(c0, c1):
            i = (o * job.channels + c) * job.inner + at
            left = min(job.inner, stop - o * job.inner) - at
            while left > 0:
                n = piece(job, i, left, left, kind)
                output(job, out, i, n, 0, c, 0, kind)
                i += n
                left -= n


cdef void output_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """Second half: the output of tile t, block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile)
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1)
    cdef Output out
    cdef real *buffers = scratch + (BN_ROWS + 2) * padded(job.width)
    if not is_plain(job, c0, c1, scratch) or (job.dy != NULL and not is_gradient_plain(job, c0, c1, scratch)):
        careful_item(job, c0, c1, b, NULL, NULL, scratch)
        return
    out.y.target = out.dresidual.target = NULL
    out.y.held = out.dresidual.held = 0
    out.y.buffer, out.dresidual.buffer = <char*> buffers, <char*> (buffers + padded(PIECE + SPREAD))
    out.table, out.ld = job.table, job.channels
    if job.inner < SHORT:
        # The backward's first half has left the first rows of the same tile.
        out.table = spread_table(job, c0, c1, BN_BETA + 1 if job.dy != NULL and job.blocks == 1 else 0,
                                 BN_BETA + 1 if job.dy == NULL else BN_ROWS, scratch, &out.ld)
        output_rows(job, &out, c0, (c1 - c0) * job.inner, u0, u1, scratch)
    elif job.columns:
        output_channels(job, &out, c0, c1, u0, u1, scratch)
    else:
        output_runs(job, &out, c0, c1, u0, u1, scratch)
    if job.stream:
        flush(&out.y)
        flush(&out.dresidual)
        stream_fence()


# -- backward ----------------------------------------------------------------------------------------------------------


cdef void add_reduction(const Job* job, Py_ssize_t c, Py_ssize_t start, Py_ssize_t stop, double a, double b, real* kind,
                        double* sum, double* product) noexcept nogil:
    """Add channel c's sums of dz (a) and dz * (x - mean) (b) over samples start to stop; where a float overflowed, sum
    again in double.
    """
    cdef Py_ssize_t i, s, ld = job.channels
    cdef const real *x = <const real*> job.x
    cdef const real *table = <const real*> job.table + c
    cdef real dz, unused
    if real is float and not (isfinite(a) and isfinite(b)):
        a = b = 0
        for s in range(start, stop):
            i = s // job.inner * ld * job.inner + c * job.inner + s % job.inner
            dz = unused = 0
            bn_reduce_columns(<const real*> job.dy + i, x + i, at_offset(<const real*> job.residual, i), 1, 0, 1, table,
                              ld, <real> job.slope, job.activation, &dz, &unused)
            a += dz
            b += dz * ((<double> x[i] - table[BN_MEAN_HI * ld]) - table[BN_MEAN_LO * ld])
            if isnan(a) and isnan(b):
                break
    sum[c] += a
    product[c] += b


cdef void reduce_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the backward: sums of dz and of dz * (x - mean) of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, k, o, at, i, n, ld, width
    cdef Py_ssize_t start, stop, begin
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef double *sum = job.partial + 2 * b * job.channels
    cdef double *product = sum + job.channels
    cdef const real *x = <const real*> job.x
    cdef const real *dy = <const real*> job.dy
    cdef const real *residual = <const real*> job.residual
    cdef const real *table
    cdef real *lanes = scratch + BN_ROWS * padded(job.width)
    cdef real *products_of_columns = lanes + padded(job.width)
    cdef double *sums = <double*> (lanes + 2 * padded(job.width))
    cdef double *products = sums + job.tile
    cdef real slope = <real> job.slope
    memset(sum + c0, 0, (c1 - c0) * sizeof(double))
    memset(product + c0, 0, (c1 - c0) * sizeof(double))
    if not is_plain(job, c0, c1, scratch):
        careful_item(job, c0, c1, b, sum, product, scratch)
        return
    if job.columns:
        table = spread_table(job, c0, c1, 0, BN_BETA + 1, scratch, &ld)
        width = (c1 - c0) * job.inner
        start = u0
        while start < u1:
            stop = min(start + CHUNK_ROWS * job.fold, u1)
            memset(lanes, 0, 2 * padded(job.width) * sizeof(real))
            n = (stop - start) // job.fold
            i = start * stride + c0 * job.inner
            bn_reduce_columns(dy + i, x + i, at_offset(residual, i), n, job.fold * stride, job.fold * width, table, ld,
                              slope, job.activation, lanes, products_of_columns)
            i += n * job.fold * stride
            bn_reduce_columns(dy + i, x + i, at_offset(residual, i), 1, 0, (stop - start - n * job.fold) * width, table,
                              ld, slope, job.activation, lanes, products_of_columns)
            bn_channel_sums(lanes, job.fold, c1 - c0, job.inner, sums)
            bn_channel_sums(products_of_columns, job.fold, c1 - c0, job.inner, products)
            if not bn_add_finite(sums, products, c1 - c0, sum + c0, product + c0):
                for k in range(c1 - c0):
                    add_reduction(job, c0 + k, start * job.inner, stop * job.inner, sums[k], products[k], lanes, sum,
                                  product)
            start = stop
        return
    table, ld = <const real*> job.table, job.channels
    for c in range(c0, c1):
        start = u0
        while start < u1:
            memset(lanes, 0, 2 * LANES * sizeof(real))
            begin, stop = start, min(start + CHUNK, u1)
            while start < stop:
                o = start // job.inner
                at = start - o * job.inner
                n = min(job.inner - at, stop - start)
                i = o * stride + c * job.inner + at
                bn_reduce_run(dy + i, x + i, at_offset(residual, i), n, table + c, ld, slope,
                              job.activation, lanes, lanes + LANES)
                start += n
            add_reduction(job, c, begin, stop, lanes_sum(lanes, LANES), lanes_sum(lanes + LANES, LANES), lanes, sum,
                          product)


cdef void finish_reduction(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
    """Add the blocks of tile t in their order; set dgamma, dbeta and what the gradient needs."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, b, ld = job.channels
    cdef double *sum = job.partial
    cdef double *product = job.partial + ld
    for b in range(1, job.blocks):
        for c in range(c0, c1):
            sum[c] += job.partial[2 * b * ld + c]
            product[c] += job.partial[(2 * b + 1) * ld + c]
    bn_finish_reduction(sum + c0, product + c0, job.wide + BN_INV_STD * ld + c0, <double> job.outer * job.inner,
                        c1 - c0, <real*> job.dgamma + c0, <real*> job.dbeta + c0, <real*> job.table + c0, ld)


# -- all tiles and blocks ----------------------------------------------------------------------------------------------


cdef inline void first_half(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """What is needed of all of a channel before its output: tile t, block b."""
    if job.dy != NULL:
        reduce_item(job, t, b, scratch)
    else:
        stats_item(job, t, b, scratch)


cdef inline void finish(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
    """Between the halves: the numbers of each channel of tile t."""
    if job.dy != NULL:
        finish_reduction(job, t, kind)
    else:
        finish_statistics(job, t, kind)


cdef inline void whole_tile(const Job* job, Py_ssize_t t, real* scratch) noexcept nogil:
    """A tile in one block: its second half finds in the cache what the first has read."""
    first_half(job, t, 0, scratch)
    finish(job, t, scratch)
    output_item(job, t, 0, scratch)


cdef void run_both_halves(const Job* job, Team* team, real* kind) noexcept nogil:
    """Training, and every backward."""
    cdef Py_ssize_t t, i, w = 0, t0 = 0, n = 0
    if job.blocks > 1:
        with parallel(num_threads=team.size):
            for w in range(ceil_div(job.tiles, job.wave)):
                t0 = w * job.wave
                n = min(job.wave, job.tiles - t0)
                for i in prange(n * job.blocks, schedule="dynamic", chunksize=1):
                    first_half(job, t0 + i % n, i // n, <real*> scratch_of(job, threadid()))
                    team_mark(team)
                for t in prange(n, schedule="dynamic", chunksize=1):
                    finish(job, t0 + t, kind)
                # Backwards: what was read last is still in the nearest cache.
                for i in prange(n * job.blocks, schedule="dynamic", chunksize=1):
                    output_item(job, t0 + n - 1 - i % n, job.blocks - 1 - i // n,
                                <real*> scratch_of(job, threadid()))
                    team_mark(team)
    elif team.size == 1:
        for t in range(job.tiles):
            whole_tile(job, t, <real*> scratch_of(job, 0))
    else:
        for t in prange(job.tiles, schedule="dynamic", chunksize=1, num_threads=team.size):
            whole_tile(job, t, <real*> scratch_of(job, threadid()))
            team_mark(team)


cdef inline void one_half(const Job* job, Py_ssize_t i, bint second, real* scratch) noexcept nogil:
    """Item i of one half, tile by tile within each block."""
    if second:
        output_item(job, i % job.tiles, i // job.tiles, scratch)
    else:
        first_half(job, i % job.tiles, i // job.tiles, scratch)


cdef void run_one_half(const Job* job, Team* team, bint second, real* kind) noexcept nogil:
    """Statistics alone, or output alone where the parameter table is set."""
    cdef Py_ssize_t i, items = job.tiles * job.blocks
    if team.size == 1:
        for i in range(items):
            one_half(job, i, second, <real*> scratch_of(job, 0))
    else:
        for i in prange(items, schedule="dynamic", chunksize=1, num_threads=team.size):
            one_half(job, i, second, <real*> scratch_of(job, threadid()))
            team_mark(team)


cdef void given_statistics(const Job* job, real* kind) noexcept nogil:
    """The parameter table from the running statistics."""
    bn_channel_sums(<const real*> job.running_mean, 1, job.channels, 1, job.partial)  # to double
    bn_channel_sums(<const real*> job.running_var, 1, job.channels, 1, job.partial + job.channels)
    memset(job.partial + 2 * job.channels, 0, job.channels * sizeof(double))
    set_parameters(job, 0, job.channels, job.partial, job.partial + 2 * job.channels, job.partial + job.channels, kind)


# -- what Python calls: every argument has been checked, every array is dense and laid out alike -----------------------


cdef Job new_job(object x, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner):
    """A job on x with everything else absent."""
    cdef Job job
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x = data(x)
    return job


cdef void* allocate(Job* job, int threads) except NULL:
    """Scratch of all threads and the partial results, in one piece; sets the job's pointers."""
    cdef char *memory = <char*> scratch_alloc(threads * job.scratch_bytes + job.partials * sizeof(double))
    if memory == NULL:
        raise MemoryError("fastnorm: no memory for the scratch of batch norm")
    job.scratch = memory
    job.partial = <double*> (memory + threads * job.scratch_bytes)
    return memory


def forward(x, residual, y, gamma, beta, running_mean, running_var, table, wide_table, Py_ssize_t outer,
            Py_ssize_t channels, Py_ssize_t inner, bint training, double momentum, double eps, bint unbiased,
            int activation, double slope, int threads):
    """y, the parameter table (BN_ROWS, C) and the wide one (BN_WIDE_ROWS, C) from x; in training also the running
    statistics.
    """
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(residual, size, x) and fits(y, size, x)
    assert fits(gamma, channels, x) and fits(beta, channels, x)
    assert fits(running_mean, channels, x) and fits(running_var, channels, x)
    assert fits(table, BN_ROWS * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, wide_table)
    if size == 0:
        return
    job.residual, job.y, job.gamma, job.beta = data(residual), data(y), data(gamma), data(beta)
    job.running_mean, job.running_var = data(running_mean), data(running_var)
    job.table, job.wide = data(table), <double*> data(wide_table)
    job.momentum, job.eps, job.unbiased = momentum, eps, unbiased
    job.activation, job.slope = activation, slope
    job.stream = streams(size * itemsize, inner, 1) and job.y != job.x and job.y != job.residual
    plan(&job, itemsize, 1, training)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 2.0 * size * itemsize)
        if itemsize == 4:
            if training:
                run_both_halves(&job, &team, <float*> NULL)
            else:
                given_statistics(&job, <float*> NULL)
                job.plain = is_plain(&job, 0, channels, <float*> NULL)
                run_one_half(&job, &team, True, <float*> NULL)
        else:
            if training:
                run_both_halves(&job, &team, <double*> NULL)
            else:
                given_statistics(&job, <double*> NULL)
                job.plain = is_plain(&job, 0, channels, <double*> NULL)
                run_one_half(&job, &team, True, <double*> NULL)
        team_close(&team)
        scratch_free(memory)


def backward(dy, x, residual, dx, dresidual, table, wide_table, dgamma, dbeta, Py_ssize_t outer, Py_ssize_t channels,
             Py_ssize_t inner, bint training, int activation, double slope, int threads):
    """dx, dresidual, dgamma and dbeta (C,) from dy and what forward kept; fills the last two rows of the table."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(dy, size, x) and fits(residual, size, x)
    assert fits(dx, size, x) and fits(dresidual, size, x) and fits(dgamma, channels, x) and fits(dbeta, channels, x)
    assert fits(table, BN_ROWS * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, wide_table)
    job.dgamma, job.dbeta = data(dgamma), data(dbeta)
    if size == 0:
        memset(job.dgamma, 0, channels * itemsize)
        memset(job.dbeta, 0, channels * itemsize)
        return
    job.dy, job.residual, job.y, job.dresidual = data(dy), data(residual), data(dx), data(dresidual)
    job.table, job.wide = data(table), <double*> data(wide_table)
    job.activation, job.slope, job.frozen = activation, slope, not training
    job.stream = streams(size * itemsize, inner, 2) and job.y != job.dy
    plan(&job, itemsize, 2, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 3.0 * size * itemsize)
        if itemsize == 4:
            job.plain = is_plain(&job, 0, channels, <float*> NULL)
            run_both_halves(&job, &team, <float*> NULL)
        else:
            job.plain = is_plain(&job, 0, channels, <double*> NULL)
            run_both_halves(&job, &team, <double*> NULL)
        team_close(&team)
        scratch_free(memory)


def moments(x, mean, m2, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, int threads):
    """Mean and M2 (C,), float64, of each channel of x, which is not empty."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef double *mean_out = <double*> data(mean)
    cdef double *m2_out = <double*> data(m2)
    cdef bint float32 = is_float32(x)
    cdef Team team
    cdef void *memory
    assert fits(x, outer * channels * inner, x) and fits(mean, channels, m2) and fits(m2, channels, mean)
    if outer * channels * inner == 0:
        return
    job.grouped = True
    plan(&job, 4 if float32 else 8, 1, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 8.0 * outer * channels * inner)
        if float32:
            run_one_half(&job, &team, False, <float*> NULL)
        else:
            run_one_half(&job, &team, False, <double*> NULL)
        team_close(&team)
        merge_blocks(&job, 0, channels)
        add_bases(&job, 0, channels)
        memcpy(mean_out, job.partial, channels * sizeof(double))
        memcpy(m2_out, job.partial + channels, channels * sizeof(double))
        scratch_free(memory)


def standardize(x, y, mean, var, table, wide_table, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                int threads):
    """y = (x - mean) / sqrt(var) for float64 mean and var (C,); the tables are working space."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef const double *mean_in = <const double*> data(mean)
    cdef const double *var_in = <const double*> data(var)
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(y, size, x) and fits(mean, channels, var) and fits(var, channels, mean)
    assert fits(table, (BN_BETA + 1) * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, mean)
    if size == 0:
        return
    job.y, job.table, job.wide = data(y), data(table), <double*> data(wide_table)
    job.stream = streams(size * itemsize, inner, 1) and job.y != job.x
    plan(&job, itemsize, 1, False)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 2.0 * size * itemsize)
        memset(job.partial, 0, channels * sizeof(double))
        if itemsize == 4:
            set_parameters(&job, 0, channels, mean_in, job.partial, var_in, <float*> NULL)
            run_one_half(&job, &team, True, <float*> NULL)
        else:
            set_parameters(&job, 0, channels, mean_in, job.partial, var_in, <double*> NULL)
            run_one_half(&job, &team, True, <double*> NULL)
        team_close(&team)
        scratch_free(memory)
