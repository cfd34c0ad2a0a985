"""The figures that fastnorm wants to reach, each computed from the results of a full run, beside its goal.

A figure that cannot be computed from what was measured has no value, and is neither reached nor missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import FRESH, IN_PLACE, OUT
from .measure import geometric_mean
from .results import OURS, TWIN, Row, best, gain, ratio, rivals, share, times

NOISE = 0.03           # below 1 x, what two runs of the same code differ by
LARGE = 16_000_000     # bytes of an array
SMALL_ELEMENTS = 4096
FLAT = 1.25            # largest time per element over the smallest, beyond the caches
PyTorch = "PyTorch"


@dataclass(frozen=True)
class Figure:
    """A figure, its goal, and what was measured."""

    number: int
    text: str
    goal: str
    value: float | None
    reached: bool | None
    unit: str = "×"
    where: str = ""      # the case that decides, or those that miss

    @property
    def shown(self) -> str:
        """The value in words."""
        if self.value is None:
            return "not measured"
        return f"{self.value:.0%}" if self.unit == "%" else f"{self.value:.2f} {self.unit}".rstrip()


def _name(row: Row) -> str:
    return str(row["case"]["name"])


def _at_least(number: int, text: str, goal: float, values: Mapping[str, float], *, unit: str = "×",
              mean: bool = False) -> Figure:
    """The least value, or their geometric mean, is at least the goal."""
    shown = f"≥ {goal:.0%}" if unit == "%" else f"≥ {goal:g} {unit}"
    if not values:
        return Figure(number, text, shown, None, None, unit)
    value = geometric_mean(list(values.values())) if mean else min(values.values())
    missing = sorted((v, name) for name, v in values.items() if v < goal)
    where = f"{len(values)} cases" if mean else min(values, key=values.__getitem__)
    if not mean and len(missing) > 1:
        where += f", and {len(missing) - 1} more of {len(values)} below the goal"
    return Figure(number, text, shown, value, value >= goal, unit, where)


def _at_most(number: int, text: str, goal: float, values: Mapping[str, float], unit: str = "×") -> Figure:
    shown = f"≤ {goal:g} {unit}"
    if not values:
        return Figure(number, text, shown, None, None, unit)
    worst = max(values, key=values.__getitem__)
    return Figure(number, text, shown, values[worst], values[worst] <= goal, unit, worst)


def _ratios(rows: Iterable[Row], rival: str, **where: Any) -> dict[str, float]:
    return {_name(row): r for row in rows if (r := ratio(row, rival, **where)) is not None}


def main_grid(found: Mapping[str, Any]) -> list[Row]:
    """Float32 rows of the grid on all threads: what most figures are about."""
    return [row for row in found["rows"] if row["section"] == "grid" and row["threads"] == found["threads"]
            and row["case"]["dtype"] == "float32"]


def losses(rows: Sequence[Row]) -> list[tuple[float, str, str, str]]:
    """Every case in which a rival is faster by more than noise: ratio, case, rival, and where results go."""
    lost = []
    for row in rows:
        for rival in rivals([row]):
            for mode in (FRESH, OUT, IN_PLACE):
                r = ratio(row, rival, mode)
                if r is not None and r < 1 - NOISE:
                    lost.append((r, _name(row), rival, mode))
    return sorted(lost)


def _no_case_slower(rows: Sequence[Row]) -> Figure:
    others = [name for name in rivals(rows) if name != TWIN]
    values = {f"{_name(row)} / {rival} ({mode})": r for row in rows for rival in others
              for mode in (FRESH, OUT, IN_PLACE) if (r := ratio(row, rival, mode)) is not None}
    return _at_least(1, f"slowest case against any rival (noise: {NOISE:.0%})", 1 - NOISE, values)


def _means(rows: Sequence[Row], cache: int) -> list[Figure]:
    def family(*names: str) -> list[Row]:
        return [row for row in rows if row["case"]["family"] in names]

    def against_fused(large: bool) -> dict[str, float]:
        return _ratios([row for row in family("Adam", "momentum")
                        if (_footprint(row) > cache if large else row["case"]["elements"] <= 1_000_000)],
                       PyTorch, variant="fused step()")

    norm = family("batch norm")
    nhwc = [row for row in norm if row["case"]["layout"] == "NHWC"]
    means = [("batch norm over PyTorch, geometric mean", 4.0, _ratios(norm, PyTorch)),
             ("the same, NHWC alone", 1.4, _ratios(nhwc, PyTorch)),
             ("cross-entropy over PyTorch, geometric mean", 6.0, _ratios(family("cross-entropy"), PyTorch)),
             ("RMSProp over PyTorch, geometric mean", 4.0, _ratios(family("RMSProp"), PyTorch)),
             ("Adam and momentum over fused step(), up to 1 M parameters", 2.0, against_fused(False)),
             ("Adam and momentum over fused step(), beyond the caches", 1.1, against_fused(True)),
             ("everything over the NumPy twin, geometric mean", 10.0, _ratios(rows, TWIN))]
    return [_at_least(2, text, goal, values, mean=True) for text, goal, values in means]


def _footprint(row: Row) -> int:
    """Bytes of all arrays of a call."""
    traffic = row["case"]["traffic"]
    return int(traffic["read"] + 2 * traffic["copied"] + traffic["updated"])


def _inner(row: Row) -> int:
    return math.prod(row["case"]["shape"][2:])


def _shares(rows: Sequence[Row]) -> list[Figure]:
    large = [row for row in rows if row["case"]["array_bytes"] >= LARGE]

    def of(test: Callable[[Mapping[str, Any], Row], bool]) -> dict[str, float]:
        return {_name(row): s for row in large if test(row["case"], row) and (s := share(row)) is not None}

    def norm(case: Mapping[str, Any]) -> bool:
        return (case["family"] == "batch norm" and case["what"] in ("forward", "backward")
                and not case["activation"])

    groups = [("batch norm, NCHW with inner ≥ 196", 0.75,
               of(lambda case, row: norm(case) and case["layout"] == "NCHW" and _inner(row) >= 196)),
              ("batch norm, NHWC", 0.75, of(lambda case, _: norm(case) and case["layout"] == "NHWC")),
              ("batch norm, 7×7 inner", 0.55,
               of(lambda case, row: norm(case) and case["layout"] == "NCHW" and _inner(row) == 49)),
              ("cross-entropy, 1,000 classes and more", 0.75,
               of(lambda case, _: case["family"] == "cross-entropy" and case["shape"][case["axis"]] >= 1000)),
              ("optimizers", 0.75, of(lambda case, _: "rule" in case))]
    return [_at_least(3, f"least share of the limit, arrays ≥ 16 MB: {text}", goal, values, unit="%")
            for text, goal, values in groups]


def _small(rows: Sequence[Row]) -> list[Figure]:
    named = {_name(row): row for row in rows}
    wanted = [("batch norm forward (64,256)", PyTorch, None, 1.5), ("momentum 1,000", PyTorch, "fused step()", 4.0),
              ("Adam 200 x 1000", PyTorch, "fused step()", 3.0),
              ("cross-entropy + gradient (128,10)", PyTorch, None, 4.0),
              ("cross-entropy + gradient (4096,10)", "JAX", None, 1.0)]
    return [_at_least(4, f"{name} over {rival}{f', {variant}' if variant else ''}", goal,
                      _ratios([named[name]] if name in named else [], rival, variant=variant))
            for name, rival, variant, goal in wanted]


def _fusion(rows: Sequence[Row]) -> Figure:
    """Plain batch norm's share of the limit over that of the fused form: what this costs for its bytes."""
    norm = [row for row in rows if row["case"]["family"] == "batch norm" and row["case"]["what"] == "both"]
    key = {(tuple(row["case"]["shape"]), row["case"]["layout"], bool(row["case"]["activation"]),
            row["case"]["residual"]): row for row in norm}
    values = {}
    for (shape, layout, activation, residual), row in key.items():
        plain = key.get((shape, layout, False, False))
        if activation and residual and plain and row["case"]["array_bytes"] >= LARGE:
            for mode in (OUT, FRESH):
                fused_share, plain_share = share(row, mode), share(plain, mode)
                if fused_share and plain_share:
                    values[f"{_name(row)} ({mode})"] = plain_share / fused_share
    return _at_most(5, "batch norm + residual + ReLU over plain, for its bytes, arrays ≥ 16 MB", 1.15, values)


