"""Silent checks of arrays: True means that all is well, False means "look closer", not "wrong".

The worded checks of `_arrays.py` cost microseconds, more than many a kernel on a small array. The thin layer asks here
first, and goes through the worded checks only where the answer is False: they find out what is wrong, or that nothing
is (another layout, a subclass, address ranges that meet without sharing a byte). Compiled for the baseline only.
"""

cimport numpy as cnp
from libc.stdlib cimport qsort

from .vector cimport scratch_alloc, scratch_free

cnp.import_array()


# -- one array ---------------------------------------------------------------------------------------------------------

cdef struct Range:
    size_t low, high
    bint written


cdef int by_address(const void* a, const void* b) noexcept nogil:
    cdef size_t x = (<const Range*> a).low, y = (<const Range*> b).low
    return (x > y) - (x < y)


cdef bint is_dense(cnp.ndarray a) noexcept:
    """Whether the elements fill one block of memory in some axis order."""
    cdef cnp.npy_intp* shape = cnp.PyArray_DIMS(a)
    cdef cnp.npy_intp* strides = cnp.PyArray_STRIDES(a)
    cdef int ndim = cnp.PyArray_NDIM(a), _step, j
    cdef Py_ssize_t expected = cnp.PyArray_ITEMSIZE(a)
    if cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_C_CONTIGUOUS) or cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_F_CONTIGUOUS):
        return True
    for _step in range(ndim):  # from the innermost axis outward
        for j in range(ndim):
            if shape[j] > 1 and strides[j] == expected:
                expected *= shape[j]
                break
    return expected == cnp.PyArray_NBYTES(a)


cdef bint is_like(cnp.ndarray a, cnp.ndarray first) noexcept:
    """Whether two arrays have one shape, dtype and layout, ``first`` being dense."""
    cdef int ndim = cnp.PyArray_NDIM(first), i
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(first) or cnp.PyArray_NDIM(a) != ndim:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(first, i):
            return False
    if cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_C_CONTIGUOUS) and cnp.PyArray_CHKFLAGS(first, cnp.NPY_ARRAY_C_CONTIGUOUS):
        return True
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(first, i):
            return False
    return True


cdef inline void add_range(Range* ranges, Py_ssize_t* n, cnp.ndarray a, bint written) noexcept:
    """Append the addresses of an array, unless it is empty."""
    if cnp.PyArray_SIZE(a) > 0:
        ranges[n[0]].low = <size_t> cnp.PyArray_DATA(a)
        ranges[n[0]].high = ranges[n[0]].low + <size_t> cnp.PyArray_NBYTES(a)
        ranges[n[0]].written = written
        n[0] += 1


cdef inline bint is_plain(object a) noexcept:
    """Whether this is an ndarray itself, aligned, of native float32 or float64."""
    cdef int type_number
    if not cnp.PyArray_CheckExact(a):
        return False
    type_number = cnp.PyArray_TYPE(<cnp.ndarray> a)
    return ((type_number == cnp.NPY_FLOAT32 or type_number == cnp.NPY_FLOAT64)
            and cnp.PyArray_CHKFLAGS(<cnp.ndarray> a, cnp.NPY_ARRAY_ALIGNED)
            and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray> a))


cdef inline bint is_writeable(object a) noexcept:
    return cnp.PyArray_CHKFLAGS(<cnp.ndarray> a, cnp.NPY_ARRAY_WRITEABLE)


cdef bint are_disjoint(Range* ranges, Py_ssize_t n) noexcept nogil:
    """Whether no range that is written meets another one. Sorts them."""
    cdef size_t end_of_all = 0, end_of_written = 0
    cdef Py_ssize_t i
    qsort(ranges, n, sizeof(Range), by_address)
    for i in range(n):
        if ranges[i].low < (end_of_all if ranges[i].written else end_of_written):
            return False
        end_of_all = max(end_of_all, ranges[i].high)
        if ranges[i].written:
            end_of_written = max(end_of_written, ranges[i].high)
    return True


cdef bint meet(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the address ranges of two dense arrays do."""
    cdef size_t low_a = <size_t> cnp.PyArray_DATA(a), low_b = <size_t> cnp.PyArray_DATA(b)
    return (low_a < low_b + <size_t> cnp.PyArray_NBYTES(b)) and (low_b < low_a + <size_t> cnp.PyArray_NBYTES(a))


def dense_block(cnp.ndarray a not None):
    """Whether an array is one aligned block of memory in some axis order."""
    return is_dense(a) and cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_ALIGNED)


def laid_out_alike(cnp.ndarray a not None, cnp.ndarray dense not None):
    """Whether an array has a dense one's dtype, shape and memory order, and is aligned."""
    return is_like(a, dense) and cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_ALIGNED)


