"""Batch norm: forward, backward, both, inference; with ReLU, with residual and ReLU."""

from __future__ import annotations

from suite import benchmarks, measure

from fastnorm._bench import cases


@benchmarks(case for case in cases.full() if case.family == "batch norm")
def test_batch_norm(benchmark, case, rival, mode):
    measure(benchmark, case, rival, mode)
