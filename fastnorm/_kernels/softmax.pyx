"""Softmax, log-softmax and softmax cross-entropy with its gradient, over logits seen as (outer, C, inner).

# Design:
# - A position is a row of C logits; positions are numbered as they lie in memory, outer * inner of them.
# - Two forms. Rows (inner == 1, many classes): the vector lanes are classes; the row's exponentials stay in scratch
#   until their sum is known. Lanes (inner > 1, or few classes): the vector lanes are positions, a block of them at a
#   time; blocks of several whole outers are transposed into scratch and back, others are read where they are.
# - Rows or blocks whose exponentials do not fit the scratch compute them a second time instead of keeping them.
# - The gradient of every kind of target is one formula, p Q - q (see `cross_entropy`), so integer targets are only a
#   uniform mass and one spike.
# - Blocks and tiles depend on the shape alone, and the blocks' losses are added pairwise, in an order of their own.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, fabs, isnan, sqrt
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from .vector cimport (
    STREAM_BYTES,
    Team,
    at_offset,
    data,
    fits,
    is_float32,
    lanes_dot,
    lanes_exp,
    lanes_frame,
    lanes_log,
    lanes_max,
    lanes_sum,
    log_of_sum,
    log_softmax_output,
    real,
    scratch_alloc,
    scratch_free,
    softmax_dot,
    softmax_exp,
    softmax_factors,
    softmax_max,
    softmax_output,
    softmax_sum,
    stream_copy,
    stream_fence,
    sum_squares,
    team_close,
    team_mark,
    team_open,
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

cdef enum Form:
    SOFTMAX, LOG_SOFTMAX, CROSS_ENTROPY

cdef enum:
    ROW_CLASSES = 128           # from here on a row alone is faster than lanes (measured, AVX-512: even at 96 to 128)
    FEW_LANES = 64              # lanes of a block with many classes, and
    MANY_LANES = 256            # with few
    BLOCK_BYTES = 1 << 18       # most memory for a block's exponentials, or they are computed twice: L2 holds this
    LANES_IN_L1 = 1 << 15       # blocks up to this size take MANY_LANES
    ROW_BYTES = 1 << 19         # as BLOCK_BYTES, for a row
    STAGE = 1024                # elements computed in L1 before they are streamed out
    TILE = 8192                 # elements of a tile, about 5 microseconds
    SMALL_SUM = 4               # sums of exponentials below it are added up in double
    SERIAL = 16384              # elements up to which waking threads costs more than it gains
    LABEL_TILE = 32768


cdef struct Job:
    Form form
    # Shape and plan.
    Py_ssize_t outer, classes, inner
    bint rows                           # which form
    bint kept                           # the exponentials stay in scratch
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

# -- integer targets ---------------------------------------------------------------------------------------------------


cdef inline int code_of(object labels) noexcept:
    """Bytes of an integer, negative where it is unsigned."""
    cdef int size = <int> cnp.PyArray_ITEMSIZE(<cnp.ndarray> labels)
    return -size if cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(<cnp.ndarray> labels)) else size


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


# -- rows: the vector lanes are classes --------------------------------------------------------------------------------


cdef double sum_in_double(const real* x, const real* e, Py_ssize_t C, real m, real* stage) noexcept nogil:
    """sum(exp(x - m)) once more: near 1, a sum of floats has lost what its logarithm is made of."""
    cdef Py_ssize_t i = 0, n
    cdef double total = 0
    if e != NULL:
        return softmax_sum(e, C)
    while i < C:
        n = min(STAGE, C - i)
        softmax_exp(x + i, stage, n, m)
        total += softmax_sum(<const real*> stage, n)
        i += n
    return total


cdef double loss_by_terms(const Job* job, Py_ssize_t position, int64_t y, real m, double log_sum,
                          double* mass) noexcept nogil:
    """One position's loss, and its mass if its targets are probabilities, where the sums of products are NaN: infinite
    weights and probabilities may still give an infinite loss.

    y : its label; -1 for probabilities
    """
    cdef Py_ssize_t start = position // job.inner * job.classes * job.inner + position % job.inner, c
    cdef const real* x = <const real*> job.x + start
    cdef const real* t = at_offset(<const real*> job.probabilities, start)
    cdef const real* w = <const real*> job.weight
    cdef double loss = 0, q, base, log_p
    if t != NULL:
        mass[0] = 0
    for c in range(job.classes):
        base = job.smooth + (job.keep * t[c * job.inner] if t != NULL else 0)
        q = base if w == NULL or (t == NULL and job.smooth == 0) else base * w[c]
        if t != NULL:
            mass[0] += q
        elif c == y:
            q += job.keep if w == NULL else job.keep * w[c]
        log_p = (<double> x[c * job.inner] - <double> m) - log_sum
        if not (q == 0 and log_p == -INFINITY):
            loss -= q * log_p
    return loss


cdef inline bint is_large(double Q, real* kind) noexcept nogil:
    """Whether p Q may overflow though p Q - q does not, or Q is NaN. A double that is not has a finite square."""
    cdef double limit = 1e30 if real is float else 1e150
    return not fabs(Q) <= limit


cdef inline double gradient_of_large_mass(const Job* job, double p, double Q, double t, double w) noexcept nogil:
    """p Q - q for a probability p and target t."""
    return p * Q - (job.keep * t + job.smooth) * w / job.divisor


cdef double softmax_row(const Job* job, Py_ssize_t row, real* scratch) noexcept nogil:
    """One row of C classes; its loss where there is one.

    scratch : STAGE elements, then C more where the exponentials are kept
    """
    cdef Py_ssize_t C = job.classes, i, n, k
    cdef const real* x = <const real*> job.x + row * C
    cdef const real* t = at_offset(<const real*> job.probabilities, row * C)
    cdef const real* w = <const real*> job.weight
    cdef real* out = <real*> job.out + row * C
    cdef real* stage = scratch
    cdef real* e = scratch + STAGE if job.kept else NULL
    cdef const real* source
    cdef real* target
    cdef real m, log_sum = 0, spike_gradient = 0, a = 0, b = 0, factor = 0, power = 0
    cdef double total, loss = 0, scale = 1, mass = 0, dot = 0, spike, unit = 0
    cdef bint large = False
    cdef int64_t y = -1

    if job.labels != NULL:
        y = label(job.labels, job.label_code, row)
        if job.has_ignore and y == job.ignore:
            memset(out, 0, C * sizeof(real))
            if job.losses != NULL:
                (<real*> job.losses)[row] = 0
            return 0

    m = softmax_max(x, C)
    total = softmax_exp(x, e, C, m)
    if real is float and total < SMALL_SUM:
        total = sum_in_double(x, e, C, m, stage)
    if job.form == LOG_SOFTMAX:
        log_sum = <real> log_of_sum(total)
    elif job.form == CROSS_ENTROPY:
        if t == NULL:
            mass = job.uniform
        if t != NULL or job.smooth != 0:
            softmax_dot(x, t, w, C, m, job.keep if t != NULL else 0, job.smooth, &mass, &dot)
        if y >= 0:
            spike = job.keep if w == NULL else job.keep * w[y]
            mass += spike
            if spike != 0:
                dot += spike * (<double> m - <double> x[y])
            spike_gradient = <real> (spike / job.divisor)
        loss = mass * log_of_sum(total) + dot
        if isnan(loss) and not isnan(total):
            loss = loss_by_terms(job, row, y, m, log_of_sum(total), &mass)
        if job.losses != NULL:
            (<real*> job.losses)[row] = <real> loss
        scale = mass / job.divisor
        a = <real> (job.keep / job.divisor)
        b = <real> (job.smooth / job.divisor)
        large = t != NULL and is_large(scale, scratch)
        if large:
            softmax_factors(1 / total, &factor, &power)
            unit = <double> factor * power
    softmax_factors(scale / total, &factor, &power)

    i = 0
    while i < C:
        n = STAGE
        if job.stream:  # up to a cache line's end, so that only the row's first and last line are written in parts
            n -= (<size_t> (out + i) & 63) // sizeof(real)
        n = min(n, C - i)
        target = stage if job.stream else out + i
        if job.form == LOG_SOFTMAX:
            log_softmax_output(x + i, target, n, &m, &log_sum, 0)
        else:
            if job.kept:
                source = e + i
            else:
                softmax_exp(x + i, stage, n, m)
                source = stage
            if large:
                for k in range(n):
                    target[k] = <real> gradient_of_large_mass(job, source[k] * unit, scale, t[i + k],
                                                              1 if w == NULL else w[i + k])
            else:
                softmax_output(source, at_offset(t, i), at_offset(w, i), target, n, &factor, &power, a, b, 0)
            if i <= y < i + n:
                target[y - i] -= spike_gradient
        if job.stream:
            stream_copy(out + i, stage, n * sizeof(real))
        i += n
    return loss


# -- lanes: the vector lanes are positions -----------------------------------------------------------------------------


cdef void gather(const real* x, real* lanes, Py_ssize_t outers, Py_ssize_t C, Py_ssize_t inner,
                 Py_ssize_t width) noexcept nogil:
    """(outers, C, inner) to (C, width): each class's values of all positions side by side."""
    cdef Py_ssize_t o, c
    if inner == 1:
        for c in range(C):
            for o in range(outers):
                lanes[c * width + o] = x[o * C + c]
    else:
        for o in range(outers):
            for c in range(C):
                memcpy(lanes + c * width + o * inner, x + (o * C + c) * inner, inner * sizeof(real))


