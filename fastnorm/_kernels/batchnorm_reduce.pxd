"""First halves of batch norm: all that is needed of a channel before its output, and what is made of it."""

from libc.math cimport NAN, fabs, isfinite, isnan
from libc.string cimport memset

from .batchnorm_parameters cimport careful_item, is_plain, repeat, set_parameters, spread_table
from .batchnorm_plan cimport CHUNK, CHUNK_ROWS, SAMPLES, STATISTICS, Job, ceil_div, first_unit, padded
from .vector cimport (
    BN_BETA, BN_INV_STD, BN_MEAN_HI, BN_MEAN_LO, BN_ROWS, LANES, Ahead, ahead_of_runs, at_offset, bn_add_finite,
    bn_any_far, bn_channel_sums, bn_finish_reduction, bn_in_range, bn_merge, bn_merge_chunk, bn_reduce_columns,
    bn_reduce_run, bn_spread, bn_square_sum, bn_squares_vanished, bn_stats_columns, bn_stats_run, bn_typical,
    bn_update_running, bn_wide_moments, lanes_sum, real,
)


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


cdef inline void stats_of_columns(const real* x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t fold,
                                  Py_ssize_t channels, Py_ssize_t inner, double* mean, double* m2, double* base,
                                  bint grouped, bint ahead, real* scratch) noexcept nogil:
    """Mean less base, M2 and base of each channel over `rows` rows, of which `fold` are taken as one."""
    cdef Py_ssize_t width = channels * inner, ld = padded(fold * width), chunk, start, n_rows, k, j, attempt, whole
    cdef const real *first
    cdef real *pivot = scratch
    cdef real *sum = pivot + ld
    cdef real *square = sum + ld
    cdef double *sums = <double*> (square + ld)
    cdef double *squares = sums + channels
    cdef double n, better
    cdef int in_range = 1
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
        # Behind a chunk beyond the range comes another, mostly: its sums are not tried.
        for attempt in range(2 if in_range else 0):
            memset(sum, 0, 2 * ld * sizeof(real))
            bn_stats_columns(first, whole, fold * stride, fold * width, pivot, sum, square, grouped, ahead)
            bn_stats_columns(first + whole * fold * stride, 1, 0, (n_rows - whole * fold) * width, pivot, sum, square,
                             grouped, False)
            bn_channel_sums(sum, fold, channels, inner, sums)
            bn_channel_sums(square, fold, channels, inner, squares)
            in_range = bn_in_range(sums, squares, pivot, inner, channels)
            if attempt == 1 or in_range == 0 or not bn_any_far(n, sums, squares, channels):
                break
            for k in range(channels):
                better = pivot[k * inner] + sums[k] / n
                # A vector at a time would write into the next channel's pivot, which is still to be read.
                for j in range(k * inner, (k + 1) * inner if isfinite(better) else 0):
                    pivot[j] = <real> better
            repeat(pivot, width, ld)
        if in_range == 2:
            in_range = not bn_squares_vanished(first, n_rows, stride, channels, inner, pivot, squares)
        if in_range:
            bn_merge_chunk(<double> (start * inner), n, pivot, inner, sums, squares, channels, base, mean, m2)
        else:
            bn_wide_moments(first, n_rows, stride, channels, inner, sums, squares)
            for k in range(channels):
                merge_moments(<double> (start * inner), n, sums[k] - base[k], squares[k], &mean[k], &m2[k])


cdef inline Ahead next_runs(Py_ssize_t inner, Py_ssize_t at, Py_ssize_t stride, bint another,
                            real kind) noexcept nogil:
    """What is read after the run at `at` of a channel's `inner` values."""
    cdef Ahead ahead = ahead_of_runs(inner * sizeof(real), stride * sizeof(real) if another else 0)
    ahead.left -= at * sizeof(real)
    return ahead


cdef inline void sum_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t end, Py_ssize_t inner,
                         Py_ssize_t stride, real pivot, real* sum, real* square) noexcept nogil:
    """Sums of d and d*d of a channel's samples start to stop, LANES of each; x is the channel's first sample. Those
    up to end come next.
    """
    cdef Py_ssize_t o, at, n, last = (end - 1) // inner
    cdef Ahead ahead
    memset(sum, 0, LANES * sizeof(real))
    memset(square, 0, LANES * sizeof(real))
    while start < stop:
        o = start // inner
        at = start - o * inner
        n = min(inner - at, stop - start)
        ahead = next_runs(inner, at, stride, o < last, pivot)
        bn_stats_run(x + o * stride + at, n, pivot, ahead, sum, square)
        start += n


cdef inline void wide_moments_of_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner,
                                     Py_ssize_t stride, double* mean, double* m2) noexcept nogil:
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


cdef inline bint squares_of_run_vanished(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner,
                                         Py_ssize_t stride, real pivot) noexcept nogil:
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


