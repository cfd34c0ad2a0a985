"""Turn the results of a full run into docs/speed.md and its pictures.

After `python -m fastnorm bench --full --json results.json`: `python bench/report.py results.json [--output docs]`. With
`--brief NAME` it writes NAME.md instead, without pictures, of any run: the same on another machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastnorm._bench import figures, plot, results, table
from fastnorm._bench.cases import FRESH, IN_PLACE, OUT
from fastnorm._bench.measure import geometric_mean
from fastnorm._bench.results import OURS, Row, best, ratio, rivals, share

FAMILIES = {"batch norm": "Batch norm", "softmax": "Softmax", "cross-entropy": "Cross-entropy", "momentum": "Momentum",
            "RMSProp": "RMSProp", "Adam": "Adam", "Adagrad": "Adagrad", "activations": "Activations, dropout"}
LAYOUTS = {"NCHW": "channels first", "NHWC": "channels last", "MC": "matrices (M, C)"}
OPTIMIZERS = ("Momentum", "RMSProp", "Adam", "Adagrad")

REASONS = Path(__file__).with_name("reasons.md")

METHOD = """\
All rivals of a case run in one process and take turns of a few milliseconds. A turn begins with a pause of 10 ms, in
which the threads of the last one stop spinning; then a call runs untimed for 15 ms, so that caches and threads are as
in a loop of nothing else; then calls are timed for 5 ms, at least one. A time is the 20 % quantile of many. A ratio is
the median of the ratios within each round of turns, for the speed of the bus is another a second later. Ratios compare
like with like: both sides allocate their outputs in the call, or both are given them, or both work in place. A rival
with several ways to do a thing counts with its fastest.

The memory limit is measured around and between the calls of each case, by compiled loops over 128 MB arrays that read,
copy with streaming stores, and update in place. A case's limit is the time in which those loops would move the bytes
that the algorithm has to move: each input read once, each output written once. The share of the limit is that time over
ours, with outputs given: the median over our turns, each beside the limit that was measured before and after it."""

RIVALS = {
    "PyTorch": "eager, raw operators without autograd (cross-entropy: the faster of its four raw operators and "
               "of autograd), fused optimizers (RMSprop has no fused form: the faster of foreach and the loop); with "
               "given outputs where an `out` form exists; NHWC as channels-last tensors",
    "torch.compile": "the same operators, compiled for each shape; lists of more than two arrays are left out, for "
                     "they compile for minutes",
    "JAX": "`jax.jit`; batch statistics in one pass (E[x²] − E[x]²: faster and less exact than the others'); "
           "optimizers donate their state",
    "thinc": "`NumpyOps.adam`, one thread, float32; it destroys the gradient, which is put back "
             "outside the measurement",
    "DeepSpeed": "`DeepSpeedCPUAdam.step()`, its operator built on this machine",
    "twin": "`fastnorm.reference`: NumPy, float64 inside; a yardstick of correctness, not the best that NumPy can do",
}


# -- groups ------------------------------------------------------------------------------------------------------------


def short(row: Row) -> str:
    """The case's name under a title that says its family, and its layout."""
    case = row["case"]
    if case["family"] == "batch norm":
        fused = case["title"].split()[1].removeprefix("norm")
        return f"({','.join(map(str, case['shape']))}) {case['what']}{fused.replace('+', ' + ')}"
    name = str(case["name"])
    for start in ("cross-entropy + gradient ", "softmax ", "momentum ", "RMSProp ", "Adam ", "Adagrad "):
        name = name.removeprefix(start)
    return name


def named(row: Row) -> str:
    """The same in the picture of the limit, whose titles cover several families."""
    case = row["case"]
    if case["family"] == "batch norm":
        return short(row).replace("both + residual + ReLU", "both, fused")
    return str(case["title"] if case["family"] == "activations" else case["name"]).replace(" + gradient", "")


