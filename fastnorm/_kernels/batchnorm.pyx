"""Batch normalization over the channel axis of (outer, C, inner) memory: training, frozen and inference.

Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift" (2015):

    y  = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat)),   dz = act'(z) * dy

The twin is `fastnorm/reference/norm.py`.
"""

# Design:
# - Stats, then apply; reduce, then apply. Work is cut into tiles of channels, and each tile's samples into blocks.
#   Where a tile fits the second-level cache there is one block, and both halves run on it at once: memory is read
#   once. Where L2 does not hold a channel (rows a multiple of 64 KB apart fall on few of its sets), a tile is what L3
#   holds, and its second half, which writes, fetches the thread's next tile from memory (`chain`). As fast as waves
#   times 1.1 to 1.2 at (64,256,56,56), 1.2 to 1.9 forward at (128,64,32,32) and (128,128,16,16); but backward where L3
#   holds it all 0.8, and so too for tiles that L2 holds. On machines whose L2 is twice as large and whose L3 is slow
#   (Emerald Rapids: 2 MB; 58 GB/s, memory 32), tiles that L2 holds in spite of such rows are as fast as chains times
#   1.3 forward and 1.2 to 1.5 backward. Else (few channels of many samples, or larger ones) the tiles
#   that L3 holds form a wave: its blocks do the first half, partial results are merged in block order, and its blocks
#   do the second half. Letting the second half of a wave run beside the first of the next gains nothing. A thread
#   writes the blocks that it has read, the last one first, and has the same tiles in every call (`Shares`). Tiles and
#   blocks depend on the shape alone, so the bits do not depend on the threads.
# - Two inner loops. Runs: one channel's `inner` values are contiguous and long. Columns: `inner` is 1 (channels last)
#   or short (7x7), and a tile is a matrix with one row an outer index and one column a (channel, position): whole rows
#   of neighboring channels make long vectors without tails, and the parameter table has an entry for each column. Where
#   whole rows are short (64 channels last), several that follow one another are taken as one, the table is repeated.
# - Statistics of a chunk are sums of d = x - pivot and d*d over at most 64 values a partial sum (for Moments, of
#   columns, 8 sums of 8 rows), merged in double by Chan, Golub & LeVeque (1979). The pivot is one of a few samples; of
#   a run, of those read next: spread over all of it they were misses of the caches that took a fifth of the first half
#   at (64,256,56,56). Where it turns out more than two standard deviations off, the chunk, still in cache, is summed
#   again around its own mean: one pass over memory, two-pass accuracy. Where a float cannot hold the sums (data beyond
#   1e19, or whose squares vanish), the chunk is summed in double.
# - Means are kept and merged less a base, the first pivot: far from zero, their own rounding would be as large as what
#   M2 is made of. The mean travels as two numbers (mean_hi + mean_lo), for one is not enough there.
# - Channels whose parameters are so large or small that a float overflows or loses digits on the way are found from the
#   parameters, once a tile, and computed in double (`bn_plain`, `careful_item`).
# - Outputs of short runs are computed channel by channel in whole vectors into a buffer, each channel's surplus being
#   overwritten by the next: no tails, no wide table, and memory is walked in its own order. Only runs below SHORT use
#   the table of columns.
# - Streaming stores go through a small buffer in L1 (`Writer`), so that the loops need no second version and memory is
#   written in whole lines. Runs and rows use a short one: with 1,024 values, table and buffer crowd each other out of
#   L1, 11 ms against 7.5 at (100352,512). Channel by channel there is no table, and longer pieces pay.
# - What is read a page later is fetched by hand (`fetch_ahead`): between runs and pieces there is so much to do that
#   the processor does not see the next one in time: 3.1 against 4.6 ms for the statistics of (128,256,28,28). At the
#   end of a run, that is the begin of the channel's next one, not what lies behind this one: 12.4 against 18.3 ms
#   backward there, both with tiles for an L2 of 2 MB.

from cython.parallel cimport parallel, threadid
from libc.string cimport memcpy, memset

from .batchnorm_output cimport output_item
from .batchnorm_parameters cimport is_plain, set_parameters
from .batchnorm_plan cimport Job, plan, scratch_of, streams, useful_threads
from .batchnorm_reduce cimport add_bases, finish_reduction, finish_statistics, merge_blocks, reduce_item, stats_item
from .vector cimport (
    BN_BETA, BN_ROWS, BN_WIDE_ROWS, Shares, Team, Turn, assume_l2_bytes, bn_channel_sums, claim, data, fits, is_float32,
    next_tile, real, scratch_alloc, scratch_free, share_out, team_barrier, team_close, team_mark, team_open,
    team_present, turn_of,
)

