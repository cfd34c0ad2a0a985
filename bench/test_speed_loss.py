"""Softmax, and cross-entropy with its gradient."""

from __future__ import annotations

from suite import benchmarks, measure

from fastnorm._bench import cases


@benchmarks(case for case in cases.full() if case.family in ("softmax", "cross-entropy"))
def test_loss(benchmark, case, rival, mode):
    measure(benchmark, case, rival, mode)
