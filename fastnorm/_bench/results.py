"""What a run found: machine facts and one row a case, as JSON can hold them, and the ratios that follow from them.

A row: ``{"case": ..., "section": ..., "threads": ..., "limit": bytes a second by loop, "limit_spread": ..., "limits":
the same, sample by sample, "times": [...], "skipped": {...}}``; each time has the fields of `measure.record`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import _runtime
from .cases import FRESH, IN_PLACE, OUT, Traffic

FORMAT = 2
OURS, TWIN = "fastnorm", "twin"
Row = Mapping[str, Any]


class DamagedError(Exception):
    """A file that holds no results; the text says why."""


# -- the machine -------------------------------------------------------------------------------------------------------


def _first(path: str, field: str = "") -> str | None:
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip() if field else line.strip()
    except OSError:
        pass
    return None


def cache_sizes() -> dict[str, int]:
    """Bytes of each cache that one core sees, by name: {"L1d": ..., "L2": ..., "L3": ...}; empty if not told."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_first(str(folder / name)) for name in ("level", "type", "size"))
        if level and kind and kind != "Instruction" and size and size[-1] in units:
            sizes[f"L{level}" + ("d" if kind == "Data" else "")] = int(size[:-1]) * units[size[-1]]
    return sizes


def machine() -> dict[str, Any]:
    """Facts that a reader needs to judge a figure."""
    memory = _first("/proc/meminfo", "MemTotal")
    return {"processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "virtual": " hypervisor" in (_first("/proc/cpuinfo", "flags") or ""),
            "caches": cache_sizes(), "memory": int(memory.split()[0]) * 1024 if memory else None,
            "system": f"{platform.system()} {platform.release()}",
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "config": _runtime.config()}


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results; the file is the old one or the new one at any moment, never half of one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"format": FORMAT, **results}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The results in a file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedError(f"{path}: not JSON ({error})") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or not isinstance(results.get("rows"), list):
        raise DamagedError(f"{path}: not the results of `python -m fastnorm bench --json`")
    return results


# -- ratios ------------------------------------------------------------------------------------------------------------


def times(row: Row, rival: str, mode: str | None = None, *, level: str | None = None, threads: int | None = None,
          variant: str | None = None) -> list[Row]:
    """The times of one rival; ours are those of the best level on all threads, unless told otherwise."""
    best = max((t["level"] for t in row["times"]), key=_strength, default="")
    wanted_level = (best if level is None else level) if rival == OURS else ""
    wanted_threads = row["threads"] if threads is None else threads
    return [t for t in row["times"] if t["rival"] == rival and (mode is None or t["mode"] == mode)
            and (variant is None or t["variant"] == variant)
            and (rival != OURS or (t["level"] == wanted_level and t["threads"] == wanted_threads))]


def _strength(level: str) -> int:
    return _runtime.LEVELS.index(level) if level in _runtime.LEVELS else -1


def best(row: Row, rival: str, mode: str | None = None, key: str = "low", **where: Any) -> float | None:
    """Seconds of a rival's fastest way, or None."""
    return min((t[key] for t in times(row, rival, mode, **where) if t[key] is not None), default=None)


def paired(mine: Row, theirs: Row) -> float:
    """Their time over ours: the median over the rounds in which both took a turn, and so saw the same bus.

    Examples
    --------
    >>> paired({"turns": [(0, 0, 1.0), (1, 0, 2.0), (2, 1, 4.0)]}, {"turns": [(0, 0, 3.0), (2, 1, 13.0)]})
    3.125
    """
    ours = {round_: seconds for round_, _, seconds in mine["turns"]}
    ratios: list[float] = [seconds / ours[round_] for round_, _, seconds in theirs["turns"] if round_ in ours]
    return statistics.median(ratios)


def ratio(row: Row, rival: str, mode: str | None = None, key: str = "low", variant: str | None = None,
          **where: Any) -> float | None:
    """How many times as fast as a rival we are; None where there is nothing to compare.

    Like is compared with like: both allocate their outputs (what calls do by themselves), or both work in place; with
    ``mode="out"`` both are given their outputs. Of a rival's several ways, the one that is fastest beside us; times
    other than the low ones are compared as they are, not round by round.
    """
    modes = (FRESH, IN_PLACE) if mode is None else (mode,)
    for m in modes:
        mine, theirs = times(row, OURS, m, **where), times(row, rival, m, variant=variant)
        if key != "low":
            mine, theirs = ([t for t in side if t[key] is not None] for side in (mine, theirs))
        if mine and theirs:
            return min(paired(mine[0], t) if key == "low" else float(t[key] / mine[0][key]) for t in theirs)
    return None


def share(row: Row, mode: str | None = None, **where: Any) -> float | None:
    """The share of the memory limit that we reach with outputs given (or in place).

    The median over the turns, each beside the samples of the limit before and after it.
    """
    traffic = Traffic(**row["case"]["traffic"])
    for m in (OUT, IN_PLACE) if mode is None else (mode,):
        for mine in times(row, OURS, m, **where):
            limits = [traffic.seconds(sample) for sample in row["limits"]]
            shares: list[float] = [statistics.fmean(limits[at:at + 2]) / seconds for _, at, seconds in mine["turns"]]
            return statistics.median(shares)
    return None


def gain(row: Row) -> float | None:
    """How many times as fast we are on all threads as on one, outputs given (or in place)."""
    for m in (OUT, IN_PLACE):
        every, one = times(row, OURS, m), times(row, OURS, m, threads=1)
        if every and one and row["threads"] > 1:
            return paired(every[0], one[0])
    return None


def rivals(rows: Iterable[Row]) -> list[str]:
    """Names of all who were measured beside us, in the order of their first appearance."""
    return list(dict.fromkeys(t["rival"] for row in rows for t in row["times"] if t["rival"] != OURS))
