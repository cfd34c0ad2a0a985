"""What the `test_*.py` of this folder share: a benchmark for each case of the grid and each of its calls.

    python -m pytest bench --benchmark-json FILE
    python -m pytest bench/test_speed_norm.py -k "forward and NHWC and fastnorm"

pytest-benchmark runs the calls one after the other: good for looking at one kernel, and for its own comparisons
(`--benchmark-compare`). What rivals are compared by is `python -m fastnorm bench`, which interleaves their calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import fastnorm
from fastnorm import reference
from fastnorm._bench import cases, rivals
from fastnorm._bench.measure import Call
from fastnorm._bench.results import OURS, TWIN
from fastnorm._bench.run import TWIN_BYTES

NAMES = (OURS, TWIN, *(name for name in rivals.NAMES if name not in ("torch.compile", "DeepSpeed")))


@functools.cache
def _rival(name: str) -> rivals.Rival:
    present, absent = rivals.load([name], fastnorm.get_num_threads())
    if absent:
        pytest.skip(absent[name])
    return present[0]


def _calls(case: cases.Case, name: str) -> list[Call]:
    inputs = case.inputs()
    if name == TWIN and case.array_bytes > TWIN_BYTES:
        pytest.skip("the twin is not run on arrays this large")
    if name in (OURS, TWIN):
        backend = fastnorm if name == OURS else reference
        return [Call(name, mode, run) for mode, run in case.calls(backend, inputs).items()]
    return list(_rival(name).calls(case, inputs))


def benchmarks(grid: Iterable[cases.Case]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Parametrize a test `(benchmark, case, rival, mode)` over the grid, all rivals, and where results go."""
    arguments = []
    for case in grid:
        modes = (cases.IN_PLACE,) if isinstance(case, cases.Update) else (cases.FRESH, cases.OUT)
        arguments += [pytest.param(case, rival, mode, id=f"{case.name}-{rival}-{mode}")
                      for rival in NAMES for mode in modes]
    return pytest.mark.parametrize(("case", "rival", "mode"), arguments)


def measure(benchmark: Any, case: cases.Case, rival: str, mode: str) -> None:
    """Benchmark the rival on the case; of several ways to do it, the first, which is meant for it."""
    calls = [call for call in _calls(case, rival) if call.mode == mode]
    if not calls:
        pytest.skip(f"{rival} has no such call")
    call = calls[0]
    if call.prepare:
        call.prepare()
    benchmark.group = case.name
    benchmark.extra_info.update(case.facts(), rival=rival, mode=mode, variant=call.variant)
    rounds = max(5, min(1000, int(2e9 / max(case.traffic.total, 1))))
    benchmark.pedantic(call.run, setup=call.reset, rounds=rounds, iterations=1, warmup_rounds=0 if call.reset else 2)
