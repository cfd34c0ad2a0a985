"""What the calls cost when another process keeps one of the cores busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import cases
from .measure import Limit
from .rivals import Rival
from .run import Plan, run_case

SECONDS = 4.0
SPIN = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
print("busy", flush=True)
while os.getppid() == int(sys.argv[2]):  # ends with its parent, whatever ends it
    for _ in range(1_000_000):
        pass
"""
CASES = (
    cases.BatchNorm(cases.FLOAT32, "forward", (32, 64, 56, 56), "NCHW"),
    cases.BatchNorm(cases.FLOAT32, "backward", (32, 64, 56, 56), "NCHW"),
    cases.CrossEntropy(cases.FLOAT32, (4096, 1000)),
    cases.Update(cases.FLOAT32, "adam", "1,000,000", ((1_000_000,),)),
)


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one of this process's cores busy."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(core), str(os.getpid())], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def busy_neighbor(rivals: Sequence[Rival], threads: int, limit: Limit) -> list[dict[str, Any]]:
    """Rows of a few cases, quiet and busy, for each: {"quiet": row, "busy": row}."""
    plan = Plan(threads, SECONDS, twin=False)
    eager = [rival for rival in rivals if rival.name == "PyTorch"]
    pairs = []
    for case in CASES:
        quiet = run_case(case, plan, eager, limit, "quiet")
        with busy_core():
            pairs.append({"quiet": quiet, "busy": run_case(case, plan, eager, limit, "busy")})
    return pairs
