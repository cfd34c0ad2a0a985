"""The pictures of a run, as figures for a paper: speed-ups, shares of the limit, time against size, threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._demo.errors import UserError, reason, require
from .cases import IN_PLACE, OUT
from .results import OURS, TWIN, Row, best, gain, ratio, rivals, share

# M. Okabe, K. Ito, "Color universal design", 2008: told apart with any color vision; the markers differ as well.
MARKS = {"PyTorch": ("#D55E00", "o"), "torch.compile": ("#CC79A7", "s"), "JAX": ("#009E73", "D"),
         "thinc": ("#E69F00", "^"), "DeepSpeed": ("#56B4E9", "v"), TWIN: ("0.6", "|")}
BLUE, RED, GRAY = "#0072B2", "#D55E00", "0.45"
STYLE: Any = {"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.labelsize": 8,
              "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
              "svg.fonttype": "none", "svg.hashsalt": "fastnorm", "pdf.fonttype": 42,
              "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
LINE = 0.17        # inches of height for a case
WIDTH = 7.2        # inches
GOAL = 0.75        # share of the limit asked for
LARGE = 16_000_000  # bytes of an array from which the share of the limit is of interest
UNITS = ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB"), (1, "B"))


def check(path: Path) -> None:
    """Find out before a long run that the figure could not be drawn."""
    backend = require("matplotlib.backends.backend_agg", "matplotlib", "bench")
    known = sorted(backend.FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise UserError(f"--plot: {path}: expected a file name that ends in one of .{', .'.join(known)}")


def _draw(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        try:
            # No date inside: the same results draw the same file.
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise UserError(f"--plot: {path}: {reason(error)}") from None


def bytes_in_words(n: float) -> str:
    """A size in the unit that suits it.

    Examples
    --------
    >>> bytes_in_words(48 << 10), bytes_in_words(1 << 30), bytes_in_words(0)
    ('48 KB', '1 GB', '0 B')
    """
    unit, word = next(((unit, word) for unit, word in UNITS if n >= unit), UNITS[-1])
    return f"{n / unit:.3g} {word}"


def _cases_axis(axes: Any, rows: Sequence[Row], label: Callable[[Row], str]) -> None:
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for at in range(0, len(rows), 2):  # to follow a line from its name to its marks
        axes.axhspan(at - 0.5, at + 0.5, color="0.96", linewidth=0, zorder=0)


def _name(row: Row) -> str:
    return str(row["case"]["name"])


def _ratios_axis(axes: Any, rows: Sequence[Row], names: Sequence[str], label: Callable[[Row], str]) -> None:
    _cases_axis(axes, rows, label)
    for name in names:
        color, marker = MARKS.get(name, (GRAY, "x"))
        points = [(r, at) for at, row in enumerate(rows) if (r := ratio(row, name))]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", marker=marker, color=color, markersize=4.5,
                      markeredgewidth=1.2 if marker in "|x" else 0.5,
                      markeredgecolor=color if marker in "|x" else "white", label=name, zorder=3)
    axes.set_xscale("log")
    _scale_ratios(axes, *axes.dataLim.intervalx)
    axes.grid(True, axis="x", linewidth=0.4, color="0.85")
    axes.set_axisbelow(True)


def _scale_ratios(axes: Any, low: float, high: float) -> None:
    """Axis from low to high, in which 1 is seen and its left side is marked."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(0.9, low / 1.15), max(1.2, high * 1.15)
    axes.set_xlim(low, high)
    axes.axvspan(low / 100, 1, color=RED, alpha=0.07, linewidth=0, zorder=0)
    axes.axvline(1, color=GRAY, linewidth=0.8, zorder=1)
    axes.set_xlim(low, high)
    steps = [m * 10.0**e for e in range(-2, 5) for m in (1, 2, 5)] if high / low < 200 else [
        10.0**e for e in range(-2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} ×"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    found: dict[str, Any] = {}
    for one in axes:
        found |= {label: handle for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    order = list(MARKS)
    found = dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=max(1, len(found)), frameon=False,
                  handletextpad=0.2, columnspacing=1.6)


def speedups(path: Path, groups: dict[str, Sequence[Row]], label: Callable[[Row], str] = _name) -> None:
    """How many times as fast as each rival: a panel a group, a line a case."""
    groups = {title: rows for title, rows in groups.items() if rows}
    names = [name for name in MARKS if name in rivals([row for rows in groups.values() for row in rows])]
    heights = [len(rows) + 2.5 for rows in groups.values()]

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, rows) in zip(panels, groups.items(), strict=True):
            _ratios_axis(axes, rows, names, label)
            axes.set_title(title, loc="left")
        every = [r for rows in groups.values() for row in rows for name in names if (r := ratio(row, name))]
        if every:
            panels[-1].set_xlim(min(0.9, min(every) / 1.15), max(1.2, max(every) * 1.15))
        panels[-1].set_xlabel("times as fast as the rival (logarithmic); left of 1: slower")
        _legend(figure, panels)

    _draw(path, (WIDTH, LINE * sum(heights) + 0.9), paint)


