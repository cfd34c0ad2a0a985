"""Who fastnorm is measured against. Each module has a class that knows one library and gives its calls for a case."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ..cases import Case, Inputs
from ..measure import Call

# In the order of tables. The names are the classes' own.
MODULES = {"PyTorch": "pytorch", "torch.compile": "compiled", "JAX": "jax_jit", "thinc": "thinc_adam",
           "DeepSpeed": "deepspeed_adam"}
NAMES = tuple(MODULES)


class Rival(Protocol):
    """A library, at its best."""

    name: str
    version: str

    def calls(self, case: Case, inputs: Inputs) -> Iterable[Call]:
        """The library's ways to do what the case does; none if it has no such thing."""


class AbsentError(Exception):
    """A rival that cannot run here; the text says why."""


def load(names: Sequence[str], threads: int) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that are installed, on so many threads, and the reasons why others are not."""
    present: list[Rival] = []
    absent: dict[str, str] = {}
    for name in names:
        try:
            module: Any = importlib.import_module(f".{MODULES[name]}", __name__)
            present.append(module.load(threads))
        except AbsentError as reason:
            absent[name] = str(reason)
    return present, absent


def need(module: str) -> Any:
    """Import a library, or say that it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise AbsentError(f"{module} cannot be imported: {error}") from None
        raise AbsentError(f"{module} is not installed") from None
    except Exception as error:  # a broken installation of another project: whatever it raises, it cannot run
        raise AbsentError(f"{module} cannot be imported: {type(error).__name__}: {error}") from None
