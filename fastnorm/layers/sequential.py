"""Layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from .._arrays import AnyArray, Array, as_array
from .base import Layer


class Sequential(Layer):
    """Layers one after the other; itself a layer.

    Parameters
    ----------
    *layers : Layer
        Distinct layers. Names in the state are prefixed with their position: ``"0.weight"``.

    Raises
    ------
    TypeError
        If an argument is not a layer (a loss is none: apply it to the output).
    ValueError
        If a layer appears twice.

    Examples
    --------
    >>> import numpy as np
    >>> from fastnorm.layers import Dense, Sequential, Tanh
    >>> model = Sequential(Dense(3, 8, rng=0), Tanh(), Dense(8, 2, rng=1))
    >>> model.forward(np.ones((4, 3), np.float32)).shape
    (4, 2)
    >>> list(model.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{i}]: expected a fastnorm.layers.Layer, got {type(layer).__name__}")
            if any(layer is other for other in layers[:i]):
                raise ValueError(f"layers[{i}]: expected distinct layers, got one that is listed twice")
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> Layer:
        return self.layers[i]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return the output of the last layer."""
        y = as_array("x", x)
        for layer in self.layers:
            y = layer.forward(y, training)
        return y

    def backward(self, dy: AnyArray) -> Array:
        """Return the gradient for the input of the first layer; overwrite `grads`."""
        dx = as_array("dy", dy)
        for layer in reversed(self.layers):
            dx = layer.backward(dx)
        return dx

    @property
    def params(self) -> list[Array]:
        """The parameters of all layers, in their order."""
        return [p for layer in self.layers for p in layer.params]

    @property
    def grads(self) -> list[Array]:
        """The gradients of `params`, in their order."""
        return [g for layer in self.layers for g in layer.grads]

    def _state(self) -> dict[str, Array]:
        return {f"{i}.{name}": a for i, layer in enumerate(self.layers) for name, a in layer._state().items()}
