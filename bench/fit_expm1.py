"""Coefficients of `exp_tail` in fastnorm/_kernels/activation.h: `pip install mpmath`, then `python bench/fit_expm1.py`.

(e**r - 1 - r) / r**2 for |r| <= ln(2)/2 (1 + 2**-11) by a polynomial whose largest error is smallest relative to e**r:
Remez' exchange, in 50 digits. Prints the coefficients as they are rounded, lowest first, and the error that is left.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 50
TOP = mp.log(2) / 2 * (1 + mp.mpf(2) ** -11)
GRID = [TOP * mp.cos(mp.pi * (i + mp.mpf(1) / 2) / 800) for i in range(800)]


def error(coefficients, r):
    """Of e**r, relative."""
    return (mp.polyval(coefficients[::-1], r) * r**2 - (mp.expm1(r) - r)) / mp.e**r


def extrema(coefficients):
    """Where the error is largest between its changes of sign."""
    found = []
    for r in GRID:
        e = error(coefficients, r)
        if not found or (e > 0) != (found[-1][1] > 0):
            found.append((r, e))
        elif abs(e) > abs(found[-1][1]):
            found[-1] = (r, e)
    return found


def fit(degree):
    """The coefficients, lowest first."""
    n = degree + 2
    nodes = [TOP * mp.cos(mp.pi * (i + mp.mpf(1) / 2) / n) for i in range(n)]
    for _ in range(30):
        rows = [[r ** (k + 2) for k in range(degree + 1)] + [(-1) ** i * mp.e**r] for i, r in enumerate(nodes)]
        *coefficients, level = mp.lu_solve(mp.matrix(rows), mp.matrix([mp.expm1(r) - r for r in nodes]))
        peaks = extrema(coefficients)
        while len(peaks) > n:
            peaks.pop(0 if abs(peaks[0][1]) < abs(peaks[-1][1]) else -1)
        if len(peaks) < n or max(abs(e) for _, e in peaks) < abs(level) * (1 + mp.mpf(10) ** -4):
            break
        nodes = [r for r, _ in peaks]
    return coefficients


for dtype, degree in ((np.float32, 5), (np.float64, 10)):
    rounded = [float(dtype(float(c))) for c in fit(degree)]
    left = max(abs(error([mp.mpf(c) for c in rounded], r)) for r in GRID)
    print(f"{dtype.__name__}, degree {degree}: relative error 2**{float(mp.log(left, 2)):.1f}")
    print(*(f"    {c!r}" for c in rounded), sep="\n")
