"""The table on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from .._terminal import print_table, say
from .cases import FRESH, IN_PLACE, OUT
from .measure import geometric_mean
from .results import OURS, Row, best, ratio, rivals, share


def digits(value: float | None, unit: str = "") -> str:
    """Three significant digits at least, or a dash.

    Examples
    --------
    >>> digits(0.012345), digits(1.5, " x"), digits(123.4), digits(None)
    ('0.0123', '1.50 x', '123', '-')
    """
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}{unit}"
    return (f"{value:#.3g}" if value >= 1e-3 else f"{value:.1g}") + unit


def milliseconds(seconds: float | None) -> str:
    """A time for a table in ms."""
    return digits(None if seconds is None else seconds * 1e3)


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{value:.0%}"


def one_line(row: Row) -> str:
    """What a pipe gets when a case is done."""
    mine = best(row, OURS, FRESH) or best(row, OURS, IN_PLACE)
    others = "".join(f"  {digits(r)} x {name}" for name in rivals([row]) if (r := ratio(row, name)))
    return f"{row['case']['name']:58s} {milliseconds(mine):>7s} ms  {percent(share(row)):>4s} of the limit{others}"


def show(rows: Sequence[Row]) -> None:
    """The table, and the geometric means below it."""
    names = rivals(rows)
    columns = ["", "ms", "out=", "limit", "cold", *(f"x {name}" for name in names)]
    lines = []
    for row in rows:
        in_place = best(row, OURS, IN_PLACE)
        lines.append([row["case"]["name"], milliseconds(best(row, OURS, FRESH) or in_place),
                      milliseconds(best(row, OURS, OUT)), percent(share(row)),
                      milliseconds(best(row, OURS, FRESH, "cold") or best(row, OURS, IN_PLACE, "cold")),
                      *(digits(ratio(row, name)) for name in names)])
    means = [[r for row in rows if (r := ratio(row, name))] for name in names]
    lines.append(["geometric mean", "", "", "", "", *(digits(geometric_mean(m)) if m else "-" for m in means)])
    lines.append(["least", "", "", "", "", *(digits(min(m)) if m else "-" for m in means)])
    print_table("Times in ms, warm, 20 % quantile; how many times as fast as each rival", columns, lines)
    say("ms: outputs allocated by the call, as the rivals do (optimizers: in place); out=: outputs given.\n"
        "limit: share of the memory limit reached, outputs given. cold: caches evicted, threads asleep.\n"
        "twin: NumPy in float64.")
