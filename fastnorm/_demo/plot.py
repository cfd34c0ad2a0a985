"""`--plot FILE`: training and test curves of the runs, as a figure for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import check_destination
from .errors import UserError, reason, require
from .train import Run

# M. Okabe, K. Ito, "Color universal design", 2008: told apart with any color vision, and in gray.
COLORS = {"train": "#0072B2", "test": "#D55E00"}
WORDS = {"train": "training", "test": "test"}
ERROR_TICKS = (0, 1, 2, 5, 10, 20, 50, 100)
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8, "axes.spines.top": False,
         "axes.spines.right": False, "axes.linewidth": 0.8, "svg.fonttype": "none", "pdf.fonttype": 42}


def check(path: Path) -> None:
    """Find out before a long training that the figure could not be drawn there."""
    backend = require("matplotlib.backends.backend_agg", "matplotlib")
    known = sorted(backend.FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise UserError(f"--plot: {path}: expected a file name that ends in one of .{', .'.join(known)}")
    check_destination("--plot", path)


def draw(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Loss on the left, error rate on the right; the first run as broad lines, the second as thin dashes upon them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        loss_axes, error_axes = figure.subplots(1, 2)
        for position, run in enumerate(runs):
            for split in COLORS:
                _curve(loss_axes, run, split, run.history[f"{split}_loss"], position)
                errors = [100 * (1 - accuracy) for accuracy in run.history[f"{split}_accuracy"]]
                _curve(error_axes, run, split, errors, position)
        loss_axes.set(ylabel="cross-entropy loss", yscale="log")
        # logarithmic, but linear below 1 %, because an error rate can be 0
        error_axes.set(ylabel="error rate (%)")
        error_axes.set_yscale("symlog", linthresh=1)
        top = max(1.0, error_axes.dataLim.ymax)
        ticks = [tick for tick in ERROR_TICKS if tick <= top * 1.3]
        error_axes.set_yticks(ticks, map(str, ticks))
        error_axes.set_ylim(-0.08, top * 1.15)
        for axes in (loss_axes, error_axes):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(True, which="major", linewidth=0.4, color="0.88")
            axes.set_axisbelow(True)
        error_axes.legend(frameon=False, handlelength=2.6)
        figure.suptitle(title, fontsize=10)
        try:
            figure.savefig(path, dpi=200)
        except OSError as error:
            raise UserError(f"--plot: {path}: {reason(error)}") from None


def _curve(axes: Any, run: Run, split: str, values: Sequence[float], position: int) -> None:
    style: dict[str, Any] = ({"linewidth": 3.5, "alpha": 0.45, "solid_capstyle": "round"} if position == 0
                             else {"linewidth": 1.0, "linestyle": (0, (4, 2))})
    axes.plot(range(1, len(values) + 1), values, color=COLORS[split], label=f"{WORDS[split]}, {run.name}",
              marker="o" if len(values) == 1 else None, markersize=4, **style)
