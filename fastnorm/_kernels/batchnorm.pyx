"""Batch normalization over the channel axis of (outer, C, inner) memory: training, frozen and inference.

Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift" (2015):

    y  = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat)),   dz = act'(z) * dy

The twin is `fastnorm/reference/norm.py`.
"""

# Design:
# - Stats, then apply; reduce, then apply. Work is cut into tiles of channels, and each tile's samples into blocks.
#   Where a tile fits the second-level cache there is one block, and both halves run on it at once: memory is read
#   once. Else (few channels of many samples) all blocks do the first half, partial results are merged in block order,
#   and all blocks do the second half. Tiles and blocks depend on the shape alone, so the bits do not depend on the
#   threads.
# - Two inner loops. Runs: one channel's `inner` values are contiguous and long. Columns: `inner` is 1 (channels last)
#   or short (7x7), and a tile is a matrix with one row an outer index and one column a (channel, position): whole rows
#   of neighbouring channels make long vectors without tails, and the parameter table has an entry for each column.
# - Statistics of a chunk are sums of d = x - pivot and d*d over at most 64 values a partial sum, merged in double by
#   Chan, Golub & LeVeque (1979). The pivot is one of the first few samples; where it turns out more than two standard
#   deviations off, the chunk, still in cache, is summed again around its own mean: one pass over memory, two-pass
#   accuracy. Where a float cannot hold the sums (data beyond 1e19, or whose squares vanish), the chunk is summed in
#   double.
# - The mean travels as two numbers (mean_hi + mean_lo): in float32 one number is not enough when data lie far from
#   zero.
# - Streaming stores go through a small buffer in L1 (`stream_copy`), so that the loops need no second version.

from cython.parallel cimport parallel, prange, threadid
from libc.math cimport NAN, fabs, isfinite, isnan, sqrt
from libc.string cimport memcpy, memset

from .vector cimport (
    BN_BETA, BN_DZ_MEAN, BN_MEAN_HI, BN_MEAN_LO, BN_ROWS, BN_SCALE, BN_SLOPE_X, LANES, bn_apply, bn_gradient,
    bn_reduce_columns, bn_reduce_run, bn_stats_columns, bn_stats_run, data, fastnorm_build_flags, is_float32, lanes_sum,
    real, scratch_alloc, scratch_free, stream_copy, stream_fence,
)

cdef enum:
    RUN_MIN = 256              # an inner extent from which one channel's run is vectorized by itself
    WIDTH = 2048               # columns of a tile at most: the parameter table and the sums of a tile stay in L1 and L2
    WIDTH_MIN = 64             # columns of a tile at least: 256 contiguous bytes
    CHUNK_ROWS = 64            # columns: rows that one float partial sum takes before it is merged in double
    CHUNK = 64 * 64            # runs: the same for LANES partial sums
    SAMPLES = 4                # values that the first pivot is chosen from
    PIECE = 1024               # values that one streaming buffer holds
    CACHE = 1024 * 1024        # bytes of a tile that is read twice and should be found in L2 the second time
    BLOCK = 256 * 1024         # bytes of a block where a tile's samples are cut
    TILES = 16                 # tiles wanted, so that threads find work until the end
    PARTIALS = 65536           # doubles: at most this many partial results of either kind
    STREAM = 4 * 1024 * 1024   # bytes of output from which the next reader will not find it in cache
    SMALL = 32768              # elements up to which one thread is faster than waking a second
    SHARE = 16384              # elements that a thread should have at least

# A float holds a sum of squares in this range without loss: below, squares are subnormal or 0.
cdef double FLOAT_SQUARES_MIN = 1e-30
cdef double FLOAT_MAX = 3.4028234663852886e38


