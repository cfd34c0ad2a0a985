"""`--save` and `--load`: `fastnorm.checkpoint`, its errors as the one line that a user is shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .. import checkpoint
from .errors import UserError, reason


def check_destination(option: str, path: Path) -> None:
    """Find out before a long training that its result could not be written."""
    try:
        target = path.resolve()  # where a symbolic link leads
        # What is a link still is one of a loop: from Python 3.13 on, only `stat` finds it out.
        kind = target.stat().st_mode if target.exists() or target.is_symlink() else stat.S_IFREG
        folder_exists = target.parent.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a loop of links
        raise UserError(f"{option}: {path}: {reason(error)}") from None
    if not stat.S_ISREG(kind):  # a device or a pipe would be replaced by a file
        found = "a directory" if stat.S_ISDIR(kind) else "a device, pipe or socket"
        raise UserError(f"{option}: {path}: expected a file name, got {found}")
    if not folder_exists:
        raise UserError(f"{option}: {target.parent if path.is_symlink() else path.parent}: no such directory")
    if not os.access(target.parent, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UserError(f"{option}: {path}: permission denied")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run."""
    try:
        checkpoint.save(path, **state)
    except OSError as error:
        raise UserError(f"--save: {path}: {reason(error)}") from None


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote."""
    try:
        return checkpoint.load(path)
    except OSError as error:
        raise UserError(f"--load: {path}: {reason(error)}") from None
    except ValueError as error:  # which names the path
        raise UserError(f"--load: {reason(error)}") from None


def check_same_structure(source: str, expected: Any, found: Any, at: str) -> None:
    """Require the keys, array shapes and dtypes of ``expected``; the error names the first place that differs."""
    if isinstance(expected, np.ndarray):
        if not isinstance(found, np.ndarray) or found.shape != expected.shape or found.dtype != expected.dtype:
            got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
            raise UserError(f"--load: {source}: {at}: expected {expected.dtype} {expected.shape}, got {got}")
    elif isinstance(expected, dict):
        if not isinstance(found, dict) or {str(key) for key in expected} != {str(key) for key in found}:
            raise UserError(f"--load: {source}: {at}: expected entries {', '.join(map(str, expected)) or 'none'}, "
                            f"got {', '.join(map(str, found)) or 'none' if isinstance(found, dict) else found!r}")
        for key, value in expected.items():
            check_same_structure(source, value, found[str(key)], f"{at}.{key}")
    elif isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(expected) != len(found):
            raise UserError(f"--load: {source}: {at}: expected {len(expected)} entries, "
                            f"got {len(found) if isinstance(found, (list, tuple)) else repr(found)}")
        for i, value in enumerate(expected):
            check_same_structure(source, value, found[i], f"{at}.{i}")