include "common.pxi"


# -- all tiles and blocks ----------------------------------------------------------------------------------------------


cdef inline void first_half(const Job* job, Py_ssize_t t, Py_ssize_t b, real* scratch) noexcept nogil:
    """What is needed of all of a channel before its output: tile t, block b."""
    if job.dy != NULL:
        reduce_item(job, t, b, scratch)
    else:
        stats_item(job, t, b, scratch)


cdef inline void finish(const Job* job, Py_ssize_t t, real* kind) noexcept nogil:
    """Between the halves: the numbers of each channel of tile t."""
    if job.dy != NULL:
        finish_reduction(job, t, kind)
    else:
        finish_statistics(job, t, kind)


cdef inline void whole_tile(const Job* job, Py_ssize_t t, Py_ssize_t next, real* scratch) noexcept nogil:
    """A tile in one block: its second half finds in the cache what the first has read, and fetches tile `next`."""
    first_half(job, t, 0, scratch)
    finish(job, t, scratch)
    output_item(job, t, 0, next, scratch)


cdef inline void chain(const Job* job, Team* team, Py_ssize_t* unclaimed, real* scratch) noexcept nogil:
    """The tiles of one thread, which knows its next one before it is done with one."""
    cdef Py_ssize_t t = claim(unclaimed), next
    while t < job.tiles:
        next = claim(unclaimed)
        whole_tile(job, t, next, scratch)
        team_mark(team)
        t = next


