"""What one training is told: the settings of a run, their defaults, and which of them a checkpoint fixes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Rule:
    """An optimizer's name in `fastnorm.optim`, its default learning rate here, and the decay that `--beta` sets."""

    class_name: str
    lr: float
    beta_name: str | None
    beta: float | None


# Learning rates at which each optimizer learns the digits in the default number of epochs, whatever the seed.
RULES = {
    "sgd": Rule("SGD", 0.1, "momentum", 0.9),
    "rmsprop": Rule("RMSProp", 0.0005, "alpha", 0.99),
    "adam": Rule("Adam", 0.002, "beta1", 0.9),
    "adamw": Rule("AdamW", 0.002, "beta1", 0.9),
    "adagrad": Rule("Adagrad", 0.02, None, None),
}
ACTIVATIONS = ("relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh")
INITS = tuple(f"{scheme}_{shape}" for scheme in ("lecun", "xavier", "he") for shape in ("normal", "uniform"))
# The scheme derived for each activation: He et al. 2015 for rectifiers, LeCun et al. 1998 for units that keep the
# variance of their inputs, Glorot and Bengio 2010 for saturating ones.
DEFAULT_INIT = {"relu": "he_normal", "leaky_relu": "he_normal", "elu": "lecun_normal", "celu": "lecun_normal",
                "sigmoid": "xavier_normal", "tanh": "xavier_normal"}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, apart from the data. Threads and backends are not among it."""

    optimizer: str
    activation: str
    init: str
    dropout: float
    batch_size: int
    epochs: int
    lr: float
    beta: float | None
    seed: int
    augment: bool


EPOCHS = 20
SEARCH_EPOCHS = 5  # a setting of `--search`

# Fixed by what a checkpoint holds; the rest only steers how the training goes on.
FIXED = ("optimizer", "activation", "init", "dropout", "seed", "augment")


def complete(given: dict[str, Any]) -> Settings:
    """Settings of a fresh run: what the user gave, by name, and defaults."""
    optimizer, activation = given.get("optimizer", "adam"), given.get("activation", "relu")
    rule = RULES[optimizer]
    _check_beta(optimizer, given)
    defaults: dict[str, Any] = {
        "optimizer": optimizer, "activation": activation, "init": DEFAULT_INIT[activation], "dropout": 0.0,
        "batch_size": 64, "epochs": EPOCHS, "lr": rule.lr, "beta": rule.beta, "seed": 0, "augment": False}
    return Settings(**(defaults | given))


def restore(saved: dict[str, Any]) -> Settings:
    """Settings as a checkpoint holds them; TypeError or ValueError if they are not what `asdict` gave."""
    settings, usual = Settings(**saved), complete({})
    for name, known in (("optimizer", RULES), ("activation", ACTIVATIONS), ("init", INITS)):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(settings, name)!r}")
    for name in ("dropout", "batch_size", "epochs", "lr", "seed", "augment"):
        if type(getattr(settings, name)) is not type(getattr(usual, name)):
            raise TypeError(f"{name}: expected {type(getattr(usual, name)).__name__}, got {getattr(settings, name)!r}")
    if type(settings.beta) is not type(RULES[settings.optimizer].beta):
        raise TypeError(f"beta: got {settings.beta!r}")
    return settings


def resume(saved: Settings, given: dict[str, Any], source: str) -> Settings:
    """Settings of a run that continues a checkpoint: the saved ones, except what the user gave."""
    for name in FIXED:
        before, now = getattr(saved, name), given.get(name)
        if now is not None and now != before:
            was = "without --augment" if before is False else f"with --{name} {before}"
            wanted = "--augment" if now is True else f"--{name} {now}"
            raise UserError(f"--load: {source}: was trained {was}, cannot go on with {wanted}")
    _check_beta(saved.optimizer, given)
    return dataclasses.replace(saved, **given)


def _check_beta(optimizer: str, given: dict[str, Any]) -> None:
    if "beta" in given and RULES[optimizer].beta_name is None:
        raise UserError(f"--beta: {optimizer} has no such parameter")
