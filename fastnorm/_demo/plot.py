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
PLAIN: dict[str, Any] = {"linewidth": 1.6}
BROAD: dict[str, Any] = {"linewidth": 3.5, "alpha": 0.45, "solid_capstyle": "round"}  # seen where the dashes cover it
DASHED: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 2))}
LINEAR_UP_TO = 5.0  # a larger ratio of the values on an axis gets a logarithmic scale
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
    from matplotlib.ticker import LogLocator, NullLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        loss_axes, error_axes = figure.subplots(1, 2)
        styles = [BROAD, DASHED] if len(runs) > 1 else [PLAIN]
        for run, style in zip(runs, styles, strict=True):
            for split in COLORS:
                _curve(loss_axes, run, split, run.history[f"{split}_loss"], style)
                errors = [100 * (1 - accuracy) for accuracy in run.history[f"{split}_accuracy"]]
                _curve(error_axes, run, split, errors, style)
        loss_axes.set_ylabel("cross-entropy loss")
        error_axes.set_ylabel("error rate (%)")
        low, high = loss_axes.dataLim.intervaly
        if low > 0 and high > LINEAR_UP_TO * low:
            loss_axes.set_yscale("log")
            subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
            loss_axes.yaxis.set_major_locator(LogLocator(subs=subs))
            loss_axes.yaxis.set_major_formatter("{x:g}")
            loss_axes.yaxis.set_minor_locator(NullLocator())
        low, high = error_axes.dataLim.intervaly
        if high > max(1, LINEAR_UP_TO * low):
            # logarithmic, but linear below 1 %, because an error rate can be 0
            error_axes.set_yscale("symlog", linthresh=1)
            ticks = [tick for tick in ERROR_TICKS if tick <= high * 1.3]
            error_axes.set_yticks(ticks, map(str, ticks))
            error_axes.set_ylim(-0.08, high * 1.15)
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


def _curve(axes: Any, run: Run, split: str, values: Sequence[float], style: dict[str, Any]) -> None:
    axes.plot(range(1, len(values) + 1), values, color=COLORS[split], label=f"{WORDS[split]}, {run.name}",
              marker="o" if len(values) == 1 else None, markersize=4, **style)