cdef void scatter(const real* lanes, real* out, Py_ssize_t outers, Py_ssize_t C, Py_ssize_t inner,
                  Py_ssize_t width) noexcept nogil:
    """The way back from `gather`."""
    cdef Py_ssize_t o, c
    if inner == 1:
        for o in range(outers):
            for c in range(C):
                out[o * C + c] = lanes[c * width + o]
    else:
        for o in range(outers):
            for c in range(C):
                memcpy(out + (o * C + c) * inner, lanes + c * width + o * inner, inner * sizeof(real))


cdef void losses_by_terms(const Job* job, Py_ssize_t position, Py_ssize_t n, const int64_t* y, const real* m,
                          const double* total, double* mass, double* losses) noexcept nogil:
    """`loss_by_terms` for those of n positions that need it."""
    cdef Py_ssize_t j
    for j in range(n):
        if isnan(losses[j]) and not isnan(total[j]):
            losses[j] = loss_by_terms(job, position + j, y[j] if job.labels != NULL else -1, m[j],
                                      log_of_sum(total[j]), &mass[j])


cdef void lanes_gradient(const Job* job, const real* e, const real* t, real* out, Py_ssize_t n, const double* total,
                         const double* mass, const real* factor, const real* power, real a, real b,
                         double w) noexcept nogil:
    """One class's gradient at n positions of which some have large masses; out may be e."""
    cdef Py_ssize_t j
    cdef real unit, unit_power
    for j in range(n):
        if is_large(mass[j] / job.divisor, out):
            softmax_factors(1 / total[j], &unit, &unit_power)
            out[j] = <real> gradient_of_large_mass(job, <double> e[j] * unit * unit_power, mass[j] / job.divisor, t[j],
                                                   w)
        else:
            out[j] = e[j] * factor[j] * power[j] - (t[j] * a + b)


