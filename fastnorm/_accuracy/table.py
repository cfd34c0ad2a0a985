"""The rows as lines on the screen, as JSON, and as the page `docs/accuracy.md`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from . import bounds
from .measure import PYTORCH, Error, Row

HEAD = """\
# Accuracy

Written by `python -m fastnorm accuracy --markdown docs/accuracy.md`. Figures are largest / mean error over all elements
in ulp, units in the last place of the kernel's own dtype, against the same formula computed from the same inputs in a
longer one (float64 for float32, long double for float64).

The unit is an ulp of the result itself where nothing cancels: softmax, activations, exp. Where the last operations are
sums, it is an ulp of the largest of their terms. It is the same for PyTorch:

- batch norm's y: gamma x̂, beta, and gamma times a standard deviation of x̂, which the statistics' rounding scales with;
  dx: the three terms of its formula, the two means in it counted as means of magnitudes
- dgamma, dbeta: the sum of the magnitudes of all terms
- mean: the larger of the mean and a standard deviation; variance: itself, for constant data the square of an ulp
  of the mean
- log p and losses: themselves, and never less than float64's ulp at 1, for they are logarithms of sums that have the
  term 1 (2**-29 of an ulp at 1 in float32)
- the gradient p - q of cross-entropy: the larger of p and q
- optimizers: the largest term that the value had in any step

Batch norm, Moments and RMSProp's centered form run with nine seeds: the largest error is over all of them; beside
PyTorch's, the median of each seed's largest counts. Where one is larger by less than an ulp or half as much again, that
may be chance, and is for the mean, sums and optimizers. For exp, tanh and ELU it is not: PyTorch's stay below 0.75 ulp,
these below 1.3, for some of their roundings are not made good; on average, they err the same. (With these made good,
sigmoid and tanh took 1.6 times as long where memory is not what they wait for.)

Mean errors are no chance. They are compared at the best instruction set of the machine, as PyTorch's are; the baseline,
without fused operations, rounds once more in some optimizers and in tanh's gradient. Where PyTorch's is smaller, it is
for one of these: it adds up float32 statistics in double, where sums of 64 values are kept in float32 here, which puts
the mean of a channel off by less than a tenth of an ulp of a standard deviation; its batch norm has a fused operation
last, where this one gives the same bits at every instruction set; sigmoid and tanh have exp's roundings, above; or a
single value, or one outlier, decides the row.

A result beyond the dtype's range must be the infinity that the exact one rounds to; anything else counts as infinitely
wrong. exp is the one that the kernels use, of x <= 0: they subtract the largest logit, or |x|, first. `bound` is what
tests hold every instruction set to; `fastnorm/_accuracy/bounds.py` derives it.
"""


def figure(error: Error | None) -> str:
    """Largest and mean error.

    Examples
    --------
    >>> figure(Error(0.51234, 30.0, 120)), figure(Error(182000.0, 4.0, 2)), figure(None)
    ('0.51 / 0.25', '1.8e+05 / 2.00', '-')
    """
    return "-" if error is None else f"{_number(error.largest)} / {_number(error.mean)}"


def _number(value: float) -> str:
    if value == 0 or math.isinf(value):
        return f"{value:.0f}"
    if value < 0.005:
        return "<0.01"
    return f"{value:.2f}" if value < 99.5 else f"{value:.0f}" if value < 9999.5 else f"{value:.1e}"


def _verdict(row: Row) -> str:
    """Why this row needs a reader's eye, or nothing."""
    if not row.within_bound:
        return "beyond its bound"
    return "PyTorch is closer" if row.behind else ""


def line(row: Row) -> str:
    """One row for the screen."""
    figures = "".join(f"  {name} {figure(error):17s}" for name, error in row.errors.items())
    title = f"{row.kernel}: {row.output}"
    return f"{title:52s} {row.dtype:8s} {row.data:37s}{figures}  {_verdict(row)}".rstrip()


def summary(rows: Sequence[Row]) -> list[str]:
    """What all rows come to, in lines."""
    beyond = [row for row in rows if not row.within_bound]
    lines = [f"{len(rows) - len(beyond)} of {len(rows)} rows are within their bounds at every instruction set."]
    compared = [row for row in rows if PYTORCH in row.errors]
    if compared:
        closer = sum(row.worst < row.errors[PYTORCH].largest for row in compared)
        behind = sum(row.behind for row in compared)
        equal = sum(row.worst == row.errors[PYTORCH].largest for row in compared)
        chance = len(compared) - closer - equal - behind
        lines.append(f"Beside PyTorch's, the largest error is smaller in {closer} of {len(compared)} rows, the same in "
                     f"{equal}, larger in {chance + behind}: by less than {bounds.SAME:g} ulp or {bounds.FACTOR:g} "
                     f"times in {chance}, by more in {behind}.")
        gaps = [row.mean_gap for row in compared]
        lines.append(f"The mean error is smaller in {sum(gap < 0 for gap in gaps)} rows, the same (within "
                     f"{100 * bounds.MEAN_SHARE:g} % or {bounds.MEAN_SAME:g} ulp) in {sum(gap == 0 for gap in gaps)}, "
                     f"larger in {sum(gap > 0 for gap in gaps)}, by {max(max(gaps), 0):.2f} ulp at most.")
    return lines


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them; infinite errors are null."""
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return [{"kernel": row.kernel, "output": row.output, "data": row.data, "dtype": row.dtype, "bound": row.bound,
             "errors": {name: {"largest": finite(e.largest), "mean": finite(e.mean)} for name, e in row.errors.items()}}
            for row in rows]


def _kernel_table(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[str]:
    yield f"| data | dtype | result | bound | {' | '.join(columns)} | |"
    yield "|---" * (5 + len(columns)) + "|"
    for row in rows:
        figures = " | ".join(figure(row.errors.get(name)) for name in columns)
        yield f"| {row.data} | {row.dtype} | {row.output} | {row.bound:.4g} | {figures} | {_verdict(row)} |"


def markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The page."""
    columns = list(dict.fromkeys(name for row in rows for name in row.errors))
    lines = [HEAD, *(f"- {title}: {text}" for title, text in facts.items()), "", *summary(rows), ""]
    behind = [row for row in rows if row.behind]
    if behind:
        lines += [f"## Where PyTorch is closer by more than {bounds.SAME:g} ulp and {bounds.FACTOR:g} times", ""]
        lines += [*(f"- {row.kernel}, {row.output}, {row.dtype}, {row.data}" for row in behind), ""]
    larger = sorted((row for row in rows if row.mean_gap > 0), key=lambda row: -row.mean_gap)
    if larger:
        lines += ["## Where PyTorch's mean error is smaller", "", "By so many ulp:", ""]
        lines += [*(f"- {row.mean_gap:.3f}: {row.kernel}, {row.output}, {row.dtype}, {row.data}" for row in larger), ""]
    for kernel, those in groupby(rows, lambda row: row.kernel):
        lines += [f"## {kernel}", "", *_kernel_table(list(those), columns), ""]
    return "\n".join(lines)
