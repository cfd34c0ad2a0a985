"""The training loop: one run on one backend, as a generator of progress events.

Every random number comes from a generator of its own purpose (weights, order, augmentation, dropout), spawned from
one seed, so that switching one option does not reshuffle what the others draw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from .. import layers, optim
from . import checkpoint, model
from .data import Data, Split, max_shift, random_shifts, shift
from .errors import UserError, reason
from .settings import RULES, Settings

EVALUATION_ROWS = 1024  # a chunk of the test set and its activations stay in cache
BETA2 = 0.999  # Adam's decay of the squared gradients
CURVES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class DivergedError(UserError):
    """The loss is not a finite number any more."""


@dataclass(frozen=True)
class Step:
    """One batch is done; loss and accuracy are means over the epoch so far."""

    epoch: int
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Epoch:
    """One epoch is done. Accuracies are in [0, 1]; `seconds` is the time of its training steps, without evaluation."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass
class Run:
    """A network in training: its state, and one value an epoch of each of `CURVES`."""

    name: str
    backend: ModuleType
    data: Data
    settings: Settings
    history: dict[str, list[float]] = field(default_factory=lambda: {curve: [] for curve in CURVES})
    seconds: list[float] = field(default_factory=list)  # of the epochs trained in this process

    def __post_init__(self) -> None:
        model_seeds, order_seed, augment_seed = np.random.SeedSequence(self.settings.seed).spawn(3)
        features = self.data.train.images.shape[1]
        self.network = model.build(features, self.data.classes, self.settings, model_seeds, self.backend)
        self.loss = layers.SoftmaxCrossEntropy(backend=self.backend)
        optimizer_class = getattr(optim, RULES[self.settings.optimizer].class_name)
        self.optimizer = optimizer_class(self.network.params, **_optimizer_options(self.settings), backend=self.backend)
        self.order_rng = np.random.default_rng(order_seed)
        self.augment_rng = np.random.default_rng(augment_seed)
        self.moments = _input_moments(self.data, self.settings.augment, self.backend)
        self._test = Split(self.moments.standardize(self.data.test.images), self.data.test.labels)

    @property
    def sizes(self) -> list[int]:
        """Widths of the network, from the inputs to the logits."""
        return model.sizes(self.data.train.images.shape[1], self.data.classes)

    @property
    def epochs_done(self) -> int:
        """Epochs trained so far, those before a checkpoint included."""
        return len(self.history["train_loss"])

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(batch_bounds(len(self.data.train), self.settings.batch_size))

    def train(self) -> Iterator[Step | Epoch]:
        """Train until `settings.epochs` are done; the caller may stop between any two events."""
        data, n, augment = self.data.train, len(self.data.train), self.settings.augment
        # without shifts, standardized once for all epochs; a copy that lives no longer than this loop
        inputs = data.images if augment else self.moments.standardize(data.images)
        for epoch in range(self.epochs_done + 1, self.settings.epochs + 1):
            total_loss, correct, seen, seconds = 0.0, 0, 0, 0.0
            order = self.order_rng.permutation(n)
            for step, (start, stop) in enumerate(batch_bounds(n, self.settings.batch_size), 1):
                before = perf_counter()
                rows = order[start:stop]
                images, labels = inputs[rows], data.labels[rows]
                if augment:
                    images = self.moments.standardize(random_shifts(images, self.data.image_shape, self.augment_rng))
                logits = self.network.forward(images, training=True)
                loss = float(self.loss.forward(logits, labels))
                self.network.backward(self.loss.backward())
                self.optimizer.step(self.network.grads)
                seconds += perf_counter() - before
                if not math.isfinite(loss):
                    raise DivergedError(f"the training loss became {loss} in epoch {epoch}: try a smaller --lr "
                                    f"(it is {self.settings.lr:g})")
                total_loss += loss * len(labels)
                correct += int(np.count_nonzero(logits.argmax(axis=1) == labels))
                seen += len(labels)
                yield Step(epoch, step, total_loss / seen, correct / seen)
            done = Epoch(epoch, total_loss / n, correct / n, *self.evaluate(), seconds)
            for curve in CURVES:
                self.history[curve].append(getattr(done, curve))
            self.seconds.append(seconds)
            yield done

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test set, with the running statistics of batch norm and without dropout."""
        loss, correct, n = 0.0, 0, len(self._test)
        for start in range(0, n, EVALUATION_ROWS):
            labels = self._test.labels[start:start + EVALUATION_ROWS]
            logits = self.network.forward(self._test.images[start:start + EVALUATION_ROWS], training=False)
            loss += float(self.loss.forward(logits, labels)) * len(labels)
            correct += int(np.count_nonzero(logits.argmax(axis=1) == labels))
        return loss / n, correct / n

    # -- what a checkpoint holds -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "sizes": self.sizes,
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "settings": dataclasses.asdict(self.settings),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order_rng": self.order_rng.bit_generator.state,
            "augment_rng": self.augment_rng.bit_generator.state,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any], source: str) -> None:
        """Continue from what `state` returned in another process; ``source`` names the file in errors."""
        try:
            sizes, fingerprint, history = list(state["sizes"]), state["data"]["fingerprint"], state["history"]
            if sizes != self.sizes:
                raise UserError(f"--load: {source}: was trained on {sizes[0]} inputs in {sizes[-1]} classes, "
                                f"got {self.sizes[0]} inputs in {self.sizes[-1]} classes ({self.data.name})")
            if fingerprint != self.data.fingerprint:
                raise UserError(f"--load: {source}: was trained on other data ({state['data']['name']})")
            checkpoint.check_same_structure(source, self.network.state_dict(), state["network"], "network")
            checkpoint.check_same_structure(source, self.optimizer.state_dict(), state["optimizer"], "optimizer")
            checkpoint.check_same_structure(source, dict.fromkeys(CURVES, [0.0] * len(history["test_loss"])), history,
                                            "history")
            self.network.load_state_dict(state["network"])
            # the user may have given another learning rate or decay
            self.optimizer.load_state_dict(state["optimizer"] | _optimizer_options(self.settings))
            self.order_rng.bit_generator.state = state["order_rng"]
            self.augment_rng.bit_generator.state = state["augment_rng"]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"--load: {source}: a damaged checkpoint ({reason(error)})") from None
        self.history = {curve: list(history[curve]) for curve in CURVES}


def batch_bounds(n: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and stop of each batch; a last row alone joins the batch before, for batch norm needs two.

    Examples
    --------
    >>> batch_bounds(9, 4)
    [(0, 4), (4, 9)]
    >>> batch_bounds(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


def _optimizer_options(settings: Settings) -> dict[str, Any]:
    """The learning rate and the decay, under the optimizer's own name for it."""
    rule = RULES[settings.optimizer]
    if rule.beta_name is None:
        return {"lr": settings.lr}
    if rule.beta_name == "beta1":
        return {"lr": settings.lr, "betas": (settings.beta, BETA2)}
    return {"lr": settings.lr, rule.beta_name: settings.beta}


def _input_moments(data: Data, augment: bool, backend: ModuleType) -> Any:
    """Mean and variance of each pixel over the training set; with ``augment``, over all the shifts of all its images.

    Without the shifts, a pixel that is nearly always black would enter at hundreds of standard deviations as soon as
    a shifted stroke lights it.
    """
    moments = backend.Moments(axis=1)
    reach = max_shift(data.image_shape)
    offsets = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)] if augment else [(0, 0)]
    for start in range(0, len(data.train), EVALUATION_ROWS):
        images = data.train.images[start:start + EVALUATION_ROWS]
        for dy, dx in offsets:
            moments.update(shift(images, data.image_shape, dy, dx) if augment else images)
    return moments