cdef enum:
    DOUBLE_ROWS = 5             # total, logs, mass, dot, label
    REAL_ROWS = 11              # m, frame (5), factor, power, log_sum, spike, one class's exponentials


cdef double softmax_block(const Job* job, Py_ssize_t block, real* scratch) noexcept nogil:
    """One block of positions; the sum of their losses.

    scratch : DOUBLE_ROWS of `width` doubles, REAL_ROWS of `width` elements, then one (C, width) array where the
        exponentials are kept, and a second one where the block is gathered
    """
    cdef Py_ssize_t C = job.classes, inner = job.inner, width = job.width
    cdef bint gathered = job.outers > 1
    cdef Py_ssize_t first_outer, first_inner = 0, outers = 1, n, c, j, stride, t_stride, position, start, ignored = 0
    if gathered:
        first_outer = block * job.outers
        outers = min(job.outers, job.outer - first_outer)
        n = outers * inner
    else:
        first_outer = block // job.blocks_of_outer
        first_inner = block % job.blocks_of_outer * job.span
        n = min(job.span, inner - first_inner)
    position = first_outer * inner + first_inner
    start = first_outer * C * inner + first_inner

    cdef double* total = <double*> scratch
    cdef double* logs = total + width
    cdef double* mass = logs + width
    cdef double* dot = mass + width
    cdef int64_t* y = <int64_t*> (dot + width)
    cdef real* m = <real*> (y + width)
    cdef real* frame = m + width
    cdef real* factor = frame + 5 * width
    cdef real* power = factor + width
    cdef real* log_sum = power + width
    cdef real* spikes = log_sum + width
    cdef real* one_class = spikes + width
    cdef real* e = one_class + width
    cdef real* second = e + C * width

    cdef const real* x = <const real*> job.x + start
    cdef const real* t = at_offset(<const real*> job.probabilities, start)
    cdef const real* w = <const real*> job.weight
    cdef real* out = <real*> job.out + start
    cdef const real* source
    cdef real* target
    cdef bint keep = job.kept and job.form != LOG_SOFTMAX
    cdef bint in_scratch = gathered or (job.stream and keep)  # results are put together in e, then copied to out
    cdef bint large = False  # a Q of some position
    cdef double loss = 0, spike, w_c = 1
    cdef real a, b

    stride = t_stride = inner
    if gathered:
        gather(x, e, outers, C, inner, width)
        x = e
        stride = width
        if t != NULL:
            gather(t, second, outers, C, inner, width)
            t = second
            t_stride = width

    for j in range(n):
        m[j] = -INFINITY
    for c in range(C):
        lanes_max(x + c * stride, m, n)
    lanes_frame(m, frame, width, n)

    memset(total, 0, DOUBLE_ROWS * width * sizeof(double))
    if job.form == CROSS_ENTROPY:  # what needs the logits, before the exponentials take their place
        if t != NULL or job.smooth != 0:
            for c in range(C):
                w_c = 1 if w == NULL else w[c]
                lanes_dot(x + c * stride, at_offset(t, c * t_stride), n, m,
                          job.keep * w_c if t != NULL else 0, job.smooth * w_c if job.smooth != 0 else 0, mass, dot)
        if job.labels != NULL:
            for j in range(n):
                mass[j] = job.uniform
                y[j] = label(job.labels, job.label_code, position + j)
                if job.has_ignore and y[j] == job.ignore:
                    y[j] = -1
                    ignored += 1
                    continue
                spike = job.keep if w == NULL else job.keep * w[y[j]]
                mass[j] += spike
                if spike != 0:
                    dot[j] += spike * (<double> m[j] - <double> x[y[j] * stride + j])
                spikes[j] = <real> (spike / job.divisor)

    for c in range(C):
        lanes_exp(x + c * stride, e + c * width if keep else one_class, frame, width, total, n)
    if job.form != SOFTMAX:
        lanes_log(total, logs, n)
    if job.form == LOG_SOFTMAX:
        for j in range(n):
            log_sum[j] = <real> logs[j]
    elif job.form == SOFTMAX:
        for j in range(n):
            softmax_factors(1 / total[j], &factor[j], &power[j])
    else:
        for j in range(n):
            softmax_factors(mass[j] / job.divisor / total[j], &factor[j], &power[j])
        for j in range(n):
            logs[j] = mass[j] * logs[j] + dot[j] if y[j] >= 0 else 0
        loss = lanes_sum(<const double*> logs, n)
        if isnan(loss):
            losses_by_terms(job, position, n, y, m, total, mass, logs)
            loss = lanes_sum(<const double*> logs, n)
        if job.losses != NULL:
            for j in range(n):
                (<real*> job.losses)[position + j] = <real> logs[j]
        large = t != NULL and is_large(sqrt(sum_squares(<const double*> mass, n)) / job.divisor, scratch)

    for c in range(C):
        target = e + c * width if in_scratch else out + c * inner
        if job.form == LOG_SOFTMAX:
            if job.stream and not gathered:
                log_softmax_output(x + c * stride, one_class, n, m, log_sum, 1)
                stream_copy(target, one_class, n * sizeof(real))
            else:
                log_softmax_output(x + c * stride, target, n, m, log_sum, 1)
            continue
        if keep:
            source = e + c * width
        else:
            lanes_exp(x + c * stride, one_class, frame, width, total, n)
            source = one_class
        a = b = 0
        if job.form == CROSS_ENTROPY:
            w_c = 1 if w == NULL else w[c]
            a = <real> (job.keep * w_c / job.divisor)
            b = <real> (job.smooth * w_c / job.divisor) if job.smooth != 0 else 0  # 0 * inf is NaN
        if large:
            lanes_gradient(job, source, t + c * t_stride, target, n, total, mass, factor, power, a, b, w_c)
        else:
            softmax_output(source, at_offset(t, c * t_stride), NULL, target, n, factor, power, a, b, 1)
        if ignored:
            for j in range(n):
                if y[j] < 0:
                    target[j] = 0

    if job.labels != NULL:
        for j in range(n):
            if y[j] >= 0:
                if in_scratch:
                    e[y[j] * width + j] -= spikes[j]
                else:
                    out[y[j] * inner + j] -= spikes[j]
    if gathered:
        if job.stream:
            scatter(e, second, outers, C, inner, width)
            stream_copy(out, second, n * C * sizeof(real))
        else:
            scatter(e, out, outers, C, inner, width)
    elif in_scratch:
        for c in range(C):
            stream_copy(out + c * inner, e + c * width, n * sizeof(real))
    return loss


