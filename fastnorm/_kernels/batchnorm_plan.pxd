"""How batch norm's work is cut: tiles of channels, blocks of samples, waves of tiles; by the shape alone.

The reasons are in `batchnorm.pyx`.
"""

from .vector cimport BN_ROWS, BN_WIDE_ROWS, LANES, SPREAD, STATS_ROWS, STREAM_BYTES, bn_plain, l2_bytes

cdef enum:
    RUN_MIN = 256              # an inner extent from which one channel's run is vectorized by itself
    SHORT = 16                 # an inner extent from which outputs are computed channel by channel, without a table
    WIDTH = 2048               # columns of a tile at most: the parameter table and the sums of a tile stay in L1 and L2
    FOLD = 256                # columns that several short rows are taken together to make
    WIDTH_MIN = 64             # columns of a tile at least: 256 contiguous bytes
    CHUNK_ROWS = 64            # columns: rows that one float partial sum takes before it is merged in double
    CHUNK = 64 * 64            # runs: the same for LANES partial sums
    SAMPLES = 8                # values that the first pivot is chosen from
    PIECE = 1024               # values that are computed into a buffer at once, channel by channel
    STREAM_PIECE = 256         # the same for runs and rows that are streamed
    CACHE = 1024 * 1024        # bytes of a tile that is read twice and should be found in L2 the second time
    LARGE_L2 = 2 * CACHE       # bytes of an L2 that holds larger tiles
    WAYS = 12                  # lines of one set of L2 that a tile may take: of 16, or of 8 in a cache twice as large
    WAY_BYTES = 64 * 1024      # bytes of one way of L2: 1 MB in 16 ways
    WAVE = 8 * 1024 * 1024     # bytes that are read twice and should be found in L3 the second time
    BLOCK = 512 * 1024         # bytes of a block where a tile's samples are cut, and both halves read it
    ONE_TILE = 256 * 1024      # bytes of an array that is not cut
    LONG_BLOCK = 1024 * 1024   # the same at most where there is one half: the processor's prefetch begins anew in each
    BLOCKS = 64                # blocks of an array between, where there is one half
    SCATTERED = 16 * 1024      # bytes of a block that follow one another: 0.31 ns a value at (5349,64,784), not 0.44
    CHAIN = 4 * 1024 * 1024    # bytes of a channel of which L3 holds two a thread: the next can be fetched meanwhile
    CHAIN_TILE = 3 * 1024 * 1024  # bytes of a tile then
    CHAIN_FROM = 64 * 1024 * 1024  # bytes of all from which that pays for two arrays, and for columns; see fetch_rows
    TILES = 16                 # tiles wanted, so that threads find work until the end
    PARTIALS = 40960           # at most this many partial results of each kind: 1 MB
    STATISTICS = 3             # partial results of a channel: mean less base, M2, base
    SMALL = 32768              # elements up to which one thread is faster than waking a second
    SHARE = 16384              # elements that a thread should have at least


cdef struct Job:
    Py_ssize_t outer, channels, inner
    bint columns                     # which of the two inner loops
    Py_ssize_t tile, tiles, wave     # channels of a tile; tiles; tiles that go through both halves before the next
    Py_ssize_t units, blocks         # what is cut into blocks: rows (columns) or samples of a channel (runs); blocks
    bint contiguous                  # columns: the rows of a tile follow one another
    Py_ssize_t fold                  # rows of a tile that are taken as one
    Py_ssize_t width                 # columns of a tile's tables, of all rows that are taken as one
    const void* x                    # IN   (outer, C, inner)
    const void* dy                   # IN   (outer, C, inner), backward
    const void* residual             # IN   (outer, C, inner) or NULL
    void* y                          # OUT  (outer, C, inner): y forward, dx backward
    void* dresidual                  # OUT  (outer, C, inner) or NULL, backward
    void* table                      # (BN_ROWS, C): OUT forward (first four rows), IN backward (all)
    double* wide                     # (BN_WIDE_ROWS, C): OUT forward, IN backward
    const void* gamma                # IN   (C,) or NULL
    const void* beta                 # IN   (C,) or NULL
    void* running_mean               # INOUT (C,) or NULL
    void* running_var                # INOUT (C,) or NULL
    void* dgamma                     # OUT  (C,)
    void* dbeta                      # OUT  (C,)
    double momentum, eps, slope
    bint unbiased, frozen, stream
    int activation
    bint chained                     # the second half of a tile fetches the thread's next tile
    bint fetch                       # the second half asks for memory ahead
    bint fetch_rows                  # columns: so does the first
    bint grouped                     # statistics of columns: closer, for Moments; slower
    bint plain                       # no tile needs to ask `bn_plain` again
    Py_ssize_t partials              # doubles of `partial`
    double* partial                  # (blocks, STATISTICS, C) forward, (blocks, 2, C) backward: sum and product
    char* scratch
    size_t scratch_bytes             # of one thread