def _threads(found: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure]:
    cache = found["machine"]["caches"].get("L2", 0)

    def gains(test: Callable[[Row], bool]) -> dict[str, float]:
        return {_name(row): g for row in rows if test(row) and (g := gain(row)) is not None}

    if found["threads"] == 1:
        return [_at_least(6, "all threads over one", 1.7, {})]
    # Half of it at least: less is small work, which one thread may do.
    in_l2 = gains(lambda row: found["threads"] * cache / 2 <= _footprint(row) <= found["threads"] * cache)
    return [_at_least(6, f"{found['threads']} threads over one, arrays in L2 of each core", 1.7, in_l2),
            _at_least(6, f"the same, up to {SMALL_ELEMENTS:,} elements", 1 - NOISE,
                      gains(lambda row: row["case"]["elements"] <= SMALL_ELEMENTS))]


def _busy(found: Mapping[str, Any]) -> list[Figure]:
    slowdown, over = {}, {}
    for pair in found.get("busy", ()):
        quiet, busy = pair["quiet"], pair["busy"]
        for mode in (OUT, IN_PLACE):
            before, after = best(quiet, OURS, mode, "median"), best(busy, OURS, mode, "median")
            if before and after:
                slowdown[_name(quiet)] = after / before
        if (r := ratio(busy, PyTorch, key="median")) is not None:
            over[_name(busy)] = r
    return [_at_most(7, "median with one core kept busy over the quiet median", 2.2, slowdown),
            _at_least(7, "medians then, over PyTorch's", 1.0, over)]


