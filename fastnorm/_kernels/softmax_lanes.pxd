"""Softmax and cross-entropy of a block of positions: the vector lanes are positions."""

from libc.math cimport INFINITY, isnan, sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from .softmax_plan cimport CROSS_ENTROPY, DOUBLE_ROWS, LOG_SOFTMAX, REAL_ROWS, SOFTMAX, Job, label
from .softmax_losses cimport gradient_of_large_mass, is_large, loss_by_terms
from .vector cimport (
    at_offset, lanes_dot, lanes_exp, lanes_frame, lanes_log, lanes_max, lanes_sum, lanes_transpose, log_of_sum,
    log_softmax_output, real, softmax_factors, softmax_output, stream_copy, sum_squares,
)


cdef inline void gather(const real* x, real* lanes, Py_ssize_t outers, Py_ssize_t C, Py_ssize_t inner,
                        Py_ssize_t width) noexcept nogil:
    """(outers, C, inner) to (C, width): each class's values of all positions side by side."""
    cdef Py_ssize_t o, c
    if inner == 1:
        lanes_transpose(x, C, lanes, width, outers, C)
    else:
        for o in range(outers):
            for c in range(C):
                memcpy(lanes + c * width + o * inner, x + (o * C + c) * inner, inner * sizeof(real))


cdef inline void scatter(const real* lanes, real* out, Py_ssize_t outers, Py_ssize_t C, Py_ssize_t inner,
                         Py_ssize_t width) noexcept nogil:
    """The way back from `gather`."""
    cdef Py_ssize_t o, c
    if inner == 1:
        lanes_transpose(lanes, width, out, C, C, outers)
    else:
        for o in range(outers):
            for c in range(C):
                memcpy(out + (o * C + c) * inner, lanes + c * width + o * inner, inner * sizeof(real))


cdef inline void losses_by_terms(const Job* job, Py_ssize_t position, Py_ssize_t n, const int64_t* y, const real* m,
                                 const double* total, double* mass, double* losses) noexcept nogil:
    """`loss_by_terms` for those of n positions that need it."""
    cdef Py_ssize_t j
    for j in range(n):
        if isnan(losses[j]) and not isnan(total[j]):
            losses[j] = loss_by_terms(job, position + j, y[j] if job.labels != NULL else -1, m[j],
                                      log_of_sum(total[j]), &mass[j])


cdef inline void lanes_gradient(const Job* job, const real* e, const real* t, real* out, Py_ssize_t n,
                                const double* total, const double* mass, const real* factor, const real* power, real a,
                                real b, double w) noexcept nogil:
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


cdef struct Block:
    Py_ssize_t outers, n         # whole outers, if it is gathered; positions
    Py_ssize_t position, start   # the first one; its first logit
    bint gathered, keep          # transposed into scratch; the exponentials stay there
    bint in_scratch              # results are put together in `e`, then copied to `out`
    bint large                   # a Q of some position
    bint careful                 # where subnormals are likely
    Py_ssize_t ignored
    Py_ssize_t stride, t_stride  # from class to class
    const void* x                # IN: logits and probabilities of the block
    const void* t
    double* total                # of each position, from here to `spikes`: sum of exponentials
    double* logs                 # its logarithm, then the loss
    double* mass                 # Q
    double* dot                  # sum of q_c (m - x_c)
    int64_t* y                   # label; -1: ignored
    void* m                      # the largest logit
    void* frame                  # what `lanes_exp` needs besides
    void* factor                 # factor * power: what exponentials are multiplied by
    void* power
    void* log_sum
    void* spikes                 # what its label takes from the gradient
    void* one_class              # results of one class on their way
    void* e                      # (C, width) exponentials, logits before and results after
    void* second                 # (C, width) probabilities, and outputs on their way