# -- an output ---------------------------------------------------------------------------------------------------------


def plain_output(out, like, tuple others, tuple may_equal):
    """The arguments of `_arrays.check_out`: ``out`` plain, writeable and laid out as ``like``, which is dense; others,
    (name, array or None) each, dense, and out of its way or, where they may be, the same object.
    """
    if not is_plain(out) or not is_writeable(out) or not cnp.PyArray_CheckExact(like):
        return False
    if not is_dense(<cnp.ndarray> like) or not is_like(<cnp.ndarray> out, <cnp.ndarray> like):
        return False
    for name, other in others:
        if other is None:
            continue
        if not cnp.PyArray_CheckExact(other) or not is_dense(<cnp.ndarray> other):
            return False
        if meet(<cnp.ndarray> out, <cnp.ndarray> other) and not (other is out and name in may_equal):
            return False
    return True


# -- elementwise functions ---------------------------------------------------------------------------------------------


def elementwise_arrays(x, dy, out):
    """The arrays of one call: dense, laid out alike; ``dy`` and ``out`` may be None. ``out`` may be the input in a
    forward call, which has no ``dy``, and ``dy`` in a backward one.
    """
    if not is_plain(x) or not is_dense(<cnp.ndarray> x):
        return False
    if dy is not None and not (is_plain(dy) and is_like(<cnp.ndarray> dy, <cnp.ndarray> x)):
        return False
    if out is None:
        return True
    if not is_plain(out) or not is_writeable(out) or not is_like(<cnp.ndarray> out, <cnp.ndarray> x):
        return False
    if meet(<cnp.ndarray> out, <cnp.ndarray> x):
        return out is x and dy is None
    return dy is None or out is dy or not meet(<cnp.ndarray> out, <cnp.ndarray> dy)


# -- optimizer lists ---------------------------------------------------------------------------------------------------


cdef bint are_optimizer_lists(tuple lists, tuple arguments) except -1:
    """Whether kernels can take these lists, one an argument, as they are."""
    cdef Py_ssize_t n_lists = len(lists), n = len(<tuple> lists[0]), n_ranges = 0, i, j
    cdef Range few[16]
    cdef Range* ranges = few
    cdef cnp.ndarray a
    cdef tuple arrays
    cdef object item
    cdef bint is_written, well = True
    if n_lists * n > 16:
        ranges = <Range*> scratch_alloc(n_lists * n * sizeof(Range))
        if ranges is NULL:
            raise MemoryError("fastnorm: no memory for the address ranges of an optimizer call")
    for j in range(n_lists):
        arrays = <tuple> lists[j]
        is_written = (<tuple> arguments[j])[2]
        well = len(arrays) == n
        for i in range(n):
            if not well:
                break
            item = arrays[i]
            well = is_plain(item) and (not is_written or is_writeable(item))
            if well:
                a = <cnp.ndarray> item
                well = is_dense(a) if j == 0 else is_like(a, <cnp.ndarray> (<tuple> lists[0])[i])
                add_range(ranges, &n_ranges, a, is_written)
        if not well:
            break
    well = well and are_disjoint(ranges, n_ranges)
    if ranges is not few:
        scratch_free(ranges)
    return well


def optimizer_lists(tuple arguments):
    """The arrays of an optimizer call, one tuple an argument; None for "look closer".

    ``arguments`` holds (name, value, written) each; a value is an array or a list or tuple of arrays. All is well with
    ndarrays (no subclass) of native float32 or float64, aligned; those at one position dense, of one shape, dtype and
    layout; those written writeable, and no address range of theirs meeting another one.
    """
    cdef list lists = []
    cdef object value
    cdef bint single = cnp.PyArray_Check((<tuple> arguments[0])[1])
    for argument in arguments:
        value = (<tuple> argument)[1]
        if single:
            lists.append((value,))
        elif type(value) is list or type(value) is tuple:
            lists.append(tuple(value))
        else:
            return None
    arrays = tuple(lists)
    return arrays if are_optimizer_lists(arrays, arguments) else None


# -- batch norm --------------------------------------------------------------------------------------------------------