# -- how the work is cut -----------------------------------------------------------------------------------------------


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t lines_of_a_set(const Job* job, Py_ssize_t tile, Py_ssize_t itemsize) noexcept nogil:
    """About how many lines of a tile fall on one set of L2: rows a multiple of WAY_BYTES apart all fall on the same."""
    cdef Py_ssize_t stride = job.channels * job.inner * itemsize, run = tile * job.inner * itemsize, places = 1
    while places < WAY_BYTES // 64 and places * stride % WAY_BYTES != 0:
        places *= 2
    return ceil_div(job.outer, places) * max(1, run // max(1, WAY_BYTES // places))


cdef inline void cut_samples(Job* job, Py_ssize_t widest, Py_ssize_t n_bytes, Py_ssize_t block) noexcept nogil:
    """Tiles of up to `widest` channels, and blocks of about `block` bytes, contiguous memory where they can be."""
    cdef Py_ssize_t most = max(1, PARTIALS // job.channels), each = job.inner * n_bytes, in_wave
    job.tile = widest
    if job.inner >= SHORT:
        job.tile = max(1, min(widest, block // each))
        # Narrower tiles where L3 then holds a wave of them, unless that would scatter the memory of a block.
        in_wave = max(1, WAVE // (job.outer * each))
        if in_wave * each >= SCATTERED and in_wave * each * job.outer <= 2 * WAVE:
            job.tile = min(job.tile, in_wave)
    if job.columns:
        job.blocks = min(ceil_div(job.outer * job.tile * job.inner * n_bytes, block), most, job.outer)
    else:  # whole outers, or equal parts of each
        job.blocks = min(job.outer * ceil_div(job.inner * n_bytes, block), most)


cdef inline bint chains(const Job* job, Py_ssize_t channel_bytes, Py_ssize_t arrays) noexcept nogil:
    """Whether L3 holds the channels that threads work on and those to come, and it pays that these are fetched."""
    return (job.inner >= SHORT and channel_bytes <= CHAIN and job.channels >= TILES // 2
            and ((arrays == 1 and not job.columns) or channel_bytes * job.channels >= CHAIN_FROM))


cdef inline void cut_both_halves(Job* job, Py_ssize_t widest, Py_ssize_t channel_bytes, Py_ssize_t itemsize,
                                 Py_ssize_t arrays) noexcept nogil:
    """Tiles that the second half finds in a cache."""
    cdef Py_ssize_t narrowest = min(widest, ceil_div(WIDTH_MIN, job.inner) if job.columns else 1)
    cdef Py_ssize_t tile = max(narrowest, min(widest, CACHE // channel_bytes, ceil_div(job.channels, TILES))), largest
    job.tile = tile
    if (tile * channel_bytes <= CACHE and lines_of_a_set(job, tile, itemsize) <= WAYS
            and ceil_div(job.channels, tile) >= TILES // 2):
        return  # L2 holds them, and there are enough to share out
    if chains(job, channel_bytes, arrays):  # or else, with the same bits, tiles for the L2 of this machine
        largest = l2_bytes() - l2_bytes() // 8 if l2_bytes() >= LARGE_L2 else 0
        job.chained = channel_bytes > largest
        job.tile = max(1, min(widest, (CHAIN_TILE if job.chained else largest) // channel_bytes,
                              job.channels // (TILES // 2)))
        return
    cut_samples(job, widest, itemsize * arrays, BLOCK)
    if job.blocks < 2:
        job.tile, job.blocks = tile, 1


cdef inline void plan(Job* job, Py_ssize_t itemsize, Py_ssize_t arrays, bint statistics) noexcept nogil:
    """Cut the work: `arrays` are read; with `statistics`, all of a channel is needed before its output."""
    cdef Py_ssize_t channel_bytes = job.outer * job.inner * itemsize * arrays, widest, block
    job.columns = job.inner < RUN_MIN
    widest = max(1, min(job.channels, WIDTH // job.inner if job.columns else WIDTH))
    job.units = job.outer if job.columns else job.outer * job.inner
    job.tile, job.blocks = widest, 1
    if statistics:
        if channel_bytes * job.channels > ONE_TILE:
            cut_both_halves(job, widest, channel_bytes, itemsize, arrays)
    else:
        block = max(<Py_ssize_t> BLOCK, min(<Py_ssize_t> LONG_BLOCK, channel_bytes * job.channels // BLOCKS))
        cut_samples(job, job.channels if job.inner >= SHORT else widest, itemsize, block)
    job.blocks = max(1, job.blocks)
    job.tiles = ceil_div(job.channels, job.tile)
    job.wave = max(1, min(job.tiles, WAVE // max(1, job.tile * channel_bytes)))
    job.contiguous = job.columns and job.tile == job.channels
    job.fold = 1
    if job.contiguous:
        while (2 * job.fold * job.channels * job.inner <= FOLD
               and 2 * job.fold * STATS_ROWS * job.blocks <= job.outer):
            job.fold *= 2
    # Rows that are read by eights are no stream to the processor of such a machine; where L3 holds them it makes no
    # difference, and on others none or a loss of up to 6 %.
    job.fetch_rows = (statistics and job.columns and l2_bytes() >= LARGE_L2
                      and channel_bytes * job.channels >= CHAIN_FROM)
    job.fetch = job.stream and (not statistics or not job.columns or job.fetch_rows)
    job.width = LANES
    if job.columns and (statistics or job.inner < SHORT):
        job.width = job.tile * job.inner * job.fold + (STREAM_PIECE if job.contiguous and job.stream else 0)
    job.partials = STATISTICS * job.channels * (job.blocks if statistics else 1)
    # Of one thread, in whole cache lines: the table's rows, two rows of sums, buffers for two outputs; and two sums in
    # double for each channel.
    job.scratch_bytes = ((BN_ROWS + 2) * padded(job.width) + 2 * padded(PIECE + SPREAD)) * itemsize
    job.scratch_bytes = (job.scratch_bytes + 2 * job.tile * sizeof(double) + 127) // 64 * 64


cdef inline bint streams(Py_ssize_t n_bytes, Py_ssize_t inner, Py_ssize_t arrays) noexcept nogil:
    """Whether an output of this size goes around the cache; `arrays` are read.

    Where outputs go through a buffer anyway, streaming them leaves the tile in L2 and pays earlier: 0.30 ms against
    0.43 at (64,256,14,14), 12.8 MB. With channels last, the halves of the backward are far apart, and ordinary stores
    leave more of its input in L3: 1.95 ms against 2.44 at (100352,64), 25.7 MB.
    """
    return n_bytes >= (STREAM_BYTES * arrays if inner < SHORT else STREAM_BYTES // 4)


cdef inline Py_ssize_t padded(Py_ssize_t width) noexcept nogil:
    """Length of a row of scratch for `width` columns: written in whole vectors, and the next begins a cache line."""
    return (width + 2 * SPREAD - 1) // SPREAD * SPREAD


cdef inline int useful_threads(const Job* job, int threads) noexcept nogil:
    """How many threads this work is worth."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    if elements <= SMALL:
        return 1
    return <int> max(1, min(threads, job.tiles * job.blocks, elements // SHARE))


cdef inline void* scratch_of(const Job* job, int thread) noexcept nogil:
    return job.scratch + thread * job.scratch_bytes


cdef inline Py_ssize_t first_unit(const Job* job, Py_ssize_t block) noexcept nogil:
    return job.units * block // job.blocks
