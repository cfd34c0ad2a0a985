"""Where the layers and the optimizers look their functions up."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

Backend = Any
"""`fastnorm`, `fastnorm.reference`, or any object with the same functions."""


class HasBackend:
    """An object with a ``backend``, None for `fastnorm` itself; copied and pickled with its backend by name.

    A module cannot be pickled, and `copy.deepcopy` goes the same way.
    """

    def __init__(self, backend: Backend = None) -> None:
        self.backend = backend

    @property
    def _functions(self) -> Backend:
        """Where the functions are looked up, at every call."""
        if self.backend is not None:
            return self.backend
        import fastnorm  # not at the top: fastnorm imports the layers

        return fastnorm

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(self.backend, ModuleType):
            state["backend_module"] = state.pop("backend").__name__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if name := self.__dict__.pop("backend_module", None):
            self.backend = importlib.import_module(name)