cdef struct Job:
    Py_ssize_t outer, channels, inner
    bint columns                     # which of the two inner loops
    Py_ssize_t tile, tiles           # channels of a tile; tiles
    Py_ssize_t units, blocks         # what is cut into blocks: rows (columns) or samples of a channel (runs); blocks
    Py_ssize_t width                 # columns of a tile
    const void* x                    # IN   (outer, C, inner)
    const void* dy                   # IN   (outer, C, inner), backward
    const void* residual             # IN   (outer, C, inner) or NULL
    void* y                          # OUT  (outer, C, inner): y forward, dx backward
    void* dresidual                  # OUT  (outer, C, inner) or NULL, backward
    void* table                      # (BN_ROWS, C): OUT forward (first four rows), IN backward (all)
    double* inv_std                  # (C,): OUT forward, IN backward
    const void* gamma                # IN   (C,) or NULL
    const void* beta                 # IN   (C,) or NULL
    void* running_mean               # INOUT (C,) or NULL
    void* running_var                # INOUT (C,) or NULL
    void* dgamma                     # OUT  (C,)
    void* dbeta                      # OUT  (C,)
    double momentum, eps, slope
    bint unbiased, frozen, stream
    int activation
    double* partial                  # (blocks, 2, C): mean and M2 forward, sum and product backward
    char* scratch
    size_t scratch_bytes             # of one thread


