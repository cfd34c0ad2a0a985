"""Losses and gradients of single positions, where those of a whole row or block would overflow."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t

from .softmax_plan cimport Job
from .vector cimport at_offset, real


cdef inline double loss_by_terms(const Job* job, Py_ssize_t position, int64_t y, real m, double log_sum,
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
