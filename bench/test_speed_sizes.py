"""A few kernels over sizes from 1 KB to 1 GB an array."""

from __future__ import annotations

from suite import benchmarks, measure

from fastnorm._bench import cases


@benchmarks(cases.sweep())
def test_size(benchmark, case, rival, mode):
    measure(benchmark, case, rival, mode)
