"""Which kernel build runs, on how many threads; fork; `show_config`.

The build is chosen once, at import: the best level that was built, that the CPU has and that the operating system
saves the registers of. ``FASTNORM_ISA`` names another one; asking for one that cannot run here is an `ImportError`.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ._arrays import check_integer
from ._kernels import NOT_BUILT
from ._kernels import runtime as _facts
from ._quota import cpu_quota

LEVELS = ("baseline", "avx2", "avx512")  # weakest first
KERNEL_MODULES = ("activation", "bandwidth", "batchnorm", "optimizer", "softmax")


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
            raise ImportError(NOT_BUILT)
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


def _threads_from_environment() -> int | None:
    """``FASTNORM_NUM_THREADS``, None where it is not set."""
    value = os.environ.get("FASTNORM_NUM_THREADS", "").strip()
    if not value:
        return None
    if not value.isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise ImportError(f"FASTNORM_NUM_THREADS: expected an integer in [1, {MAX_THREADS}], got {value!r}")
    return int(value) if _facts.openmp_version() else 1


MAX_THREADS = 1024  # above any CPU of today; keeps a typing error from asking the system for 10**9 threads

kernels = Kernels()
_level, level_reason = choose_level(os.environ.get("FASTNORM_ISA"))
kernels.load(_level)

# Plain module globals, each read or replaced in one step: safe from many threads, with the GIL or without.
_num_threads = _threads_from_environment()  # what was asked for; None: what the machine offers
_openmp_threads = _facts.openmp_max_threads()  # OpenMP's own number at import: a lower one later is a limit
# As OpenMP understands it: with anything else, libgomp goes by the processors that it finds.
_POSITIVE = r"\s*0*[1-9][0-9]*\s*"
_openmp_was_told = re.fullmatch(f"{_POSITIVE}(,{_POSITIVE})*", os.environ.get("OMP_NUM_THREADS", "")) is not None
_quota = math.ceil(min(cpu_quota(), MAX_THREADS))
_workers_released = True  # before the last fork
_one_thread_only = not _facts.openmp_version()


def get_num_threads() -> int:
    """Return the number of threads that kernels use at most.

    The first of these that was given decides:

    1. `set_num_threads`,
    2. the environment variable ``FASTNORM_NUM_THREADS``, read at import,
    3. the environment variable ``OMP_NUM_THREADS``, read when OpenMP is loaded,
    4. the CPUs that this process may use: its affinity mask (``taskset``, `os.sched_setaffinity`, also after import),
       and the quota of its control group, read at import and rounded up.

    A limit that ``threadpoolctl.threadpool_limits`` (or ``omp_set_num_threads``) sets to less than OpenMP's number at
    import is obeyed beside all of them while it lasts. OpenMP keeps its settings for each thread: the limit holds for
    calls from the Python thread that set it.

    A child forked from this process starts with 1, as if by `set_num_threads`: forked workers are many.

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
    return _threads(recent=False)


def threads_for_call() -> int:
    """`get_num_threads` for one call of a kernel, where the affinity mask may be 10 ms old: asking for it takes as long
    as a small kernel.
    """
    return _threads(recent=True)


def _threads(*, recent: bool) -> int:
    limit: int = _facts.openmp_max_threads()
    if _num_threads is not None:
        return min(_num_threads, limit) if limit < _openmp_threads else _num_threads
    return limit if _openmp_was_told else int(_facts.machine_threads(_quota, recent))


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
    _num_threads = 1 if _one_thread_only else n


def expect_pytorch() -> None:
    """From now on, PyTorch may have kept OpenMP's threads awake when a call comes after a pause."""
    _facts.share_team()


if "torch" in sys.modules:
    expect_pytorch()


def _before_fork() -> None:
    global _workers_released
    _workers_released = _facts.openmp_release_workers()


def _after_fork_in_child() -> None:
    # A child has only the thread that forked. Where OpenMP's record of that thread's workers could not be cleared
    # before, a team there would wait for them forever.
    global _num_threads, _one_thread_only
    _num_threads = 1
    _one_thread_only = _one_thread_only or not _workers_released


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


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
        "threads": str(get_num_threads()),
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
