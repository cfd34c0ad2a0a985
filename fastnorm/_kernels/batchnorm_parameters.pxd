"""The parameter table of batch norm; and channels whose parameters are beyond the range of the usual loops."""

from libc.string cimport memcpy

from .batchnorm_plan cimport Job, first_unit, padded
from .vector cimport (
    at_offset, bn_careful_apply, bn_careful_gradient, bn_careful_reduce, bn_parameters, bn_plain, bn_plain_gradient,
    bn_spread, real,
)


cdef inline void set_parameters(const Job* job, Py_ssize_t c0, Py_ssize_t c1, const double* base, const double* offset,
                                const double* var, real* kind) noexcept nogil:
    """The parameter table of channels c0 to c1, of mean base + offset; each array begins at channel 0."""
    bn_parameters(base + c0, offset + c0, var + c0, at_offset(<const real*> job.gamma, c0),
                  at_offset(<const real*> job.beta, c0), job.eps, c1 - c0, <real*> job.table + c0, job.channels,
                  job.wide + c0)


cdef inline void repeat(real* row, Py_ssize_t n, Py_ssize_t total) noexcept nogil:
    """Repeat the first n columns until there are `total`."""
    cdef Py_ssize_t m
    while n < total:
        m = min(n, total - n)
        memcpy(row + n, row, m * sizeof(real))
        n += m


cdef inline const real* spread_table(const Job* job, Py_ssize_t c0, Py_ssize_t c1, int first, int end, real* scratch,
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


# -- tiles with a channel beyond the range of the loops ----------------------------------------------------------------


cdef inline bint is_plain(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """Whether channels c0 to c1 can go through the usual loops."""
    return job.plain or bn_plain(<const real*> job.table + c0, job.wide + c0, job.channels, c1 - c0)


cdef inline bint is_gradient_plain(const Job* job, Py_ssize_t c0, Py_ssize_t c1, real* kind) noexcept nogil:
    """Whether their gradient can."""
    return job.frozen or bn_plain_gradient(<const real*> job.table + c0, job.channels, c1 - c0)


cdef inline void careful_item(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t b, double* sum, double* product,
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