def shares(path: Path, columns: Sequence[dict[str, Sequence[Row]]], label: Callable[[Row], str] = _name) -> None:
    """The share of the memory limit, a bar a case; and how much of it is lost when the call allocates its outputs.

    One dictionary a column, in it a panel a title.
    """
    columns = [kept for groups in columns if (kept := {title: rows for title, rows in groups.items() if rows})]
    heights = [[len(rows) + 2.5 for rows in groups.values()] for groups in columns]
    tallest = max(map(sum, heights))
    widest = max((share(row) or 0) for groups in columns for rows in groups.values() for row in rows)

    def paint(figure: Any) -> None:
        everything = []
        for part, groups, lines in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, heights,
                                       strict=True):
            blank = [tallest - sum(lines)] if tallest > sum(lines) else []
            panels = part.subplots(len(groups) + len(blank), 1, squeeze=False, height_ratios=lines + blank)[:, 0]
            for axes, (title, rows) in zip(panels, groups.items(), strict=False):
                _shares_axis(axes, rows, label)
                axes.set_xlim(0, max(105.0, 105 * widest))
                axes.set_title(title, loc="left")
                everything.append(axes)
            everything[-1].set_xlabel("share of the memory limit")
            if blank:
                panels[-1].remove()
        _legend(figure, everything)

    _draw(path, ((WIDTH + 1 if len(columns) > 1 else 4.5), LINE * tallest + 0.9), paint)


def _shares_axis(axes: Any, rows: Sequence[Row], label: Callable[[Row], str]) -> None:
    from matplotlib.ticker import PercentFormatter

    _cases_axis(axes, rows, label)
    values = [100 * (share(row) or math.nan) for row in rows]
    axes.barh(range(len(rows)), values, height=0.62, color=BLUE, linewidth=0, label="outputs given, or in place",
              zorder=2)
    fresh = [(100 * s, at) for at, row in enumerate(rows) if (s := share(row, "fresh"))]
    if fresh:
        axes.plot(*zip(*fresh, strict=True), linestyle="none", marker="o", color="white", markeredgecolor="black",
                  markeredgewidth=0.8, markersize=3.5, label="outputs allocated by the call", zorder=3)
    axes.axvline(100 * GOAL, color=RED, linewidth=0.9, linestyle=(0, (4, 2)), label=f"goal: {GOAL:.0%}", zorder=4)
    axes.axvline(100, color=GRAY, linewidth=0.8, zorder=1)
    axes.set_xlim(0, max(105.0, 1.05 * max((v for v in values if v == v), default=0)))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.grid(True, axis="x", linewidth=0.4, color="0.85")
    axes.set_axisbelow(True)


def overview(path: Path, found: dict[str, Any]) -> None:
    """The picture of `bench --plot`: speed-ups on the left, shares of the limit on the right, a line a case."""
    rows = [row for row in found["rows"] if row["section"] == "grid" and row["threads"] == found["threads"]]
    names = [name for name in MARKS if name in rivals(rows)]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
        _shares_axis(right, [], _name)
        _ratios_axis(left, rows, names, _name)
        left.set_xlabel("times as fast as the rival")
        left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.7 / len(rows) + 0.06),
                    ncols=max(1, len(names)), handletextpad=0.1, columnspacing=1.0)
        large = [(at, 100 * s) for at, row in enumerate(rows) if row["case"]["array_bytes"] >= LARGE
                 and (s := share(row))]
        right.barh([at for at, _ in large], [s for _, s in large], height=0.62, color=BLUE, linewidth=0, zorder=2)
        for at in set(range(len(rows))) - {at for at, _ in large}:
            right.text(2, at, "less than 16 MB", va="center", fontsize=6.5, color=GRAY)
        right.set_xlim(0, max(105.0, 1.05 * max((s for _, s in large), default=0)))
        right.set_ylim(left.get_ylim())
        right.set_xlabel("share of the memory limit")
        machine = found["machine"]
        threads = found["threads"]
        figure.suptitle(f"fastnorm on {machine['processor']}, {found['level']}, {threads} "
                        f"thread{'s' if threads > 1 else ''}", fontsize=9)

    _draw(path, (WIDTH + 1.2, LINE * 1.35 * (len(rows) + 2) + 0.9), paint)


