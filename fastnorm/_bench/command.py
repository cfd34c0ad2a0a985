"""`python -m fastnorm bench`, from start to finish."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastnorm

from .. import _runtime
from .._demo.checkpoint import check_destination
from .._demo.errors import UserError, require
from .._terminal import Bar, say
from . import cases, conditions, plot, results, rivals, table
from .measure import Limit
from .run import Plan, run_case

COMPILING = ("torch.compile", "DeepSpeed")  # they compile C++ first, for longer than the quick run takes
BUSY = 0.5  # load average beyond which something else is running
QUICK_SECONDS, FULL_SECONDS = 3.0, 4.0
QUICK_TOTAL = 90.0  # seconds that the quick run may take, however slow the rivals are to start


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    threads: int | None = None
    seconds: float | None = None
    only: str | None = None
    rivals: str | None = None
    full: bool = False
    plot: Path | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Section:
    """Cases that are measured alike."""

    name: str
    cases: Sequence[cases.Case]
    plan: Plan
    rivals: Sequence[str]


def _chosen_rivals(job: Job) -> list[str]:
    if job.rivals is None:
        return [name for name in rivals.NAMES if job.full or name not in COMPILING]
    known = {name.lower(): name for name in rivals.NAMES}
    chosen = []
    for word in filter(None, (word.strip() for word in job.rivals.split(","))):
        if word.lower() not in (*known, "none"):
            raise UserError(f"--rivals: expected names among {', '.join(rivals.NAMES)}, or none; got {word!r}")
        chosen += [known[word.lower()]] if word.lower() in known else []
    return chosen


def _sections(job: Job, threads: int) -> list[Section]:
    names = _chosen_rivals(job)
    seconds = job.seconds or (FULL_SECONDS if job.full else QUICK_SECONDS)
    if not job.full:
        # A pattern that meets nothing here may well meet something in the full grid.
        grid = cases.quick() if cases.matching(cases.quick(), job.only) else cases.full()
        sections = [Section("grid", grid, Plan(threads, seconds, cold_calls=3), names)]
    elif threads == 1:  # beside the run on all threads: how the same cases compare on one
        grid = [case for case in cases.full() if case.dtype == cases.FLOAT32]
        plan = Plan(threads, seconds / 2, twin=False)
        sections = [Section("grid", grid, plan, [n for n in names if n not in COMPILING])]
    else:
        single, double = ([case for case in cases.full() if case.dtype == dtype]
                          for dtype in (cases.FLOAT32, cases.FLOAT64))
        plan = Plan(threads, seconds, cold_calls=7, other_levels=True, one_thread=True, memory=True)
        sections = [
            Section("grid", single, plan, names),
            Section("grid", double, Plan(threads, seconds / 2), [n for n in names if n not in COMPILING]),
            Section("sweep", cases.sweep(), Plan(threads, seconds / 2, twin=False, one_thread=True),
                    [n for n in names if n == "PyTorch"])]
    sections = [Section(s.name, cases.matching(s.cases, job.only), s.plan, s.rivals) for s in sections]
    if not any(section.cases for section in sections):
        raise UserError(f"--only: no case matches {job.only!r}")
    return sections


def bench(job: Job) -> None:
    """Check everything that can be checked first, then measure, then show."""
    require("rich", "rich", "bench")
    for option, path in (("--json", job.json), ("--plot", job.plot)):
        if path is not None:
            check_destination(option, path)
    if job.plot is not None:
        plot.check(job.plot)
    if job.full and job.json is None:
        raise UserError("--full: takes an hour or more, expected --json FILE to keep what it finds")
    threads = job.threads or fastnorm.get_num_threads()
    before = fastnorm.get_num_threads()
    sections = _sections(job, threads)
    fastnorm.set_num_threads(threads)
    try:
        found = _measure(job, sections, threads)
    finally:
        fastnorm.set_num_threads(before)
    table.show([row for row in found["rows"] if row["threads"] == threads and row["section"] == "grid"])
    if job.json is not None:
        say(f"wrote {job.json}")
    if job.plot is not None:
        plot.overview(job.plot, found)
        say(f"drew {job.plot}")


def _measure(job: Job, sections: Sequence[Section], threads: int) -> dict[str, Any]:
    wanted = list(dict.fromkeys(name for section in sections for name in section.rivals))
    start = time.time()
    loaded, absent = rivals.load(wanted, threads)
    found: dict[str, Any] = {
        "machine": results.machine(), "threads": threads, "level": _runtime.kernels.level, "full": job.full,
        "rivals": {rival.name: rival.version for rival in loaded}, "absent": absent, "started": start, "rows": []}
    say(f"machine   {found['machine']['processor']}, {found['machine']['cores']} cores; "
        f"{found['level']}, {threads} thread{'s' if threads > 1 else ''}")
    load = found["machine"]["load"]
    if load is not None and load > BUSY:
        say(f"busy      the load is {load:.1f} before anything has begun: figures of this run are worth little")
    say("rivals    " + (", ".join(f"{rival.name} {rival.version}" for rival in loaded) or "none"))
    for name, why in absent.items():
        say(f"          without {name}: {why}")
    limit = Limit(threads)
    hurried = not job.full and job.seconds is None
    overhead = 0.0  # seconds a case beyond its measurement: inputs, compilation, cold calls
    total = sum(len(section.cases) for section in sections)
    with Bar("bench", total) as bar:
        for section in sections:
            present = [rival for rival in loaded if rival.name in section.rivals]
            for case in section.cases:
                done, case_start, plan = len(found["rows"]), time.time(), section.plan
                bar.update(done, status := [f"{done}/{total}", case.name], None)
                if hurried:
                    left = (start + QUICK_TOTAL - case_start) / (total - done) - overhead
                    plan = replace(plan, seconds=min(plan.seconds, max(left, 0.2)))
                row = run_case(case, plan, present, limit, section.name)
                overhead += (time.time() - case_start - plan.seconds - overhead) / (done + 1)
                found["rows"].append(row)
                bar.update(done + 1, status, table.one_line(row))
                for name, why in row["skipped"].items():
                    say(f"          without {name} here: {why}")
                if job.json is not None:  # after every case: an interrupted run loses no more than one
                    results.write(job.json, found)
    if job.full and threads > 1 and job.only is None:
        say("with a busy neighbour")
        found["busy"] = conditions.busy_neighbor(loaded, threads, limit)
        found["rows"] += _on_one_thread(job)
        found["seconds"] = time.time() - start
    if job.json is not None:
        results.write(job.json, found)
    return found


def _on_one_thread(job: Job) -> list[dict[str, Any]]:
    """The grid on one thread, in a process of its own: JAX cannot change the number of its threads."""
    say("on one thread")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "one.json")
        options = ["--seconds", str(job.seconds)] if job.seconds else []
        options += ["--rivals", job.rivals] if job.rivals else []
        subprocess.run([sys.executable, "-m", "fastnorm", "bench", "--full", "--threads", "1", "--json", str(file),
                        *options], check=True)
        rows: list[dict[str, Any]] = results.read(file)["rows"]
    return rows
