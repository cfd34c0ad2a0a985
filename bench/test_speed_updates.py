"""Optimizers: one array, and real lists of shapes."""

from __future__ import annotations

from suite import benchmarks, measure

from fastnorm._bench import cases


@benchmarks(case for case in cases.full() if isinstance(case, cases.Update))
def test_update(benchmark, case, rival, mode):
    measure(benchmark, case, rival, mode)