# -- how the work is cut -----------------------------------------------------------------------------------------------


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


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
            # A tile that does not fit the cache, or too few tiles to share out: cut the samples.
            if tile * channel_bytes > CACHE or ceil_div(job.channels, tile) < TILES // 2:
                job.tile = widest
                job.blocks = min(ceil_div(widest * channel_bytes, BLOCK), PARTIALS // job.channels, job.units)
                if job.blocks < 2:
                    job.tile, job.blocks = tile, 1
    else:
        job.blocks = min(ceil_div(widest * channel_bytes, BLOCK), job.units)
    job.blocks = max(1, job.blocks)
    job.tiles = ceil_div(job.channels, job.tile)
    job.width = job.tile * job.inner if job.columns else LANES
    # Of one thread: pivot or table rows, sums, and streaming buffers for two outputs; in whole cache lines.
    job.scratch_bytes = ((BN_ROWS + 3) * job.width + 2 * max(job.width, PIECE)) * itemsize
    job.scratch_bytes = (job.scratch_bytes + 127) // 64 * 64


cdef int useful_threads(const Job* job, int threads) noexcept nogil:
    """How many threads this work is worth."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    if elements <= SMALL:
        return 1
    return <int> max(1, min(threads, job.tiles * job.blocks, elements // SHARE))


cdef inline void* scratch_of(const Job* job, int thread) noexcept nogil:
    return job.scratch + thread * job.scratch_bytes


cdef inline const real* at_offset(const real* a, Py_ssize_t i) noexcept nogil:
    """Element i of an optional array."""
    if a == NULL:
        return NULL
    return a + i


cdef inline Py_ssize_t first_unit(const Job* job, Py_ssize_t block) noexcept nogil:
    return job.units * block // job.blocks


# -- statistics --------------------------------------------------------------------------------------------------------


cdef inline void merge_moments(double count, double* mean, double* m2, double n, double mean_n,
                               double m2_n) noexcept nogil:
    """Add n values of mean mean_n and sum of squared deviations m2_n (Chan, Golub & LeVeque 1979, eq. 2.1)."""
    cdef double delta = mean_n - mean[0]
    if count == 0:
        mean[0], m2[0] = mean_n, m2_n
    elif isfinite(delta):
        mean[0] += delta * (n / (count + n))
        m2[0] += m2_n + delta * delta * (count * n / (count + n))
    else:  # an infinite mean stays infinite, as a plain sum would; the deviations are NaN
        mean[0] += mean_n
        m2[0] += m2_n + delta * 0


cdef inline bint pivot_is_far(double n, double sum, double square) noexcept nogil:
    """Whether the mean of d lies more than two standard deviations from zero: d*d has lost digits. False for NaN."""
    return 5 * sum * sum > 4 * n * square


cdef inline double deviations(double n, double sum, double square) noexcept nogil:
    """M2 around the mean from the sums of d and d*d; rounding does not make it negative, NaN stays."""
    cdef double m2 = square - sum * (sum / n)
    return 0 if m2 < 0 else m2


cdef inline bint in_range(double sum, double square, real* kind) noexcept nogil:
    """Whether sums of d and d*d kept their digits. Both are 0 where all data equal the pivot; NaN is not in range."""
    if real is float:
        return FLOAT_SQUARES_MIN <= square <= FLOAT_MAX or (sum == 0 and square == 0)
    else:
        return True


cdef void moments_in_double(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                            double* mean, double* m2) noexcept nogil:
    """Mean and M2 of a channel's samples start to stop, in two passes; x is the channel's first sample."""
    cdef Py_ssize_t i
    cdef double d, sum = 0, square = 0
    for i in range(start, stop):
        sum += x[i // inner * stride + i % inner]
        if isnan(sum):
            break
    mean[0] = sum / (stop - start)
    if not isfinite(mean[0]):
        m2[0] = NAN
        return
    for i in range(start, stop):
        d = x[i // inner * stride + i % inner] - mean[0]
        square += d * d
    m2[0] = square


cdef inline double column_sum(const real* sums, Py_ssize_t k, Py_ssize_t inner) noexcept nogil:
    return sums[k] if inner == 1 else lanes_sum(sums + k * inner, inner)


cdef inline void spread(real* row, Py_ssize_t k, Py_ssize_t inner, double value) noexcept nogil:
    """Give each of channel k's columns the same value."""
    cdef Py_ssize_t j
    for j in range(k * inner, (k + 1) * inner):
        row[j] = <real> value


cdef inline real typical(const real* x, Py_ssize_t n, Py_ssize_t stride) noexcept nogil:
    """The one of n values that lies nearest to their mean; 0 where that is not finite.

    A value of the data keeps d exact where the data lie on a grid (integers, pixels), and 0 for constant data.
    """
    cdef double mean = 0
    cdef real best = x[0]
    cdef Py_ssize_t i
    for i in range(n):
        mean += x[i * stride]
    mean /= n
    if not isfinite(mean):
        return 0
    for i in range(1, n):
        if fabs(x[i * stride] - mean) < fabs(best - mean):
            best = x[i * stride]
    return best


cdef inline void first_pivot(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels, Py_ssize_t inner,
                             real* pivot) noexcept nogil:
    """A value near each channel's mean, from its first few samples."""
    cdef Py_ssize_t k
    for k in range(channels):
        if inner == 1:
            pivot[k] = typical(x + k, min(rows, SAMPLES), stride)
        else:
            spread(pivot, k, inner, typical(x + k * inner, min(inner, SAMPLES), 1))


cdef void stats_of_columns(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t channels, Py_ssize_t inner,
                           double* mean, double* m2, real* scratch) noexcept nogil:
    """Mean and M2 of each channel over `rows` rows."""
    cdef Py_ssize_t width = channels * inner, chunk, start, n_rows, r, k, attempt
    cdef real *pivot = scratch
    cdef real *sum = scratch + width
    cdef real *square = sum + width
    cdef double n, count, a, b, mean_n, m2_n
    cdef bint far
    for chunk in range(ceil_div(rows, CHUNK_ROWS)):
        start = chunk * CHUNK_ROWS
        n_rows = min(<Py_ssize_t> CHUNK_ROWS, rows - start)
        count, n = <double> (start * inner), <double> (n_rows * inner)
        if start == 0:
            first_pivot(x, rows, stride, channels, inner, pivot)
        for attempt in range(2):
            memset(sum, 0, 2 * width * sizeof(real))
            for r in range(start, start + n_rows):
                bn_stats_columns(x + r * stride, width, pivot, sum, square)
            if attempt == 1:
                break
            far = False
            for k in range(channels):
                a, b = column_sum(sum, k, inner), column_sum(square, k, inner)
                far |= in_range(a, b, sum) and pivot_is_far(n, a, b)
            if not far:
                break
            for k in range(channels):
                a, b = column_sum(sum, k, inner), column_sum(square, k, inner)
                if in_range(a, b, sum) and isfinite(pivot[k * inner] + a / n):
                    spread(pivot, k, inner, pivot[k * inner] + a / n)
        for k in range(channels):
            a, b = column_sum(sum, k, inner), column_sum(square, k, inner)
            mean_n, m2_n = pivot[k * inner] + a / n, deviations(n, a, b)
            if not in_range(a, b, sum):
                moments_in_double(x + k * inner, start * inner, (start + n_rows) * inner, inner, stride, &mean_n, &m2_n)
            merge_moments(count, &mean[k], &m2[k], n, mean_n, m2_n)


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


cdef void stats_of_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                       double* mean, double* m2, real* scratch) noexcept nogil:
    """Mean and M2 of one channel over its samples start to stop."""
    cdef real *sum = scratch
    cdef real *square = scratch + LANES
    cdef Py_ssize_t chunk, s, e, o = start // inner, at = start - o * inner
    cdef double n, a, b, mean_n, m2_n
    cdef real pivot
    pivot = typical(x + o * stride + at, min(inner - at, stop - start, SAMPLES), 1)
    for chunk in range(ceil_div(stop - start, CHUNK)):
        s = start + chunk * CHUNK
        e = min(s + CHUNK, stop)
        n = <double> (e - s)
        sum_run(x, s, e, inner, stride, pivot, sum, square)
        a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
        if in_range(a, b, sum) and pivot_is_far(n, a, b) and isfinite(pivot + a / n):
            pivot = <real> (pivot + a / n)
            sum_run(x, s, e, inner, stride, pivot, sum, square)
            a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
        mean_n, m2_n = pivot + a / n, deviations(n, a, b)
        if not in_range(a, b, sum):
            moments_in_double(x, s, e, inner, stride, &mean_n, &m2_n)
        merge_moments(<double> (s - start), mean, m2, n, mean_n, m2_n)


