/* Loops that do nothing but move memory, for bandwidth.pyx: what every kernel's share of the limit is a share of. */

#ifndef FASTNORM_BANDWIDTH_H
#define FASTNORM_BANDWIDTH_H

#ifndef FASTNORM_VECTOR_H /* included again, it would give its template once more */
#include "vector.h"
#endif

/* Sum of n floats in LANES partial sums: as fast as memory delivers them. */
static float bandwidth_read(const float *restrict x, ptrdiff_t n) {
    float lane[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        SIMD
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j];
    }
    for (int j = 0; i + j < n; j++) lane[j] += x[i + j];
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
}

/* x = x*a + b in place. */
static void bandwidth_update(float *x, ptrdiff_t n, float a, float b) {
    SIMD
    for (ptrdiff_t i = 0; i < n; i++) x[i] = x[i] * a + b;
}

#endif
