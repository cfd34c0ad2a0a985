"""What the layers share: parameters, gradients and saved state by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from .._arrays import AnyArray, Array, as_array, check_integer
from .._backend import HasBackend

MAX_SEED = (1 << 64) - 1


class Stateful(HasBackend):
    """Arrays by name: parameters with a gradient each, and buffers that are saved but not trained.

    A parameter ``weight`` is the attribute ``weight``, its gradient ``weight_grad``; None where there is none.
    """

    _parameter_names: ClassVar[tuple[str, ...]] = ()
    _buffer_names: ClassVar[tuple[str, ...]] = ()

    @property
    def params(self) -> list[Array]:
        """The arrays that training changes, always the same objects: hand them to an optimizer once."""
        return [a for name in self._parameter_names if (a := getattr(self, name)) is not None]

    @property
    def grads(self) -> list[Array]:
        """The gradients of `params`, in their order, always the same objects; `backward` overwrites their values."""
        return [a for name in self._parameter_names if (a := getattr(self, name + "_grad")) is not None]

    def _state(self) -> dict[str, Array]:
        """The live arrays that a checkpoint holds."""
        names = self._parameter_names + self._buffer_names
        return {name: a for name in names if (a := getattr(self, name)) is not None}

    def state_dict(self) -> dict[str, Array]:
        """Return copies of all parameters and buffers by name, such as `numpy.savez` takes."""
        return {name: a.copy() for name, a in self._state().items()}

    def load_state_dict(self, state: Mapping[str, AnyArray]) -> None:
        """Copy saved values into the parameters and buffers, in place.

        Parameters
        ----------
        state : mapping of str to array
            What `state_dict` of an equal layer gave (or `numpy.load` of it).

        Raises
        ------
        TypeError
            If ``state`` is not a mapping or an array has another dtype.
        ValueError
            If a name is missing or unexpected, an array has another shape, or one of the layer's own is read-only.
            Nothing has been changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}")
        own = self._state()
        if missing := [name for name in own if name not in state]:
            raise ValueError(f"state: missing {', '.join(missing)}")
        if unexpected := [str(name) for name in state if name not in own]:
            raise ValueError(f"state: unexpected {', '.join(unexpected)}")
        saved = {name: self._checked(name, a, state[name]) for name, a in own.items()}
        for name, values in saved.items():
            own[name][...] = values

    @staticmethod
    def _checked(name: str, own: Array, value: object) -> Array:
        """A copy of a saved value that fits an array of ours, which may be the one that it is a view of."""
        label = f"state[{name!r}]"
        a = value if isinstance(value, np.generic) else as_array(label, value)
        if isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"{label}: expected a plain numpy.ndarray, got {type(a).__name__}, whose mask would be "
                            "ignored")
        if a.dtype != own.dtype:
            raise TypeError(f"{label}: expected dtype {own.dtype.name}, got {a.dtype.name}")
        if a.shape != own.shape:
            raise ValueError(f"{label}: expected shape {own.shape}, got {a.shape}")
        if not own.flags.writeable:
            raise ValueError(f"{name}: expected a writeable array to load {label} into, got a read-only one")
        return np.array(a, subok=False)


class Layer(Stateful):
    """Base class of the layers: `forward`, then `backward` with the gradient of the loss for the output.

    `forward` with ``training=True`` keeps what `backward` needs (arrays are referred to, not copied: do not modify the
    input or the output in between); with ``training=False`` it keeps nothing, and `backward` is an error.
    """

    def forward(self, x: AnyArray, training: bool = True) -> Array:
        """Return the layer's output."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, dy: AnyArray) -> Array:
        """Return the gradient for the input; overwrite `grads` with the gradients for `params`."""
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def _kept(self, value: Any) -> Any:
        """What the forward kept for the backward; an error where there is nothing."""
        if value is None:
            raise RuntimeError(
                f"{type(self).__name__}.backward: expected a call of forward with training=True before it")
        return value


class RandomStream:
    """A seed and a count of the masks drawn so far, as arrays, so that a checkpoint holds them."""

    def __init__(self, seed: int | None) -> None:
        number = int.from_bytes(os.urandom(8)) if seed is None else check_integer("seed", seed, 0)
        if number > MAX_SEED:
            raise ValueError(f"seed: expected an integer < 2**64, got {number}")
        self.seed = np.array(number, np.uint64)
        self.offset = np.zeros((), np.uint64)

    def current(self) -> dict[str, int]:
        """``seed`` and ``offset`` for the next mask."""
        return {"seed": int(self.seed), "offset": int(self.offset)}

    def advance(self) -> None:
        """Count a mask as drawn."""
        self.offset += np.uint64(1)
