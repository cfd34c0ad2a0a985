"""`python -m fastnorm train`, from start to finish."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import fastnorm
from fastnorm import reference

from .. import _runtime
from . import checkpoint, display, plot
from . import search as searching
from .data import Data, load_digits, load_idx
from .errors import UserError, reason, require
from .settings import RULES, Settings, complete, resume
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
    if job.search is not None:
        for option in ("save", "load", "plot"):
            if getattr(job, option) is not None:
                raise UserError(f"--search: cannot be combined with --{option}")
    if job.save is not None:
        checkpoint.check_destination("--save", job.save)
    if job.plot is not None:
        plot.check(job.plot)
    state = None if job.load is None else checkpoint.load(job.load)
    settings = complete(job.given) if state is None else _resumed_settings(job, state)
    data = load_digits() if job.data is None else load_idx(job.data)
    if job.threads is not None:
        fastnorm.set_num_threads(job.threads)
    names = list(BACKENDS) if job.backend == "both" else [job.backend]
    # The bits of a BLAS product may depend on the number of its threads; matrices this small gain nothing by more.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        if job.search is not None:
            _search(job, settings, data, names[0])
        else:
            _train(job, settings, data, names, state)


def _resumed_settings(job: Job, state: dict[str, Any]) -> Settings:
    try:
        saved = Settings(**state["settings"])
        if saved.optimizer not in RULES:
            raise ValueError(f"unknown optimizer {saved.optimizer!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--load: {job.load}: not a fastnorm checkpoint, or a damaged one ({reason(error)})") from None
    return resume(saved, job.given, str(job.load))


def _start(name: str, settings: Settings, data: Data, job: Job, state: dict[str, Any] | None) -> Run:
    run = Run(name, BACKENDS[name], data, settings)
    if state is not None:
        run.restore(state, str(job.load))
    return run


def _train(job: Job, settings: Settings, data: Data, names: list[str], state: dict[str, Any] | None) -> None:
    runs = [_start(name, settings, data, job, state) for name in names]
    display.introduce(data, runs[0], _runtime.config())
    saved = 0
    for run in runs:
        with display.Progress(run) as progress:
            for event in run.train():
                if isinstance(event, Epoch) and job.save is not None and run is runs[0]:
                    # after every epoch: an interrupted run loses no more than one
                    checkpoint.save(job.save, run.state())
                    saved = event.epoch
                progress.show(event)
    display.result(runs, [(loss, accuracy) for loss, accuracy in (run.evaluate() for run in runs)])
    if job.save is not None:
        if not saved:
            checkpoint.save(job.save, runs[0].state())
        display.say(f"saved {job.save}: {runs[0].name} after epoch {runs[0].epochs_done}")
    if job.plot is not None:
        plot.draw(job.plot, f"{data.name}, {display.describe(settings)}", runs)
        display.say(f"drew  {job.plot}")


def _search(job: Job, settings: Settings, data: Data, name: str) -> None:
    assert job.search is not None
    trials = []
    with display.SearchProgress(job.search + searching.finer_trials(job.search)) as progress:
        for trial in searching.search(job.search, settings, data, name, BACKENDS[name]):
            trials.append(trial)
            progress.show(trial)
    display.ranking(trials)
    best = min(trials, key=lambda trial: trial.rank).settings
    words = ["python", "-m", "fastnorm", "train", "--optimizer", best.optimizer, "--lr", f"{best.lr:g}"]
    words += ["--beta", f"{best.beta:g}"] if best.beta is not None else []
    words += [word for option, value in job.given.items() if value is not None and option not in ("lr", "beta", "optimizer")
              for word in ([f"--{option}"] if value is True else [f"--{option.replace('_', '-')}", str(value)])]
    words += ["--data", str(job.data)] if job.data is not None else []
    display.say(f"Train with the best: {shlex.join(words)}")