cdef inline Block open_block(const Job* job, Py_ssize_t i, real* scratch) noexcept nogil:
    """Block i, its logits and probabilities class by class.

    scratch : DOUBLE_ROWS of `width` doubles, REAL_ROWS of `width` elements, then one (C, width) array where the
        exponentials are kept, and a second one where the block is gathered
    """
    cdef Py_ssize_t C = job.classes, inner = job.inner, width = job.width, first_outer, first_inner = 0
    cdef real* rows
    cdef Block b
    b.gathered = job.outers > 1
    b.outers = 1
    if b.gathered:
        first_outer = i * job.outers
        b.outers = min(job.outers, job.outer - first_outer)
        b.n = b.outers * inner
    else:
        first_outer = i // job.blocks_of_outer
        first_inner = i % job.blocks_of_outer * job.span
        b.n = min(job.span, inner - first_inner)
    b.position = first_outer * inner + first_inner
    b.start = first_outer * C * inner + first_inner
    b.keep = job.kept and job.form != LOG_SOFTMAX
    b.in_scratch = b.gathered or (job.stream and b.keep)
    b.large = False
    b.ignored = 0

    b.total = <double*> scratch
    b.logs = b.total + width
    b.mass = b.logs + width
    b.dot = b.mass + width
    b.y = <int64_t*> (b.dot + width)
    memset(b.total, 0, DOUBLE_ROWS * width * sizeof(double))
    rows = <real*> (b.y + width)
    b.m, b.frame, b.factor, b.power = rows, rows + width, rows + 6 * width, rows + 7 * width
    b.log_sum, b.spikes, b.one_class = rows + 8 * width, rows + 9 * width, rows + 10 * width
    rows += REAL_ROWS * width
    b.e, b.second = rows, rows + C * width

    b.x = <const real*> job.x + b.start
    b.t = at_offset(<const real*> job.probabilities, b.start)
    b.stride = b.t_stride = inner
    if b.gathered:
        gather(<const real*> b.x, <real*> b.e, b.outers, C, inner, width)
        b.x, b.stride = b.e, width
        if b.t != NULL:
            gather(<const real*> b.t, <real*> b.second, b.outers, C, inner, width)
            b.t, b.t_stride = b.second, width
    return b


cdef inline void find_targets(const Job* job, Block* b, real* kind) noexcept nogil:
    """Masses, dots, labels and spikes of cross-entropy; before exponentials take the place of the logits."""
    cdef const real* x = <const real*> b.x
    cdef const real* t = <const real*> b.t
    cdef const real* w = <const real*> job.weight
    cdef const real* m = <const real*> b.m
    cdef real* spikes = <real*> b.spikes
    cdef Py_ssize_t c, j
    cdef double spike, w_c
    if t != NULL or job.smooth != 0:
        for c in range(job.classes):
            w_c = 1 if w == NULL else w[c]
            lanes_dot(x + c * b.stride, at_offset(t, c * b.t_stride), b.n, m, job.keep * w_c if t != NULL else 0,
                      job.smooth * w_c if job.smooth != 0 else 0, b.mass, b.dot)
    if job.labels == NULL:
        return
    for j in range(b.n):
        b.mass[j] = job.uniform
        b.y[j] = label(job.labels, job.label_code, b.position + j)
        if job.has_ignore and b.y[j] == job.ignore:
            b.y[j] = -1
            b.ignored += 1
            continue
        spike = job.keep if w == NULL else job.keep * w[b.y[j]]
        b.mass[j] += spike
        if spike != 0:
            b.dot[j] += spike * (<double> m[j] - <double> x[b.y[j] * b.stride + j])
        spikes[j] = <real> (spike / job.divisor)


cdef inline double find_factors(const Job* job, Block* b, real* kind) noexcept nogil:
    """What every exponential is multiplied by, or every logit lessened by; the sum of the losses."""
    cdef const real* m = <const real*> b.m
    cdef real* factor = <real*> b.factor
    cdef real* power = <real*> b.power
    cdef real* log_sum = <real*> b.log_sum
    cdef Py_ssize_t j
    cdef double loss
    if job.form != SOFTMAX:
        lanes_log(b.total, b.logs, b.n)
    if job.form == LOG_SOFTMAX:
        for j in range(b.n):
            log_sum[j] = <real> b.logs[j]
        return 0
    if job.form == SOFTMAX:
        for j in range(b.n):
            softmax_factors(1 / b.total[j], &factor[j], &power[j])
        return 0
    for j in range(b.n):
        softmax_factors(b.mass[j] / job.divisor / b.total[j], &factor[j], &power[j])
    for j in range(b.n):
        b.logs[j] = b.mass[j] * b.logs[j] + b.dot[j] if b.y[j] >= 0 else 0
    loss = lanes_sum(<const double*> b.logs, b.n)
    if isnan(loss):
        losses_by_terms(job, b.position, b.n, b.y, m, b.total, b.mass, b.logs)
        loss = lanes_sum(<const double*> b.logs, b.n)
    if job.losses != NULL:
        for j in range(b.n):
            (<real*> job.losses)[b.position + j] = <real> b.logs[j]
    b.large = b.t != NULL and is_large(sqrt(sum_squares(<const double*> b.mass, b.n)) / job.divisor, kind)
    return loss


