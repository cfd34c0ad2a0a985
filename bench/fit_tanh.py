"""Coefficients of `tanh` in fastnorm/_kernels/activation.h: `pip install mpmath`, then `python bench/fit_tanh.py`.

tanh x = x + x**3 P(x**2) / Q(x**2) for |x| <= 3/4, where P/Q has the smallest largest error relative to tanh x: Remez'
exchange for rational functions (Maehly's first method), in 50 digits. Q's lowest coefficient is 1.
"""

import mpmath as mp

mp.mp.dps = 50
TOP = mp.mpf(9) / 16  # of z = x**2
GRID = [TOP * (1 - mp.cos(mp.pi * i / 2000)) / 2 for i in range(1, 2001)]


def target(z):
    """(tanh x / x - 1) / x**2, by its series where that would cancel."""
    if z < mp.mpf("1e-12"):
        return -mp.mpf(1) / 3 + 2 * z / 15
    x = mp.sqrt(z)
    return (mp.tanh(x) / x - 1) / z


def weight(z):
    """By how much an error in P/Q changes tanh x, relative to it."""
    x = mp.sqrt(z)
    return z * x / mp.tanh(x)


def solve(nodes, degree_p, degree_q):
    """P, Q and the error that P/Q has at each node with alternating sign."""
    q, error = [mp.mpf(1)] + [mp.mpf(0)] * degree_q, mp.mpf(0)
    for _ in range(40):
        rows, right = [], []
        for i, z in enumerate(nodes):
            f, sign = target(z), (-1) ** i / weight(z)
            lifted = f + sign * error
            rows.append([z**k for k in range(degree_p + 1)] + [-lifted * z**k for k in range(1, degree_q + 1)]
                        + [-sign * mp.polyval(q[::-1], z)])
            right.append(f)
        found = mp.lu_solve(mp.matrix(rows), mp.matrix(right))
        p, before = list(found[: degree_p + 1]), error
        q, error = [mp.mpf(1), *found[degree_p + 1 : -1]], found[len(found) - 1]
        if abs(error - before) < abs(error) * mp.mpf("1e-20"):
            break
    return p, q, error


def fit(degree_p, degree_q):
    """P and Q of these degrees, lowest coefficient first, and their largest error."""
    count = degree_p + degree_q + 2
    nodes = [TOP * (1 - mp.cos(mp.pi * (i + 1) / (count + mp.mpf("0.5")))) / 2 for i in range(count)]
    for _ in range(20):
        p, q, error = solve(nodes, degree_p, degree_q)
        errors = [weight(z) * (mp.polyval(p[::-1], z) / mp.polyval(q[::-1], z) - target(z)) for z in GRID]
        peaks = []  # the largest error between two changes of sign
        for z, e in zip(GRID, errors, strict=True):
            if peaks and (e > 0) == (peaks[-1][1] > 0):
                peaks[-1] = max(peaks[-1], (z, e), key=lambda peak: abs(peak[1]))
            else:
                peaks.append((z, e))
        largest = max(abs(e) for e in errors)
        if len(peaks) != count or largest < abs(error) * mp.mpf("1.0001"):
            break
        nodes = [z for z, _ in peaks]
    return p, q, largest


if __name__ == "__main__":
    for name, degrees in (("float", (1, 2)), ("double", (3, 3))):
        p, q, largest = fit(*degrees)
        print(name, "error 2**", mp.nstr(mp.log(largest, 2), 4))
        print("  P", *map(float, p))
        print("  Q", *map(float, q))
