"""Runs cases: for each, inputs, the calls of fastnorm, its twin and the rivals, and their measurement."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fastnorm
from fastnorm import reference

from .. import _runtime
from .cases import FRESH, IN_PLACE, OUT, Case, Inputs
from .measure import Call, Limit, measure, peak_memory, record
from .results import OURS, TWIN
from .rivals import Rival

TWIN_BYTES = 256 << 20  # beyond, the twin's float64 temporaries fill the machine's memory and its time


@dataclass(frozen=True)
class Plan:
    """How every case of a run is measured."""

    threads: int
    seconds: float
    cold_calls: int = 0
    twin: bool = True
    other_levels: bool = False  # beside the level in use, the weaker ones
    one_thread: bool = False    # beside all threads, one
    memory: bool = False        # also how much memory a call takes


def our_calls(case: Case, inputs: Inputs, plan: Plan) -> Iterator[Call]:
    """Our calls: fresh and with outputs given; on the other levels and on one thread if the plan says so."""
    level = _runtime.kernels.level

    def configured(threads: int, level: str) -> Any:
        def prepare() -> None:
            fastnorm.set_num_threads(threads)
            if _runtime.kernels.level != level:
                _runtime.kernels.load(level)
        return prepare

    forms = case.calls(fastnorm, inputs)
    for mode, run in forms.items():
        yield Call(OURS, mode, run, "", plan.threads, level, configured(plan.threads, level),
                   cold=mode in (FRESH, IN_PLACE))
    if plan.other_levels:
        available = _runtime.available_levels()
        for weaker in available[:available.index(level)]:
            for mode in set(forms) & {FRESH, IN_PLACE}:
                yield Call(OURS, mode, forms[mode], "", plan.threads, weaker, configured(plan.threads, weaker))
    if plan.one_thread and plan.threads > 1:
        for mode in set(forms) & {OUT, IN_PLACE}:
            yield Call(OURS, mode, forms[mode], "", 1, level, configured(1, level))


def run_case(case: Case, plan: Plan, rivals: Sequence[Rival], limit: Limit, section: str) -> dict[str, Any]:
    """Measure one case; return its row."""
    level, threads = _runtime.kernels.level, fastnorm.get_num_threads()
    skipped: dict[str, str] = {}
    try:
        inputs = case.inputs()
        calls = list(our_calls(case, inputs, plan))
        if plan.twin and case.array_bytes <= TWIN_BYTES:
            for mode, run in case.calls(reference, inputs).items():
                if mode in (FRESH, IN_PLACE):
                    calls.append(Call(TWIN, mode, run))
        for rival in rivals:
            try:
                theirs = list(rival.calls(case, inputs))
                for call in theirs:  # its first call: it compiles here, and fails here if it must
                    for step in (call.prepare, call.reset, call.run):
                        if step:
                            step()
                    call.cold = call.mode in (FRESH, IN_PLACE) and plan.cold_calls > 0
                calls += theirs
            except Exception as error:  # another project's: the run goes on without it, and says so
                skipped[rival.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        timings = measure(calls, plan.seconds, limit, plan.cold_calls)
        times = [record(call, timing) for call, timing in zip(calls, timings, strict=True)]
        row = {"case": case.facts(), "section": section, "threads": plan.threads, "limit": limit.result(),
               "limit_spread": limit.spread(), "limits": limit.samples(), "skipped": skipped, "times": times}
        if plan.memory:
            for call, time in zip(calls, times, strict=True):
                if call.rival == OURS and call.mode in (OUT, IN_PLACE) and call.level == level and call.prepare:
                    call.prepare()
                    time["peak_memory"] = peak_memory(call.run)
        return row
    finally:
        gc.collect()  # rivals' objects refer to each other, and hold gigabytes
        _runtime.kernels.load(level)
        fastnorm.set_num_threads(threads)
