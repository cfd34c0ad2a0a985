"""Compare the speed of two revisions in one run: is HEAD slower than BASE?

    python bench/compare.py BASE [HEAD] [--seconds S] [--only PATTERN] [--level avx512]

Each revision is built in a folder of its own and runs in a process of its own; both get the same inputs, and their
calls take turns over pipes, so that a busy neighbour meets both. HEAD may be a folder with a built checkout ("." is
this one); by default it is the revision HEAD. Only cases that both revisions know are compared. The ratios are
advice: on a shared machine, up to 5 % either way is noise. Where an array has about the size of a cache, its speed also
depends on which pages a process got, by 20 % and more: --processes 5 measures each case in five pairs of processes.
Exit status 0, or 2 if a revision cannot be built.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 0.02  # seconds that one side runs before it is the other's turn
NOISE = 0.05
QUANTILE = 0.2

# Runs in the process of one revision. The cases come from this checkout's file, not from the revision's: both sides
# measure the same thing. Commands, a line each: the name of a case, a number of calls, or "end".
WORKER = """
import importlib.util, json, sys, time
import fastnorm
spec = importlib.util.spec_from_file_location("fastnorm._bench.cases", sys.argv[1],
                                              submodule_search_locations=None)
package = importlib.util.module_from_spec(importlib.util.spec_from_loader("fastnorm._bench", None))
package.__path__ = [sys.argv[1].rpartition("/")[0]]
sys.modules["fastnorm._bench"] = package
cases = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cases
spec.loader.exec_module(cases)
known = {case.name: case for case in [*cases.quick(), *cases.full()]}
run = None
print(json.dumps({"level": fastnorm._runtime.kernels.level, "threads": fastnorm.get_num_threads()}), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word.isdecimal():
        times = []
        for _ in range(int(word)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)
        continue
    try:
        calls = known[word].calls(fastnorm, known[word].inputs())
        run = calls.get("out") or calls["in place"]
        run()
        start = time.perf_counter()
        run()
        print(json.dumps(time.perf_counter() - start), flush=True)
    except Exception as error:  # this revision has no such function yet
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""


class UnavailableError(Exception):
    """A revision that cannot be measured; the text says why."""


class Side:
    """One revision in its process."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(ROOT / "fastnorm/_bench/cases.py")], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment | {"PYTHONPATH": str(folder)})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self.facts = self._answer()

    def ask(self, word: object) -> Any:
        """Send one command; return its answer."""
        try:
            self._input.write(f"{word}\n")
            self._input.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer will say so
        return self._answer()

    def _answer(self) -> Any:
        line = self._output.readline()
        if not line:
            raise UnavailableError(f"its process ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process; it leaves its loop when its input ends."""
        self._process.communicate()


def build(revision: str, folder: Path, environment: dict[str, str]) -> Path:
    """The revision's files, built in place in the folder."""
    if (Path(revision) / "fastnorm").is_dir():
        return Path(revision).resolve()
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
    if archive.returncode:
        raise UnavailableError(f"{revision}: {archive.stderr.decode().strip().splitlines()[-1]}")
    subprocess.run(["tar", "xf", "-", "-C", str(folder)], input=archive.stdout, check=True)
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, text=True,
                           env=environment, capture_output=True)
    if built.returncode:
        raise UnavailableError(f"{revision}: the build failed: "
                               f"{(built.stderr.strip().splitlines() or ['?'])[-1][:200]}")
    return folder


def ratio(base: Side, head: Side, name: str, seconds: float) -> tuple[float, float, float] | str:
    """Base's time over head's, and both; their blocks of calls take turns, and who begins alternates.

    The ratio is the median over the turns, which see the same bus: its speed is another a second later.
    """
    first = [side.ask(name) for side in (base, head)]
    if refused := [answer for answer in first if isinstance(answer, str)]:
        return refused[0]
    calls = max(1, int(BLOCK / max(*first, 1e-7)))
    times: tuple[list[float], list[float]] = ([], [])  # the low ones of each turn
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 4:
        for at in ((0, 1), (1, 0))[turn % 2]:
            (base, head)[at].ask(calls)  # wakes the threads, fills the caches; the other side's stop spinning
            times[at].append(low((base, head)[at].ask(calls)))
        turn += 1
    return statistics.median(b / h for b, h in zip(*times, strict=True)), low(times[0]), low(times[1])


def low(times: Sequence[float]) -> float:
    """What a call takes while the neighbours are quiet."""
    return sorted(times)[int(QUANTILE * len(times))]


def compare(args: argparse.Namespace) -> int:
    from fastnorm._bench import cases

    wanted = cases.matching(cases.full() if args.only else cases.quick(), args.only)
    if not wanted:
        raise UnavailableError(f"--only: no case matches {args.only!r}")
    environment = dict(os.environ) | ({"FASTNORM_LEVELS": args.level, "FASTNORM_ISA": args.level} if args.level else {})
    with tempfile.TemporaryDirectory() as work:
        folders = [build(revision, Path(work, role), environment)
                   for role, revision in (("base", args.base), ("head", args.head))]
        sides = [Side(folder, environment) for folder in folders]
        ratios = []
        try:
            print_head(args, sides)
            for case in wanted:
                results = []
                for _ in range(args.processes):
                    if args.processes > 1:
                        close(sides)
                        sides += [Side(folder, environment) for folder in folders]
                    results.append(ratio(*sides, case.name, args.seconds))
                if refused := [result for result in results if isinstance(result, str)]:
                    print(f"{case.name:58s}  not compared: {refused[0][:60]}", flush=True)
                    continue
                ratios.append(print_row(case.name, [result for result in results if not isinstance(result, str)]))
            if ratios:
                print(f"{'geometric mean':76s}   {statistics.geometric_mean(ratios):5.2f}")
        finally:
            close(sides)
    return 0


def close(sides: list[Side]) -> None:
    """End the processes and forget them."""
    while sides:
        sides.pop().close()


def print_head(args: argparse.Namespace, sides: Sequence[Side]) -> None:
    """What is compared, and the columns."""
    for role, revision, side in zip(("base", "head"), (args.base, args.head), sides, strict=True):
        print(f"{role}  {revision} ({side.facts['level']}, threads: {side.facts['threads']})")
    print(f"\n{'':58s}{'base ms':>9s}{'head ms':>9s}   base/head", flush=True)


def print_row(name: str, results: Sequence[tuple[float, float, float]]) -> float:
    """A case's line: medians of the times, geometric mean and, of several, range of the ratios; returns the mean."""
    from fastnorm._bench.table import milliseconds

    ratios, base, head = zip(*results, strict=True)
    value = statistics.geometric_mean(ratios)
    note = "  faster" if value > 1 + NOISE else "  SLOWER" if value < 1 - NOISE else ""
    several = f"  {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
    print(f"{name:58s}{milliseconds(statistics.median(base)):>9s}{milliseconds(statistics.median(head)):>9s}"
          f"   {value:5.2f}{several}{note}", flush=True)
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case (default: 1)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="pairs of processes a case (default: 1)")
    parser.add_argument("--only", metavar="PATTERN", help="cases of the full grid whose name has all these words")
    parser.add_argument("--level", help="build and compare this instruction-set level only")
    try:
        return compare(parser.parse_args(argv))
    except UnavailableError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
