"""What the user sees of a training: its progress, and the tables at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .._terminal import Bar, print_table, say
from .data import Data
from .search import Trial
from .settings import RULES, Settings
from .train import Epoch, Run, Step


class TrainingProgress(Bar):
    """Shows the events of one run."""

    def __init__(self, run: Run) -> None:
        self._name, self._steps, self._epochs = run.name, run.steps_per_epoch, run.settings.epochs
        self._test: list[str] = []
        super().__init__(run.name, max(self._epochs, run.epochs_done) * self._steps, run.epochs_done * self._steps,
                         self._position(run.epochs_done))

    def _position(self, epoch: int) -> str:
        return f"{epoch:{len(str(self._epochs))}d}/{self._epochs}"

    def show(self, event: Step | Epoch) -> None:
        """Take one event of the run."""
        position, line = self._position(event.epoch), None
        if isinstance(event, Epoch):
            self._test = [f"test {event.test_accuracy:6.1%}"]
            line = (f"{self._name:9s}  epoch {position}  loss {event.train_loss:.4f}  "
                    f"accuracy {event.train_accuracy:6.1%}  test loss {event.test_loss:.4f}  "
                    f"test accuracy {event.test_accuracy:6.1%}  {duration(event.seconds)}")
            loss, accuracy, step = event.train_loss, event.train_accuracy, self._steps
        else:
            loss, accuracy, step = event.loss, event.accuracy, event.step
        self.update((event.epoch - 1) * self._steps + step,
                    [position, f"loss {loss:.4f}", f"accuracy {accuracy:6.1%}", *self._test], line)


class SearchProgress(Bar):
    """Shows the trials of a search as they end."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._best = total, 0, 0.0
        super().__init__("search", total)

    def show(self, trial: Trial) -> None:
        """Take one trial."""
        self._done += 1
        self._best = max(self._best, trial.accuracy)
        position = f"{self._done:{len(str(self._total))}d}/{self._total}"
        self.update(self._done, [position, f"best validation accuracy {self._best:.1%}"],
                    f"search  {position}  {describe(trial.settings)}  validation accuracy {trial.accuracy:6.1%}")


def duration(seconds: float) -> str:
    """A time in the unit that suits it, with three digits.

    Examples
    --------
    >>> duration(0.01234), duration(2.5)
    ('12.3 ms', '2.50 s')
    """
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(value))))}f} {unit}" if value > 0 else "0 ms"


def largest(values: Sequence[float]) -> tuple[float, int]:
    """The largest of the values, one an epoch, and the epoch (from 1) it first occurs in.

    Examples
    --------
    >>> largest([0.5, 2.0, 2.0])
    (2.0, 2)
    """
    at = max(range(len(values)), key=values.__getitem__)
    return values[at], at + 1


def differences(actual: Sequence[float], expected: Sequence[float]) -> tuple[list[float], list[float]]:
    """Absolute and relative differences of two curves, epoch by epoch.

    Examples
    --------
    >>> differences([1.0, 0.5], [1.5, 0.25])
    ([0.5, 0.25], [0.3333333333333333, 1.0])
    """
    absolute = [abs(a - b) for a, b in zip(actual, expected, strict=True)]
    return absolute, [d / abs(b) if b else (math.inf if d else 0.0) for d, b in zip(absolute, expected, strict=True)]


def introduce(data: Data, run: Run, config: dict[str, str]) -> None:
    """Say what is about to be trained, on what."""
    height, width = data.image_shape
    settings = run.settings
    parameters = sum(p.size for p in run.network.params)
    say(f"data      {data.name}: {len(data.train):,} training and {len(data.test):,} test images of "
        f"{height} x {width}, {data.classes} classes{', random shifts' if settings.augment else ''}")
    dropout = f", dropout {settings.dropout:g}" if settings.dropout else ""
    say(f"network   {' - '.join(map(str, run.sizes))}, batch norm, {settings.activation}{dropout}, {settings.init}; "
        f"{parameters:,} parameters")
    say(f"training  {describe(settings)}, batches of {settings.batch_size}, seed {settings.seed}")
    say(f"kernels   {config['instruction set'].split()[0]}, threads: {config['threads']}")
    if run.epochs_done:
        say(f"resumed   after epoch {run.epochs_done}")
    say("")


def describe(settings: Settings) -> str:
    """The optimizer and its numbers."""
    name = RULES[settings.optimizer].beta_name
    return f"{settings.optimizer}, lr {settings.lr:g}" + (f", {name} {settings.beta:g}" if name else "")


def result(runs: Sequence[Run], accuracies: Sequence[tuple[float, float]]) -> None:
    """The table of one or two runs side by side; ``accuracies`` are each run's final (test loss, test accuracy)."""
    rows = [["test accuracy", *(f"{accuracy:.2%}" for _, accuracy in accuracies)],
            ["test loss", *(f"{loss:.4f}" for loss, _ in accuracies)]]
    trained = all(run.seconds for run in runs)
    if trained:
        medians = [statistics.median(run.seconds) for run in runs]
        rows.insert(1, ["training accuracy", *(f"{run.history['train_accuracy'][-1]:.2%}" for run in runs)])
        rows.append(["training loss", *(f"{run.history['train_loss'][-1]:.4f}" for run in runs)])
        rows.append(["time per epoch (median)", *map(duration, medians)])
        if len(runs) == 2:
            rows.append(["speed-up", f"{medians[1] / medians[0]:.1f} x", "1"])
    rows.append(["epochs", *(str(run.epochs_done) for run in runs)])
    print_table("Result", ["", *(run.name for run in runs)], rows)
    if len(runs) == 2 and trained:
        _print_differences(*runs)


def _print_differences(run: Run, reference: Run) -> None:
    rows = []
    first = reference.epochs_done - len(reference.seconds)  # epochs before a checkpoint are the same for both
    for title, curve in (("training loss", "train_loss"), ("test loss", "test_loss")):
        row = [title]
        for curve_differences in differences(run.history[curve][first:], reference.history[curve][first:]):
            value, epoch = largest(curve_differences)
            row += [f"{value:.1e}", str(first + epoch)]
        rows.append(row)
    print_table(f"Largest difference between the loss curves of {run.name} and {reference.name}",
                 ["", "absolute", "in epoch", "relative", "in epoch"], rows)


def ranking(trials: Sequence[Trial]) -> None:
    """The trials of a search, best first."""
    name = RULES[trials[0].settings.optimizer].beta_name
    rows = []
    for place, trial in enumerate(sorted(trials, key=lambda t: t.rank), 1):
        settings = trial.settings
        loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "diverged"
        beta = [f"{settings.beta:g}"] if name else []
        rows.append([str(place), f"{settings.lr:g}", *beta, f"{trial.accuracy:.2%}", loss,
                     "finer" if trial.finer else "first"])
    print_table("Settings tried, best first", ["", "lr", *([name] if name else []), "validation accuracy",
                                                "validation loss", "round"], rows)
