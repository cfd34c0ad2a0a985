/* Memory of large outputs, kept when an array dies for the next one of its size: what an allocator for NumPy's arrays
   needs (NEP 49). A fresh array of 200 MB costs as much again as batch norm computes, in page faults and zeroed pages.

   Design:
   - A block is mapped memory: one cache line that says how long it is, then the data, which so begin a line. Its length
     is that of a size class, so that arrays of about one size exchange blocks; pages past the data are never touched.
   - A block that waits is marked MADV_FREE: its pages stay, and the next writer finds them, unless the system is short of
     memory first. It then takes them as if they had been given back. The list of waiting blocks is therefore outside
     of them.
   - One lock, which nobody waits for: a thread that finds it taken does without the pool. So a child that was forked
     while another thread held it works too.
   - Linux alone: elsewhere the pool is not there, and arrays are NumPy's own. */

#ifndef FASTNORM_OUTPUT_POOL_H
#define FASTNORM_OUTPUT_POOL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__linux__) && defined(__GNUC__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__GNUC__) && defined(MADV_FREE)
#define POOL_AVAILABLE 1

enum { POOL_BLOCKS = 64, POOL_HEADER = 64, POOL_PAGE = 2 << 20 /* a huge one */ };

typedef struct {
    char *base;
    size_t bytes;
} PoolBlock;

static struct {
    char locked;
    int n;                          /* blocks that wait, the one freed last at the end */
    size_t bytes, limit;            /* of all of them; at most */
    PoolBlock blocks[POOL_BLOCKS];
} pool;

static int pool_try_lock(void) { return !__atomic_test_and_set(&pool.locked, __ATOMIC_ACQUIRE); }
static void pool_unlock(void) { __atomic_clear(&pool.locked, __ATOMIC_RELEASE); }

/* The length of a block for n bytes of data: eight classes between a power of two and the next, whole huge pages. 0 for
   more than there can be. */
static size_t pool_class(size_t n) {
    if (n > SIZE_MAX / 4) return 0;
    size_t step = POOL_PAGE;
    while (step * 16 <= n) step *= 2;
    return (n + POOL_HEADER + step - 1) / step * step;
}

static PoolBlock pool_block_of(const void *data) {
    PoolBlock block = {(char *)data - POOL_HEADER, 0};
    memcpy(&block.bytes, block.base, sizeof block.bytes);
    return block;
}

static void *pool_data_of(PoolBlock block) {
    memcpy(block.base, &block.bytes, sizeof block.bytes);
    return block.base + POOL_HEADER;
}

/* New memory on a huge page's boundary, zeros. */
static void *pool_map(size_t bytes) {
    char *mapped = mmap(NULL, bytes + POOL_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return NULL;
    const size_t before = (size_t)(-(uintptr_t)mapped) & (POOL_PAGE - 1);
    if (before) munmap(mapped, before);
    munmap(mapped + before + bytes, POOL_PAGE - before);
    madvise(mapped + before, bytes, MADV_HUGEPAGE); /* a wish */
    return mapped + before;
}

/* Take the block at i out of the list; the lock is held. */
static PoolBlock pool_take(int i) {
    const PoolBlock block = pool.blocks[i];
    memmove(pool.blocks + i, pool.blocks + i + 1, (size_t)(pool.n - i - 1) * sizeof block);
    pool.n--;
    pool.bytes -= block.bytes;
    return block;
}

/* Give the oldest block back to the system; the lock is held. */
static void pool_drop_oldest(void) {
    const PoolBlock oldest = pool_take(0);
    munmap(oldest.base, oldest.bytes);
}

/* The same until `more` bytes fit. */
static void pool_make_room(size_t more) {
    while (pool.n && (pool.bytes + more > pool.limit || pool.n == POOL_BLOCKS)) pool_drop_oldest();
}

static void *pool_malloc(void *context, size_t n) {
    (void)context;
    PoolBlock block = {NULL, pool_class(n)};
    if (block.bytes == 0) return NULL;
    if (pool_try_lock()) {
        for (int i = pool.n - 1; i >= 0 && block.base == NULL; i--) /* the last one's pages are likeliest in a cache */
            if (pool.blocks[i].bytes == block.bytes) block = pool_take(i);
        pool_unlock();
    }
    if (block.base == NULL) block.base = pool_map(block.bytes);
    if (block.base == NULL && pool_try_lock()) { /* what waits may be what the process's limit lacks */
        while (pool.n) pool_drop_oldest();
        pool_unlock();
        block.base = pool_map(block.bytes);
    }
    return block.base == NULL ? NULL : pool_data_of(block);
}

static void pool_free(void *context, void *data, size_t n) {
    (void)context, (void)n;
    if (data == NULL) return;
    const PoolBlock block = pool_block_of(data);
    int kept = 0;
    if (pool_try_lock()) {
        if (block.bytes <= pool.limit && madvise(block.base, block.bytes, MADV_FREE) == 0) {
            pool_make_room(block.bytes);
            pool.blocks[pool.n++] = block;
            pool.bytes += block.bytes;
            kept = 1;
        }
        pool_unlock();
    }
    if (!kept) munmap(block.base, block.bytes);
}

static void *pool_calloc(void *context, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    void *data = pool_malloc(context, count * size);
    if (data != NULL) memset(data, 0, count * size);
    return data;
}

static void *pool_realloc(void *context, void *data, size_t n) {
    if (data == NULL) return pool_malloc(context, n);
    const size_t before = pool_block_of(data).bytes - POOL_HEADER;
    void *moved = pool_malloc(context, n);
    if (moved == NULL) return NULL;
    memcpy(moved, data, n < before ? n : before);
    pool_free(context, data, before);
    return moved;
}

static void pool_set_limit(size_t limit) {
    pool.limit = limit;
    if (!pool_try_lock()) return; /* the next array that dies makes room */
    pool_make_room(0);
    pool_unlock();
}

static size_t pool_waiting(void) { return pool.bytes; }

static size_t pool_memory(void) { return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE); }

#else
#define POOL_AVAILABLE 0
static void *pool_malloc(void *context, size_t n) { (void)context, (void)n; return NULL; }
static void pool_free(void *context, void *data, size_t n) { (void)context, (void)data, (void)n; }
static void *pool_calloc(void *context, size_t count, size_t size) { (void)context, (void)count, (void)size; return NULL; }
static void *pool_realloc(void *context, void *data, size_t n) { (void)context, (void)data, (void)n; return NULL; }
static void pool_set_limit(size_t limit) { (void)limit; }
static size_t pool_waiting(void) { return 0; }
static size_t pool_memory(void) { return 0; }
#endif

#endif