cdef void stats_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the forward: mean and M2 of the channels of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef double *mean = job.partial + 2 * b * job.channels
    cdef double *m2 = mean + job.channels
    cdef const real *x = <const real*> job.x + c0 * job.inner
    if job.columns:
        stats_of_columns(x + u0 * stride, u1 - u0, stride, c1 - c0, job.inner, mean + c0, m2 + c0, scratch)
    else:
        for c in range(c0, c1):
            stats_of_run(x + (c - c0) * job.inner, u0, u1, job.inner, stride, mean + c, m2 + c, scratch)


cdef inline void set_parameters(const Job* job, Py_ssize_t c, double mean, double var, real* table) noexcept nogil:
    """Column c of the parameter table: what apply needs of a channel with this mean and variance."""
    cdef Py_ssize_t ld = job.channels
    cdef double inv_std = 1 / sqrt(var + job.eps)
    cdef double gamma = 1 if job.gamma == NULL else (<const real*> job.gamma)[c]
    job.inv_std[c] = inv_std
    table[BN_MEAN_HI * ld + c] = <real> mean
    # An infinite mean has no low part (inf - inf is NaN), and makes its outputs infinite or NaN by itself.
    table[BN_MEAN_LO * ld + c] = <real> (mean - table[BN_MEAN_HI * ld + c]) if isfinite(mean) else 0
    table[BN_SCALE * ld + c] = <real> (gamma * inv_std)
    table[BN_BETA * ld + c] = 0 if job.beta == NULL else (<const real*> job.beta)[c]


cdef void merge_blocks(const Job* job, Py_ssize_t c) noexcept nogil:
    """Merge channel c's blocks in their order, into the first."""
    cdef Py_ssize_t b, per_unit = job.inner if job.columns else 1, before, n
    cdef double *part
    for b in range(1, job.blocks):
        part = job.partial + 2 * b * job.channels + c
        before = first_unit(job, b) * per_unit
        n = first_unit(job, b + 1) * per_unit - before
        merge_moments(<double> before, &job.partial[c], &job.partial[job.channels + c], <double> n, part[0],
                      part[job.channels])


