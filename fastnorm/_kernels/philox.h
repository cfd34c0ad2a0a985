/* Counter-based random numbers, for dropout. */

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): the four words of
   one block are a function of its counter and key alone, so any thread computes any block by itself. */
#define PHILOX_ROUND(r) \
    { \
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p2 = (uint64_t)0xCD9E8D57u * c2; \
        c0 = (uint32_t)(p2 >> 32) ^ c1 ^ (key0 + (r) * 0x9E3779B9u); \
        c1 = (uint32_t)p2; \
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ (key1 + (r) * 0xBB67AE85u); \
        c3 = (uint32_t)p0; \
    }
/* Ten rounds on four variables c0 to c3; a macro, as a loop over the rounds would keep GCC from vectorizing the loop
   over blocks around it. */
#define PHILOX_TEN_ROUNDS \
    PHILOX_ROUND(0) PHILOX_ROUND(1) PHILOX_ROUND(2) PHILOX_ROUND(3) PHILOX_ROUND(4) \
    PHILOX_ROUND(5) PHILOX_ROUND(6) PHILOX_ROUND(7) PHILOX_ROUND(8) PHILOX_ROUND(9)

static void philox4x32(uint32_t c[4], uint32_t key0, uint32_t key1) {
    uint32_t c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    PHILOX_TEN_ROUNDS
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
}

#define PHILOX_WORDS 64

/* OUT words[PHILOX_WORDS]: those numbered first, first + step, first + 2*step, ...; returns how many of the `wanted`
   there are now. Word i is word i % 4 of the block with counter (i / 4, offset), each 64 bits, low half first; the key is
   the seed. */
static ptrdiff_t philox_words(uint32_t *restrict words, ptrdiff_t wanted, uint64_t seed, uint64_t offset, uint64_t first,
                              uint64_t step) {
    const uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    const uint32_t offset0 = (uint32_t)offset, offset1 = (uint32_t)(offset >> 32);
    if (step == 1) {
        const uint32_t low = (uint32_t)(first >> 2), high = (uint32_t)(first >> 34);
        const ptrdiff_t skip = (ptrdiff_t)(first & 3), available = PHILOX_WORDS - skip;
        uint32_t block[PHILOX_WORDS];
        SIMD
        for (int j = 0; j < PHILOX_WORDS / 4; j++) {
            uint32_t c0 = low + (uint32_t)j, c1 = high + (c0 < low), c2 = offset0, c3 = offset1;
            PHILOX_TEN_ROUNDS
            block[4 * j] = c0, block[4 * j + 1] = c1, block[4 * j + 2] = c2, block[4 * j + 3] = c3;
        }
        memcpy(words, block + skip, (size_t)available * sizeof *words);
        return wanted < available ? wanted : available;
    }
    if (wanted > PHILOX_WORDS) wanted = PHILOX_WORDS;
    SIMD
    for (ptrdiff_t j = 0; j < wanted; j++) {
        const uint64_t i = first + (uint64_t)j * step;
        const uint32_t word = (uint32_t)i;
        uint32_t c0 = (uint32_t)(i >> 2), c1 = (uint32_t)(i >> 34), c2 = offset0, c3 = offset1;
        PHILOX_TEN_ROUNDS
        const uint32_t even = word & 2 ? c2 : c0, odd = word & 2 ? c3 : c1;
        words[j] = word & 1 ? odd : even;
    }
    return wanted;
}