cdef void take_blocks(const Job* job, Team* team, Shares* first, Shares* second, int thread, int present,
                      real* scratch) noexcept nogil:
    """One thread's part of tiles in several blocks, wave by wave: it writes the blocks that it has read."""
    cdef Turn turn
    cdef Py_ssize_t t0 = 0, n, i
    while t0 < job.tiles:
        n = min(job.wave, job.tiles - t0)
        turn = turn_of(first, thread)
        i = next_tile(first, &turn)
        while i >= 0:
            first_half(job, t0 + i % n, i // n, scratch)
            team_mark(team)
            i = next_tile(first, &turn)
        team_barrier(present)
        if thread == 0:  # nobody takes from either now
            share_out(first, min(job.wave, job.tiles - t0 - n) * job.blocks, team.size)
            share_out(second, n * job.blocks, team.size)
        i = thread
        while i < n:
            finish(job, t0 + i, scratch)
            i += present
        team_barrier(present)
        # Backwards: what was read last is still in the nearest cache.
        turn = turn_of(second, team.size - 1 - thread)
        i = next_tile(second, &turn)
        while i >= 0:
            output_item(job, t0 + n - 1 - i % n, job.blocks - 1 - i // n, 0, scratch)
            team_mark(team)
            i = next_tile(second, &turn)
        team_barrier(present)
        t0 += n


cdef void take_tiles(const Job* job, Team* team, Shares* shares, int thread, real* scratch) noexcept nogil:
    """One thread's part of tiles in one block."""
    cdef Turn turn = turn_of(shares, thread)
    cdef Py_ssize_t t = next_tile(shares, &turn)
    while t >= 0:
        whole_tile(job, t, 0, scratch)
        team_mark(team)
        t = next_tile(shares, &turn)


cdef inline void take_both_halves(const Job* job, Team* team, Shares* first, Shares* second, Py_ssize_t* unclaimed,
                                  int thread, int present, real* scratch) noexcept nogil:
    if job.blocks > 1:
        take_blocks(job, team, first, second, thread, present, scratch)
    elif job.chained:
        chain(job, team, unclaimed, scratch)
    else:
        take_tiles(job, team, first, thread, scratch)


cdef void run_both_halves(const Job* job, Team* team, real* kind) noexcept nogil:
    """Training, and every backward."""
    cdef Py_ssize_t unclaimed = 0
    cdef Shares shares, more_shares
    cdef Shares* first = &shares
    cdef Shares* second = &more_shares
    if job.blocks > 1:
        share_out(first, min(job.wave, job.tiles) * job.blocks, team.size)
    elif not job.chained:
        share_out(first, job.tiles, team.size)
    if team.size == 1:  # a parallel region of one thread costs as much as a small call
        take_both_halves(job, team, first, second, &unclaimed, 0, 1, <real*> scratch_of(job, 0))
    else:
        with parallel(num_threads=team.size):
            take_both_halves(job, team, first, second, &unclaimed, threadid(), team_present(),
                             <real*> scratch_of(job, threadid()))


cdef inline void one_half(const Job* job, Py_ssize_t i, bint second, real* scratch) noexcept nogil:
    """Item i of one half, tile by tile within each block."""
    if second:
        output_item(job, i % job.tiles, i // job.tiles, 0, scratch)
    else:
        first_half(job, i % job.tiles, i // job.tiles, scratch)


cdef void take_items(const Job* job, Team* team, bint second, Shares* shares, int thread,
                     real* scratch) noexcept nogil:
    """One thread's part of one half."""
    cdef Turn turn = turn_of(shares, thread)
    cdef Py_ssize_t i = next_tile(shares, &turn)
    while i >= 0:
        one_half(job, i, second, scratch)
        team_mark(team)
        i = next_tile(shares, &turn)


cdef void run_one_half(const Job* job, Team* team, bint second, real* kind) noexcept nogil:
    """Statistics alone, or output alone where the parameter table is set."""
    cdef Shares shares
    cdef Shares* shared = &shares
    share_out(shared, job.tiles * job.blocks, team.size)
    if team.size == 1:
        take_items(job, team, second, shared, 0, <real*> scratch_of(job, 0))
    else:
        with parallel(num_threads=team.size):
            take_items(job, team, second, shared, threadid(), <real*> scratch_of(job, threadid()))


cdef void given_statistics(const Job* job, real* kind) noexcept nogil:
    """The parameter table from the running statistics."""
    bn_channel_sums(<const real*> job.running_mean, 1, job.channels, 1, job.partial)  # to double
    bn_channel_sums(<const real*> job.running_var, 1, job.channels, 1, job.partial + job.channels)
    memset(job.partial + 2 * job.channels, 0, job.channels * sizeof(double))
    set_parameters(job, 0, job.channels, job.partial, job.partial + 2 * job.channels, job.partial + job.channels, kind)


# -- what Python calls: every argument has been checked, every array is dense and laid out alike -----------------------


cdef Job new_job(object x, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner):
    """A job on x with everything else absent."""
    cdef Job job
    memset(&job, 0, sizeof(Job))
    job.outer, job.channels, job.inner = outer, channels, inner
    job.x = data(x)
    return job


cdef void* allocate(Job* job, int threads) except NULL:
    """Scratch of all threads and the partial results, in one piece; sets the job's pointers."""
    cdef char *memory = <char*> scratch_alloc(threads * job.scratch_bytes + job.partials * sizeof(double))
    if memory == NULL:
        raise MemoryError("fastnorm: no memory for the scratch of batch norm")
    job.scratch = memory
    job.partial = <double*> (memory + threads * job.scratch_bytes)
    return memory


def assume_l2(Py_ssize_t n_bytes):
    """For tests: work is cut as for a second-level cache of this size, with the same bits; 0 asks the system."""
    assume_l2_bytes(n_bytes)


def forward(x, residual, y, gamma, beta, running_mean, running_var, table, wide_table, Py_ssize_t outer,
            Py_ssize_t channels, Py_ssize_t inner, bint training, double momentum, double eps, bint unbiased,
            int activation, double slope, int threads):
    """y, the parameter table (BN_ROWS, C) and the wide one (BN_WIDE_ROWS, C) from x; in training also the running
    statistics.
    """
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(residual, size, x) and fits(y, size, x)
    assert fits(gamma, channels, x) and fits(beta, channels, x)
    assert fits(running_mean, channels, x) and fits(running_var, channels, x)
    assert fits(table, BN_ROWS * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, wide_table)
    if size == 0:
        return
    job.residual, job.y, job.gamma, job.beta = data(residual), data(y), data(gamma), data(beta)
    job.running_mean, job.running_var = data(running_mean), data(running_var)
    job.table, job.wide = data(table), <double*> data(wide_table)
    job.momentum, job.eps, job.unbiased = momentum, eps, unbiased
    job.activation, job.slope = activation, slope
    job.stream = streams(size * itemsize, inner, 1) and job.y != job.x and job.y != job.residual
    plan(&job, itemsize, 1, training)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 2.0 * size * itemsize)
        if itemsize == 4:
            if training:
                run_both_halves(&job, &team, <float*> NULL)
            else:
                given_statistics(&job, <float*> NULL)
                job.plain = is_plain(&job, 0, channels, <float*> NULL)
                run_one_half(&job, &team, True, <float*> NULL)
        else:
            if training:
                run_both_halves(&job, &team, <double*> NULL)
            else:
                given_statistics(&job, <double*> NULL)
                job.plain = is_plain(&job, 0, channels, <double*> NULL)
                run_one_half(&job, &team, True, <double*> NULL)
        team_close(&team)
        scratch_free(memory)


def backward(dy, x, residual, dx, dresidual, table, wide_table, dgamma, dbeta, Py_ssize_t outer, Py_ssize_t channels,
             Py_ssize_t inner, bint training, int activation, double slope, int threads):
    """dx, dresidual, dgamma and dbeta (C,) from dy and what forward kept; fills the last two rows of the table."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(dy, size, x) and fits(residual, size, x)
    assert fits(dx, size, x) and fits(dresidual, size, x) and fits(dgamma, channels, x) and fits(dbeta, channels, x)
    assert fits(table, BN_ROWS * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, wide_table)
    job.dgamma, job.dbeta = data(dgamma), data(dbeta)
    if size == 0:
        memset(job.dgamma, 0, channels * itemsize)
        memset(job.dbeta, 0, channels * itemsize)
        return
    job.dy, job.residual, job.y, job.dresidual = data(dy), data(residual), data(dx), data(dresidual)
    job.table, job.wide = data(table), <double*> data(wide_table)
    job.activation, job.slope, job.frozen = activation, slope, not training
    job.stream = streams(size * itemsize, inner, 2) and job.y != job.dy
    plan(&job, itemsize, 2, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 3.0 * size * itemsize)
        if itemsize == 4:
            job.plain = is_plain(&job, 0, channels, <float*> NULL)
            run_both_halves(&job, &team, <float*> NULL)
        else:
            job.plain = is_plain(&job, 0, channels, <double*> NULL)
            run_both_halves(&job, &team, <double*> NULL)
        team_close(&team)
        scratch_free(memory)


def moments(x, mean, m2, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, int threads):
    """Mean and M2 (C,), float64, of each channel of x, which is not empty."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef double *mean_out = <double*> data(mean)
    cdef double *m2_out = <double*> data(m2)
    cdef bint float32 = is_float32(x)
    cdef Team team
    cdef void *memory
    assert fits(x, outer * channels * inner, x) and fits(mean, channels, m2) and fits(m2, channels, mean)
    if outer * channels * inner == 0:
        return
    job.grouped = True
    plan(&job, 4 if float32 else 8, 1, True)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 8.0 * outer * channels * inner)
        if float32:
            run_one_half(&job, &team, False, <float*> NULL)
        else:
            run_one_half(&job, &team, False, <double*> NULL)
        team_close(&team)
        merge_blocks(&job, 0, channels)
        add_bases(&job, 0, channels)
        memcpy(mean_out, job.partial, channels * sizeof(double))
        memcpy(m2_out, job.partial + channels, channels * sizeof(double))
        scratch_free(memory)


def standardize(x, y, mean, var, table, wide_table, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                int threads):
    """y = (x - mean) / sqrt(var) for float64 mean and var (C,); the tables are working space."""
    cdef Job job = new_job(x, outer, channels, inner)
    cdef Py_ssize_t size = outer * channels * inner, itemsize = 4 if is_float32(x) else 8
    cdef const double *mean_in = <const double*> data(mean)
    cdef const double *var_in = <const double*> data(var)
    cdef Team team
    cdef void *memory
    assert fits(x, size, x) and fits(y, size, x) and fits(mean, channels, var) and fits(var, channels, mean)
    assert fits(table, (BN_BETA + 1) * channels, x) and fits(wide_table, BN_WIDE_ROWS * channels, mean)
    if size == 0:
        return
    job.y, job.table, job.wide = data(y), data(table), <double*> data(wide_table)
    job.stream = streams(size * itemsize, inner, 1) and job.y != job.x
    plan(&job, itemsize, 1, False)
    threads = useful_threads(&job, threads)
    memory = allocate(&job, threads)
    with nogil:
        team = team_open(threads, 2.0 * size * itemsize)
        memset(job.partial, 0, channels * sizeof(double))
        if itemsize == 4:
            set_parameters(&job, 0, channels, mean_in, job.partial, var_in, <float*> NULL)
            run_one_half(&job, &team, True, <float*> NULL)
        else:
            set_parameters(&job, 0, channels, mean_in, job.partial, var_in, <double*> NULL)
            run_one_half(&job, &team, True, <double*> NULL)
        team_close(&team)
        scratch_free(memory)
