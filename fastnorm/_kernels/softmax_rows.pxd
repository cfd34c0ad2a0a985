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


cdef inline double sum_in_double(const real* x, const real* e, Py_ssize_t C, real m, real* stage) noexcept nogil:
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


cdef inline double softmax_row(const Job* job, Py_ssize_t row, real* scratch) noexcept nogil:
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