cdef void finish_statistics(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
    """Merge the blocks of tile t; set parameters and running statistics."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c
    cdef double mean, m2, keep = 1 - job.momentum, count = <double> job.outer * job.inner
    cdef real *running_mean = <real*> job.running_mean
    cdef real *running_var = <real*> job.running_var
    for c in range(c0, c1):
        merge_blocks(job, c)
        mean, m2 = job.partial[c], job.partial[job.channels + c]
        set_parameters(job, c, mean, m2 / count, <real*> job.table)
        if running_mean != NULL:
            running_mean[c] = <real> (keep * running_mean[c] + job.momentum * mean)
            running_var[c] = <real> (keep * running_var[c] + job.momentum * (m2 / (count - job.unbiased)))


# -- apply -------------------------------------------------------------------------------------------------------------


cdef const real* spread_table(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t rows, real* scratch,
                              Py_ssize_t* ld) noexcept nogil:
    """The parameter table of these channels, an entry for each column; returns it and its row length."""
    cdef const real *table = <const real*> job.table
    cdef Py_ssize_t width = (c1 - c0) * job.inner, row, c
    if job.inner == 1:
        ld[0] = job.channels
        return table + c0
    for row in range(rows):
        for c in range(c0, c1):
            spread(scratch + row * width, c - c0, job.inner, table[row * job.channels + c])
    ld[0] = width
    return scratch


cdef inline Py_ssize_t piece_length(const void* dst, Py_ssize_t left, Py_ssize_t itemsize) noexcept nogil:
    """Length of the next piece through the streaming buffer: up to a cache line's end, so that lines are whole."""
    return min(left, PIECE - <Py_ssize_t> (<size_t> dst % 64) // itemsize)


cdef void apply_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """Second half of the forward: y of tile t, block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, u, o, at, i, n, left, ld, width
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef const real *x = <const real*> job.x
    cdef const real *residual = <const real*> job.residual
    cdef real *y = <real*> job.y
    cdef real *buffer
    cdef const real *table
    cdef real slope = <real> job.slope
    if job.columns:
        table = spread_table(job, c0, c1, BN_BETA + 1, scratch, &ld)
        buffer = scratch + BN_ROWS * job.width
        width = (c1 - c0) * job.inner
        for u in range(u0, u1):
            i = u * stride + c0 * job.inner
            bn_apply(x + i, at_offset(residual, i), buffer if job.stream else y + i, width,
                     table, ld, 1, slope, job.activation)
            if job.stream:
                stream_copy(y + i, buffer, width * sizeof(real))
    else:
        table, ld = <const real*> job.table, job.channels
        buffer = scratch
        # In the order of memory: outer index by outer index, channel by channel.
        for o in range(u0 // job.inner, ceil_div(u1, job.inner)):
            at = max(0, u0 - o * job.inner)
            for c in range(c0, c1):
                i = o * stride + c * job.inner + at
                left = min(job.inner, u1 - o * job.inner) - at
                while left > 0:
                    n = piece_length(y + i, left, sizeof(real)) if job.stream else left
                    bn_apply(x + i, at_offset(residual, i), buffer if job.stream else y + i, n,
                             table + c, ld, 0, slope, job.activation)
                    if job.stream:
                        stream_copy(y + i, buffer, n * sizeof(real))
                    i += n
                    left -= n
    if job.stream:
        stream_fence()


cdef inline void forward_tile(const Job* job, Py_ssize_t t, real* scratch) noexcept nogil:
    """Both halves of the forward on a tile in one block: the second reading finds x in the cache."""
    stats_item(job, t, 0, scratch)
    finish_statistics(job, t, scratch)
    apply_item(job, t, 0, scratch)


cdef void run_forward(const Job* job, int threads, real* kind) noexcept nogil:
    """Training: statistics of this batch."""
    cdef Py_ssize_t t, i, items = job.tiles * job.blocks
    if job.blocks == 1:
        if threads == 1:
            for t in range(job.tiles):
                forward_tile(job, t, <real*> scratch_of(job, 0))
        else:
            for t in prange(job.tiles, schedule="dynamic", chunksize=1, num_threads=threads):
                forward_tile(job, t, <real*> scratch_of(job, threadid()))
        return
    with parallel(num_threads=threads):
        for i in prange(items, schedule="dynamic", chunksize=1):
            stats_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, threadid()))
        for t in prange(job.tiles, schedule="dynamic", chunksize=1):
            finish_statistics(job, t, kind)
        # Backwards: what was read last is still in the cache.
        for i in prange(items, schedule="dynamic", chunksize=1):
            apply_item(job, (items - 1 - i) % job.tiles, (items - 1 - i) // job.tiles,
                       <real*> scratch_of(job, threadid()))


cdef void run_moments(const Job* job, int threads, real* kind) noexcept nogil:
    """Statistics alone, merged over the blocks into the first one's partial results."""
    cdef Py_ssize_t c, i, items = job.tiles * job.blocks
    if threads == 1:
        for i in range(items):
            stats_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, 0))
    else:
        for i in prange(items, schedule="dynamic", chunksize=1, num_threads=threads):
            stats_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, threadid()))
    for c in range(job.channels):
        merge_blocks(job, c)


cdef void run_standardize(const Job* job, const double* mean, const double* var, int threads,
                          real* kind) noexcept nogil:
    """y = (x - mean) / sqrt(var), for float64 statistics."""
    cdef Py_ssize_t c
    for c in range(job.channels):
        set_parameters(job, c, mean[c], var[c], <real*> job.table)
    run_apply(job, threads, kind)


