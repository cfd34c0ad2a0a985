"""Compiled kernels: one folder a level once built. Nothing outside the thin layer imports from here."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

NOT_BUILT = f"""fastnorm: no compiled kernels in {Path(__file__).parent}.
This is a source tree that was not built. Build it in place with `pip install -e .`, or, if fastnorm is installed
elsewhere, start Python in another directory so that the installed package is imported."""

if sys.platform == "darwin":
    # LLVM's runtime ends a process that holds two copies of it. On macOS each wheel brings its own (PyTorch's, ours),
    # and the loader does not merge them; two pools of threads are slower, but right. scikit-learn does the same.
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")

try:
    import_module(".runtime", __name__)
except ImportError as error:
    if any(path.suffix in (".so", ".pyd") for path in Path(__file__).parent.glob("runtime.*")):
        raise  # built, but for another Python or with a missing library: the loader's own words are better
    raise ImportError(NOT_BUILT) from error
