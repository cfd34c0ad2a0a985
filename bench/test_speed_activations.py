"""Activations and dropout, forward and backward."""

from __future__ import annotations

from suite import benchmarks, measure

from fastnorm._bench import cases


@benchmarks(case for case in cases.full() if isinstance(case, cases.Elementwise))
def test_elementwise(benchmark, case, rival, mode):
    measure(benchmark, case, rival, mode)
