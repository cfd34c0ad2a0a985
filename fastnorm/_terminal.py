"""Lines, progress bars and tables of the command line: redrawn on a terminal, plain elsewhere.

Rich is imported where it draws: fastnorm itself does not need it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self


def on_terminal() -> bool:
    """Whether stdout can redraw a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(line: str) -> None:
    """Print a plain line at once, also into a pipe."""
    print(line, flush=True)


TITLE_WIDTH = len("reference")
BAR_WIDTH = 6  # at least


class Bar:
    """A progress bar where stdout is a terminal, nothing elsewhere; a context manager, so that Ctrl-C leaves the
    terminal as it was.
    """

    def __init__(self, title: str, total: float, completed: float = 0, status: str = "") -> None:
        self._bar: Any = None
        if on_terminal():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"), TimeElapsedColumn(), expand=True)
            self._task = self._bar.add_task(f"{title:{TITLE_WIDTH}s}", total=total, completed=completed, status=status)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, completed: float, status: Sequence[str], line: str | None) -> None:
        """Move the bar, beside it as much of the status as a narrow window has room for, its first part at least; where
        there is no bar, print the line.
        """
        if self._bar is not None:
            room = self._bar.console.width - BAR_WIDTH - TITLE_WIDTH - len("0:00:00") - 3  # gaps of one
            parts = list(status)
            while len(parts) > 1 and len("  ".join(parts)) > room:
                del parts[1]
            self._bar.update(self._task, completed=completed, status="  ".join(parts))
        elif line is not None:
            say(line)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    say(f"\n{title}")
    # Wide enough for every table: a narrow terminal wraps lines, where Rich would cut numbers.
    if on_terminal():
        Console(width=1000).print(table)
        return
    console = Console(width=1000, no_color=True, force_terminal=False)  # in a pipe, nothing trails either
    with console.capture() as capture:
        console.print(table)
    say("\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()))