# -- all positions -----------------------------------------------------------------------------------------------------


cdef void plan(Job* job, Py_ssize_t itemsize) noexcept:
    """Choose form, blocks, tiles and scratch by the shape alone."""
    cdef Py_ssize_t C = job.classes, lanes
    job.rows = job.inner == 1 and C >= ROW_CLASSES
    job.width = 0
    job.outers = job.span = job.blocks_of_outer = 1
    # Half the usual size: results go through a buffer anyway (0.73 ms against 0.83 at (4096, 1000), 16.4 MB).
    job.stream = job.outer * C * job.inner * itemsize >= STREAM_BYTES // 2 and job.out != job.x
    if job.rows:
        job.kept = C * itemsize <= ROW_BYTES and job.form != LOG_SOFTMAX
        job.blocks = job.outer
        job.scratch_bytes = (STAGE + C * job.kept) * itemsize
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
    job.blocks_per_tile = max(1, TILE // (C * lanes))
    job.tiles = (job.blocks + job.blocks_per_tile - 1) // job.blocks_per_tile


cdef void tile(const Job* job, Py_ssize_t t, real* scratch, double* losses) noexcept nogil:
    """The blocks of one tile, each with its loss."""
    cdef Py_ssize_t b
    for b in range(t * job.blocks_per_tile, min((t + 1) * job.blocks_per_tile, job.blocks)):
        losses[b] = softmax_row(job, b, scratch) if job.rows else softmax_block(job, b, scratch)
    if job.stream:
        stream_fence()


cdef void all_tiles(const Job* job, real* scratch, double* losses, int threads) noexcept nogil:
    cdef Py_ssize_t t, scratch_elements = job.scratch_bytes // sizeof(real)
    cdef Team team = team_open(threads, 4.0 * job.outer * job.classes * job.inner * sizeof(real))
    cdef Team* watch = &team
    if team.size == 1:
        for t in range(job.tiles):
            tile(job, t, scratch, losses)
    else:
        for t in prange(job.tiles, schedule="dynamic", chunksize=1, num_threads=team.size):
            tile(job, t, scratch + threadid() * scratch_elements, losses)
            team_mark(watch)
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