cdef bint is_vector(object v, object x, Py_ssize_t n) noexcept:
    """Whether this is a contiguous vector of n values of x's dtype."""
    return (is_plain(v) and cnp.PyArray_TYPE(<cnp.ndarray> v) == cnp.PyArray_TYPE(<cnp.ndarray> x)
            and cnp.PyArray_NDIM(<cnp.ndarray> v) == 1 and cnp.PyArray_DIM(<cnp.ndarray> v, 0) == n
            and cnp.PyArray_CHKFLAGS(<cnp.ndarray> v, cnp.NPY_ARRAY_C_CONTIGUOUS))


cdef int axis_from_front(object axis, int ndim) noexcept:
    """An axis counted from the front; -1 unless it is a plain int in range."""
    cdef int at
    if type(axis) is not int or not -64 <= axis < 64:
        return -1
    at = axis
    at += ndim if at < 0 else 0
    return at if 0 <= at < ndim else -1


def batch_norm_arrays(x, axis, gamma, beta, running_mean, running_var, residual, out, bint training):
    """The axis and the arrays of one batch norm call; optional ones may be None.

    With ``training`` the running vectors are written; ``out`` overlaps nothing. Returns the axis from the front,
    or -1 for "look closer".
    """
    cdef int at
    if is_plain(x):
        at = axis_from_front(axis, cnp.PyArray_NDIM(<cnp.ndarray> x))
        if at >= 0 and are_batch_norm_arrays(x, at, gamma, beta, running_mean, running_var, residual, out, training):
            return at
    return -1


cdef bint are_batch_norm_arrays(object x, int axis, object gamma, object beta, object running_mean, object running_var,
                                object residual, object out, bint training) noexcept:
    cdef Range ranges[7]
    cdef Py_ssize_t n_ranges = 0, channels, size
    cdef cnp.ndarray a = <cnp.ndarray> x
    cdef object vector
    if not is_dense(a):
        return False
    channels, size = cnp.PyArray_DIM(a, axis), cnp.PyArray_SIZE(a)
    if size == 0 or (training and size < 2 * channels):
        return False
    add_range(ranges, &n_ranges, a, False)
    for vector in (gamma, beta):
        if vector is not None:
            if not is_vector(vector, x, channels):
                return False
            add_range(ranges, &n_ranges, <cnp.ndarray> vector, False)
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    if running_mean is not None:
        for vector in (running_mean, running_var):
            if not is_vector(vector, x, channels) or (training and not is_writeable(vector)):
                return False
            add_range(ranges, &n_ranges, <cnp.ndarray> vector, training)
    if residual is not None:
        if not is_plain(residual) or not is_like(<cnp.ndarray> residual, a):
            return False
        add_range(ranges, &n_ranges, <cnp.ndarray> residual, False)
    if out is not None:
        if not is_plain(out) or not is_writeable(out) or not is_like(<cnp.ndarray> out, a):
            return False
        add_range(ranges, &n_ranges, <cnp.ndarray> out, True)
    if out is None and (running_mean is None or not training):
        return True  # nothing but fresh memory is written
    return are_disjoint(ranges, n_ranges)


def run_and_copy(kernel, tuple arguments, list targets, list sources):
    """The kernel's result, once all sources are copied to their targets.

    In one compiled call, for Python's signal handlers run between calls: what they raise finds all of it done.
    """
    result = kernel(*arguments)
    for target, source in zip(targets, sources, strict=True):
        target[...] = source
    return result


def batch_norm_gradients(dy, x, residual, out):
    """The arrays of one backward call: x and residual as the forward call kept them."""
    cdef Range ranges[4]
    cdef Py_ssize_t n_ranges = 0
    if not is_plain(dy) or not is_like(<cnp.ndarray> dy, <cnp.ndarray> x):
        return False
    if out is None:
        return True
    if not is_dense(<cnp.ndarray> x):  # the twin keeps x as it came
        return False
    if not is_plain(out) or not is_writeable(out) or not is_like(<cnp.ndarray> out, <cnp.ndarray> x):
        return False
    add_range(ranges, &n_ranges, <cnp.ndarray> x, False)
    add_range(ranges, &n_ranges, <cnp.ndarray> out, True)
    if residual is not None or out is not dy:
        add_range(ranges, &n_ranges, <cnp.ndarray> dy, False)
    if residual is not None:
        add_range(ranges, &n_ranges, <cnp.ndarray> residual, False)
    return are_disjoint(ranges, n_ranges)