cdef inline void write_class(const Job* job, const Block* b, Py_ssize_t c, real* target) noexcept nogil:
    """The results of class c, but for the spikes of labels."""
    cdef const real* x = <const real*> b.x + c * b.stride
    cdef const real* t = at_offset(<const real*> b.t, c * b.t_stride)
    cdef const real* source = <const real*> b.e + c * job.width
    cdef const real* factor = <const real*> b.factor
    cdef const real* power = <const real*> b.power
    cdef real* one_class = <real*> b.one_class
    cdef real a = 0, d = 0
    cdef double w_c = 1
    cdef Py_ssize_t j
    if job.form == LOG_SOFTMAX:
        if job.stream and not b.gathered:
            log_softmax_output(x, one_class, b.n, <const real*> b.m, <const real*> b.log_sum, 1)
            stream_copy(target, one_class, b.n * sizeof(real))
        else:
            log_softmax_output(x, target, b.n, <const real*> b.m, <const real*> b.log_sum, 1)
        return
    if not b.keep:
        lanes_exp(x, one_class, <const real*> b.frame, job.width, b.total, b.n, b.careful)
        source = one_class
    if job.form == CROSS_ENTROPY:
        w_c = 1 if job.weight == NULL else (<const real*> job.weight)[c]
        a = <real> (job.keep * w_c / job.divisor)
        d = <real> (job.smooth * w_c / job.divisor) if job.smooth != 0 else 0  # 0 * inf is NaN
    if b.large:
        lanes_gradient(job, source, t, target, b.n, b.total, b.mass, factor, power, a, d, w_c)
    else:
        softmax_output(source, t, NULL, target, b.n, factor, power, a, d, 1, b.careful)
    if b.ignored:
        for j in range(b.n):
            if b.y[j] < 0:
                target[j] = 0


cdef inline void finish_block(const Job* job, const Block* b, real* out) noexcept nogil:
    """Take the spikes from the gradient, and copy to out what is still in scratch."""
    cdef Py_ssize_t C = job.classes, inner = job.inner, width = job.width, j, c
    cdef const real* spikes = <const real*> b.spikes
    cdef real* e = <real*> b.e
    if job.labels != NULL:
        for j in range(b.n):
            if b.y[j] >= 0:
                if b.in_scratch:
                    e[b.y[j] * width + j] -= spikes[j]
                else:
                    out[b.y[j] * inner + j] -= spikes[j]
    if b.gathered:
        if job.stream:
            scatter(<const real*> e, <real*> b.second, b.outers, C, inner, width)
            stream_copy(out, b.second, b.n * C * sizeof(real))
        else:
            scatter(<const real*> e, out, b.outers, C, inner, width)
    elif b.in_scratch:
        for c in range(C):
            stream_copy(out + c * inner, e + c * width, b.n * sizeof(real))


cdef inline double softmax_block(const Job* job, Py_ssize_t i, bint careful, real* scratch) noexcept nogil:
    """Block i of positions; the sum of their losses."""
    cdef Block b = open_block(job, i, scratch)
    cdef Py_ssize_t C = job.classes, width = job.width, c, j
    cdef const real* x = <const real*> b.x
    cdef real* m = <real*> b.m
    cdef real* frame = <real*> b.frame
    cdef real* one_class = <real*> b.one_class
    cdef real* e = <real*> b.e
    cdef real* out = <real*> job.out + b.start
    cdef double loss
    b.careful = careful
    for j in range(b.n):
        m[j] = -INFINITY
    for c in range(C):
        lanes_max(x + c * b.stride, m, b.n)
    lanes_frame(m, frame, width, b.n)
    if job.form == CROSS_ENTROPY:
        find_targets(job, &b, scratch)
    for c in range(C):
        lanes_exp(x + c * b.stride, e + c * width if b.keep else one_class, frame, width, b.total, b.n,
                  careful)
    loss = find_factors(job, &b, scratch)
    for c in range(C):
        write_class(job, &b, c, e + c * width if b.in_scratch else out + c * job.inner)
    finish_block(job, &b, out)
    return loss
