"""Second halves of batch norm: y, or dx and dresidual, from the parameter table."""

from libc.string cimport memcpy

from .batchnorm_parameters cimport careful_item, is_gradient_plain, is_plain, spread_table
from .batchnorm_plan cimport PIECE, SHORT, STREAM_PIECE, Job, ceil_div, first_unit, padded
from .vector cimport (
    BN_BETA, BN_ROWS, SPREAD, Ahead, ahead_of_runs, at_offset, bn_apply, bn_apply_channels, bn_gradient,
    bn_gradient_channels, fetch, fetch_ahead, real, stream_copy, stream_fence,
)


cdef struct Writer:
    char* target    # what is streamed next goes here
    char* buffer
    Py_ssize_t held  # bytes of the buffer that wait for the rest of their line


cdef inline void flush(Writer* writer) noexcept nogil:
    if writer.held > 0:  # before the first piece, there is no target either
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
    Py_ssize_t next    # how far on this thread's next tile lies, or 0
    Py_ssize_t end     # of the contiguous values of this row of the tile
    Ahead ahead        # what is read after them


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
    if out.next:
        fetch(x + out.next, n * sizeof(real))
        if dy != NULL:
            fetch(dy + out.next, n * sizeof(real))
        if residual != NULL:
            fetch(residual + out.next, n * sizeof(real))
    elif job.fetch:
        out.ahead.left = (out.end - i) * sizeof(real)
        fetch_ahead(x, 0, n * sizeof(real), out.ahead)
        if dy != NULL:
            fetch_ahead(dy, 0, n * sizeof(real), out.ahead)
        if residual != NULL:
            fetch_ahead(residual, 0, n * sizeof(real), out.ahead)
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


cdef inline void row_of(const Job* job, Output* out, Py_ssize_t begin, Py_ssize_t end, bint another,
                        real* kind) noexcept nogil:
    """Note where the contiguous values begin and end that are computed now, and whether there are others."""
    out.end = end
    out.ahead = ahead_of_runs((end - begin) * sizeof(real), job.channels * job.inner * sizeof(real) if another else 0)


cdef inline void output_rows(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t width, Py_ssize_t start,
                             Py_ssize_t stop, real* kind) noexcept nogil:
    """The columns of rows start to stop, from the table of columns."""
    cdef Py_ssize_t i, end, column, n, o = start, stride = job.channels * job.inner, rows = 1
    if job.contiguous:
        rows = stop - start
    while o < stop:
        i, end, column = o * stride + c0 * job.inner, o * stride + c0 * job.inner + rows * width, 0
        row_of(job, out, i, end, o + rows < stop, kind)
        while i < end:
            n = piece(job, i, end - i, job.fold * width, kind)
            output(job, out, i, n, 0, column, 1, kind)
            i += n
            column = (column + n) % width
        o += rows


cdef inline void output_channels(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t start,
                                 Py_ssize_t stop, real* kind) noexcept nogil:
    """Channels c0 to c1 of rows start to stop, several at a time."""
    cdef Py_ssize_t group = max(1, PIECE // job.inner), o, c, n
    for o in range(start, stop):
        c = c0
        row_of(job, out, (o * job.channels + c0) * job.inner, (o * job.channels + c1) * job.inner, o + 1 < stop, kind)
        while c < c1:
            n = min(group, c1 - c)
            output(job, out, (o * job.channels + c) * job.inner, n * job.inner, n, c, 0, kind)
            c += n


cdef inline void output_runs(const Job* job, Output* out, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t start,
                             Py_ssize_t stop, real* kind) noexcept nogil:
    """Samples start to stop of channels c0 to c1, in the order of memory: outer by outer, channel by channel."""
    cdef Py_ssize_t o, at, c, i, n, left
    for o in range(start // job.inner, ceil_div(stop, job.inner)):
        at = max(0, start - o * job.inner)
        row_of(job, out, (o * job.channels + c0) * job.inner, (o * job.channels + c1) * job.inner,
               (o + 1) * job.inner < stop, kind)
        for c in range(c0, c1):
            i = (o * job.channels + c) * job.inner + at
            left = min(job.inner, stop - o * job.inner) - at
            while left > 0:
                n = piece(job, i, left, left, kind)
                output(job, out, i, n, 0, c, 0, kind)
                i += n
                left -= n


cdef inline void output_item(const Job* job, Py_ssize_t t, Py_ssize_t b, Py_ssize_t next, real* scratch) noexcept nogil:
    """Second half: the output of tile t, block b. Tile `next`, if there is one beyond t, is fetched meanwhile."""
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
    out.next = (next - t) * job.tile * job.inner if t < next < job.tiles else 0
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