cdef void run_given(const Job* job, int threads, real* kind) noexcept nogil:
    """Frozen and inference: y from the running statistics."""
    cdef Py_ssize_t c
    for c in range(job.channels):
        set_parameters(job, c, (<real*> job.running_mean)[c], (<real*> job.running_var)[c], <real*> job.table)
    run_apply(job, threads, kind)


cdef void run_apply(const Job* job, int threads, real* kind) noexcept nogil:
    """The second half of the forward alone: the parameter table is set."""
    cdef Py_ssize_t i, items = job.tiles * job.blocks
    if threads == 1:
        for i in range(items):
            apply_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, 0))
    else:
        for i in prange(items, schedule="dynamic", chunksize=1, num_threads=threads):
            apply_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, threadid()))


# -- backward ----------------------------------------------------------------------------------------------------------


cdef void add_reduction(const Job* job, Py_ssize_t c, Py_ssize_t start, Py_ssize_t stop, double a, double b,
                        real* kind, double* sum, double* product) noexcept nogil:
    """Add channel c's sums of dz (a) and dz * (x - mean) (b) over samples start to stop; where they overflowed a float,
    sum again in double.
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
            bn_reduce_columns(<const real*> job.dy + i, x + i, at_offset(<const real*> job.residual, i), 1, table, ld,
                              <real> job.slope, job.activation, &dz, &unused)
            a += dz
            b += dz * ((<double> x[i] - table[BN_MEAN_HI * ld]) - table[BN_MEAN_LO * ld])
            if isnan(a) and isnan(b):
                break
    sum[c] += a
    product[c] += b


cdef void reduce_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the backward: sums of dz and of dz * (x - mean) of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, k, u, o, at, i, n, ld, width
    cdef Py_ssize_t chunk, start, stop, begin
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef double *sum = job.partial + 2 * b * job.channels
    cdef double *product = sum + job.channels
    cdef const real *x = <const real*> job.x
    cdef const real *dy = <const real*> job.dy
    cdef const real *residual = <const real*> job.residual
    cdef const real *table
    cdef real *lanes = scratch + BN_ROWS * job.width
    cdef real slope = <real> job.slope
    memset(sum + c0, 0, (c1 - c0) * sizeof(double))
    memset(product + c0, 0, (c1 - c0) * sizeof(double))
    if job.columns:
        table = spread_table(job, c0, c1, BN_BETA + 1, scratch, &ld)
        width = (c1 - c0) * job.inner
        for chunk in range(ceil_div(u1 - u0, CHUNK_ROWS)):
            start = u0 + chunk * CHUNK_ROWS
            memset(lanes, 0, 2 * width * sizeof(real))
            for u in range(start, min(start + CHUNK_ROWS, u1)):
                i = u * stride + c0 * job.inner
                bn_reduce_columns(dy + i, x + i, at_offset(residual, i), width, table, ld, slope,
                                  job.activation, lanes, lanes + width)
            for k in range(c1 - c0):
                add_reduction(job, c0 + k, start * job.inner, min(start + CHUNK_ROWS, u1) * job.inner,
                              column_sum(lanes, k, job.inner), column_sum(lanes + width, k, job.inner), lanes, sum,
                              product)
        return
    table, ld = <const real*> job.table, job.channels
    for c in range(c0, c1):
        start = u0
        while start < u1:
            memset(lanes, 0, 2 * LANES * sizeof(real))
            begin = start
            stop = min(start + CHUNK, u1)
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
    cdef real *table = <real*> job.table
    cdef double sum, product, inv_std, count = <double> job.outer * job.inner
    for c in range(c0, c1):
        sum = product = 0
        for b in range(job.blocks):
            sum += job.partial[2 * b * ld + c]
            product += job.partial[(2 * b + 1) * ld + c]
        inv_std = job.inv_std[c]
        (<real*> job.dbeta)[c] = <real> sum
        (<real*> job.dgamma)[c] = <real> (product * inv_std)
        table[BN_DZ_MEAN * ld + c] = <real> (sum / count)
        table[BN_SLOPE_X * ld + c] = <real> (product / count * inv_std * inv_std)


cdef inline void gradient_run(const Job* job, Py_ssize_t i, Py_ssize_t n, const real* table, Py_ssize_t ld, int step,
                              real* buffer) noexcept nogil:
    """dx, and dresidual where there is one, of n values at i; through the buffer where stores stream."""
    cdef const real *residual = at_offset(<const real*> job.residual, i)
    cdef real *dx = <real*> job.y + i
    cdef real *dresidual = NULL if job.residual == NULL else <real*> job.dresidual + i
    cdef real *dx_buffer = buffer if job.stream else dx
    cdef real *dresidual_buffer = buffer + max(job.width, PIECE) if job.stream else dresidual
    bn_gradient(<const real*> job.dy + i, <const real*> job.x + i, residual, dx_buffer, dresidual_buffer, n, table, ld,
                step, <real> job.slope, job.activation, job.frozen)
    if job.stream:
        stream_copy(dx, dx_buffer, n * sizeof(real))
        if dresidual != NULL:
            stream_copy(dresidual, dresidual_buffer, n * sizeof(real))


cdef void gradient_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """Second half of the backward: dx and dresidual of tile t, block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, u, o, at, i, n, left, ld
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef const real *table
    cdef real *buffer = scratch + (BN_ROWS + 3) * job.width
    if job.columns:
        table = spread_table(job, c0, c1, BN_ROWS, scratch, &ld)
        for u in range(u0, u1):
            gradient_run(job, u * stride + c0 * job.inner, (c1 - c0) * job.inner, table, ld, 1, buffer)
    else:
        table, ld = <const real*> job.table, job.channels
        for o in range(u0 // job.inner, ceil_div(u1, job.inner)):
            at = max(0, u0 - o * job.inner)
            for c in range(c0, c1):
                i = o * stride + c * job.inner + at
                left = min(job.inner, u1 - o * job.inner) - at
                while left > 0:
                    n = piece_length(<real*> job.y + i, left, sizeof(real)) if job.stream else left
                    gradient_run(job, i, n, table + c, ld, 0, buffer)
                    i += n
                    left -= n
    if job.stream:
        stream_fence()


cdef inline void backward_tile(const Job* job, Py_ssize_t t, real* scratch) noexcept nogil:
    """Both halves of the backward on a tile in one block."""
    reduce_item(job, t, 0, scratch)
    finish_reduction(job, t, scratch)
    gradient_item(job, t, 0, scratch)


cdef void run_backward(const Job* job, int threads, real* kind) noexcept nogil:
    cdef Py_ssize_t t, i, items = job.tiles * job.blocks
    if job.blocks == 1:
        if threads == 1:
            for t in range(job.tiles):
                backward_tile(job, t, <real*> scratch_of(job, 0))
        else:
            for t in prange(job.tiles, schedule="dynamic", chunksize=1, num_threads=threads):
                backward_tile(job, t, <real*> scratch_of(job, threadid()))
        return
    with parallel(num_threads=threads):
        for i in prange(items, schedule="dynamic", chunksize=1):
            reduce_item(job, i % job.tiles, i // job.tiles, <real*> scratch_of(job, threadid()))
        for t in prange(job.tiles, schedule="dynamic", chunksize=1):
            finish_reduction(job, t, kind)
        for i in prange(items, schedule="dynamic", chunksize=1):
            gradient_item(job, (items - 1 - i) % job.tiles, (items - 1 - i) // job.tiles,
                          <real*> scratch_of(job, threadid()))


# -- what Python calls: every argument has been checked, every array is dense and laid out alike -----------------------


cdef void* allocate(Job* job, int threads, bint statistics) except NULL:
    """Scratch of all threads and the partial results, in one piece; sets the job's pointers."""
    cdef size_t partial = 2 * job.blocks * job.channels * sizeof(double) if statistics else 0
    cdef char *memory = <char*> scratch_alloc(threads * job.scratch_bytes + partial)
    if memory == NULL:
        raise MemoryError("fastnorm: no memory for the scratch of batch norm")
    job.scratch = memory
    job.partial = <double*> (memory + threads * job.scratch_bytes)
    return memory


def forward(x, residual, y, gamma, beta, running_mean, running_var, table, inv_std, Py_ssize_t outer,
            Py_ssize_t channels, Py_ssize_t inner, bint training, double momentum, double eps, bint unbiased,
            int activation, double slope, int threads):
    """y, the parameter table (BN_ROWS, C) and inv_std (C,) from x; in training also the running statistics."""
    cdef Job job
    cdef Py_ssize_t itemsize = 4 if is_float32(x) else 8
    cdef void *memory
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x, job.residual, job.y = data(x), data(residual), data(y)
    job.gamma, job.beta = data(gamma), data(beta)
    job.running_mean, job.running_var = data(running_mean), data(running_var)
    job.table, job.inv_std = data(table), <double*> data(inv_std)
    job.momentum, job.eps, job.unbiased = momentum, eps, unbiased
    job.activation, job.slope = activation, slope
    if outer * channels * inner == 0:
        return
    job.stream = outer * channels * inner * itemsize >= STREAM and job.y != job.x and job.y != job.residual
    plan(&job, itemsize, 1, training)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads, training)
    with nogil:
        if itemsize == 4:
            if training:
                run_forward(&job, threads, <float*> NULL)
            else:
                run_given(&job, threads, <float*> NULL)
        else:
            if training:
                run_forward(&job, threads, <double*> NULL)
            else:
                run_given(&job, threads, <double*> NULL)
        scratch_free(memory)


def moments(x, mean, m2, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, int threads):
    """Mean and M2 (C,), float64, of each channel of x."""
    cdef Job job
    cdef Py_ssize_t itemsize = 4 if is_float32(x) else 8
    cdef double *mean_out = <double*> data(mean)
    cdef double *m2_out = <double*> data(m2)
    cdef void *memory
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x = data(x)
    if outer * channels * inner == 0:
        return
    plan(&job, itemsize, 1, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads, True)
    with nogil:
        if itemsize == 4:
            run_moments(&job, threads, <float*> NULL)
        else:
            run_moments(&job, threads, <double*> NULL)
        memcpy(mean_out, job.partial, channels * sizeof(double))
        memcpy(m2_out, job.partial + channels, channels * sizeof(double))
        scratch_free(memory)


def standardize(x, y, mean, var, table, inv_std, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, int threads):
    """y = (x - mean) / sqrt(var) for float64 mean and var (C,); table and inv_std are working space."""
    cdef Job job
    cdef Py_ssize_t itemsize = 4 if is_float32(x) else 8
    cdef const double *mean_in = <const double*> data(mean)
    cdef const double *var_in = <const double*> data(var)
    cdef void *memory
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x, job.y, job.table, job.inv_std = data(x), data(y), data(table), <double*> data(inv_std)
    if outer * channels * inner == 0:
        return
    job.stream = outer * channels * inner * itemsize >= STREAM and job.y != job.x
    plan(&job, itemsize, 1, False)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads, False)
    with nogil:
        if itemsize == 4:
            run_standardize(&job, mean_in, var_in, threads, <float*> NULL)
        else:
            run_standardize(&job, mean_in, var_in, threads, <double*> NULL)
        scratch_free(memory)


