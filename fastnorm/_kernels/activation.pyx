"""Activations and inverted dropout, forward and backward: elementwise, over dense memory.

Design:
- Memory is all that counts: read each input once, write the output once. An output too large to be found in cache by
  its next reader is computed into a buffer that stays in L1, and goes around the cache from there. An output that
  is its own input was just read, is in cache, and is written the ordinary way.
- Tiles are independent: the same bits for every number of threads.
- The mathematics of one element is in vector.h (`elu`, `elu_gradient`, ...), as only C can say `omp simd`.
- Dropout stores no mask. The random word of an element is a function of the seed, the offset and the element's number
  in C order of the *logical* array, so that backward finds the same mask even if dy is laid out otherwise than x was.
"""

from libc.stdint cimport uint32_t, uint64_t

from cython.parallel cimport parallel, threadid

from .vector cimport (
    ACTIVATION_CELU, ACTIVATION_ELU, ACTIVATION_LEAKY_RELU, ACTIVATION_RELU, ACTIVATION_SIGMOID, ACTIVATION_TANH,
    STREAM_BYTES, Shares, Team, Turn, activation, activation_backward, data, dropout_run, expect_subnormals, fits,
    is_float32, met_subnormals, next_tile, philox4x32, real, share_out, stream_copy, stream_fence, team_close,
    team_mark, team_open, turn_of,
)

include "common.pxi"

cdef enum:
    TILE = 16384         # elements of a tile at least
    LONG_TILE = 1 << 19  # bytes of a tile at most: the processor's prefetch begins anew in each
    TILES = 64           # of an array, between
    PARALLEL_TILES = 4  # fewer than these and waking a thread costs more than it saves
    STAGE = 256  # elements: stays in L1 beside what is read
    # Elements between two looks for subnormals: so many that a look costs nothing (with 4,096, tanh's gradient of
    # 100,000 took 5 % longer), but for the first few of a longer tile.
    PROBE = 64
    BLOCK = 32768
    CACHE_LINE = 64
    MAX_AXES = 64  # NumPy's own limit

cdef dict KINDS = {"relu": ACTIVATION_RELU, "leaky_relu": ACTIVATION_LEAKY_RELU, "elu": ACTIVATION_ELU,
                   "celu": ACTIVATION_CELU, "sigmoid": ACTIVATION_SIGMOID, "tanh": ACTIVATION_TANH}

cdef enum Operation:
    FORWARD
    BACKWARD
    DROPOUT

cdef struct Job:
    Operation operation
    int kind                        # which activation
    bint watched                    # for subnormals, where it is multiplied with what may be one
    double factor                   # leaky ReLU's slope, alpha of ELU and CELU, dropout's scale
    uint64_t seed
    uint64_t offset
    uint32_t threshold              # words below it are dropped
    int axes                        # of the block in memory order, outermost first, merged where they can be
    Py_ssize_t lengths[MAX_AXES]
    Py_ssize_t strides[MAX_AXES]    # in elements of the C-ordered logical array

# -- one span of elements ----------------------------------------------------------------------------------------------