cdef inline void stats_of_run(const real* x, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t inner, Py_ssize_t stride,
                              double* mean, double* m2, double* base, real* scratch) noexcept nogil:
    """Mean less base, M2 and base of one channel over its samples start to stop."""
    cdef real *sum = scratch
    cdef real *square = scratch + LANES
    cdef Py_ssize_t offsets[SAMPLES]
    cdef Py_ssize_t chunk, s, e
    cdef double n, a, b
    cdef int in_range = 1
    cdef real pivot
    pivot = typical(x, offsets, spaced_offsets(start, min(stop, start + LANES), inner, stride, offsets))
    base[0] = pivot
    for chunk in range(ceil_div(stop - start, CHUNK)):
        s = start + chunk * CHUNK
        e = min(s + CHUNK, stop)
        n = <double> (e - s)
        if in_range:  # as with columns
            sum_run(x, s, e, stop, inner, stride, pivot, sum, square)
            a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
            if pivot_is_far(n, a, b) and isfinite(pivot + a / n):
                pivot = <real> (pivot + a / n)
                sum_run(x, s, e, stop, inner, stride, pivot, sum, square)
                a, b = lanes_sum(sum, LANES), lanes_sum(square, LANES)
            in_range = bn_in_range(&a, &b, &pivot, 1, 1)
        if in_range == 2:
            in_range = not squares_of_run_vanished(x, s, e, inner, stride, pivot)
        if in_range:
            bn_merge_chunk(<double> (s - start), n, &pivot, 1, &a, &b, 1, base, mean, m2)
        else:
            wide_moments_of_run(x, s, e, inner, stride, &a, &b)
            merge_moments(<double> (s - start), n, a - base[0], b, mean, m2)


cdef inline void stats_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the forward: the statistics of the channels of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c
    cdef Py_ssize_t u0 = first_unit(job, b), u1 = first_unit(job, b + 1), stride = job.channels * job.inner
    cdef double *mean = job.partial + STATISTICS * b * job.channels
    cdef double *m2 = mean + job.channels
    cdef double *base = m2 + job.channels
    cdef const real *x = <const real*> job.x + c0 * job.inner
    if job.columns:
        stats_of_columns(x + u0 * stride, u1 - u0, stride, job.fold, c1 - c0, job.inner, mean + c0, m2 + c0,
                         base + c0, job.grouped, job.fetch_rows, scratch)
    else:
        for c in range(c0, c1):
            stats_of_run(x + (c - c0) * job.inner, u0, u1, job.inner, stride, mean + c, m2 + c, base + c, scratch)


cdef inline void merge_blocks(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
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


cdef inline void finish_statistics(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
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


# -- sums of the backward --------------------------------------------------------------------------------------------


cdef inline void add_reduction(const Job* job, Py_ssize_t c, Py_ssize_t start, Py_ssize_t stop, double a, double b,
                               real* kind, double* sum, double* product) noexcept nogil:
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
                              ld, <real> job.slope, job.activation, False, &dz, &unused)
            a += dz
            b += dz * ((<double> x[i] - table[BN_MEAN_HI * ld]) - table[BN_MEAN_LO * ld])
            if isnan(a) and isnan(b):
                break
    sum[c] += a
    product[c] += b


cdef inline void reduce_item(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """First half of the backward: sums of dz and of dz * (x - mean) of tile t over block b."""
    cdef Py_ssize_t c0 = t * job.tile, c1 = min(job.channels, c0 + job.tile), c, k, o, at, i, n, ld, width
    cdef Py_ssize_t start, stop, begin, last
    cdef Ahead ahead
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
                              slope, job.activation, job.fetch_rows, lanes, products_of_columns)
            i += n * job.fold * stride
            bn_reduce_columns(dy + i, x + i, at_offset(residual, i), 1, 0, (stop - start - n * job.fold) * width, table,
                              ld, slope, job.activation, False, lanes, products_of_columns)
            bn_channel_sums(lanes, job.fold, c1 - c0, job.inner, sums)
            bn_channel_sums(products_of_columns, job.fold, c1 - c0, job.inner, products)
            if not bn_add_finite(sums, products, c1 - c0, sum + c0, product + c0):
                for k in range(c1 - c0):
                    add_reduction(job, c0 + k, start * job.inner, stop * job.inner, sums[k], products[k], lanes, sum,
                                  product)
            start = stop
        return
    table, ld, last = <const real*> job.table, job.channels, (u1 - 1) // job.inner
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
                ahead = next_runs(job.inner, at, stride, o < last, slope)
                bn_reduce_run(dy + i, x + i, at_offset(residual, i), n, table + c, ld, slope, job.activation, ahead,
                              lanes, lanes + LANES)
                start += n
            add_reduction(job, c, begin, stop, lanes_sum(lanes, LANES), lanes_sum(lanes + LANES, LANES), lanes, sum,
                          product)


cdef inline void finish_reduction(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
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
