"""How softmax's work is cut: form, blocks, tiles and scratch; by the shape alone. The reasons are in `softmax.pyx`."""

from libc.stdint cimport int16_t, int32_t, int64_t, int8_t, uint16_t, uint32_t, uint8_t

from .vector cimport STREAM_BYTES

cdef enum Form:
    SOFTMAX, LOG_SOFTMAX, CROSS_ENTROPY

cdef enum:
    ROW_CLASSES = 128           # from here on a row alone is faster than lanes (measured, AVX-512: even at 96 to 128)
    FEW_LANES = 64              # lanes of a block with many classes, and
    MANY_LANES = 256            # with few
    BLOCK_BYTES = 1 << 18       # most memory for a block's exponentials, or they are computed twice: L2 holds this
    LANES_IN_L1 = 1 << 15       # blocks up to this size take MANY_LANES
    ROW_BYTES = 1 << 19         # as BLOCK_BYTES, for a row
    DELAYED_BYTES = 1 << 18     # the same where two rows are kept, of
    DELAYED_FROM = 1 << 14      # as many bytes each: with 1,000 classes it saves nothing, with 32,000 a sixth; and
    DELAYED_ROWS = 16           # rows of a tile at least then: the first one has none before it
    STAGE = 1024                # elements computed in L1 before they are streamed out
    TILE = 8192                 # elements of a tile at least, about 5 microseconds,
    LONG_TILE = 1 << 19         # bytes of a tile at most: the processor's prefetch begins anew in each
    TILES = 64                  # of an array, between
    SMALL_SUM = 4               # sums of exponentials below it are added up in double
    SERIAL = 16384              # elements up to which waking threads costs more than it gains
    DOUBLE_ROWS = 5             # total, logs, mass, dot, label
    REAL_ROWS = 11              # m, frame (5), factor, power, log_sum, spike, one class's exponentials


cdef struct Job:
    Form form
    # Shape and plan.
    Py_ssize_t outer, classes, inner
    bint rows                           # which form
    bint kept                           # the exponentials stay in scratch
    bint delayed                        # a row is streamed out while the next one's exponentials are computed
    bint stream
    Py_ssize_t width                    # lanes: a block's positions, rounded up
    Py_ssize_t outers                   # lanes: whole outers of a block; 1: a block is `span` positions of one outer
    Py_ssize_t span, blocks_of_outer
    Py_ssize_t blocks, blocks_per_tile, tiles
    Py_ssize_t scratch_bytes            # of one thread
    # Arrays; NULL where there is none.
    const void* x                       # IN (outer, C, inner)
    void* out                           # OUT (outer, C, inner), may be x
    const void* probabilities           # IN (outer, C, inner)
    const void* labels                  # IN (outer * inner,)
    const void* weight                  # IN (C,)
    void* losses                        # OUT (outer * inner,) losses of the positions, or NULL
    # Options of cross-entropy.
    int label_code
    bint has_ignore
    int64_t ignore
    double keep                         # 1 - label_smoothing
    double smooth                       # label_smoothing / C
    double uniform                      # smooth * sum(weight): the mass that labels leave to all classes
    double divisor


cdef inline void plan(Job* job, Py_ssize_t itemsize) noexcept:
    """Choose form, blocks, tiles and scratch by the shape alone."""
    cdef Py_ssize_t C = job.classes, lanes, length
    job.rows = job.inner == 1 and C >= ROW_CLASSES
    job.delayed = False
    job.width = 0
    job.outers = job.span = job.blocks_of_outer = 1
    # Half the usual size: results go through a buffer anyway (0.73 ms against 0.83 at (4096, 1000), 16.4 MB).
    job.stream = job.outer * C * job.inner * itemsize >= STREAM_BYTES // 2 and job.out != job.x
    if job.rows:
        job.kept = C * itemsize <= ROW_BYTES and job.form != LOG_SOFTMAX
        job.delayed = job.kept and job.stream and DELAYED_FROM <= C * itemsize <= DELAYED_BYTES
        job.blocks = job.outer
        job.scratch_bytes = (STAGE + C * (job.kept + job.delayed)) * itemsize
        lanes = 1
    else:
        lanes = MANY_LANES if C * MANY_LANES * itemsize <= LANES_IN_L1 else FEW_LANES
        if job.inner <= lanes // 2 and C * lanes * itemsize <= BLOCK_BYTES:
            job.outers = lanes // job.inner
            job.blocks = (job.outer + job.outers - 1) // job.outers
            lanes = min(job.outers, job.outer) * job.inner
        else:  # as equal parts of an outer as lanes allow
            job.blocks_of_outer = (job.inner + lanes - 1) // lanes
            job.span = (job.inner + job.blocks_of_outer - 1) // job.blocks_of_outer
            job.blocks = job.outer * job.blocks_of_outer
            lanes = job.span
        job.width = (lanes + 15) // 16 * 16
        job.kept = C * job.width * itemsize <= BLOCK_BYTES
        job.scratch_bytes = job.width * (DOUBLE_ROWS * sizeof(double) + REAL_ROWS * itemsize)
        if job.kept:
            job.scratch_bytes += C * job.width * itemsize * (2 if job.outers > 1 else 1)
        else:
            job.stream = False
    job.scratch_bytes = (job.scratch_bytes + 63) // 64 * 64
    length = max(<Py_ssize_t> TILE, min(LONG_TILE // itemsize, job.outer * C * job.inner // TILES))
    job.blocks_per_tile = max(1, length // (C * lanes))
    if job.delayed:
        job.blocks_per_tile = max(job.blocks_per_tile, min(<Py_ssize_t> DELAYED_ROWS, job.blocks // TILES))
    job.tiles = (job.blocks + job.blocks_per_tile - 1) // job.blocks_per_tile


cdef inline int64_t label(const void* labels, int code, Py_ssize_t i) noexcept nogil:
    if code == 8:
        return (<const int64_t*> labels)[i]
    if code == 4:
        return (<const int32_t*> labels)[i]
    if code == -1:
        return (<const uint8_t*> labels)[i]
    if code == 2:
        return (<const int16_t*> labels)[i]
    if code == 1:
        return (<const int8_t*> labels)[i]
    if code == -2:
        return (<const uint16_t*> labels)[i]
    return (<const uint32_t*> labels)[i]