cdef inline void dropout_span(const Job* job, const real* x, real* y, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """y[0:n] = dropout of x[start : start+n], run by run of the innermost axis."""
    cdef int last = job.axes - 1, k
    cdef Py_ssize_t done = 0, rest, run, number
    while done < n:
        rest = start + done
        run = min(job.lengths[last] - rest % job.lengths[last], n - done)
        number = 0
        for k in range(last, -1, -1):
            number += rest % job.lengths[k] * job.strides[k]
            rest = rest // job.lengths[k]
        dropout_run(x + start + done, y + done, run, job.seed, job.offset, <uint64_t> number,
                    <uint64_t> job.strides[last], job.threshold, <real> job.factor)
        done += run


cdef inline void compute(const Job* job, const real* dy, const real* x, real* y, Py_ssize_t start, Py_ssize_t n,
                         bint careful) noexcept nogil:
    """y[0:n] = the operation on elements start to start+n of dy and x."""
    if job.operation == DROPOUT:
        dropout_span(job, x, y, start, n)
    elif job.operation == FORWARD:
        activation(job.kind, x + start, y, n, job.factor, careful)
    else:
        activation_backward(job.kind, dy + start, x + start, y, n, job.factor, careful)


# -- tiles -------------------------------------------------------------------------------------------------------------


cdef inline void tile(const Job* job, const real* dy, const real* x, real* out, Py_ssize_t start, Py_ssize_t stop,
                      bint stream) noexcept nogil:
    cdef real[STAGE] staging
    cdef Py_ssize_t n, look = start + PROBE if stop - start > BLOCK else stop
    cdef bint careful = job.watched and expect_subnormals()
    if not job.watched and not stream:
        compute(job, dy, x, out + start, start, stop - start, False)
        return
    while start < stop:
        if stream:
            # The first piece is shorter by what lies past a line's boundary: all later ones fill whole lines.
            n = min(STAGE - <Py_ssize_t> ((<size_t> (out + start)) % CACHE_LINE // sizeof(real)), stop - start)
            compute(job, dy, x, staging, start, n, careful)
            stream_copy(out + start, staging, n * sizeof(real))
        else:
            n = look - start
            compute(job, dy, x, out + start, start, n, careful)
        start += n
        if start >= look:
            look = min(start + BLOCK, stop)
            careful = job.watched and met_subnormals(0)
    if stream:
        stream_fence()


# How n elements are cut. The first tile is longer by `head`, so that the others begin where a cache line does: a vector
# that spans two costs speed.
cdef struct Cut:
    Py_ssize_t n, head, length, tiles
    bint stream


cdef inline Cut cut(Py_ssize_t n, Py_ssize_t head, Py_ssize_t itemsize, bint stream, int threads) noexcept nogil:
    cdef Cut c
    c.n, c.head, c.stream = n, head, stream
    c.length = max(<Py_ssize_t> TILE, min(LONG_TILE // itemsize, n // TILES))
    c.tiles = max(1, (n - head + c.length - 1) // c.length)
    if c.tiles >= PARALLEL_TILES and c.length == TILE:  # an equal number for each thread
        c.tiles = (c.tiles + threads - 1) // threads * threads
        c.length = ((n - head + c.tiles - 1) // c.tiles + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        c.tiles = (n - head + c.length - 1) // c.length
    return c


cdef inline void tile_of(const Job* job, const real* dy, const real* x, real* out, const Cut* c,
                         Py_ssize_t t) noexcept nogil:
    tile(job, dy, x, out, c.head + t * c.length if t else 0, min(c.n, c.head + (t + 1) * c.length), c.stream)


cdef void take_part(const Job* job, const real* dy, const real* x, real* out, const Cut* c, Shares* shares, int thread,
                    Team* team) noexcept nogil:
    """One thread's part."""
    cdef Turn turn = turn_of(shares, thread)
    cdef Py_ssize_t t = next_tile(shares, &turn)
    while t >= 0:
        tile_of(job, dy, x, out, c, t)
        team_mark(team)
        t = next_tile(shares, &turn)


cdef void run_tiles(const Job* job, const real* dy, const real* x, real* out, Py_ssize_t n, bint stream,
                    int threads) noexcept nogil:
    cdef Cut tiles = cut(n, <Py_ssize_t> ((0 - <size_t> x) % CACHE_LINE // sizeof(real)), sizeof(real), stream, threads)
    cdef const Cut* c = &tiles
    cdef Py_ssize_t t
    cdef Team team = team_open(1 if c.tiles < PARALLEL_TILES else threads, 3.0 * n * sizeof(real))
    cdef Team* watch = &team
    cdef Shares shares
    cdef Shares* shared = &shares
    if team.size == 1:
        for t in range(c.tiles):
            tile_of(job, dy, x, out, c, t)
    else:
        share_out(shared, c.tiles, team.size)
        with parallel(num_threads=team.size):
            take_part(job, dy, x, out, c, shared, threadid(), watch)
    team_close(watch)


cdef run(Job* job, object dy, object x, object out, int threads):
    """IN dy (or None), x; OUT out, which may be x in a forward and in dropout, and dy in a backward."""
    cdef void* dy_data = data(dy)
    cdef void* x_data = data(x)
    cdef void* out_data = data(out)
    cdef Py_ssize_t n = x.size
    cdef bint single = is_float32(x)
    cdef bint stream = (n * (sizeof(float) if single else sizeof(double)) >= STREAM_BYTES and out_data != x_data
                        and out_data != dy_data)
    assert fits(x, n, x) and fits(dy, n, x) and fits(out, n, x)
    with nogil:
        if single:
            run_tiles(job, <const float*> dy_data, <const float*> x_data, <float*> out_data, n, stream, threads)
        else:
            run_tiles(job, <const double*> dy_data, <const double*> x_data, <double*> out_data, n, stream, threads)


# -- what Python calls -------------------------------------------------------------------------------------------------


def forward(str name, x, out, double factor, int threads):
    """out = act(x). x, out: dense, aligned, equal layout and dtype; out may be x.

    relu        max(x, 0)
    leaky_relu  x if x > 0 else slope*x
    elu         x if x > 0 else alpha*(exp(x) - 1)           (Clevert, Unterthiner, Hochreiter 2016, equation 15)
    celu        x if x > 0 else alpha*(exp(x/alpha) - 1)     (Barron 2017, equation 2)
    sigmoid     1 / (1 + exp(-x))
    tanh        (exp(x) - exp(-x)) / (exp(x) + exp(-x))
    """
    cdef Job job
    job.operation = FORWARD
    job.kind = KINDS[name]
    job.watched = job.kind == ACTIVATION_LEAKY_RELU
    job.factor = factor
    run(&job, None, x, out, threads)


def backward(str name, dy, x, out, double factor, int threads):
    """out = act'(x) * dy; for sigmoid and tanh, x is the forward's output y. All of one layout; out may be dy.

    relu        dy if x > 0 else 0
    leaky_relu  dy if x > 0 else slope*dy
    elu         dy if x > 0 else alpha*exp(x)*dy
    celu        dy if x > 0 else exp(x/alpha)*dy
    sigmoid     y*(1 - y)*dy
    tanh        (1 - y**2)*dy
    """
    cdef Job job
    job.operation = BACKWARD
    job.kind = KINDS[name]
    job.watched = job.kind in (ACTIVATION_LEAKY_RELU, ACTIVATION_SIGMOID, ACTIVATION_TANH)
    job.factor = factor
    run(&job, dy, x, out, threads)


def dropout(x, out, double scale, uint32_t threshold, uint64_t seed, uint64_t offset, tuple lengths, tuple strides,
            int threads):
    """out = x * (scale if word >= threshold else 0), with one Philox word an element. out may be x.

    Inverted dropout: Srivastava et al. 2014, section 10; random numbers: Salmon et al. 2011.
    lengths, strides: the axes of the dense block in memory order, and their strides in the C-ordered logical array.
    """
    cdef Job job
    cdef int k
    job.operation = DROPOUT
    job.watched = False
    job.factor = scale
    job.threshold = threshold
    job.seed = seed
    job.offset = offset
    job.axes = len(lengths)
    for k in range(job.axes):
        job.lengths[k] = lengths[k]
        job.strides[k] = strides[k]
    run(&job, None, x, out, threads)


def philox(counter, key):
    """One block of Philox4x32-10: four 32-bit words for a counter of four and a key of two."""
    cdef uint32_t[4] words = [counter[0], counter[1], counter[2], counter[3]]
    philox4x32(words, key[0], key[1])
    return words[0], words[1], words[2], words[3]
