"""What goes wrong on the user's side: one line, no traceback."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses


class UserError(Exception):
    """Something that the user can put right; the text is the one line that is shown, with exit status 2."""


def require(module: str, package: str, extra: str = "demo") -> ModuleType:
    """Import a module of an extra (`demo`, `bench`), or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there and misses something of its own: its words are better
        what = {"demo": "the demonstration needs", "bench": "the benchmark needs"}[extra]
        raise UserError(f"{package} is not installed; install what {what} with `pip install \"fastnorm[{extra}]\"` "
                        f"(in a source tree: `pip install -e \".[{extra}]\"`)") from None


def exit_command_line(error: ImportError) -> None:
    """End `python -m fastnorm` and the `fastnorm` script with one line if the package itself cannot be imported.

    In any other program, return.
    """
    if sys.argv[:1] == ["-m"]:  # Python has not found the module to run yet; its name is among the original arguments
        ours = "fastnorm" in sys.orig_argv
    else:
        ours = bool(sys.argv) and Path(sys.argv[0]).stem == "fastnorm"
    if ours:
        print(f"fastnorm: {reason(error).removeprefix('fastnorm: ')}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None


def reason(error: BaseException) -> str:
    """The words of an exception, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
