"""Softmax and cross-entropy of a row of many classes: the vector lanes are classes."""

from libc.math cimport isnan
from libc.stdint cimport int64_t
from libc.string cimport memset

from .softmax_plan cimport CROSS_ENTROPY, LOG_SOFTMAX, SMALL_SUM, STAGE, Job, label
from .softmax_losses cimport gradient_of_large_mass, is_large, loss_by_terms
from .vector cimport (
    at_offset, log_of_sum, log_softmax_output, real, softmax_dot, softmax_exp, softmax_factors, softmax_max,
    softmax_output, softmax_sum, stream_copy,
)


cdef inline double sum_in_double(const real* x, const real* e, Py_ssize_t C, real m, real* stage,
                                 bint careful) noexcept nogil:
    """sum(exp(x - m)) once more: near 1, a sum of floats has lost what its logarithm is made of."""
    cdef Py_ssize_t i = 0, n
    cdef double total = 0
    if e != NULL:
        return softmax_sum(e, C)
    while i < C:
        n = min(STAGE, C - i)
        softmax_exp(x + i, stage, n, m, n, careful)
        total += softmax_sum(<const real*> stage, n)
        i += n
    return total


# A row whose sum is known, and of whose n results so many are written.
cdef struct Row:
    Py_ssize_t row, n, done
    void* e                     # its exponentials, or NULL where they are computed again
    double m, log_sum           # numbers of the dtype, which a double holds
    double factor, power, a, b  # of `softmax_output`
    bint careful                # where subnormals are likely
    double spike_gradient       # of label y, or -1
    int64_t y
    bint large                  # its results are computed one by one:
    double scale, unit          # p Q - q, p = e * unit


cdef inline void finish_row(const Job* job, Row* r, Py_ssize_t until, real* stage) noexcept nogil:
    """Write the row's results up to `until`, or a little further."""
    cdef Py_ssize_t C = job.classes, i, n, k
    cdef const real* x = <const real*> job.x + r.row * C
    cdef const real* t = at_offset(<const real*> job.probabilities, r.row * C)
    cdef const real* w = <const real*> job.weight
    cdef real* out = <real*> job.out + r.row * C
    cdef const real* source
    cdef real* target
    cdef real m = <real> r.m, log_sum = <real> r.log_sum, factor = <real> r.factor, power = <real> r.power
    while r.done < until:
        i, n = r.done, STAGE
        if job.stream:  # up to a cache line's end, so that only the row's first and last line are written in parts
            n -= (<size_t> (out + i) & 63) // sizeof(real)
        n = min(n, C - i)
        target = stage if job.stream else out + i
        if job.form == LOG_SOFTMAX:
            log_softmax_output(x + i, target, n, &m, &log_sum, 0)
        else:
            if r.e != NULL:
                source = <const real*> r.e + i
            else:
                softmax_exp(x + i, stage, n, m, n, r.careful)
                source = stage
            if r.large:
                for k in range(n):
                    target[k] = <real> gradient_of_large_mass(job, source[k] * r.unit, r.scale, t[i + k],
                                                              1 if w == NULL else w[i + k])
            else:
                softmax_output(source, at_offset(t, i), at_offset(w, i), target, n, &factor, &power, <real> r.a,
                               <real> r.b, 0, r.careful)
            if i <= r.y < i + n:
                target[r.y - i] -= <real> r.spike_gradient
        if job.stream:
            stream_copy(out + i, stage, n * sizeof(real))
        r.done += n


cdef inline double exponentials(const Job* job, const real* x, real* e, real m, Row* before,
                                real* stage) noexcept nogil:
    """Their sum; piece by piece, so that the row before can be written between, if that is left to do."""
    cdef Py_ssize_t C = job.classes, i = 0, n
    cdef double total = 0
    if not job.delayed:
        return softmax_exp(x, e, C, m, C, before.careful)
    while i < C:
        n = min(STAGE, C - i)
        total += softmax_exp(x + i, e + i, n, m, C, before.careful)
        i += n
        finish_row(job, before, min(i, before.n), stage)
    return total


cdef inline double softmax_row(const Job* job, Py_ssize_t row, Row* r, real* scratch) noexcept nogil:
    """One row of C classes; its loss where there is one.

    r : the row before, which is finished, and then this one; the caller finishes the last
    scratch : STAGE elements, then C more where the exponentials are kept; and twice C where rows are delayed
    """
    cdef Py_ssize_t C = job.classes
    cdef const real* x = <const real*> job.x + row * C
    cdef const real* t = at_offset(<const real*> job.probabilities, row * C)
    cdef const real* w = <const real*> job.weight
    cdef real* out = <real*> job.out + row * C
    cdef real* stage = scratch
    cdef real* e = scratch + STAGE if job.kept else NULL
    cdef real m, log_sum = 0, spike_gradient = 0, factor = 0, power = 0
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

    if job.delayed and r.e == <void*> e:
        e += C
    m = softmax_max(x, C)
    total = exponentials(job, x, e, m, r, stage)
    if real is float and total < SMALL_SUM:
        total = sum_in_double(x, e, C, m, stage, r.careful)
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
        large = t != NULL and is_large(scale, scratch)
        if large:
            softmax_factors(1 / total, &factor, &power)
            unit = <double> factor * power
    softmax_factors(scale / total, &factor, &power)

    r.row, r.n, r.done, r.e, r.m, r.log_sum = row, C, 0, e, m, log_sum
    r.factor, r.power, r.spike_gradient, r.y = factor, power, spike_gradient, y
    r.a = r.b = 0
    if job.form == CROSS_ENTROPY:
        r.a, r.b = <real> (job.keep / job.divisor), <real> (job.smooth / job.divisor)
    r.large, r.scale, r.unit = large, scale, unit
    if not job.delayed:
        finish_row(job, r, C, stage)
    return loss