# -- time against size, and threads ------------------------------------------------------------------------------------


def sizes(path: Path, series: dict[str, Sequence[Row]], caches: dict[str, int]) -> None:
    """Time per element against the bytes of an array, a panel a kernel; the caches' sizes as vertical lines."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    series = {title: sorted(rows, key=lambda row: row["case"]["array_bytes"]) for title, rows in series.items() if rows}
    columns = 2
    lines = math.ceil(len(series) / columns)
    marks = [1 << e for e in range(10, 31, 4)]

    def curve(axes: Any, rows: Sequence[Row], name: str, label: str, color: str, **style: Any) -> None:
        points = []
        for row in rows:
            modes = [OUT, IN_PLACE] if name == OURS else [None]
            seconds = min((s for mode in modes if (s := best(row, name, mode)) is not None), default=None)
            if seconds is not None:
                points.append((row["case"]["array_bytes"], seconds / row["case"]["elements"] * 1e9))
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, **style)

    def paint(figure: Any) -> None:
        panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
        for axes in panels.flat[len(series):]:
            axes.remove()
        for axes, (title, rows) in zip(panels.flat, series.items(), strict=False):
            for name, size in caches.items():
                axes.axvline(size, color="0.7", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
                axes.text(size, 0.99, f" {name}", transform=axes.get_xaxis_transform(), fontsize=6.5, color=GRAY,
                          va="top")
            curve(axes, rows, "PyTorch", "PyTorch", RED, marker="s", markersize=3, linewidth=1.0)
            curve(axes, rows, OURS, "fastnorm, outputs given", BLUE, marker="o", markersize=3.2, linewidth=1.4)
            limits = [(row["case"]["array_bytes"], reached * seconds / row["case"]["elements"] * 1e9) for row in rows
                      if row["case"]["array_bytes"] >= LARGE and (reached := share(row))
                      and (seconds := best(row, OURS, OUT) or best(row, OURS, IN_PLACE))]
            if limits:
                axes.plot(*zip(*limits, strict=True), color="black", linewidth=1.0, linestyle=(0, (4, 2)),
                          label="memory limit")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(marks))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_in_words(x)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.grid(True, which="major", linewidth=0.4, color="0.88")
            axes.set_title(title, loc="left")
        for axes in panels[:, 0]:
            axes.set_ylabel("ns per element")
        for axes in panels.flat[:len(series)][-columns:]:
            axes.set_xlabel("bytes of one array")
            axes.tick_params(labelbottom=True)
        _legend(figure, list(panels.flat[:len(series)]))

    _draw(path, (WIDTH, 1.9 * lines + 0.5), paint)


def threads(path: Path, rows: Sequence[Row], caches: dict[str, int]) -> None:
    """How much faster all threads are than one, against the bytes of an array, a mark a case."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    families: dict[str, list[tuple[float, float]]] = {}
    count = 1
    for row in rows:
        if times_as_fast := gain(row):
            count = max(count, row["threads"])
            families.setdefault(row["case"]["family"], []).append((row["case"]["array_bytes"], times_as_fast))
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.3", "0.6")

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for at, (family, points) in enumerate(families.items()):
            # Side by side where sizes are equal: an eighth of a factor of two for each family.
            places = [(size * 2 ** ((at - len(families) / 2) / 8), gain) for size, gain in points]
            axes.plot(*zip(*places, strict=True), linestyle="none", marker="osD^vPX*"[at % 8], markersize=4.5,
                      color=colors[at % 8], markeredgecolor="white", markeredgewidth=0.3, label=family)
        for name, size in caches.items():
            axes.axvline(size, color="0.7", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            axes.text(size, 0.99, f" {name}", transform=axes.get_xaxis_transform(), fontsize=6.5, color=GRAY, va="top")
        for level, style in ((1, "-"), (count, "--")):
            axes.axhline(level, color=GRAY, linewidth=0.8, linestyle=style, zorder=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([1 << e for e in range(8, 33, 2)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_in_words(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.05 * max(count + 0.2, *(gain for points in families.values() for _, gain in points)))
        axes.set_xlabel("bytes of one array (optimizers: of all parameters)")
        axes.set_ylabel(f"speed-up of {count} threads over one")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)

    _draw(path, (WIDTH, 3.0), paint)