def by_family(rows: Iterable[Row]) -> dict[str, list[Row]]:
    rows = list(rows)
    return {title: found for family, title in FAMILIES.items()
            if (found := [row for row in rows if row["case"]["family"] == family])}


def batch_norm_panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    order = {"forward": 0, "backward": 1, "both": 2, "inference": 3}

    def key(row: Row) -> Any:
        case = row["case"]
        return case["array_bytes"], case["shape"], order[case["what"]], bool(case["activation"]), case["residual"]

    return {f"Batch norm, {words}": sorted((row for row in rows if row["case"]["layout"] == layout), key=key)
            for layout, words in LAYOUTS.items()}


def large(row: Row) -> bool:
    return bool(row["case"]["array_bytes"] >= figures.LARGE)


# -- parts of the page -------------------------------------------------------------------------------------------------


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def pictures(found: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw everything that there are results for; return captions by file name."""
    rows = figures.main_grid(found)
    families = by_family(rows)
    norm = families.pop("Batch norm", [])
    caches = found["machine"]["caches"]
    captions: dict[str, str] = {}

    def drawn(name: str, caption: str) -> Path:
        captions[f"speed-{name}.svg"] = caption
        return folder / f"speed-{name}.svg"

    panels = batch_norm_panels(norm)
    for (title, group), layout in zip(panels.items(), LAYOUTS, strict=True):
        if group:
            plot.speedups(drawn(f"batch-norm-{layout.lower()}", f"How many times as fast as each rival: {title}"),
                          {title: group}, short)
    elementwise = families.pop(FAMILIES["activations"], [])
    for name, groups in (("losses-optimizers", families), ("activations", {FAMILIES["activations"]: elementwise})):
        if any(groups.values()):
            plot.speedups(drawn(name, "How many times as fast as each rival: "
                                + ", ".join(groups).lower().replace("rmsprop", "RMSProp").replace("ada", "Ada")),
                          groups, short)
    # Forward, backward, and everything fused; the others lie between.
    shown = [{title: [row for row in group if large(row) and (
                          row["case"]["residual"] or (row["case"]["what"] in ("forward", "backward")
                                                      and not row["case"]["activation"]))]
              for title, group in panels.items()},
             {"Softmax, cross-entropy": [row for title in ("Softmax", "Cross-entropy")
                                            for row in families.get(title, []) if large(row)],
              "Optimizers": [row for title in OPTIMIZERS for row in families.get(title, []) if large(row)],
              FAMILIES["activations"]: [row for row in elementwise if large(row)]}]
    if any(any(groups.values()) for groups in shown):
        plot.shares(drawn("limit", "Share of the memory limit, float32, arrays of 16 MB and more (fused: with residual "
                                   "and ReLU)"), shown, named)
    series: dict[str, list[Row]] = {}
    for row in found["rows"]:
        if row["section"] == "sweep":
            layout = row["case"].get("layout")
            title = row["case"]["title"] + (f", {layout}" if layout else "")
            series.setdefault((title[0].upper() + title[1:]).replace(", MC", ", (M, C)"), []).append(row)
    if series:
        plot.sizes(drawn("sizes", "Time per element from 1 KB to 1 GB an array; dotted: the sizes of the caches"),
                   series, caches)
    if found["threads"] > 1 and any(t["rival"] == OURS and t["threads"] == 1 for row in rows for t in row["times"]):
        plot.threads(drawn("threads", f"{found['threads']} threads over one, a mark a case"), rows, caches)
    return captions


def machine_facts(found: Mapping[str, Any]) -> str:
    machine, config, rows = found["machine"], found["machine"]["config"], figures.main_grid(found)
    caches = ", ".join(f"{name} {plot.bytes_in_words(size)}" for name, size in machine["caches"].items())
    bus = []
    for loop in ("read", "copy", "update"):
        if rates := [row["limit"][loop] / 1e9 for row in rows]:
            bus.append(f"{loop} {min(rates):.0f} to {max(rates):.0f}")
    virtual = " (of a virtual machine, which shares its bus with neighbours)" if machine["virtual"] else ""
    facts = [("processor", f"{machine['processor']}, {machine['cores']} cores{virtual}"),
             ("caches, as one core sees them", caches or "not told"),
             ("memory", plot.bytes_in_words(machine["memory"]) if machine["memory"] else "not told"),
             ("bus while this ran, GB/s", "; ".join(bus)),
             ("instruction set", f"{found['level']} (available: {config['available']})"),
             ("threads", str(found["threads"])), ("system", machine["system"]), ("compiler", config["compiler"]),
             ("flags", f"`{config['flags']}`"),
             ("fastnorm, NumPy, Python", f"{config['fastnorm']}, {config['NumPy']}, {config['Python']}"),
             ("rivals", ", ".join(f"{name} {version}" for name, version in found["rivals"].items()) or "none"),
             *((f"without {name}", why) for name, why in found["absent"].items()),
             ("date", time.strftime("%Y-%m-%d", time.gmtime(found["started"])))]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts)])


def figure_table(found: Mapping[str, Any]) -> str:
    marks = {True: "reached", False: "**missed**", None: "–"}
    return "\n".join(["| | figure | goal | measured | | decided by |", "|---|---|---|---|---|---|", *(
        f"| {f.number} | {f.text} | {f.goal} | {f.shown} | {marks[f.reached]} | {f.where} |"
        for f in figures.figures(found))])


def mean_and_least(values: Sequence[float]) -> str:
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "–"


def means_table(rows: Sequence[Row]) -> str:
    names = rivals(rows)
    groups = [*by_family(rows).items(), ("**all**", rows)]
    return markdown_table(["", *names], (
        [title, *(mean_and_least([r for row in group if (r := ratio(row, name)) is not None]) for name in names)]
        for title, group in groups))


def level_table(found: Mapping[str, Any]) -> str:
    """Geometric means over PyTorch at each instruction-set level, measured in the same run."""
    rows = figures.main_grid(found)
    levels = [level.strip() for level in found["machine"]["config"]["available"].split(",")][::-1]
    return markdown_table(["", *levels], (
        [title, *(mean_and_least([r for row in group if (r := ratio(row, "PyTorch", level=level)) is not None])
                  for level in levels)] for title, group in by_family(rows).items()))


def case_table(rows: Sequence[Row]) -> str:
    names = rivals(rows)

    def line(row: Row) -> list[str]:
        own = best(row, OURS, FRESH) or best(row, OURS, IN_PLACE)
        cold = best(row, OURS, FRESH, "cold") or best(row, OURS, IN_PLACE, "cold")
        return [short(row), *map(table.milliseconds, (own, best(row, OURS, OUT), cold)), table.percent(share(row)),
                *(table.milliseconds(best(row, name, FRESH) or best(row, name, IN_PLACE)) for name in names),
                *(table.digits(ratio(row, name)) for name in names)]

    return markdown_table(["", "ms", "out=", "cold", "limit", *(f"{name}, ms" for name in names),
                           *(f"× {name}" for name in names)], map(line, rows))


def losses_paragraph(rows: Sequence[Row]) -> str:
    lost = figures.losses(rows)
    if not lost:
        return "No case is slower than any rival, within 3 %.\n"
    return "Slower than a rival by more than 3 %:\n\n" + markdown_table(
        ["case", "rival", "outputs", "ratio"], ([name, rival, mode, f"{r:.2f}"] for r, name, rival, mode in lost)
    ) + "\n"


def cold_paragraph(rows: Sequence[Row]) -> str:
    """How the calls compare when nothing is warm."""
    values = [r for row in rows if (r := ratio(row, "PyTorch", key="cold")) is not None]
    if not values:
        return ""
    return (f"Cold (caches evicted, threads asleep for 50 ms), fastnorm is {geometric_mean(values):.2f} × as fast as "
            f"PyTorch, geometric mean over {len(values)} cases; {min(values):.2f} × at least.\n")


def variants_paragraph(rows: Sequence[Row]) -> str:
    """Which of PyTorch's ways to get cross-entropy and its gradient was the faster one, case by case."""
    words = []
    for row in rows:
        ways = [t for t in row["times"] if t["rival"] == "PyTorch" and t["mode"] == FRESH and t["variant"]]
        if len(ways) > 1:
            words.append(f"{short(row)}: {min(ways, key=lambda t: t['low'])['variant']}")
    return f"PyTorch's faster way to cross-entropy and its gradient: {'; '.join(words)}.\n" if words else ""


def report(found: Mapping[str, Any], folder: Path) -> str:
    """The page; its pictures are drawn into the folder."""
    rows = figures.main_grid(found)
    captions = pictures(found, folder)
    grid = [row for row in found["rows"] if row["section"] == "grid"]
    doubles = [row for row in grid if row["case"]["dtype"] == "float64"]
    alone = [row for row in grid if row["threads"] == 1 < found["threads"]]
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    parts = ["# Speed", "", "Written by `bench/report.py` from what `python -m fastnorm bench --full --json FILE` "
             "measured. `python -m fastnorm bench --plot FILE` draws a small one on your machine in under two minutes.",
             "",
             machine_facts(found), "", "## How it is measured", "", METHOD, "",
             *(f"- **{name}**: {RIVALS[name]}." for name in rivals(found["rows"]) if name in RIVALS), "",
             "## The figures", "", figure_table(found), "", losses_paragraph(rows), cold_paragraph(rows),
             "## What is missed, and why", "", REASONS.read_text(encoding="utf-8"),
             "## Pictures", "", *(f"![{caption}]({name})\n\n*{caption}.*\n" for name, caption in captions.items()),
             "## Geometric means", "",
             f"Times as fast as each rival, and in brackets the least: float32, {threads}.", "",
             means_table(rows), "", variants_paragraph(rows),
             "At each instruction-set level, over PyTorch (which chooses its own):", "", level_table(found), ""]
    for title, group in ((f"float64, {threads}", doubles), ("float32, one thread", alone)):
        if group:
            parts += [f"{title}:", "", means_table(group), ""]
    parts += ["## Every case", "", f"Milliseconds, float32, {threads}. `cold`: caches evicted and threads asleep; "
              "`limit`: share of the memory limit, which arrays in the caches can exceed.", ""]
    for title, group in by_family(rows).items():
        parts += [f"### {title}", "", case_table(group), ""]
    return "\n".join(parts)


def brief(found: Mapping[str, Any]) -> str:
    """The page of another machine: ratios and cases alone."""
    rows = figures.main_grid(found)
    parts = [f"# Speed on {found['machine']['processor']}", "",
             "Written by `bench/report.py --brief`. How it is measured, and every case elsewhere: [](speed.md).",
             "", machine_facts(found), "", f"{len(rows)} cases, float32.", "", losses_paragraph(rows),
             cold_paragraph(rows),
             "Times as fast as each rival, geometric means, and in brackets the least:", "", means_table(rows), ""]
    for title, group in by_family(rows).items():
        parts += [f"## {title}", "", case_table(group), ""]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs", metavar="FOLDER")
    parser.add_argument("--brief", metavar="NAME", help="write NAME.md: cases and ratios alone, of any run")
    args = parser.parse_args(argv)
    try:
        found = results.read(args.results)
    except OSError as error:
        print(f"report: {args.results}: {error.strerror}", file=sys.stderr)
        return 2
    except results.DamagedError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    if args.brief:
        page = args.output / f"{args.brief}.md"
        page.write_text(brief(found), encoding="utf-8")
        print(f"wrote {page}")
        return 0
    (args.output / "speed.md").write_text(report(found, args.output), encoding="utf-8")
    missed = sum(figure.reached is False for figure in figures.figures(found))
    print(f"wrote {args.output / 'speed.md'}; figures missed: {missed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
