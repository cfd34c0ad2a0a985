"""`python -m fastnorm accuracy`, from start to finish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .. import _runtime
from .._bench.rivals import AbsentError
from .._demo.checkpoint import check_destination
from .._demo.errors import UserError
from .._terminal import say
from . import cases, table
from .measure import HAS_LONG_DOUBLE, PYTORCH, Row, measure
from .pytorch import PyTorch

FAILED = 1  # exit status: a row is beyond its bound


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    only: str | None = None
    quick: bool = False
    exhaustive: bool = False
    json: Path | None = None
    markdown: Path | None = None


def _chosen(job: Job) -> list[cases.Case]:
    words = (job.only or "").lower().split()
    chosen = [case for case in cases.every(job.quick, job.exhaustive) if all(w in case.name.lower() for w in words)]
    if not chosen:
        raise UserError(f"--only: no case matches {job.only!r}")
    return chosen


def load_pytorch() -> tuple[PyTorch | None, str]:
    """PyTorch and its version, or why there is none."""
    try:
        pytorch = PyTorch()
    except AbsentError as reason:
        return None, f"left out: {reason}"
    return pytorch, pytorch.version


def accuracy(job: Job) -> None:
    """Check everything that can be checked first, then measure row by row, then write."""
    for option, path in (("--json", job.json), ("--markdown", job.markdown)):
        if path is not None:
            check_destination(option, path)
    chosen = _chosen(job)
    pytorch, version = load_pytorch()
    levels = _runtime.available_levels()
    facts = {"arrays": "small, as of --quick" if job.quick else "of full size",
             "instruction sets": ", ".join(levels), PYTORCH: version, "compiler": _runtime.config()["compiler"]}
    if not HAS_LONG_DOUBLE:
        facts["float64"] = "left out: long double is no longer than double here"
        chosen = [case for case in chosen if case.dtype == cases.FLOAT32]
    for title, text in facts.items():
        say(f"{title:17s} {text}")
    rows: list[Row] = []
    for case in chosen:
        for row in measure(case, levels, pytorch):
            rows.append(row)
            say(table.line(row))
    for text in table.summary(rows):
        say(text)
    if job.json is not None:
        found = {"facts": facts, "rows": table.as_json(rows)}
        job.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {job.json}")
    if job.markdown is not None:
        job.markdown.write_text(table.markdown(rows, facts), encoding="utf-8")
        say(f"wrote {job.markdown}")
    if not all(row.within_bound for row in rows):
        raise SystemExit(FAILED)
