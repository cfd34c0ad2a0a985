"""Softmax, log-softmax and softmax cross-entropy with its gradient, over logits seen as (outer, C, inner).

The twin is `fastnorm/reference/loss.py`.
"""

# Design:
# - A position is a row of C logits; positions are numbered as they lie in memory, outer * inner of them.
# - Two forms. Rows (inner == 1, many classes): the vector lanes are classes; the row's exponentials stay in scratch
#   until their sum is known. Lanes (inner > 1, or few classes): the vector lanes are positions, a block of them at a
#   time; blocks of several whole outers are transposed into scratch and back, others are read where they are.
# - Long rows that go around the cache are written while the next one's exponentials are computed (`delayed`), for
#   either alone leaves memory or the processor without work: 24 against 20.2 ms at (2048,32000), Emerald Rapids.
# - Rows or blocks whose exponentials do not fit the scratch compute them a second time instead of keeping them.
# - The gradient of every kind of target is one formula, p Q - q (see `cross_entropy`), so integer targets are only a
#   uniform mass and one spike.
# - Blocks and tiles depend on the shape alone, and the blocks' losses are added pairwise, in an order of their own.

from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int16_t, int32_t, int64_t, int8_t, uint16_t, uint32_t, uint8_t
from libc.string cimport memset

cimport numpy as cnp

from .softmax_lanes cimport softmax_block
from .softmax_plan cimport CROSS_ENTROPY, LOG_SOFTMAX, SERIAL, SOFTMAX, Job, label, plan
from .softmax_rows cimport Row, finish_row, softmax_row
from .vector cimport (
    Shares, Team, Turn, data, expect_subnormals, fits, is_float32, lanes_sum, met_subnormals, next_tile, real,
    scratch_alloc, scratch_free, share_out, stream_fence, team_close, team_mark, team_open, turn_of,
)

include "common.pxi"

ctypedef fused integer:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t

cdef enum:
    LABEL_TILE = 32768          # labels that are checked at once
    LOOK = 2048                 # elements between two looks for subnormals, and looks for which care is kept up: where
    HOLD = 16                   # only results are subnormal, its loops do not show it


# -- integer targets ---------------------------------------------------------------------------------------------------


cdef inline int code_of(object labels) noexcept:
    """Bytes of an integer, negative where it is unsigned."""
    cdef int size = <int> cnp.PyArray_ITEMSIZE(<cnp.ndarray> labels)
    return -size if cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(<cnp.ndarray> labels)) else size


cdef Py_ssize_t count_kept(const integer* y, Py_ssize_t n, int64_t classes, bint has_ignore, int64_t ignore,
                           Py_ssize_t* wrong) noexcept nogil:
    """How many labels are not ignored; `wrong` takes how many of these are no class."""
    cdef Py_ssize_t i, kept = 0, outside = 0
    cdef bint counts
    for i in range(n):
        counts = not (has_ignore & (<int64_t> y[i] == ignore))
        kept += counts
        outside += counts & ((<int64_t> y[i] < 0) | (<int64_t> y[i] >= classes))
    wrong[0] = outside
    return kept