def _memory(found: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure]:
    scratch, faults = {}, {}
    for row in rows:
        if row["case"].get("residual"):
            continue  # its dresidual is always a fresh array
        for mode in (OUT, IN_PLACE):
            for time in times(row, OURS, mode):
                if time.get("peak_memory") is not None:
                    scratch[_name(row)] = time["peak_memory"] / found["threads"] / (1 << 20)
                if row["case"]["array_bytes"] >= LARGE:
                    faults[_name(row)] = time["page_faults"]
    return [_at_most(8, "memory that a call takes beyond its arrays, a thread", 1.0, scratch, "MB"),
            _at_most(8, "page faults a call, arrays ≥ 16 MB, outputs given", 1.0, faults, "")]


def _flat(found: Mapping[str, Any]) -> Figure:
    """Beyond four times the last-level cache, where there is no cache step any more."""
    cache = max(found["machine"]["caches"].values(), default=32 << 20)
    series: dict[str, list[float]] = {}
    for row in found["rows"]:
        reached = share(row)
        if row["section"] == "sweep" and reached and _footprint(row) >= 4 * cache:
            title = row["case"]["title"] + (f" {row['case']['layout']}" if "layout" in row["case"] else "")
            # for the bytes that the bus moved then: its speed changes while the sweep runs
            series.setdefault(title, []).append(1 / reached)
    values = {title: max(all_) / min(all_) for title, all_ in series.items() if len(all_) > 1}
    return _at_most(9, "time per element, of the limit's: largest over smallest, beyond the caches, to 1 GB", FLAT,
                    values)


def figures(found: Mapping[str, Any]) -> list[Figure]:
    """All of them, in order."""
    rows = main_grid(found)
    cache = max(found["machine"]["caches"].values(), default=32 << 20)
    return [_no_case_slower(rows), *_means(rows, cache), *_shares(rows), *_small(rows), _fusion(rows),
            *_threads(found, rows), *_busy(found), *_memory(found, rows), _flat(found)]
