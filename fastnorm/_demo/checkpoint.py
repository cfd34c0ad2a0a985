"""`--save` and `--load`: a whole run in one .npz file, without pickle.

The file holds a JSON text `state` (nested dicts and lists of numbers and strings) in which each array is replaced by
its name, and the arrays by these names. Nothing in it depends on the clock, so the same run saves the same bytes.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import Array
from .errors import UserError, reason

FORMAT = "fastnorm checkpoint 1"
ARRAY = "__array__"


def _pack(tree: Any, path: str, arrays: dict[str, Array]) -> Any:
    """The tree as JSON can say it; arrays move to ``arrays`` under the path at which they were found."""
    if isinstance(tree, np.ndarray):
        arrays[path] = tree
        return {ARRAY: path}
    if isinstance(tree, dict):
        return {key: _pack(value, f"{path}.{key}" if path else str(key), arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_pack(value, f"{path}.{i}", arrays) for i, value in enumerate(tree)]
    return tree.item() if isinstance(tree, np.generic) else tree


def _unpack(tree: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {ARRAY}:
            return arrays[tree[ARRAY]]
        return {key: _unpack(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unpack(value, arrays) for value in tree]
    return tree


def check_destination(option: str, path: Path) -> None:
    """Find out before a long training that its result could not be written."""
    try:
        target = path.resolve()  # where a symbolic link leads
        kind = target.stat().st_mode if target.exists() else stat.S_IFREG
        folder_exists = target.parent.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a loop of links (RuntimeError before Python 3.13)
        raise UserError(f"{option}: {path}: {reason(error)}") from None
    if not stat.S_ISREG(kind):  # a device or a pipe would be replaced by a file
        found = "a directory" if stat.S_ISDIR(kind) else "a device, pipe or socket"
        raise UserError(f"{option}: {path}: expected a file name, got {found}")
    if not folder_exists:
        raise UserError(f"{option}: {target.parent if path.is_symlink() else path.parent}: no such directory")
    if not os.access(target.parent, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UserError(f"{option}: {path}: permission denied")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state; the file is the old one or the new one at any moment, never half of one."""
    arrays: dict[str, Array] = {}
    text = json.dumps({"format": FORMAT, **_pack(state, "", arrays)})
    path = path.resolve()  # through a symbolic link, not in its place
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, state=np.array(text), **arrays)  # type: ignore[arg-type]  # of the names
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--save: {path}: {reason(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; nothing in the file is executed or trusted to be complete."""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive")
            arrays = {name: loaded[name] for name in loaded.files}
        state = json.loads(str(arrays.pop("state")[()]))
        if state.pop("format") != FORMAT:
            raise ValueError("of another format")
        return dict(_unpack(state, arrays))
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"--load: {path}: {reason(error)}") from None
        raise _not_a_checkpoint(path, error) from None
    except Exception as error:  # zip, zlib, npy, JSON and key errors: whatever a damaged file provokes
        raise _not_a_checkpoint(path, error) from None


def _not_a_checkpoint(path: Path, error: Exception) -> UserError:
    detail = "no pickles are read" if "pickle" in str(error).lower() else reason(error)
    return UserError(f"--load: {path}: not a fastnorm checkpoint, or a damaged one ({detail})")


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