cdef void check_label_tile(const void* y, int code, Py_ssize_t begin, Py_ssize_t n, int64_t classes, bint has_ignore,
                           int64_t ignore, const void* weight, bint float32, Py_ssize_t* wrong,
                           double* total) noexcept nogil:
    """Of one tile of labels: how many are no class, and the sum of their weights (1 without weights)."""
    cdef Py_ssize_t i, kept
    cdef int64_t c
    cdef double weights = 0
    if code == 8:
        kept = count_kept((<const int64_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    elif code == 4:
        kept = count_kept((<const int32_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    elif code == 2:
        kept = count_kept((<const int16_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    elif code == 1:
        kept = count_kept((<const int8_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    elif code == -4:
        kept = count_kept((<const uint32_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    elif code == -2:
        kept = count_kept((<const uint16_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    else:
        kept = count_kept((<const uint8_t*> y) + begin, n, classes, has_ignore, ignore, wrong)
    total[0] = <double> kept
    if weight != NULL and wrong[0] == 0:
        for i in range(begin, begin + n):
            c = label(y, code, i)
            if not (has_ignore and c == ignore):
                weights += (<const float*> weight)[c] if float32 else (<const double*> weight)[c]
        total[0] = weights


def check_labels(labels, Py_ssize_t classes, bint has_ignore, int64_t ignore, weight, int threads):
    """Sum of the weights of the labels not ignored (their number without weights); None if one is no class.

    labels : any native integers but uint64, contiguous   # IN
    weight : (classes,) float32 or float64, or None       # IN
    """
    cdef const void* y = data(labels)
    cdef const void* w = data(weight)
    cdef bint float32 = weight is not None and is_float32(weight)
    cdef int code = code_of(labels)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(<cnp.ndarray> labels)
    cdef Py_ssize_t tiles = (n + LABEL_TILE - 1) // LABEL_TILE
    cdef Py_ssize_t t, wrong = 0
    cdef double total = 0
    cdef Py_ssize_t* wrongs
    cdef double* totals
    cdef Team team
    cdef Team* watch = &team
    if tiles <= 1:
        check_label_tile(y, code, 0, n, classes, has_ignore, ignore, w, float32, &wrong, &total)
        return total if wrong == 0 else None
    wrongs = <Py_ssize_t*> scratch_alloc(tiles * (sizeof(Py_ssize_t) + sizeof(double)))
    if wrongs == NULL:
        raise MemoryError("fastnorm: no memory for the check of labels")
    totals = <double*> (wrongs + tiles)
    team = team_open(threads, 8.0 * n)
    with nogil:
        for t in prange(tiles, schedule="dynamic", chunksize=1, num_threads=team.size):
            check_label_tile(y, code, t * LABEL_TILE, min(LABEL_TILE, n - t * LABEL_TILE), classes, has_ignore, ignore,
                             w, float32, wrongs + t, totals + t)
            team_mark(watch)
        team_close(watch)
        for t in range(tiles):
            wrong += wrongs[t]
            total += totals[t]
    scratch_free(wrongs)
    return total if wrong == 0 else None


# -- all positions -----------------------------------------------------------------------------------------------------


cdef void tile(const Job* job, Py_ssize_t t, real* scratch, double* losses) noexcept nogil:
    """The blocks of one tile, each with its loss; careful if this thread met subnormals in the last LOOK elements."""
    cdef Py_ssize_t b, size = job.classes * (1 if job.rows else job.width), seen = 0
    cdef Row row
    memset(&row, 0, sizeof(Row))  # none yet
    row.careful = expect_subnormals()
    for b in range(t * job.blocks_per_tile, min((t + 1) * job.blocks_per_tile, job.blocks)):
        if job.rows:
            losses[b] = softmax_row(job, b, &row, scratch)
        else:
            losses[b] = softmax_block(job, b, row.careful, scratch)
        seen += size
        if seen >= LOOK:
            row.careful = met_subnormals(HOLD)
            seen = 0
    finish_row(job, &row, row.n, scratch)
    met_subnormals(HOLD)
    if job.stream:
        stream_fence()


cdef void take_part(const Job* job, real* scratch, double* losses, Shares* shares, int thread,
                    Team* team) noexcept nogil:
    """One thread's part."""
    cdef Turn turn = turn_of(shares, thread)
    cdef Py_ssize_t t = next_tile(shares, &turn)
    while t >= 0:
        tile(job, t, scratch, losses)
        team_mark(team)
        t = next_tile(shares, &turn)


cdef void all_tiles(const Job* job, real* scratch, double* losses, int threads) noexcept nogil:
    cdef Py_ssize_t t, scratch_elements = job.scratch_bytes // sizeof(real)
    cdef Team team = team_open(threads, 4.0 * job.outer * job.classes * job.inner * sizeof(real))
    cdef Team* watch = &team
    cdef Shares shares
    cdef Shares* shared = &shares
    if team.size == 1:
        for t in range(job.tiles):
            tile(job, t, scratch, losses)
    else:
        share_out(shared, job.tiles, team.size)
        with parallel(num_threads=team.size):
            take_part(job, scratch + threadid() * scratch_elements, losses, shared, threadid(), watch)
    team_close(watch)


cdef double pairwise_sum(const double* x, Py_ssize_t n) noexcept nogil:
    """Sum whose rounding errors grow with log(n)."""
    cdef Py_ssize_t half
    if n <= 128:
        return lanes_sum(x, n)
    half = n // 16 * 8
    return pairwise_sum(x, half) + pairwise_sum(x + half, n - half)


cdef double run(Job* job, bint float32, int threads) except? -1:
    """Plan, allocate, work; the sum of all losses."""
    cdef char* scratch
    cdef double* losses
    cdef double loss
    if job.outer * job.inner == 0:
        return 0
    plan(job, sizeof(float) if float32 else sizeof(double))
    threads = <int> min(threads, job.tiles)
    if job.outer * job.classes * job.inner <= SERIAL:
        threads = 1
    scratch = <char*> scratch_alloc(threads * job.scratch_bytes + job.blocks * sizeof(double))
    if scratch == NULL:
        raise MemoryError("fastnorm: no memory for the scratch of softmax")
    losses = <double*> (scratch + threads * job.scratch_bytes)
    with nogil:
        if float32:
            all_tiles(job, <float*> scratch, losses, threads)
        else:
            all_tiles(job, <double*> scratch, losses, threads)
        loss = pairwise_sum(losses, job.blocks)
    scratch_free(scratch)
    return loss


def softmax(x, out, Py_ssize_t outer, Py_ssize_t classes, Py_ssize_t inner, bint log, int threads):
    """p = exp(x - max x) / sum(exp(x - max x)) over the classes, or its logarithm.

    x   : (outer, classes, inner)   # IN
    out : (outer, classes, inner)   # OUT, may be x
    """
    cdef Job job
    assert fits(x, outer * classes * inner, x) and fits(out, outer * classes * inner, x)
    memset(&job, 0, sizeof(Job))
    job.form = LOG_SOFTMAX if log else SOFTMAX
    job.outer, job.classes, job.inner = outer, classes, inner
    job.x, job.out = data(x), data(out)
    job.divisor = 1
    run(&job, is_float32(x), threads)


def cross_entropy(x, labels, probabilities, weight, dlogits, losses, Py_ssize_t outer, Py_ssize_t classes,
                  Py_ssize_t inner, bint has_ignore, int64_t ignore, double label_smoothing, double divisor,
                  bint reduce, int threads):
    """loss = sum(q_c (log(sum(exp(x - m))) - (x_c - m))) / divisor and dlogits = (p Q - q) / divisor.

    q_c is the target mass of class c, Q its sum over the classes, m the largest logit, p the softmax.
    Probabilities t: q_c = ((1 - s) t_c + s / C) w_c. Labels y: q_c = s / C w_c + (1 - s) w_y [c == y], and 0 where y is
    to be ignored; s is the label smoothing, w the class weight (1 without). This is what PyTorch's
    `aten/src/ATen/native/LossNLL.cpp` computes (Szegedy et al., 2016, section 7, with class weights).

    x             : (outer, classes, inner)          # IN
    labels        : (outer * inner,) or None         # IN, checked by `check_labels`
    probabilities : (outer, classes, inner) or None  # IN
    weight        : (classes,) or None               # IN
    dlogits       : (outer, classes, inner)          # OUT, may be x
    losses        : () if reduce else (outer * inner,)   # OUT
    """
    cdef Job job
    cdef double loss = 0
    cdef bint float32 = is_float32(x)
    assert fits(x, outer * classes * inner, x) and fits(dlogits, outer * classes * inner, x)
    assert fits(labels, outer * inner, labels) and fits(probabilities, outer * classes * inner, x)
    assert fits(weight, classes, x) and fits(losses, 1 if reduce else outer * inner, x)
    memset(&job, 0, sizeof(Job))
    job.form = CROSS_ENTROPY
    job.outer, job.classes, job.inner = outer, classes, inner
    job.x, job.out = data(x), data(dlogits)
    job.labels, job.probabilities, job.weight = data(labels), data(probabilities), data(weight)
    job.losses = NULL if reduce else data(losses)
    if labels is not None:
        job.label_code = code_of(labels)
    job.has_ignore, job.ignore = has_ignore, ignore
    job.keep, job.smooth = 1 - label_smoothing, label_smoothing / classes
    if weight is None or label_smoothing == 0:  # 0 times an infinite weight is NaN
        job.uniform = label_smoothing
    elif float32:
        job.uniform = job.smooth * lanes_sum(<const float*> job.weight, classes)
    else:
        job.uniform = job.smooth * lanes_sum(<const double*> job.weight, classes)
    job.divisor = divisor
    if divisor == 0:
        memset(job.out, 0, cnp.PyArray_NBYTES(<cnp.ndarray> dlogits))
    else:
        loss = run(&job, float32, threads) / divisor
    if reduce:
        if float32:
            (<float*> data(losses))[0] = <float> loss
        else:
            (<double*> data(losses))[0] = loss
