"""Which kernel build runs, on how many threads; fork; `show_config`.

The build is chosen once, at import: the best level that was built, that the CPU has and that the operating system
saves the registers of. ``FASTNORM_ISA`` names another one; asking for one that cannot run here is an `ImportError`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ._arrays import check_integer

LEVELS = ("baseline", "avx2", "avx512")  # weakest first
KERNEL_MODULES = ("activation", "bandwidth", "batchnorm", "optimizer", "softmax")

_NOT_BUILT = """fastnorm: no compiled kernels in {folder}.
This is a source tree that was not built. Build it in place with `pip install -e .`, or, if fastnorm is installed
elsewhere, start Python in another directory so that the installed package is imported."""

try:
    from ._kernels import runtime as _facts
except ImportError as error:
    if any(path.suffix in (".so", ".pyd") for path in Path(__file__).parent.glob("_kernels/runtime.*")):
        raise  # built, but for another Python or with a missing library: the loader's own words are better
    raise ImportError(_NOT_BUILT.format(folder=Path(__file__).parent / "_kernels")) from error


class Kernels:
    """The compiled modules of the level in use: ``kernels.batchnorm.forward(...)``."""

    level: str
    activation: ModuleType | Any
    bandwidth: ModuleType | Any
    batchnorm: ModuleType | Any
    optimizer: ModuleType | Any
    softmax: ModuleType | Any

    def load(self, level: str) -> None:
        """Switch every kernel to this level. The caller has made sure that it can run."""
        for name in KERNEL_MODULES:
            module = importlib.import_module(f"fastnorm._kernels.{level}.{name}")
            module.share_team_state(_facts.team_state_function())
            setattr(self, name, module)
        self.level = level


def built_levels() -> list[str]:
    """Levels that this installation holds, weakest first."""
    folder = Path(__file__).parent / "_kernels"
    return [level for level in LEVELS if any((folder / level).glob("batchnorm*"))]


def available_levels() -> list[str]:
    """Levels that this installation holds and this machine can run, weakest first."""
    return [level for level in built_levels() if _facts.cpu_supports(level)]


def choose_level(wanted: str | None) -> tuple[str, str]:
    """The level to load and why, given the value of ``FASTNORM_ISA``."""
    built, available = built_levels(), available_levels()
    if not wanted:
        if not available:
            raise ImportError(_NOT_BUILT.format(folder=Path(__file__).parent / "_kernels"))
        return available[-1], "the best that this build holds and this machine runs"
    if wanted in available:
        return wanted, "FASTNORM_ISA asks for it"
    if wanted not in LEVELS:
        reason = "no such level"
    elif wanted not in built:
        reason = "this build does not hold it"
    else:
        reason = "this machine cannot run it"
    raise ImportError(f"FASTNORM_ISA: expected one of {', '.join(available)}, got {wanted!r}: {reason}")


def _threads_from_environment() -> int:
    """``FASTNORM_NUM_THREADS`` if set, else what OpenMP would use (OMP_NUM_THREADS, the affinity mask)."""
    value = os.environ.get("FASTNORM_NUM_THREADS", "").strip()
    if not value:
        return int(_facts.openmp_max_threads())
    if not value.isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise ImportError(f"FASTNORM_NUM_THREADS: expected an integer in [1, {MAX_THREADS}], got {value!r}")
    return int(value)


MAX_THREADS = 1024  # above any CPU of today; keeps a typing error from asking the system for 10**9 threads

kernels = Kernels()
_level, level_reason = choose_level(os.environ.get("FASTNORM_ISA"))
kernels.load(_level)
_num_threads = _threads_from_environment()


def get_num_threads() -> int:
    """Return the number of threads that kernels use at most.

    Returns
    -------
    int
        1 in a build without OpenMP.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.get_num_threads() >= 1
    True
    """
    return _num_threads


def set_num_threads(n: int) -> None:
    """Set the number of threads that kernels use at most, for the whole process.

    Small arrays run on one thread whatever the setting. The results are the same bits for every number.

    Parameters
    ----------
    n : int
        At least 1. More than the machine has cores is honoured, up to 1024.

    Raises
    ------
    TypeError
        If ``n`` is not an integer.
    ValueError
        If ``n`` is less than 1 or greater than 1024.

    Examples
    --------
    >>> import fastnorm as fn
    >>> before = fn.get_num_threads()
    >>> fn.set_num_threads(1)
    >>> fn.get_num_threads()
    1
    >>> fn.set_num_threads(before)
    """
    global _num_threads
    n = check_integer("n", n, 1)
    if n > MAX_THREADS:
        raise ValueError(f"n: expected an integer <= {MAX_THREADS}, got {n}")
    _num_threads = n if _facts.openmp_version() else 1


def _after_fork_in_child() -> None:
    # libgomp's worker threads do not exist in a forked child, and starting a team there can hang: the child runs on
    # one thread, which needs no team, until it asks for more.
    global _num_threads
    _num_threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _openmp_runtime() -> str:
    """The OpenMP runtime library loaded in this process, by file name where the system tells."""
    version = _facts.openmp_version()
    if not version:
        return "none (built without OpenMP: kernels run on one thread)"
    names: list[str] = []
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
        runtimes = ("libgomp", "libomp", "libiomp")
        names = sorted({name for path in paths if (name := Path(path).name).startswith(runtimes)})
    return f"{', '.join(names) or 'loaded'} (OpenMP {version})"


def config() -> dict[str, str]:
    """What `show_config` prints, as text by title, in its order."""
    from . import __version__

    return {
        "fastnorm": __version__,
        "instruction set": f"{kernels.level} ({level_reason})",
        "available": ", ".join(available_levels()),
        "built": ", ".join(built_levels()),
        "architecture": _facts.architecture(),
        "threads": str(_num_threads),
        "OpenMP runtime": _openmp_runtime(),
        "compiler": _facts.compiler(),
        "flags": f"{kernels.batchnorm.build_flags()}",
        "NumPy": importlib.import_module("numpy").__version__,
        "Python": sys.version.split()[0],
    }


def show_config() -> None:
    """Print version, instruction set (chosen, available, why), threads, OpenMP runtime, compiler and flags.

    Examples
    --------
    >>> import fastnorm as fn
    >>> fn.show_config()  # doctest: +ELLIPSIS
    fastnorm          ...
    """
    for title, text in config().items():
        print(f"{title:17s} {text}")
