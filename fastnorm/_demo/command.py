"""`python -m fastnorm train`, from start to finish."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import fastnorm
from fastnorm import reference

from .. import _runtime
from .._terminal import say
from . import checkpoint, display, plot
from . import search as searching
from .data import Data, load_digits, load_idx
from .errors import UserError, reason, require
from .settings import SEARCH_EPOCHS, Settings, complete, restore, resume
from .train import Epoch, Run

BACKENDS: dict[str, ModuleType] = {"fastnorm": fastnorm, "reference": reference}


@dataclass(frozen=True)
class Job:
    """What the command line asks for; `given` holds the settings that were given, by name."""

    given: dict[str, Any]
    data: Path | None = None
    threads: int | None = None
    save: Path | None = None
    load: Path | None = None
    search: int | None = None
    plot: Path | None = None
    backend: str = "both"


def train(job: Job) -> None:
    """Check everything that can be checked first, then train, then show."""
    threadpoolctl = require("threadpoolctl", "threadpoolctl")
    require("rich", "rich")
    if job.save is not None:
        checkpoint.check_destination("--save", job.save)
    if job.plot is not None:
        plot.check(job.plot)
    if job.threads is not None:
        fastnorm.set_num_threads(job.threads)
    # The bits of a BLAS product may depend on the number of its threads; matrices this small gain nothing by more.
    # A learning rate far too large overflows; the loss that is then not finite is reported, once.
    with threadpoolctl.threadpool_limits(1, user_api="blas"), np.errstate(over="ignore", invalid="ignore"):
        if job.search is not None:
            _search(job, job.search)
        else:
            _train(job)


def _load_data(job: Job) -> Data:
    return load_digits() if job.data is None else load_idx(job.data)


def _names(job: Job) -> list[str]:
    return list(BACKENDS) if job.backend == "both" else [job.backend]


def _resumed_settings(job: Job, state: dict[str, Any]) -> Settings:
    try:
        saved = restore(state["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--load: {job.load}: not a fastnorm checkpoint, or a damaged one ({reason(error)})") from None
    return resume(saved, job.given, str(job.load))


def _train(job: Job) -> None:
    state = None if job.load is None else checkpoint.load(job.load)
    settings = complete(job.given) if state is None else _resumed_settings(job, state)
    data = _load_data(job)
    runs = [Run(name, BACKENDS[name], data, settings) for name in _names(job)]
    for run in runs:
        if state is not None:
            run.restore(state, str(job.load))
    display.introduce(data, runs[0], _runtime.config())
    try:
        for run in runs:
            with display.TrainingProgress(run) as progress:
                for event in run.train():
                    if isinstance(event, Epoch) and job.save is not None and run is runs[0]:
                        # after every epoch: an interrupted run loses no more than one
                        checkpoint.save(job.save, run.state())
                    progress.show(event)
    except KeyboardInterrupt:
        kept = f"; {job.save} holds it" if job.save is not None and runs[0].seconds else ""
        raise KeyboardInterrupt(f"{run.name}, after epoch {run.epochs_done}{kept}") from None
    display.result(runs, [run.evaluate() for run in runs])
    if job.save is not None:
        if not runs[0].seconds:  # the checkpoint loaded had all its epochs already
            checkpoint.save(job.save, runs[0].state())
        say(f"saved {job.save} ({runs[0].name}, after epoch {runs[0].epochs_done})")
    if job.plot is not None:
        plot.draw(job.plot, f"{data.name}, {display.describe(settings)}", runs)
        say(f"drew {job.plot}")


def _search(job: Job, n: int) -> None:
    asked = {"save": job.save, "load": job.load, "plot": job.plot, "lr": job.given.get("lr"),
             "beta": job.given.get("beta")}
    for option in (option for option, value in asked.items() if value is not None):
        raise UserError(f"--search: cannot be combined with --{option}")
    settings = complete({"epochs": SEARCH_EPOCHS} | job.given)
    data, name = _load_data(job), _names(job)[0]
    trials = []
    with display.SearchProgress(n + searching.finer_trials(n)) as progress:
        for trial in searching.search(n, settings, data, name, BACKENDS[name]):
            trials.append(trial)
            progress.show(trial)
    display.ranking(trials)
    say(f"Train with the best: {_command_line(job, min(trials, key=lambda trial: trial.rank).settings)}")


def _command_line(job: Job, best: Settings) -> str:
    """What the user types to train with the settings found, keeping the other options of the search."""
    beta = None if best.beta is None else f"{best.beta:g}"
    options = {"data": job.data, **job.given, "lr": f"{best.lr:g}", "beta": beta}
    options.pop("epochs", None)  # those of the search are few
    words = ["python", "-m", "fastnorm", "train"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
