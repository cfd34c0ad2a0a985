"""The network of the demonstration: Dense -> BatchNorm -> activation (-> Dropout), twice, then Dense."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .. import layers
from .settings import Settings

HIDDEN = (256, 256)

FUSED = ("relu", "leaky_relu")  # batch norm applies these in the same pass over memory
ACTIVATION_LAYERS: dict[str, Callable[..., Any]] = {
    "elu": layers.ELU, "celu": layers.CELU, "sigmoid": layers.Sigmoid, "tanh": layers.Tanh}


def build(features: int, classes: int, settings: Settings, seeds: np.random.SeedSequence,
          backend: ModuleType) -> layers.Sequential:
    """Build the network in float32, its weights and dropout streams drawn from ``seeds``.

    The hidden Dense layers have no bias: batch norm subtracts it again.
    """
    init_seed, *dropout_seeds = seeds.spawn(1 + len(HIDDEN))
    rng = np.random.default_rng(init_seed)
    stack: list[Any] = []
    width = features
    for units, dropout_seed in zip(HIDDEN, dropout_seeds, strict=True):
        stack.append(layers.Dense(width, units, bias=False, init=settings.init, rng=rng, backend=backend))
        if settings.activation in FUSED:
            stack.append(layers.BatchNorm(units, activation=settings.activation, backend=backend))
        else:
            stack.append(layers.BatchNorm(units, backend=backend))
            stack.append(ACTIVATION_LAYERS[settings.activation](backend=backend))
        if settings.dropout:
            seed = int(dropout_seed.generate_state(1)[0])
            stack.append(layers.Dropout(settings.dropout, seed=seed, backend=backend))
        width = units
    stack.append(layers.Dense(width, classes, init=settings.init, rng=rng, backend=backend))
    return layers.Sequential(*stack)


def sizes(features: int, classes: int) -> list[int]:
    """Widths from the inputs to the logits."""
    return [features, *HIDDEN, classes]
