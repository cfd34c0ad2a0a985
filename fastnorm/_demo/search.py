"""`--search N`: random settings, tried for a few epochs each and ranked on a validation split.

Learning rate and 1 - beta are drawn on a log scale (J. Bergstra, Y. Bengio, "Random search for hyper-parameter
optimization", JMLR 13, 2012): equal ratios are equally likely. A second, finer round draws around the best of the
first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from .data import Data, hold_out
from .settings import RULES, Settings
from .train import DivergedError, Epoch, Run

VALIDATION_EVERY = 5  # a fifth of the training set; the test set is not looked at
FINER = 0.2  # width of the second round's ranges, of the first round's, in logarithms

LR_RANGE = (0.01, 100.0)  # times the optimizer's default
ONE_MINUS_BETA_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class Trial:
    """One setting and how it did on the validation split ; infinite loss: it diverged."""

    settings: Settings
    finer: bool
    loss: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts the best first: by accuracy, then by loss."""
        return -self.accuracy, self.loss


Range = tuple[float, float]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw so that log(x) is uniform; three digits, so that what is printed is what was tried.

    Examples
    --------
    >>> import numpy as np
    >>> 1e-4 <= log_uniform(np.random.default_rng(0), 1e-4, 1e-1) <= 1e-1
    True
    """
    return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def around(center: float, full: Range) -> Range:
    """The part of a range that lies within `FINER` of its logarithmic width around ``center``, clipped to it."""
    half = (full[1] / full[0]) ** (FINER / 2)
    return max(full[0], center / half), min(full[1], center * half)


def _draw(rng: np.random.Generator, base: Settings, lr_range: Range, beta_range: Range) -> Settings:
    lr = log_uniform(rng, *lr_range)
    one_minus_beta = log_uniform(rng, *beta_range)  # drawn for every optimizer: the same learning rates for a seed
    beta = None if base.beta is None else float(f"{1 - one_minus_beta:.6g}")
    return dataclasses.replace(base, lr=lr, beta=beta)


def _try(settings: Settings, finer: bool, data: Data, name: str, backend: ModuleType) -> Trial:
    run = Run(name, backend, data, settings)
    loss, accuracy = math.inf, 0.0
    try:
        for event in run.train():
            if isinstance(event, Epoch):
                loss, accuracy = event.test_loss, event.test_accuracy
    except DivergedError:
        loss, accuracy = math.inf, 0.0
    return Trial(settings, finer, loss if math.isfinite(loss) else math.inf, accuracy)


def finer_trials(n: int) -> int:
    """How many settings the second round tries after ``n`` of the first."""
    return max(1, n // 2)


def search(n: int, base: Settings, data: Data, name: str, backend: ModuleType) -> Iterator[Trial]:
    """Yield ``n`` trials over the whole ranges, then `finer_trials` around the best of them."""
    data = hold_out(data, VALIDATION_EVERY)
    rng = np.random.default_rng(np.random.SeedSequence(base.seed).spawn(4)[-1])
    default = RULES[base.optimizer].lr
    lr_range, beta_range = (default * LR_RANGE[0], default * LR_RANGE[1]), ONE_MINUS_BETA_RANGE
    best: Trial | None = None
    for _ in range(n):
        trial = _try(_draw(rng, base, lr_range, beta_range), False, data, name, backend)
        best = trial if best is None or trial.rank < best.rank else best
        yield trial
    assert best is not None  # n >= 1
    lr_range = around(best.settings.lr, lr_range)
    if best.settings.beta is not None:
        beta_range = around(1 - best.settings.beta, beta_range)
    for _ in range(finer_trials(n)):
        yield _try(_draw(rng, base, lr_range, beta_range), True, data, name, backend)