def backward(dy, x, residual, dx, dresidual, table, inv_std, dgamma, dbeta, Py_ssize_t outer, Py_ssize_t channels,
             Py_ssize_t inner, bint training, int activation, double slope, int threads):
    """dx, dresidual, dgamma and dbeta (C,) from dy and what forward kept; fills the last two rows of the table."""
    cdef Job job
    cdef Py_ssize_t itemsize = 4 if is_float32(x) else 8
    cdef void *memory
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x, job.dy, job.residual = data(x), data(dy), data(residual)
    job.y, job.dresidual = data(dx), data(dresidual)
    job.table, job.inv_std = data(table), <double*> data(inv_std)
    job.dgamma, job.dbeta = data(dgamma), data(dbeta)
    job.activation, job.slope, job.frozen = activation, slope, not training
    if outer * channels * inner == 0:
        memset(job.dgamma, 0, channels * itemsize)
        memset(job.dbeta, 0, channels * itemsize)
        return
    job.stream = outer * channels * inner * itemsize >= STREAM and job.y != job.dy
    plan(&job, itemsize, 2, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads, True)
    with nogil:
        if itemsize == 4:
            run_backward(&job, threads, <float*> NULL)
        else:
            run_backward(&job, threads, <double*> NULL)
        scratch_free(memory)


def build_flags():
    """Compiler flags of this level's build."""
    return fastnorm_build_flags().decode()
